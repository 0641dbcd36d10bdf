"""Wrappers around any torch optimizer: they choose where the gradient is taken, the base optimizer steps with it."""

from __future__ import annotations

import abc
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cram_bench.checks import initialised, instance, number
from cram_bench.preserve import clones, copy_into

Closure = Callable[[], Any]

TINY = 1e-12  # keeps a zero gradient from dividing by zero; far below any norm that matters
HALF = (torch.float16, torch.bfloat16)


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

    * A group that `base.add_param_group` adds later, or a checkpoint of `base` alone, gets the settings it lacks.
    * `copy.deepcopy` and pickle take the model along: the copy's is its `model`. Hooks stay behind, as torch's do.

    Whatever the closure raises, weights and buffers are as before the step.

    Args:
        model: the model whose parameters `base` updates. Its buffers are looked after, and it says what is prunable.
        base: any optimizer over parameters of `model` whose step needs no closure.
        settings: defaults added to every parameter group that does not set them itself.

    Raises:
        ValueError: `base` holds a parameter that is not one of `model`, or a complex one; or the model has parameters
            that are not initialised yet.
        TypeError: `model` is no torch model, or `base` no torch optimizer, one of this package, or one that evaluates
            the closure itself, such as `LBFGS`.
    """

    base: Optimizer
    model: nn.Module
    parallel: DistributedDataParallel | None
    settings: dict[str, float | bool]
    accumulates: ClassVar[bool] = False
    """Whether gradients of before the step may be added to: only where all of them are taken at the true weights."""
    alone: ClassVar[bool] = False
    """Whether it also steps without a closure, as a plain optimizer does, so that another may be built over it."""

    def __init__(self, model: nn.Module, base: Optimizer, **settings: float | bool) -> None:
        instance("model", model, nn.Module, "a torch model")
        instance("base", base, Optimizer, "a torch optimizer")
        self._check_base(base)
        initialised(model)
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

    def _check_base(self, base: Optimizer) -> None:
        """Refuse a base optimizer whose step would want the closure too."""
        name = type(self).__name__
        if isinstance(base, Wrapper) and (self.alone or not base.alone):
            raise TypeError(f"{name} is built over a plain torch optimizer, not over {type(base).__name__}")
        closure = inspect.signature(type(base).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"{type(base).__name__} evaluates the closure itself, and so does {name}; take a base whose step needs"
                " none, such as torch.optim.SGD"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers put a step of their own on the instance, which is bound to this one.
        shared = {name for name in self.__dict__ if callable(getattr(type(self), name, None))}
        return {n: v for n, v in self.__dict__.items() if n not in shared and not n.startswith("_optimizer_")}

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
    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, scaler: torch.amp.GradScaler | None = None
    ) -> Any:
        """Take one step; return what the closure returned first.

        Args:
            closure: clears the gradients, computes the loss, runs backward and returns the loss.
            scaler: the scaler that the closure multiplies the loss with. It skips the step when a gradient is not
                finite, as it does for a plain optimizer; call its ``update`` afterwards.

        Raises:
            TypeError: no closure is given, or it returns no loss; weights and buffers are as before then.
            RuntimeError: the closure adds to gradients of before the step, as under Lightning's accumulation; or
                Accelerate accumulates gradients, and gives the step one micro-batch of many.
        """
        if closure is None and self._only_prepares():
            return self.base.step()
        if not callable(closure):
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that clears gradients, runs backward and returns the loss;"
                " a GradScaler is given to the step: step(closure, scaler=scaler)"
            )
        _refuse_accelerate()
        for group in self.param_groups:
            if not self.settings.keys() <= group.keys():  # added to the base optimizer, or loaded into it
                self._adopt(group)
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        returning = _returning(torch.enable_grad()(closure), [] if self.accumulates else self._parameters())
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

    def _only_prepares(self) -> bool:
        """Tell the step by which torch.distributed.checkpoint prepares the state: no learning rate, no gradient."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        rates = [float(group.get("lr", 1)) for group in self.param_groups]
        return bool(gradients) and not any(rates) and not any(bool(g.any()) for g in gradients)

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
        if complex_ := [p for p in group["params"] if p.is_complex()]:
            raise ValueError(
                f"a parameter of shape {tuple(complex_[0].shape)} is complex; keep it as torch.view_as_real gives it"
            )
        for name, value in self.settings.items():
            group.setdefault(name, value)
        if "rho" in self.settings:
            check_rho(group["rho"])

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base optimizer's state; subclasses add what they need to resume."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned, or that of a plain optimizer: settings that it lacks stay as they are.

        Raises:
            ValueError: it is not the state of an optimizer, or of one over other groups.
        """
        if missing := [name for name in ("state", "param_groups") if name not in state_dict]:
            raise ValueError(f"this is no state dict of an optimizer: it has no entry {missing[0]!r}")
        if "rho" in self.settings:  # before anything is loaded
            for group in state_dict["param_groups"]:
                check_rho(group.get("rho", 0.0))
        before = [{name: group[name] for name in self.settings if name in group} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, before, strict=True):
            for name, value in settings.items():
                group.setdefault(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


class TwoPass(Wrapper):
    """One training step from two gradients: at the true weights, then at weights moved by a subclass.

    1. The closure is called at the weights θ: gradient g.
    2. The weights are moved (`_move`), it is called again: gradient g̃, and θ is put back bit for bit.
    3. g and g̃ are combined (`_combine`), and the base optimizer steps at θ.

    Trainable parameters of the model that `base` does not hold (another optimizer does) stay where they are, and after
    the step their ``.grad`` is g, that of the first call: their own optimizer may step with it.

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
        """Turn g̃ in ``.grad`` into the gradients that the base optimizer uses; `first` holds g if `_keeps_first`."""

    def _keeps_first(self) -> bool:
        """Whether `_combine` uses the gradient at θ; otherwise its memory is given back before the second pass."""
        return True

    def _needs_first(self) -> bool:
        """Whether the step depends on the gradient at θ, and not only on the loss and the buffers there."""
        return True

    def _gradients(self, closure: Closure, scale: float | None) -> Any:
        buffers = list(self.model.buffers())
        inside = set(self._parameters())
        others = [p for p in self.model.parameters() if p.requires_grad and p not in inside]
        alone = self.parallel is not None and not self._needs_first() and not others
        with cast(DistributedDataParallel, self.parallel).no_sync() if alone else nullcontext():
            loss = closure()
        parameters = [p for p in self._parameters() if p.grad is not None]
        first = {p: p.grad for p in parameters}
        if scale is not None:
            if self._needs_first() and not _finite(first.values()):
                return loss  # the scaler finds it too, skips the step and lowers the scale; on every device alike
            _multiply(first.values(), 1 / scale)
        theirs = [p.grad for p in others]
        if self.parallel is not None and self.parallel.gradient_as_bucket_view:  # the next pass writes where g lies
            first = {p: g.clone() for p, g in first.items() if g is not None}
            theirs = [None if g is None else g.clone() for g in theirs]
        after_first = clones(buffers)
        for parameter in (*parameters, *others):
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
        for parameter, gradient in zip(others, theirs, strict=True):
            parameter.grad = gradient
        copy_into(buffers, after_first)
        return loss


Ascent = tuple[dict[str, Any], list[Tensor], list[Tensor]]
"""A parameter group, parameters of it, and for each the direction that its radius belongs to."""


def ascend_(groups: Sequence[Ascent], normalize: bool, sign: float = 1.0) -> None:
    """θ ← θ ± ρ u, or θ ± ρ u/‖u‖₂ with the norm over all groups together; each group has its own ρ.

    Half-precision weights are moved by what float32 computes; otherwise nothing is copied.
    """
    if not groups:
        return
    norm = norm_of([u for _, _, directions in groups for u in directions]) if normalize else None
    for group, parameters, directions in groups:
        if norm is None:
            torch._foreach_add_(parameters, directions, alpha=sign * group["rho"])
        else:
            step = sign * group["rho"] / (norm + TINY)
            wide = [widened(u) for u in directions]
            pairs = [(p, u) for p, u in zip(parameters, wide, strict=True) if not u.is_sparse]
            if pairs:
                factors = [step.to(u.dtype) for _, u in pairs]
                torch._foreach_addcmul_([p for p, _ in pairs], [u for _, u in pairs], factors)
            for p, u in zip(parameters, wide, strict=True):
                if u.is_sparse:
                    p.add_(u * step)


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


def _returning(closure: Closure, parameters: Sequence[Tensor]) -> Closure:
    """Return the closure, which now refuses to return nothing, and to add to gradients that `parameters` had before."""

    def checked() -> Any:
        with _cleared(parameters):
            loss = closure()
        if loss is None:
            raise TypeError("the closure must return the loss, and it returned None")
        return loss

    return checked


@contextmanager
def _cleared(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Raise after the block where it added to a gradient that was there before, and was not zero.

    The smallest gradient is watched. Clearing it makes another tensor or, in place, writes to it twice before backward
    is done with it: its version tells, and nothing waits for the device unless it tells the worst.
    """
    watched = min((p for p in parameters if p.grad is not None and p.requires_grad), key=Tensor.numel, default=None)
    if watched is None:
        yield
        return
    before = cast(Tensor, watched.grad)
    version, filled = before._version, before.any() if not before.is_sparse else None
    added: list[bool] = []

    def look(parameter: Tensor) -> None:
        if not added:
            added.append(parameter.grad is before and before._version == version + 1)

    hook = watched.register_post_accumulate_grad_hook(look)
    try:
        yield
    finally:
        hook.remove()
    if added and added[0] and filled is not None and bool(filled):
        raise RuntimeError(
            "the closure adds to gradients of before the step: every evaluation has to clear them first; accumulate"
            " micro-batches inside the closure (Lightning: accumulate_grad_batches=1)"
        )


def _refuse_accelerate() -> None:
    """Refuse to be called by Accelerate while it accumulates: of n batches it gives the step the last."""
    if (state := sys.modules.get("accelerate.state")) is None:
        return
    frame = inspect.currentframe()
    while frame is not None and _root(frame) in ("torch", "cram_bench"):
        frame = frame.f_back
    if frame is not None and _root(frame) == "accelerate":
        steps = state.GradientState().num_steps
        if steps > 1:
            raise RuntimeError(
                f"gradient_accumulation_steps is {steps}, and Accelerate gives a closure the last of {steps} batches"
                " only: leave it at 1 and accumulate inside the closure"
            )


def _root(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _momentum(state: dict[str, Any]) -> Tensor | None:
    velocity = state.get("momentum_buffer")
    return velocity if velocity is not None else state.get("exp_avg")


def norm_of(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors together, as a tensor: nothing waits for it. Of half precision in float32."""
    halves = [tensor for tensor in tensors if tensor.dtype in HALF]
    others = [tensor for tensor in tensors if tensor.dtype not in HALF]
    norms = list(torch._foreach_norm(others)) if others else []
    if halves:  # a square of float16 overflows above 256, and TINY is zero in it
        norms += torch._foreach_norm(halves, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def widened(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, and any other as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


def _multiply(gradients: Iterable[Tensor | None], factor: float) -> None:
    if present := [gradient for gradient in gradients if gradient is not None]:
        torch._foreach_mul_(present, factor)


def _finite(gradients: Iterable[Tensor | None]) -> bool:
    present = [gradient for gradient in gradients if gradient is not None]
    return all(bool((g.coalesce().values() if g.is_sparse else g).isfinite().all()) for g in present)
