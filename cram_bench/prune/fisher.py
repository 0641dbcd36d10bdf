"""Pruners that stand on blocks of the empirical Fisher; a subclass says how weights are ranked."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cram_bench.compress import Weights, parse, tune_batchnorm
from cram_bench.curvature import obs
from cram_bench.curvature.fisher import Fisher, fisher, groups
from cram_bench.curvature.layout import Layout, pieces
from cram_bench.curvature.samples import Forward, Loss, chunks
from cram_bench.data import Batches
from cram_bench.outputs import fitting
from cram_bench.preserve import preserved
from cram_bench.prune.base import Fitted, Pruner
from cram_bench.settings import Count, Positive, Text

Update = Annotated[Literal["none", "single", "joint"], Field(description="none, single or joint")]


@dataclass(frozen=True)
class GradientPruner(Pruner):
    """Looks at m gradients, of the mean loss over small batches each, in eval mode.

    The empirical Fisher F = (1/m) Σ g gᵀ stands for the Hessian; F + λI is used, λ being `damping` times the mean of
    F's diagonal over all prunable weights: an absolute λ would mean something else for every model.
    """

    gradients: Count = 512
    """m, how many gradients."""
    batch: Count = 8
    """Examples whose mean loss each gradient is of; F scales with about one over it."""
    damping: Positive = 0.03
    """λ over the mean diagonal of F, positive."""
    memory: Positive = 2.0
    """GiB that blocks and gradients may take at a time; what does not fit is collected in several passes."""
    at: Text = ""
    """Empty for gradients at the weights that are pruned, or a compressor, such as ``global@0.9``: gradients where that
    leads, with BatchNorm tuned there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at:
            parse(self.at)

    @property
    def seen(self) -> int:
        return self.gradients * self.batch

    @contextmanager
    def moved(self, model: nn.Module, weights: Weights, examples: Sequence[tuple[Any, Tensor]]) -> Iterator[None]:
        """For the length of a block, put the model where `at` says."""
        if not self.at:
            yield
            return
        fit = fitting(model)
        with preserved(model):
            parse(self.at).apply_(weights)
            tune_batchnorm(model, [fit(inputs) for inputs, _ in examples])
            yield

    @property
    def bytes(self) -> int:
        """`memory` in bytes."""
        return int(self.memory * 2**30)

    def scale(self, diagonal: Tensor, count: int) -> float:
        """Return λ in the units of F.

        Args:
            diagonal: of F, any shape.
            count: how many of its entries are weights.

        Raises:
            ValueError: all are zero.
        """
        mean = float(diagonal.sum()) / count
        if not mean > 0:
            raise ValueError(
                f"all {self.gradients} gradients are zero, so {self.kind} cannot rank weights: the model may fit these "
                "examples perfectly, or its outputs do not depend on its weights"
            )
        return self.damping * mean


@dataclass(frozen=True)
class BlockPruner(GradientPruner, abc.ABC):
    """Ranks weights, and corrects those that stay, within blocks of consecutive weights of a tensor."""

    block: Count = 64
    """B, consecutive weights whose interaction is seen; blocks end where a tensor ends."""
    update: Update = "joint"
    """What stays is corrected by the joint solve, by the sum of what every removed weight asks alone, or not at all."""

    @abc.abstractmethod
    def rank(self, inverses: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        """Return keys (n, B), float64: what has the smaller goes first.

        Args:
            inverses: (F + λI)⁻¹ of n blocks, (n, B, B), float64.
            weights: (n, B), float64.
            present: which entries are weights, (n, B).
        """

    def updated(self, matrices: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
        """Return what becomes of blocks of weights (n, B) when those not in `keep` go; `matrices` are F + λI."""
        if self.update == "none":
            return weights.double().masked_fill(~keep, 0.0)
        if self.update == "single":
            return obs.sum_of_singles(obs.inverse(matrices), weights, keep)
        return obs.joint(matrices, weights, keep)

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
        parts = groups(layout, self.bytes)
        passes = 0

        def collect(part: Layout, blocks: bool = True) -> Fisher:
            nonlocal passes
            passes += 1
            with self.moved(model, weights, examples):
                return fisher(
                    model,
                    weights,
                    examples,
                    part,
                    gone=gone,
                    forward=forward,
                    loss=loss,
                    blocks=blocks,
                    memory=self.bytes,
                )

        whole = collect(layout, blocks=len(parts) == 1)
        scale = self.scale(whole.diagonal, sum(layout.counts.values()))
        keys: dict[str, Tensor] = {}
        for part in parts:
            seen = whole if len(parts) == 1 else collect(part)
            packed, present = part.pack(weights), part.real().to(whole.diagonal.device)
            found = torch.empty_like(seen.diagonal)
            for rows in pieces(part.rows, part.width):
                with _named(part, rows, self):
                    found[rows] = self.rank(obs.inverse(seen.damped(rows, scale)), packed[rows].double(), present[rows])
            keys |= part.unpack(found)
        fitted = _Blocks(self, weights, keys, parts, whole if len(parts) == 1 else None, collect, scale)
        fitted.gradients = passes * self.seen
        return fitted


@contextmanager
def _named(layout: Layout, rows: slice, pruner: BlockPruner) -> Iterator[None]:
    """Where a block cannot be factored, say whose it is and what to do."""
    try:
        yield
    except obs.NotDefinite as error:
        name = layout.name_of(rows.start + error.row)
        raise ValueError(
            f"the Fisher block of {name} is not positive definite with damping {pruner.damping:g}: give more, such as "
            f"{pruner.kind}(damping={max(1e-3, 10 * pruner.damping):g})"
        ) from None


class _Blocks(Fitted):
    """Keys, and the blocks for the solve: kept where one part holds them all, else collected again, part by part."""

    def __init__(
        self,
        pruner: BlockPruner,
        weights: Weights,
        keys: Mapping[str, Tensor],
        parts: list[Layout],
        whole: Fisher | None,
        collect: Callable[[Layout], Fisher],
        scale: float,
    ) -> None:
        super().__init__(pruner, weights, keys)
        self.parts, self.whole, self.scale = parts, whole, scale
        self._collect = collect
        self._solved: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    @property
    def collects(self) -> bool:
        return self.whole is None

    def prepare(self, masks: Sequence[Mapping[str, Tensor]]) -> None:
        """Collect the blocks of every part once for all masks, and keep what they lead to."""
        if all(self._known(own) is not None for own in masks):
            return
        with torch.no_grad(), torch.inference_mode(False):
            solved = self._solve(masks)
        self._solved = [(dict(own), values) for own, values in zip(masks, solved, strict=True)]

    def solve(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = self._known(masks)
        return self._solve([masks])[0] if known is None else known

    def _known(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        for known, values in self._solved:
            if known.keys() == masks.keys() and all(torch.equal(known[name], masks[name]) for name in masks):
                return values
        return None

    def _solve(self, wanted: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        pruner = self.pruner
        assert isinstance(pruner, BlockPruner)
        found: list[dict[str, Tensor]] = [{} for _ in wanted]
        for part in self.parts:
            whose = [(masks, values) for masks, values in zip(wanted, found, strict=True) if masks.keys() & part.shapes]
            seen = self._seen(part) if whose and pruner.update != "none" else None
            for masks, values in whose:
                names = [name for name in part.shapes if name in masks]
                if seen is None:
                    values |= {name: self.weights[name].masked_fill(~masks[name], 0.0) for name in names}
                    continue
                solved = self._solve_part(part, seen, masks)
                values |= {
                    name: solved[name] if len(wanted) == 1 else solved[name].to(self.weights[name]) for name in names
                }
        return found

    def _solve_part(self, part: Layout, seen: Fisher, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pruner = self.pruner
        assert isinstance(pruner, BlockPruner)
        packed = part.pack(self.weights)
        every = {name: masks.get(name, torch.ones_like(self.keys[name], dtype=torch.bool)) for name in part.shapes}
        keep = part.pack(every, fill=True)
        out = packed.double()
        for rows in pieces(part.rows, part.width):
            if bool(keep[rows].all()):
                continue  # nothing goes
            with _named(part, rows, pruner):
                out[rows] = pruner.updated(seen.damped(rows, self.scale), packed[rows], keep[rows])
        return part.unpack(out)

    def _seen(self, part: Layout) -> Fisher:
        if self.whole is not None:
            return self.whole
        self.gradients += self.pruner.seen
        return self._collect(part)
