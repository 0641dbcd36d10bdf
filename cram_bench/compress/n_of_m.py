"""N:M pruning: of every m consecutive input weights, the n largest stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cram_bench.compress.base import Compressor
from cram_bench.compress.masks import Masks
from cram_bench.compress.select import check_n_of_m, keep_n_of_m


@dataclass(frozen=True)
class NM(Compressor):
    """Keep the `n` largest magnitudes of every `m` consecutive weights along the input dimension.

    Groups run along dimension 1: the input features of a linear layer, the input channels of a convolution at
    one output channel and one kernel position, which is what 2:4 hardware reads (arXiv 2207.14200, appendix on
    N:M). A tensor whose input dimension `m` does not divide, such as a first convolution on three colours, stays
    dense; `dense` names those, and the reached sparsity is that of the masks.

    Raises:
        ValueError: not 0 < n ≤ m.

    >>> NM(2, 4).masks({"w": torch.tensor([[1.0, -4.0, 3.0, 2.0]])})["w"].tolist()
    [[False, True, True, False]]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_n_of_m(self.n, self.m)

    @property
    def pattern(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:  # type: ignore[override]
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return self.pattern

    def dense(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Name the weights that stay dense because `m` does not divide their input dimension."""
        return [name for name, weight in weights.items() if weight.ndim < 2 or weight.shape[1] % self.m]

    @torch.no_grad()
    def masks(self, weights: Mapping[str, Tensor]) -> Masks:
        dense = set(self.dense(weights))
        return Masks(
            {
                name: torch.ones_like(weight, dtype=torch.bool)
                if name in dense
                else keep_n_of_m(weight.abs().movedim(1, -1), self.n, self.m).movedim(-1, 1)
                for name, weight in weights.items()
            }
        )
