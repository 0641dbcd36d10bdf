"""Wrappers around any torch optimizer: they choose where the gradient is taken, the base optimizer steps with it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cram_bench._checks import instance, number
from cram_bench._preserve import clones, copy_into

Closure = Callable[[], Any]

TINY = 1e-12  # keeps a zero gradient from dividing by zero; far below any norm that matters


class Wrapper(Optimizer, abc.ABC):
    """A step of the base optimizer with a gradient that a subclass takes where it likes.

    ``step(closure)`` follows torch's convention for optimizers that evaluate the loss more than once, as `LBFGS`
    does: the closure clears the gradients, computes the loss, calls ``backward`` and returns the loss.
    Parameter groups, state and defaults are those of the base optimizer, so learning-rate schedulers work on either.

    * Gradient accumulation is a loop over micro-batches inside the closure.
    * The gradient that the base optimizer steps with is clipped by a hook on it:
      ``base.register_step_pre_hook(lambda *_: clip_grad_norm_(model.parameters(), 1.0))``.
    * With a `torch.amp.GradScaler` the closure scales the loss as usual, and the step is given the scaler.
    * With `DistributedDataParallel`, `model` is the wrapped model and the closure calls it.

    Whatever the closure raises, weights and buffers are as before the step.

    Args:
        model: the model whose parameters `base` updates. Its buffers are looked after, and it says what is prunable.
        base: any optimizer over parameters of `model`.
        settings: defaults added to every parameter group that does not set them itself.

    Raises:
        ValueError: `base` holds a parameter that is not one of `model`.
        TypeError: `model` is no torch model, or `base` no torch optimizer.
    """

    base: Optimizer
    model: nn.Module
    parallel: DistributedDataParallel | None
    settings: dict[str, float | bool]

    def __init__(self, model: nn.Module, base: Optimizer, **settings: float | bool) -> None:
        instance("model", model, nn.Module, "a torch model")
        instance("base", base, Optimizer, "a torch optimizer")
        parallel = model if isinstance(model, DistributedDataParallel) else None
        # Not Optimizer.__init__, which would build groups and state anew; __setstate__ only prepares the hooks.
        super().__setstate__(
            {
                "base": base,
                "model": parallel.module if parallel is not None else model,
                "parallel": parallel,
                "settings": settings,
            }
        )
        for group in base.param_groups:
            self._adopt(group)

    # Shared with the base optimizer. Properties, because loading a state dict gives the base new objects.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    @abc.abstractmethod
    def _gradients(self, closure: Closure, scale: float | None) -> Any:
        """Leave in ``.grad`` what the base optimizer steps with, and the weights as they were; return the loss.

        `scale` is the factor on the loss, and so on every gradient that the closure computes; None without a scaler.
        """

    def _snapshot(self) -> Callable[[], None]:
        """Return what puts the subclass's own state back, for when the closure raises."""
        return lambda: None

    def _ready(self) -> None:
        """Called before the base optimizer's step, with finite gradients, unscaled and not yet clipped."""

    def _stepped(self) -> None:
        """Called after the base optimizer's step."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, scaler: torch.amp.GradScaler | None = None) -> Any:  # type: ignore[override]
        """Take one step; return what the closure returned first.

        Args:
            closure: clears the gradients, computes the loss, runs backward and returns the loss.
            scaler: the scaler that the closure multiplies the loss with. It skips the step when a gradient is not
                finite, as it does for a plain optimizer; call its ``update`` afterwards.

        Raises:
            TypeError: no closure is given, or it returns no loss; weights and buffers are as before then.
        """
        if not callable(closure):
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that clears gradients, runs backward and returns the loss"
            )
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        returning = _returning(torch.enable_grad()(closure))
        back = self._snapshot()
        try:
            with self._restored(self.model.buffers()):
                loss = self._gradients(returning, None if scaler is None else scaler.get_scale())
        except BaseException:
            back()
            raise
        if scaler is None:
            self._ready()
            self.base.step()
        elif any(p.grad is not None for p in self._parameters()):  # a scaler refuses a step without gradients
            scaler.unscale_(self.base)  # before the hooks of the base optimizer, which then see true gradients
            if _finite(p.grad for p in self._parameters()):
                self._ready()
            scaler.step(self.base)
        self._stepped()
        return loss

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @contextmanager
    def _restored(self, tensors: Iterable[Tensor], always: bool = False) -> Iterator[None]:
        """Put `tensors` back when the block raises, or `always`."""
        tensors = list(tensors)
        values = clones(tensors)
        try:
            yield
        except BaseException:
            copy_into(tensors, values)
            raise
        if always:
            copy_into(tensors, values)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer, which fills in its defaults."""
        self.base.add_param_group(param_group)
        try:
            self._adopt(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def _adopt(self, group: dict[str, Any]) -> None:
        owned = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) not in owned for parameter in group["params"]):
            strange = next(p for p in group["params"] if id(p) not in owned)
            shape = tuple(strange.shape)
            raise ValueError(f"the base optimizer holds a parameter, of shape {shape}, that is not in the model")
        for name, value in self.settings.items():
            group.setdefault(name, value)
        if "rho" in self.settings:
            check_rho(group["rho"])

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base optimizer's state; subclasses add what they need to resume."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned."""
        self.base.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


class TwoPass(Wrapper):
    """One training step from two gradients: at the true weights, then at weights moved by a subclass.

    1. The closure is called at the weights θ: gradient g.
    2. The weights are moved (`_move`), it is called again: gradient g̃, and θ is put back bit for bit.
    3. g and g̃ are combined (`_combine`), and the base optimizer steps at θ.

    Buffers, such as BatchNorm's running statistics, come from the first call alone; the user has nothing to
    freeze. Over several devices both gradients are averages over all of them, so every device moves to the same
    point; the first is left unsynchronised where nothing depends on it.
    """

    def _moved(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return what `_move` may change, given the parameters that have gradients; it is put back after the step."""
        return parameters

    @abc.abstractmethod
    def _move(self, groups: list[Ascent]) -> None:
        """Move the weights in place, given (group, parameters, gradients at θ) for every group with gradients."""

    def _leave(self) -> None:
        """Called after the second pass, while the weights are still moved; may change them, for they are put back."""

    @abc.abstractmethod
    def _combine(self, first: dict[Tensor, Tensor | None]) -> None:
        """Turn the gradients g̃ in ``.grad`` into those that the base optimizer uses; `first` holds g if `_keeps_first`."""

    def _keeps_first(self) -> bool:
        """Whether `_combine` uses the gradient at θ; otherwise its memory is given back before the second pass."""
        return True

    def _needs_first(self) -> bool:
        """Whether the step depends on the gradient at θ, and not only on the loss and the buffers there."""
        return True

    def _gradients(self, closure: Closure, scale: float | None) -> Any:
        buffers = list(self.model.buffers())
        with nullcontext() if self.parallel is None or self._needs_first() else self.parallel.no_sync():
            loss = closure()
        parameters = [p for p in self._parameters() if p.grad is not None]
        first = {p: p.grad for p in parameters}
        if scale is not None:
            if self._needs_first() and not _finite(first.values()):
                return loss  # the scaler finds it too, skips the step and lowers the scale; on every device alike
            _multiply(first.values(), 1 / scale)
        if self.parallel is not None and self.parallel.gradient_as_bucket_view:
            first = {p: g.clone() for p, g in first.items() if g is not None}  # the next pass writes where g lies
        after_first = clones(buffers)
        for parameter in parameters:
            parameter.grad = None  # the closure then cannot overwrite the first gradients
        with self._restored(self._moved(parameters), always=True):
            self._move(
                [
                    (group, moved, [cast(Tensor, first[p]) for p in moved])
                    for group in self.param_groups
                    if (moved := [p for p in group["params"] if first.get(p) is not None])
                ]
            )
            if not self._keeps_first():
                first.clear()
            closure()
            self._leave()
        if scale is not None:  # the sum is scaled like its second term; a scale is a power of two, so nothing is lost
            _multiply(first.values(), scale)
        self._combine(first)
        copy_into(buffers, after_first)
        return loss


Ascent = tuple[dict[str, Any], list[Tensor], list[Tensor]]
"""A parameter group, parameters of it, and for each the direction that its radius belongs to."""


def ascend_(groups: Sequence[Ascent], normalize: bool, sign: float = 1.0) -> None:
    """θ ← θ ± ρ u, or θ ± ρ u/‖u‖₂ with the norm over all groups together; each group has its own ρ. Nothing is copied."""
    if not groups:
        return
    norm = norm_of([u for _, _, directions in groups for u in directions]) if normalize else None
    for group, parameters, directions in groups:
        if norm is None:
            torch._foreach_add_(parameters, directions, alpha=sign * group["rho"])
        else:
            step = sign * group["rho"] / (norm + TINY)
            torch._foreach_addcmul_(parameters, directions, [step.to(p.dtype) for p in parameters])


def momenta(groups: Sequence[dict[str, Any]], state: Any) -> list[Ascent]:
    """Return the momentum v of every parameter that has one: SGD's buffer or Adam's first moment.

    The ascent goes along −v, as momentum-SAM's: just after a step along −v, going on is what climbs (arXiv 2401.12033).
    """
    found = []
    for group in groups:
        pairs = [(p, v) for p in group["params"] if (v := _momentum(state.get(p, {}))) is not None]
        if pairs:
            found.append((group, [p for p, _ in pairs], [v for _, v in pairs]))
    return found


def mask_gradients(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Multiply the gradients of named parameters by their masks, in place."""
    masked = [(p.grad, masks[name]) for name, p in parameters.items() if p.grad is not None]
    if masked:
        torch._foreach_mul_([gradient for gradient, _ in masked], [mask for _, mask in masked])


def check_momentum(base: Optimizer) -> None:
    """Refuse a base optimizer that keeps no momentum."""
    for group in base.param_groups:
        if not (group.get("momentum") or group.get("betas", (0.0,))[0]):
            raise ValueError(f"the ascent follows the momentum, and this optimizer keeps none: {type(base).__name__}")


def ascends(groups: Sequence[dict[str, Any]]) -> bool:
    """Tell whether any group has a radius above 0."""
    return any(group["rho"] for group in groups)


def check_rho(rho: float) -> None:
    """Refuse a radius that is negative or not finite."""
    number("rho, the ascent radius,", rho, 0)


def _returning(closure: Closure) -> Closure:
    """Return the closure, which now refuses to return nothing."""

    def checked() -> Any:
        loss = closure()
        if loss is None:
            raise TypeError("the closure must return the loss, and it returned None")
        return loss

    return checked


def _momentum(state: dict[str, Any]) -> Tensor | None:
    velocity = state.get("momentum_buffer")
    return velocity if velocity is not None else state.get("exp_avg")


def norm_of(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors together, as a tensor: nothing waits for it."""
    norms = torch._foreach_norm(tensors)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _multiply(gradients: Iterable[Tensor | None], factor: float) -> None:
    if present := [gradient for gradient in gradients if gradient is not None]:
        torch._foreach_mul_(present, factor)


def _finite(gradients: Iterable[Tensor | None]) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
