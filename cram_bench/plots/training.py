"""Trainings: accuracy by epoch and second, and by what an optimizer keeps of a gradient."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cram_bench.checks import columns
from cram_bench.plots._style import Figure, below, in_order, legend, look, mean_lines, of_runs, per_cent, style


def training(table: pd.DataFrame) -> Figure:
    """Draw test accuracy against epochs and against seconds of training, a line per method, and the last epoch's
    against what the optimizer holds.

    Args:
        table: columns method, seed, epoch, seconds, accuracy and, for the bytes, megabytes. Seconds are means over
            seeds.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "epoch", "seconds", "accuracy")
    timed = table.assign(seconds=table.groupby(["method", "epoch"])["seconds"].transform("mean"))
    weighed = "megabytes" in table
    with style():
        figure = Figure(figsize=(12.4 if weighed else 9.2, 3.9))
        steps, *bytes_, time = figure.subplots(1, 3 if weighed else 2, sharey=True)
        for axis, x, title, words in (
            (steps, "epoch", "By steps", "epochs"),
            (time, "seconds", "By time", "seconds, training and evaluation"),
        ):
            mean_lines(axis, timed, x, "accuracy", band="std")
            axis.set_xlabel(words)
            axis.set_title(title)
        steps.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in bytes_:
            _by_bytes(axis, table)
        for axis in (steps, *bytes_, time):
            per_cent(axis.yaxis)
        steps.set_ylabel("test accuracy, %")
        legend(figure, time, table, "accuracy", "mean ± std")
    return figure


def _by_bytes(axis: Axes, table: pd.DataFrame) -> None:
    """Draw the last epoch's accuracy against megabytes: a point a method, and a bar of ± one standard deviation."""
    last = table.dropna(subset=["accuracy"]).sort_values("epoch").groupby(["method", "seed"], sort=False).tail(1)
    for method in in_order(last):
        own = last[last["method"] == method]
        _, colour, marker = look(method)
        spread = float(own["accuracy"].std(ddof=1)) if len(own) > 1 else 0.0
        axis.errorbar(
            [own["megabytes"].mean()], [own["accuracy"].mean()], yerr=[spread], fmt=marker, color=colour,
            markersize=7, elinewidth=1.2,
        )  # fmt: skip
    axis.set_title("By memory, at the end")
    axis.set_xlabel("MB that the optimizer holds (log scale)")
    held = last.loc[last["megabytes"] > 0, "megabytes"]
    if len(held) < len(last):  # plain SGD holds nothing
        axis.set_xscale("symlog", linthresh=float(held.min()) if len(held) else 1.0)
    else:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(numticks=12))  # by default as many as the user's letters leave room for
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


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
        most = max(measured.groupby(["density", "feedback"]).size(), default=0)
        notes += [f"lines: means of up to {most} seeds"] if most > 1 else []
        below(figure, axis.get_legend_handles_labels()[0], notes)
    return figure
