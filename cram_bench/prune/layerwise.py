"""Keep every layer's outputs on a few inputs (ExactOBS as in TACO, arXiv 2303.14409; SparseGPT, 2301.00774)."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cram_bench.compress import Dense, Masks, Weights, keep_largest, zeros_for
from cram_bench.compress.rank import keep_largest_across
from cram_bench.curvature import obs
from cram_bench.curvature.inputs import Layer, groups, layers, moments
from cram_bench.curvature.samples import Forward, Loss, chunks
from cram_bench.data import Batches
from cram_bench.prune.base import Fitted, Pruner
from cram_bench.prune.greedy import in_order
from cram_bench.settings import Count, Positive

_BATCH = 64  # examples that run together, at most
_BLOCK = 128  # columns that SparseGPT chooses among at once


@dataclass(frozen=True)
class LayerwisePruner(Pruner):
    """For every layer min ‖WX − ŴX‖² over sparse Ŵ, X being the inputs of the dense model: no loss, no gradient.

    With H = (2/N) X Xᵀ, which all outputs of a layer share (`cram_bench.curvature.inputs`), this is ½ δᵀHδ in every
    row. H + λI is used, λ being `damping` times the mean diagonal of H over inputs that are not always zero. An input
    that is always zero (a dead column) gets H_jj = 1 and counts as W_:j = 0, so that its weights go first and at no
    cost. What stays of them keeps its value.
    """

    samples: Count = 1024
    """Examples whose inputs are looked at."""
    damping: Positive = 0.01
    """λ over the mean diagonal of H of each layer, positive."""
    memory: Positive = 2.0
    """GiB that the H of layers may take at a time; what does not fit is collected in several passes."""
    ends: Annotated[Literal["dense", "pruned"], Field(description="dense or pruned")] = "dense"
    """Whether the layers that the network runs first and last stay dense; the others are then pruned more."""

    @property
    def seen(self) -> int:
        return self.samples

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
        size = max(size for size in range(1, min(_BATCH, self.samples) + 1) if self.samples % size == 0)
        examples = chunks(batches, self.samples // size, size, self.seed, ("samples", 1))
        known, others = layers(model, weights)
        passes = 0
        order: list[int] = []

        def collect(names: Sequence[str]) -> dict[str, Tensor]:
            nonlocal passes, order
            passes += 1
            seen = moments(model, {name: known[name] for name in names}, examples, forward)
            order = seen.order
            return seen.matrices

        parts = groups(known, int(self.memory * 2**30))
        keys: dict[str, Tensor] = {}
        energies: dict[str, float] = {}
        held: dict[str, Tensor] | None = None
        for part in parts:
            seen = collect(part)
            held = seen if len(parts) == 1 else None
            for name in part:
                if name not in seen:
                    others[name] = "no pass of these examples ran a layer of it"
                    continue
                matrices, dead = _damped(self, name, seen[name])
                rows = known[name].rows(weights[name].detach()).double().masked_fill(dead[:, None], 0.0)
                energies[name] = float(torch.einsum("gri,gij,grj->", rows, matrices, rows)) / 2
                with _named(self, name):
                    keys[name] = known[name].back(self.rank(matrices, rows))
        if not keys:
            first = next(iter(others.items()), ("", "there is none"))
            raise ValueError(
                f"{self.kind} sees the inputs of no prunable layer: {first[0]}: {first[1]}; "
                "take greedy, which needs none"
            )
        for name, weight in weights.items():
            if name not in keys:
                keys[name] = torch.full_like(weight, torch.inf, dtype=torch.float64)
        ends = {order[0], order[-1]} if self.ends == "dense" else set()
        kept = {name: "the network's first or last layer" for name, weight in weights.items() if id(weight) in ends}
        fitted = self.fitted(weights, keys)
        fitted.known = {name: layer for name, layer in known.items() if name not in others}
        fitted.parts = [[name for name in part if name in fitted.known] for part in parts]
        fitted.others, fitted.kept, fitted.gone = others, kept, dict(gone)
        fitted.energies, fitted.held, fitted.collect = energies, held, collect
        fitted.gradients = passes * self.seen
        return fitted

    @abc.abstractmethod
    def rank(self, matrices: Tensor, rows: Tensor) -> Tensor:
        """Return keys (groups, rows, inputs) of a layer, given H + λI (groups, inputs, inputs)."""

    @abc.abstractmethod
    def fitted(self, weights: Weights, keys: Mapping[str, Tensor]) -> _Layerwise:
        """Return what prunes, without what it has seen."""


@dataclass(frozen=True)
class ExactOBS(LayerwisePruner):
    """Remove the weights of every row greedily and exactly, then sort those of a layer by their increments (arXiv
    2303.14409).

    A row of d inputs costs about 2d³/3 operations, whatever the sparsities: for layers of thousands of inputs take
    `SparseGPT`. An increment that is smaller than one before it in its row counts as that one. What stays is corrected
    by the exact joint solve, for any masks.
    """

    kind: ClassVar[str] = "exactobs"

    scope: Annotated[Literal["uniform", "global"], Field(description="uniform or global")] = "uniform"
    """Whether all layers are pruned alike, as in the paper, or increments are ranked across layers, each divided by
    ½ tr(W H Wᵀ) of its layer; that is of this project."""

    def rank(self, matrices: Tensor, rows: Tensor) -> Tensor:
        keys = torch.empty_like(rows)
        for group, matrix in enumerate(matrices):
            order, increments = obs.removal_of_rows(obs.inverse(matrix[None])[0], rows[group])
            keys[group] = in_order(order, increments)
        return keys

    def fitted(self, weights: Weights, keys: Mapping[str, Tensor]) -> _Layerwise:
        return _Exact(self, weights, keys)


@dataclass(frozen=True)
class SparseGPT(LayerwisePruner):
    """The fast variant: columns from left to right, those to the right corrected (arXiv 2301.00774).

    With U the upper Cholesky factor of (H + λI)⁻¹, in every block of 128 columns the weights of least w²/U_jj² go, all
    rows of a layer together, as many as the sparsity asks of the columns so far: the published code prunes one more.
    Weights on the left of what goes are not corrected. All layers are pruned alike.
    """

    kind: ClassVar[str] = "sparsegpt"

    def rank(self, matrices: Tensor, rows: Tensor) -> Tensor:
        return rows.square() / _upper(matrices).diagonal(dim1=-2, dim2=-1)[:, None].square()

    def fitted(self, weights: Weights, keys: Mapping[str, Tensor]) -> _Layerwise:
        return _Swept(self, weights, keys)


class _Layerwise(Fitted):
    """How many go in every layer; a subclass says which, and corrects what stays."""

    known: dict[str, Layer]
    parts: list[list[str]]
    others: dict[str, str]
    kept: dict[str, str]
    gone: dict[str, Tensor]
    energies: dict[str, float]
    held: dict[str, Tensor] | None
    collect: Callable[[Sequence[str]], dict[str, Tensor]]

    def seen(self, names: Iterable[str]) -> Iterator[tuple[str, Layer, Tensor, Tensor]]:
        """Yield name, layer, H + λI and dead columns of layers, collected again where they did not fit together."""
        wanted = set(names)
        for part in self.parts:
            own = [name for name in part if name in wanted]
            if not own:
                continue
            if (found := self.held) is None:
                self.gradients += self.pruner.seen
                found = self.collect(own)
            for name in own:
                assert isinstance(self.pruner, LayerwisePruner)
                yield name, self.known[name], *_damped(self.pruner, name, found[name])

    @torch.no_grad()
    def masks(self, sparsity: float, names: Iterable[str] | None = None) -> Masks:
        """Return which weights stay at a sparsity of all prunable weights together.

        The first and last layer stay dense, where the pruner's `ends` says so, and what no layer was seen of; the
        others are pruned the more. Where `names` has none but first and last layers, these are pruned.

        Raises:
            ValueError: the sparsity is more than the others have weights, or a layer has more weights that were pruned
                before.
        """
        chosen = list(self.keys if names is None else names)
        dense = {name: self.others[name] for name in chosen if name in self.others}
        open_ = [name for name in chosen if name not in dense]
        if any(name not in self.kept for name in open_):
            dense |= {name: self.kept[name] for name in open_ if name in self.kept}
            open_ = [name for name in open_ if name not in dense]
        count = sum(self.keys[name].numel() for name in chosen)
        room = sum(self.keys[name].numel() for name in open_)
        zeros = zeros_for(sparsity, count) if open_ else 0
        if zeros > room:
            listed = ", ".join(f"{name} ({why})" for name, why in list(dense.items())[:3])
            ends = sum(self.keys[name].numel() for name in dense if name in self.kept)
            remedy = (
                f", or give {self.pruner.kind}(ends=pruned)"
                if room + ends >= zeros
                else ", or take greedy, which reaches all"
            )
            raise ValueError(
                f"sparsity {sparsity:g} of {count:,} weights is {zeros:,}, and {self.pruner.kind} can prune {room:,}: "
                f"dense are {listed}; ask for {math.floor(1e4 * room / count) / 1e4:g} at most{remedy}"
            )
        found = {name: torch.ones_like(self.keys[name], dtype=torch.bool) for name in chosen}
        found |= self.choose(open_, zeros)
        return Masks(found, self.dense | {name: Dense(self.keys[name].numel(), why) for name, why in dense.items()})

    @abc.abstractmethod
    def choose(self, names: Sequence[str], zeros: int) -> dict[str, Tensor]:
        """Return masks of layers of which `zeros` weights go together."""

    def shares(self, names: Sequence[str], zeros: int) -> dict[str, int]:
        """Split zeros over layers alike, to the weight."""
        counts = [self.keys[name].numel() for name in names]
        split = dict(zip(names, _split(zeros, counts), strict=True))
        for name in names:
            if name in self.gone and (before := int(self.gone[name].sum())) > split[name]:
                raise ValueError(
                    f"{before:,} weights of {name} were pruned before, and all layers pruned alike it would have "
                    f"{split[name]:,} zeros: ask for a higher sparsity, or prune before by {self.pruner.kind} too"
                )
        return split


class _Exact(_Layerwise):
    def choose(self, names: Sequence[str], zeros: int) -> dict[str, Tensor]:
        assert isinstance(self.pruner, ExactOBS)
        if self.pruner.scope == "global":
            keys = [self.keys[name] / (self.energies[name] or 1.0) for name in names]
            return dict(zip(names, keep_largest_across(keys, zeros, magnitudes=False), strict=True))
        return {name: keep_largest(self.keys[name], share) for name, share in self.shares(names, zeros).items()}

    def solve(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: self.weights[name].masked_fill(~mask, 0.0) for name, mask in masks.items()}
        changed = [name for name, mask in masks.items() if not bool(mask.all())]
        for name, layer, matrices, _ in self.seen(changed):
            rows, keep = layer.rows(self.weights[name]).double(), layer.rows(masks[name])
            out = torch.empty_like(rows)
            with _named(self.pruner, name):
                for group, matrix in enumerate(matrices):
                    out[group] = obs.joint_of_rows(matrix, rows[group], keep[group])
            found[name] = layer.back(out)
        return found


class _Swept(_Layerwise):
    def choose(self, names: Sequence[str], zeros: int) -> dict[str, Tensor]:
        found, shares = {}, self.shares(names, zeros)
        for name, layer, matrices, dead in self.seen(names):
            rows = layer.rows(self.weights[name]).double().masked_fill(dead[:, None], 0.0)
            before = layer.rows(self.gone[name]) if name in self.gone else torch.zeros_like(rows, dtype=torch.bool)
            with _named(self.pruner, name):
                keep, _ = sweep(_upper(matrices), rows, None, shares[name], before)
            found[name] = layer.back(keep)
        return found

    def solve(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: self.weights[name].masked_fill(~mask, 0.0) for name, mask in masks.items()}
        changed = [name for name, mask in masks.items() if not bool(mask.all())]
        for name, layer, matrices, _ in self.seen(changed):
            rows, keep = layer.rows(self.weights[name]).double(), layer.rows(masks[name])
            with _named(self.pruner, name):
                found[name] = layer.back(sweep(_upper(matrices), rows, keep)[1])
        return found


def sweep(
    upper: Tensor,
    rows: Tensor,
    keep: Tensor | None = None,
    zeros: int = 0,
    gone: Tensor | None = None,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """Prune columns from left to right, correcting those to the right: w_{i+1:} ← w_{i+1:} − (w_i / U_ii) U_{i,i+1:}
    where w_i goes.

    Args:
        upper: U, with H⁻¹ = UᵀU, shape (groups, d, d), float64.
        rows: weights, (groups, rows, d), float64.
        keep: what stays, likewise, boolean; if not given, in every block of columns the smallest w²/U_jj² go.
        zeros: how many go then.
        gone: what was pruned before and goes in any case, at most `zeros`.
        block: columns that are chosen among at once.

    Returns:
        What stays, and its values.

    >>> keep, values = sweep(torch.eye(2)[None], torch.tensor([[[3.0, 1.0]]]), zeros=1)
    >>> keep.tolist(), values.tolist()
    ([[[True, False]]], [[[3.0, 0.0]]])
    """
    values, width = rows.clone(), rows.shape[-1]
    chosen = torch.ones_like(rows, dtype=torch.bool) if keep is None else keep
    before = torch.zeros_like(chosen) if gone is None else gone
    starts = range(0, width, block)
    free = [int((~before[..., at : at + block]).sum()) for at in starts]
    parts = _split(zeros - int(before.sum()), free) if keep is None else free
    for at, count in zip(starts, parts, strict=True):
        end = min(at + block, width)
        here, own = values[..., at:end], upper[:, at:end, at:end]
        pivots = own.diagonal(dim1=-2, dim2=-1)[:, None]
        if keep is None:
            scores = (here / pivots).square().masked_fill(before[..., at:end], -1.0)
            total = count + int(before[..., at:end].sum())
            chosen[..., at:end] = keep_largest(scores, total)
        asked = torch.zeros_like(here)
        for i in range(end - at):
            goes = ~chosen[..., at + i]
            asked[..., i] = here[..., i].masked_fill(~goes, 0.0) / pivots[..., i]
            here[..., i] = here[..., i].masked_fill(goes, 0.0)
            here[..., i + 1 :] -= asked[..., i, None] * own[:, None, i, i + 1 :]
        values[..., end:] -= asked @ upper[:, at:end, end:]
    return chosen, values.masked_fill_(~chosen, 0.0)


def _split(total: int, counts: Sequence[int]) -> list[int]:
    """Split `total` over parts in proportion to their counts: none more than it has, their sum exact.

    >>> _split(5, [4, 4, 2]), _split(3, [2, 2, 2])
    ([2, 2, 1], [1, 1, 1])
    """
    whole, so_far, ends = sum(counts), 0, [0]
    for count in counts:
        so_far += count
        ends.append((2 * total * so_far + whole) // (2 * whole) if whole else 0)
    return [end - start for start, end in itertools.pairwise(ends)]


def _damped(pruner: LayerwisePruner, name: str, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return H + λI with ones for dead columns, and which these are, (groups, inputs)."""
    matrices = matrices.clone()
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    live = int((~dead).sum())
    if not live:
        raise ValueError(
            f"all inputs of the layer of {name} are zero on these {pruner.samples:,} examples, so that {pruner.kind} "
            f"cannot rank its weights: leave it dense, exclude=[{name!r}], or give other examples"
        )
    diagonal += torch.where(dead, 1.0, pruner.damping * float(diagonal.sum()) / live)
    return matrices, dead


def _upper(matrices: Tensor) -> Tensor:
    """Return U with (H + λI)⁻¹ = UᵀU."""
    factor, failed = torch.linalg.cholesky_ex(obs.inverse(matrices), upper=True)
    if bool(failed.any()):
        raise obs.NotDefinite(int(failed.nonzero()[0, 0]))
    return factor


@contextmanager
def _named(pruner: Pruner, name: str) -> Iterator[None]:
    """Where a matrix cannot be factored, say whose it is and what to do."""
    try:
        yield
    except obs.NotDefinite:
        damping = getattr(pruner, "damping", 0.0)
        raise ValueError(
            f"the inputs' second moments at {name} are not positive definite with damping {damping:g}: give more, such "
            f"as {pruner.kind}(damping={max(1e-3, 10 * damping):g})"
        ) from None
