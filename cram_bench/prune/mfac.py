"""M-FAC as a pruner: the inverse of the whole Fisher, or of large blocks, from m gradients (arXiv 2107.03356)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cram_bench.compress import Weights
from cram_bench.curvature.gram import Gram
from cram_bench.curvature.layout import Layout
from cram_bench.curvature.obs import NotDefinite
from cram_bench.curvature.samples import Forward, Loss, chunks, gradients
from cram_bench.data import Batches
from cram_bench.prune.base import Fitted
from cram_bench.prune.fisher import GradientPruner


@dataclass(frozen=True)
class MFACPruner(GradientPruner):
    """Rank by w_q² / (2 [F⁻¹]_qq) with F = λI + (1/m) GᵀG over all prunable weights together, or over large blocks.

    All m gradients are held: 4·m bytes a weight. With m far below the number of weights the ranking is nearly that of
    magnitude; it is the correction that helps.
    """

    kind: ClassVar[str] = "mfac"

    block: Annotated[int, Field(ge=0, description="not negative")] = 0
    """B, consecutive weights of a tensor whose interaction is seen, 0 for all weights together."""
    update: Annotated[Literal["none", "joint"], Field(description="none or joint")] = "joint"
    """Whether what stays is corrected, by the exact joint solve."""

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
        layout = Layout.of(weights, self.block)
        needed = 4 * self.gradients * layout.rows * layout.width
        if needed > self.bytes:
            raise ValueError(
                f"mfac holds {self.gradients:,} gradients of {sum(layout.counts.values()):,} weights, "
                f"{needed / 2**30:.1f} GiB, and memory is {self.memory:g}: ask for fewer gradients or more memory, "
                "or take obs or greedy, which hold none"
            )
        device = next(iter(weights.values())).device
        rows = torch.empty(layout.rows, self.gradients, layout.width, device=device)
        diagonal = 0.0
        with (
            self.moved(model, weights, examples),
            closing(gradients(model, weights, examples, forward, loss)) as stream,
        ):
            for number, gradient in enumerate(stream):
                for name, mask in gone.items():
                    gradient[name] = gradient[name].masked_fill(mask, 0.0)
                rows[:, number] = packed = layout.pack(gradient)
                diagonal += float(packed.double().square().sum())
        scale = self.scale(torch.tensor(diagonal / self.gradients), sum(layout.counts.values()))
        gram = Gram(rows, scale)
        try:
            found = layout.pack(weights).double().square() / (2 * gram.diagonal())
        except NotDefinite as error:
            raise ValueError(
                f"the Gram matrix of {layout.name_of(error.row)} is not positive definite with damping "
                f"{self.damping:g}: give more, such as mfac(damping={max(1e-3, 10 * self.damping):g})"
            ) from None
        keys = layout.unpack(found)
        return _Held(self, weights, keys, layout, gram)


class _Held(Fitted):
    def __init__(
        self, pruner: MFACPruner, weights: Weights, keys: Mapping[str, Tensor], layout: Layout, gram: Gram
    ) -> None:
        super().__init__(pruner, weights, keys)
        self.layout, self.gram = layout, gram

    def solve(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(self.pruner, MFACPruner)
        if self.pruner.update == "none":
            return {name: self.weights[name].masked_fill(~mask, 0.0) for name, mask in masks.items()}
        every = {name: masks.get(name, torch.ones_like(key, dtype=torch.bool)) for name, key in self.keys.items()}
        out = self.gram.joint(self.layout.pack(self.weights), self.layout.pack(every, fill=True))
        unpacked = self.layout.unpack(out)
        return {name: unpacked[name] for name in masks}
