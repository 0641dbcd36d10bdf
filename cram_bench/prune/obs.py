"""Optimal Brain Surgeon by blocks: every weight is ranked by what it costs alone (oBERT, arXiv 2203.07259)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from cram_bench.curvature import obs
from cram_bench.prune.fisher import BlockPruner, Update
from cram_bench.settings import Count


@dataclass(frozen=True)
class OBS(BlockPruner):
    """Rank by w_q² / (2 [F⁻¹]_qq), and correct what stays by the exact joint solve (`cram_bench.curvature.joint`)."""

    kind: ClassVar[str] = "obs"

    def rank(self, inverses: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        return obs.singles(inverses, weights)


@dataclass(frozen=True)
class OBERT(BlockPruner):
    """The pruner of oBERT's public code: ranked as `OBS`, corrected by the sum of single-weight updates.

    arXiv 2203.07259. With ``group`` 4 the weights go in fours, consecutive ones, ranked by ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q
    (equation 5). How many go is exact all the same, so the last of the groups may go in part. Its recipe prunes in many
    steps with new gradients each: ``obertx16@0.9``.
    """

    kind: ClassVar[str] = "obert"

    block: Count = 48
    """B, consecutive weights whose interaction is seen; the paper's 50, made a multiple of four."""
    update: Update = "single"
    """What stays is corrected by the exact joint solve, by the sum of what every removed weight asks alone, or not at
    all."""
    group: Annotated[int, Field(ge=1, le=64, description="from 1 to 64")] = 1
    """How many consecutive weights go together; divides the block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.group:
            raise ValueError(f"group must divide the block, {self.block}, and is {self.group}")

    def rank(self, inverses: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        if self.group == 1:
            return obs.singles(inverses, weights)
        return obs.group_saliency(inverses, weights, self.group).repeat_interleave(self.group, -1)

    def updated(self, matrices: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
        if self.update == "single" and self.group > 1:
            return obs.sum_of_singles(obs.inverse(matrices), weights, keep, self.group)
        return super().updated(matrices, weights, keep)
