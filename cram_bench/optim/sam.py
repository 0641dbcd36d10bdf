"""Sharpness-Aware Minimization: step with the gradient at the top of a small ascent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cram_bench.optim.base import (
    TINY,
    Ascent,
    Closure,
    TwoPass,
    Wrapper,
    ascend_,
    ascends,
    check_momentum,
    check_rho,
    momenta,
    norm_of,
    widened,
)
from cram_bench.optim.step import Step, TwoPassStep
from cram_bench.settings import NotNegative


class SAM(TwoPass):
    """min_θ max_{‖ε‖≤ρ} L(θ + ε), to first order (Foret et al., arXiv 2010.01412, eq. 2).

    One step: g = ∇L(θ); ε = ρ g/‖g‖₂, the norm over all parameters together; the base optimizer steps at θ
    with ∇L(θ + ε). With ``adaptive`` it is ASAM (Kwon et al., arXiv 2102.11600, eq. 10, without bias):
    ε = ρ θ²⊙g / ‖|θ|⊙g‖₂. Costs two forward and backward passes.

    Args:
        model: the model being trained.
        base: any torch optimizer over its parameters.
        rho: ascent radius ρ ≥ 0; a parameter group may set its own ``rho``.
        adaptive: scale the ascent by the weights (ASAM); a group may set its own.

    Raises:
        ValueError: `rho` is negative or not finite.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = SAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(1, 1)).square().sum()
    ...     loss.backward()
    ...     return loss
    >>> bool(optimizer.step(closure) > 0)
    True
    """

    def __init__(self, model: nn.Module, base: Optimizer, rho: float = 0.05, adaptive: bool = False) -> None:
        check_rho(rho)
        super().__init__(model, base, rho=rho, adaptive=adaptive)

    def _move(self, groups: list[Ascent]) -> None:
        if not groups:
            return
        if not any(group["adaptive"] for group, _, _ in groups):
            ascend_(groups, normalize=True)
            return
        scaled = [_by_size(p, g) if group["adaptive"] else [widened(u) for u in g] for group, p, g in groups]
        norm = norm_of([g for gradients in scaled for g in gradients])
        for (group, parameters, _), gradients in zip(groups, scaled, strict=True):
            ascent = _by_size(parameters, gradients) if group["adaptive"] else gradients
            torch._foreach_add_(parameters, list(torch._foreach_mul(ascent, group["rho"] / (norm + TINY))))

    def _keeps_first(self) -> bool:
        return False

    def _needs_first(self) -> bool:
        return ascends(self.param_groups)

    def _combine(self, first: dict[Tensor, Tensor | None]) -> None:
        """The base optimizer uses the second gradient as it is."""


class MomentumSAM(Wrapper):
    """SAM at the price of its base optimizer: the ascent follows the momentum, which is already known.

    One step (Becker et al., arXiv 2401.12033): the gradient is taken at θ − ρ v/‖v‖₂, v being the
    base optimizer's momentum, and applied at θ. One forward and backward pass, no memory beyond one copy of the
    weights during the step; the first step is a plain one. Adam's first moment serves as momentum as well. The loss
    returned, and BatchNorm's running statistics, are those at the moved weights: no other pass is made.

    Args:
        model: the model being trained.
        base: a torch optimizer with momentum over its parameters.
        rho: radius ρ ≥ 0; a parameter group may set its own. 0.3 is the authors' default.

    Raises:
        ValueError: `rho` is negative or not finite, or `base` keeps no momentum.
    """

    def __init__(self, model: nn.Module, base: Optimizer, rho: float = 0.3) -> None:
        check_rho(rho)
        check_momentum(base)
        super().__init__(model, base, rho=rho)

    def _gradients(self, closure: Closure, scale: float | None) -> Any:
        groups = momenta(self.param_groups, self.state)
        with self._restored([p for _, parameters, _ in groups for p in parameters], always=True):
            ascend_(groups, normalize=True, sign=-1.0)
            return closure()


def _by_size(parameters: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_mul([p.abs() for p in parameters], [widened(u) for u in directions]))


@dataclass(frozen=True)
class SAMStep(TwoPassStep):
    """A step of `SAM`."""

    kind: ClassVar[str] = "sam"

    rho: NotNegative = 0.05
    """Ascent radius of SAM (normalised) and CrAM (not normalised)."""

    def wrap(self, model: nn.Module, base: Optimizer, seed: int) -> Optimizer:
        return SAM(model, base, rho=self.rho)


@dataclass(frozen=True)
class MomentumSAMStep(Step):
    """A step of `MomentumSAM`."""

    kind: ClassVar[str] = "momentum-sam"

    rho: NotNegative = 0.3
    """Ascent radius of SAM (normalised) and CrAM (not normalised)."""

    def wrap(self, model: nn.Module, base: Optimizer, seed: int) -> Optimizer:
        return MomentumSAM(model, base, rho=self.rho)
