"""The learning rate over a training, as a part of an experiment. A new schedule is a class here, and in `SCHEDULES`."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cram_bench.settings import Count, Fraction, NotNegative, Part


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


@dataclass(frozen=True)
class Cycles(Schedule):
    """A linear warm-up, then straight lines from 1 down to `floor`, each of which begins with a rewind to 1: `cycles`.

    One line until `rewind`, where there is room for it, then `cycles` of one length until the end. A rewind where
    pruning ends leaves the rate high when what was pruned last has to be made up for (oBERT, arXiv 2203.07259; GMP*,
    arXiv 2210.06384).
    """

    kind: ClassVar[str] = "cycles"

    warmup_epochs: NotNegative = 0.0
    """Epochs of linear warm-up before the first line."""
    rewind: Fraction = 0.0
    """Of the training, in [0, 1): after which share of it the first cycle begins."""
    cycles: Count = 1
    """How many cycles there are from there to the end, at least 1."""
    floor: Fraction = 0.0
    """Factor on the learning rate at the end of a line, in [0, 1)."""

    def stretched(self, epochs: int, before: int) -> dict[str, Any]:
        return {"warmup_epochs": self.warmup_epochs * epochs / before}

    def factor(self, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
        total = epochs * steps_per_epoch
        first, warmup = round(self.rewind * total), round(self.warmup_epochs * steps_per_epoch)
        starts = [first + round(cycle * (total - first) / self.cycles) for cycle in range(self.cycles)]
        return cycles(total, starts, self.floor, warmup)


def cycles(total: int, starts: Sequence[int], floor: float = 0.0, warmup: int = 0) -> Callable[[int], float]:
    """Build the factor on the learning rate at a step: after the warm-up 1 − (1 − floor) (t − a)/(b − a).

    a is the start at or before step t, or the end of the warm-up; b the next start, or the end of the training.

    >>> [round(cycles(8, [4], floor=0.2)(step), 2) for step in range(9)]
    [1.0, 0.8, 0.6, 0.4, 1.0, 0.8, 0.6, 0.4, 0.2]
    >>> [round(cycles(6, [2, 4], warmup=2)(step), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.5, 1.0, 0.5]
    """
    bounds = sorted({warmup, *(start for start in starts if start > warmup), total})

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        place = min(bisect.bisect_right(bounds, step), len(bounds) - 1)
        start, end = bounds[max(0, place - 1)], bounds[place]
        return 1 - (1 - floor) * min(1.0, (step - start) / max(1, end - start))

    return factor


SCHEDULES: dict[str, type[Schedule]] = {part.kind: part for part in (Cosine, Cycles)}
"""Schedules by the name that settings use."""
