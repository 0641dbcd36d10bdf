"""Which option every layer gets under a budget of time: an exact dynamic programme, and a search around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Choice = tuple[int, ...]
"""An option for every layer, by its place."""


class OverBudget(ValueError):
    """No options are fast enough together."""


def programme(costs: Sequence[ArrayLike], times: Sequence[ArrayLike], budget: float, buckets: int = 10_000) -> Choice:
    """Return the options of least total cost whose times together do not exceed a budget.

    Exact for times rounded **up** to buckets of ``budget / buckets`` (arXiv 2302.04089, section 3.2; the knapsack of
    SPDY, arXiv 2201.13096), so that what is chosen is never over the budget. An option that takes no time, such as a
    module that is dropped, takes none here either. Among equals the first of a layer's options is chosen.

    Args:
        costs: of every layer, those of its options.
        times: likewise, none negative; in the unit of the budget.
        budget: of all layers together.
        buckets: how fine time is.

    Raises:
        OverBudget: no options are fast enough together.

    >>> programme([[0.0, 3.0], [0.0, 1.0]], [[2.0, 0.0], [2.0, 0.0]], budget=2.0)
    (0, 1)
    """
    ticks = [_ticks(np.asarray(time, dtype=float), budget, buckets) for time in times]
    best: NDArray[np.float64] = np.zeros(buckets + 1)  # least cost of the layers so far, within so many buckets
    chosen = []
    for cost, need in zip(costs, ticks, strict=True):
        table = np.full((len(need), buckets + 1), np.inf)
        for option, (price, ahead) in enumerate(zip(np.asarray(cost, dtype=float), need, strict=True)):
            if ahead <= buckets:
                table[option, ahead:] = best[: buckets + 1 - ahead] + price
        chosen.append(table.argmin(0))
        best = table.min(0)
    if not np.isfinite(best[buckets]):
        raise OverBudget("no options of these layers are fast enough together")
    at, found = buckets, []
    for options, need in zip(reversed(chosen), reversed(ticks), strict=True):
        option = int(options[at])
        found.append(option)
        at -= int(need[option])
    return tuple(reversed(found))


def _ticks(times: NDArray[np.float64], budget: float, buckets: int) -> NDArray[np.int64]:
    """Return times in buckets, rounded up; what exceeds the budget by no more than rounding of floats is within it."""
    shares = np.divide(times, budget, out=np.full(times.shape, np.inf), where=(times > 0) & (budget > 0))
    shares[times <= 0] = 0.0
    return np.minimum(np.ceil(shares * buckets * (1 - 1e-12)), buckets + 1).astype(np.int64)


def uniform(fractions: Sequence[ArrayLike], times: Sequence[ArrayLike], budget: float) -> Choice:
    """Return the options of layers that keep about one fraction of their units, the largest within the budget.

    Args:
        fractions: of every layer, those that its options keep of it, from 1 to 0.
        times: likewise, their times.
        budget: of all layers together.

    Raises:
        OverBudget: not even nothing is fast enough.

    >>> uniform([[1.0, 0.5, 0.0], [1.0, 0.0]], [[2.0, 1.0, 0.0], [2.0, 0.0]], budget=3.0)
    (1, 0)
    """
    kept = [np.asarray(fraction, dtype=float) for fraction in fractions]
    for level in np.linspace(1.0, 0.0, 1001):
        # to the nearest; of two as near, the one that keeps more, which stands first
        choice = tuple(int(np.abs(fraction - level).argmin()) for fraction in kept)
        if total(times, choice) <= budget * (1 + 1e-12):
            return choice
    raise OverBudget("no options of these layers are fast enough together")


def total(values: Sequence[ArrayLike], choice: Choice) -> float:
    """Return the sum of the chosen options' values."""
    return float(sum(np.asarray(value, dtype=float)[option] for value, option in zip(values, choice, strict=True)))


def sensitivities(costs: Sequence[ArrayLike], times: Sequence[ArrayLike], choice: Choice) -> NDArray[np.float64]:
    """Return factors of the layers' costs for which a choice is about where the programme ends.

    The programme trades time between layers until a second buys the same everywhere, so a layer's factor is one over
    what a second buys there: the slope of its cost over the options next to the chosen one.
    """
    factors = []
    for cost, time, option in zip(costs, times, choice, strict=True):
        cost, time = np.asarray(cost, dtype=float), np.asarray(time, dtype=float)
        near = slice(max(0, option - 1), option + 2)
        gain, spent = float(np.ptp(cost[near])), float(np.ptp(time[near]))
        factors.append(spent / gain if gain > 0 and spent > 0 else np.nan)
    found = np.asarray(factors)
    usual = np.exp(np.nanmean(np.log(found))) if np.isfinite(found).any() else 1.0
    return np.where(np.isfinite(found), found, usual) / usual


def search(
    costs: Sequence[ArrayLike],
    times: Sequence[ArrayLike],
    budget: float,
    start: Choice,
    score: Callable[[Choice], float],
    trials: int = 100,
    seed: int = 0,
) -> tuple[Choice, float]:
    """Look for the choice of least score near one that is given: what the layers' costs are multiplied by is varied.

    Costs of layers of different kinds do not compare, so each gets a factor, its sensitivity (as in SPDY, arXiv
    2201.13096). The factors begin where the programme ends near `start` (`sensitivities`); in every trial those of
    a few layers are changed by factors e^(σz), z normal and σ falling from 1 to ¼, and kept where the programme's
    choice scores no worse than before. `start` itself is scored too, so what is returned is never worse.

    Args:
        costs, times, budget: as `programme` takes them.
        start: a choice within the budget, such as `uniform`'s.
        score: of a choice, such as the loss on calibration data of the network it makes; asked once for each.
        trials: how many programmes are solved.
        seed: of the variations.

    Returns:
        The choice and its score.
    """
    generator = np.random.default_rng(seed)
    known: dict[Choice, float] = {}

    def scored(choice: Choice) -> float:
        if choice not in known:
            value = float(score(choice))
            known[choice] = value if np.isfinite(value) else np.inf
        return known[choice]

    def solved(factors: NDArray[np.float64]) -> Choice:
        return programme(
            [f * np.asarray(cost, dtype=float) for f, cost in zip(factors, costs, strict=True)], times, budget
        )

    best, least = start, scored(start)
    factors, count, here = sensitivities(costs, times, start), len(costs), np.inf
    for trial in range(trials):
        width = 1.0 - 0.75 * trial / trials
        varied = factors.copy()
        if trial:
            some = generator.choice(count, size=max(1, count // 6), replace=False)
            varied[some] *= np.exp(width * generator.standard_normal(len(some)))
        value = scored(choice := solved(varied))
        if value < least:
            best, least = choice, value
        if value <= here:
            factors, here = varied, value
    return best, least
