"""Accuracy after pruning: against sparsity, cost, what was changed, and on new data."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from cram_bench._checks import columns
from cram_bench.plots._style import at_even_steps, legend, mean_lines, of_runs, style


def accuracy_vs_sparsity(table: pd.DataFrame, pattern: str = "global", chance: float | None = None) -> Figure:
    """Draw accuracy against sparsity, before and after BatchNorm tuning side by side.

    Args:
        table: columns method, seed, pattern, sparsity, calibrated, accuracy; without method and seed, it is that of one model.
        pattern: which sparsity pattern to draw; the dense model belongs to all.
        chance: accuracy of guessing, a fraction, such as `Dataset.majority` of the test images, drawn as a dotted line.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "pattern", "sparsity", "calibrated", "accuracy")
    shown = table[(table["pattern"] == pattern) | (table["sparsity"] == 0)]
    panels = [flag for flag in (False, True) if (shown["calibrated"] == flag).any()]
    titles = {False: "Pruned in one shot", True: "Pruned in one shot, then BatchNorm tuned"}
    with style():
        figure = Figure(figsize=(4.6 * max(1, len(panels)), 3.9))
        axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
        for axis, flag in zip(axes, panels, strict=False):
            part = shown[shown["calibrated"] == flag]
            mean_lines(axis, at_even_steps(axis, part), "step", "accuracy", band="std")
            if chance is not None:
                axis.axhline(chance, color="#888888", linestyle=":", linewidth=1.2)
                axis.annotate("guessing", (0, chance), (0, 3), textcoords="offset points", color="#666666", fontsize=8)
            axis.set_xlabel(f"sparsity, % of prunable weights ({pattern})")
            axis.set_title(titles[flag])
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes[0].set_ylabel("test accuracy, %")
        axes[0].set_ylim(0, 1.02)
        legend(figure, axes[-1], table, "accuracy", "mean ± std")
    return figure


def equal_cost(at_epochs: pd.DataFrame, at_cost: pd.DataFrame) -> Figure:
    """Draw accuracy after pruning and BatchNorm tuning at equal epochs, and at equal gradient evaluations.

    Args:
        at_epochs: columns method, seed, epochs, gradients (evaluations an image), pattern, sparsity, calibrated, accuracy.
        at_cost: the same columns, of the trainings at equal cost.
    """
    with style():
        figure = Figure(figsize=(9.2, 3.9))
        axes = figure.subplots(1, 2, sharey=True)
        sides = {"epochs": (at_epochs, "Equal epochs: {}"), "gradients": (at_cost, "Equal cost: {} gradients an image")}
        for axis, (equal, (part, title)) in zip(axes, sides.items(), strict=True):
            columns(part, "method", "seed", "epochs", "gradients", "pattern", "sparsity", "calibrated", "accuracy")
            shown = part[part["calibrated"].eq(True) & (part["pattern"] == "global")]
            mean_lines(axis, at_even_steps(axis, shown), "step", "accuracy", band="std")
            low, high = part[equal].min(), part[equal].max()
            axis.set_title(title.format(f"{low:g}" if low == high else f"{low:g} to {high:g}"))
            axis.set_xlabel("sparsity, % of prunable weights (global)")
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes[0].set_ylabel("test accuracy, %")
        legend(figure, axes[-1], pd.concat([at_epochs, at_cost]), "accuracy", "mean ± std")
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
    limit = max(1.0, float(np.nanmax(np.abs(points))))
    with style(), mpl.rc_context({"axes.grid": False}):
        figure = Figure(figsize=(1.0 * table.shape[1] + 3.4, 0.36 * len(table) + 1.2))
        axis = figure.subplots()
        scale = SymLogNorm(1.0, vmin=-limit, vmax=limit)
        image = axis.imshow(points, cmap="PuOr", norm=scale, aspect="auto")
        for row in range(len(table)):
            for column in range(table.shape[1]):
                failed = np.isnan(points[row, column])
                text = f"{points[row, column]:+.1f}".replace("-", "−") if row else f"{shares[0, column]:.1f}"
                dark = not failed and abs(float(scale(points[row, column])) - 0.5) > 0.35
                text = "failed" if failed else text
                axis.text(column, row, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "black")
        axis.set_xticks(range(table.shape[1]), list(table.columns))
        axis.set_yticks(range(len(table)), list(table.index))
        axis.tick_params(length=0)
        axis.set_xlabel("sparsity, % of prunable weights (global)")
        axis.set_title("Accuracy in %, and differences to it in points", loc="left")
        ticks = {tick: f"{tick:+.3g}".replace("-", "−") if tick else "0" for tick in (-limit, -1.0, 0.0, 1.0, limit)}
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
    with style():
        figure = Figure(figsize=(5.6, 3.9))
        axis = figure.subplots()
        mean_lines(axis, at_even_steps(axis, table), "step", "accuracy", band="std")
        if chance is not None:
            axis.axhline(chance, color="#888888", linestyle=":", linewidth=1.2)
        axis.set_xlabel("sparsity held while fine-tuning, %")
        axis.set_ylabel(f"test accuracy on {target}, %")
        axis.set_title("Fine-tuned sparse, by the method that made the source")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        legend(figure, axis, table, "accuracy", "mean ± std")
    return figure


def calibration_curve(table: pd.DataFrame) -> Figure:
    """Draw accuracy after BatchNorm tuning against how many images it saw; the band is ± one standard deviation.

    Args:
        table: columns size, draw, accuracy, of `cram_bench.probes.calibration_curve`; size 0 is without tuning.
    """
    columns(table, "size", "draw", "accuracy")
    tuned = table[table["size"] > 0].groupby("size")["accuracy"]
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
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axis.set_xlabel("images that BatchNorm is tuned on (log scale)")
        axis.set_ylabel("accuracy, %")
        axis.set_title(f"How much tuning needs (mean ± std, {table['draw'].nunique()} draws)")
    return figure
