"""The learning rate over a training, as a part of an experiment. A new schedule is a class here, and in `SCHEDULES`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from cram_bench.settings import NotNegative, Part


@dataclass(frozen=True)
class Schedule(Part):
    """A factor on the base optimizer's learning rate."""

    role: ClassVar[str] = "schedule"

    def factor(self, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
        """Return step → factor, over a whole training."""
        raise NotImplementedError

    def stretched(self, epochs: int, before: int) -> dict[str, Any]:
        """Return the settings that change, by flat name, where so many `epochs` take the place of those `before`."""
        return {}


@dataclass(frozen=True)
class Cosine(Schedule):
    """A linear warm-up, then half a cosine to 0: `cosine`."""

    kind: ClassVar[str] = "cosine"

    warmup_epochs: NotNegative = 0.0
    """Epochs of linear warm-up before the cosine."""

    def stretched(self, epochs: int, before: int) -> dict[str, Any]:
        return {"warmup_epochs": self.warmup_epochs * epochs / before}

    def factor(self, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
        return cosine(epochs * steps_per_epoch, round(self.warmup_epochs * steps_per_epoch))


def cosine(total: int, warmup: int = 0) -> Callable[[int], float]:
    """Build the factor on the learning rate at a step: linear from 1/warmup to 1, then a half cosine to 0.

    (1 + cos(π (t − w)/(T − w)))/2 after w warm-up steps of T (Loshchilov and Hutter, arXiv 1608.03983, without
    restarts).

    >>> [round(cosine(4)(step), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    >>> [round(cosine(6, warmup=2)(step), 3) for step in range(3)]
    [0.5, 1.0, 1.0]
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2

    return factor


SCHEDULES: dict[str, type[Schedule]] = {part.kind: part for part in (Cosine,)}
"""Schedules by the name that settings use."""
