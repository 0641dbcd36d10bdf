"""Pruners against each other: accuracy, a row a pruner, a panel a sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from cram_bench.checks import columns
from cram_bench.plots._style import Figure, below, in_order, look, of_runs, per_cent, style, visible


def pruners(table: pd.DataFrame, by: str = "method") -> Figure:
    """Draw accuracy after pruning, a row a pruner, a panel a sparsity; means with bars of ± one standard deviation over
    seeds.

    Args:
        table: of `cram_bench.probes.pruners`: columns pattern, sparsity, correction, accuracy, and perhaps method and
            seed.
        by: what has a colour and a marker each: ``method``, with one row per pruner and correction, or ``correction``.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "pattern", "sparsity", "correction", "accuracy")
    if by not in ("method", "correction"):
        raise ValueError(f"by must be method or correction, not {by!r}")
    shown = table[(table["sparsity"] > 0) & table["accuracy"].notna()]
    several = shown.loc[shown["pattern"] != "chosen", "correction"].nunique() > 1
    names = {
        (pattern, correction): pattern
        if by == "correction" or not several or pattern == "chosen"
        else f"{pattern}, {correction}"
        for pattern, correction in shown[["pattern", "correction"]].drop_duplicates().itertuples(index=False)
    }
    shown = shown.assign(row=[names[key] for key in zip(shown["pattern"], shown["correction"], strict=True)])
    blocks = _blocks(shown)
    groups = in_order(shown) if by == "method" else list(dict.fromkeys(shown["correction"]))
    looks = {"none": ("as pruned", "#888888", "o"), "batchnorm": ("BatchNorm tuned", "#009E73", "s"),
             "statistics": ("statistics corrected", "#0072B2", "D"), "chosen": ("chosen", "#000000", "P")}  # fmt: skip
    with style():
        wide = max((len(levels) for levels, _ in blocks), default=1)
        heights = [0.3 * len(rows) + 0.9 for _, rows in blocks] or [1.0]
        figure = Figure(figsize=(2.7 * wide + 2.2, sum(heights) + 0.7))
        grid = figure.add_gridspec(len(heights), wide, height_ratios=heights)
        for number, (levels, rows) in enumerate(blocks):
            first: Axes | None = None
            for place, level in enumerate(levels):
                axis = figure.add_subplot(grid[number, place], sharey=first)
                first = first or axis
                axis.tick_params(labelleft=axis is first)
                _panel(axis, shown[shown["sparsity"] == level], rows, by, groups, looks)
                axis.set_title(f"{100 * level:g} % zeros")
                if number == len(blocks) - 1 or place >= len(blocks[number + 1][0]):
                    axis.set_xlabel("test accuracy, %")
        handles = []
        for group in groups:
            text, colour, marker = look(group) if by == "method" else looks[group]
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=visible(text)))
        seeds = int(shown.groupby(["method", "row", "sparsity"])["seed"].nunique().max()) if len(shown) else 0
        below(figure, handles, (f"mean ± std of {seeds} seeds",) if seeds > 1 else ())
    return figure


def _blocks(shown: pd.DataFrame) -> list[tuple[list[float], list[str]]]:
    """Return sparsities and their rows, those that share rows together.

    Patterns n:m have a sparsity to themselves: beside the others it would be a panel of empty rows.
    """
    at = {float(str(level)): set(own) for level, own in shown.groupby("sparsity")["row"]}
    most = max(map(len, at.values()), default=0)
    parts = (
        [level for level in at if 2 * len(at[level]) >= most],
        [level for level in at if 2 * len(at[level]) < most],
    )
    every = list(dict.fromkeys(shown["row"]))
    return [(part, [row for row in every if any(row in at[level] for level in part)]) for part in parts if part]


def _panel(
    axis: Axes,
    part: pd.DataFrame,
    rows: Sequence[str],
    by: str,
    groups: Sequence[str],
    looks: Mapping[str, tuple[str, str, str]],
) -> None:
    """Draw the accuracies of one sparsity, a row a pruner."""
    for place, group in enumerate(groups):
        _, colour, marker = look(group) if by == "method" else looks[group]
        own = part[part[by] == group].groupby("row")["accuracy"].agg(["mean", "std"]).reindex(list(rows))
        offset = 0.5 * ((place + 0.5) / len(groups) - 0.5)
        axis.errorbar(
            own["mean"], [row + offset for row in range(len(rows))], xerr=own["std"].fillna(0.0), fmt=marker,
            color=colour, markersize=5, elinewidth=1.2, linestyle="",
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [visible(row) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    per_cent(axis.xaxis)


def specialist(table: pd.DataFrame) -> Figure:
    """Draw accuracy on the target classes, a row per pruner, correction and where its samples came from, a panel per
    sparsity.

    Points are draws, the line their mean.

    Args:
        table: of `cram_bench.probes.specialist`: columns pattern, sparsity, looked, corrected, correction, accuracy,
            task_accuracy.
    """
    columns(table, "pattern", "sparsity", "looked", "corrected", "correction", "accuracy", "task_accuracy")
    shown = table[table["sparsity"] > 0].fillna("")
    looked = shown["looked"].map(lambda text: f", looked at {text}" if text else "")
    corrected = shown["correction"] + shown["corrected"].map(lambda text: f" on {text}" if text else "")
    shown = shown.assign(row=shown["pattern"] + looked + "; " + corrected)
    rows, levels = list(dict.fromkeys(shown["row"])), sorted(shown["sparsity"].unique())
    kinds = {
        "accuracy": ("among all classes", "#0072B2", "o", -0.12),
        "task_accuracy": ("among the target classes", "#E69F00", "s", 0.12),
    }
    dense = table[table["sparsity"] == 0]
    with style():
        figure = Figure(figsize=(2.7 * max(1, len(levels)) + 3.6, 0.3 * len(rows) + 1.6))
        axes = figure.subplots(1, max(1, len(levels)), sharey=True, squeeze=False)[0]
        for axis, level in zip(axes, levels, strict=False):
            part = shown[shown["sparsity"] == level]
            for value, (_, colour, marker, offset) in kinds.items():
                for place, row in enumerate(rows):
                    own = part.loc[part["row"] == row, value]
                    axis.plot(own, [place + offset] * len(own), marker, color=colour, markersize=3, alpha=0.45)
                    axis.plot(
                        [own.mean()] * 2, [place + offset - 0.14, place + offset + 0.14], color=colour, linewidth=2.2
                    )
                if len(dense):
                    axis.axvline(dense[value].mean(), color=colour, linestyle=":", linewidth=1.1)
            axis.set_yticks(range(len(rows)), [visible(row) for row in rows])
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.set_title(f"{100 * level:g} % zeros")
            axis.set_xlabel("accuracy on the task, %")
            per_cent(axis.xaxis)
        handles = [
            Line2D([], [], color=colour, marker=marker, label=text) for text, colour, marker, _ in kinds.values()
        ]
        handles.append(Line2D([], [], color="#888888", linestyle=":", label="dense"))
        below(figure, handles)
    return figure
