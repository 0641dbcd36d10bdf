"""CrAM's claim in numbers: how stable the loss is around dense and compressed weights, and whether methods differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from cram_bench.checks import columns, items, number, unknown
from cram_bench.compress import Compressor, applied
from cram_bench.data import Batches
from cram_bench.probes.common import Forward, Loss, Problem, looked, probing, tuning_data
from cram_bench.probes.hessian import curvature
from cram_bench.probes.sharpness import cram_gap, sam_sharpness
from cram_bench.prune import Specification, parse
from cram_bench.recipes import label

QUANTITIES = ("gap", "pruning_gap", "ascent_gap", "sharpness", "eigenvalue", "trace", "random_rise")
"""What is measured around weights; lower is more stable for each. The loss itself says how well a model fits."""
SIGNIFICANCE = 0.05
"""Probability, at most, of a verdict on a method where there is no difference at all."""
LOSS_FACTOR = 2.0
"""Mean losses that differ by more than this factor are not compared: `comparable` says why."""
LOSS_NATS = 0.25
"""Mean losses that differ by more nats than this are not compared: `comparable` says why."""


def comparable(loss: float, other: float) -> bool:
    """Say whether two models fit a sample so alike that the flatness of one says something about that of the other.

    The larger loss is at most `LOSS_FACTOR` times the smaller and at most `LOSS_NATS` above it. The factor is for small
    losses: near a good fit the curvature of the cross-entropy is proportional to p (1 − p) of the predicted
    probabilities, so to the loss, and a loss of a half halves it without any flattening. The difference is for large
    losses: a network that has learned nothing is flat because its predictions hardly depend on its weights. A quarter
    nat is a fifth of the probability of the right class, exp(−0.25) = 0.78.

    >>> comparable(0.19, 0.27), comparable(0.02, 0.05), comparable(1.9, 2.3), comparable(0.2, float("nan"))
    (True, False, False, False)
    """
    low, high = min(loss, other), max(loss, other)
    known = math.isfinite(loss) and math.isfinite(other)
    return bool(known and high <= LOSS_FACTOR * low and high - low <= LOSS_NATS)


def stability(
    model: nn.Module,
    data: Batches,
    compressor: Compressor | Specification | str = "global@0.9",
    calibration: Batches | None = None,
    rho: float = 0.2,
    radius: float = 0.05,
    few: Batches | None = None,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Measure loss, CrAM gap, SAM-sharpness, top Hessian eigenvalue and trace at dense and at compressed weights.

    At compressed weights the CrAM gap is that of one more ascent and compression: L(C(θ' + ρ g)) − L(θ') with θ' =
    C(θ).

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample for the loss, the gap and the sharpness.
        compressor: C, an operator or its specification.
        calibration: data for BatchNorm tuning wherever weights are compressed, in the gaps too; none if not given.
        rho: ascent radius of the CrAM gap (`cram_gap`).
        radius: of SAM-sharpness (`sam_sharpness`).
        few: a smaller sample for the curvature (`curvature`), by default `data`.
        seed: of the random vectors for the trace.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.
        batches: what a pruner looks at (`cram_bench.prune`), training data; `calibration` if not given.

    Returns:
        Two rows, weights ``dense`` and the compressor's specification, with loss, gap, pruning_gap (of plain
        compression, measured at the dense weights only), ascent_gap (of the ascent with nothing pruned), sharpness
        (nats), eigenvalue, eigenvalue_error, trace and trace_error (nats per squared weight; standard errors over parts
        of the sample).
    """
    compressor = parse(compressor)
    batches = calibration if batches is None else batches
    calibration = tuning_data(calibration)
    number("rho", rho, 0)
    number("radius", radius, 0)

    def measured(weights: str) -> dict[str, float | str]:
        gaps = cram_gap(model, problem, [compressor], rho, calibration, forward, loss, batches).iloc[0]
        row: dict[str, float | str] = {"weights": weights}
        row |= {name: float(gaps[name]) for name in ("loss", "gap", "pruning_gap", "ascent_gap")}
        row["sharpness"] = float(sam_sharpness(model, problem, radius, forward, loss)["sharpness"].iloc[0])
        bent = curvature(model, fewer, seed=seed, forward=forward, loss=loss)
        for quantity, value, error in zip(bent["quantity"], bent["value"], bent["error"], strict=True):
            row |= {quantity: value, f"{quantity}_error": error}
        return row

    problem = Problem(model, data, forward, loss)  # one sample for all, whatever a loader gives the next time
    fewer = problem if few is None else Problem(model, few, forward, loss)
    rows = [measured("dense")]
    with probing(model), applied(model, looked(model, [compressor], batches, (), forward, loss)[0]):
        if calibration is not None:
            problem.tune(calibration)
        rows.append(measured(str(compressor)) | {"pruning_gap": float("nan")})
    order = ["weights", "loss", "gap", "pruning_gap", "ascent_gap", "sharpness"]
    return pd.DataFrame(rows)[[*order, "eigenvalue", "eigenvalue_error", "trace", "trace_error"]]


def with_random_directions(table: pd.DataFrame, slices: pd.DataFrame) -> pd.DataFrame:
    """Return `table` with a column ``random_rise``: how much the loss rises in random directions, in nats.

    The mean over directions and both signs of L(θ ± r d) − L(θ), d filter-normalised and r the half-width of the
    slices.

    Args:
        table: of `stability`: columns method, seed, weights.
        slices: of `cram_bench.probes.loss_in_ball` around the dense weights of the same runs: columns method, seed,
            direction, a, loss. A run that is not in it has no random_rise, nor have compressed weights.
    """
    columns(table, "method", "seed", "weights")
    columns(slices, "method", "seed", "direction", "a", "loss")
    known = slices.dropna(subset=["loss"])
    middle = known[known["a"] == 0].groupby(["method", "seed"])["loss"].mean()
    ends = known[known["a"].abs() == known["a"].abs().max()].groupby(["method", "seed"])["loss"].mean()
    rise = (ends - middle).rename("random_rise").reset_index().assign(weights="dense")
    return table.drop(columns="random_rise", errors="ignore").merge(rise, "left", ["method", "seed", "weights"])


def verdicts(
    table: pd.DataFrame, methods: str | Sequence[str], baseline: str, quantities: Sequence[str] | None = None
) -> pd.DataFrame:
    """Say where methods are more stable than a baseline, where the measurement does not decide, and where it cannot.

    Welch's t-test over seeds, two-sided, on logarithms where all values are positive and on the values else; its p is
    corrected after Holm (1979) over everything that is measured of a method. A difference is taken for one where that p
    is at most `SIGNIFICANCE`, so that of twenty methods that differ in nothing one gets a verdict. With one seed
    nothing is claimed. The seeds are those of the training: whether another sample would give the same, p does not say.

    Models that fit the sample differently are not compared: `comparable` must hold of the mean losses of both, at the
    dense weights and at those where the quantity was measured. Such a row still has its p, and counts in the
    correction.

    Args:
        table: columns method, seed, weights, loss, and the quantities; lower is more stable.
        methods: one, or a list, of those that are claimed to be more stable; an empty list gives an empty table.
        baseline: the one they are compared with.
        quantities: columns to compare; by default those of `QUANTITIES` that the table has.

    Returns:
        Columns weights, quantity, method, seeds, loss (mean, at these weights), mean and std over its seeds, baseline,
        baseline_seeds, baseline_loss, baseline_mean, baseline_std, scale of the test (``log`` or ``raw``), p
        (corrected; NaN where there are too few seeds), raw_p (corrected, of the test on the values themselves), and
        verdict: ``supports``, ``contradicts``, ``undecided`` or ``not comparable``. What one of the two has no
        measurement of has no row.

    >>> table = pd.DataFrame({"method": ["a", "a", "a", "b", "b", "b"], "seed": [0, 1, 2] * 2, "weights": "dense",
    ...                       "loss": 0.2, "trace": [1.0, 1.1, 1.2, 9.0, 9.5, 9.9]})
    >>> verdicts(table, "a", "b", ["trace"])["verdict"].tolist()
    ['supports']
    >>> verdicts(table.assign(loss=[0.2] * 3 + [2.3] * 3), "a", "b", ["trace"])["verdict"].tolist()
    ['not comparable']
    """
    if quantities is None:
        columns(table, "method", "seed", "weights", "loss")
        quantities = [name for name in QUANTITIES if name in table]
    columns(table, "method", "seed", "weights", "loss", *quantities)
    listed = [methods] if isinstance(methods, str) else methods
    claimed = items("methods", listed, "names of methods") if listed != [] else []
    known = list(dict.fromkeys(table["method"]))
    for name in (*claimed, baseline):
        if name not in known:
            raise ValueError(unknown("method", name, known))
    losses = table.groupby(["method", "weights"])["loss"].mean().to_dict()

    def fit_alike(method: str, weights: str) -> bool:
        places = {weights, *(["dense"] if (table["weights"] == "dense").any() else [])}
        nothing = float("nan")
        return all(comparable(losses.get((method, at), nothing), losses.get((baseline, at), nothing)) for at in places)

    rows: list[dict[str, Any]] = []
    for weights in dict.fromkeys(table["weights"].dropna()):
        for quantity in quantities:
            part = table[table["weights"] == weights].dropna(subset=[quantity])
            theirs = part.loc[part["method"] == baseline, quantity]
            for method in claimed:
                ours = part.loc[part["method"] == method, quantity]
                if len(ours) and len(theirs):
                    positive = min(ours.min(), theirs.min()) > 0
                    row = {"weights": weights, "quantity": quantity, "method": method, "seeds": len(ours)}
                    row |= {
                        "loss": losses[method, weights],
                        "mean": ours.mean(),
                        "std": ours.std(),
                        "baseline": baseline,
                    }
                    row |= {"baseline_seeds": len(theirs), "baseline_loss": losses[baseline, weights]}
                    row |= {"baseline_mean": theirs.mean(), "baseline_std": theirs.std()}
                    row |= {"scale": "log" if positive else "raw", "raw_p": _welch(ours, theirs)}
                    row["p"] = _welch(np.log(ours), np.log(theirs)) if positive else row["raw_p"]
                    rows.append(row | {"alike": fit_alike(method, weights)})
    names = ["weights", "quantity", "method", "seeds", "loss", "mean", "std", "baseline", "baseline_seeds"]
    names += ["baseline_loss", "baseline_mean", "baseline_std", "scale", "p", "raw_p"]
    found = pd.DataFrame(rows, columns=[*names, "alike"])
    for method in claimed:
        own = found["method"] == method
        for name in ("p", "raw_p"):
            found.loc[own, name] = _holm(found.loc[own, name])
    lower = np.where(found["mean"] < found["baseline_mean"], "supports", "contradicts")
    said = np.where(found["p"].astype(float) <= SIGNIFICANCE, lower, "undecided")
    return found[names].assign(verdict=np.where(found["alike"].astype(bool), said, "not comparable"))


def verdict_table(found: pd.DataFrame) -> pd.DataFrame:
    """Lay out verdicts for readers: a row a quantity, the loss first; a column a method, the baseline first.

    A cell is the mean over seeds, and the verdict with its corrected p.

    Args:
        found: of `verdicts`.

    >>> table = pd.DataFrame({"method": ["sam"] * 3 + ["sgd"] * 3, "seed": [0, 1, 2] * 2, "weights": "dense",
    ...                       "loss": 0.2, "trace": [1.0, 1.1, 1.2, 9.0, 9.5, 9.9]})
    >>> verdict_table(verdicts(table, "sam", "sgd", ["trace"])).to_numpy().tolist()
    [['dense', 'loss', '0.2', '0.2'], ['dense', 'trace', '9.47', '1.1: supports (p = 4.4e-05)']]
    """
    columns(
        found, "weights", "quantity", "method", "loss", "mean", "baseline", "baseline_loss", "baseline_mean", empty=True
    )
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in found.to_dict("records"):
        ours, theirs = (label(name) for name in (row["method"], row["baseline"]))
        loss = rows.setdefault((row["weights"], "loss"), {})
        loss |= {theirs: _short(row["baseline_loss"]), ours: _short(row["loss"])}
        p = "" if pd.isna(row["p"]) else f" (p = {row['p']:.2g})"
        cells = rows.setdefault((row["weights"], row["quantity"]), {})
        cells |= {theirs: _short(row["baseline_mean"]), ours: f"{_short(row['mean'])}: {row['verdict']}{p}"}
    laid_out = pd.DataFrame.from_dict(rows, orient="index") if rows else pd.DataFrame(columns=[])
    laid_out.index = pd.MultiIndex.from_tuples(list(rows), names=["weights", "quantity"])
    return laid_out.fillna("").reset_index()


def _short(value: float) -> str:
    """Write a number to three digits, without an exponent up to millions.

    >>> _short(2183.0), _short(0.02744), _short(-45210.0), _short(3e9)
    ('2180', '0.0274', '-45200', '3e+09')
    """
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e+0" in text and abs(value) < 1e7 else text


def _welch(ours: pd.Series, theirs: pd.Series) -> float:
    """Return the two-sided p of Welch's t-test; NaN where one side has fewer than two values."""
    from scipy.stats import ttest_ind

    if min(len(ours), len(theirs)) < 2:
        return float("nan")
    if ours.nunique() == theirs.nunique() == 1:  # no spread at all, which the test cannot divide by
        return float(ours.iloc[0] == theirs.iloc[0])
    return float(ttest_ind(ours, theirs, equal_var=False).pvalue)


def _holm(p: pd.Series) -> pd.Series:
    """Correct p-values after Holm: the i-th smallest of m times m − i + 1, and no less than those before it."""
    order = p.dropna().sort_values()
    factors = np.arange(len(order), 0, -1)
    return (order * factors).cummax().clip(upper=1.0).reindex(p.index)
