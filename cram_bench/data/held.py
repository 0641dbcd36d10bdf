"""Examples of somebody else's batches, some of which are held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cram_bench.checks import instance, integer, pairs, shown
from cram_bench.data.dataset import Batches, Dataset, batches_of, shuffled


@dataclass(frozen=True, repr=False)
class Held(Dataset):
    """Inputs as a network gets them, and their labels, in memory.

    Attributes:
        name: how tables call it.
        inputs: shape (n, …), floating-point; images are (n, channels, height, width).
        labels: shape (n,).
        classes: class names in label order.
    """

    per_example: ClassVar[str] = "inputs"
    noun: ClassVar[str] = "examples"

    name: str
    inputs: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    @property
    def form(self) -> str:
        """Inputs of their shape."""
        return f"inputs of {' × '.join(map(str, self.inputs.shape[1:]))}"

    @property
    def preparation(self) -> str:
        """Whatever its owner did."""
        return "inputs as they were given"

    @property
    def trial(self) -> Tensor:
        """The first two."""
        return self.inputs[:2]

    @property
    def image_size(self) -> int:
        """The last dimension."""
        return self.inputs.shape[-1]

    @property
    def channels(self) -> int:
        """The first dimension of an input."""
        return self.inputs.shape[1]

    def pictures(self, indices: Sequence[int] | Tensor) -> Tensor | None:
        """Return images to look at, every one stretched to its own darkest and brightest value."""
        if self.inputs.ndim != 4 or self.channels not in (1, 3):
            return None
        images = self.take(indices).inputs.float()
        if not len(images):
            return images.to(torch.uint8)
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        return (255 * (images - low) / (high - low).clamp(min=1e-12)).round().to(torch.uint8)

    def _inputs(
        self, parts: Sequence[Tensor], share: tuple[int, int], generator: torch.Generator, seed: int | None
    ) -> Iterator[Tensor]:
        rank, world = share
        for part in parts:
            yield self.inputs[part[rank::world].to(self.labels.device)]


def some(data: Batches, count: int, seed: int = 0, name: str = "your data") -> Dataset:
    """Return `count` random examples of any data, in memory; all where there are no more.

    Of a `DataLoader` over a data set with places, only the examples that are drawn are read; other data are read once,
    from the beginning to the end.

    Args:
        data: a `Dataset`, or what yields (inputs, labels): a tensor (n, …) and a label an input.
        count: how many.
        seed: draws them.
        name: how tables call them; a `Dataset` has a name.

    Raises:
        TypeError: the inputs are no tensor, or `data` are no batches.
        ValueError: there are none, or as `cram_bench.checks.pairs`.

    >>> batches = [(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]))]
    >>> some(batches, 3)
    Held('your data', 3 inputs of 1 × 8 × 8, 3 classes)
    """
    integer("examples that are drawn", count, 1)
    if isinstance(data, Dataset):
        return data.sample(count, seed)
    generator = torch.Generator().manual_seed(seed)
    source = getattr(data, "dataset", None)
    if isinstance(data, DataLoader) and data.batch_sampler is not None and hasattr(source, "__len__"):
        order = shuffled(len(source), generator)[:count].sort().values.tolist()  # type: ignore[arg-type]
        size = data.batch_size or 100
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        found: list[tuple[Any, Tensor]] = list(
            pairs(data.collate_fn([source[i] for i in part]) for part in parts)  # type: ignore[index]
        )
    else:
        found = list(_drawn(batches_of(data), count, generator))
    if not found:
        raise ValueError("the data are empty")
    for inputs, _ in found:
        instance("inputs", inputs, Tensor, "a tensor of images, shape (n, channels, height, width)")
        if inputs.ndim < 2 or not inputs.is_floating_point():
            what = f"{str(inputs.dtype).removeprefix('torch.')} of shape {tuple(inputs.shape)}"
            raise ValueError(
                f"inputs must be floating-point numbers of shape (n, …), as the model takes them, not {what}"
            )
    labels = torch.cat([labels.cpu() for _, labels in found])
    names = getattr(source, "classes", None)
    highest = int(labels.max()) + 1
    if not isinstance(names, (list, tuple)) or len(names) < highest:
        names = range(highest)
    return Held(name, torch.cat([inputs.cpu() for inputs, _ in found]), labels, tuple(map(str, names)))


def _drawn(batches: Any, count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `count` examples, each a batch of one, all that came equally likely (reservoir sampling, Vitter 1985)."""
    kept: list[tuple[Tensor, Tensor]] = []
    seen = 0
    for inputs, labels in batches:
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"inputs must be a tensor of images, shape (n, channels, height, width), not {shown(inputs)}"
            )
        for place in range(len(labels)):
            at = seen if seen < count else int(torch.randint(seen + 1, (), generator=generator, device="cpu"))
            one = slice(place, place + 1)
            if at < count:
                example = inputs[one].clone(), labels[one].clone()
                if at == len(kept):
                    kept.append(example)
                else:
                    kept[at] = example
            seen += 1
    yield from kept
