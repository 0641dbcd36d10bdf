"""Which weights of a set of tensors are the largest: exact, without joining, copying or sorting them.

On the CPU one pass over the weights, in pieces that stay in the processor's cache, does nearly everything: a sample
brackets the threshold (Floyd and Rivest, Algorithm 489, 1975), what lies above the bracket stays, and the few weights
inside it are collected and partitioned. Where the order of the weights misleads the sample the counts show it, and a
full partition gives the threshold. Elsewhere torch's own selection is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PIECE = 2**16  # values: a quarter of a megabyte, which stays in the cache of a core
_SMALL = 2**14  # fewer values than this are partitioned whole
_PARALLEL = 2**22  # more values than this are worth a second thread
_SAMPLE = (2**12, 2**16)  # least and most values that bracket the threshold


class NaNError(ValueError):
    """Weights that are NaN cannot be ranked."""


@torch.no_grad()
def keep_largest_across(parts: Sequence[Tensor], zeros: int, magnitudes: bool = True) -> list[Tensor]:
    """Mark all but the `zeros` smallest entries of several tensors taken together.

    Args:
        parts: tensors of any shapes and real dtypes, on one device.
        zeros: how many entries to drop, 0 ≤ zeros ≤ n, n being the number of all entries.
        magnitudes: rank by absolute value.

    Returns:
        Boolean tensors of the shapes and memory layouts of `parts`, with exactly n − zeros true entries. Among equal
        entries at the threshold the earliest are dropped, counted through the parts in order, each row by row.

    Raises:
        ValueError: `zeros` is outside [0, n].
        NaNError: entries have to be ranked and one is NaN.

    >>> [mask.tolist() for mask in keep_largest_across([torch.tensor([3.0, -1.0]), torch.tensor([-4.0, 1.0])], zeros=1)]
    [[True, False], [True, True]]
    """
    parts = [part.detach() for part in parts]
    count = sum(part.numel() for part in parts)
    if not 0 <= zeros <= count:
        raise ValueError(f"cannot drop {zeros} of {count} entries")
    if zeros in (0, count):
        return [torch.full_like(part, zeros == 0, dtype=torch.bool) for part in parts]
    if all(part.device.type == "cpu" and part.dtype in _READ for part in parts):
        return _in_pieces(parts, count, zeros, magnitudes)
    return _by_torch(parts, zeros, magnitudes)


_READ: dict[torch.dtype, Callable[[Tensor], Tensor]] = {
    torch.float32: lambda flat: flat,
    torch.float64: lambda flat: flat,
    torch.float16: lambda flat: flat.float(),
    torch.bfloat16: lambda flat: flat.float(),  # exact, and numpy has none
}


def _by_torch(parts: Sequence[Tensor], zeros: int, magnitudes: bool) -> list[Tensor]:
    flat = torch.cat([part.reshape(-1) for part in parts])
    flat = flat.abs() if magnitudes else flat
    if flat.is_floating_point() and bool(flat.isnan().any()):
        raise NaNError("cannot rank weights that are NaN")
    threshold = flat.kthvalue(zeros).values
    keep = flat > threshold
    if short := len(flat) - zeros - int(keep.sum()):
        tied = (flat == threshold).nonzero().flatten()
        keep[tied[len(tied) - short :]] = True
    pieces = keep.split([part.numel() for part in parts])
    masks = [torch.empty_like(part, dtype=torch.bool) for part in parts]
    return [mask.copy_(piece.view(mask.shape)) for mask, piece in zip(masks, pieces, strict=True)]


@dataclass
class _Part:
    """A tensor and its mask as arrays in the order of memory, and how that order comes from the rows."""

    values: np.ndarray
    keep: np.ndarray
    order: list[int] | None
    shape: torch.Size

    def row_by_row(self, places: np.ndarray) -> np.ndarray:
        """Turn places in memory into places in the tensor read row by row."""
        if self.order is None:
            return places
        coordinates = np.unravel_index(places, [self.shape[dimension] for dimension in self.order])
        back = [coordinates[self.order.index(dimension)] for dimension in range(len(self.shape))]
        return np.ravel_multi_index(back, self.shape)


def _part(tensor: Tensor) -> tuple[_Part, Tensor]:
    order = None
    if not tensor.is_contiguous():
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda dimension: -strides[dimension])
        if not tensor.permute(order).is_contiguous():  # a view with gaps
            tensor, order = tensor.contiguous(), None
    mask = torch.empty_like(tensor, dtype=torch.bool)
    flat, keep = ((t if order is None else t.permute(order)).reshape(-1) for t in (tensor, mask))
    return _Part(_READ[tensor.dtype](flat).numpy(), keep.numpy(), order, tensor.shape), mask


def _in_pieces(tensors: Sequence[Tensor], count: int, zeros: int, magnitudes: bool) -> list[Tensor]:
    both = [_part(tensor) for tensor in tensors]
    parts = [part for part, _ in both]
    low, high = _bracket(parts, count, zeros, magnitudes)
    above, inside = _scan(parts, count, low, high, magnitudes)
    missing = count - zeros - above  # how many of those inside stay
    if not 0 <= missing <= sum(len(values) for values, _ in inside):
        threshold = np.partition(_read(parts, 1, magnitudes), zeros - 1)[zeros - 1]
        above, inside = _scan(parts, count, threshold, threshold, magnitudes)
        missing = count - zeros - above
    if missing:
        _break_ties(parts, inside, missing)
    return [mask for _, mask in both]


def _read(parts: Sequence[_Part], step: int, magnitudes: bool) -> np.ndarray:
    """Return every `step`-th value of all parts."""
    values = np.concatenate([part.values[::step] for part in parts])
    return np.abs(values, out=values) if magnitudes else values


def _bracket(parts: Sequence[_Part], count: int, zeros: int, magnitudes: bool) -> tuple[Any, Any]:
    """Return two values between which the threshold lies, but for a mishap."""
    if count < _SMALL:
        return -np.inf, np.inf
    least, most = _SAMPLE
    sample = np.sort(_read(parts, max(1, count // min(most, max(least, count // 256))), magnitudes))
    size, rank = len(sample), zeros / count
    margin = 4 * math.sqrt(size * rank * (1 - rank)) + 8  # four standard deviations of the rank in a random sample
    low, high = int(rank * size - margin), math.ceil(rank * size + margin)
    return (sample[low] if low > 0 else -np.inf), (sample[high] if high < size else np.inf)


_Inside = list[tuple[np.ndarray, np.ndarray]]
"""For every part the values between the brackets, and their places in memory."""


def _scan(parts: Sequence[_Part], count: int, low: Any, high: Any, magnitudes: bool) -> tuple[int, _Inside]:
    """Mark what lies above `high`, count it, and collect what lies from `low` to `high`."""
    pieces = [(number, start) for number, part in enumerate(parts) for start in range(0, len(part.values), _PIECE)]

    def work(own: Sequence[tuple[int, int]]) -> tuple[int, list[tuple[int, np.ndarray, np.ndarray]]]:
        above, found = 0, []
        buffers: dict[Any, np.ndarray] = {}
        between = np.empty(_PIECE, bool)
        for number, start in own:
            part = parts[number]
            values, keep = part.values[start : start + _PIECE], part.keep[start : start + _PIECE]
            if magnitudes:
                buffer = buffers.setdefault(values.dtype, np.empty(_PIECE, values.dtype))
                values = np.abs(values, out=buffer[: len(values)])
            if np.isnan(values.max()):
                raise NaNError("cannot rank weights that are NaN")
            np.greater(values, high, out=keep)
            above += int(np.count_nonzero(keep))
            inner = np.greater_equal(values, low, out=between[: len(values)])
            np.not_equal(inner, keep, out=inner)  # what is above the one is above the other
            if len(places := np.flatnonzero(inner)):
                found.append((number, values[places], places + start))
        return above, found

    workers = min(torch.get_num_threads(), 4) if count >= _PARALLEL else 1
    if workers == 1:
        results = [work(pieces)]
    else:
        share = math.ceil(len(pieces) / workers)
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(work, [pieces[i * share : (i + 1) * share] for i in range(workers)]))
    none = np.empty(0, np.intp)
    inside: _Inside = []
    for number, part in enumerate(parts):
        mine = [(values, places) for _, found in results for owner, values, places in found if owner == number]
        values = [v for v, _ in mine] or [part.values[:0]]
        inside.append((np.concatenate(values), np.concatenate([p for _, p in mine] or [none])))
    return sum(above for above, _ in results), inside


def _break_ties(parts: Sequence[_Part], inside: _Inside, missing: int) -> None:
    """Keep the `missing` largest of the values inside; of those tied at their threshold the last ones."""
    together = np.concatenate([values for values, _ in inside])
    cut = len(together) - missing
    threshold = np.partition(together, cut)[cut]
    tied = []
    for part, (values, places) in zip(parts, inside, strict=True):
        part.keep[places[values > threshold]] = True
        missing -= int(np.count_nonzero(values > threshold))
        tied.append(places[values == threshold])
    for part, places in zip(reversed(parts), reversed(tied), strict=True):
        if not missing:
            break
        if missing < len(places):
            places = places[np.argsort(part.row_by_row(places))[len(places) - missing :]]
        part.keep[places] = True
        missing -= len(places)
