"""Accuracy against a measured speed-up."""

from __future__ import annotations

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from cram_bench.checks import columns
from cram_bench.plots._style import Figure, below, per_cent, style
from cram_bench.probes.speeds import KINDS

_LOOKS = {
    "float32": ("#000000", "o"),
    "bfloat16": ("#E69F00", "s"),
    "sparse": ("#56B4E9", "v"),
    "2:4": ("#CC79A7", "D"),
    "ziplm": ("#D55E00", "^"),
    "uniform": ("#888888", "P"),
    "onnx": ("#009E73", "X"),
    "int8": ("#0072B2", "*"),
}


def speeds(table: pd.DataFrame) -> Figure:
    """Draw accuracy against how many times as fast as dense float32 a forward pass was: what lies higher and further
    right is better. A line joins what one way of pruning makes, from the least to the most that was asked. Means over
    runs.

    Args:
        table: of `cram_bench.probes.speeds`: columns kind, asked, speedup, accuracy.
    """
    columns(table, "kind", "asked", "speedup", "accuracy")
    means = table.groupby(["kind", "asked"])[["speedup", "accuracy"]].mean()
    with style():
        figure = Figure(figsize=(6.4, 4.4))
        axis = figure.subplots()
        handles = []
        for kind, (colour, marker) in _LOOKS.items():
            if kind not in means.index.get_level_values("kind"):
                continue
            own = means.loc[kind].sort_index()
            axis.plot(own["speedup"], own["accuracy"], marker=marker, color=colour, markersize=7, linewidth=1.4)
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=KINDS[kind]))
        axis.axvline(1.0, color="#000000", linewidth=0.9, linestyle=":")
        axis.set_xscale("log")
        least, most = min(0.9, float(means["speedup"].min()) / 1.1), max(1.2, float(means["speedup"].max()) * 1.1)
        axis.set_xlim(least, most)
        ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24) if least <= tick <= most]
        axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        per_cent(axis.yaxis)
        axis.set_xlabel("times as fast as dense float32, measured (log scale)")
        axis.set_ylabel("test accuracy, %")
        below(figure, handles)
    return figure
