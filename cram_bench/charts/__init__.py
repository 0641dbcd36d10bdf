"""Charts one can touch: Vega-Lite specifications over the tidy tables.

A chart is a pure function of a table, and shows itself in a notebook; a report has it on its page, with no kernel and
no network. Figures for print are those of `cram_bench.plots`. What the explorer shows is in `charts.explorer`.
"""

from cram_bench.charts import explorer
from cram_bench.charts.accuracy import accuracy_vs_sparsity

__all__ = ["accuracy_vs_sparsity", "explorer"]
