"""What a sparse network's accuracy costs."""

from __future__ import annotations

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from cram_bench.checks import columns
from cram_bench.plots._style import Figure, below, in_order, look, of_runs, per_cent, style, visible

COSTS = {"one": "cost of one sparsity", "curve": "cost of the whole curve"}


def prices(table: pd.DataFrame) -> Figure:
    """Draw accuracy against cost: a column a sparsity; above, what that sparsity alone costs, below, what all cost
    together. Means with bars of ± one standard deviation over seeds. What a method gives with a teacher, or with
    another pruner, has its look, hollow.

    Args:
        table: of `cram_bench.probes.prices`: columns method, seed, sparsity, accuracy, one, curve.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "sparsity", "accuracy", "one", "curve")
    shown = table.dropna(subset=["accuracy"])
    levels = sorted(shown["sparsity"].unique())
    methods = in_order(shown)
    ticks: list[float] = []
    for value in sorted(round(float(cost), 1) for cost in shown[list(COSTS)].to_numpy().flat):
        if not ticks or value > 1.15 * ticks[-1]:  # nearer ones would lie over each other
            ticks.append(value)
    with style():
        figure = Figure(figsize=(2.6 * max(1, len(levels)) + 0.8, 5.6))
        axes = figure.subplots(2, max(1, len(levels)), sharex=True, sharey="col", squeeze=False)
        for axis, level in zip(axes[0], levels, strict=False):
            axis.set_title(f"{100 * level:g} % zeros")
        for row, (cost, words) in zip(axes, COSTS.items(), strict=True):
            for axis, level in zip(row, levels, strict=False):
                for method in methods:
                    own = shown[(shown["method"] == method) & (shown["sparsity"] == level)]
                    if len(own):
                        _, colour, marker = look(method)
                        spread = 0.0 if len(own) == 1 else float(own["accuracy"].std())
                        axis.errorbar(
                            [own[cost].mean()], [own["accuracy"].mean()], yerr=[spread], fmt=marker, color=colour,
                            markersize=6, elinewidth=1.2, linestyle="", markerfacecolor=_filled(method, colour),
                        )  # fmt: skip
                axis.set_xscale("log")
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.xaxis.set_minor_locator(NullLocator())
                axis.tick_params(labelbottom=True)
                axis.set_xlabel(f"{words},\ngradients an image (log scale)")
                per_cent(axis.yaxis)
            row[0].set_ylabel("test accuracy, %")
        handles = []
        for method in methods:
            text, colour, marker = look(method)
            fill = _filled(method, colour)
            handles.append(
                Line2D([], [], color=colour, marker=marker, markerfacecolor=fill, linestyle="", label=visible(text))
            )
        seeds = int(shown.groupby(["method", "sparsity"])["seed"].nunique().max()) if len(shown) else 0
        below(figure, handles, (f"mean ± std of {seeds} seeds",) if seeds > 1 else ())
    return figure


def _filled(method: str, colour: str) -> str:
    return "white" if ", " in method else colour
