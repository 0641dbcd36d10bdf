"""Greedy removal within blocks: the weight whose removal costs least, the others corrected before the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cram_bench.curvature import obs
from cram_bench.prune.fisher import BlockPruner
from cram_bench.settings import Count, Positive


@dataclass(frozen=True)
class Greedy(BlockPruner):
    """Remove greedily within blocks, and rank all weights by the increment of the loss when each went.

    Within a block weights go in the order of `cram_bench.curvature.removal`, so an increment that is smaller than one
    before it counts as that one. Then what stays is corrected by the exact joint solve, which is where removal one by
    one ends, so one pass serves every sparsity and no traces of it are kept. Ranking by increment is of this project;
    the paper ranks by the cumulative loss of a block (`CAP`), which makes large blocks of little loss hard to empty.
    """

    kind: ClassVar[str] = "greedy"

    block: Count = 192
    """B, consecutive weights whose interaction is seen; blocks end where a tensor ends. The paper's; larger ones did
    better."""
    damping: Positive = 0.01
    """λ over the mean diagonal of F, positive; the better of 0.01 to 1 on held-out training images."""

    def rank(self, inverses: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        order, increments = obs.removal(inverses, weights, present)
        return in_order(order, self.heights(increments))

    def heights(self, increments: Tensor) -> Tensor:
        """Return from the increments (n, B), in the order of removal, what blocks are compared by."""
        return increments


@dataclass(frozen=True)
class CAP(Greedy):
    """oViT's Correlation Aware Pruner: `Greedy`, ranked by the loss of a block up to each weight (arXiv 2210.09223)."""

    kind: ClassVar[str] = "cap"

    def heights(self, increments: Tensor) -> Tensor:
        return increments.cumsum(1)


def in_order(order: Tensor, heights: Tensor) -> Tensor:
    """Return keys (n, B) by weight: the greatest height so far at its removal, and a little above the one before.

    A little is the next float64, so that no tie lets a later weight of a block go before an earlier one.

    >>> keys = in_order(torch.tensor([[2, 0, 1]]), torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64))
    >>> [round(key, 9) for key in keys[0].tolist()], bool(keys[0, 1] > keys[0, 0])
    ([3.0, 3.0, 1.0], True)
    """
    keys = torch.full_like(heights, torch.inf)
    last = torch.full_like(heights[:, 0], -torch.inf)
    above = torch.tensor(torch.inf, dtype=heights.dtype, device=heights.device)
    for step in range(heights.shape[1]):
        there = order[:, step] >= 0
        last = torch.where(there, torch.maximum(heights[:, step], torch.nextafter(last, above)), last)
        place = order[:, step].clamp(min=0)[:, None]
        keys.scatter_(1, place, torch.where(there[:, None], last[:, None], keys.gather(1, place)))
    return keys
