"""Accuracy of sparse networks, and what each costs: alone, and with those of all other sparsities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from cram_bench.checks import instance, items, number
from cram_bench.data import Dataset
from cram_bench.probes.over_runs import mean_and_std
from cram_bench.probes.sparsity import sparsity_curve
from cram_bench.recipes import aim, label
from cram_bench.runs import Run
from cram_bench.train import evaluate


def prices(
    runs: Sequence[Run],
    test: Dataset,
    sparsities: Sequence[float],
    calibration: Any,
    batches: Dataset,
    pruners: Sequence[str] = ("global",),
) -> pd.DataFrame:
    """Measure runs at sparsities, and say what each number cost in gradients an image.

    A training that aims at one sparsity is measured as it is. Any other is pruned in one shot to every sparsity, with
    BatchNorm tuned after; its training is paid once, and so is what a pruner looks at.

    Args:
        runs: as of `cram_bench.recipes.prices`; a teacher is found among them by its id.
        test: what to evaluate on.
        sparsities: fractions, of the prunable weights.
        calibration: training data for BatchNorm tuning.
        batches: training data, what pruners look at.
        pruners: who prunes what aims at no sparsity, without a sparsity, such as ``global`` or ``greedy``.

    Returns:
        Columns method (``gmp*, distilled`` with a teacher, ``sgd, greedy`` with another pruner than ``global``), seed,
        sparsity, accuracy (a fraction; NaN for a failed run), and in gradients an image, a teacher's forward pass being
        a third of one: own (this training), shared (its teacher's training, what a pruner looked at), one (what one
        sparsity costs: own + shared), curve (what all of `sparsities` cost: shared, and own once or once for each).
    """
    instance("runs", runs, (list, tuple), "a list of runs")
    levels = [number("sparsity", s, 0, 1) for s in items("sparsities", sparsities, "numbers in [0, 1)")]
    by_id = {run.experiment.id: run.experiment for run in runs}
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        experiment, own = run.experiment, run.experiment.gradients
        teacher = by_id.get(getattr(experiment.loss, "teacher", ""))
        shared = teacher.gradients if teacher is not None else 0.0
        name = f"{experiment.method}, distilled" if experiment.loss.passes else experiment.method
        model = None if run.failure is not None else run.load_model()
        if level := aim(experiment):
            accuracy = float("nan") if model is None else evaluate(model, test)["accuracy"]
            cost = own, shared, own + shared, shared + own * len(levels)
            rows.append((name, experiment.seed, level, accuracy, *cost))
            continue
        for pruner in pruners:
            called = name if pruner == "global" else f"{name}, {pruner.partition('(')[0]}"
            if model is None:
                rows.append((called, experiment.seed, levels[0], float("nan"), own, shared, own + shared, own + shared))
                continue
            specs = [f"{pruner}@{level!r}" for level in levels]
            curve = sparsity_curve(model, test, specs, calibration, batches=batches)
            tuned = curve[curve["calibrated"] & (curve["sparsity"] > 0)]
            looks = float(curve["gradients"].max()) / len(batches) if "gradients" in curve else 0.0
            whole = own + shared + looks
            rows += [
                (called, experiment.seed, row.sparsity, row.accuracy, own, shared + looks, whole, whole)
                for row in tuned.itertuples()
            ]
    names = ["method", "seed", "sparsity", "accuracy", "own", "shared", "one", "curve"]
    return pd.DataFrame(rows, columns=names)


def price_table(table: pd.DataFrame) -> pd.DataFrame:
    """Lay out accuracy in per cent, a row per method and a column per sparsity, with both costs in gradients an image.

    Args:
        table: of `prices`.
    """
    means = mean_and_std(table, "accuracy", ["method", "sparsity"])
    costs = table.groupby("method", sort=False)[["one", "curve"]].mean()
    cells: dict[str, dict[str, str]] = {}
    for row in sorted(means.to_dict("records"), key=lambda row: row["sparsity"]):
        spread = "" if pd.isna(row["std"]) else f" ± {100 * row['std']:.1f}"
        value = f"{100 * row['mean']:.1f}{spread}" if row["seeds"] else "failed"
        cells.setdefault(row["method"], {})[f"{100 * row['sparsity']:g} %"] = value
    laid_out = [
        {"method": label(method), **cells[method], "one sparsity": f"{one:.1f}", "whole curve": f"{curve:.1f}"}
        for method, one, curve in costs.itertuples()
    ]
    return pd.DataFrame(laid_out).fillna("")
