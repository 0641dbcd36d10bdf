"""The last m gradients of an optimizer: whole, as their largest entries, or as factors of low rank.

`Dense`, `TopK` and `LowRank` say which, and build `Rows`, which hold them. A compressed row is c = C(a) of a = e + g, g
being the gradient and e ← a − c what compression has left over so far (error feedback): Σc + e = Σg, nothing is lost.
Products of rows and their combinations are summed in float64, whatever the rows are stored in.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from cram_bench.checks import instance, integer, number
from cram_bench.compress.rank import keep_largest_across

_TILE = {"cpu": (8, 2**14)}  # rows and columns that are widened at once: half a megabyte, which stays in a core's cache
_LARGE = (2**10, 2**16)  # elsewhere
_ENTRIES = 2**18  # of sparse rows, likewise


@dataclass(frozen=True)
class Dense:
    """Rows are whole gradients: md numbers.

    Args:
        sharded: each of n processes (of `torch.distributed`, all of them) holds 1/n of every parameter's columns, md/n
            numbers. They then call together whatever computes with rows; what is stored is each one's own.
    """

    sharded: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        instance("sharded", self.sharded, bool, "True or False")

    def build(self, shapes: Sequence[torch.Size], rows: int, dtype: torch.dtype, device: torch.device) -> Rows:
        """Return so many empty rows for parameters of these shapes."""
        return (ShardedRows if self.sharded else DenseRows)(shapes, rows, dtype, device)


@dataclass(frozen=True)
class TopK:
    """Rows are the largest entries of the gradient, with error feedback (EFCP, arXiv 2306.06098, algorithm 1).

    c keeps the k = max(1, round(κd)) largest entries of a by magnitude, as values and int32 places: 8mk bytes.

    Args:
        density: κ, in (0, 1].
        block: 0 for the largest of all weights together, or the number of consecutive weights among which the largest
            are chosen, max(1, round(κB)) of each B.
        feedback: keep what is left over; without it a = g.

    Raises:
        ValueError: `density` is outside (0, 1], or `block` negative.
    """

    density: float = 0.01
    block: int = 0
    feedback: bool = True

    def __post_init__(self) -> None:
        name = "density, the fraction of a gradient that is kept,"
        if not 0 < number(name, self.density) <= 1:
            raise ValueError(f"{name} must be in (0, 1], not {self.density!r}")
        integer("block", self.block, 0)
        instance("feedback", self.feedback, bool, "True or False")

    def build(self, shapes: Sequence[torch.Size], rows: int, dtype: torch.dtype, device: torch.device) -> Rows:
        """Return so many empty rows for parameters of these shapes."""
        return SparseRows(self, shapes, rows, dtype, device)


@dataclass(frozen=True)
class LowRank:
    """Rows are factors of the gradient of every matrix, with error feedback (EFCP, arXiv 2306.06098, section 3).

    Of a matrix A (out, columns), kernels flattened, one warm-started power iteration (PowerSGD, arXiv 1905.13727):
    P = orthonormal(A Q'), Q = AᵀP, Q' being the Q of the gradient before; c = P Qᵀ. Vectors, and matrices that the
    factors would not make smaller, are whole. ⟨P₁Q₁ᵀ, P₂Q₂ᵀ⟩ = Σ (P₁ᵀP₂)⊙(Q₁ᵀQ₂), summed over all layers.

    Args:
        rank: columns of P and Q, at least 1.
        feedback: keep what is left over; without it a = g.

    Raises:
        ValueError: `rank` is below 1.
    """

    rank: int = 4
    feedback: bool = True

    def __post_init__(self) -> None:
        integer("rank", self.rank, 1)
        instance("feedback", self.feedback, bool, "True or False")

    def build(self, shapes: Sequence[torch.Size], rows: int, dtype: torch.dtype, device: torch.device) -> Rows:
        """Return so many empty rows for parameters of these shapes."""
        return LowRankRows(self, shapes, rows, dtype, device)


Ring = Dense | TopK | LowRank
"""How gradients are kept."""


class Rows(abc.ABC):
    """m rows of d numbers, replaced one at a time; d counts the entries of all parameters.

    Args:
        shapes: of the parameters, in the order in which their gradients are joined.
        rows: m.
        dtype: in which rows are stored.
        device: where.
    """

    def __init__(self, shapes: Sequence[torch.Size], rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.dtype, self.device = rows, dtype, device
        self.wide = torch.float64 if dtype is torch.float64 else torch.float32
        self.shapes: list[torch.Size] = []
        self.parts: list[Tensor] = []
        """What is stored, each with a first dimension of m."""
        self.carried: list[Tensor] = []
        """What goes from one gradient to the next: the error e first."""
        self.extend(shapes)

    @property
    def columns(self) -> int:
        """The number d of weights."""
        return sum(map(math.prod, self.shapes))

    @property
    def share(self) -> str:
        """Which columns are here; empty where all are."""
        return ""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows and of what is carried."""
        return sum(tensor.nbytes for tensor in (*self.parts, *self.carried))

    def extend(self, shapes: Sequence[torch.Size]) -> None:
        """Add columns for more parameters, zero in the rows there are.

        Raises:
            ValueError: they would not fit into this machine's memory.
        """
        before, self.shapes = self.shapes, [*self.shapes, *shapes]
        try:
            parts, carried = self._empty()
        except BaseException:
            self.shapes = before
            raise
        for old, new in ((self.parts, parts), (self.carried, carried)):
            for source, target in zip(old, new, strict=False):
                target[tuple(slice(0, size) for size in source.shape)] = source
        self.parts, self.carried = parts, carried

    @abc.abstractmethod
    def _empty(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return new `parts` and `carried` for the shapes."""

    @abc.abstractmethod
    def compress(self, gradient: Tensor, absent: Sequence[int] = ()) -> tuple[list[Tensor], list[Tensor]]:
        """Return (the row that is to be stored, what is carried on) and change nothing.

        Args:
            gradient: shape (d,), of float32 or float64.
            absent: places in `shapes` of parameters without a gradient: zero in the row, and their error stays.
        """

    @abc.abstractmethod
    def products(self, place: int, count: int) -> Tensor:
        """Return ⟨c_i, c_place⟩ for i < `count`: shape (count,), float64."""

    @abc.abstractmethod
    def combine(self, coefficients: Tensor) -> Tensor:
        """Return Σ x_i c_i over the first rows, for float64 coefficients x of shape (count,): shape (d,), float64."""

    def matrix(self, count: int) -> Tensor:
        """Return the first rows as a matrix of shape (count, d), float64: for a look at small ones."""
        eye = torch.eye(count, dtype=torch.float64, device=self.device)
        return torch.stack([self.combine(row) for row in eye])

    def replace(self, place: int, row: Sequence[Tensor]) -> list[Tensor]:
        """Store a row; return the one that was there."""
        before = [part[place].clone() for part in self.parts]
        for part, value in zip(self.parts, row, strict=True):
            part[place].copy_(value)
        return before

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.wide, device=self.device)

    def _slices(self) -> list[slice]:
        ends = list(itertools.accumulate(map(math.prod, self.shapes), initial=0))
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def _with_error(self, gradient: Tensor, absent: Sequence[int]) -> Tensor:
        """Return a = e + g, zero where there is no gradient, as a new tensor."""
        total = gradient + self.carried[0] if self._feeds_back() else gradient.clone()
        slices = self._slices() if absent else []
        for place in absent:
            total[slices[place]] = 0
        return total

    def _left_over(self, error: Tensor, absent: Sequence[int]) -> Tensor:
        slices = self._slices() if absent else []
        for place in absent:
            error[slices[place]] = self.carried[0][slices[place]]
        return error

    def _feeds_back(self) -> bool:
        return False


class DenseRows(Rows):
    """Whole gradients."""

    def _empty(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self._zeros(self.rows, self.columns, dtype=self.dtype)], []

    def compress(self, gradient: Tensor, absent: Sequence[int] = ()) -> tuple[list[Tensor], list[Tensor]]:
        return [self._with_error(gradient, absent)], []

    def products(self, place: int, count: int) -> Tensor:
        (stored,) = self.parts
        row, out = stored[place].double(), self._zeros(count, dtype=torch.float64)
        for rows, columns, tile in self._tiles(count):
            out[rows].addmv_(tile, row[columns])
        return out

    def combine(self, coefficients: Tensor) -> Tensor:
        out = self._zeros(self.columns, dtype=torch.float64)
        for rows, columns, tile in self._tiles(len(coefficients)):
            out[columns].addmv_(tile.T, coefficients[rows])
        return out

    def _tiles(self, count: int) -> Iterator[tuple[slice, slice, Tensor]]:
        height, width = _TILE.get(self.device.type, _LARGE)
        for top in range(0, count, height):
            rows = slice(top, min(top + height, count))
            for left in range(0, self.columns, width):
                columns = slice(left, min(left + width, self.columns))
                yield rows, columns, self.parts[0][rows, columns].double()


class ShardedRows(DenseRows):
    """Of whole gradients, this process's share of every parameter's columns."""

    def __init__(self, *arguments: Any) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        super().__init__(*arguments)

    @property
    def columns(self) -> int:
        return sum(own.stop - own.start for own in self._own())

    @property
    def share(self) -> str:
        return f", share {self.rank + 1} of {self.world}"

    def compress(self, gradient: Tensor, absent: Sequence[int] = ()) -> tuple[list[Tensor], list[Tensor]]:
        return [torch.cat([gradient[own] for own in self._own()])], []

    def products(self, place: int, count: int) -> Tensor:
        out = super().products(place, count)
        distributed.all_reduce(out)
        return out

    def combine(self, coefficients: Tensor) -> Tensor:
        out = self._zeros(super().columns, dtype=torch.float64)
        own = self._own()
        pieces = super().combine(coefficients).split([each.stop - each.start for each in own])
        for each, piece in zip(own, pieces, strict=True):
            out[each] = piece
        distributed.all_reduce(out)  # to zeros of the others, so that all hold the same bits
        return out

    def _own(self) -> list[slice]:
        """Return where in a gradient the columns of this process are, a slice a parameter."""
        found = []
        for whole in self._slices():
            count = whole.stop - whole.start
            first, last = (count * rank // self.world for rank in (self.rank, self.rank + 1))
            found.append(slice(whole.start + first, whole.start + last))
        return found


class SparseRows(Rows):
    """Places and values of the largest entries."""

    def __init__(self, how: TopK, *arguments: Any) -> None:
        self.how = how
        super().__init__(*arguments)

    def _feeds_back(self) -> bool:
        return self.how.feedback

    def _empty(self) -> tuple[list[Tensor], list[Tensor]]:
        d, block = self.columns, self.how.block or max(1, self.columns)
        if d >= 2**31:
            raise ValueError(f"a ring of places in int32 serves fewer than 2**31 weights, not {d}")
        kept = d // block * self._kept(block) + (self._kept(d % block) if d % block else 0)
        index = self._zeros(self.rows, kept, dtype=torch.int32)
        error = [self._zeros(d)] if self.how.feedback else []
        return [index, self._zeros(self.rows, kept, dtype=self.dtype)], error

    def _kept(self, count: int) -> int:
        return max(1, round(self.how.density * count))

    def compress(self, gradient: Tensor, absent: Sequence[int] = ()) -> tuple[list[Tensor], list[Tensor]]:
        total = self._with_error(gradient, absent)
        index = self._largest(total)
        values = total[index].to(self.dtype)
        if not self.how.feedback:
            return [index, values], []
        total[index] -= values  # what bfloat16 rounds off is left over too
        return [index, values], [self._left_over(total, absent)]

    def _largest(self, total: Tensor) -> Tensor:
        """Return the places of the largest magnitudes, rising, for neighbours in memory are read faster together."""
        d, block = len(total), self.how.block or len(total)
        if block >= d:
            return keep_largest_across([total], d - self._kept(d))[0].nonzero()[:, 0]
        whole = d // block * block
        places = total[:whole].view(-1, block).abs().topk(self._kept(block), dim=1).indices.sort(1).values
        places = (places + torch.arange(0, whole, block, device=places.device)[:, None]).flatten()
        if whole < d:
            rest = total[whole:].abs().topk(self._kept(d - whole)).indices.sort().values + whole
            places = torch.cat([places, rest])
        return places

    def products(self, place: int, count: int) -> Tensor:
        index, values = self.parts
        row = self._zeros(self.columns, dtype=torch.float64).index_add_(0, index[place], values[place].double())
        return torch.cat(
            [
                row.index_select(0, i.flatten()).view(v.shape).mul_(v).sum(1)
                for i, v in self._pieces(count)
            ]
        )  # fmt: skip

    def combine(self, coefficients: Tensor) -> Tensor:
        out = self._zeros(self.columns, dtype=torch.float64)
        at = 0
        for i, v in self._pieces(len(coefficients)):
            out.index_add_(0, i.flatten(), (v * coefficients[at : at + len(v), None]).flatten())
            at += len(v)
        return out

    def _pieces(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        index, values = self.parts
        height = max(1, _ENTRIES // index.shape[1])
        yield from zip(index[:count].split(height), values[:count].split(height), strict=True)


class LowRankRows(Rows):
    """Factors of matrices, and the rest whole."""

    def __init__(self, how: LowRank, *arguments: Any) -> None:
        self.how = how
        super().__init__(*arguments)

    def _feeds_back(self) -> bool:
        return self.how.feedback

    def _factored(self, shape: torch.Size) -> bool:
        if len(shape) < 2:
            return False
        out, columns = shape[0], math.prod(shape[1:])
        return self.how.rank * (out + columns) < out * columns

    def _empty(self) -> tuple[list[Tensor], list[Tensor]]:
        parts, warm = [], []
        generator = torch.Generator().manual_seed(0)
        for shape in self.shapes:
            if self._factored(shape):
                out, columns = shape[0], math.prod(shape[1:])
                parts += [self._zeros(self.rows, self.how.rank, n, dtype=self.dtype) for n in (out, columns)]
                start = torch.randn(self.how.rank, columns, generator=generator, dtype=self.wide, device="cpu")
                warm.append(start.to(self.device))
            else:
                parts.append(self._zeros(self.rows, math.prod(shape), dtype=self.dtype))
        return parts, [*([self._zeros(self.columns)] if self.how.feedback else []), *warm]

    def compress(self, gradient: Tensor, absent: Sequence[int] = ()) -> tuple[list[Tensor], list[Tensor]]:
        total = self._with_error(gradient, absent)
        warm = iter(self.carried[1:] if self.how.feedback else self.carried)
        row, onward = [], []
        for place, (shape, where) in enumerate(zip(self.shapes, self._slices(), strict=True)):
            if not self._factored(shape):
                row.append(total[where].to(self.dtype, copy=True))
                total[where] -= row[-1]
                continue
            matrix, start = total[where].view(shape[0], -1), next(warm)
            left = torch.linalg.qr(matrix @ start.T).Q
            right = matrix.T @ left
            row += [left.T.to(self.dtype), right.T.to(self.dtype)]
            matrix -= row[-2].T.to(self.wide) @ row[-1].to(self.wide)
            onward.append(start if place in absent else right.T.contiguous())
        return row, [*([self._left_over(total, absent)] if self.how.feedback else []), *onward]

    def products(self, place: int, count: int) -> Tensor:
        out = self._zeros(count, dtype=torch.float64)
        for _, stored in self._stored():
            inner = [_with_one(part[:count], part[place]) for part in stored]
            out += math.prod(inner[1:], start=inner[0]).flatten(1).sum(1)
        return out

    def combine(self, coefficients: Tensor) -> Tensor:
        found = []
        for _, stored in self._stored():
            left, *right = (part[: len(coefficients)].double() for part in stored)
            if right:
                scaled = left * coefficients[:, None, None]
                found.append((scaled.flatten(0, 1).T @ right[0].flatten(0, 1)).flatten())
            else:
                found.append(coefficients @ left)
        return torch.cat(found)

    def _stored(self) -> Iterator[tuple[torch.Size, list[Tensor]]]:
        parts = iter(self.parts)
        for shape in self.shapes:
            yield shape, [next(parts) for _ in range(2 if self._factored(shape) else 1)]


def _with_one(stored: Tensor, one: Tensor) -> Tensor:
    """Return the products of every stored row with one, in float64: (count, 1, 1), or of factors (count, r, r)."""
    if one.ndim == 1:
        return (stored.double() @ one.double())[:, None, None]
    return (stored.double().flatten(0, 1) @ one.double().T).view(len(stored), len(one), len(one))
