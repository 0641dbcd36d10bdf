import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cram_bench as cb


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 3)).double()


@pytest.fixture
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(90, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (90,), generator=generator)
    return [(x[:40], y[:40]), (x[40:], y[40:])]  # uneven batches: a mean of means would differ


def joined_loss(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    return F.cross_entropy(model(x), y)


def snapshot(model: nn.Module) -> tuple:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_untouched(model: nn.Module, before: tuple) -> None:
    after = snapshot(model)
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert after[1:] == before[1:]


PROBES = {
    "sparsity_curve": lambda m, d: cb.probes.sparsity_curve(m, d, ["global@0.5", "2:4"], calibration=d),
    "stored": lambda m, d: cb.probes.stored(m, d, ["global@0.5", "global@0.5+int8"], calibration=d),
    "cram_gap": lambda m, d: cb.probes.cram_gap(m, d, ["global@0.5"], calibration=d),
    "sam_sharpness": lambda m, d: cb.probes.sam_sharpness(m, d, [0.1, 0.2]),
    "sharpness_over_radii": lambda m, d: cb.probes.sharpness_over_radii(m, d, [0.1], directions=1, steps=2),
    "loss_in_ball": lambda m, d: cb.probes.loss_in_ball(m, d, points=3, directions=2),
    "loss_in_plane": lambda m, d: cb.probes.loss_in_plane(m, d, points=3),
    "loss_along_compression": lambda m, d: cb.probes.loss_along_compression(m, d, "global@0.5", points=3),
    "loss_along_compressions": lambda m, d: cb.probes.loss_along_compressions(m, d, ["global@0.5"], points=3),
    "loss_on_grid": lambda m, d: cb.probes.loss_on_grid(m, d, [cb.probes.random_direction(m, 0)], [0.0, 0.5, 1.0]),
    "loss_along_path": lambda m, d: cb.probes.loss_along_path(m, copy.deepcopy(m), d, points=3, calibration=d),
    "loss_at": lambda m, d: cb.probes.loss_at(m, [m, copy.deepcopy(m)], d, [(1, 0), (0.5, 0.5), (0, 1)]),
    "loss_on_plane": lambda m, d: cb.probes.loss_on_plane(m, moved(m, 0), moved(m, 1), d, points=2)[0],
    "layer_blame": lambda m, d: cb.probes.layer_blame(m, d, "global@0.5"),
    "layer_sensitivity": lambda m, d: cb.probes.layer_sensitivity(m, d, [0.5], calibration=d),
    "flips": lambda m, d: cb.probes.flips(m, d, "global@0.5", calibration=d),
    "calibration_curve": lambda m, d: cb.probes.calibration_curve(m, d, Rows(d), "global@0.5", [60], draws=2),
    "stability": lambda m, d: cb.probes.stability(m, d, "global@0.5", calibration=d),
    "pruners": lambda m, d: cb.probes.pruners(m, d, ["global@0.5", "2:4"], d).drop(columns="seconds"),
    "speeds": lambda m, d: cb.probes.speeds(m, d, d, [0.5], repeats=1, exported=False)[["kind", "asked", "accuracy"]],
    "step_times": lambda m, d: cb.probes.step_times(m, d, [0.5, 0.9], repeats=1)[
        ["sparsity", "layer", "weights", "zeros"]
    ],
    "curvature": lambda m, d: cb.probes.curvature(m, d, vectors=2, parts=2),
    "spectral_density": lambda m, d: cb.probes.spectral_density(m, d, points=8, lanczos=3, repeats=1, parts=2),
}
WITHOUT_DATA = {"CORRECTIONS", "LEVELS", "random_direction", "layer_profile", "weight_histogram"}
OVER_RUNS = {
    "ablation_means",
    "accuracy_table",
    "chosen_against",
    "chosen_by_loss",
    "mean_and_std",
    "over_changes",
    "speed_table",
    "over_runs",
    "price_table",
    "prices",
    "pruner_table",
    "seeds_left",
    "specialist_table",
    "step_table",
    "transfer_accuracy",
    "cost_table",
    "density_accuracy",
    "optimizer_bytes",
    "training_costs",
    "training_curves",
    "comparable",
    "verdict_table",
    "verdicts",
    "with_random_directions",
}


class Rows(cb.data.Images):
    """Rows of numbers where a probe asks for a data set: `data` every time it is asked for images to tune on."""

    def __init__(self, data):
        object.__setattr__(self, "data", data)

    def __len__(self):
        return 90

    def calibration(self, *_, **__):
        return self.data


def moved(model: nn.Module, seed: int) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return other


def test_every_probe_of_a_model_and_data_is_in_the_table_above():
    assert set(cb.probes.__all__) - WITHOUT_DATA - OVER_RUNS - {"predictions", "specialist"} == set(PROBES)


# `specialist` wants data sets: test_specialist.py


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES.keys())
def test_probes_repeat_and_leave_the_model_as_it_was(probe, model, data):
    model.train()
    model[4].weight.requires_grad_(False)
    before = snapshot(model)
    first = probe(model, data)
    assert_untouched(model, before)
    assert first.equals(probe(model, data))


def test_pruners_look_at_the_batches_that_they_are_given_not_at_those_for_tuning(model, data):
    broken = [(x * torch.nan, y) for x, y in data]
    for probe in (cb.probes.sparsity_curve, cb.probes.pruners):
        with pytest.raises(ValueError, match="is not finite"):
            probe(model, data, ["obd(gradients=9)@0.5"], calibration=data, batches=broken)


@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES.keys())
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(probe, when, model, data):
    """The network breaks down at one of its first passes, wherever the probe is by then."""
    before = snapshot(model)
    passes = iter(range(10_000))

    def breaking(*_):
        if next(passes) == when:
            raise RuntimeError("the memory is gone")

    with model[4].register_forward_pre_hook(breaking), pytest.raises(RuntimeError, match="the memory is gone"):
        probe(model, data)
    assert_untouched(model, before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES.keys())
def test_an_iterator_or_no_data_is_refused(probe, model, data):
    with pytest.raises(TypeError, match="more than once"):
        probe(model, iter(data))
    with pytest.raises(ValueError, match="empty|given 0|there is none"):
        probe(model, [])


class Quadratic(nn.Module):
    """A network whose cross-entropy with label 0 is ½ Σ aᵢ θᵢ², exactly."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([[0.3, -0.7], [0.9, 0.2]], dtype=torch.float64))
        self.scale = torch.tensor([[1.0, 4.0], [0.5, 2.0]], dtype=torch.float64)

    def forward(self, x):
        value = (self.scale * self.theta.square()).sum() / 2
        return torch.stack([-torch.log(torch.expm1(value)), torch.zeros_like(value)])[None].expand(len(x), 2)


def test_the_landscape_of_a_quadratic_is_its_closed_form():
    """L(θ + a d + b e) = ½ Σ s (θ + a d + b e)² at every point of the plane."""
    model, data = Quadratic(), [(torch.zeros(3), torch.zeros(3, dtype=torch.long))]
    one, two = (cb.probes.random_direction(model, seed)["theta"] for seed in (5, 6))
    theta, scale = model.theta.detach(), model.scale
    plane = cb.probes.loss_in_plane(model, data, radius=0.8, points=5, seed=5)
    expected = [
        float((scale * (theta + a * one + b * two).square()).sum() / 2) for a, b in zip(plane.a, plane.b, strict=True)
    ]
    np.testing.assert_allclose(plane["loss"], expected, rtol=1e-6)
    ball = cb.probes.loss_in_ball(model, data, radius=0.8, points=5, directions=1, seed=5)
    np.testing.assert_allclose(
        ball["loss"], [float((scale * (theta + a * one).square()).sum() / 2) for a in ball.a], rtol=1e-6
    )


def test_a_tuned_gap_is_that_of_the_compressed_and_tuned_network(model, data):
    tuned = cb.probes.cram_gap(model, data, ["global@0.5"], rho=0.3, calibration=data).iloc[0]
    other = cb.compress.compressed(model.eval(), "global@0.5")
    cb.compress.tune_batchnorm(other, data)
    rise = float((joined_loss(other.eval(), data) - joined_loss(model, data)).detach())
    assert tuned["pruning_gap"] == pytest.approx(rise, abs=1e-6)
    untuned = cb.probes.cram_gap(model, data, ["global@0.5"], rho=0.3).iloc[0]
    for name in ("gap", "ascent_gap"):
        assert tuned[name] != pytest.approx(untuned[name])
    nothing = cb.probes.cram_gap(model, data, ["global@0"], rho=0.3, calibration=data).iloc[0]
    assert tuned["ascent_gap"] == pytest.approx(nothing["gap"], abs=1e-6)  # the same ascent, tuned alike


def test_cram_gap_equals_the_formula(model, data):
    result = cb.probes.cram_gap(model, data, ["global@0.75"], rho=0.3).iloc[0]
    reference = copy.deepcopy(model).eval()
    loss = joined_loss(reference, data)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    gaps = []
    for rho in (0.3, 0.0):
        moved = copy.deepcopy(reference)
        with torch.no_grad():
            for parameter, gradient in zip(moved.parameters(), gradients, strict=True):
                parameter += rho * gradient
            flat = torch.cat([moved[0].weight.flatten(), moved[4].weight.flatten()]).abs()
            threshold = flat.sort().values[int(0.75 * len(flat)) - 1]
            for layer in (moved[0], moved[4]):
                layer.weight[layer.weight.abs() <= threshold] = 0
        gaps.append((joined_loss(moved, data) - loss).item())
    assert result["loss"] == pytest.approx(loss.item(), abs=1e-6)  # losses are taken in float32
    assert [result["gap"], result["pruning_gap"]] == pytest.approx(gaps, abs=1e-6)


def test_sam_sharpness_equals_the_formula(model, data):
    result = cb.probes.sam_sharpness(model, data, rho=0.5).iloc[0]
    reference = copy.deepcopy(model).eval()
    loss = joined_loss(reference, data)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    with torch.no_grad():
        for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
            parameter += 0.5 * gradient / norm
    assert result["sharpness"] == pytest.approx((joined_loss(reference, data) - loss).item(), abs=1e-6)


def test_directions_have_the_norm_of_each_filter_and_spare_the_rest(model):
    direction = cb.probes.random_direction(model, seed=3)
    assert list(direction) == ["0.weight", "4.weight"]
    for name, tensor in direction.items():
        rows = model.get_parameter(name).detach()
        for ours, theirs in zip(tensor, rows, strict=True):
            assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-12)
    again = cb.probes.random_direction(model, seed=3)
    other = cb.probes.random_direction(model, seed=4)
    assert all(torch.equal(direction[name], again[name]) for name in direction)
    assert not torch.equal(direction["0.weight"], other["0.weight"])


def test_line_to_the_compressed_weights_has_the_right_ends(model, data):
    line = cb.probes.loss_along_compression(model, data, "global@0.5", points=5)
    assert line["t"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    model.eval()
    pruned = cb.compress.compressed(model, cb.compress.Magnitude(0.5))
    assert line["loss"].iloc[0] == pytest.approx(joined_loss(model, data).item(), abs=1e-6)
    assert line["loss"].iloc[-1] == pytest.approx(joined_loss(pruned, data).item(), abs=1e-6)
    beyond = cb.probes.loss_along_compression(model, data, "global@0.5", points=3, end=1.5)
    assert beyond["t"].tolist() == [0, 0.75, 1.5]


def test_landscape_of_the_grid_equals_a_direct_walk(model, data):
    pair = [cb.probes.random_direction(model, seed) for seed in (0, 1)]
    grid = cb.probes.loss_on_grid(model, data, pair, [-0.5, 0.0, 0.5])
    assert len(grid) == 9
    model.eval()
    for row in grid.to_dict("records"):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in pair[0]:
                    parameter += row["a"] * pair[0][name] + row["b"] * pair[1][name]
        assert row["loss"] == pytest.approx(joined_loss(moved, data).item(), abs=1e-6)
    with pytest.raises(ValueError, match="'nowhere'"):
        cb.probes.loss_on_grid(model, data, [{"nowhere": torch.zeros(1)}], [0.0])


def test_sparsity_curve_rows(model, data):
    curve = cb.probes.sparsity_curve(model, data, ["global@0.5", "uniform@0.9", "2:4"], calibration=data)
    assert list(curve.columns) == ["pattern", "sparsity", "calibrated", "accuracy", "loss", "dense_weights"]
    assert curve["pattern"].tolist() == ["global", "global", "global", "global", "uniform", "uniform", "2:4", "2:4"]
    # 60 + 36 weights; 5 inputs do not divide by 4, so 2:4 reaches 18 of 96.
    assert curve["sparsity"].tolist() == [0, 0, 0.5, 0.5, 0.9, 0.9, 0.1875, 0.1875]
    assert curve["calibrated"].tolist() == [False, True] * 4
    assert curve["accuracy"].between(0, 1).all()
    pruned = cb.compress.compressed(model.eval(), cb.compress.Magnitude(0.5))
    assert curve["loss"].iloc[2] == pytest.approx(joined_loss(pruned, data).item(), abs=1e-6)
    cb.compress.tune_batchnorm(pruned, data)
    assert curve["loss"].iloc[3] == pytest.approx(joined_loss(pruned.eval(), data).item(), abs=1e-6)
    assert set(cb.probes.sparsity_curve(model, data, ["2:4"])["calibrated"]) == {False}
    some = cb.probes.sparsity_curve(model, data, ["global@0.5"], exclude=["0.*"]).iloc[-1]
    only = copy.deepcopy(model).eval()
    cb.compress.Magnitude(0.5).apply_({"4.weight": only[4].weight})
    assert some["loss"] == pytest.approx(joined_loss(only, data).item(), abs=1e-6)
    halves = nn.Sequential(
        *(nn.Linear(3, 3, bias=False) for _ in range(3))
    )  # 4 of 9 weights each, the nearest to a half
    small = [(torch.ones(1, 3), torch.zeros(1, dtype=torch.long))]
    assert cb.probes.sparsity_curve(halves, small, ["uniform@0.5"])["sparsity"].tolist() == [0, 0.5]


def test_mean_and_std_over_seeds():
    import pandas as pd

    values = np.array([0.50, 0.60, 0.90])
    rows = [("sgd", seed, "global", 0.5, True, value) for seed, value in enumerate(values)]
    rows += [("sgd", seed, "global", 0.0, False, 1.0) for seed in range(3)]
    rows += [
        ("sgd", 0, "global", 0.0, True, 0.1),
        ("sgd", 0, "uniform", 0.5, True, 0.1),
    ]  # neither belongs in the table
    rows += [("sgd", seed, "2:4", 0.4988, True, value) for seed, value in enumerate(values)]
    curves = pd.DataFrame(rows, columns=["method", "seed", "pattern", "sparsity", "calibrated", "accuracy"])
    table = cb.probes.accuracy_table(curves)
    assert table.loc["SGD"].to_dict() == {"dense": "100.0 ± 0.0", "50 %": "66.7 ± 20.8", "2:4": "66.7 ± 20.8"}
