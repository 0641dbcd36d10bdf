"""Structured pruning for measured speed-ups (ZipLM, arXiv 2302.04089).

    table = cb.deploy.latency(model, inputs)                             # seconds on the device at hand
    results = cb.prune.ziplm(model, train, speedups=[1.5, 2, 3], latency=table)
    results[1].apply_(model)
    small = cb.deploy.shrink(model, results[1].structure)                # physically smaller

A unit is removed as a whole, so what is left is a smaller dense network, faster wherever the dense one runs.
"""

from cram_bench.prune.structured.programme import OverBudget, programme, search, uniform
from cram_bench.prune.structured.removal import Path, remove
from cram_bench.prune.structured.structures import Structure, structures, widths
from cram_bench.prune.structured.ziplm import METHODS, Shrinkable, mean_loss, table, to_counts, ziplm

__all__ = [
    "METHODS",
    "OverBudget",
    "Path",
    "Shrinkable",
    "Structure",
    "mean_loss",
    "programme",
    "remove",
    "search",
    "structures",
    "table",
    "to_counts",
    "uniform",
    "widths",
    "ziplm",
]
