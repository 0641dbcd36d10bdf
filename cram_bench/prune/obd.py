"""Optimal Brain Damage: the diagonal of the Fisher alone (LeCun, Denker & Solla 1989)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cram_bench.compress import Weights
from cram_bench.curvature.fisher import fisher
from cram_bench.curvature.layout import Layout
from cram_bench.curvature.samples import Forward, Loss, chunks
from cram_bench.data import Batches
from cram_bench.prune.base import Fitted
from cram_bench.prune.fisher import GradientPruner


@dataclass(frozen=True)
class OBD(GradientPruner):
    """Rank weights by ½ w² (F_qq + λ); what stays is not corrected. With λ → ∞ this is global magnitude."""

    kind: ClassVar[str] = "obd"

    def look(
        self,
        model: nn.Module,
        weights: Weights,
        batches: Batches,
        *,
        gone: Mapping[str, Tensor],
        forward: Forward | None,
        loss: Loss | None,
    ) -> Fitted:
        examples = chunks(batches, self.gradients, self.batch, self.seed)
        layout = Layout.of(weights, 64)  # of the diagonal any will do
        with self.moved(model, weights, examples):
            seen = fisher(
                model, weights, examples, layout, gone=gone, forward=forward, loss=loss, blocks=False, memory=self.bytes
            )
        scale = self.scale(seen.diagonal, sum(layout.counts.values()))
        diagonal = layout.unpack(seen.diagonal + scale)
        keys = {name: weight.detach().double().square() * diagonal[name] / 2 for name, weight in weights.items()}
        return Uncorrected(self, weights, keys)


class Uncorrected(Fitted):
    """Keys alone: what stays keeps its value."""

    def solve(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.weights[name].masked_fill(~mask, 0.0) for name, mask in masks.items()}
