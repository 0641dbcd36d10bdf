"""What a pruner is: it looks at gradients or inputs once, and then serves every sparsity."""

from __future__ import annotations

import abc
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from cram_bench.compress import Compressor, Masks, Weights, dense_of, prunable, zeros_for
from cram_bench.compress.rank import keep_largest_across
from cram_bench.curvature.samples import Forward, Loss
from cram_bench.data import Batches
from cram_bench.preserve import preserved
from cram_bench.settings import Part


@dataclass(frozen=True)
class Pruner(Part):
    """Chooses which weights stay by looking at gradients or inputs of examples, and may correct those that stay.

    A subclass is a frozen dataclass with its settings as fields, a `kind` by which specifications call it, and `look`.
    """

    role: ClassVar[str] = "pruner"

    seed: Annotated[int, Field(ge=0, lt=2**31, description="from 0 to 2**31 - 1")] = 0
    """Of the draw of examples."""

    @property
    @abc.abstractmethod
    def seen(self) -> int:
        """How many examples it looks at."""

    @abc.abstractmethod
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
        """Look at a model that is in eval mode and will be put back as it was.

        `gone` are weights pruned before; they are zero, and go first whatever their keys.
        """

    def fit(
        self,
        model: nn.Module,
        batches: Batches,
        exclude: Iterable[str] = (),
        *,
        gone: Mapping[str, Tensor] | None = None,
        forward: Forward | None = None,
        loss: Loss | None = None,
    ) -> Fitted:
        """Look at the examples once; what is returned prunes to every sparsity. The model is left as it was found.

        Args:
            model: any torch model.
            batches: a `Dataset`, of which as many examples are drawn as the pruner's settings say, or anything that
                yields (inputs, labels).
            exclude: shell patterns over parameter names that stay dense.
            gone: name → boolean, weights that were pruned before; they go first.
            forward, loss: as the probes take them.

        Raises:
            ValueError: there are fewer examples than the settings ask for, a gradient is not finite, all are zero, or a
                matrix cannot be factored.
        """
        start = time.perf_counter()
        # What ranks and solves keeps no graph; gradients are enabled where they are taken.
        with torch.inference_mode(False), torch.no_grad(), preserved(model):
            weights = prunable(model, exclude)
            fitted = self.look(model.eval(), weights, batches, gone=gone or {}, forward=forward, loss=loss)
            for name, mask in (gone or {}).items():
                fitted.keys[name] = fitted.keys[name].masked_fill(mask, -torch.inf)
        fitted.gradients = fitted.gradients or self.seen
        fitted.seconds += time.perf_counter() - start
        return fitted

    def __str__(self) -> str:
        """The specification, with the settings that differ from the defaults."""
        own = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        settings = ",".join(
            f"{name}={value!r}".removesuffix(".0") if isinstance(value, float) else f"{name}={value}"
            for name, value in own
        )
        return f"{self.kind}({settings})" if settings else self.kind


class Fitted(abc.ABC):
    """A pruner that has looked at a model: the order in which its weights go, and what becomes of those that stay.

    Attributes:
        keys: name → tensor of the weight's shape, float64: what has the smaller key goes first.
        weights: name → the weights that it looked at, copies.
        dense: what is not prunable, or left out by the pruner.
        seconds: spent looking.
        gradients: examples whose gradient, or whose forward pass for layer inputs, was computed so far.
    """

    def __init__(self, pruner: Pruner, weights: Mapping[str, Tensor], keys: Mapping[str, Tensor]) -> None:
        self.pruner, self.keys = pruner, dict(keys)
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}
        self.dense = dense_of(weights)
        self.seconds, self.gradients = 0.0, 0

    @torch.no_grad()
    def masks(self, sparsity: float, names: Iterable[str] | None = None) -> Masks:
        """Return which weights stay at a sparsity: exactly ``round(sparsity · n)`` of n go.

        Args:
            sparsity: fraction of zeros among the weights, in [0, 1].
            names: of these tensors alone; all of them if not given.
        """
        chosen = list(self.keys if names is None else names)
        keys = [self.keys[name] for name in chosen]
        zeros = zeros_for(sparsity, sum(key.numel() for key in keys))
        kept = keep_largest_across(keys, zeros, magnitudes=False)
        return Masks(dict(zip(chosen, kept, strict=True)), self.dense)

    @property
    def collects(self) -> bool:
        """Whether `solve` looks at examples anew; then `prepare` saves passes."""
        return False

    def prepare(self, masks: Sequence[Mapping[str, Tensor]]) -> None:  # noqa: B027 — most have nothing to prepare
        """Look once for all masks that `solve` will be asked for."""

    @abc.abstractmethod
    def solve(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with `masks`, corrected; of tensors that have no mask, nothing."""

    def values(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `solve`'s weights in the type of the model's."""
        with torch.no_grad(), torch.inference_mode(False):
            return {name: value.to(self.weights[name].dtype) for name, value in self.solve(masks).items()}

    def at(self, sparsity: float) -> Fixed:
        """Return the compressor of this pruner at a sparsity, for the model that it looked at."""
        return Fixed(self, float(sparsity))

    def apply_(self, model: nn.Module, sparsity: float) -> Masks:
        """Prune the model that was looked at, in place; return the masks.

        Raises:
            ValueError: its weights are not those that were looked at, or no longer, or a matrix cannot be factored;
                nothing is changed then.
        """
        known = prunable(model)
        if missing := [name for name in self.weights if name not in known]:
            raise ValueError(f"{self.pruner} looked at {missing[0]}, which this model has not: fit it to this model")
        return self.at(sparsity).apply_(Weights({name: known[name] for name in self.weights}, self.dense, known.stored))


@dataclass(frozen=True)
class Fixed(Compressor):
    """A fitted pruner at one sparsity, as a compressor of the very model that it looked at.

    Raises:
        ValueError: it is given weights that are not those that were looked at.
    """

    fitted: Fitted
    sparsity: float
    chooser: Compressor | None = None
    """Who chooses the masks, where the pruner only corrects the values."""
    name: str = ""
    """How tables call it, where not after the pruner."""

    @property
    def pattern(self) -> str:
        return self.name or str(self.fitted.pruner)

    def __str__(self) -> str:
        if self.chooser is not None:
            return f"{self.chooser}+{self.fitted.pruner}"
        return f"{self.pattern}@{self.sparsity!r}".removesuffix(".0")

    @property
    def seconds(self) -> float:
        """What looking took; all sparsities share it."""
        return self.fitted.seconds

    @property
    def gradients(self) -> int:
        """Examples that were looked at so far."""
        return self.fitted.gradients

    def masks(self, weights: Mapping[str, Tensor]) -> Masks:
        for name, weight in weights.items():
            if name not in self.fitted.weights:
                raise ValueError(f"{self} has not looked at {name}: fit it to this model, with the same exclude")
            if not torch.equal(weight.detach(), self.fitted.weights[name]):
                raise ValueError(f"{name} has changed since {self} looked at the model: fit it again")
        if self.chooser is not None:
            return self.chooser.masks(weights)
        return self.fitted.masks(self.sparsity, weights)

    @torch.no_grad()
    def apply_(self, weights: Mapping[str, Tensor], masks: Masks | None = None) -> Masks:
        if masks is None:
            masks = self.masks(weights)
            masks.dense = dense_of(weights) | masks.dense
        values = self.fitted.values(
            {name: masks[name] for name in weights if name in masks}
        )  # may raise: before any change
        masks.zero_(weights)
        for name, value in values.items():
            weights[name].copy_(value)
        return masks
