"""Accuracy after pruning: against sparsity, cost, what was changed, and on new data."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import SymLogNorm
from matplotlib.ticker import NullLocator

from cram_bench.checks import columns
from cram_bench.plots._style import (
    Figure,
    at_even_steps,
    legend,
    mean_lines,
    of_runs,
    per_cent,
    signed,
    step_axis,
    style,
)


def accuracy_vs_sparsity(table: pd.DataFrame, pattern: str | None = None, chance: float | None = None) -> Figure:
    """Draw accuracy against sparsity, before and after BatchNorm tuning side by side.

    Patterns that decide their sparsity themselves (``2:4``, ``int8``) are points with a place each, after the curve.
    Rows of other patterns are not drawn, and named below.

    Args:
        table: columns method, seed, pattern, sparsity, calibrated, accuracy; without method and seed, it is that of one
            model.
        pattern: which sparsity pattern the curve is of, by default ``global`` where it is there, else the first; the
            dense model belongs to all.
        chance: accuracy of guessing, a fraction, drawn as a dotted line.

    Raises:
        ValueError: the table has no such pattern.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "pattern", "sparsity", "calibrated", "accuracy")
    shown, labels, drawn, notes = at_even_steps(table, pattern)
    panels = [flag for flag in (False, True) if (shown["calibrated"] == flag).any()]
    titles = {False: "Pruned in one shot", True: "Pruned in one shot, then BatchNorm tuned"}
    with style():
        figure = Figure(figsize=(4.6 * max(1, len(panels)), 3.9))
        axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
        for axis, flag in zip(axes, panels, strict=False):
            mean_lines(axis, shown[shown["calibrated"] == flag], "step", "accuracy", band="std")
            step_axis(axis, shown, labels)
            if chance is not None:
                axis.axhline(chance, color="#888888", linestyle=":", linewidth=1.2)
                axis.annotate("guessing", (0, chance), (0, 3), textcoords="offset points", color="#666666", fontsize=8)
            axis.set_xlabel(_sparsity(drawn, shown))
            axis.set_title(titles[flag])
            per_cent(axis.yaxis)
        axes[0].set_ylabel("test accuracy, %")
        axes[0].set_ylim(0, 1.02)
        legend(figure, axes[-1], table, "accuracy", "mean ± std", notes)
    return figure


def _sparsity(pattern: str, shown: pd.DataFrame) -> str:
    return f"sparsity, % of prunable weights ({pattern})" + (", or pattern" if shown["apart"].any() else "")


def equal_cost(at_epochs: pd.DataFrame, at_cost: pd.DataFrame) -> Figure:
    """Draw accuracy after pruning and BatchNorm tuning at equal epochs, and at equal gradient evaluations.

    Args:
        at_epochs: columns method, seed, epochs, gradients (evaluations an image), pattern, sparsity, calibrated,
            accuracy.
        at_cost: the same columns, of the trainings at equal cost.

    Raises:
        ValueError: nothing in a table was tuned.
    """
    with style():
        figure = Figure(figsize=(9.2, 3.9))
        axes = figure.subplots(1, 2, sharey=True)
        sides = {"epochs": (at_epochs, "Equal epochs: {}"), "gradients": (at_cost, "Equal cost: {} gradients an image")}
        notes: list[str] = []
        for axis, (equal, (part, title)) in zip(axes, sides.items(), strict=True):
            columns(part, "method", "seed", "epochs", "gradients", "pattern", "sparsity", "calibrated", "accuracy")
            tuned = part["calibrated"].eq(True) | part["accuracy"].isna()
            if part["accuracy"].notna().any() and not part.loc[tuned, "accuracy"].notna().any():
                raise ValueError(
                    "the table must hold accuracies after BatchNorm tuning: give sparsity_curve a calibration"
                )
            shown, labels, drawn, left = at_even_steps(part[tuned])
            notes += [note for note in left if note not in notes]
            mean_lines(axis, shown, "step", "accuracy", band="std")
            step_axis(axis, shown, labels)
            low, high = part[equal].min(), part[equal].max()
            axis.set_title(title.format(f"{low:g}" if low == high else f"{low:g} to {high:g}"))
            axis.set_xlabel(_sparsity(drawn, shown))
            per_cent(axis.yaxis)
        axes[0].set_ylabel("test accuracy after BatchNorm tuning, %")
        legend(figure, axes[-1], pd.concat([at_epochs, at_cost]), "accuracy", "mean ± std", notes)
    return figure


def ablations(table: pd.DataFrame) -> Figure:
    """Draw what every change costs or brings: the difference in accuracy to the first row, a cell per sparsity.

    Args:
        table: index: what is changed, the unchanged first; columns: sparsities in per cent, or ``dense``; accuracies as
            fractions, means over seeds.
    """
    columns(table)
    shares = 100 * table.to_numpy(dtype=float)
    points = shares - shares[0]
    limit = float(np.abs(points[np.isfinite(points)]).max(initial=1.0))
    with style():
        figure = Figure(figsize=(1.0 * table.shape[1] + 3.4, 0.36 * len(table) + 1.2))
        axis = figure.subplots()
        axis.grid(False)
        scale = SymLogNorm(1.0, vmin=-limit, vmax=limit)
        image = axis.imshow(points, cmap="PuOr", norm=scale, aspect="auto")
        for row in range(len(table)):
            for column in range(table.shape[1]):
                text = signed(points[row, column]) if row else f"{shares[0, column]:.1f}"
                dark = abs(float(scale(np.nan_to_num(points[row, column]))) - 0.5) > 0.35
                if np.isnan(points[row, column]):
                    dark, text = False, "failed" if np.isnan(shares[row, column]) else "no first row"
                axis.text(column, row, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "black")
        axis.set_xticks(range(table.shape[1]), list(table.columns))
        axis.set_yticks(range(len(table)), list(table.index))
        axis.tick_params(length=0)
        axis.set_xlabel("sparsity, % of prunable weights (global)")
        axis.set_title("Accuracy in %, and differences to it in points", loc="left")
        near = (-1.0, 0.0, 1.0) if limit > 2 else (0.0,)
        ticks = {tick: signed(tick, 0 if tick == round(tick) else 1) for tick in (-limit, *near, limit)}
        bar = figure.colorbar(image, ax=axis, label="points of accuracy")
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
    return figure


def transfer(table: pd.DataFrame, target: str, chance: float | None = None) -> Figure:
    """Draw accuracy on the new data against the sparsity that was held in fine-tuning, a line per source method.

    Args:
        table: columns method (of the source), seed, sparsity, accuracy.
        target: name of the new data.
        chance: accuracy of guessing, a fraction, such as `Dataset.majority` of the test images, drawn as a dotted line.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "sparsity", "accuracy")
    shown, labels, _, notes = at_even_steps(table)
    with style():
        figure = Figure(figsize=(5.6, 3.9))
        axis = figure.subplots()
        mean_lines(axis, shown, "step", "accuracy", band="std")
        step_axis(axis, shown, labels)
        if chance is not None:
            axis.axhline(chance, color="#888888", linestyle=":", linewidth=1.2)
        axis.set_xlabel("sparsity held while fine-tuning, %")
        axis.set_ylabel(f"test accuracy on {target}, %")
        axis.set_title("Fine-tuned sparse, by the method that made the source")
        per_cent(axis.yaxis)
        legend(figure, axis, table, "accuracy", "mean ± std", notes)
    return figure


def calibration_curve(table: pd.DataFrame) -> Figure:
    """Draw accuracy after BatchNorm tuning against how many images it saw; the band is ± one standard deviation.

    Args:
        table: columns size, draw, accuracy, of `cram_bench.probes.calibration_curve`; size 0 is without tuning.

    Raises:
        ValueError: the table has no accuracy after tuning.
    """
    columns(table, "size", "draw", "accuracy")
    tuned = table[table["size"] > 0].dropna(subset=["accuracy"]).groupby("size")["accuracy"]
    if not len(tuned):
        raise ValueError("the table must have accuracies after tuning, of sizes above 0, and has none")
    mean, std = tuned.mean(), tuned.std(ddof=1).fillna(0)
    with style():
        figure = Figure(figsize=(5.6, 3.6))
        axis = figure.subplots()
        axis.plot(mean.index, mean.to_numpy(), color="black", marker="o")
        axis.fill_between(
            mean.index, (mean - std).clip(lower=0), (mean + std).clip(upper=1), color="black", alpha=0.18, linewidth=0
        )
        for value in table.loc[table["size"] == 0, "accuracy"]:
            axis.axhline(value, color="#888888", linestyle=":", linewidth=1.4)
            axis.annotate(
                "untuned", (mean.index.min(), value), (0, 3), textcoords="offset points", color="#666666", fontsize=8
            )
        axis.set_xscale("log")
        axis.set_xticks(list(mean.index), [f"{size:,}" for size in mean.index])
        axis.xaxis.set_minor_locator(NullLocator())
        per_cent(axis.yaxis)
        axis.set_xlabel("images that BatchNorm is tuned on (log scale)")
        axis.set_ylabel("accuracy, %")
        draws = table.loc[table["size"] > 0, "draw"].nunique()
        axis.set_title("How much tuning needs" + (f" (mean ± std, {draws} draws)" if draws > 1 else " (one draw)"))
    return figure
