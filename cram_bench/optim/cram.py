"""CrAM: compression-aware minimization, for dense models that survive one-shot compression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cram_bench.callbacks import Callback, Ramp
from cram_bench.checks import number
from cram_bench.compress import Compressor, Masks, check_leaves, parse, prunable
from cram_bench.data import Dataset
from cram_bench.optim.base import (
    Ascent,
    Closure,
    TwoPass,
    Wrapper,
    ascend_,
    ascends,
    check_momentum,
    check_rho,
    mask_gradients,
    momenta,
)
from cram_bench.optim.draw import Draw
from cram_bench.optim.step import Step, TwoPassStep
from cram_bench.preserve import clones
from cram_bench.settings import Count, Fraction, NotNegative, Texts

Ascending = Literal["gradient", "momentum"]


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
        model: the model being trained, or the `DistributedDataParallel` around it.
        base: any torch optimizer over its parameters.
        compressors: one compression operator, or several to draw from.
        rho: ascent radius ρ ≥ 0, in units of weight per unit of gradient; a parameter group may set its own.
        plus: add the gradient at θ, which keeps the dense model accurate.
        sparse_gradients: mask the gradient taken at the compressed weights.
        normalize: ascend by ρ g/‖g‖₂ as SAM does, the norm over all parameters; ρ is then in units of weight.
        mask_interval: uses of a compressor per choice of its masks; 1 chooses anew at every step.
        plain: probability of a plain step, which uses g alone and costs one pass; `cram_bench.callbacks.Ramp` lowers it
            from 1 while training goes on.
        seed: seeds the draw of compressors, and of plain steps. Over several devices that of the first counts.
        exclude: shell patterns over parameter names that stay dense.

    Raises:
        ValueError: no compressor is given, `rho` is negative or not finite, `mask_interval` is not an integer ≥ 1,
            `plain` is outside [0, 1), or nothing is prunable.
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
        normalize: bool = False,
        mask_interval: int = 1,
        plain: float = 0.0,
        seed: int = 0,
        exclude: Iterable[str] = (),
    ) -> None:
        check_rho(rho)
        _check_plain(plain)
        super().__init__(model, base, rho=rho)
        self.plus = plus
        self.plain = plain
        self.sparse_gradients = sparse_gradients
        self.normalize = normalize
        self.prunable = prunable(self.model, exclude)
        self.draw = Draw(self.prunable, compressors, mask_interval, _shared(seed, self.parallel))
        self._masks: Masks | None = None

    def _needs_first(self) -> bool:
        return self.plus or ascends(self.param_groups)

    def _snapshot(self) -> Callable[[], None]:
        return self.draw.snapshot()

    def _gradients(self, closure: Closure, scale: float | None) -> Any:
        if self.plain and self.draw.tossed(self.plain):
            return closure()
        return super()._gradients(closure, scale)

    def _moved(self, parameters: list[Tensor]) -> list[Tensor]:
        return _distinct(parameters, self.prunable)

    def _move(self, groups: list[Ascent]) -> None:
        ascend_(groups, self.normalize)
        masks = self.draw.apply_()
        self._masks = _needed_masks(masks, self.prunable) if self.sparse_gradients else None

    def _leave(self) -> None:
        if self.sparse_gradients:
            _mask_gradients(self.prunable, self._masks)
        self._masks = None

    def _keeps_first(self) -> bool:
        return self.plus

    def _combine(self, first: dict[Tensor, Tensor | None]) -> None:
        if self.plus:
            for parameter, gradient in first.items():
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad.add_(gradient)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base optimizer's state and, as ``cram`` of its first group, that of draw and held masks."""
        return _with(super().state_dict(), {"method": "CrAM", **self.draw.state_dict()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned.

        Raises:
            ValueError: another optimizer saved it, or it is of other compressors, another mask interval or other
                groups.
        """
        base, own = _without(state_dict, "CrAM")
        with _loaded(self.draw, own):
            super().load_state_dict(base)

    def __repr__(self) -> str:
        choices = ", ".join(map(str, self.draw.compressors))
        return f"CrAM({choices}; plus={self.plus}, sparse_gradients={self.sparse_gradients}, base={self.base!r})"


class CrAMSingle(Wrapper):
    """CrAM+ at the price of its base optimizer: one gradient a step, taken either at θ or at compressed weights.

    With probability p a plain step with ∇L(θ). Otherwise g̃ = ∇L(C_k(θ + ρ u)), with an ascent u that is
    already known, and the base optimizer steps at θ with M ⊙ g̃. In expectation over the draw and for p = ½ that is
    half of CrAM+'s g + M ⊙ g̃, so with SGD the same path takes twice its learning rate and half its weight decay.
    ``plain`` may be changed while training goes on; `cram_bench.callbacks.Ramp` lowers it from 1.

    u is −v, v being the base optimizer's momentum (``ascent="momentum"``, which costs nothing; its sign and, with
    ``normalize``, its normalisation are momentum-SAM's, arXiv 2401.12033), or the gradient that the last step used,
    before any clipping (``"gradient"``, which costs one more copy of the weights, in memory and in a checkpoint). The
    first step has none and only compresses. The method is of this project; nothing published describes it.

    BatchNorm's running statistics come from the plain steps alone. The loss returned is that at the point where
    the gradient was taken, so on average it lies above the loss at θ.

    Args:
        model: the model being trained, or the `DistributedDataParallel` around it.
        base: any torch optimizer over its parameters.
        compressors: one compression operator, or several to draw from.
        rho: ascent radius ρ ≥ 0, in units of weight per unit of u; a parameter group may set its own.
        plain: probability p of a plain step, in [0, 1).
        ascent: ``gradient`` or ``momentum``.
        sparse_gradients: mask the gradient taken at the compressed weights.
        normalize: ascend by ρ u/‖u‖₂, the norm over all parameters.
        mask_interval: uses of a compressor per choice of its masks; 1 chooses anew every time.
        seed: seeds both draws. Over several devices that of the first counts.
        exclude: shell patterns over parameter names that stay dense.

    Raises:
        ValueError: as `CrAM` does; and `plain` is outside [0, 1), `ascent` unknown, or there is no momentum to follow.
        TypeError: something among `compressors` is not a `Compressor`.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        compressors: Sequence[Compressor] | Compressor,
        rho: float = 0.02,
        plain: float = 0.5,
        ascent: Ascending = "momentum",
        sparse_gradients: bool = True,
        normalize: bool = False,
        mask_interval: int = 1,
        seed: int = 0,
        exclude: Iterable[str] = (),
    ) -> None:
        check_rho(rho)
        _check_plain(plain)
        if ascent not in get_args(Ascending):
            raise ValueError(f"ascent must be one of {', '.join(get_args(Ascending))}, not {ascent!r}")
        if ascent == "momentum":
            check_momentum(base)
        super().__init__(model, base, rho=rho)
        self.plain = plain
        self.ascent = ascent
        self.sparse_gradients = sparse_gradients
        self.normalize = normalize
        self.prunable = prunable(self.model, exclude)
        self.draw = Draw(self.prunable, compressors, mask_interval, _shared(seed, self.parallel))
        self._last: dict[Tensor, Tensor] = {}

    def _gradients(self, closure: Closure, scale: float | None) -> Any:
        if self.draw.tossed(self.plain):
            return closure()
        moved = _distinct(self._parameters(), self.prunable)
        with self._restored([*moved, *self.model.buffers()], always=True):
            ascend_(self._ascents(), self.normalize, sign=-1.0 if self.ascent == "momentum" else 1.0)
            masks = self.draw.apply_()
            needed = _needed_masks(masks, self.prunable) if self.sparse_gradients else None
            del masks
            loss = closure()
            if self.sparse_gradients:
                _mask_gradients(self.prunable, needed)
        return loss

    def _ascents(self) -> list[Ascent]:
        if self.ascent == "momentum":
            return momenta(self.param_groups, self.state)
        return [
            (group, known, [self._last[p] for p in known])
            for group in self.param_groups
            if (known := [p for p in group["params"] if p in self._last])
        ]

    def _snapshot(self) -> Callable[[], None]:
        return self.draw.snapshot()

    def _ready(self) -> None:
        if self.ascent == "gradient":
            present = [p for p in self._parameters() if p.grad is not None]
            self._last = dict(zip(present, clones([p.grad for p in present if p.grad is not None]), strict=True))

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base optimizer's state and, as ``cram`` of its first group, draws, masks and last gradient."""
        state = {"method": "CrAMSingle", **self.draw.state_dict()}
        if self.ascent == "gradient":
            state["last"] = [self._last.get(p) for p in self._parameters()]
        return _with(super().state_dict(), state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned.

        Raises:
            ValueError: another optimizer saved it, or it is of other compressors, another mask interval or other
                groups.
        """
        base, own = _without(state_dict, "CrAMSingle")
        with _loaded(self.draw, own):
            super().load_state_dict(base)
        last = own.get("last", [])
        parameters = self._parameters()[: len(last)]
        self._last = {p: g.to(p.device, copy=True) for p, g in zip(parameters, last, strict=True) if g is not None}

    def __repr__(self) -> str:
        choices = ", ".join(map(str, self.draw.compressors))
        return f"CrAMSingle({choices}; plain={self.plain}, ascent={self.ascent}, base={self.base!r})"


def _needed_masks(masks: Masks, weights: Mapping[str, Tensor]) -> Masks | None:
    """Return the masks, or None where the compressed weights say the same: zero where masked, and nowhere else.

    A mask takes a quarter of its weights' memory, through the pass that needs most of it.
    """
    kept = sum(torch.count_nonzero(mask) for mask in masks.values())
    return None if int(kept) == int(sum(torch.count_nonzero(weights[name]) for name in masks)) else masks


def _mask_gradients(weights: Mapping[str, Tensor], masks: Masks | None) -> None:
    """Mask the gradients of compressed weights, put back afterwards: where they tell, they become the mask."""
    if masks is None:
        masks_of: Mapping[str, Tensor] = {name: weight.detach().ne_(0) for name, weight in weights.items()}
    else:
        masks_of = masks
    mask_gradients(weights, masks_of)


def _check_plain(plain: float) -> None:
    if not 0 <= number("plain, the probability of a plain step,", plain) < 1:
        raise ValueError(f"plain, the probability of a plain step, must be in [0, 1), not {plain!r}")


def _distinct(parameters: list[Tensor], prunable: Mapping[str, Tensor]) -> list[Tensor]:
    # Compression also zeroes weights that are frozen or got no gradient.
    return list({id(tensor): tensor for tensor in (*parameters, *prunable.values())}.values())


def _shared(seed: int, parallel: DistributedDataParallel | None) -> int:
    """Return the seed of the first device: all have to draw the same compressors."""
    if parallel is None:
        return seed
    first = torch.tensor(seed, device=next(parallel.parameters()).device)
    torch.distributed.broadcast(first, group_src=0, group=parallel.process_group)
    return int(first)


def _with(state_dict: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Add a method's own state to the first group: of others, torch.distributed.checkpoint keeps nothing."""
    first, *rest = state_dict["param_groups"]
    return {**state_dict, "param_groups": [{**first, "cram": own}, *rest]}


def _without(state_dict: dict[str, Any], method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (the base optimizer's state, the method's own), which used to stand beside the groups."""
    groups = state_dict.get("param_groups", [])
    own = next((part["cram"] for part in (state_dict, *groups) if "cram" in part), None)
    if own is None:
        raise ValueError(
            f"this state dict was not saved by {method}: it has no entry 'cram'; a plain optimizer's is loaded by"
            " optimizer.base.load_state_dict"
        )
    saved = own.get("method", method)
    if saved != method:
        raise ValueError(f"this state dict was saved by {saved}, not by {method}")
    rest = {name: value for name, value in state_dict.items() if name != "cram"}
    rest["param_groups"] = [{name: value for name, value in group.items() if name != "cram"} for group in groups]
    return rest, own


@contextmanager
def _loaded(draw: Draw, own: Mapping[str, Any]) -> Iterator[None]:
    """Load the draw's state, which refuses what does not fit; put it back when the block raises."""
    back = draw.snapshot()
    draw.load_state_dict(own)
    try:
        yield
    except BaseException:
        back()
        raise


@dataclass(frozen=True)
class CompressingStep(Step):
    """A step that takes a gradient at compressed weights."""

    compresses: ClassVar[bool] = True

    rho: NotNegative = 0.2
    """Ascent radius of SAM (normalised) and CrAM (not normalised)."""
    compressors: Texts = ("global@0.7",)
    """Specifications that CrAM draws from, such as ``global@0.9`` or ``2:4``."""
    sparse_gradients: bool = True
    """Mask CrAM's gradient at the compressed weights."""
    normalize: bool = False
    """Whether CrAM divides its ascent by the norm, as SAM does."""
    mask_interval: Count = 1
    """Uses of a compressor per choice of its masks, at least 1."""
    plain: Fraction = 0.0
    """Of CrAM: the probability of a plain step, in [0, 1)."""
    ramp: bool = False
    """Of CrAM: lower that probability linearly from 1 to ``plain`` over the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.compressors:
            raise ValueError(f"step {self.kind!r} needs compressors, such as ('global@0.5',); it was given ()")
        for spec in self.compressors:
            check_leaves(parse(spec))
        if self.halved and (self.ramp or self.plain):
            raise ValueError("plain and ramp leave out gradients, and halves needs both; give one or the other")

    def cost(self) -> float:
        left_out = (1 + self.plain) / 2 if self.ramp else self.plain
        return 1 + (super().cost() - 1) * (1 - left_out)

    def callbacks(self, train: Dataset) -> Sequence[Callback]:
        return [Ramp()] if self.ramp else []

    def _settings_of_draw(self, seed: int) -> dict[str, Any]:
        return {
            "compressors": [parse(spec) for spec in self.compressors],
            "rho": self.rho,
            "sparse_gradients": self.sparse_gradients,
            "normalize": self.normalize,
            "mask_interval": self.mask_interval,
            "plain": self.plain,
            "seed": seed,
        }


@dataclass(frozen=True)
class CrAMStep(CompressingStep, TwoPassStep):
    """A step of `CrAM` with the gradient at compressed weights alone."""

    kind: ClassVar[str] = "cram"
    plus: ClassVar[bool] = False

    def wrap(self, model: nn.Module, base: Optimizer, seed: int) -> Optimizer:
        return CrAM(model, base, plus=self.plus, **self._settings_of_draw(seed))


@dataclass(frozen=True)
class CrAMPlusStep(CrAMStep):
    """A step of `CrAM` with the sum of both gradients."""

    kind: ClassVar[str] = "cram+"
    plus: ClassVar[bool] = True


@dataclass(frozen=True)
class CrAMSingleStep(CompressingStep):
    """A step of `CrAMSingle`."""

    kind: ClassVar[str] = "cram-single"

    rho: NotNegative = 0.02
    """Ascent radius of SAM (normalised) and CrAM (not normalised)."""
    ascent: Annotated[Ascending, Field(description="momentum or gradient")] = "momentum"
    """Of cram-single: ``momentum`` or ``gradient``."""

    def wrap(self, model: nn.Module, base: Optimizer, seed: int) -> Optimizer:
        return CrAMSingle(model, base, ascent=self.ascent, **self._settings_of_draw(seed))
