"""Where blocks of consecutive weights lie: named tensors ⇄ rows of B numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Named tensors cut into blocks of `size` consecutive entries, in row-major order; no block spans two tensors.

    The last block of a tensor is filled up with zeros. Blocks of size 0 mean one block over all tensors together.

    >>> layout = Layout({"a": (3,), "b": (2, 2)}, 2)
    >>> layout.pack({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.ones(2, 2)}).tolist()
    [[1.0, 2.0], [3.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    >>> layout.real().tolist()[1]
    [True, False]
    """

    shapes: Mapping[str, tuple[int, ...]]
    size: int

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], size: int) -> Layout:
        """Lay out tensors by their shapes."""
        return cls({name: tuple(weight.shape) for name, weight in weights.items()}, size)

    @property
    def counts(self) -> dict[str, int]:
        """Entries of every tensor."""
        return {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}

    @property
    def width(self) -> int:
        """Entries of a block."""
        return self.size or sum(self.counts.values())

    @property
    def blocks(self) -> dict[str, int]:
        """Blocks of every tensor; of one block over all, nothing."""
        return {name: -(-count // self.size) for name, count in self.counts.items()} if self.size else {}

    @property
    def rows(self) -> int:
        """How many blocks there are."""
        return sum(self.blocks.values()) if self.size else 1

    def name_of(self, row: int) -> str:
        """Return which tensor a block is of."""
        for name, count in self.blocks.items():
            if row < count:
                return name
            row -= count
        return "all weights together"

    def pack(self, tensors: Mapping[str, Tensor], fill: float = 0.0) -> Tensor:
        """Return blocks (rows, width) of named tensors, what is no entry being `fill`."""
        flat = [tensors[name].reshape(-1) for name in self.shapes]
        if not self.size:
            return torch.cat(flat)[None]
        out = [torch.nn.functional.pad(part, (0, -len(part) % self.size), value=fill) for part in flat]
        return torch.cat(out).view(-1, self.size)

    def unpack(self, blocks: Tensor) -> dict[str, Tensor]:
        """Return the named tensors of blocks (rows, width)."""
        flat, at, found = blocks.reshape(-1), 0, {}
        for name, shape in self.shapes.items():
            count = self.counts[name]
            found[name] = flat[at : at + count].view(shape)
            at += self.blocks[name] * self.size if self.size else count
        return found

    def real(self) -> Tensor:
        """Return which entries of blocks (rows, width) are entries of a tensor."""
        ones = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        return self.pack(ones, fill=False)

    def groups(self, most: int) -> list[Layout]:
        """Split into layouts of whole tensors, each of at most `most` entries where a tensor alone has not more.

        >>> [list(part.shapes) for part in Layout({"a": (3,), "b": (2, 2), "c": (9,)}, 2).groups(8)]
        [['a', 'b'], ['c']]
        """
        if not self.size:
            return [self]
        found: list[dict[str, tuple[int, ...]]] = []
        room = 0
        for name, shape in self.shapes.items():
            count = self.counts[name]
            if not found or count > room:
                found.append({})
                room = most
            found[-1][name] = shape
            room -= count
        return [Layout(shapes, self.size) for shapes in found]


def pieces(rows: int, width: int, entries: int = 1 << 20) -> Sequence[slice]:
    """Cut the blocks into slices whose matrices (blocks, width, width) have about `entries` entries, for the cache."""
    step = max(1, entries // max(1, width * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
