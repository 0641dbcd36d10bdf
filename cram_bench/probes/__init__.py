"""Measurements on a trained model → tidy tables, a row a measurement. They leave the model as they found it.

Every probe takes a plain torch model and data: a `cram_bench.data.Dataset`, or anything that yields (inputs,
labels) whenever it is iterated. A `DataLoader` is read once and held, up to 8 GiB, so that every evaluation of a probe
sees the same examples. Models with other outputs than logits take ``forward=``, other tasks ``loss=``
(`probes.common`). A new probe is a new file and a line here.
"""

from cram_bench.probes.examples import calibration_curve, flips, predictions
from cram_bench.probes.hessian import curvature, spectral_density
from cram_bench.probes.landscape import (
    loss_along_compression,
    loss_along_compressions,
    loss_in_ball,
    loss_in_plane,
    loss_on_grid,
    random_direction,
)
from cram_bench.probes.layers import layer_blame, layer_profile, layer_sensitivity, weight_histogram
from cram_bench.probes.over_runs import (
    ablation_means,
    accuracy_table,
    mean_and_std,
    over_changes,
    over_runs,
    seeds_left,
    transfer_accuracy,
)
from cram_bench.probes.paths import loss_along_path, loss_at, loss_on_plane
from cram_bench.probes.prices import price_table, prices
from cram_bench.probes.pruners import CORRECTIONS, chosen_against, chosen_by_loss, pruner_table, pruners
from cram_bench.probes.sharpness import cram_gap, sam_sharpness, sharpness_over_radii
from cram_bench.probes.sparsity import LEVELS, sparsity_curve
from cram_bench.probes.specialist import specialist, specialist_table
from cram_bench.probes.speeds import speed_table, speeds
from cram_bench.probes.stability import comparable, stability, verdict_table, verdicts, with_random_directions
from cram_bench.probes.steps import step_table, step_times
from cram_bench.probes.storage import stored
from cram_bench.probes.training import cost_table, density_accuracy, optimizer_bytes, training_costs, training_curves

__all__ = [
    "CORRECTIONS",
    "LEVELS",
    "ablation_means",
    "accuracy_table",
    "calibration_curve",
    "chosen_against",
    "chosen_by_loss",
    "comparable",
    "cost_table",
    "cram_gap",
    "curvature",
    "density_accuracy",
    "flips",
    "layer_blame",
    "layer_profile",
    "layer_sensitivity",
    "loss_along_compression",
    "loss_along_compressions",
    "loss_along_path",
    "loss_at",
    "loss_in_ball",
    "loss_in_plane",
    "loss_on_grid",
    "loss_on_plane",
    "mean_and_std",
    "optimizer_bytes",
    "over_changes",
    "over_runs",
    "predictions",
    "price_table",
    "prices",
    "pruner_table",
    "pruners",
    "random_direction",
    "sam_sharpness",
    "seeds_left",
    "sharpness_over_radii",
    "sparsity_curve",
    "specialist",
    "specialist_table",
    "spectral_density",
    "speed_table",
    "speeds",
    "stability",
    "step_table",
    "step_times",
    "stored",
    "training_costs",
    "training_curves",
    "transfer_accuracy",
    "verdict_table",
    "verdicts",
    "weight_histogram",
    "with_random_directions",
]
