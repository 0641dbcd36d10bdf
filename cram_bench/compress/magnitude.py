"""Magnitude pruning: the smallest weights go, over all layers together or in each alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cram_bench.compress.base import Compressor
from cram_bench.compress.masks import Masks
from cram_bench.compress.select import keep_largest, zeros_for

Scope = Literal["global", "uniform"]


@dataclass(frozen=True)
class Magnitude(Compressor):
    """Zero the fraction `sparsity` of weights with the smallest magnitude.

    C_k(θ) = M ⊙ θ with M = 1[|θ| > t]. With scope ``global`` one threshold t serves all prunable weights
    (arXiv 2207.14200, section 4); with ``uniform`` every tensor has its own, so each is equally sparse. Exactly
    ``round(sparsity · n)`` weights are zeroed, n counting all prunable weights, or those of a tensor; weights
    tied at the threshold go in order of position.

    Raises:
        ValueError: `sparsity` is outside [0, 1], or `scope` is unknown.

    >>> Magnitude(0.5).masks({"w": torch.tensor([1.0, -4.0, 3.0, 2.0])})["w"].tolist()
    [False, True, True, False]
    """

    sparsity: float
    scope: Scope = "global"

    def __post_init__(self) -> None:
        zeros_for(self.sparsity, 1)
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, not {self.scope!r}")

    @property
    def pattern(self) -> str:
        return self.scope

    def __str__(self) -> str:
        return f"{self.scope}@{float(self.sparsity)!r}".removesuffix(".0")

    @torch.no_grad()
    def masks(self, weights: Mapping[str, Tensor]) -> Masks:
        if self.scope == "uniform":
            return Masks({name: _keep(weight.abs(), self.sparsity) for name, weight in weights.items()})
        flat = torch.cat([weight.reshape(-1) for weight in weights.values()]).abs_()
        pieces = _keep(flat, self.sparsity).split([weight.numel() for weight in weights.values()])
        return Masks({name: piece.view(weights[name].shape) for name, piece in zip(weights, pieces, strict=True)})


def _keep(magnitudes: Tensor, sparsity: float) -> Tensor:
    keep = keep_largest(magnitudes.reshape(-1), zeros_for(sparsity, magnitudes.numel()))
    return keep.view(magnitudes.shape)
