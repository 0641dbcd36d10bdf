"""Images in memory, on a device: batches, normalised and augmented there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from cram_bench.checks import integer
from cram_bench.data.dataset import Dataset
from cram_bench.data.decoding import DataError, dimensions


@dataclass(frozen=True, repr=False)
class Images(Dataset):
    """Images and labels as tensors on one device.

    `batches` augments by a random crop after padding by an eighth of the side with black, and a mirror where `flip`
    allows.

    Attributes:
        name: how tables call it.
        images: uint8, shape (n, channels, height, width).
        labels: shape (n,), values in [0, len(classes)).
        classes: class names in label order.
        mean: per channel, of the *training* images scaled to [0, 1]; shape (channels,).
        std: likewise.
        flip: whether augmentation may mirror an image.
    """

    per_example: ClassVar[str] = "images"

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    flip: bool = True

    @property
    def form(self) -> str:
        """Images of channels × height × width."""
        return f"images of {' × '.join(map(str, self.images.shape[1:]))}"

    @property
    def preparation(self) -> str:
        """By which mean and deviation they are normalised."""
        return f"{scale_of(self.mean, self.std)}, those of the training images"

    @property
    def trial(self) -> Tensor:
        """The first two."""
        return self.normalise(self.images[:2])

    @property
    def channels(self) -> int:
        """Image channels, 1 or 3."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height of the images in pixels."""
        return self.images.shape[2]

    @property
    def steady(self) -> bool:
        """Always."""
        return True

    @property
    def tiny(self) -> bool:
        """At most 256 numbers."""
        return self.images[0].numel() <= 256

    def pictures(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the images at `indices`."""
        return self.take(indices).images

    def resized(self, size: int) -> Self:
        """Return the images scaled to `size` × `size` pixels (bilinear, antialiased) and three channels.

        For a network that was trained on images of another size. Mean and standard deviation stay.
        """
        integer("size", size, 1)
        if self.images.shape[1:] == (3, size, size):
            return self
        options: dict[str, Any] = {"mode": "bilinear", "antialias": True, "align_corners": False}
        parts = [F.interpolate(part.float(), (size, size), **options) for part in self.images.split(1000)]
        scaled = torch.cat(parts)
        images = scaled.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
        mean, std = (value.expand(3).clone() for value in (self.mean, self.std))
        return self._but(images=images, mean=mean, std=std)

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 images to zero mean and unit variance per channel: (x/255 − mean)/std, float32."""
        return normalised(images, self.mean, self.std)

    def _inputs(
        self, parts: Sequence[Tensor], share: tuple[int, int], generator: torch.Generator, seed: int | None
    ) -> Iterator[Tensor]:
        rank, world = share
        for part in parts:
            images = self.images[part[rank::world].to(self.labels.device)]
            if seed is not None:  # also where there are none: every process draws the same
                images = augmented(images, generator, self.flip, share=(rank, world, len(part)))
            if len(images):
                yield self.normalise(images)


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x/255 − mean)/std of uint8 images (b, channels, height, width), per channel, float32."""
    scale = 1 / (255 * std)
    return torch.addcmul((-mean / std).view(-1, 1, 1), images.float(), scale.view(-1, 1, 1))


def scale_of(mean: Tensor, std: Tensor) -> str:
    """Say by what images are normalised."""
    first, second = (", ".join(f"{value:.3f}" for value in values.tolist()) for values in (mean, std))
    return f"images normalised by mean {first} and std {second}"


def augmented(
    images: Tensor, generator: torch.Generator, flip: bool = True, share: tuple[int, int, int] | None = None
) -> Tensor:
    """Crop every image at random after padding by an eighth of its side (4 pixels of 32), and mirror half of them.

    Args:
        images: shape (b, channels, height, width), any dtype; padding is zero.
        generator: a CPU generator, so that every device draws the same.
        flip: whether to mirror.
        share: (r, n, whole): `images` are those at r, r + n, r + 2n … of a batch of `whole` images, and get what they
            would get there.

    Returns:
        A tensor of the same shape and dtype, on the same device.
    """
    count, _, height, width = images.shape
    rank, world, whole = share or (0, 1, count)
    pad = max(1, height // 8)
    padded = F.pad(images, (pad, pad, pad, pad))
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
) -> tuple[Images, Images]:
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
    train, test = (Images(name, *arrays[split], classes, mean, std, flip) for split in ("train", "test"))
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
