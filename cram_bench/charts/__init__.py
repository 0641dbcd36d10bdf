"""Charts one can touch: Vega-Lite specifications over the tidy tables, with no kernel and no network.

Figures for print are those of `cram_bench.plots`. A chart is a pure function of a table; `markup` makes it part of a
page.
"""

from cram_bench.charts.accuracy import accuracy_vs_sparsity
from cram_bench.charts.embed import library, markup

__all__ = ["accuracy_vs_sparsity", "library", "markup"]
