"""Sharpness-Aware Minimization: step with the gradient at the top of a small ascent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cram_bench.optim.base import TwoPass, check_rho

_TINY = 1e-12  # keeps a zero gradient from dividing by zero; far below any norm that matters


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

    def _move(self, groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        if not groups:
            return
        scaled = [
            torch._foreach_mul([p.abs() for p in parameters], gradients) if group["adaptive"] else gradients
            for group, parameters, gradients in groups
        ]
        norms = torch._foreach_norm([gradient for gradients in scaled for gradient in gradients])
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        for (group, parameters, _), ascent in zip(groups, scaled, strict=True):
            if group["adaptive"]:
                ascent = torch._foreach_mul([p.abs() for p in parameters], ascent)
            steps = torch._foreach_mul(list(ascent), group["rho"] / (norm + _TINY))
            torch._foreach_add_(parameters, list(steps))

    def _combine(self, first: dict[Tensor, Tensor | None]) -> None:
        """The base optimizer uses the second gradient as it is."""
