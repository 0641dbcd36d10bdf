"""Tables → figures, in one style. A method keeps its colour and marker in every figure.

Every function takes a tidy table of `cram_bench.probes` and returns a matplotlib figure: most take one that is stacked
over runs, or that of a single model; those of layers, planes and paths say what they take. Lines are means over seeds;
with two seeds or more a band is drawn and named in the legend: ± one standard deviation of accuracies, lowest to
highest of losses, which are drawn on log scales and may differ by orders of magnitude.
"""

from __future__ import annotations

from cram_bench.plots._style import STYLE, look, style
from cram_bench.plots.accuracy import ablations, accuracy_vs_sparsity, calibration_curve, equal_cost, transfer
from cram_bench.plots.curvature import gaps, sharpness, sharpness_over_radii, spectral_density, stability
from cram_bench.plots.examples import examples
from cram_bench.plots.landscapes import (
    loss_along_compression,
    loss_along_path,
    loss_in_ball,
    loss_on_plane,
    loss_planes,
    loss_slice,
)
from cram_bench.plots.layers import layer_profile, layer_sensitivity, weight_histogram
from cram_bench.plots.prices import prices
from cram_bench.plots.pruners import pruners, specialist
from cram_bench.plots.speeds import speeds
from cram_bench.plots.steps import step_times
from cram_bench.plots.training import density, training

__all__ = [
    "STYLE",
    "ablations",
    "accuracy_vs_sparsity",
    "calibration_curve",
    "density",
    "equal_cost",
    "examples",
    "gaps",
    "layer_profile",
    "layer_sensitivity",
    "look",
    "loss_along_compression",
    "loss_along_path",
    "loss_in_ball",
    "loss_on_plane",
    "loss_planes",
    "loss_slice",
    "prices",
    "pruners",
    "sharpness",
    "sharpness_over_radii",
    "specialist",
    "spectral_density",
    "speeds",
    "stability",
    "step_times",
    "style",
    "training",
    "transfer",
    "weight_histogram",
]
