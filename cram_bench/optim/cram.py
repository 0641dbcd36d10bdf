"""CrAM: compression-aware minimization, for dense models that survive one-shot compression."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cram_bench.compress import Compressor, Masks, prunable
from cram_bench.optim.base import TwoPass, check_rho


class CrAM(TwoPass):
    """min_θ max_{‖δ‖≤ρ} L(C(θ + δ)) (Peste et al., arXiv 2207.14200, eq. 2 and algorithm 1).

    One step: g = ∇L(θ); θ̃ = C_k(θ + ρ g), the ascent not normalised and over every parameter; g̃ = ∇L(θ̃);
    then the base optimizer steps at θ with

    * CrAM: M ⊙ g̃, where M is this step's mask and ``sparse_gradients`` is on; otherwise g̃;
    * CrAM+ (``plus``): g + M ⊙ g̃, a sum, not a mean.

    Several compressors make it CrAM-Multi: one is drawn uniformly at every step, from a generator that is part of
    ``state_dict``. C_k acts on the weights the model calls prunable (`cram_bench.compress.prunable`). Costs two
    forward and backward passes and one selection; memory beyond the base optimizer's is one copy of the
    weights and one of the gradients.

    Args:
        model: the model being trained.
        base: any torch optimizer over its parameters.
        compressors: one compression operator, or several to draw from.
        rho: ascent radius ρ ≥ 0, in units of weight per unit of gradient; a parameter group may set its own.
        plus: add the gradient at θ, which keeps the dense model accurate.
        sparse_gradients: mask the gradient taken at the compressed weights.
        seed: seeds the draw of compressors.
        exclude: shell patterns over parameter names that stay dense.

    Raises:
        ValueError: no compressor is given, `rho` is negative or not finite, or nothing is prunable.
        TypeError: something among `compressors` is not a `Compressor`.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        compressors: Sequence[Compressor] | Compressor,
        rho: float = 0.2,
        plus: bool = True,
        sparse_gradients: bool = True,
        seed: int = 0,
        exclude: Iterable[str] = (),
    ) -> None:
        check_rho(rho)
        choices = (compressors,) if isinstance(compressors, Compressor) else tuple(compressors)
        if not choices:
            raise ValueError("CrAM needs at least one compressor, such as cb.compress.Magnitude(0.5)")
        for choice in choices:
            if not isinstance(choice, Compressor):
                raise TypeError(f"compressors must be compressors such as cb.compress.Magnitude(0.5), not {choice!r}")
        super().__init__(model, base, rho=rho)
        self.compressors = choices
        self.plus = plus
        self.sparse_gradients = sparse_gradients
        self.prunable = prunable(model, exclude)
        self.generator = torch.Generator().manual_seed(seed)
        self._masks: Masks | None = None

    def _moved(self, parameters: list[Tensor]) -> list[Tensor]:
        # Compression also zeroes weights that are frozen or got no gradient.
        return list({id(tensor): tensor for tensor in (*parameters, *self.prunable.values())}.values())

    def _move(self, groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        for group, parameters, gradients in groups:
            torch._foreach_add_(parameters, gradients, alpha=group["rho"])
        draw = int(torch.randint(len(self.compressors), (), generator=self.generator))
        self._masks = self.compressors[draw].apply_(self.prunable)

    def _combine(self, first: dict[Tensor, Tensor | None]) -> None:
        if self.sparse_gradients and self._masks is not None:
            masked = [(p.grad, self._masks[name]) for name, p in self.prunable.items() if p.grad is not None]
            if masked:
                torch._foreach_mul_([gradient for gradient, _ in masked], [mask for _, mask in masked])
        self._masks = None
        if self.plus:
            for parameter, gradient in first.items():
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad.add_(gradient)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base optimizer's state and, under ``cram``, the state of the draw."""
        return {**super().state_dict(), "cram": {"generator": self.generator.get_state()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned."""
        if "cram" not in state_dict:
            raise ValueError("this state dict was not saved by CrAM: it has no entry 'cram'")
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "cram"})
        self.generator.set_state(state_dict["cram"]["generator"])

    def __repr__(self) -> str:
        choices = ", ".join(map(str, self.compressors))
        return f"CrAM({choices}; plus={self.plus}, sparse_gradients={self.sparse_gradients}, base={self.base!r})"
