"""What a data set is, whatever its inputs are; and batches of any data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from cram_bench.checks import instance, integer, items, labels_within, pairs, unknown

AT_ONCE = 125
"""Images in a batch of an evaluation: few, so that activations of a small network stay in the processor's cache."""


class Dataset(ABC):
    """Labelled examples on one device: `Images`, `Streamed` and `Sentences`.

    A kind of data is a frozen dataclass with these attributes and one more, which has an entry an example: images,
    tokens, or places where they are found. It says what its inputs are, and yields batches of them.

    Attributes:
        name: how tables call it.
        labels: shape (n,), values in [0, len(classes)); integers of any size and booleans become int64.
        classes: class names in label order.
    """

    name: str
    labels: Tensor
    classes: tuple[str, ...]

    per_example: ClassVar[str]
    """Name of the tensor that has, as `labels`, an entry an example."""
    noun: ClassVar[str] = "images"
    """What the examples are called."""
    calibrates: ClassVar[tuple[int, int]] = 2000, 500
    """How many examples BatchNorm is tuned on by default, and how many of them are a batch."""

    def __post_init__(self) -> None:
        if not (self.labels.is_floating_point() or self.labels.is_complex()):  # what else they are, training refuses
            object.__setattr__(self, "labels", self.labels.long())

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self):,} {self.form}, {len(self.classes)} classes)"

    @property
    @abstractmethod
    def form(self) -> str:
        """What one input is, in words: ``images of 3 × 32 × 32``."""

    @property
    @abstractmethod
    def preparation(self) -> str:
        """What is done to the examples before a network gets them, in words."""

    @property
    @abstractmethod
    def trial(self) -> Tensor:
        """Two inputs as a network gets them, to try one on; of what is streamed, zeros."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Height of an image in pixels; of sentences, tokens of the longest."""

    @property
    def channels(self) -> int:
        """Numbers at a place of an input: 1 or 3 of a pixel, 1 of a token, its id."""
        return 1

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

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
        """Examples that a batch should have at most where nobody learns from it; None for any number."""
        return None

    @property
    def steady(self) -> bool:
        """Whether batches are at hand and all of one shape, so that a long training repays its compilation."""
        return False

    @property
    def tiny(self) -> bool:
        """Whether an input is so small that several threads would only wait for each other."""
        return False

    def pictures(self, indices: Sequence[int] | Tensor) -> Tensor | None:
        """Return examples to look at, uint8 (n, channels, height, width); None where they cannot be shown."""
        return None

    def check(self) -> None:
        """Refuse data that cannot be trained on.

        Raises:
            ValueError: there are none, or labels are not integers, not one an example, or not of the classes.
        """
        if not len(self):
            raise ValueError("the data to train on are empty")
        for _, labels in pairs([(getattr(self, self.per_example), self.labels)]):
            labels_within(labels, self.num_classes)

    def to(self, device: torch.device | str) -> Self:
        """Return the data set with its tensors on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return self._but(**{name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)})

    def take(self, indices: Sequence[int] | Tensor) -> Self:
        """Return the examples at `indices`, in that order."""
        indices = torch.as_tensor(indices, device=self.labels.device)
        if not len(indices):
            indices = indices.long()  # an empty list has no type
        return self._but(**{name: getattr(self, name)[indices] for name in (self.per_example, "labels")})

    def of_classes(self, classes: Sequence[str]) -> Self:
        """Return the examples of some classes, in order; labels and class names stay those of all classes.

        Args:
            classes: their names.

        Raises:
            ValueError: a name is none of a class, or none is given.
            TypeError: it is no list of names.
        """
        for name in (chosen := items("classes", classes, "names of classes")):
            if name not in self.classes:
                raise ValueError(unknown("class", name, self.classes))
        wanted = torch.tensor([self.classes.index(name) for name in chosen], device=self.labels.device)
        return self.take(torch.isin(self.labels, wanted).nonzero().flatten())

    def sample(self, count: int, seed: int = 0) -> Dataset:
        """Return `count` examples drawn without replacement; all, in order, when there are no more than that.

        Images are in memory then, also where they were streamed.
        """
        return self._drawn(count, seed)

    def calibration(
        self, count: int | None = None, augment: bool = True, seed: int = 0, batch_size: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return about `count` random examples in equal batches for BatchNorm tuning, augmented as in training.

        Augmented, because BatchNorm's statistics were those of augmented images while the weights were trained: on
        a dense network such batches give back the statistics of the training, and plain images others. By default 2,000
        examples in batches of 500, of what is streamed 1,000 in batches of 125.
        """
        usual, together = self.calibrates
        sample = self._drawn(usual if count is None else count, seed)
        most = together if batch_size is None else integer("batch_size", batch_size, 1)
        size = len(sample) // math.ceil(len(sample) / most)  # equal batches leave out the fewest
        return list(sample.batches(size, seed=seed, augment=augment, drop_last=True, channels_last=True))

    def resized(self, size: int) -> Self:
        """Return the images scaled to `size` × `size` pixels.

        Raises:
            ValueError: the examples are not images in memory.
        """
        raise ValueError(f"{self.name} holds {self.form}, which are not scaled: leave resize out")

    def split(self, count: int, seed: int = 0) -> tuple[Self, Self]:
        """Split off `count` random examples: (the rest, those). For validation; the test set is for the final word."""
        if integer(f"held out {self.noun}", count, 1) >= len(self):
            raise ValueError(f"cannot hold out {count} of {len(self)} {self.noun}")
        order = shuffled(len(self), torch.Generator().manual_seed(seed))
        return self.take(order[count:].sort().values), self.take(order[:count].sort().values)

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
            batch_size: examples per batch; the last one may be smaller.
            seed: shuffles, and drives augmentation; None keeps the order of the data.
            augment: change images at random, as their kind of data says; nothing is done to sentences.
            drop_last: leave out a last batch that is smaller.
            channels_last: lay images out channel-innermost.
            share: (r, n) yields of every batch the examples r, r + n, r + 2n …, drawn and augmented as in the whole
                batch; nothing where that is none.

        Yields:
            Normalised float32 inputs (b, channels, height, width) of images, or token ids, int64 (b, length); and int64
            labels (b,).

        Raises:
            ValueError: the batch size is not positive, larger than the data while `drop_last`, or augmentation
                has no seed.
        """
        integer("batch_size", batch_size, 1)
        if drop_last and batch_size > len(self):
            raise ValueError(f"batch_size {batch_size} is larger than the data, {len(self)} {self.noun}")
        if augment and seed is None:
            raise ValueError("augmentation is random and needs a seed")
        generator = torch.Generator().manual_seed(seed or 0)
        order = torch.arange(len(self), device="cpu") if seed is None else shuffled(len(self), generator)
        order = order[: len(self) - len(self) % batch_size] if drop_last else order
        parts = self._parts(order, batch_size, None if seed is None else generator)
        rank, world = share
        own = [part[rank::world] for part in parts if len(part) > rank]
        for part, inputs in zip(own, self._inputs(parts, share, generator, seed if augment else None), strict=True):
            if channels_last and inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield inputs, self.labels[part.to(self.labels.device)]

    def _parts(self, order: Tensor, batch_size: int, generator: torch.Generator | None) -> list[Tensor]:
        """Cut the places of the examples into batches; `generator` drew their order, None where nothing is shuffled."""
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    @abstractmethod
    def _inputs(
        self, parts: Sequence[Tensor], share: tuple[int, int], generator: torch.Generator, seed: int | None
    ) -> Iterator[Tensor]:
        """Yield what a network gets of the share of each part that has one, changed at random where there is a `seed`.

        Args:
            parts: places of the examples of a batch each, on the CPU.
            share: as `batches` takes it.
            generator: what drew the order of the examples, for what is drawn next.
            seed: of augmentation; None for none.
        """

    def _drawn(self, count: int, seed: int) -> Self:
        if integer(f"{self.noun} of a sample", count, 1) >= len(self):
            return self
        order = shuffled(len(self), torch.Generator().manual_seed(seed))
        return self.take(order[:count].sort().values)

    def _but(self, **changes: Any) -> Self:
        return replace(self, **changes)  # type: ignore[type-var]


Batches = Dataset | Iterable[Any]
"""A `Dataset`, or anything that yields (inputs, labels) every time it is iterated, such as a `DataLoader`."""


def batches_of(
    data: Batches, batch_size: int = AT_ONCE, share: tuple[int, int] = (0, 1)
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) of any data in a fixed order; of a `Dataset`, a share as `Dataset.batches` takes it.

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
