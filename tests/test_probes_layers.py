"""Layers, examples, paths and radii, against direct calculations."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cram_bench as cb


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture
def digits():
    train, test = cb.data.load("digits")
    return train.sample(300), test.sample(120)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(model):
    """Whatever a test of this file does, the model is as it was in the end."""
    before = copy.deepcopy(model.state_dict())
    model.train()
    yield
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def logits(model, data):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(next(data.batches(len(data)))[0])


def test_layer_sensitivity_prunes_one_layer_at_a_time(model, digits):
    table = cb.probes.layer_sensitivity(model, digits[1], [0.5, 1.0])
    assert table["layer"].unique().tolist() == ["1.weight", "4.weight"]
    assert table["weights"].unique().tolist() == [1024, 160]
    for row in table.itertuples():
        other = copy.deepcopy(model)
        weight = other.get_parameter(row.layer).detach()
        weight.view(-1)[weight.abs().flatten().argsort()[: round(row.sparsity * weight.numel())]] = 0
        loss = float(F.cross_entropy(logits(other, digits[1]), digits[1].labels))
        assert row.loss == pytest.approx(loss, abs=1e-5)
        assert row.rise == pytest.approx(
            loss - float(F.cross_entropy(logits(model, digits[1]), digits[1].labels)), abs=1e-5
        )
    tuned = cb.probes.layer_sensitivity(model, digits[1], [0.9], calibration=digits[0])
    assert not np.allclose(tuned["loss"], cb.probes.layer_sensitivity(model, digits[1], [0.9])["loss"])
    tuned = cb.probes.layer_sensitivity(model, digits[1], [0.9, 0.5], calibration=digits[0])
    for row in tuned.itertuples():  # each from the dense weights, whatever was pruned before
        other = copy.deepcopy(model)
        cb.compress.Magnitude(row.sparsity).apply_({row.layer: other.get_parameter(row.layer)})
        cb.compress.tune_batchnorm(other, digits[0].calibration())
        assert row.loss == pytest.approx(float(F.cross_entropy(logits(other, digits[1]), digits[1].labels)), abs=1e-5)


@pytest.mark.parametrize("spec", ["global@0.7", "uniform@0.7", "2:4"])
def test_the_layer_profile_adds_up(model, spec):
    table = cb.probes.layer_profile(model, spec)
    masks = cb.compress.parse(spec).masks(cb.compress.prunable(model))
    assert table["zeros"].sum() == masks.zeros
    assert table["weights"].sum() == masks.count
    if spec != "global@0.7":
        assert np.allclose(table["sparsity"], masks.sparsity, atol=0.01)


def test_the_histogram_counts_every_weight(model):
    table = cb.probes.weight_histogram(model, bins=11)
    assert table.groupby("layer")["count"].sum().to_dict() == {"1.weight": 1024, "4.weight": 160}
    widest = max(float(w.detach().abs().max()) for w in cb.compress.prunable(model).values())
    assert table["high"].max() == pytest.approx(widest)
    assert -table["low"].min() == pytest.approx(widest)
    with pytest.raises(ValueError, match="not 0"):
        cb.probes.weight_histogram(model, bins=0)
    nothing = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(nothing.weight)
    table = cb.probes.weight_histogram(nothing, bins=3)
    assert (table["low"].min(), table["high"].max(), table["count"].tolist()) == (-1, 1, [0, 6, 0])


def test_flips_are_the_examples_whose_class_changes(model, digits):
    table = cb.probes.flips(model, digits[1], "global@0.8")
    before = logits(model, digits[1]).softmax(1)
    other = cb.compress.compressed(model, cb.compress.Magnitude(0.8))
    after = logits(other, digits[1]).softmax(1)
    changed = (before.argmax(1) != after.argmax(1)).nonzero().flatten()
    assert sorted(table["index"]) == changed.tolist()
    assert table["confidence_before"].is_monotonic_decreasing
    for row in table.itertuples():
        label = int(digits[1].labels[row.index])
        assert (row.label, row.before, row.after) == (
            label,
            int(before[row.index].argmax()),
            int(after[row.index].argmax()),
        )
        assert row.confidence_after == pytest.approx(float(after[row.index].max()), abs=1e-5)
        assert row.kind == ("broken" if row.before == label else "mended" if row.after == label else "moved")
    assert cb.probes.flips(model, digits[1], "global@0.0").empty


def test_more_calibration_images_come_closer_to_all(model, digits):
    train, test = cb.data.load("digits")[0], digits[1]
    table = cb.probes.calibration_curve(model, test, train, "global@0.8", sizes=[5, 1200], draws=5)
    assert table.groupby("size")["draw"].count().to_dict() == {0: 1, 5: 5, 1200: 5}
    spread = table.groupby("size")["loss"].std()
    assert spread[1200] < spread[5]
    other = cb.compress.compressed(model, cb.compress.Magnitude(0.8))
    assert table["loss"].iloc[0] == pytest.approx(float(F.cross_entropy(logits(other, test), test.labels)), abs=1e-5)
    with pytest.raises(ValueError, match="from 1 to 1297, not 2000"):
        cb.probes.calibration_curve(model, test, train, "global@0.8", sizes=[2000])


def second(model):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return other


def test_a_path_goes_from_one_model_to_the_other(model, digits):
    other = second(model)
    table = cb.probes.loss_along_path(model, other, digits[1], points=5)
    assert table["t"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    middle = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in middle.named_parameters():
            value.copy_(0.75 * model.get_parameter(name) + 0.25 * other.get_parameter(name))
    for row, network in ((0, model), (1, middle), (4, other)):
        expected = float(F.cross_entropy(logits(network, digits[1]), digits[1].labels))
        assert table["loss"].iloc[row] == pytest.approx(expected, abs=1e-5)
    tuned = cb.probes.loss_along_path(model, other, digits[1], points=3, calibration=digits[0])
    assert tuned["loss"].iloc[0] != pytest.approx(table["loss"].iloc[0])


def test_a_plane_goes_through_its_three_models(model, digits):
    models = [model, second(model), cb.compress.compressed(model, cb.compress.Magnitude(0.9))]
    grid, corners = cb.probes.loss_on_plane(*models, digits[1], points=4)
    assert len(grid) == 16
    for side in ("a", "b"):  # each axis reaches 0.3 of what it spans beyond the models
        low, high = corners[side].min(), corners[side].max()
        assert (grid[side].min(), grid[side].max()) == pytest.approx(
            (low - 0.3 * (high - low), high + 0.3 * (high - low))
        )
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    for i, j in ((0, 1), (0, 2), (1, 2)):  # distances in the plane are distances between weights
        between = np.hypot(*(corners.loc[i, ["a", "b"]] - corners.loc[j, ["a", "b"]]).astype(float))
        assert between == pytest.approx(float((flat[i] - flat[j]).norm()), rel=1e-5)
    # A point of the grid by hand: θ₀ + a e₁ + b e₂.
    one = (flat[1] - flat[0]) / (flat[1] - flat[0]).norm()
    two = flat[2] - flat[0] - one * ((flat[2] - flat[0]) @ one)
    two = two / two.norm()
    point = grid.iloc[6]
    vector = flat[0] + point["a"] * one + point["b"] * two
    other = copy.deepcopy(model)
    nn.utils.vector_to_parameters(vector.float(), other.parameters())
    assert point["loss"] == pytest.approx(float(F.cross_entropy(logits(other, digits[1]), digits[1].labels)), rel=1e-3)
    models[1][2].running_var *= 9  # beyond the corners, on the other side, a variance comes out negative
    assert np.isfinite(cb.probes.loss_on_plane(*models, digits[1], points=3)[0]["loss"]).all()
    with pytest.raises(ValueError, match="on one line"):
        cb.probes.loss_on_plane(model, models[1], copy.deepcopy(model), digits[1])
    with pytest.raises(ValueError, match="differ in 1.bias"):
        cb.probes.loss_along_path(model, nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), digits[1])


def test_sharpness_of_a_quadratic():
    """L = ½ θᵀAθ has the average rise ρ² tr(A)/2d at the minimum, and the worst ρ² λ_max/2."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(6, dtype=torch.float64))
            self.scale = torch.tensor([8.0, 1, 1, 1, 1, 0.5], dtype=torch.float64)

        def forward(self, x):  # two logits whose cross-entropy with label 0 is the quadratic, to second order
            value = (self.scale * (self.theta + 1e-3).square()).sum() / 2
            return torch.stack([torch.log(torch.expm1(value)).neg(), torch.zeros_like(value)])[None]

    table = cb.probes.sharpness_over_radii(
        Quadratic(), [(torch.zeros(1), torch.zeros(1, dtype=torch.long))], [0.5, 1.0], directions=300, steps=20
    )
    average = table[table["kind"] == "average"].groupby("rho")["rise"].mean()
    worst = table[table["kind"] == "worst"].set_index("rho")["rise"]
    for rho in (0.5, 1.0):
        assert average[rho] == pytest.approx(rho**2 * 12.5 / 12, rel=0.15)
        assert worst[rho] == pytest.approx(rho**2 * 8 / 2, rel=0.05)
    assert isinstance(table, pd.DataFrame)


@pytest.mark.parametrize(
    "probe",
    [
        lambda m, d: cb.probes.layer_sensitivity(m, d),
        lambda m, d: cb.probes.flips(m, d, "global@0.9"),
        lambda m, d: cb.probes.loss_along_path(m, m, d),
        lambda m, d: cb.probes.sharpness_over_radii(m, d, [0.1]),
        lambda m, d: cb.probes.curvature(m, d),
    ],
)
def test_data_that_break_in_the_middle_leave_the_model_alone(probe, model, digits):
    class Breaking:
        left = 3

        def __iter__(self):
            for batch in digits[1].batches(50):
                self.left -= 1
                if not self.left:
                    raise OSError("the disk is gone")
                yield batch

    with pytest.raises(OSError, match="disk is gone"):
        probe(model, Breaking())


def test_blame_gives_each_layer_its_part_of_the_masks_alone(model, digits):
    table = cb.probes.layer_blame(model, digits[1], "global@0.8")
    masks = cb.compress.parse("global@0.8").masks(cb.compress.prunable(model))
    for row in table.itertuples():
        other = copy.deepcopy(model)
        weight = other.get_parameter(row.layer).detach()
        weight[~masks[row.layer]] = 0
        losses = [float(F.cross_entropy(logits(m, digits[1]), digits[1].labels)) for m in (other, model)]
        assert row.rise == pytest.approx(losses[0] - losses[1], abs=1e-5)
        assert row.zeros == int((~masks[row.layer]).sum())


def test_stability_puts_the_probes_together(model, digits):
    few = digits[1].sample(40)
    table = cb.probes.stability(model, digits[1], "global@0.8", calibration=digits[0], rho=0.1, few=few, seed=3)
    assert table["weights"].tolist() == ["dense", "global@0.8"]
    dense = table.iloc[0]
    gap = cb.probes.cram_gap(model, digits[1], ["global@0.8"], 0.1, calibration=digits[0]).iloc[0]
    assert dense[["gap", "pruning_gap"]].tolist() == pytest.approx([gap["gap"], gap["pruning_gap"]])
    assert dense["loss"] + dense["pruning_gap"] == pytest.approx(table.iloc[1]["loss"], rel=1e-4)
    assert dense["sharpness"] == pytest.approx(cb.probes.sam_sharpness(model, digits[1], 0.05)["sharpness"].iloc[0])
    assert dense["trace"] == pytest.approx(cb.probes.curvature(model, few, seed=3)["value"].iloc[-1])
    other = cb.compress.compressed(model, cb.compress.Magnitude(0.8))
    cb.compress.tune_batchnorm(other, digits[0].calibration())
    assert table.iloc[1]["loss"] == pytest.approx(cb.train.evaluate(other, digits[1])["loss"], rel=1e-4)
    again = cb.probes.cram_gap(other, digits[1], ["global@0.8"], 0.1, calibration=digits[0]).iloc[0]
    assert table.iloc[1]["gap"] == pytest.approx(again["gap"], rel=1e-3)
    assert table.iloc[1]["eigenvalue"] == pytest.approx(cb.probes.curvature(other, few)["value"].iloc[0], rel=1e-2)


def test_a_landscape_around_the_compressed_weights_is_that_of_the_compressed_model(model, digits):
    other = cb.compress.compressed(model, cb.compress.Magnitude(0.8))
    for probe in (cb.probes.loss_in_ball, cb.probes.loss_in_plane):
        around = probe(model, digits[1], points=3, compressor="global@0.8")
        pd.testing.assert_frame_equal(around, probe(other, digits[1], points=3))
