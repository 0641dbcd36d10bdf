"""The optimizers that a step is taken with, as parts. A new one is a file beside this one, or a class here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from cram_bench.settings import Fraction, NotNegative, Part, Positive


@dataclass(frozen=True)
class Base(Part):
    """A plain torch optimizer over all parameters of a model."""

    role: ClassVar[str] = "optimizer"

    lr: Positive = 0.1
    """Peak learning rate, positive."""
    weight_decay: NotNegative = 5e-4
    """On every parameter, coupled for SGD and decoupled for AdamW; not negative."""

    def build(self, model: nn.Module) -> Optimizer:
        """Build it over the parameters of `model`."""
        raise NotImplementedError


@dataclass(frozen=True)
class SGD(Base):
    """Stochastic gradient descent with momentum: v ← μv + g + λθ, θ ← θ − ηv."""

    kind: ClassVar[str] = "sgd"

    momentum: Fraction = 0.9
    """Of SGD, in [0, 1)."""

    def build(self, model: nn.Module) -> Optimizer:
        return torch.optim.SGD(model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)


@dataclass(frozen=True)
class AdamW(Base):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), with torch's β = (0.9, 0.999)."""

    kind: ClassVar[str] = "adamw"

    lr: Positive = 1e-3
    """Peak learning rate, positive."""
    weight_decay: NotNegative = 0.01
    """On every parameter, coupled for SGD and decoupled for AdamW; not negative."""

    def build(self, model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay, fused=True)
