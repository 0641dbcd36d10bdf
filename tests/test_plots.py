import io
import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import cram_bench as cb
from cram_bench.experiment import METHODS


def table(**axes) -> pd.DataFrame:
    rows = list(itertools.product(["sgd", "cram+-multi"], [0, 1], *axes.values()))
    frame = pd.DataFrame(rows, columns=["method", "seed", *axes])
    values = np.linspace(0.1, 0.9, len(frame))
    return frame.assign(loss=values, accuracy=values, gap=values - 0.3, sharpness=values)


FIGURES = {
    "accuracy": lambda: cb.plots.accuracy_vs_sparsity(
        table(sparsity=[0.0, 0.5], calibrated=[False, True]).assign(pattern="global"), chance=0.1
    ),
    "ball": lambda: cb.plots.loss_in_ball(table(direction=[0, 1], a=[-1.0, 0.0, 1.0])),
    "line": lambda: cb.plots.loss_along_compression(table(compressor=["global@0.5", "2:4"], t=[0.0, 1.0])),
    "gaps": lambda: cb.plots.gaps(table(sparsity=[0.5, 0.9]).assign(rho=0.2)),
    "sharpness": lambda: cb.plots.sharpness(table(rho=[0.05, 0.1])),
    "cost": lambda: cb.plots.equal_cost(
        *[table(sparsity=[0.0, 0.5]).assign(pattern="global", calibrated=True, epochs=2, gradients=g) for g in (2, 4)]
    ),
    "transfer": lambda: cb.plots.transfer(table(sparsity=[0.0, 0.5]), "digits", chance=0.1),
    "density": lambda: cb.plots.spectral_density(table(eigenvalue=[0.0, 1.0, 2.0]).assign(density=lambda t: t["loss"])),
    "stability": lambda: cb.plots.stability(
        table(weights=["dense", "global@0.9"]).assign(
            eigenvalue=lambda t: t["loss"], trace=lambda t: t["loss"], pruning_gap=lambda t: t["loss"]
        )
    ),
    "planes": lambda: cb.plots.loss_planes(table(a=[-1.0, 0.0, 1.0], b=[-1.0, 0.0, 1.0]).query("seed == 0")),
}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES.keys())
def test_every_axis_is_labelled_and_methods_are_named(make):
    figure = make()
    assert all(axis.get_xlabel() or axis.get_label() == "<colorbar>" for axis in figure.axes)
    assert figure.axes[0].get_ylabel()
    texts = {text.get_text() for axis in figure.axes for text in axis.texts}  # at the ends of the lines
    titles = {axis.get_title(loc="left") for axis in figure.axes}
    legends = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"SGD", "CrAM+-Multi"} <= texts | titles | legends
    figure.savefig(io.BytesIO(), format="png")  # draws without an error


def test_the_axis_of_gaps_is_logarithmic_where_they_are_positive_and_shows_zero_where_not():
    positive = table(sparsity=[0.5, 0.9]).assign(rho=0.2, gap=lambda t: 0.5 + t["sparsity"])
    axis = cb.plots.gaps(positive).axes[0]
    assert axis.get_yscale() == "log"
    assert axis.get_ylim()[0] > 0.5
    low, high = axis.get_ylim()
    seen = [
        label.get_text()
        for tick, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        if low <= tick <= high
    ]
    assert len(seen) > 1
    assert [float(text) for text in seen] == pytest.approx([t for t in axis.get_yticks() if low <= t <= high])
    mixed = cb.plots.gaps(positive.assign(gap=lambda t: t["gap"] - 1.2)).axes[0]
    assert mixed.get_yscale() == "symlog"
    assert mixed.get_ylim()[0] < 0 < mixed.get_ylim()[1]


def test_no_point_lies_on_the_frame_of_a_symlog_axis():
    rises = pd.DataFrame(
        {"kind": ["worst"] * 3 + ["average"] * 3, "rho": [0.1, 0.2, 0.3] * 2, "direction": -1,
         "rise": [0.1, 1.0, 100.0, 0.0, -0.01, 0.0]}
    )  # fmt: skip
    axis = cb.plots.sharpness_over_radii(rises).axes[0]
    assert axis.get_yscale() == "symlog"
    low, top, highest = axis.transData.transform([(0.1, axis.get_ylim()[0]), (0.1, axis.get_ylim()[1]), (0.1, 100.0)])[
        :, 1
    ]
    assert highest < top - 0.03 * (top - low)


def test_stability_draws_a_point_a_seed_and_leaves_no_failed_method_out():
    rows = table(weights=["dense", "global@0.9"]).assign(
        eigenvalue=lambda t: t["loss"], trace=lambda t: -t["loss"], pruning_gap=lambda t: t["loss"]
    )
    rows.loc[rows["weights"] != "dense", "pruning_gap"] = np.nan
    failed = pd.DataFrame([{"method": "sam", "seed": 0}])
    figure = cb.plots.stability(pd.concat([rows, failed], ignore_index=True))
    assert [len(axis.get_xticks()) for axis in figure.axes] == [2, 1, 2, 2, 2]  # what is pruned is not pruned again
    points = np.concatenate([line.get_ydata() for line in figure.axes[2].get_lines()])
    assert sorted(points) == pytest.approx(sorted(rows["sharpness"]))
    assert [axis.get_yscale() for axis in figure.axes] == ["symlog", "log", "log", "log", "symlog"]
    assert "SAM: failed" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_a_method_keeps_its_colour_and_no_two_share_one():
    colours = {method: cb.plots.look(method)[1] for method in METHODS}
    assert len(set(colours.values())) == len(METHODS)
    for make in (FIGURES["accuracy"], FIGURES["ball"], FIGURES["gaps"], FIGURES["sharpness"]):
        lines = {line.get_label(): line.get_color() for line in make().axes[0].get_lines()}
        assert lines["SGD"] == colours["sgd"]
        assert lines["CrAM+-Multi"] == colours["cram+-multi"]


def test_the_band_is_the_standard_deviation_over_seeds():
    rows = [("sgd", seed, "global", 0.0, False, value) for seed, value in enumerate([0.4, 0.8])]
    curves = pd.DataFrame(rows, columns=["method", "seed", "pattern", "sparsity", "calibrated", "accuracy"])
    band = cb.plots.accuracy_vs_sparsity(curves).axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.6 - np.std([0.4, 0.8], ddof=1))
    assert band.max() == pytest.approx(0.6 + np.std([0.4, 0.8], ddof=1))


def test_plots_leave_matplotlibs_settings_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    FIGURES["planes"]()
    assert dict(mpl.rcParams) == before


def test_the_plane_shows_its_three_models():
    grid = pd.DataFrame(itertools.product([-1.0, 0.0, 1.0], [0.0, 1.0]), columns=["a", "b"])
    grid = grid.assign(loss=np.linspace(0.1, 3, 6))
    figure = cb.plots.loss_on_plane(grid, pd.DataFrame({"a": [0.0, 1.0, 0.5], "b": [0.0, 0.0, 1.0]}))
    assert {"dense", "pruned", "fine-tuned"} <= {text.get_text() for text in figure.axes[0].texts}
    figure.savefig(io.BytesIO(), format="png")


def test_ablations_show_the_first_row_and_differences_to_it():
    means = pd.DataFrame({"dense": [0.9, 0.88, np.nan], "90": [0.5, 0.62, np.nan]}, index=["CrAM+", "other", "broken"])
    figure = cb.plots.ablations(means)
    assert [text.get_text() for text in figure.axes[0].texts] == ["90.0", "50.0", "−2.0", "+12.0", "failed", "failed"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["CrAM+", "other", "broken"]
    figure.savefig(io.BytesIO(), format="png")


def test_a_method_that_failed_is_named():
    frame = table(sparsity=[0.5, 0.9]).assign(rho=0.2)
    frame.loc[frame["method"] == "sgd", ["gap", "sparsity"]] = np.nan
    figure = cb.plots.gaps(frame)
    assert "SGD: failed" in {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def test_seeds_that_failed_are_counted_where_a_mean_is_drawn():
    frame = table(sparsity=[0.0, 0.5], calibrated=[True]).assign(pattern="global")
    lost = pd.DataFrame([{"method": "sgd", "seed": seed} for seed in (2, 3)])
    figure = cb.plots.accuracy_vs_sparsity(pd.concat([frame, lost], ignore_index=True))
    assert "SGD: 2 of 4 seeds failed" in {text.get_text() for text in figure.legends[0].get_texts()}
    summary = cb.probes.accuracy_table(pd.concat([frame, lost], ignore_index=True))
    assert "SGD (2 of 4 seeds)" in summary.index
    assert "CrAM+-Multi" in summary.index


def test_a_table_straight_from_a_probe_is_drawn_as_one_model():
    one = {"method": "sgd", "seed": 0}
    for draw, rows in (
        (cb.plots.loss_in_ball, table(direction=[0], a=[-1.0, 0.0, 1.0])),
        (cb.plots.gaps, table(sparsity=[0.5, 0.9]).assign(rho=0.2)),
        (cb.plots.sharpness, table(rho=[0.05, 0.1])),
        (cb.plots.loss_planes, table(a=[-1.0, 0.0, 1.0], b=[-1.0, 0.0, 1.0])),
        (cb.plots.loss_along_path, table(t=[0.0, 0.5, 1.0])),
    ):
        alone = rows[(rows[list(one)] == pd.Series(one)).all(axis=1)].drop(columns=list(one))
        figure = draw(alone)
        figure.savefig(io.BytesIO(), format="png")
        assert "model" in {text.get_text() for text in figure.axes[0].texts} | {figure.axes[0].get_title(loc="left")}


def test_figures_of_one_model_carry_what_they_were_given():
    sizes = pd.DataFrame(
        {"size": [0, 10, 10, 100, 100], "draw": [0, 0, 1, 0, 1], "accuracy": [0.3, 0.5, 0.7, 0.8, 0.9]}
    )
    axis = cb.plots.calibration_curve(sizes).axes[0]
    assert axis.get_lines()[0].get_ydata() == pytest.approx([0.6, 0.85])
    assert axis.get_lines()[1].get_ydata() == pytest.approx([0.3, 0.3])
    radii = pd.DataFrame(itertools.product(["average", "worst"], [0.1, 0.2], [0]), columns=["kind", "rho", "direction"])
    axis = cb.plots.sharpness_over_radii(radii.assign(rise=[-0.01, 0.02, 0.3, 0.4])).axes[0]
    assert axis.get_yscale() == "symlog"
    assert [list(line.get_ydata()) for line in axis.get_lines()] == [[0.3, 0.4], [-0.01, 0.02]]
    torch.manual_seed(0)
    counts = cb.probes.weight_histogram(torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Linear(5, 3)), bins=7)
    figure = cb.plots.weight_histogram(counts)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["0.weight", "1.weight"]
    figure.savefig(io.BytesIO(), format="png")


def test_spectra_of_very_different_reach_share_an_axis_that_shows_both():
    rows = [(method, reach * x) for method, reach in (("dense", 1.0), ("pruned", 100.0)) for x in (-0.1, 0.0, 1.0)]
    spectra = pd.DataFrame(rows, columns=["method", "eigenvalue"]).assign(seed=0, density=0.5, error=0.1)
    assert cb.plots.spectral_density(spectra).axes[0].get_xscale() == "symlog"
    assert cb.plots.spectral_density(spectra[spectra["method"] == "dense"]).axes[0].get_xscale() == "linear"


def test_layer_sensitivity_names_layers_and_sizes():
    rows = itertools.product(["conv1.weight", "linear.weight"], [0.5, 0.9])
    frame = pd.DataFrame(rows, columns=["layer", "sparsity"]).assign(weights=432, rise=[0.0, 0.5, 0.001, 2.0])
    figure = cb.plots.layer_sensitivity(frame)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["conv1.weight (432)", "linear.weight (432)"]
    figure.savefig(io.BytesIO(), format="png")
