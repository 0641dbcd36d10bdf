"""Layer by layer: what pruning one costs, and where the zeros are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, SymLogNorm, to_rgba
from matplotlib.ticker import FuncFormatter

from cram_bench.checks import columns, items
from cram_bench.plots._style import Figure, below, looks, one_each, per_cent, plain, style


def layer_sensitivity(table: pd.DataFrame) -> Figure:
    """Draw the rise of the loss when one layer alone is pruned, a row per layer and a column per sparsity.

    Args:
        table: columns layer, weights, sparsity, rise; of one model.

    Raises:
        ValueError: the table holds several rises of a layer and sparsity, such as those of several models.
    """
    columns(table, "layer", "weights", "sparsity", "rise")
    grid = one_each(table, "layer", "sparsity", "rise").sort_index(axis=1)
    weights = table.drop_duplicates("layer").set_index("layer")["weights"]
    with style():
        figure = Figure(figsize=(0.75 * grid.shape[1] + 4.4, max(3.2, 0.27 * len(grid) + 1.3)))
        axis = figure.subplots()
        axis.grid(False)
        rises = grid.to_numpy(dtype=float)
        limit = float(rises[np.isfinite(rises)].max(initial=0.1))
        image = axis.imshow(
            grid.clip(lower=0), cmap="cividis_r", norm=SymLogNorm(0.01, vmin=0, vmax=limit), aspect="auto"
        )
        axis.set_xticks(range(grid.shape[1]), [f"{100 * level:g}" for level in grid.columns])
        axis.set_yticks(range(len(grid)), [f"{name} ({weights[name]:,})" for name in grid.index], fontsize=7.5)
        axis.tick_params(length=0)
        axis.set_xlabel("sparsity of this layer alone, %")
        axis.set_title("Which layer breaks it", loc="left")
        for row, column in np.argwhere(np.isnan(rises)):
            axis.text(column, row, "failed", ha="center", va="center", fontsize=7.5)
        falls = ", falls as 0" if (rises < 0).any() else ""
        bar = figure.colorbar(image, ax=axis, label=f"rise of the loss, nats{falls}\n(linear to 0.01, then log)")
        bar.formatter = FuncFormatter(plain)
        bar.update_ticks()
    return figure


def layer_profile(tables: Mapping[str, pd.DataFrame], methods: Mapping[str, str] | None = None) -> Figure:
    """Draw how sparse every layer becomes and, where it is known, what that layer alone costs; a line a model.

    Args:
        tables: label → columns layer, sparsity and perhaps rise (nats); all of the same layers.
        methods: label → method, which decides the look; by default the labels are methods.

    Raises:
        ValueError: the tables are of different layers.
    """
    for table in items("tables", list(tables.values()), "tables"):
        columns(table, "layer", "sparsity")
    layers = list(next(iter(tables.values()))["layer"])
    for label, table in tables.items():
        if list(table["layer"]) != layers:
            raise ValueError(f"the tables must be of the same layers, and that of {label!r} is of others")
    blamed = any("rise" in table for table in tables.values())
    with style():
        figure = Figure(figsize=(8.2 if blamed else 5.2, 0.19 * len(layers) + 1.5))
        axes = figure.subplots(1, 2 if blamed else 1, sharey=True, squeeze=False)[0]
        for axis, column in zip(axes, ("sparsity", "rise"), strict=False):
            for label, colour, marker, dashes, table in looks(tables, methods):
                if column not in table:
                    continue
                # a pale line, which leads the eye from a layer to the next and says nothing of what is between
                axis.plot(
                    table[column], range(len(table)), color=to_rgba(colour, 0.4), marker=marker, label=label,
                    linewidth=1, linestyle=dashes, markerfacecolor=colour, markeredgecolor="white", markeredgewidth=0.5,
                )  # fmt: skip
        axes[0].set_yticks(range(len(layers)), layers, fontsize=7)
        axes[0].set_ylim(len(layers) - 0.5, -0.5)
        axes[0].set_xlim(-0.02, 1.02)
        per_cent(axes[0].xaxis)
        axes[0].set_xlabel("zeros in the layer, %")
        axes[0].set_title("Where the zeros are")
        if blamed:
            axes[1].set_xscale("symlog", linthresh=0.01)
            axes[1].autoscale(axis="x")
            axes[1].set_xlabel("rise of the loss by this layer alone, nats\n(linear to 0.01, then log)")
            axes[1].set_title("Which layer breaks it (untuned)")
            axes[1].xaxis.set_major_formatter(FuncFormatter(plain))
        unknown = [label for label, table in tables.items() if blamed and "rise" not in table]
        below(figure, axes[0].get_legend_handles_labels()[0], [f"rise not measured: {label}" for label in unknown])
    return figure


def weight_histogram(table: pd.DataFrame) -> Figure:
    """Draw how the weights of every layer are spread, a row a layer, darker for more of its weights.

    Args:
        table: columns layer, low, high, count, of `cram_bench.probes.weight_histogram`.
    """
    columns(table, "layer", "low", "high", "count")
    counts = one_each(table, "layer", "low", "count").sort_index(axis=1)
    shares = counts.div(counts.sum(axis=1), axis=0)
    edges = [*shares.columns, float(table["high"].max())]
    with style():
        figure = Figure(figsize=(7.0, max(2.8, 0.2 * len(shares) + 1.6)))
        axis = figure.subplots()
        axis.grid(False)
        least = 1 / float(counts.sum(axis=1).max())
        norm = LogNorm(vmin=least, vmax=1)
        image = axis.pcolormesh(edges, range(len(shares) + 1), shares.where(shares > 0), cmap="cividis_r", norm=norm)
        axis.set_yticks([place + 0.5 for place in range(len(shares))], list(shares.index), fontsize=7)
        axis.set_ylim(len(shares), 0)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("value of the weight")
        axis.set_title("How the weights of each layer are spread")
        bar = figure.colorbar(image, ax=axis, label="share of the layer,\n% (log scale)")
        bar.minorticks_off()
        per_cent(bar.ax.yaxis)
    return figure
