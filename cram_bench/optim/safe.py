"""SAFE: a sparse network by alternating directions, at a flat minimum; one sparsity a training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cram_bench.callbacks import Callback
from cram_bench.checks import integer, number
from cram_bench.compress import Magnitude, Masks, check_leaves, prunable, tune_batchnorm
from cram_bench.data import Dataset
from cram_bench.optim.sam import SAM
from cram_bench.optim.step import TwoPassStep
from cram_bench.preserve import clones
from cram_bench.settings import Count, Fraction, NotNegative

if TYPE_CHECKING:
    from cram_bench.train import Fit

CALIBRATION = 10_000
"""Training images that BatchNorm is re-estimated on at the end, as the authors' code has it."""
PULL = 78.2
"""λ · T of the paper's ResNet-20: 1e-3 over 200 epochs of 391 steps."""


class SAFE(SAM):
    """min_w max_{‖ε‖≤ρ} L(w + ε) subject to w having sparsity s, by ADMM (SAFE, arXiv 2506.06866, and its code).

    One step, z and u being copies of the prunable weights: g = ∇L(w + ρ ∇L/‖∇L‖₂), as `SAM`; the base optimizer steps
    with g + λ(w − z + u). After every K steps z ← TopK_s(w + u), u ← u + w − z, TopK_s keeping the largest magnitudes
    of all tensors together. It starts from z = TopK_s(w) and u = 0. `project_` ends it: w ← TopK_s(w). Two forward and
    backward passes a step; memory of two more copies of the weights.

    Args:
        model: the model being trained, or the `DistributedDataParallel` around it.
        base: any torch optimizer over its parameters.
        sparsity: s, in [0, 1).
        rho: ascent radius ρ ≥ 0; a parameter group may set its own ``rho``.
        penalty: λ ≥ 0; may be changed while training goes on, as `Rise` does.
        every: K, steps from one projection to the next.
        exclude: shell patterns over parameter names that stay dense.

    Raises:
        ValueError: a number is outside what its line allows, or nothing is prunable.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        sparsity: float = 0.9,
        rho: float = 0.1,
        penalty: float = 1e-3,
        every: int = 32,
        exclude: Iterable[str] = (),
    ) -> None:
        self.operator = Magnitude(number("sparsity", sparsity, 0, 1))
        check_leaves(self.operator)
        self.penalty = number("penalty", penalty, 0)
        self.every = integer("every", every, 1)
        super().__init__(model, base, rho=rho)
        self.prunable = prunable(self.model, exclude)
        self.count = 0
        with torch.no_grad():
            self.sparse = dict(zip(self.prunable, clones(list(self.prunable.values())), strict=True))
            self.operator.apply_(self.sparse)
            self.dual = {name: torch.zeros_like(weight) for name, weight in self.prunable.items()}
        self._stepping = False

    def _ready(self) -> None:
        """Pull with λ(w − z + u); gradients are unscaled here, and not yet clipped."""
        for name, weight in self.prunable.items():
            if weight.grad is not None:
                weight.grad.add_(weight - self.sparse[name] + self.dual[name], alpha=self.penalty)
        self._stepping = True

    def _stepped(self) -> None:
        if not self._stepping:  # a scaler left the step out
            return
        self._stepping = False
        self.count += 1
        if self.count % self.every == 0:
            for name, weight in self.prunable.items():
                self.dual[name] += weight
                self.sparse[name].copy_(self.dual[name])
            self.operator.apply_(self.sparse)
            for name in self.prunable:
                self.dual[name] -= self.sparse[name]

    def project_(self) -> Masks:
        """Set w ← TopK_s(w), and return the masks."""
        return self.operator.apply_(self.prunable)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base optimizer's state and, as ``safe`` of its first group, z, u and the count of steps."""
        state = super().state_dict()
        first, *rest = state["param_groups"]
        own = {
            "sparsity": self.operator.sparsity,
            "every": self.every,
            "count": self.count,
            "sparse": dict(self.sparse),
            "dual": dict(self.dual),
        }
        return {**state, "param_groups": [{**first, "safe": own}, *rest]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned.

        Raises:
            ValueError: another optimizer saved it, or it is of another sparsity, interval or model.
        """
        groups = state_dict.get("param_groups", [])
        own = groups[0].get("safe") if groups else None
        if own is None:
            raise ValueError("this state dict was not saved by SAFE: its first group has no entry 'safe'")
        for name, ours in (("sparsity", self.operator.sparsity), ("every", self.every)):
            if own[name] != ours:
                raise ValueError(f"the state was saved with {name} {own[name]}, not {ours}")
        for kept, theirs in ((self.sparse, own["sparse"]), (self.dual, own["dual"])):
            if {name: value.shape for name, value in theirs.items()} != {name: v.shape for name, v in kept.items()}:
                raise ValueError("the state was saved for another model: its prunable weights are others")
        rest = [{name: value for name, value in group.items() if name != "safe"} for group in groups]
        super().load_state_dict({**state_dict, "param_groups": rest})
        for name in self.prunable:
            self.sparse[name].copy_(own["sparse"][name])
            self.dual[name].copy_(own["dual"][name])
        self.count = own["count"]


class Rise(Callback):
    """Raise the penalty of a `SAFE` to its setting, and project the weights at the end.

    λ_t = λ(1 − cos(πt/T))/2 at step t of T. After the last step w ← TopK(w), and BatchNorm is re-estimated on training
    images, augmented as they were. A λ of 0 is replaced by `PULL`/T: over 20 epochs of digits (T = 355, two seeds, 300
    held-out images) the paper's 1e-3 left 61 % at 95 % zeros, 0.1 left 84 %, 0.3 left 80 % and 1 left 36 %.
    """

    def __init__(self, train: Dataset) -> None:
        self.train = train

    def on_start(self, fit: Fit) -> None:
        """Remember the setting, and start at 0, or where a checkpoint left."""
        self.given: float = fit.optimizer.penalty  # type: ignore[attr-defined]
        self.final = self.given or PULL / (fit.epochs * fit.steps_per_epoch)
        self._set(fit, fit.epoch * fit.steps_per_epoch)

    def on_step(self, fit: Fit, step: int, loss: Tensor, correct: Tensor, seen: int) -> None:
        """Set the penalty of the next step, or end."""
        done = fit.epoch * fit.steps_per_epoch + step + 1
        self._set(fit, done)
        if done == fit.epochs * fit.steps_per_epoch:
            fit.optimizer.project_()  # type: ignore[attr-defined]
            tune_batchnorm(fit.model, self.train.calibration(CALIBRATION))

    def on_end(self, fit: Fit) -> None:
        """Put the setting back."""
        fit.optimizer.penalty = self.given  # type: ignore[attr-defined]

    def _set(self, fit: Fit, step: int) -> None:
        share = step / (fit.epochs * fit.steps_per_epoch)
        fit.optimizer.penalty = self.final * (1 - math.cos(math.pi * share)) / 2  # type: ignore[attr-defined]


@dataclass(frozen=True)
class SAFEStep(TwoPassStep):
    """A step of `SAFE`."""

    kind: ClassVar[str] = "safe"

    rho: NotNegative = 0.1
    """Ascent radius of SAM (normalised) and CrAM (not normalised)."""
    sparsity: Fraction = 0.9
    """Of SAFE: sparsity of the network in the end, in [0, 1)."""
    penalty: NotNegative = 0.0
    """Of SAFE: λ, how strongly the weights are pulled to sparse ones at the end of the training; 0 for as much pull in
    all as in the paper's, 78.2/T in T steps."""
    every: Count = 32
    """Of SAFE: K, steps from one projection to the next."""

    def wrap(self, model: nn.Module, base: Optimizer, seed: int) -> Optimizer:
        return SAFE(model, base, self.sparsity, self.rho, self.penalty, self.every)

    def callbacks(self, train: Dataset) -> Sequence[Callback]:
        return [Rise(train)]
