"""CrAM's claim in numbers: how stable the loss is around dense and compressed weights, and whether methods differ."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from torch import nn

from cram_bench._checks import columns, items, number, unknown
from cram_bench.compress import Compressor, applied, parse, tune_batchnorm
from cram_bench.data import Batches, batches_of
from cram_bench.probes.common import tuning_data
from cram_bench.probes.hessian import curvature
from cram_bench.probes.over_runs import mean_and_std
from cram_bench.probes.sharpness import cram_gap, sam_sharpness
from cram_bench.train import evaluate

QUANTITIES = ("loss", "gap", "sharpness", "eigenvalue", "trace")
"""What `stability` measures; lower is more stable for each."""


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

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample for the loss, the gap and the sharpness.
        compressor: C, an operator or its specification.
        calibration: data for BatchNorm tuning of the compressed model; none if not given.
        rho: ascent radius of the CrAM gap (`cram_gap`), measured at the dense weights only.
        radius: of SAM-sharpness (`sam_sharpness`).
        few: a smaller sample for the curvature (`curvature`), by default `data`.
        seed: of the random vectors for the trace.

    Returns:
        Two rows, weights ``dense`` and the compressor's specification, with loss, gap, sharpness (nats), eigenvalue,
        eigenvalue_error, trace and trace_error (nats per squared weight; standard errors over parts of the sample).
    """
    compressor = parse(compressor)
    calibration = tuning_data(calibration)
    number("rho", rho, 0)
    number("radius", radius, 0)
    rows = [_measured(model, data, few, radius, seed) | {"weights": "dense"}]
    rows[0]["gap"] = float(cram_gap(model, data, [compressor], rho)["gap"].iloc[0])
    with applied(model, compressor):
        if calibration is not None:
            tune_batchnorm(model, batches_of(calibration))
        rows.append(_measured(model, data, few, radius, seed) | {"weights": str(compressor), "gap": float("nan")})
    order = ["weights", "loss", "gap", "sharpness", "eigenvalue", "eigenvalue_error", "trace", "trace_error"]
    return pd.DataFrame(rows)[order]


def _measured(model: nn.Module, data: Batches, few: Batches | None, radius: float, seed: int) -> dict[str, float | str]:
    bent = curvature(model, data if few is None else few, seed=seed)
    measured: dict[str, float | str] = {
        "loss": evaluate(model, data)["loss"],
        "sharpness": float(sam_sharpness(model, data, radius)["sharpness"].iloc[0]),
    }
    for quantity, value, error in zip(bent["quantity"], bent["value"], bent["error"], strict=True):
        measured |= {quantity: value, f"{quantity}_error": error}
    return measured


def verdicts(
    table: pd.DataFrame, methods: str | Sequence[str], baseline: str, quantities: Sequence[str] = QUANTITIES
) -> pd.DataFrame:
    """Say where methods are more stable than a baseline, and where the measurement does not decide.

    A difference of means over seeds is taken for one when it is larger than the two standard deviations together;
    with one seed, or a smaller difference, nothing is claimed.

    Args:
        table: columns method, seed, weights, and the quantities; lower is more stable.
        methods: one, or a list, of those that are claimed to be more stable; an empty list gives an empty table.
        baseline: the one they are compared with.
        quantities: columns to compare.

    Returns:
        Columns weights, quantity, method, mean and std over its seeds, baseline, baseline_mean, baseline_std, and
        verdict: ``supports``, ``contradicts`` or ``undecided``. What one of the two has no measurement of has no row.

    >>> table = pd.DataFrame({"method": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "weights": "dense",
    ...                       "loss": [1.0, 1.1, 2.0, 2.1]})
    >>> verdicts(table, "a", "b", ["loss"])["verdict"].tolist()
    ['supports']
    """
    columns(table, "method", "seed", "weights", *quantities)
    listed = [methods] if isinstance(methods, str) else methods
    claimed = items("methods", listed, "names of methods") if listed != [] else []
    known = list(dict.fromkeys(table["method"]))
    for name in (*claimed, baseline):
        if name not in known:
            raise ValueError(unknown("method", name, known))
    rows = []
    for weights in dict.fromkeys(table["weights"].dropna()):
        for quantity in quantities:
            part = table[table["weights"] == weights].dropna(subset=[quantity])
            reduced = mean_and_std(part, quantity, ["method"]).set_index("method")
            for method in claimed:
                if method in reduced.index and baseline in reduced.index:
                    ours, theirs = reduced.loc[method], reduced.loc[baseline]
                    gap, spread = theirs["mean"] - ours["mean"], ours["std"] + theirs["std"]
                    decided = abs(gap) > spread  # NaN, of a single seed, decides nothing
                    verdict = ("supports" if gap > 0 else "contradicts") if decided else "undecided"
                    means = (method, ours["mean"], ours["std"], baseline, theirs["mean"], theirs["std"])
                    rows.append((weights, quantity, *means, verdict))
    names = ["method", "mean", "std", "baseline", "baseline_mean", "baseline_std"]
    return pd.DataFrame(rows, columns=["weights", "quantity", *names, "verdict"])
