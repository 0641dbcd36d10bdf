"""The preconditioned optimizers as parts of an experiment: their settings, and SGD over `preconditioned` by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from cram_bench.optim.bases import Base
from cram_bench.optim.preconditioned import EFCP, GGT, MFAC
from cram_bench.optim.rings import LowRank, TopK
from cram_bench.optim.spectra import Divisor
from cram_bench.settings import Count, Fraction, NotNegative, Positive

Storage = Annotated[Literal["float32", "bfloat16"], Field(description="float32 or bfloat16")]
Dividing = Annotated[Divisor, Field(description="window or count")]
Density = Annotated[float, Field(gt=0, le=1, description="in (0, 1]")]
NotNegativeCount = Annotated[int, Field(ge=0, description="not negative")]


@dataclass(frozen=True)
class PreconditionedBase(Base):
    """SGD that steps with a preconditioned gradient."""

    lr: Positive = 1e-3
    """Peak learning rate, positive."""
    weight_decay: NotNegative = 1e-4
    """On every parameter: inside the ring, or decoupled; not negative."""
    momentum: Fraction = 0.0
    """Of SGD, in [0, 1)."""
    gradients: Count = 1024
    """Length m of the ring of gradients, at least 1."""
    damping: Positive = 1e-4
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""
    decoupled: bool = False
    """Shrink the weights by 1 − weight_decay a step, instead of adding weight_decay times them to the gradient."""
    storage: Storage = "float32"
    """Type of the numbers in the ring: ``float32`` or ``bfloat16``."""

    def _sgd(self, model: nn.Module, dampening: float = 0.0) -> Optimizer:
        return torch.optim.SGD(model.parameters(), self.lr, self.momentum, dampening, fused=True)

    def _common(self) -> dict[str, Any]:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.storage]
        return {
            "gradients": self.gradients,
            "damping": self.damping,
            "decay": self.weight_decay,
            "decoupled": self.decoupled,
            "dtype": dtype,
        }


@dataclass(frozen=True)
class MFACBase(PreconditionedBase):
    """SGD over `MFAC`."""

    kind: ClassVar[str] = "m-fac"

    damping: Positive = 1e-5
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""
    divisor: Dividing = "window"
    """Divide the sum of M-FAC by the length of the ring (``window``) or by the gradients there are (``count``)."""

    def build(self, model: nn.Module) -> Optimizer:
        return MFAC(model, self._sgd(model), divisor=self.divisor, **self._common())


@dataclass(frozen=True)
class SparseMFACBase(MFACBase):
    """SGD over `EFCP` with the largest entries, S-M-FAC."""

    kind: ClassVar[str] = "s-m-fac"

    damping: Positive = 1e-4
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""
    decoupled: bool = True
    """Shrink the weights by 1 − weight_decay a step, instead of adding weight_decay times them to the gradient."""
    density: Density = 0.01
    """Fraction of a gradient's entries that the ring keeps, in (0, 1]."""
    block: NotNegativeCount = 0
    """Weights among which the largest are chosen: 0 for all of them together."""
    feedback: bool = True
    """Whether what compression leaves over is added to the next gradient."""

    def build(self, model: nn.Module) -> Optimizer:
        ring = TopK(self.density, self.block, self.feedback)
        return EFCP(model, self._sgd(model), ring, divisor=self.divisor, **self._common())


@dataclass(frozen=True)
class LowRankMFACBase(MFACBase):
    """SGD over `EFCP` with factors of low rank; momentum is μv + (1 − μ)u, as the paper has it there."""

    kind: ClassVar[str] = "lowrank-m-fac"

    damping: Positive = 1e-4
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""
    decoupled: bool = True
    """Shrink the weights by 1 − weight_decay a step, instead of adding weight_decay times them to the gradient."""
    rank: Count = 4
    """Rank of a gradient's factors, at least 1."""
    feedback: bool = True
    """Whether what compression leaves over is added to the next gradient."""

    def build(self, model: nn.Module) -> Optimizer:
        ring = LowRank(self.rank, self.feedback)
        return EFCP(model, self._sgd(model, self.momentum), ring, divisor=self.divisor, **self._common())


@dataclass(frozen=True)
class GGTBase(PreconditionedBase):
    """SGD over `GGT`."""

    kind: ClassVar[str] = "ggt"

    gradients: Count = 100
    """Length m of the ring of gradients, at least 1."""
    damping: Positive = 1e-5
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""

    def build(self, model: nn.Module) -> Optimizer:
        return GGT(model, self._sgd(model), **self._common())


@dataclass(frozen=True)
class SparseGGTBase(GGTBase):
    """SGD over `EFCP` with the largest entries and GGT's root, S-GGT."""

    kind: ClassVar[str] = "s-ggt"

    decoupled: bool = True
    """Shrink the weights by 1 − weight_decay a step, instead of adding weight_decay times them to the gradient."""
    density: Density = 0.01
    """Fraction of a gradient's entries that the ring keeps, in (0, 1]."""
    block: NotNegativeCount = 0
    """Weights among which the largest are chosen: 0 for all of them together."""
    feedback: bool = True
    """Whether what compression leaves over is added to the next gradient."""

    def build(self, model: nn.Module) -> Optimizer:
        ring = TopK(self.density, self.block, self.feedback)
        return EFCP(model, self._sgd(model), ring, "ggt", **self._common())
