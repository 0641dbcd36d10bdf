"""The block empirical Fisher: F_b = (1/m) Σ g_b g_bᵀ over m gradients, for every block of B consecutive weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from cram_bench.curvature.layout import Layout
from cram_bench.curvature.samples import Forward, Loss, gradients

MEMORY = 2 << 30
"""Bytes that the blocks of a pass and its gradients may take."""
_TOGETHER = 64  # gradients multiplied at once
_RESOLVED = 1e-6


@dataclass
class Fisher:
    """Blocks of the empirical Fisher without damping.

    Attributes:
        layout: which weights they are of.
        blocks: shape (rows, B, B), float32, or None where only the diagonal was asked for.
        diagonal: shape (rows, B), float64: (1/m) Σ g².
        count: m, how many gradients they are the mean of.
    """

    layout: Layout
    blocks: Tensor | None
    diagonal: Tensor
    count: int

    def damped(self, rows: slice, damping: float) -> Tensor:
        """Return F_b + λI of some blocks in float64; λ is at least a millionth of the block's greatest entry.

        Less than that the products in float32 do not resolve: of a layer whose gradients are a thousand times those of
        the others, F_b + λI with a λ of the others would have negative eigenvalues.

        Args:
            rows: which blocks.
            damping: λ, in the units of F.
        """
        assert self.blocks is not None
        matrices = self.blocks[rows].double()
        own = self.diagonal[rows]
        least = _RESOLVED * own.amax(1, keepdim=True)
        matrices.diagonal(dim1=-2, dim2=-1).copy_(own + torch.clamp(least, min=damping))
        return matrices


def groups(layout: Layout, memory: int = MEMORY) -> list[Layout]:
    """Split a layout so that blocks and some gradients of each part fit `memory` bytes: a pass over examples each."""
    return layout.groups(max(1, memory // (8 * (layout.width + 8)))) if layout.size else [layout]


def fisher(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Any, Tensor]],
    layout: Layout,
    *,
    gone: Mapping[str, Tensor] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    blocks: bool = True,
    memory: int = MEMORY,
) -> Fisher:
    """Collect the blocks of `layout` in one pass: products of many gradients at once, a batched one for all blocks.

    Where `torch.distributed` has several processes, each looks at its share of the batches, and the sums are joined.

    Args:
        model: any torch model; it is in eval mode for the length of the pass.
        weights: name → parameter; those of `layout` among them.
        batches: m of them, a gradient each.
        gone: name → boolean; weights that were pruned before: their gradients count as zero.
        forward, loss: as `gradients` takes them.
        blocks: whether blocks are wanted, or the diagonal alone.
        memory: bytes that gradients kept for a product may take, beside the blocks.

    Returns:
        The mean over all batches.

    Raises:
        ValueError: a gradient is not finite, here or in another process.
    """
    own = {name: weights[name] for name in layout.shapes}
    device = next(iter(own.values())).device
    width, rows = layout.width, layout.rows
    found = torch.zeros(rows, width, width, device=device) if blocks else None
    diagonal = torch.zeros(rows, width, dtype=torch.float64, device=device)
    most = max(1, min(_TOGETHER, memory // 4 // (4 * rows * width))) if blocks else 1  # they are held twice
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)
    kept: list[Tensor] = []

    def add() -> None:
        for gradient in kept:
            diagonal.add_(gradient.double().square())
        if found is not None:
            together = torch.stack(kept, 1).float()  # (rows, some gradients, B)
            found.baddbmm_(together.mT, together)
        kept.clear()

    failed: Exception | None = None
    try:
        with closing(gradients(model, own, batches[rank::world], forward, loss)) as stream:
            for gradient in stream:
                for name, mask in (gone or {}).items():
                    if name in gradient:
                        gradient[name] = gradient[name].masked_fill(mask, 0.0)
                kept.append(layout.pack(gradient))
                if len(kept) == most:
                    add()
        if kept:
            add()
    except Exception as error:
        failed = error
    if world > 1:  # who failed says so first, for the others would wait for it
        failures = torch.tensor(float(failed is not None), device=device)
        distributed.all_reduce(failures)
        if failed is None and bool(failures):
            failed = ValueError("another process could not compute its gradients; its own message says why")
    if failed is not None:
        raise failed
    if world > 1:
        for total in (diagonal,) if found is None else (diagonal, found):
            distributed.all_reduce(total)
    count = len(batches)
    if found is not None:
        found.div_(count)
    return Fisher(layout, found, diagonal.div_(count), count)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
