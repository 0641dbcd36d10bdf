"""A wrapper around any torch optimizer that evaluates the gradient at a second point before it steps."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cram_bench._preserve import clones, copy_into

Closure = Callable[[], Any]


class TwoPass(Optimizer, abc.ABC):
    """One training step from two gradients: at the true weights, then at weights moved by a subclass.

    ``step(closure)`` follows torch's convention for optimizers that evaluate the loss more than once, as `LBFGS`
    does: the closure clears the gradients, computes the loss, calls ``backward`` and returns the loss. The wrapper

    1. calls the closure at the weights θ: gradient g;
    2. moves the weights (`_move`), calls it again: gradient g̃, and puts θ back bit for bit;
    3. combines g and g̃ (`_combine`) and lets the base optimizer step at θ.

    Buffers, such as BatchNorm's running statistics, come from the first call alone; the user has nothing to
    freeze. Parameter groups, state and defaults are those of the base optimizer, so learning-rate schedulers
    work on either. Gradient accumulation is a loop over micro-batches inside the closure. Whatever the closure
    raises, weights and buffers are as before the step.

    Args:
        model: the model whose parameters `base` updates. Its buffers are looked after, and it says what is prunable.
        base: any optimizer over parameters of `model`.
        settings: defaults added to every parameter group that does not set them itself.

    Raises:
        ValueError: `base` holds a parameter that is not one of `model`.
    """

    base: Optimizer
    model: nn.Module
    settings: dict[str, float | bool]

    def __init__(self, model: nn.Module, base: Optimizer, **settings: float | bool) -> None:
        # Not Optimizer.__init__, which would build groups and state anew; __setstate__ only prepares the hooks.
        super().__setstate__({"base": base, "model": model, "settings": settings})
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

    def _moved(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return what `_move` may change, given the parameters that have gradients; it is put back after the step."""
        return parameters

    @abc.abstractmethod
    def _move(self, groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        """Move the weights in place, given (group, parameters, gradients at θ) for every group with gradients."""

    @abc.abstractmethod
    def _combine(self, first: dict[Tensor, Tensor | None]) -> None:
        """Turn the gradients g̃ in ``.grad`` into those that the base optimizer uses; `first` holds g."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step; return what the closure returned at the true weights.

        Raises:
            TypeError: no closure is given.
        """
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that clears gradients, runs backward and returns the loss"
            )
        buffers = list(self.model.buffers())
        with self._restored(buffers):
            closure_with_grad = torch.enable_grad()(closure)
            loss = closure_with_grad()
            after_first = clones(buffers)
            parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            first = {p: p.grad for p in parameters}
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
                closure_with_grad()
            self._combine(first)
            copy_into(buffers, after_first)
        self.base.step()
        return loss

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
            raise ValueError("the base optimizer holds a parameter that is not in the model")
        for name, value in self.settings.items():
            group.setdefault(name, value)
        check_rho(group["rho"])

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base optimizer's state; subclasses add what they need to resume."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned."""
        self.base.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


def check_rho(rho: float) -> None:
    """Refuse a radius that is negative or not finite."""
    if not (isinstance(rho, (int, float)) and math.isfinite(rho) and rho >= 0):
        raise ValueError(f"rho, the ascent radius, must be a finite number >= 0, not {rho!r}")
