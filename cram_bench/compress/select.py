"""Exact selection: which entries of a tensor are among the k smallest, ties included.

Everything here is a pure function of tensors. Counts are exact by construction: a threshold alone cannot split
tied magnitudes, so ties are resolved by position, the earliest entries going first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cram_bench._checks import number

_SAMPLE = 2**16  # larger samples cost more to sort, smaller ones bracket less closely


class NaNError(ValueError):
    """Weights that are NaN cannot be ranked."""


def zeros_for(sparsity: float, count: int) -> int:
    """Return how many of `count` weights are zero at `sparsity`: the nearest integer, halves to even.

    Raises:
        ValueError: `sparsity` is not in [0, 1].
        TypeError: it is no number.

    >>> zeros_for(0.9, 272_474)
    245227
    """
    return round(number("sparsity", sparsity, 0, 1) * count)


def keep_largest(scores: Tensor, zeros: int) -> Tensor:
    """Mark all but the `zeros` smallest entries of a flat tensor of scores.

    Args:
        scores: shape (n,), any real dtype; larger means more important.
        zeros: how many entries to drop, 0 ≤ zeros ≤ n.

    Returns:
        Boolean tensor of shape (n,) with exactly ``n − zeros`` true entries. Among equal scores at the threshold
        the earliest positions are dropped.

    Raises:
        ValueError: `zeros` is outside [0, n], or scores have to be ranked and one is NaN.

    >>> keep_largest(torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0]), zeros=2).tolist()
    [True, False, False, True, True]
    """
    count = scores.numel()
    if not 0 <= zeros <= count:
        raise ValueError(f"cannot drop {zeros} of {count} entries")
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if zeros == count:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = kth_smallest(scores, zeros)
    keep = scores > threshold
    short = count - zeros - int(keep.sum())
    if short:  # tied at the threshold, or NaN
        tied = (scores == threshold).nonzero().flatten()
        if short > tied.numel() or bool(scores.isnan().any()):
            raise NaNError("cannot rank weights that are NaN")
        keep[tied[tied.numel() - short :]] = True
    return keep


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of n scores, 1 ≤ k ≤ n, exactly, in a few passes over them.

    Quickselect's idea with a better pivot (Floyd and Rivest, Algorithm 489, 1975): the ranks of a sample bracket the
    answer to within a few per cent of the scores, whatever lies below the bracket is counted, and only what lies inside is
    selected from. The sample is every so-manieth score, so that the work does not depend on chance; where an
    order in the scores defeats it the bracket misses, which the counts show, and all of them are selected from.

    >>> kth_smallest(torch.tensor([3.0, 1.0, 2.0]), 2)
    tensor(2.)
    """
    count = scores.numel()
    if count < 16 * _SAMPLE:
        return scores.kthvalue(k).values
    sample = scores[:: count // _SAMPLE].sort().values
    size = sample.numel()
    rank = k / count
    margin = 4 * math.sqrt(size * rank * (1 - rank)) + 8  # four standard deviations of the rank in a random sample
    low, high = int(rank * size - margin), math.ceil(rank * size + margin)
    below = scores < sample[low] if low > 0 else torch.zeros_like(scores, dtype=torch.bool)
    inside = scores[~below & (scores <= sample[high]) if high < size else ~below]
    place = k - int(below.sum())
    if not 0 < place <= inside.numel():
        return scores.kthvalue(k).values
    return inside.kthvalue(place).values


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Mark the `n` largest of every `m` consecutive entries along the last dimension.

    Args:
        scores: shape (…, c) with c divisible by `m`.
        n: entries kept per group.
        m: group length.

    Returns:
        Boolean tensor of the shape of `scores`, exactly `n` true entries per group; ties drop the earliest.

    Raises:
        ValueError: c is not divisible by `m`, or not 0 < n ≤ m.

    >>> keep_n_of_m(torch.tensor([[4.0, 1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0]]), 2, 4).int().tolist()
    [[1, 0, 0, 1, 0, 0, 1, 1]]
    """
    check_n_of_m(n, m)
    if scores.shape[-1] % m:
        raise ValueError(f"the last dimension, {scores.shape[-1]}, does not divide into groups of {m}")
    groups = scores.unflatten(-1, (-1, m))
    # A stable ascending sort puts the earliest of equal entries first, that is among the dropped.
    dropped = groups.argsort(dim=-1, stable=True)[..., : m - n]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, dropped, False).flatten(-2)


def check_n_of_m(n: int, m: int) -> None:
    """Refuse what is not two integers with 0 < n ≤ m."""
    if not (type(n) is int and type(m) is int and 0 < n <= m):
        raise ValueError(f"n:m sparsity keeps n of every m weights with integers 0 < n <= m, not {n}:{m}")
