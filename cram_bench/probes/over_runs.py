"""One probe over many runs, in one table; and what becomes of it over seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from cram_bench.checks import columns, instance, unknown
from cram_bench.data import Dataset
from cram_bench.data.part import Data
from cram_bench.experiment import names, setting
from cram_bench.recipes import label
from cram_bench.runs import Run
from cram_bench.train import evaluate
from cram_bench.untrusted import printable


def over_runs(
    runs: Sequence[Run],
    probe: Callable[..., pd.DataFrame],
    *arguments: Any,
    progress: bool = False,
    settings: Sequence[str] = (),
    **options: Any,
) -> pd.DataFrame:
    """Apply ``probe(model, *arguments, **options)`` to every run and stack the tables, with method and seed in front.

    A failed run gives one row whose measurements are empty, so that it shows in tables and counts.

    Args:
        runs: finished or failed runs.
        probe: a probe of `cram_bench.probes`, or any function of a model that returns a table.
        arguments: given to the probe after the model.
        progress: print a line per run.
        settings: further attributes of the experiment to put beside the seed, such as ``epochs``.
        options: given to the probe by name.

    Raises:
        ValueError: a setting is not one of an experiment.
        TypeError: something among `runs` is no run.

    >>> over_runs([], lambda model: pd.DataFrame({"loss": [1.0]})).empty
    True
    """
    known = [*names(), "gradients", "id"]
    for name in settings:
        if name not in known:
            raise ValueError(unknown("setting", name, known))
    tables = []
    instance("runs", runs, (list, tuple), "a list of runs")
    for run in runs:
        instance("a run", run, Run, "a Run, such as cram_bench.runs.ensure returns")
    for run in runs:
        start = time.perf_counter()
        table = probe(run.load_model(), *arguments, **options) if run.failure is None else pd.DataFrame([{}])
        table.insert(0, "method", run.experiment.method)
        for place, name in enumerate(("seed", *settings), 1):
            table.insert(
                place,
                name,
                getattr(run.experiment, name) if name in ("gradients", "id") else setting(run.experiment, name),
            )
        tables.append(table)
        if progress:
            took = f"{time.perf_counter() - start:.1f} s" if run.failure is None else f"failed: {run.failure}"
            print(printable(f"{run.label}: {took}"), flush=True)  # noqa: T201
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["method", "seed"])


def over_changes(
    runs: Mapping[str, Sequence[Run]], measure: Callable[..., pd.DataFrame], *arguments: Any, **options: Any
) -> pd.DataFrame:
    """Return ``measure(runs, *arguments, **options)`` of every entry, stacked; a last column ``changed`` names it.

    >>> over_changes({"ρ = 0": [], "ramp": []}, lambda runs: pd.DataFrame({"runs": [len(runs)]}))["changed"].tolist()
    ['ρ = 0', 'ramp']
    """
    instance("runs", runs, Mapping, "a mapping of names to lists of runs")
    tables = [measure(found, *arguments, **options).assign(changed=name) for name, found in runs.items()]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["changed"])


def mean_and_std(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """Reduce over seeds: columns `by`, then mean, std (sample standard deviation; NaN for one seed) and seeds.

    >>> table = pd.DataFrame({"method": ["sgd", "sgd"], "seed": [0, 1], "accuracy": [0.5, 0.7]})
    >>> mean_and_std(table, "accuracy", ["method"]).round(3).to_dict("records")
    [{'method': 'sgd', 'mean': 0.6, 'std': 0.141, 'seeds': 2}]
    """
    columns(table, value, *by, empty=True)  # of runs that all failed
    grouped = table.groupby(list(by), sort=False)[value]
    return grouped.agg(mean="mean", std="std", seeds="count").reset_index()


def half_width(values: pd.Series) -> float:
    """Return half the width of the 95 % interval of a mean, by Student's t.

    >>> round(half_width(pd.Series([1.0, 2.0, 3.0])), 3)
    2.484
    """
    from scipy.stats import t

    n = len(values)
    return float(values.std() / n**0.5 * t.ppf(0.975, n - 1)) if n > 1 else float("nan")


def seeds_left(table: pd.DataFrame, value: str) -> dict[str, tuple[int, int]]:
    """Return method → (seeds with a measurement of `value`, all seeds): a mean over what is left must say so.

    >>> table = pd.DataFrame({"method": "sam", "seed": [0, 1], "accuracy": [0.5, None]})
    >>> seeds_left(table, "accuracy")
    {'sam': (1, 2)}
    """
    columns(table, "method", "seed", value, empty=True)
    every = table.groupby("method", sort=False)["seed"].nunique()
    left = table.dropna(subset=[value]).groupby("method")["seed"].nunique().reindex(every.index, fill_value=0)
    return {str(method): (int(left[method]), int(every[method])) for method in every.index}


def partly(left: int, every: int) -> str:
    """Say after a label that only some seeds are left; nothing where all are, or none is.

    >>> partly(2, 3), partly(3, 3), partly(0, 3)
    (' (2 of 3 seeds)', '', '')
    """
    return f" ({left} of {every} seeds)" if 0 < left < every else ""


def apart(table: pd.DataFrame) -> pd.Series:
    """Tell which rows are no point on a curve over sparsities, but have a place of their own, by the pattern's name.

    A pattern n:m decides its sparsity itself, and weights that were quantized are not the dense ones, though none be
    zero.

    Args:
        table: columns pattern, sparsity.

    >>> patterns = ["global", "2:4", "int8", "global+int8", "global+int8"]
    >>> table = pd.DataFrame({"pattern": patterns, "sparsity": [0, 0.5, 0, 0, 0.9]})
    >>> apart(table).tolist()
    [False, True, True, True, False]
    """
    pattern = table["pattern"].astype(str)
    return pattern.str.contains(":") | (pattern.str.contains(r"\bint\d") & (table["sparsity"] == 0))


def accuracy_table(curves: pd.DataFrame, calibrated: bool = True, pattern: str = "global") -> pd.DataFrame:
    """Lay out test accuracy in per cent, a row per method and a column per sparsity, as ``mean ± std`` over seeds.

    The head says what ± is and over how many seeds: ``accuracy, % ± std (n = 3)``; of one seed there is none.

    Patterns n:m, whose sparsity is their own, and weights that are quantized and not pruned, have a column each after
    those of `pattern`.

    Args:
        curves: columns method, seed, pattern, sparsity, calibrated, accuracy.
        calibrated: take the pruned models after BatchNorm tuning. The dense column is always untuned.
        pattern: which sparsity pattern the columns of per cent are.

    A method of which some seeds failed is called ``SAM (2 of 3 seeds)``; one of which all did has ``failed`` for a
    result.
    """
    columns(curves, "method", "seed", "pattern", "sparsity", "calibrated", "accuracy")
    curves = curves.assign(apart=apart(curves))
    dense = (curves["sparsity"] == 0) & ~curves["apart"]
    compressed = curves["apart"] | ((curves["sparsity"] > 0) & (curves["pattern"] == pattern))
    shown = (dense & ~curves["calibrated"].astype(bool)) | (compressed & (curves["calibrated"] == calibrated))
    kept = curves.assign(pattern=curves["pattern"].mask(dense, ""))[shown]
    reduced = mean_and_std(kept, "accuracy", ["method", "pattern", "sparsity", "apart"])
    seeds = int(reduced["seeds"].max()) if len(reduced) else 0
    head = "accuracy, %" + (f" ± std (n = {seeds})" if seeds > 1 else "")
    cells: dict[str, dict[str, str]] = {}
    for row in sorted(reduced.to_dict("records"), key=lambda row: (row["apart"], row["pattern"] != "")):
        spread = "" if pd.isna(row["std"]) else f" ± {100 * row['std']:.1f}"
        share = "dense" if row["sparsity"] == 0 else f"{100 * row['sparsity']:g} %"
        name = row["pattern"] if row["apart"] else share
        cells.setdefault(row["method"], {})[name] = f"{100 * row['mean']:.1f}{spread}"
    left = seeds_left(curves, "accuracy")
    for method in curves.loc[curves["accuracy"].isna(), "method"].unique():
        cells.setdefault(method, {}).setdefault("dense", "failed")
    cells = {label(method) + partly(*left[method]): row for method, row in cells.items()}
    return pd.DataFrame.from_dict(cells, orient="index").rename_axis(head).fillna("")


def ablation_means(curves: pd.DataFrame) -> pd.DataFrame:
    """Return mean accuracies over seeds as fractions: a row a change, a column a sparsity in per cent, dense untuned.

    A change whose runs all failed has a row of NaN.

    Args:
        curves: columns changed, sparsity, calibrated, accuracy.
    """
    columns(curves, "changed", "sparsity", "calibrated", "accuracy")
    shown = curves[curves["calibrated"].astype(bool) != (curves["sparsity"] == 0)]
    means = shown.pivot_table(index="changed", columns="sparsity", values="accuracy")
    means = means.reindex(index=list(dict.fromkeys(curves["changed"])), columns=sorted(means.columns))
    return means.rename(columns=lambda level: "dense" if level == 0 else f"{100 * level:g}")


def transfer_accuracy(tuned: Sequence[Run], sources: Sequence[Run]) -> pd.DataFrame:
    """Return test accuracies of fine-tuned runs by the method that made their source.

    Of runs that held training images out, those of one learning rate are kept for each method and sparsity: of that
    with the highest mean accuracy over seeds on the held-out images, the first of equals; a rate of which a run failed
    is last. The test set is looked at for these alone.

    Args:
        tuned: runs with a ``start``, and ``prune`` where they are sparse.
        sources: the runs they start from.

    Returns:
        Columns method (of the source), seed, sparsity (as pruned), accuracy (a fraction; NaN for a failed run), lr, and
        held_out (accuracy there, a fraction; NaN where nothing was held out).

    Raises:
        ValueError: a run starts from none of the sources, or there are several rates and nothing was held out.
    """
    methods = {run.id: run.experiment.method for run in sources}
    for run in tuned:
        if run.experiment.start not in methods:
            raise ValueError(f"run {run.id} starts from {run.experiment.start!r}, which is not among the sources")
    rows = []
    for run in tuned:
        experiment = run.experiment
        last = float(run.history["test_accuracy"].iloc[-1]) if run.failure is None else float("nan")
        row = {
            "method": methods[experiment.start],
            "seed": experiment.seed,
            "sparsity": experiment.pruning.sparsity,  # type: ignore[attr-defined]
            "accuracy": float("nan") if experiment.data.holdout else last,
            "lr": experiment.optimizer.lr,  # type: ignore[attr-defined]
            "held_out": last if experiment.data.holdout else float("nan"),
        }
        rows.append(row)
    table = pd.DataFrame(rows, columns=["method", "seed", "sparsity", "accuracy", "lr", "held_out"])
    kept = table.groupby(["method", "sparsity"], sort=False, group_keys=False)[list(table)].apply(_best_rate)
    table = table.loc[sorted(kept.index)]
    tests: dict[Data, Dataset] = {}
    for index in table.index:
        run = tuned[index]
        if run.experiment.data.holdout and run.failure is None:
            data = replace(run.experiment.data, holdout=0, sample=0)
            if data not in tests:
                tests[data] = data.load(run.experiment.model)[1]
            table.loc[index, "accuracy"] = evaluate(run.load_model(), tests[data])["accuracy"]
    return table.reset_index(drop=True)


def _best_rate(part: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the rate that is best on held-out images."""
    if part["lr"].nunique() == 1:
        return part
    if part["held_out"].isna().all() and part["accuracy"].notna().any():
        raise ValueError(
            f"one of the rates {sorted(set(part['lr']))} is chosen on held-out images, and none were held out"
        )
    means = part.groupby("lr", sort=False)["held_out"].mean(skipna=False)
    return part[part["lr"] == (means.idxmax() if means.notna().any() else means.index[0])]
