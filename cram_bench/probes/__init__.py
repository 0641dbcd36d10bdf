"""Measurements on a trained model → tidy tables, a row a measurement. They leave the model as they found it.

Every probe takes a plain torch model and data: a `cram_bench.data.Dataset`, or anything that yields (inputs,
labels) whenever it is iterated. A new probe is a new file and a line here.
"""

from cram_bench.probes.landscape import (
    loss_along_compression,
    loss_along_compressions,
    loss_in_ball,
    loss_in_plane,
    loss_on_grid,
    random_direction,
)
from cram_bench.probes.over_runs import ablation_means, accuracy_table, mean_and_std, over_runs, transfer_accuracy
from cram_bench.probes.sharpness import cram_gap, sam_sharpness
from cram_bench.probes.sparsity import LEVELS, sparsity_curve

__all__ = [
    "LEVELS",
    "ablation_means",
    "accuracy_table",
    "cram_gap",
    "loss_along_compression",
    "loss_along_compressions",
    "loss_in_ball",
    "loss_in_plane",
    "loss_on_grid",
    "mean_and_std",
    "over_runs",
    "random_direction",
    "sam_sharpness",
    "sparsity_curve",
    "transfer_accuracy",
]
