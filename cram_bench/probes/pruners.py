"""Pruners against each other on one model, with every way to correct statistics after; and a rule that chooses."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from cram_bench.checks import columns, items, unknown
from cram_bench.compress import Compressor, Magnitude, apply_, correct_statistics, layer_statistics
from cram_bench.data import AT_ONCE, Batches
from cram_bench.preserve import preserved
from cram_bench.probes.common import Forward, Loss, Problem, cost_of, looked, probing, tuning_data
from cram_bench.probes.over_runs import mean_and_std
from cram_bench.probes.sparsity import reported
from cram_bench.prune import Specification
from cram_bench.recipes import label

CORRECTIONS = ("none", "batchnorm", "statistics")


def pruners(
    model: nn.Module,
    data: Batches,
    compressors: Sequence[Compressor | Specification | str],
    calibration: Batches,
    batches: Batches | None = None,
    held_out: Batches | None = None,
    corrections: Sequence[str] = CORRECTIONS,
    exclude: Iterable[str] = (),
    batch_size: int = AT_ONCE,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Prune with each, correct statistics in each way, and evaluate. The model is left as it was found.

    Args:
        model: any torch classifier.
        data: what to evaluate on.
        compressors: operators and pruners, or their specifications; a pruner looks once for all its sparsities.
        calibration: training data for the corrections: ``batchnorm`` re-estimates BatchNorm's statistics
            (`cram_bench.compress.tune_batchnorm`), ``statistics`` matches every layer's outputs to those of the dense
            model (`cram_bench.compress.correct_statistics`), ``none`` leaves them.
        batches: what pruners look at, training data; `calibration` if not given.
        held_out: training data that neither looked at, to choose by; no held_out_loss if not given.
        corrections: which of them.
        exclude: shell patterns over parameter names that stay dense.
        batch_size: of evaluation, where data are a `Dataset`.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.

    Returns:
        A row per compressor and correction, the dense model (``dense``, uncorrected) first: pattern, sparsity (a
        fraction of the prunable weights), correction, accuracy (a fraction), loss (nats), held_out_accuracy and
        held_out_loss, dense_weights (of matrices in which nothing was pruned), seconds (what looking, shared by a
        pruner's sparsities, and pruning took), gradients (examples that were looked at).

    Raises:
        ValueError: as `cram_bench.probes.sparsity_curve`, or a correction is unknown.
    """
    for name in (corrections := items("corrections", corrections, "names of corrections")):
        if name not in CORRECTIONS:
            raise ValueError(unknown("correction", name, list(CORRECTIONS)))
    batches = calibration if batches is None else batches
    tuning = tuning_data(calibration)
    rows = []
    with probing(model):
        chosen = looked(model, compressors, batches, exclude, forward, loss)
        problem = Problem(model, data, forward, loss, batch_size)
        second = None if held_out is None else Problem(model, held_out, forward, loss, batch_size)
        reference, whole = None, []
        if "statistics" in corrections:
            whole = problem.fitted(together(tuning or []))
            reference = layer_statistics(model, whole, forward=forward)

        def row(where: tuple[object, ...], cost: tuple[object, ...]) -> None:
            here = problem.evaluate()
            there = {"accuracy": float("nan"), "loss": float("nan")} if second is None else second.evaluate()
            rows.append((*where, here["accuracy"], here["loss"], there["accuracy"], there["loss"], *cost))

        for compressor in (None, *chosen):
            with preserved(model):
                start = time.perf_counter()
                masks = apply_(model, compressor or Magnitude(0.0), exclude)
                took = time.perf_counter() - start
                looking, gradients = cost_of(compressor)
                cost = masks.dense_weights, round(took + looking, 3), gradients
                for correction in ("none",) if compressor is None else corrections:
                    with preserved(model):
                        if correction == "batchnorm":
                            problem.tune(tuning or [])
                        elif correction == "statistics":
                            assert reference is not None
                            correct_statistics(model, reference, whole, forward=forward)
                        if compressor is None:
                            row(("dense", 0.0, "none"), cost)
                        else:
                            row((compressor.pattern, reported(compressor, masks), correction), cost)
    names = ["pattern", "sparsity", "correction", "accuracy", "loss", "held_out_accuracy", "held_out_loss"]
    return pd.DataFrame(rows, columns=[*names, "dense_weights", "seconds", "gradients"])


def together(batches: Sequence[Any]) -> list[Any]:
    """Return batches of images as one, for which `correct_statistics` takes a single pass; others as they are."""
    inputs = [batch[0] for batch in batches if isinstance(batch, (tuple, list)) and isinstance(batch[0], Tensor)]
    return [(torch.cat(inputs),)] if inputs and len(inputs) == len(batches) and inputs[0].ndim == 4 else list(batches)


def chosen_by_loss(table: pd.DataFrame, among: Sequence[str] = ()) -> pd.DataFrame:
    """Choose for every run and sparsity the pruner and correction whose loss on held-out training data is least.

    Args:
        table: of `pruners`, perhaps stacked over runs: columns sparsity, pattern, correction, accuracy, held_out_loss.
        among: patterns to choose among; all if empty.

    Returns:
        The rows that were chosen, their pattern and correction in column chosen, and ``chosen`` in pattern and
        correction.

    >>> table = pd.DataFrame({"pattern": ["global", "greedy"], "sparsity": 0.9, "correction": "none",
    ...                       "accuracy": [0.1, 0.6], "held_out_loss": [4.0, 1.1]})
    >>> chosen_by_loss(table)[["sparsity", "pattern", "accuracy", "chosen"]].to_numpy().tolist()
    [[0.9, 'chosen', 0.6, 'greedy, none']]
    """
    columns(table, "pattern", "sparsity", "correction", "accuracy", "held_out_loss")
    found = table[(table["sparsity"] > 0) & table["held_out_loss"].notna()]
    if among:
        found = found[found["pattern"].isin(among)]
    by = [name for name in ("method", "seed", "sparsity") if name in found]
    best = found.loc[found.groupby(by, sort=False)["held_out_loss"].idxmin()]
    texts = best["pattern"].astype(str) + ", " + best["correction"].astype(str)
    return best.assign(chosen=texts, pattern="chosen", correction="chosen").reset_index(drop=True)


def chosen_against(table: pd.DataFrame, pattern: str = "global", correction: str = "batchnorm") -> pd.DataFrame:
    """Compare what `chosen_by_loss` chooses with one pruner and correction: a row per method and sparsity, in per cent,
    means over seeds.

    Args:
        table: of `pruners` stacked over runs, with columns method and seed.
        pattern, correction: what it is compared with.

    Returns:
        Columns method (label), sparsity (per cent), seeds, chosen (how often each was), accuracy of both, points
        between them.
    """
    columns(table, "method", "seed", "pattern", "sparsity", "correction", "accuracy", "held_out_loss")
    best = chosen_by_loss(table)
    usual = table[(table["pattern"] == pattern) & (table["correction"] == correction)]
    rows = []
    for (method, sparsity), own in best.groupby(["method", "sparsity"], sort=False):
        other = usual[(usual["method"] == method) & (usual["sparsity"] == sparsity)]
        counts = ", ".join(f"{text} ({n})" for text, n in own["chosen"].value_counts().items())
        ours, theirs = 100 * own["accuracy"].mean(), 100 * other["accuracy"].mean()
        rows.append((label(str(method)), 100 * float(str(sparsity)), len(own), counts, ours, theirs, ours - theirs))
    name = f"{pattern}, {correction}"
    return pd.DataFrame(rows, columns=["method", "sparsity", "seeds", "chosen", "accuracy", name, "points"]).round(2)


def pruner_table(table: pd.DataFrame, correction: str = "") -> pd.DataFrame:
    """Lay out accuracy in per cent, mean ± std over seeds: a row per method and pruner, a column per sparsity.

    Of several corrections a cell has the one that is asked for, or, where none is, of each method, pruner and sparsity
    the one of the least mean held-out loss, and says which.

    Args:
        table: of `pruners` stacked over runs, with columns method and seed.
        correction: one of `CORRECTIONS`, or empty.
    """
    columns(table, "method", "seed", "pattern", "sparsity", "correction", "accuracy")
    known = table.dropna(subset=["accuracy"])
    pruned = known[known["sparsity"] > 0]
    if correction:
        pruned = pruned[pruned["correction"].isin([correction, "chosen"])]
    by = ["method", "pattern", "sparsity", "correction"]
    means = mean_and_std(pruned, "accuracy", by)
    if not correction and "held_out_loss" in pruned:
        losses = pruned.groupby(by, sort=False)["held_out_loss"].mean().reset_index()
        means = means.merge(losses, on=by)
        means = means.loc[means.groupby(by[:3], sort=False)["held_out_loss"].idxmin()]
    short = {"none": "", "batchnorm": " b", "statistics": " s", "chosen": ""}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in means.to_dict("records"):
        spread = "" if pd.isna(row["std"]) else f" ± {100 * row['std']:.1f}"
        how = "" if correction else short[row["correction"]]
        cell = f"{100 * row['mean']:.1f}{spread}{how}"
        cells.setdefault((label(row["method"]), row["pattern"]), {})[f"{100 * row['sparsity']:g} %"] = cell
    laid_out = pd.DataFrame.from_dict(cells, orient="index")
    if len(laid_out):
        laid_out.index = pd.MultiIndex.from_tuples(list(cells), names=["method", "pruner"])
    return laid_out.fillna("").reset_index()
