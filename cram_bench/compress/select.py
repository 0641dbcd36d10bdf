"""Exact selection: which entries of a tensor stay, ties included.

Everything here is a pure function of tensors. Counts are exact by construction: a threshold alone cannot split
tied magnitudes, so ties are resolved by position, the earliest entries going first. `rank` holds the fast part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cram_bench.checks import number
from cram_bench.compress import rank


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
    return rank.keep_largest_across([scores], zeros, magnitudes=False)[0]


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
