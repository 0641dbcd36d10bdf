"""Trainings: accuracy by epoch and second, and by what an optimizer keeps of a gradient."""

from __future__ import annotations

import pandas as pd

from cram_bench.checks import columns
from cram_bench.plots._style import Figure, below, legend, mean_lines, of_runs, per_cent, style


def training(table: pd.DataFrame) -> Figure:
    """Draw test accuracy against epochs, and against seconds of training, a line per method.

    Args:
        table: columns method, seed, epoch, seconds, accuracy. Seconds are means over seeds.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "epoch", "seconds", "accuracy")
    timed = table.assign(seconds=table.groupby(["method", "epoch"])["seconds"].transform("mean"))
    with style():
        figure = Figure(figsize=(9.2, 3.9))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, x, title in zip(axes, ("epoch", "seconds"), ("By steps", "By time"), strict=True):
            mean_lines(axis, timed, x, "accuracy", band="std")
            axis.set_xlabel(f"{x}s" if x == "epoch" else "seconds, training and evaluation")
            axis.set_title(title)
            per_cent(axis.yaxis)
        axes[0].set_ylabel("test accuracy, %")
        legend(figure, axes[-1], table, "accuracy", "mean ± std")
    return figure


def density(table: pd.DataFrame, dense: float | None = None) -> Figure:
    """Draw accuracy against the fraction of a gradient's entries that is kept, with and without error feedback.

    Args:
        table: columns density, feedback, seed, accuracy.
        dense: accuracy with whole gradients, a fraction, drawn as a dotted line.
    """
    columns(table, "density", "feedback", "seed", "accuracy")
    measured = table.dropna(subset=["accuracy"])
    with style():
        figure = Figure(figsize=(5.6, 3.9))
        axis = figure.subplots()
        for feedback, name, colour, marker in ((True, "with", "#0072B2", "o"), (False, "without", "#D55E00", "s")):
            part = measured[measured["feedback"].astype(bool) == feedback]
            mean = part.groupby("density")["accuracy"].mean()
            axis.plot(mean.index, mean.to_numpy(), color=colour, marker=marker, label=f"{name} error feedback")
            axis.plot(part["density"], part["accuracy"], color=colour, marker=marker, linestyle="", alpha=0.4)
        if dense is not None:
            axis.axhline(dense, color="#888888", linestyle=":", linewidth=1.2, label="whole gradients")
        axis.set_xscale("log")
        kept = sorted(measured["density"].unique())
        axis.set_xticks(kept, [f"{100 * value:g}" for value in kept])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("entries of a gradient that are kept, %")
        axis.set_ylabel("test accuracy, %")
        axis.set_title("What compression costs")
        per_cent(axis.yaxis)
        lost = len(table) - len(measured)
        notes = [f"{lost} of {len(table)} runs failed"] if lost else []
        below(figure, axis.get_legend_handles_labels()[0], notes)
    return figure
