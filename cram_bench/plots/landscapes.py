"""The loss along lines and on planes through weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from cram_bench.checks import columns, items
from cram_bench.plots._style import (
    Figure,
    contours,
    in_order,
    legend,
    log_axis,
    look,
    looks,
    loss_bar,
    mean_lines,
    of_runs,
    one_each,
    outlined,
    style,
)
from cram_bench.prune import parse


def loss_in_ball(table: pd.DataFrame) -> Figure:
    """Draw the loss in random filter-normalised directions: mean over them and seeds, band from lowest to highest.

    Args:
        table: columns method, seed, direction, a, loss; without method and seed, it is that of one model.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "direction", "a", "loss")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        mean_lines(axis, table, "a", "loss")
        log_axis(axis)
        axis.set_xlabel("distance from the trained weights, in filter norms")
        axis.set_ylabel("loss, nats (log scale)")
        axis.set_title("Loss in random directions")
        legend(figure, axis, table, "loss", "lowest to highest")
    return figure


def loss_along_compression(table: pd.DataFrame) -> Figure:
    """Draw the loss on the way from the dense to the pruned weights, a panel per sparsity.

    Args:
        table: columns method, seed, compressor (specification), t, loss.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "compressor", "t", "loss")
    compressors = list(dict.fromkeys(table["compressor"].dropna()))
    with style():
        figure = Figure(figsize=(3.6 * len(compressors) + 0.8, 3.8))
        axes = figure.subplots(1, len(compressors), sharey=True, squeeze=False)[0]
        for axis, compressor in zip(axes, compressors, strict=True):
            mean_lines(axis, table[table["compressor"] == compressor], "t", "loss")
            log_axis(axis)
            target = parse(compressor)
            axis.set_title(f"to {target.pattern}, {100 * target.sparsity:g} % zeros")
            axis.set_xlabel("t:  0 dense,  1 pruned")
        axes[0].set_ylabel("loss, nats (log scale)")
        legend(figure, axes[-1], table, "loss", "lowest to highest")
    return figure


def loss_planes(table: pd.DataFrame) -> Figure:
    """Draw the loss on a random plane through each method's weights, as contours of equal levels on a log scale.

    Args:
        table: columns method, a, b, loss; one seed.

    Raises:
        ValueError: the table holds several planes of a method, such as those of several seeds.
    """
    table = of_runs(table)
    columns(table, "method", "a", "b", "loss")
    methods = in_order(table.dropna(subset=["loss"]))
    grids = {method: _plane(table[table["method"] == method].dropna(subset=["loss"])) for method in methods}
    levels = _levels(table["loss"])
    with style():
        figure = Figure(figsize=(3.1 * len(methods) + 1.0, 3.5))
        axes = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
        filled = None
        for axis, method in zip(axes, methods, strict=True):
            axis.grid(False)
            filled = contours(axis, grids[method], levels)
            axis.plot(0, 0, "w+", markersize=9, markeredgewidth=1.8, path_effects=outlined(3.2))
            axis.set_aspect("equal")
            axis.set_title(look(method)[0])
            axis.set_xlabel("direction 1, filter norms")
        axes[0].set_ylabel("direction 2, filter norms")
        if failed := [look(method)[0] for method in in_order(table) if method not in methods]:
            figure.suptitle(f"failed: {', '.join(failed)}", fontsize=9, x=0.01, ha="left")
        if filled is not None:
            loss_bar(figure.colorbar(filled, ax=list(axes), shrink=0.85), levels, "loss")
    return figure


def _plane(table: pd.DataFrame) -> pd.DataFrame:
    """Lay losses out with b downwards and a to the right, both rising."""
    return one_each(table, "b", "a", "loss").sort_index().sort_index(axis=1)


def _levels(losses: pd.Series) -> np.ndarray:
    """Return 13 levels from the lowest to the highest loss, as logarithms to base 10.

    Far from the models BatchNorm's mixed statistics fit nothing, and losses of 10³⁰ would leave one colour for all that
    is of interest: the highest level is at most 100 nats or a thousand times the lowest loss, and what lies above has
    its colour.
    """
    finite = np.log10(losses[np.isfinite(losses)].clip(lower=1e-12))
    if not len(finite):
        raise ValueError("the table must hold losses, and none is finite")
    low = finite.min()
    return np.linspace(low, max(min(finite.max(), max(low + 3, 2.0)), low + 0.1), 13)


def loss_along_path(table: pd.DataFrame, ends: tuple[str, str] = ("first model", "second model")) -> Figure:
    """Draw the loss on the straight line from one model to another, and beyond.

    Args:
        table: columns t, loss, of `cram_bench.probes.loss_along_path`; with method and seed, a line per method.
        ends: what lies at t = 0 and at t = 1.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "t", "loss")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        mean_lines(axis, table, "t", "loss")
        log_axis(axis)
        axis.set_xlabel(f"t:  0 {ends[0]},  1 {ends[1]}")
        axis.set_ylabel("loss, nats (log scale)")
        axis.set_title("Loss on the line between two models")
        legend(figure, axis, table, "loss", "lowest to highest")
    return figure


def loss_slice(tables: Mapping[str, pd.DataFrame], methods: Mapping[str, str] | None = None) -> Figure:
    """Draw the loss from the dense to the compressed weights, the compressed point marked; nothing is tuned on the way.

    Args:
        tables: label → columns t, loss (nats).
        methods: label → method, which decides the look; by default the labels are methods.
    """
    for table in items("tables", list(tables.values()), "tables"):
        columns(table, "t", "loss")
    with style():
        figure = Figure(figsize=(4.6, 3.2))
        axis = figure.subplots()
        for label, colour, marker, dashes, table in looks(tables, methods):
            axis.plot(
                table["t"], table["loss"], color=colour, label=label, linestyle=dashes, marker=marker, markevery=[]
            )
            at = table.iloc[(table["t"] - 1).abs().argmin()]
            axis.plot(at["t"], at["loss"], color=colour, marker=marker, markersize=8, markeredgecolor="white")
        log_axis(axis)
        axis.set_xlabel("t:  0 dense,  1 compressed")
        axis.set_ylabel("loss, nats (log scale)")
        axis.set_title("Loss on the way there (untuned)")
        figure.legend(loc="outside lower center", ncols=1 if len(tables) > 2 else 2, fontsize=8)
    return figure


def loss_on_plane(
    grid: pd.DataFrame, corners: pd.DataFrame, names: Sequence[str] = ("dense", "pruned", "fine-tuned")
) -> Figure:
    """Draw the loss on the plane through three models, as contours on a log scale, with the path between them.

    Args:
        grid: columns a, b (Euclidean distance between weights), loss.
        corners: columns a, b of the three models, in the order of the path.
        names: of the three models.

    Raises:
        ValueError: the grid holds several losses of a point, or there is not a name for each corner.
    """
    columns(grid, "a", "b", "loss")
    columns(corners, "a", "b")
    if len(names) != len(corners):
        raise ValueError(f"there must be a name a corner, {len(corners)}, not {len(names)}")
    losses, levels = _plane(grid), _levels(grid["loss"])
    width, height = (float(np.ptp(side.to_numpy(dtype=float))) for side in (losses.columns, losses.index))
    shape = height / width if 0.4 < height / width < 2.5 else 1.0
    with style():
        figure = Figure(figsize=(max(4.0, 3.4 / max(shape, 1.0) + 2.0), 3.4 * min(shape, 1.0) + 1.0))
        axis = figure.subplots()
        axis.grid(False)
        filled = contours(axis, losses, levels)
        axis.plot(
            corners["a"], corners["b"], color="white", marker="o", linewidth=1.6, markeredgecolor="black",
            path_effects=outlined(3.0),
        )  # fmt: skip
        for place, (name, a, b) in enumerate(zip(names, corners["a"], corners["b"], strict=True)):
            left = a > grid["a"].median()  # a name stays inside the axes
            under = place % 2 == 1  # the first two lie at one height, and may be near each other
            axis.annotate(
                name, (a, b), (-7 if left else 7, -6 if under else 6), textcoords="offset points",
                ha="right" if left else "left", va="top" if under else "baseline", color="white", fontweight="bold",
                fontsize=9, path_effects=outlined(2.5),
            )  # fmt: skip
        axis.set_aspect("equal" if 0.4 < height / width < 2.5 else "auto")
        axis.set_xlabel("along the first step, distance between weights")
        axis.set_ylabel("orthogonal to it")
        axis.set_title("The plane through three models")
        loss_bar(figure.colorbar(filled, ax=axis), levels, "loss")
    return figure
