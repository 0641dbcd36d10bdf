"""Prune little by little while training goes on: masks that only shrink, over any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from cram_bench.callbacks import Callback
from cram_bench.checks import instance, number
from cram_bench.compress import Compressor, Masks, check_leaves, prunable
from cram_bench.data import Batches, Dataset
from cram_bench.optim.base import mask_gradients
from cram_bench.optim.held import Pruning
from cram_bench.prune import Specification, is_name, parse
from cram_bench.settings import Count, Fraction, Text

if TYPE_CHECKING:
    from cram_bench.train import Fit

BLIND = ("global", "uniform")
"""Who ranks by magnitude and looks at nothing."""


class GradualMasks:
    """Masks that only shrink, held over any optimizer by its hooks, so that a pruned weight stays an exact zero.

    At every step g ← M ⊙ g for every gradient that the optimizer takes, those of SAM and CrAM before and after their
    ascent too, which so goes along weights that are left; and θ ← M ⊙ θ after the step, so that neither weight decay
    nor a momentum gathered before revives a weight. What is pruned loses its momentum. The optimizer stays what it is,
    and its loop as well: it works with a closure and without.

    Args:
        model: the model being trained, or what wraps it.
        optimizer: any torch optimizer over its parameters, one of this package or plain.
        exclude: shell patterns over parameter names that stay dense.

    Attributes:
        weights: name → parameter, those that may be pruned.
        masks: which of them are left; all at first.

    Raises:
        ValueError: nothing is prunable.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> gradual = GradualMasks(model, optimizer)
    >>> gradual.prune_("global", 0.5).zeros, gradual.prune_("global", 0.75).zeros
    (2, 3)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, exclude: Iterable[str] = ()) -> None:
        instance("model", model, nn.Module, "a torch model")
        instance("optimizer", optimizer, Optimizer, "a torch optimizer")
        self.model, self.optimizer, self.exclude = model, optimizer, exclude
        self.weights = prunable(model, exclude)
        full = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.masks = Masks(full, self.weights.dense)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def prune_(self, pruner: str, sparsity: float, batches: Batches | None = None, seed: int = 0) -> Masks:
        """Prune to a sparsity: what went before goes first. Return the masks, which are held from now on.

        Args:
            pruner: who chooses, without a sparsity: ``global``, ``uniform``, or a pruner of `cram_bench.prune`, which
                may correct what stays.
            sparsity: fraction of zeros among the prunable weights, in [0, 1): exactly ``round(sparsity · n)`` of n.
            batches: training data that a pruner looks at.
            seed: of the examples that it looks at.

        Raises:
            ValueError: fewer weights would be zero than are already, or as `cram_bench.prune.Pruner.fit`.
        """
        spec = _parsed(pruner, sparsity)
        check_leaves(spec)
        if isinstance(spec, Compressor):
            return self.shrink_(spec.masks(self._ranked()))
        if batches is None:
            raise ValueError(f"{spec} looks at examples: give batches=, training data such as a Dataset")
        gone = {name: ~mask for name, mask in self.masks.items()}
        fitted = replace(spec.pruner, seed=seed).fit(self.model, batches, self.exclude, gone=gone)
        masks = self._nested(fitted.masks(spec.sparsity))
        fitted.at(spec.sparsity).apply_(self.weights, masks)  # corrects what stays
        return self.shrink_(masks)

    @torch.no_grad()
    def shrink_(self, masks: Mapping[str, Tensor]) -> Masks:
        """Hold `masks` from now on: zero what they drop, its momentum too.

        Raises:
            ValueError: they keep a weight that is pruned already; nothing is changed then.
        """
        self.masks = self._nested(Masks(masks))
        self.masks.zero_(self.weights)
        for name, weight in self.weights.items():
            for value in self.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(~self.masks[name], 0.0)
        return self.masks

    def release(self) -> None:
        """Hold nothing any more; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def _nested(self, masks: Mapping[str, Tensor]) -> Masks:
        found = {name: masks[name].to(self.masks[name].device) for name in self.weights}
        revived = sum(int((mask & ~self.masks[name]).sum()) for name, mask in found.items())
        if revived:
            raise ValueError(f"masks only shrink: {revived:,} of these weights are pruned already")
        return Masks(found, self.masks.dense)

    @torch.no_grad()
    def _ranked(self) -> dict[str, Tensor]:
        """Return the weights such that pruned ones go first: one that is left, and by chance zero, is a little more."""
        return {
            name: torch.where(self.masks[name] & (weight == 0), torch.finfo(weight.dtype).tiny, weight)
            for name, weight in self.weights.items()
        }

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            mask_gradients(self.weights, self.masks)
            return None

        def masked() -> Any:
            loss = closure()
            mask_gradients(self.weights, self.masks)
            return loss

        return args[:1], {**kwargs, "closure": masked}

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.masks.zero_(self.weights)


def cubic(progress: float, initial: float, final: float) -> float:
    """Return s_f + (s_i − s_f)(1 − x)³, x being the share of the schedule that is done, cut to [0, 1].

    Zhu & Gupta (arXiv 1710.01878, equation 1).

    >>> [round(cubic(x, 0.5, 0.9), 4) for x in (0, 0.5, 1)]
    [0.5, 0.85, 0.9]
    """
    return final + (initial - final) * (1 - min(1.0, max(0.0, progress))) ** 3


@dataclass(frozen=True)
class Gradual(Pruning):
    """Prune in many steps of a training, from its first large step on a cubic schedule: `GradualMasks`, `cubic`.

    Before step t, at `times` steps from t₀ = `begin` to t₁ = `end`, to s_t = s_f + (s_i − s_f)(1 − (t − t₀)/(t₁ − t₀))³
    (GMP*, arXiv 2210.06384; oBERT, arXiv 2203.07259). What a pruner looks at does not count in the cost of a training.

    Raises:
        ValueError: it ends after the training or before it begins, the final sparsity is below the initial one, or the
            pruner is none.
    """

    kind: ClassVar[str] = "gradual"

    pruner: Text = "global"
    """Who chooses what goes, without a sparsity: global, uniform, or a pruner that looks, such as ``obert``."""
    initial: Fraction = 0.5
    """s_i, sparsity of the first step, in [0, 1)."""
    final: Fraction = 0.9
    """s_f, sparsity in the end, in [0, 1)."""
    begin: Annotated[float, Field(ge=0, le=1, description="a share of the training, from 0 to 1")] = 0.1
    """After which share of the training the first step comes."""
    end: Annotated[float, Field(ge=0, le=1, description="a share of the training, from 0 to 1")] = 0.7
    """After which share of the training the last one comes."""
    times: Count = 50
    """In how many steps it prunes, equally far apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _parsed(self.pruner, self.final)
        if self.end < self.begin:
            raise ValueError(f"end must be at least begin, {self.begin:g}, and is {self.end:g}")
        if self.final < self.initial:
            raise ValueError(f"final must be at least initial, {self.initial:g}, and is {self.final:g}")

    @property
    def sparsity(self) -> float:
        return self.final

    def levels(self, steps: int) -> dict[int, float]:
        """Return step → sparsity, before the step of this number; `steps` is how many the training has.

        Where several would come before one step, the last one does.

        >>> {step: round(level, 3) for step, level in Gradual(begin=0.2, end=0.8, times=3).levels(10).items()}
        {2: 0.5, 5: 0.85, 8: 0.9}
        """
        first, last = round(self.begin * steps), round(self.end * steps)
        length = last - first
        places = [first + round(length * place / max(1, self.times - 1)) for place in range(self.times - 1)]
        return {
            step: cubic((step - first) / length if length else 1.0, self.initial, self.final)
            for step in [*places, last]
        }

    def callbacks(self, train: Dataset) -> list[Callback]:
        return [Shrink(self, train)]


class Shrink(Callback):
    """Prune on the schedule of a `Gradual`, and hold the masks."""

    def __init__(self, gradual: Gradual, train: Dataset) -> None:
        self.gradual, self.train = gradual, train
        self.saved: Mapping[str, Tensor] = {}
        self.held: GradualMasks | None = None

    def on_start(self, fit: Fit) -> None:
        """Prune before the first step, where it is time, or go on with the masks of a checkpoint."""
        self.levels = self.gradual.levels(fit.epochs * fit.steps_per_epoch)
        self.held = GradualMasks(fit.model, fit.optimizer)
        if self.saved:
            self.held.shrink_(self.saved)
        elif fit.epoch == 0:
            self._prune(0)

    def on_step(self, fit: Fit, step: int, loss: Tensor, correct: Tensor, seen: int) -> None:
        """Prune before the next step, where it is time; what comes after the last of an epoch is in its checkpoint."""
        self._prune(fit.epoch * fit.steps_per_epoch + step + 1)

    def on_end(self, fit: Fit) -> None:
        """Let go of the optimizer."""
        if self.held is not None:
            self.held.release()

    def _prune(self, step: int) -> None:
        if self.held is not None and step in self.levels:
            self.held.prune_(self.gradual.pruner, self.levels[step], self.train, seed=step)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks that are held."""
        return {} if self.held is None else {"masks": dict(self.held.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; `on_start` puts it to use."""
        self.saved = state["masks"]


def _parsed(pruner: str, sparsity: float) -> Compressor | Specification:
    """Return who prunes, at a sparsity; refuse what prunes in steps of its own or decides its sparsity itself."""
    instance("pruner", pruner, str, "a text such as 'global' or 'obert'")
    spec = parse(f"{pruner}@{number('sparsity', sparsity, 0, 1)!r}") if pruner in BLIND or is_name(pruner) else None
    if spec is None or (isinstance(spec, Specification) and spec.steps > 1):
        raise ValueError(f"pruner must be global, uniform or a pruner without a sparsity or steps, not {pruner!r}")
    return spec
