"""How much faster a sparse step is, against sparsity."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from cram_bench.checks import columns
from cram_bench.plots._style import Figure, below, style
from cram_bench.probes.steps import NETWORK

_LAYER, _SPARSE, _HALF = "#888888", "#0072B2", "#E69F00"


def step_times(table: pd.DataFrame) -> Figure:
    """Draw how many times as fast as dense float32 a step is: of the sparse network, of the dense one in bfloat16, and
    of every layer that can be sparse. Above 1 it pays; a network leaves dense what lies below.

    Args:
        table: of `cram_bench.probes.step_times`: columns sparsity, layer, speedup, bfloat16_speedup. Of several runs,
            medians are drawn.
    """
    columns(table, "sparsity", "layer", "speedup", "bfloat16_speedup")
    middle = table.groupby(["layer", "sparsity"], sort=False)[["speedup", "bfloat16_speedup"]].median()
    with style():
        figure = Figure(figsize=(6.4, 4.2))
        axis = figure.subplots()
        for layer, own in middle.groupby(level="layer", sort=False):
            own = own.droplevel("layer").sort_index()
            places = 100 * own.index
            if layer == NETWORK:
                axis.plot(places, own["speedup"], "o-", color=_SPARSE, zorder=3)
                axis.plot(places, own["bfloat16_speedup"], "s--", color=_HALF, zorder=3)
            else:
                axis.plot(places, own["speedup"], ".-", color=_LAYER, linewidth=0.9, alpha=0.6, markersize=3)
        axis.axhline(1.0, color="#000000", linewidth=0.9, linestyle=":")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("weights that are zero, %")
        axis.set_ylabel("times as fast as dense float32")
        drawn: list[tuple[str, Any, Any, Any]] = [
            ("sparse step of the network", _SPARSE, "o", "-"),
            ("dense step in bfloat16", _HALF, "s", "--"),
            ("a layer alone, sparse", _LAYER, ".", "-"),
        ]
        below(figure, [Line2D([], [], color=c, marker=m, linestyle=dash, label=text) for text, c, m, dash in drawn])
    return figure
