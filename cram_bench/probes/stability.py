"""CrAM's claim in numbers: how stable the loss is around dense and compressed weights, and whether methods differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from cram_bench._checks import columns, items, number, unknown
from cram_bench.compress import Compressor, applied, parse, tune_batchnorm
from cram_bench.data import Batches, batches_of
from cram_bench.probes.common import tuning_data
from cram_bench.probes.hessian import curvature
from cram_bench.probes.sharpness import cram_gap, sam_sharpness

QUANTITIES = ("gap", "pruning_gap", "sharpness", "eigenvalue", "trace")
"""What `stability` measures around weights; lower is more stable for each. The loss itself says how well a model fits."""
SIGNIFICANCE = 0.05
"""Probability, at most, of a verdict on a method where there is no difference at all."""


def stability(
    model: nn.Module,
    data: Batches,
    compressor: Compressor | str = "global@0.9",
    calibration: Batches | None = None,
    rho: float = 0.2,
    radius: float = 0.05,
    few: Batches | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure loss, CrAM gap, SAM-sharpness, top Hessian eigenvalue and trace at dense and at compressed weights.

    At compressed weights the CrAM gap is that of one more ascent and compression: L(C(θ' + ρ g)) − L(θ') with θ' = C(θ).

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample for the loss, the gap and the sharpness.
        compressor: C, an operator or its specification.
        calibration: data for BatchNorm tuning wherever weights are compressed, in the gaps too; none if not given.
        rho: ascent radius of the CrAM gap (`cram_gap`).
        radius: of SAM-sharpness (`sam_sharpness`).
        few: a smaller sample for the curvature (`curvature`), by default `data`.
        seed: of the random vectors for the trace.

    Returns:
        Two rows, weights ``dense`` and the compressor's specification, with loss, gap, pruning_gap (of plain compression,
        measured at the dense weights only), sharpness (nats), eigenvalue, eigenvalue_error, trace and trace_error (nats
        per squared weight; standard errors over parts of the sample).
    """
    compressor = parse(compressor)
    calibration = tuning_data(calibration)
    number("rho", rho, 0)
    number("radius", radius, 0)

    def measured(weights: str) -> dict[str, float | str]:
        gaps = cram_gap(model, data, [compressor], rho, calibration).iloc[0]
        row: dict[str, float | str] = {"weights": weights}
        row |= {name: float(gaps[name]) for name in ("loss", "gap", "pruning_gap")}
        row["sharpness"] = float(sam_sharpness(model, data, radius)["sharpness"].iloc[0])
        bent = curvature(model, data if few is None else few, seed=seed)
        for quantity, value, error in zip(bent["quantity"], bent["value"], bent["error"], strict=True):
            row |= {quantity: value, f"{quantity}_error": error}
        return row

    rows = [measured("dense")]
    with applied(model, compressor):
        if calibration is not None:
            tune_batchnorm(model, batches_of(calibration))
        rows.append(measured(str(compressor)) | {"pruning_gap": float("nan")})
    order = ["weights", "loss", "gap", "pruning_gap", "sharpness"]
    return pd.DataFrame(rows)[[*order, "eigenvalue", "eigenvalue_error", "trace", "trace_error"]]


def verdicts(
    table: pd.DataFrame, methods: str | Sequence[str], baseline: str, quantities: Sequence[str] = QUANTITIES
) -> pd.DataFrame:
    """Say where methods are more stable than a baseline, and where the measurement does not decide.

    Welch's t-test over seeds, two-sided, on logarithms where all values are positive; its p is corrected after Holm
    (1979) over everything that is said of a method. A difference is taken for one where that p is at most `SIGNIFICANCE`, so
    that of twenty methods that differ in nothing one gets a verdict. With one seed nothing is claimed. The seeds are those of
    the training: whether another sample would give the same, p does not say.

    Args:
        table: columns method, seed, weights, and the quantities; lower is more stable.
        methods: one, or a list, of those that are claimed to be more stable; an empty list gives an empty table.
        baseline: the one they are compared with.
        quantities: columns to compare.

    Returns:
        Columns weights, quantity, method, seeds, mean and std over its seeds, baseline, baseline_seeds, baseline_mean,
        baseline_std, p (corrected; NaN where there are too few seeds), and verdict: ``supports``, ``contradicts`` or
        ``undecided``. What one of the two has no measurement of has no row.

    >>> table = pd.DataFrame({"method": ["a", "a", "a", "b", "b", "b"], "seed": [0, 1, 2] * 2, "weights": "dense",
    ...                       "trace": [1.0, 1.1, 1.2, 9.0, 9.5, 9.9]})
    >>> verdicts(table, "a", "b", ["trace"])["verdict"].tolist()
    ['supports']
    """
    columns(table, "method", "seed", "weights", *quantities)
    listed = [methods] if isinstance(methods, str) else methods
    claimed = items("methods", listed, "names of methods") if listed != [] else []
    known = list(dict.fromkeys(table["method"]))
    for name in (*claimed, baseline):
        if name not in known:
            raise ValueError(unknown("method", name, known))
    rows: list[dict[str, Any]] = []
    for weights in dict.fromkeys(table["weights"].dropna()):
        for quantity in quantities:
            part = table[table["weights"] == weights].dropna(subset=[quantity])
            theirs = part.loc[part["method"] == baseline, quantity]
            for method in claimed:
                ours = part.loc[part["method"] == method, quantity]
                if len(ours) and len(theirs):
                    row = {"weights": weights, "quantity": quantity, "method": method, "seeds": len(ours)}
                    row |= {"mean": ours.mean(), "std": ours.std(), "baseline": baseline}
                    row |= {"baseline_seeds": len(theirs), "baseline_mean": theirs.mean(), "baseline_std": theirs.std()}
                    rows.append(row | {"p": _welch(ours, theirs)})
    names = ["weights", "quantity", "method", "seeds", "mean", "std"]
    names += ["baseline", "baseline_seeds", "baseline_mean", "baseline_std", "p"]
    found = pd.DataFrame(rows, columns=names)
    for method in claimed:
        found.loc[found["method"] == method, "p"] = _holm(found.loc[found["method"] == method, "p"])
    lower = np.where(found["mean"] < found["baseline_mean"], "supports", "contradicts")
    return found.assign(verdict=np.where(found["p"].astype(float) <= SIGNIFICANCE, lower, "undecided"))


def _welch(ours: pd.Series, theirs: pd.Series) -> float:
    """Return the two-sided p of Welch's t-test; NaN where one side has fewer than two values."""
    from scipy.stats import ttest_ind

    if min(len(ours), len(theirs)) < 2:
        return float("nan")
    if min(ours.min(), theirs.min()) > 0:
        ours, theirs = np.log(ours), np.log(theirs)
    if ours.nunique() == theirs.nunique() == 1:  # no spread at all, which the test cannot divide by
        return float(ours.iloc[0] == theirs.iloc[0])
    return float(ttest_ind(ours, theirs, equal_var=False).pvalue)


def _holm(p: pd.Series) -> pd.Series:
    """Correct p-values of several tests after Holm: the i-th smallest of m times m − i + 1, and no less than those before it."""
    order = p.dropna().sort_values()
    factors = np.arange(len(order), 0, -1)
    return (order * factors).cummax().clip(upper=1.0).reindex(p.index)
