"""N:M pruning: of every m consecutive input weights, the n largest stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cram_bench.compress.base import Compressor
from cram_bench.compress.masks import Dense, Masks
from cram_bench.compress.select import check_n_of_m, keep_n_of_m
from cram_bench.compress.weights import by_output, dense_of, knows_inputs


@dataclass(frozen=True)
class NM(Compressor):
    """Keep the `n` largest magnitudes of every `m` consecutive weights along the input dimension.

    Groups run along dimension 1: the input features of a linear layer, the input channels of a convolution at
    one output channel and one kernel position, which is what 2:4 hardware reads (arXiv 2207.14200, appendix on
    N:M). Of weights that `prunable` found, it is the input dimension wherever the layer stores it. A tensor whose input
    dimension `m` does not divide, such as a first convolution on three colours, stays dense; `dense` and the masks
    name those, and the reached sparsity is that of the masks.

    With ``reference`` it is the rule of the authors' code, to check results against theirs: a tensor of four dimensions
    is laid out with its channels last, (outputs, height, width, inputs), one of two as it is, and cut into groups of
    `m` from its first value to its last. So a convolution on three colours is pruned too, its groups running across
    positions and filters. Tensors of other dimensions, and those whose number of weights `m` does not divide (where
    their code ends with an error), stay dense. Of tied magnitudes the first go; in their code it is open which.

    Raises:
        ValueError: not 0 < n ≤ m.

    >>> NM(2, 4).masks({"w": torch.tensor([[1.0, -4.0, 3.0, 2.0]])})["w"].tolist()
    [[False, True, True, False]]
    >>> NM(1, 2, reference=True).masks({"w": torch.tensor([[1.0, -4.0, 3.0], [2.0, 6.0, 5.0]])})["w"].int().tolist()
    [[0, 1, 1], [0, 1, 0]]
    """

    n: int
    m: int
    reference: bool = False

    def __post_init__(self) -> None:
        check_n_of_m(self.n, self.m)

    @property
    def pattern(self) -> str:
        return f"{self.n}:{self.m}-reference" if self.reference else f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:  # type: ignore[override]
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return self.pattern

    def dense(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Name the weights that stay dense because they do not divide into groups of `m`."""
        return [name for name in weights if self._why_dense(weights, name)]

    def _why_dense(self, weights: Mapping[str, Tensor], name: str) -> str | None:
        weight = weights[name]
        if self.reference:
            if weight.ndim not in (2, 4):
                return f"{self} groups tensors of 2 or 4 dimensions, not of {weight.ndim}"
            count = weight.numel()
            return f"its {count:,} weights do not divide into groups of {self.m}" if count % self.m else None
        if weight.ndim < 2 or not knows_inputs(weights, name):
            return f"{self} groups inputs, and which dimension counts them is not known"
        inputs = by_output(weights, name, weight).shape[1]
        return f"its {inputs} inputs do not divide into groups of {self.m}" if inputs % self.m else None

    @torch.no_grad()
    def masks(self, weights: Mapping[str, Tensor]) -> Masks:
        left = {name: reason for name in weights if (reason := self._why_dense(weights, name))}
        return Masks(
            {
                name: torch.ones_like(weight, dtype=torch.bool) if name in left else self._mask(weights, name)
                for name, weight in weights.items()
            },
            dense_of(weights) | {name: Dense(weights[name].numel(), reason) for name, reason in left.items()},
        )

    def _mask(self, weights: Mapping[str, Tensor], name: str) -> Tensor:
        if self.reference:
            scores = weights[name].abs().movedim(1, -1)
            return keep_n_of_m(scores.reshape(-1, self.m), self.n, self.m).view(scores.shape).movedim(-1, 1)
        scores = by_output(weights, name, weights[name]).abs().movedim(1, -1)
        return by_output(weights, name, keep_n_of_m(scores, self.n, self.m).movedim(-1, 1))
