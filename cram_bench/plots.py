"""Tables → figures, in one style. A method keeps its colour and marker in every figure.

Every function takes a tidy table of `cram_bench.probes`, stacked over runs, and returns a matplotlib figure. Lines are
means over seeds; with two seeds or more a band is drawn and named in the legend: ± one standard deviation of accuracies,
lowest to highest of losses, which are drawn on log scales and may differ by orders of magnitude.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    SymmetricalLogLocator,
)

from cram_bench._checks import columns, integer, items
from cram_bench.compress import parse
from cram_bench.experiment import METHODS

# Okabe and Ito's palette, its yellow replaced, and a wine of Paul Tol's: distinguishable with colour-blind vision, of
# different lightness.
_PALETTE = (
    "#000000",
    "#0072B2",
    "#56B4E9",
    "#E69F00",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#A6761D",
    "#888888",
    "#882255",
)
_MARKERS = ("o", "s", "v", "^", "D", "P", "X", "*", "<", "p")

STYLE: dict[str, Any] = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.hashsalt": "cram_bench",  # the same table gives the same SVG
}


_STYLING = threading.RLock()  # matplotlib's settings are global, and the explorer draws in a thread of its own


@contextmanager
def style() -> Iterator[None]:
    """Use the house style for a block; matplotlib's own settings come back after it. One thread at a time."""
    with _STYLING, mpl.rc_context(STYLE):  # type: ignore[arg-type]
        yield


def look(method: str) -> tuple[str, str, str]:
    """Return (label, colour, marker) of a method: fixed by its place in `METHODS`."""
    names = list(METHODS)
    index = names.index(method) if method in names else len(names) + sum(map(ord, method)) % 3
    label = METHODS[method].label if method in METHODS else method
    return label, _PALETTE[index % len(_PALETTE)], _MARKERS[index % len(_MARKERS)]


def accuracy_vs_sparsity(table: pd.DataFrame, pattern: str = "global", chance: float | None = None) -> Figure:
    """Draw accuracy against sparsity, before and after BatchNorm tuning side by side.

    Args:
        table: columns method, seed, pattern, sparsity, calibrated, accuracy.
        pattern: which sparsity pattern to draw; the dense model belongs to all.
        chance: accuracy of guessing, a fraction, drawn as a dotted line.
    """
    columns(table, "method", "seed", "pattern", "sparsity", "calibrated", "accuracy")
    shown = table[(table["pattern"] == pattern) | (table["sparsity"] == 0)]
    panels = [flag for flag in (False, True) if (shown["calibrated"] == flag).any()]
    titles = {False: "Pruned in one shot", True: "Pruned in one shot, then BatchNorm tuned"}
    with style():
        figure = Figure(figsize=(4.6 * max(1, len(panels)), 3.9))
        axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
        for axis, flag in zip(axes, panels, strict=False):
            part = shown[shown["calibrated"] == flag]
            _lines(axis, _at_even_steps(axis, part), "step", "accuracy", band="std")
            if chance is not None:
                axis.axhline(chance, color="#888888", linestyle=":", linewidth=1.2)
                axis.annotate("guessing", (0, chance), (0, 3), textcoords="offset points", color="#666666", fontsize=8)
            axis.set_xlabel(f"sparsity, % of prunable weights ({pattern})")
            axis.set_title(titles[flag])
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes[0].set_ylabel("test accuracy, %")
        axes[0].set_ylim(0, 1.02)
        _legend(figure, axes[-1], table, "mean ± std")
    return figure


def equal_cost(table: pd.DataFrame) -> Figure:
    """Draw accuracy after pruning and BatchNorm tuning at equal epochs, and at equal gradient evaluations.

    Args:
        table: columns method, seed, epochs, gradients (evaluations an image), sparsity, calibrated, accuracy.
    """
    columns(table, "method", "seed", "epochs", "gradients", "pattern", "sparsity", "calibrated", "accuracy")
    shown = table[table["calibrated"] & (table["pattern"] == "global")]
    epochs, cost = shown["epochs"].min(), shown["gradients"].max()
    sides = {
        f"Equal epochs: {epochs:g}": shown[shown["epochs"] == epochs],
        f"Equal cost: {cost:g} gradients an image": shown[shown["gradients"] == cost],
    }
    with style():
        figure = Figure(figsize=(9.2, 3.9))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (title, part) in zip(axes, sides.items(), strict=True):
            _lines(axis, _at_even_steps(axis, part), "step", "accuracy", band="std")
            axis.set_title(title)
            axis.set_xlabel("sparsity, % of prunable weights (global)")
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes[0].set_ylabel("test accuracy, %")
        _legend(figure, axes[-1], table, "mean ± std")
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
        figure.colorbar(image, ax=axis, label="points of accuracy", ticks=[-limit, -1, 0, 1, limit], format="%+.3g")
    return figure


def transfer(table: pd.DataFrame, target: str, chance: float | None = None) -> Figure:
    """Draw accuracy on the new data against the sparsity that was held in fine-tuning, a line per source method.

    Args:
        table: columns method (of the source), seed, sparsity, accuracy.
        target: name of the new data.
        chance: accuracy of guessing, a fraction, drawn as a dotted line.
    """
    columns(table, "method", "seed", "sparsity", "accuracy")
    with style():
        figure = Figure(figsize=(5.6, 3.9))
        axis = figure.subplots()
        _lines(axis, _at_even_steps(axis, table), "step", "accuracy", band="std")
        if chance is not None:
            axis.axhline(chance, color="#888888", linestyle=":", linewidth=1.2)
        axis.set_xlabel("sparsity held while fine-tuning, %")
        axis.set_ylabel(f"test accuracy on {target}, %")
        axis.set_title("Fine-tuned sparse, by the method that made the source")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        _legend(figure, axis, table, "mean ± std")
    return figure


def loss_in_ball(table: pd.DataFrame) -> Figure:
    """Draw the loss in random filter-normalised directions: mean over directions and seeds, band from lowest to highest.

    Args:
        table: columns method, seed, direction, a, loss.
    """
    columns(table, "method", "seed", "direction", "a", "loss")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        _lines(axis, table, "a", "loss")
        _log(axis)
        axis.set_xlabel("distance from the trained weights, in filter norms")
        axis.set_ylabel("training loss, nats (log scale)")
        axis.set_title("Loss in random directions")
        _legend(figure, axis, table, "lowest to highest")
    return figure


def loss_along_compression(table: pd.DataFrame) -> Figure:
    """Draw the loss on the way from the dense to the pruned weights, a panel per sparsity.

    Args:
        table: columns method, seed, compressor (specification), t, loss.
    """
    columns(table, "method", "seed", "compressor", "t", "loss")
    compressors = list(dict.fromkeys(table["compressor"].dropna()))
    with style():
        figure = Figure(figsize=(3.6 * len(compressors) + 0.8, 3.8))
        axes = figure.subplots(1, len(compressors), sharey=True, squeeze=False)[0]
        for axis, compressor in zip(axes, compressors, strict=True):
            _lines(axis, table[table["compressor"] == compressor], "t", "loss")
            _log(axis)
            target = parse(compressor)
            axis.set_title(f"to {target.pattern}, {100 * target.sparsity:g} % zeros")
            axis.set_xlabel("t:  0 dense,  1 pruned")
        axes[0].set_ylabel("training loss, nats (log scale)")
        _legend(figure, axes[-1], table, "lowest to highest")
    return figure


def gaps(table: pd.DataFrame) -> Figure:
    """Draw the CrAM gap against sparsity.

    Args:
        table: columns method, seed, sparsity, gap (nats), rho.
    """
    columns(table, "method", "seed", "sparsity", "gap", "rho")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        _lines(axis, _at_even_steps(axis, table), "step", "gap")
        if linear := not table["gap"].min() > 0.01:  # a gap may be nothing, or negative
            axis.axhline(0, color="#888888", linewidth=0.8)
        _log(axis, 0.01 if linear else 0.0)
        axis.set_xlabel("sparsity, % of prunable weights that are zero")
        axis.set_ylabel("L(C(θ + ρg)) − L(θ), nats\n" + ("(linear to 0.01, then log)" if linear else "(log scale)"))
        axis.set_title(f"CrAM gap at ρ = {table['rho'].dropna().iloc[0]:g}")
        _legend(figure, axis, table, "lowest to highest")
    return figure


def sharpness(table: pd.DataFrame) -> Figure:
    """Draw SAM-sharpness against its radius.

    Args:
        table: columns method, seed, rho, sharpness (nats).
    """
    columns(table, "method", "seed", "rho", "sharpness")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        _lines(axis, table, "rho", "sharpness")
        axis.set_xscale("log")
        _log(axis)
        radii = sorted(table["rho"].dropna().unique())
        axis.set_xticks(radii, [f"{radius:g}" for radius in radii])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("radius ρ, Euclidean distance in weights (log scale)")
        axis.set_ylabel("L(θ + ρg/‖g‖) − L(θ), nats (log scale)")
        axis.set_title("SAM-sharpness")
        _legend(figure, axis, table, "lowest to highest")
    return figure


_QUANTITIES = {
    "loss": "loss, nats",
    "gap": "CrAM gap, nats",
    "sharpness": "SAM-sharpness, nats",
    "eigenvalue": "top eigenvalue of the Hessian,\nnats per squared weight",
    "trace": "trace of the Hessian,\nnats per squared weight",
}


def stability(table: pd.DataFrame) -> Figure:
    """Draw what `cram_bench.probes.stability` measures, a panel a quantity: a point per seed, a bar at their mean.

    Thin vertical lines are standard errors over parts of the sample, where the table has them (``QUANTITY_error``).

    Args:
        table: columns method, seed, weights (``dense`` or a compressor's specification), loss, gap, sharpness,
            eigenvalue, trace.
    """
    columns(table, "method", "seed", "weights", *_QUANTITIES)
    methods = _methods(table)
    step = 0.7 / len(methods)
    with style():
        figure = Figure(figsize=(10.2, 3.6))
        axes = figure.subplots(1, len(_QUANTITIES))
        for axis, (quantity, name) in zip(axes, _QUANTITIES.items(), strict=True):
            shown = table.dropna(subset=["weights", quantity])
            groups = list(dict.fromkeys(shown["weights"]))
            for place, weights in enumerate(groups):
                for number, method in enumerate(methods):
                    part = shown[(shown["weights"] == weights) & (shown["method"] == method)]
                    values, errors = part[quantity], part.get(f"{quantity}_error")
                    _, colour, marker = look(method)
                    x = place + (number - (len(methods) - 1) / 2) * step
                    axis.errorbar(
                        [x] * len(values), values, errors, color=colour, marker=marker, linestyle="", alpha=0.75,
                        elinewidth=0.8, markeredgecolor="white", markeredgewidth=0.5,
                    )  # fmt: skip
                    if len(values) > 1:
                        axis.hlines(values.mean(), x - 0.42 * step, x + 0.42 * step, color=colour)
            if len(shown):
                _log(axis, 0.0 if shown[quantity].min() > 0 else 0.01 * float(shown[quantity].abs().max()))
            axis.set_xticks(range(len(groups)), [_weights(weights) for weights in groups])
            axis.set_xlim(-0.5, max(1, len(groups)) - 0.5)
            axis.tick_params(axis="x", length=0)
            axis.set_xlabel("weights")
            axis.set_ylabel(name)
        figure.suptitle("Lower is more stable (log scales)", fontsize=10, fontweight="bold", x=0.01, ha="left")
        measured = set(table.dropna(subset=["loss"])["method"])
        seeds = table["seed"].nunique()
        handles = [
            Line2D(
                [], [], color=colour, marker=marker, linestyle="", label=label + ("" if m in measured else ": failed")
            )
            for m, (label, colour, marker) in ((method, look(method)) for method in methods)
        ]
        if seeds > 1:
            handles.append(Line2D([], [], color="#888888", label=f"mean of {seeds} seeds"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _weights(name: str) -> str:
    if name == "dense":
        return "dense"
    target = parse(name)
    return f"{target.pattern},\n{100 * target.sparsity:g} % zeros"


def loss_planes(table: pd.DataFrame) -> Figure:
    """Draw the loss on a random plane through each method's weights, as contours of equal levels on a log scale.

    Args:
        table: columns method, a, b, loss; one seed.
    """
    columns(table, "method", "a", "b", "loss")
    methods = _methods(table.dropna(subset=["loss"]))
    low, high = np.log10(table["loss"].min()), np.log10(table["loss"].max())
    levels = np.linspace(low, max(high, low + 0.1), 13)
    with style(), mpl.rc_context({"axes.grid": False}):
        figure = Figure(figsize=(3.1 * len(methods) + 1.0, 3.5))
        axes = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
        filled = None
        for axis, method in zip(axes, methods, strict=True):
            grid = table[table["method"] == method].pivot_table(index="b", columns="a", values="loss")
            filled = _contours(axis, grid, levels)
            axis.plot(0, 0, "w+", markersize=9, markeredgewidth=1.8)
            axis.set_aspect("equal")
            axis.set_title(look(method)[0])
            axis.set_xlabel("direction 1, filter norms")
        axes[0].set_ylabel("direction 2, filter norms")
        if filled is not None:
            _loss_bar(figure.colorbar(filled, ax=list(axes), shrink=0.85), levels, "training loss")
    return figure


def layer_sensitivity(table: pd.DataFrame) -> Figure:
    """Draw the rise of the loss when one layer alone is pruned, a row per layer and a column per sparsity.

    Args:
        table: columns layer, weights, sparsity, rise; of one model.
    """
    columns(table, "layer", "weights", "sparsity", "rise")
    grid = table.pivot_table(index="layer", columns="sparsity", values="rise", sort=False)
    weights = table.drop_duplicates("layer").set_index("layer")["weights"]
    with style(), mpl.rc_context({"axes.grid": False}):
        figure = Figure(figsize=(0.75 * grid.shape[1] + 4.4, max(3.2, 0.27 * len(grid) + 1.3)))
        axis = figure.subplots()
        limit = max(0.1, float(grid.to_numpy().max()))
        image = axis.imshow(
            grid.clip(lower=0), cmap="cividis_r", norm=SymLogNorm(0.01, vmin=0, vmax=limit), aspect="auto"
        )
        axis.set_xticks(range(grid.shape[1]), [f"{100 * level:g}" for level in grid.columns])
        axis.set_yticks(range(len(grid)), [f"{name} ({weights[name]:,})" for name in grid.index], fontsize=7.5)
        axis.tick_params(length=0)
        axis.set_xlabel("sparsity of this layer alone, %")
        axis.set_title("Which layer breaks it", loc="left")
        bar = figure.colorbar(image, ax=axis, label="rise of the loss, nats\n(linear to 0.01, then log)")
        bar.formatter = FuncFormatter(_plain)
        bar.update_ticks()
    return figure


def layer_profile(tables: Mapping[str, pd.DataFrame], methods: Mapping[str, str] | None = None) -> Figure:
    """Draw how sparse every layer becomes and, where it is known, what that layer alone costs; a line a model.

    Args:
        tables: label → columns layer, sparsity and perhaps rise (nats); all of the same layers.
        methods: label → method, which decides the look; by default the labels are methods.
    """
    for table in items("tables", list(tables.values()), "tables"):
        columns(table, "layer", "sparsity")
    blamed = all("rise" in table for table in tables.values())
    with style():
        layers = list(next(iter(tables.values()))["layer"])
        figure = Figure(figsize=(8.2 if blamed else 5.2, 0.19 * len(layers) + 1.5))
        axes = figure.subplots(1, 2 if blamed else 1, sharey=True, squeeze=False)[0]
        for axis, column in zip(axes, ("sparsity", "rise"), strict=False):
            for label, colour, marker, dashes, table in _looks(tables, methods):
                axis.plot(
                    table[column], range(len(table)), color=colour, marker=marker, label=label, linewidth=1, linestyle=dashes,
                    markeredgecolor="white", markeredgewidth=0.5,
                )  # fmt: skip
        axes[0].set_yticks(range(len(layers)), layers, fontsize=7)
        axes[0].set_ylim(len(layers) - 0.5, -0.5)
        axes[0].set_xlim(-0.02, 1.02)
        axes[0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes[0].set_xlabel("zeros in the layer, %")
        axes[0].set_title("Where the zeros are")
        if blamed:
            axes[1].set_xscale("symlog", linthresh=0.01)
            axes[1].set_xlabel("rise of the loss by this layer alone, nats\n(linear to 0.01, then log)")
            axes[1].set_title("Which layer breaks it (untuned)")
        figure.legend(handles=axes[0].get_legend_handles_labels()[0], loc="outside lower center", ncols=3)
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
        for label, colour, marker, dashes, table in _looks(tables, methods):
            axis.plot(table["t"], table["loss"], color=colour, label=label, linestyle=dashes)
            at = table.iloc[(table["t"] - 1).abs().argmin()]
            axis.plot(at["t"], at["loss"], color=colour, marker=marker, markersize=8, markeredgecolor="white")
        _log(axis)
        axis.set_xlabel("t:  0 dense,  1 compressed")
        axis.set_ylabel("loss, nats (log scale)")
        axis.set_title("Loss on the way there (untuned)")
        figure.legend(loc="outside lower center", ncols=1 if len(tables) > 2 else 2, fontsize=8)
    return figure


def _looks(
    tables: Mapping[str, pd.DataFrame], methods: Mapping[str, str] | None
) -> Iterator[tuple[str, str, str, str, pd.DataFrame]]:
    """Yield (label, colour, marker, line style, table): a method's second run is dashed, its third dotted."""
    seen: dict[str, int] = {}
    for label, table in tables.items():
        method = methods[label] if methods else label
        name, colour, marker = look(method)
        number = seen[method] = seen.get(method, -1) + 1
        yield (label if methods else name), colour, marker, ("-", "--", ":", "-.")[number % 4], table


def explorer_curve(
    curves: Mapping[str, pd.DataFrame],
    points: Mapping[str, Any],
    methods: Mapping[str, str],
    sparsity: float,
    chance: float,
) -> Figure:
    """Draw what the explorer knows of accuracy against sparsity, and the point it is at.

    Args:
        curves: label → columns sparsity, accuracy.
        points: label → something with an accuracy, or None.
        methods: label → method, which decides the look.
        sparsity: where the points are.
        chance: accuracy of guessing, a fraction.
    """
    with style():
        figure = Figure(figsize=(5.4, 3.2))
        axis = figure.subplots()
        for label, colour, marker, dashes, curve in _looks(curves, methods):
            axis.plot(curve["sparsity"], curve["accuracy"], color=colour, label=label, linewidth=1.5, linestyle=dashes)
            if points[label] is not None:
                axis.plot(
                    sparsity, points[label].accuracy, color=colour, marker=marker, markersize=9, markeredgecolor="white"
                )
        axis.axvline(sparsity, color="#888888", linewidth=0.8)
        axis.axhline(chance, color="#888888", linestyle=":", linewidth=1.2)
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(0, 1.02)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axis.set_xlabel("sparsity, % of prunable weights that are zero")
        axis.set_ylabel("accuracy on the sample, %")
        axis.set_title("Accuracy against sparsity")
        if curves:
            figure.legend(loc="outside lower center", ncols=1 if len(curves) > 2 else 2, fontsize=8)
    return figure


def examples(images: Any, captions: Sequence[str], title: str, columns: int = 6) -> Figure:
    """Draw images with a caption each.

    Args:
        images: uint8 tensor, shape (n, channels, height, width); none leaves a line of text.
        captions: one for each.
        title: over all.
        columns: images a row.
    """
    integer("columns", columns, 1)
    if len(images) != len(captions):
        raise ValueError(f"there must be a caption an image, {len(images)}, not {len(captions)}")
    rows = max(1, -(-len(captions) // columns))
    with style(), mpl.rc_context({"axes.grid": False}):
        figure = Figure(figsize=(1.25 * columns, 1.5 * rows + 0.5))
        figure.suptitle(title, fontsize=10, fontweight="bold", x=0.02, ha="left")
        for axis, index in zip(figure.subplots(rows, columns, squeeze=False).flat, range(rows * columns), strict=True):
            axis.set_axis_off()
            if index < len(captions):
                image = images[index].permute(1, 2, 0).cpu().numpy()
                axis.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray_r", interpolation="nearest")
                axis.set_title(captions[index], fontsize=7, loc="center", fontweight="normal")
    return figure


def spectral_density(table: pd.DataFrame) -> Figure:
    """Draw the density of the curvature's eigenvalues on a log scale.

    Args:
        table: columns method, seed, eigenvalue, density.
    """
    columns(table, "method", "seed", "eigenvalue", "density")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        for method in _methods(table):
            label, colour, _ = look(method)
            for number, (_, part) in enumerate(table[table["method"] == method].groupby("seed")):
                axis.plot(
                    part["eigenvalue"],
                    part["density"],
                    color=colour,
                    label=(label if part["density"].notna().any() else f"{label}: failed") if number == 0 else None,
                    linewidth=1.3,
                )
        axis.set_yscale("log")
        axis.set_ylim(bottom=1e-8)
        axis.set_xlabel("eigenvalue of the Hessian, nats per squared weight")
        axis.set_ylabel("density (log scale)")
        axis.set_title("Spectrum of the curvature")
        figure.legend(loc="outside lower center", ncols=3)  # at their ends the lines are anywhere
    return figure


def loss_on_plane(
    grid: pd.DataFrame, corners: pd.DataFrame, names: Sequence[str] = ("dense", "pruned", "fine-tuned")
) -> Figure:
    """Draw the loss on the plane through three models, as contours on a log scale, with the path between them.

    Args:
        grid: columns a, b (Euclidean distance between weights), loss.
        corners: columns a, b of the three models, in the order of the path.
        names: of the three models.
    """
    columns(grid, "a", "b", "loss")
    losses = grid.pivot_table(index="b", columns="a", values="loss")
    low, high = (float(np.log10(bound)) for bound in (losses.to_numpy().min(), losses.to_numpy().max()))
    levels = np.linspace(low, max(high, low + 0.1), 13)
    with style(), mpl.rc_context({"axes.grid": False}):
        figure = Figure(figsize=(5.4, 4.4))
        axis = figure.subplots()
        filled = _contours(axis, losses, levels)
        axis.plot(corners["a"], corners["b"], color="white", marker="o", linewidth=1.6, markeredgecolor="black")
        for name, a, b in zip(names, corners["a"], corners["b"], strict=True):
            left = a > grid["a"].median()  # a name stays inside the axes
            axis.annotate(
                name, (a, b), (-7 if left else 7, 6), textcoords="offset points", ha="right" if left else "left",
                color="white", fontweight="bold", fontsize=9,
            )  # fmt: skip
        width, height = (float(np.ptp(side.to_numpy(dtype=float))) for side in (losses.columns, losses.index))
        axis.set_aspect("equal" if 0.4 < height / width < 2.5 else "auto")
        axis.set_xlabel("along the first step, distance between weights")
        axis.set_ylabel("orthogonal to it")
        axis.set_title("The plane through three models")
        _loss_bar(figure.colorbar(filled, ax=axis), levels, "loss")
    return figure


def _contours(axis: Axes, losses: pd.DataFrame, levels: np.ndarray) -> Any:
    """Fill and draw the contours of a grid of losses; the levels are logarithms to base 10."""
    where = (losses.columns, losses.index, np.log10(losses.to_numpy()), levels)
    axis.contour(*where, colors="white", linewidths=0.4, linestyles="solid", zorder=1.5)
    return axis.contourf(*where, cmap="cividis", extend="both")


def _loss_bar(bar: Any, levels: np.ndarray, name: str) -> None:
    ticks = np.linspace(levels[0], levels[-1], 5)
    bar.set_ticks(list(ticks), labels=[_plain(float(f"{10**tick:.2g}")) for tick in ticks])
    bar.set_label(f"{name}, nats (log scale)")


def _methods(table: pd.DataFrame) -> list[str]:
    present = list(dict.fromkeys(table["method"]))
    known = [method for method in METHODS if method in present]
    return known + [method for method in present if method not in known]


def _at_even_steps(axis: Axes, table: pd.DataFrame) -> pd.DataFrame:
    """Give every sparsity a place at equal steps: the interesting ones crowd near 1 on a linear axis."""
    levels = sorted(table["sparsity"].dropna().unique())
    axis.set_xticks(range(len(levels)), ["dense" if s == 0 else f"{100 * s:g}" for s in levels])
    return table.assign(step=table["sparsity"].map({level: index for index, level in enumerate(levels)}))


def _log(axis: Axes, linear: float = 0.0) -> None:
    """Make the y axis of what was drawn logarithmic, linear up to `linear`, with plain numbers at its ticks."""
    if linear:
        axis.set_yscale("symlog", linthresh=linear)
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
    else:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        locator = LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,))
        inside = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
        axis.yaxis.set_major_locator(locator if len(inside) > 1 else MaxNLocator(5))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}".replace("-", "−")


def _lines(axis: Axes, table: pd.DataFrame, x: str, y: str, band: str = "range") -> None:
    """Draw a line per method: the mean, and a band of ± one standard deviation (std) or from lowest to highest (range)."""
    for method in _methods(table):
        _line(axis, table[table["method"] == method], x, y, method, band)


def _line(axis: Axes, table: pd.DataFrame, x: str, y: str, method: str, band: str) -> None:
    label, colour, marker = look(method)
    grouped = table.dropna(subset=[x, y]).groupby(x)[y]
    mean, deviation, count = grouped.mean(), grouped.std(ddof=1), grouped.count()
    axis.plot(
        mean.index,
        mean.to_numpy(),
        color=colour,
        marker=marker,
        label=label,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )
    if (count > 1).any():
        low, high = (mean - deviation, mean + deviation) if band == "std" else (grouped.min(), grouped.max())
        axis.fill_between(mean.index, low.to_numpy(), high.to_numpy(), color=colour, alpha=0.22, linewidth=0)


def _label_lines(axis: Axes) -> None:
    """Write every line's label at its right end, in its colour, pushed apart where ends lie close."""
    lines = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
    ends = []
    for line in lines:
        points = np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float)
        points = points[np.isfinite(points).all(axis=1)]
        if axis.get_yscale() == "log":
            points = points[points[:, 1] >= axis.get_ylim()[0]]  # from where the line is last seen
        if len(points):
            height = float(axis.transAxes.inverted().transform(axis.transData.transform(points[-1]))[1])
            ends.append((min(max(height, 0.0), 1.0), points[-1], line))
    ends.sort(key=lambda end: end[0])
    gap, places = 0.075, [end[0] for end in ends]
    for index in range(1, len(places)):  # upwards, then down again from the top edge
        places[index] = max(places[index], places[index - 1] + gap)
    for index in reversed(range(len(places))):
        places[index] = min(places[index], 1.0 - gap * (len(places) - 1 - index))
    for place, (_, point, line) in zip(places, ends, strict=True):
        axis.annotate(
            str(line.get_label()), xy=(float(point[0]), float(point[1])), xytext=(1.03, place), textcoords="axes fraction",
            color=line.get_color(), va="center", fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "shrinkB": 3, "shrinkA": 0},
        )  # fmt: skip


def _legend(figure: Figure, axis: Axes, table: pd.DataFrame, band: str) -> None:
    """Label the lines where they end, and say below what the band is."""
    figure.draw_without_rendering()  # the layout decides where the ends are
    _label_lines(axis)
    handles: list[Any] = []
    drawn = {line.get_label() for a in figure.axes for line in a.get_lines() if np.isfinite(line.get_ydata()).any()}
    for label, colour, _ in map(look, _methods(table)):
        if label not in drawn:
            handles.append(Line2D([], [], color=colour, label=f"{label}: failed"))
    seeds = table["seed"].nunique()
    directions = table["direction"].nunique() if "direction" in table else 1
    if seeds > 1 or directions > 1:
        count = f"{seeds} seed{'s' if seeds > 1 else ''}" + (f" × {directions} directions" if directions > 1 else "")
        handles.append(Line2D([], [], color="#888888", alpha=0.35, linewidth=7, label=f"{band}, {count}"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
