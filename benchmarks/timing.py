"""Time two sides in turns, so that whatever else the machine does meets both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

REPEATS = 7


@dataclass(frozen=True)
class Ratio:
    """One line of the table: ours and the peer's median, and the ratios of the turns."""

    name: str
    ratio: float
    """Median over the turns of peer/ours for a ``speed``, of ours/peer for a ``cost``."""
    low: float
    """Least of the turns."""
    high: float
    """Greatest of the turns."""
    ours: float
    peer: float
    unit: str


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how long one call takes, in seconds."""
    start = clock()
    work()
    return clock() - start


def in_turns(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    kind: str,
    scale: float = 1.0,
    unit: str = "s",
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time `ours` and `peer` alternately, `repeats` times each, after one call of each that is not counted.

    Args:
        name: of the line.
        ours: our side.
        peer: the other side.
        kind: ``speed``, how many times faster ours is; or ``cost``, how many times longer it takes.
        scale: units of work in a call, so that `unit` can be a rate: with ``images/s`` the table shows scale/seconds.
        unit: of the columns ours and peer; ``s`` and ``ms`` are times, all else is a rate.
        repeats: turns, at least three.
        clock: for work on one thread, `time.thread_time` leaves out what other processes take.

    >>> in_turns("sleep", lambda: time.sleep(0.001), lambda: time.sleep(0.002), kind="speed", repeats=3).ratio > 1
    True
    """
    if kind not in ("speed", "cost"):
        raise ValueError(f"kind must be speed or cost, not {kind!r}")
    ours(), peer()
    turns = [(seconds(ours, clock), seconds(peer, clock)) for _ in range(repeats)]
    ratios = [theirs / own if kind == "speed" else own / theirs for own, theirs in turns]
    sides = [statistics.median(side) for side in zip(*turns, strict=True)]
    shown = [{"s": 1.0, "ms": 1000.0}[unit] * side if unit in ("s", "ms") else scale / side for side in sides]
    return Ratio(name, statistics.median(ratios), min(ratios), max(ratios), *shown, unit)
