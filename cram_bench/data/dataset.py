"""Images and labels as tensors on a device; batches, normalised and augmented there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cram_bench.checks import instance, integer, pairs
from cram_bench.data.decoding import DataError, dimensions

AT_ONCE = 125
"""Images in a batch of an evaluation: few enough for the activations of a small network to stay in the processor's cache."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels as tensors on one device.

    Attributes:
        name: how tables call it.
        images: uint8, shape (n, channels, height, width).
        labels: shape (n,), values in [0, len(classes)); integers of any size and booleans become int64.
        classes: class names in label order.
        mean: per channel, of the *training* images scaled to [0, 1]; shape (channels,).
        std: likewise.
        flip: whether augmentation may mirror an image.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    flip: bool = True

    def __post_init__(self) -> None:
        if not (self.labels.is_floating_point() or self.labels.is_complex()):  # what else they are, training refuses
            object.__setattr__(self, "labels", self.labels.long())

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[1:]))
        return f"Dataset({self.name!r}, {len(self):,} images of {shape}, {len(self.classes)} classes)"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Image channels, 1 or 3."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height of the images in pixels."""
        return self.images.shape[2]

    @property
    def majority(self) -> float:
        """Share of the most frequent label: the accuracy of always guessing the commonest class.

        Raises:
            ValueError: there are no labels.
        """
        if not len(self):
            raise ValueError(f"{self.name} has no labels, and so no commonest class")
        return int(self.labels.bincount().max()) / len(self)

    @property
    def at_once(self) -> int | None:
        """Images that a batch should have at most where nobody learns from it; None for any number."""
        return None

    def to(self, device: torch.device | str) -> Dataset:
        """Return the data set with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "mean", "std")}
        return replace(self, **moved)

    def take(self, indices: Sequence[int] | Tensor) -> Dataset:
        """Return the images at `indices`, in that order."""
        indices = torch.as_tensor(indices, device=self.labels.device)
        if not len(indices):
            indices = indices.long()  # an empty list has no type
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def sample(self, count: int, seed: int = 0) -> Dataset:
        """Return `count` images drawn without replacement; all, in order, when there are no more than that."""
        integer("images of a sample", count, 1)
        if count >= len(self):
            return self
        order = shuffled(len(self), torch.Generator().manual_seed(seed))
        return self.take(order[:count].sort().values)

    def calibration(
        self, count: int = 2000, augment: bool = True, seed: int = 0, batch_size: int = 500
    ) -> list[tuple[Tensor, Tensor]]:
        """Return batches for BatchNorm tuning: about `count` random images in equal batches, augmented as in training.

        Augmented, because BatchNorm's statistics were those of augmented images while the weights were trained: on
        a dense network such batches give back the statistics of the training, and plain images others.
        """
        sample = self.sample(count, seed)
        integer("batch_size", batch_size, 1)
        size = len(sample) // math.ceil(len(sample) / batch_size)  # equal batches leave out the fewest
        return list(sample.batches(size, seed=seed, augment=augment, drop_last=True, channels_last=True))

    def resized(self, size: int) -> Dataset:
        """Return the images scaled to `size` × `size` pixels (bilinear, antialiased) and three channels.

        For a network that was trained on images of another size. Mean and standard deviation stay.
        """
        integer("size", size, 1)
        if self.images.shape[1:] == (3, size, size):
            return self
        options = {"size": (size, size), "mode": "bilinear", "antialias": True, "align_corners": False}
        scaled = torch.cat([F.interpolate(part.float(), **options) for part in self.images.split(1000)])  # type: ignore[arg-type]
        images = scaled.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
        mean, std = (value.expand(3).clone() for value in (self.mean, self.std))
        return replace(self, images=images, mean=mean, std=std)

    def split(self, count: int, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Split off `count` random images: (the rest, those). For validation; the test set is for the final word."""
        if integer("held out images", count, 1) >= len(self):
            raise ValueError(f"cannot hold out {count} of {len(self)} images")
        order = shuffled(len(self), torch.Generator().manual_seed(seed))
        return self.take(order[count:].sort().values), self.take(order[:count].sort().values)

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 images to zero mean and unit variance per channel: (x/255 − mean)/std, float32."""
        scale = 1 / (255 * self.std)
        return torch.addcmul((-self.mean / self.std).view(-1, 1, 1), images.float(), scale.view(-1, 1, 1))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        drop_last: bool = False,
        channels_last: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs, labels) once over the data.

        Args:
            batch_size: images per batch; the last one may be smaller.
            seed: shuffles, and drives augmentation; None keeps the order of the data.
            augment: random crop after padding by an eighth of the side with black, and a mirror where `flip` allows.
            drop_last: leave out a last batch that is smaller.
            channels_last: lay the inputs out channel-innermost.
            share: (r, n) yields of every batch the images r, r + n, r + 2n …, drawn and augmented as in the whole batch;
                nothing where that is none.

        Yields:
            Normalised float32 inputs (b, channels, height, width) and int64 labels (b,).

        Raises:
            ValueError: the batch size is not positive, larger than the data while `drop_last`, or augmentation
                has no seed.
        """
        self._check(batch_size, seed, augment, drop_last)
        rank, world = share
        generator = torch.Generator().manual_seed(seed or 0)
        order = torch.arange(len(self), device="cpu") if seed is None else shuffled(len(self), generator)
        end = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, end, batch_size):
            whole = order[start : min(start + batch_size, end)].to(self.labels.device)
            index = whole[rank::world]
            images = self.images[index]
            if augment:
                images = augmented(images, generator, self.flip, share=(rank, world, len(whole)))
            if not len(index):
                continue
            inputs = self.normalise(images)
            if channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield inputs, self.labels[index]

    def _check(self, batch_size: int, seed: int | None, augment: bool, drop_last: bool) -> None:
        integer("batch_size", batch_size, 1)
        if drop_last and batch_size > len(self):
            raise ValueError(f"batch_size {batch_size} is larger than the data, {len(self)} images")
        if augment and seed is None:
            raise ValueError("augmentation is random and needs a seed")


Batches = Dataset | Iterable[Any]
"""A `Dataset`, or anything that yields (inputs, labels) every time it is iterated, such as a `DataLoader`."""


def batches_of(
    data: Batches, batch_size: int = AT_ONCE, share: tuple[int, int] = (0, 1)
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) of any kind of data in a fixed order; of a `Dataset`, a share as `Dataset.batches` takes it.

    Raises:
        TypeError: `data` is an iterator, which could be read only once, or yields something else.
        ValueError: labels are no integers, or not as many as inputs.
    """
    if isinstance(data, Dataset):
        return data.batches(min(batch_size, data.at_once or batch_size), channels_last=True, share=share)
    if isinstance(data, Iterator):
        raise TypeError("the data are read more than once: give a list or a DataLoader, not an iterator")
    instance("data", data, Iterable, "a Dataset or a list of (inputs, labels)")  # type: ignore[type-abstract]
    return pairs(data)


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """Return the numbers below `count` in an order drawn from a CPU generator, the same under any default device."""
    return torch.randperm(count, generator=generator, device="cpu")


def augmented(
    images: Tensor, generator: torch.Generator, flip: bool = True, share: tuple[int, int, int] | None = None
) -> Tensor:
    """Crop every image at random after padding by an eighth of its side (4 pixels of 32), and mirror half of them.

    Args:
        images: shape (b, channels, height, width), any dtype; padding is zero.
        generator: a CPU generator, so that every device draws the same.
        flip: whether to mirror.
        share: (r, n, whole): `images` are those at r, r + n, r + 2n … of a batch of `whole` images, and get what they would
            get there.

    Returns:
        A tensor of the same shape and dtype, on the same device.
    """
    count, _, height, width = images.shape
    rank, world, whole = share or (0, 1, count)
    pad = max(1, height // 8)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(2 * pad + 1, (2, whole), generator=generator, device="cpu")[:, rank::world]
    rows = top[:, None] + torch.arange(height, device="cpu")
    columns = left[:, None] + torch.arange(width, device="cpu")
    if flip:
        coins = torch.rand(whole, generator=generator, device="cpu", dtype=torch.float32)
        mirror = coins[rank::world] < 0.5
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    # Advanced indices around a slice move the channels to the back; gather there and bring them forward again.
    picked = padded[torch.arange(count, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def built(
    name: str, arrays: dict[str, tuple[Tensor, Tensor]], classes: tuple[str, ...], flip: bool
) -> tuple[Dataset, Dataset]:
    """Return the training and the test set of decoded images, both normalised by the training images.

    Raises:
        DataError: numbers, labels or shapes do not go together.
    """
    for split, (images, labels) in arrays.items():
        if len(images) != len(labels):
            raise DataError(f"{name} {split} has {len(images)} images and {len(labels)} labels")
        if wrong := labels[(labels < 0) | (labels >= len(classes))].tolist():
            raise DataError(f"{name} {split} has the label {wrong[0]}; labels run from 0 to {len(classes) - 1}")
    if arrays["train"][0].shape[1:] != arrays["test"][0].shape[1:]:
        shapes = [dimensions(tuple(images.shape[1:])) for images, _ in arrays.values()]
        raise DataError(f"{name}: training images are {shapes[0]}, test images {shapes[1]}; all must be alike")
    mean, std = _moments(arrays["train"][0])
    train, test = (Dataset(name, *arrays[split], classes, mean, std, flip) for split in ("train", "test"))
    return train, test


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and standard deviation per channel of uint8 images scaled to [0, 1], from their histograms."""
    values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].reshape(-1), minlength=256).double()
        mean = (counts * values).sum() / counts.sum()
        means.append(mean)
        stds.append(((counts * (values - mean).square()).sum() / counts.sum()).sqrt())
    std = torch.stack(stds)
    return torch.stack(means).float(), torch.where(std > 0, std, torch.ones_like(std)).float()
