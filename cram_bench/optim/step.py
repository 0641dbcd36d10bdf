"""How a training step takes its gradients, as a part of an experiment: plain, or one of the wrappers of this room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from cram_bench.callbacks import Callback
from cram_bench.data import Dataset
from cram_bench.settings import Part


@dataclass(frozen=True)
class Step(Part):
    """A rule of a step: it wraps the base optimizer, and knows what it costs."""

    role: ClassVar[str] = "step"
    passes: ClassVar[int] = 1
    """Gradients a step, at the whole batch or, with halves, at a half of it each."""
    compresses: ClassVar[bool] = False
    """Whether it draws from compressors."""

    def wrap(self, model: nn.Module, base: Optimizer, seed: int) -> Optimizer:
        """Return the optimizer that takes such steps; `seed` is of what it draws."""
        raise NotImplementedError

    @property
    def halved(self) -> bool:
        """Whether each of two gradients is taken at a half of the batch."""
        return False

    def cost(self) -> float:
        """Return how often a step evaluates the gradient at an image, on average over the training."""
        return 1.0 if self.halved else float(self.passes)

    def callbacks(self, train: Dataset) -> Sequence[Callback]:
        """Return what has to be called as training on these data goes."""
        return ()


@dataclass(frozen=True)
class Plain(Step):
    """The base optimizer's own step."""

    kind: ClassVar[str] = "plain"

    def wrap(self, model: nn.Module, base: Optimizer, seed: int) -> Optimizer:
        return base


@dataclass(frozen=True)
class TwoPassStep(Step):
    """A step of two gradients."""

    passes: ClassVar[int] = 2

    halves: bool = False
    """Give each of a method's two gradients a half of the batch, so that a step costs what a plain one does."""

    @property
    def halved(self) -> bool:
        return self.halves
