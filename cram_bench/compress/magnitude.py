"""Magnitude pruning: the smallest weights go, over all layers together or in each alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cram_bench.compress.base import Compressor
from cram_bench.compress.masks import Dense, Masks
from cram_bench.compress.rank import NaNError, keep_largest_across
from cram_bench.compress.select import zeros_for
from cram_bench.compress.weights import dense_of

Scope = Literal["global", "uniform"]


@dataclass(frozen=True)
class Magnitude(Compressor):
    """Zero the fraction `sparsity` of weights with the smallest magnitude.

    C_k(θ) = M ⊙ θ with M = 1[|θ| > t]. With scope ``global`` one threshold t serves all prunable weights
    (arXiv 2207.14200, section 4); with ``uniform`` every tensor has its own, so each is equally sparse. Exactly
    ``round(sparsity · n)`` weights are zeroed, n counting all prunable weights, or those of a tensor; weights
    tied at the threshold go in order of position.

    With ``reference`` it is the rule of the authors' code, to check results against theirs: kept is what lies
    strictly above the ⌈n(1 − k)⌉-th largest magnitude, so ⌈n(1 − k)⌉ − 1 weights, and fewer where there are ties;
    and ``uniform`` leaves tensors dense by position: the first, and the last two of all parameters, which are
    the weight and the bias of a classifier, so here the first and the last of the prunable weights.

    Raises:
        ValueError: `sparsity` is outside [0, 1], `scope` is unknown, or a weight is NaN.

    >>> Magnitude(0.5).masks({"w": torch.tensor([1.0, -4.0, 3.0, 2.0])})["w"].tolist()
    [False, True, True, False]
    """

    sparsity: float
    scope: Scope = "global"
    reference: bool = False

    def __post_init__(self) -> None:
        zeros_for(self.sparsity, 1)
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, not {self.scope!r}")

    @property
    def pattern(self) -> str:
        return f"{self.scope}-reference" if self.reference else self.scope

    def __str__(self) -> str:
        return f"{self.pattern}@{float(self.sparsity)!r}".removesuffix(".0")

    @torch.no_grad()
    def masks(self, weights: Mapping[str, Tensor]) -> Masks:
        if self.reference:
            return self._as_the_authors(weights)
        together = [list(weights)] if self.scope == "global" else [[name] for name in weights]
        found: dict[str, Tensor] = {}
        for names in together:
            tensors = [weights[name] for name in names]
            zeros = zeros_for(self.sparsity, sum(tensor.numel() for tensor in tensors))
            found |= dict(zip(names, keep_largest_across(tensors, zeros), strict=True))
        return Masks(found, dense_of(weights))

    def _as_the_authors(self, weights: Mapping[str, Tensor]) -> Masks:
        if self.scope == "uniform":
            masks = {name: _strictly_above(weight.abs(), self.sparsity) for name, weight in weights.items()}
            ends = dict.fromkeys((next(iter(masks)), next(reversed(masks))))
            masks |= {name: torch.ones_like(masks[name]) for name in ends}
            why = "first or last, which the authors' code leaves dense"
            return Masks(masks, dense_of(weights) | {name: Dense(masks[name].numel(), why) for name in ends})
        flat = torch.cat([weight.reshape(-1) for weight in weights.values()]).abs_()
        pieces = _strictly_above(flat, self.sparsity).split([weight.numel() for weight in weights.values()])
        found = {name: piece.view(weights[name].shape) for name, piece in zip(weights, pieces, strict=True)}
        return Masks(found, dense_of(weights))


def _strictly_above(magnitudes: Tensor, sparsity: float) -> Tensor:
    count = magnitudes.numel()
    if sparsity == 0:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    rank = math.ceil(count * (1 - sparsity))  # from the largest, as the authors count
    if rank == 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    if bool(magnitudes.isnan().any()):
        raise NaNError("cannot rank weights that are NaN")
    return magnitudes > magnitudes.reshape(-1).kthvalue(count - rank + 1).values
