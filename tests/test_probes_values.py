"""Probes against values by hand, in float64."""

import copy
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cram_bench as cb

# ------------------------------------------------------------------------------------------------------- BatchNorm


class Alone(nn.Module):
    """A BatchNorm that gets batches in the layout that they are given in."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x)


LAYOUTS = {
    "1d": (nn.BatchNorm1d, (6,), torch.contiguous_format),
    "1d, sequences": (nn.BatchNorm1d, (6, 9), torch.contiguous_format),
    "2d": (nn.BatchNorm2d, (6, 5, 4), torch.contiguous_format),
    "2d, channels last": (nn.BatchNorm2d, (6, 5, 4), torch.channels_last),
    "2d, one channel": (nn.BatchNorm2d, (1, 5, 4), torch.channels_last),
    "3d": (nn.BatchNorm3d, (6, 3, 5, 4), torch.contiguous_format),
    "3d, channels last": (nn.BatchNorm3d, (6, 3, 5, 4), torch.channels_last_3d),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tuned_statistics_are_mean_and_unbiased_variance_of_all_samples(layout):
    """Unequal batches far from zero, so that neither a lost mean nor a mean of means passes."""
    norm, shape, memory = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    sizes = (7, 2, 16)
    scale = torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    x = 3 * scale + scale.sqrt() * torch.randn(sum(sizes), *shape, generator=generator)
    x[:7] += 5
    batches = [part.contiguous(memory_format=memory) for part in x.split(sizes)]
    model = Alone(norm(shape[0]))
    cb.compress.tune_batchnorm(model, batches)
    values = x.double().movedim(1, 0).flatten(1)
    np.testing.assert_allclose(model.norm.running_mean, values.mean(1), rtol=1e-5)
    np.testing.assert_allclose(model.norm.running_var, values.var(1, correction=1), rtol=1e-5)
    half = Alone(norm(shape[0]).bfloat16())
    cb.compress.tune_batchnorm(half, [part.bfloat16() for part in batches])
    np.testing.assert_allclose(half.norm.running_var.float(), values.var(1), rtol=2e-2)


class Auxiliary(nn.Module):
    """A head that runs in training only, as those of Inception."""

    def __init__(self):
        super().__init__()
        self.norm, self.head, self.aux = nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(4)
        self.unused, self.second = nn.BatchNorm1d(2), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.second(self.norm(input=x))  # by name
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_batchnorms_that_do_not_run_stay_and_are_named_and_counted():
    torch.manual_seed(0)
    model, x = Auxiliary(), torch.randn(20, 4) * 3 + 1
    with pytest.warns(UserWarning, match=r"^2 of 4 BatchNorms did not run and keep their statistics, aux, unused$"):
        cb.compress.tune_batchnorm(model, [x])
    np.testing.assert_allclose(model.norm.running_mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.second.running_var, [20 / 19] * 4, rtol=1e-4)  # of 20 values scaled to one
    assert model.aux.running_var.tolist() == [1] * 4
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        curve = cb.probes.sparsity_curve(model, [(x, torch.arange(20) % 3)], ["global@0.5"], calibration=[x, x])
    assert len([w for w in said if "BatchNorms did not run" in str(w.message)]) == 1
    assert curve["loss"].notna().all()
    model.forward = lambda x: model.head(x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no BatchNorm of Auxiliary ran"):
        cb.compress.tune_batchnorm(model, [x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ----------------------------------------------------------------------------------------------- a small network


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 4)).double()


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (48,), generator=generator)


def loss_of(model, x, y):
    with torch.no_grad():
        return float(F.cross_entropy(copy.deepcopy(model).eval()(x).float(), y))


def test_the_sample_that_is_given_is_the_one_that_is_used(model, sample):
    x, y = sample
    for part in (slice(0, 20), slice(20, 48)):
        data = [(x[part], y[part])]
        assert cb.probes.sam_sharpness(model, data)["loss"].iloc[0] == pytest.approx(loss_of(model, x[part], y[part]))
        assert cb.probes.cram_gap(model, data, ["2:4"])["loss"].iloc[0] == pytest.approx(
            loss_of(model, x[part], y[part])
        )
        other = copy.deepcopy(model)
        cb.compress.tune_batchnorm(other, [x[part]])
        curve = cb.probes.sparsity_curve(model, [(x, y)], ["global@0.5"], calibration=data)
        dense = curve[curve["sparsity"] == 0].set_index("calibrated")["loss"]
        assert dense[True] == pytest.approx(loss_of(other, x, y), rel=1e-6)
        assert dense[False] == pytest.approx(loss_of(model, x, y), rel=1e-6)
        assert abs(dense[True] - dense[False]) > 1e-3


@pytest.mark.parametrize("tuned", [False, True])
def test_the_gap_in_its_three_parts(tuned, model, sample):
    x, y = sample
    rho, data = 0.7, [(x, y)]
    row = cb.probes.cram_gap(model, data, ["uniform@0.5"], rho, [x] if tuned else None).iloc[0]
    reference = copy.deepcopy(model).eval()
    gradient = torch.autograd.grad(F.cross_entropy(reference(x), y), list(reference.parameters()))
    for column, step, prune in (("gap", rho, True), ("pruning_gap", 0.0, True), ("ascent_gap", rho, False)):
        other = copy.deepcopy(reference)
        with torch.no_grad():
            for p, g in zip(other.parameters(), gradient, strict=True):
                p += step * g
            for layer in (other[0], other[3]) if prune else ():
                flat = layer.weight.view(-1)
                flat[flat.abs().argsort()[: len(flat) // 2]] = 0
        if tuned:
            h = other[0](x).detach()
            other[1].running_mean.copy_(h.mean(0))
            other[1].running_var.copy_(h.var(0))
        assert row[column] == pytest.approx(loss_of(other, x, y) - loss_of(model, x, y), abs=1e-6), column
    assert list(cb.probes.cram_gap(model, data, ["2:4"]).columns)[-3:] == ["gap", "pruning_gap", "ascent_gap"]


class Bowl(nn.Module):
    """A network whose loss, with `loss=mean`, is ½ Σ aᵢ θᵢ²."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([[0.6, -0.8, 0.3], [0.2, -0.4, 1.0]], dtype=torch.float64))
        self.a = torch.tensor([[1.0, 4.0, 2.0], [0.5, 3.0, 1.5]], dtype=torch.float64)
        self.head = nn.Linear(1, 1).double()  # something that is prunable, and is not run

    def forward(self, x):
        return ((self.a * self.theta.square()).sum() / 2).expand(len(x))

    def value(self, theta):
        return float((self.a * theta.square()).sum() / 2)


BOWL = [(torch.zeros(3), torch.zeros(3)), (torch.zeros(2), torch.zeros(2))]


def mean(outputs, targets):
    return outputs.mean()


def test_sharpness_of_a_bowl_in_closed_form():
    """G = aθ: SAM goes ρ g/‖g‖₂, CrAM ρ g; the worst of one step goes to the sphere along g."""
    model = Bowl()
    theta, gradient = model.theta.detach(), (model.a * model.theta).detach()
    for rho in (0.05, 0.5):
        row = cb.probes.sam_sharpness(model, BOWL, rho, loss=mean).iloc[0]
        assert row["loss"] == pytest.approx(model.value(theta), rel=1e-12)
        rise = model.value(theta + rho * gradient / gradient.norm()) - model.value(theta)
        assert row["sharpness"] == pytest.approx(rise, rel=1e-9)
        gap = cb.probes.cram_gap(model, BOWL, ["global@0"], rho, loss=mean).iloc[0]
        expected = model.value(theta + rho * gradient) - model.value(theta)
        assert gap[["gap", "pruning_gap", "ascent_gap"]].tolist() == pytest.approx([expected, 0, expected], rel=1e-9)
        worst = cb.probes.sharpness_over_radii(model, BOWL, [rho], 0, 1, loss=mean).iloc[0]
        assert (worst["kind"], worst["rho"]) == ("worst", rho)
        assert worst["rise"] == pytest.approx(rise, rel=1e-9)
    radii = [0.5, 0.05, 0.1]  # each from the weights, not from where the one before ended
    alone = [cb.probes.sam_sharpness(model, BOWL, rho, loss=mean)["sharpness"].iloc[0] for rho in radii]
    assert cb.probes.sam_sharpness(model, BOWL, radii, loss=mean)["sharpness"].tolist() == pytest.approx(alone)


class Hill(nn.Module):
    """A network whose loss, with `loss=mean`, is θ − 2 θ², from θ = 0."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return (self.theta - 2 * self.theta.square()).expand(len(x))


@pytest.mark.parametrize(("steps", "rise"), [(1, 0.0), (8, 0.125)])
def test_the_worst_of_a_sphere_is_the_highest_on_the_way_not_the_last(steps, rise):
    """One step goes over the hill, to −1; in steps of a quarter its top is met, from which there is no way up."""
    worst = cb.probes.sharpness_over_radii(Hill(), BOWL, [1.0], 0, steps, loss=mean)
    assert worst["rise"].tolist() == pytest.approx([rise], abs=1e-12)


def test_random_radii_are_seeded_directions_of_that_length():
    model = Bowl()
    theta = model.theta.detach()
    table = cb.probes.sharpness_over_radii(model, BOWL, [0.3, 0.6], directions=2, steps=1, seed=4, loss=mean)
    generator = torch.Generator().manual_seed(4)
    for direction in range(2):
        draws = [torch.randn(p.shape, generator=generator).double() for p in model.parameters()]
        length = math.sqrt(sum(float(d.square().sum()) for d in draws))
        for rho in (0.3, 0.6):
            row = table[(table["kind"] == "average") & (table["direction"] == direction) & (table["rho"] == rho)]
            expected = model.value(theta + rho / length * draws[0]) - model.value(theta)
            assert row["rise"].tolist() == pytest.approx([expected], rel=1e-6)


def test_curvature_of_a_bowl_is_its_diagonal():
    """Signs give the trace of a diagonal exactly, with no error; eigenvalues are the entries."""
    model = Bowl()
    table = cb.probes.curvature(model, [(torch.zeros(6), torch.zeros(6))], top=3, vectors=1, parts=3, loss=mean)
    assert table["value"].tolist() == pytest.approx([4, 3, 2, 12], rel=1e-6)
    assert table["error"].tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert table["quantity"].tolist() == ["eigenvalue"] * 3 + ["trace"]
    assert table["rank"].tolist() == [1, 2, 3, 0]


def test_errors_are_the_standard_errors_of_the_parts():
    """L = ½ mean(x) Σ aᵢ θᵢ²: part i has the trace and eigenvalue of its own mean of x."""
    model = Bowl()
    x = torch.tensor([1.0, 2.0, 6.0, 3.0, 4.0, 5.0])
    table = cb.probes.curvature(model, [(x, x)], top=1, vectors=1, parts=3, forward=lambda m, x: m(x) * x, loss=mean)
    means = np.array([x[i::3].mean() for i in range(3)])  # example i is in part i mod 3
    assert table["value"].tolist() == pytest.approx([4 * float(x.mean()), 12 * means.mean()], rel=1e-6)
    error = means.std(ddof=1) / math.sqrt(3)
    assert table["error"].tolist() == pytest.approx([4 * error, 12 * error], rel=1e-6)


# ------------------------------------------------------------------------------------------------ spectral density


def exact(model, x, y):
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector):
        pieces = vector.split([s.numel() for s in shapes])
        values = {n: v.view(s) for n, v, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).numpy()


@pytest.fixture
def spectrum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return model, x, y, exact(model, x, y)


def gaussian(where, eigenvalues, width):
    z = (where[:, None] - eigenvalues) / width
    return (np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / width).mean(1)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_density_is_that_of_the_eigenvalues_under_a_kernel_that_parts_do_not_widen(parts, spectrum):
    model, x, y, eigenvalues = spectrum
    size = len(eigenvalues)
    assert size == 57
    table = cb.probes.spectral_density(model, [(x, y)], points=512, lanczos=40, repeats=40, parts=parts)
    step = float(table["eigenvalue"].diff().iloc[1])
    assert float((table["density"] * step).sum()) == pytest.approx(1, abs=1e-6)
    span = eigenvalues[-1] - eigenvalues[0]
    width = span / 39 / math.sqrt(8 * math.log(3))
    room = max(0.05 * span, 5 * width)
    ends = [table["eigenvalue"].iloc[0] - step / 2, table["eigenvalue"].iloc[-1] + step / 2]
    assert ends == pytest.approx([eigenvalues[0] - room, eigenvalues[-1] + room], abs=1e-3 * span)
    where = table["eigenvalue"].to_numpy()
    expected = gaussian(where, eigenvalues, width)
    assert np.abs(table["density"] - expected).sum() * step < 0.15  # of 2 at most; 40 starting vectors
    wide = cb.probes.spectral_density(model, [(x, y)], lanczos=4, repeats=1, parts=2)
    assert float((wide["density"] * wide["eigenvalue"].diff().iloc[1]).sum()) == pytest.approx(1, abs=1e-6)
    below = float(table.loc[table["eigenvalue"] < 0, "density"].sum() * step)
    smooth = float(expected[where < 0].sum() * step)
    assert below == pytest.approx(smooth, abs=0.05)
    if parts > 2:
        fewer = cb.probes.spectral_density(model, [(x, y)], points=512, lanczos=40, repeats=40, parts=2)
        assert np.array_equal(fewer["eigenvalue"], table["eigenvalue"])
        assert np.array_equal(fewer["density"], table["density"])


def test_the_mass_below_zero_is_the_share_of_the_negative_eigenvalues_where_they_are_apart():
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.full((40,), 0.5, dtype=torch.float64))
            self.a = torch.cat([torch.linspace(-2, -1, 12), torch.linspace(1, 3, 28)]).double()

        def forward(self, x):
            return ((self.a * self.theta.square()).sum() / 2).expand(len(x))

    table = cb.probes.spectral_density(
        Line(), [(torch.zeros(4), torch.zeros(4))], parts=2, lanczos=40, repeats=60, loss=mean
    )
    step = float(table["eigenvalue"].diff().iloc[1])
    below = float(table.loc[table["eigenvalue"] < 0, "density"].sum() * step)
    assert below == pytest.approx(12 / 40, abs=0.04)


# -------------------------------------------------------------------------------------- directions, planes, layers


def test_directions_are_gaussian_draws_with_each_filters_norm_and_leave_out_the_rest(model):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    direction = cb.probes.random_direction(network, seed=9)
    assert list(direction) == ["0.weight", "3.weight"]
    generator = torch.Generator().manual_seed(9)
    for name, tensor in direction.items():
        weight = network.get_parameter(name).detach()
        draw = torch.randn(weight.shape, generator=generator)
        for ours, d, w in zip(tensor, draw, weight, strict=True):
            torch.testing.assert_close(ours, d / d.norm() * w.norm())


def test_a_and_b_of_a_plane_are_the_first_and_the_second_direction(model, sample):
    x, y = sample
    table = cb.probes.loss_in_plane(model, [(x, y)], radius=0.4, points=3, seed=2)
    assert table[["a", "b"]].to_numpy().tolist() == [[a, b] for a in (-0.4, 0.0, 0.4) for b in (-0.4, 0.0, 0.4)]
    one, two = cb.probes.random_direction(model, 2), cb.probes.random_direction(model, 3)
    for a, b in ((-0.4, 0.4), (0.4, -0.4), (0.4, 0.4), (0.4, 0.0)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name in one:
                other.get_parameter(name).add_(a * one[name] + b * two[name])
        row = table[np.isclose(table["a"], a) & np.isclose(table["b"], b)].iloc[0]
        assert row["loss"] == pytest.approx(loss_of(other, x, y), rel=1e-6)
        with torch.no_grad():
            right = (other.eval()(x).argmax(1) == y).double().mean()
        assert row["accuracy"] == pytest.approx(float(right))
    ball = cb.probes.loss_in_ball(model, [(x, y)], radius=0.4, points=3, directions=2, seed=2)
    for index, start in ((0, 2), (1, 3)):
        again = cb.probes.loss_on_grid(model, [(x, y)], [cb.probes.random_direction(model, start)], [-0.4, 0, 0.4])
        assert ball.loc[ball["direction"] == index, "loss"].tolist() == again["loss"].tolist()


def test_the_corners_of_a_plane_through_three_models_are_these_models(model, sample):
    x, y = sample
    others = [copy.deepcopy(model) for _ in range(2)]
    with torch.no_grad():
        others[0][0].weight[0, 0] += 3.0  # e₁ is this weight, e₂ that one
        others[1][3].weight[1, 2] += 4.0
        others[1][0].weight[0, 0] += 1.0
    grid, corners = cb.probes.loss_on_plane(model, *others, [(x, y)], points=2, margin=0.0)
    assert corners["model"].tolist() == ["origin", "first", "second"]
    np.testing.assert_allclose(corners[["a", "b"]].astype(float), [[0, 0], [3, 0], [1, 4]], atol=1e-9)
    for row in grid.itertuples():
        point = copy.deepcopy(model)
        with torch.no_grad():
            point[0].weight[0, 0] += row.a
            point[3].weight[1, 2] += row.b
        assert row.loss == pytest.approx(loss_of(point, x, y), rel=1e-6)
    assert grid[["a", "b"]].to_numpy().tolist() == [[0, 0], [0, 4], [3, 0], [3, 4]]
    with torch.no_grad():
        others[1][0].weight[0, 0] -= 3.0  # now it lies behind the origin, at −2
    grid, _ = cb.probes.loss_on_plane(model, *others, [(x, y)], points=2, margin=0.1)  # of what is spanned: 5 and 4
    np.testing.assert_allclose(grid[["a", "b"]], [[-2.5, -0.4], [-2.5, 4.4], [3.5, -0.4], [3.5, 4.4]], atol=1e-9)


def test_a_path_starts_at_the_first_model_and_ends_at_the_second(model, sample):
    x, y = sample
    end = copy.deepcopy(model)
    with torch.no_grad():
        end[0].weight.mul_(2)
        end[1].running_mean.add_(1)
    table = cb.probes.loss_along_path(model, end, [(x, y)], points=2)
    assert table["t"].tolist() == [0, 1]
    assert table["loss"].tolist() == pytest.approx([loss_of(model, x, y), loss_of(end, x, y)], rel=1e-6)


def test_a_histogram_counts_by_hand():
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-2.0, 0.1, 2.0]]))
        model[1].weight.copy_(torch.tensor([[0.9], [1.1]]))
    table = cb.probes.weight_histogram(model, bins=4)
    assert table["layer"].tolist() == ["0.weight"] * 4 + ["1.weight"] * 4
    assert table["low"].tolist() == [-2, -1, 0, 1] * 2
    assert table["high"].tolist() == [-1, 0, 1, 2] * 2
    assert table["count"].tolist() == [1, 0, 1, 1, 0, 0, 1, 1]  # the last bin is closed


def test_layer_probes_by_hand(model, sample):
    x, y = sample
    dense = loss_of(model, x, y)
    table = cb.probes.layer_sensitivity(model, [(x, y)], [0.5], calibration=[x])
    for row in table.itertuples():
        other = copy.deepcopy(model)
        with torch.no_grad():
            flat = other.get_parameter(row.layer).view(-1)
            flat[flat.abs().argsort()[: round(0.5 * len(flat))]] = 0
            h = other[0](x)
            other[1].running_mean.copy_(h.mean(0))
            other[1].running_var.copy_(h.var(0))
        assert row.loss == pytest.approx(loss_of(other, x, y), rel=1e-5)
        with torch.no_grad():
            assert row.accuracy == pytest.approx(float((other.eval()(x).argmax(1) == y).double().mean()))
        assert row.rise == pytest.approx(loss_of(other, x, y) - dense, abs=1e-5)  # over the dense model, not tuned
    blame = cb.probes.layer_blame(model, [(x, y)], "global@0.6").set_index("layer")
    values = torch.cat([model[0].weight.flatten(), model[3].weight.flatten()]).abs()
    threshold = values.sort().values[round(0.6 * len(values)) - 1]
    for name in ("0.weight", "3.weight"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            weight = other.get_parameter(name)
            weight[weight.abs() <= threshold] = 0
        assert blame.loc[name, "zeros"] == int((weight == 0).sum())
        assert blame.loc[name, "rise"] == pytest.approx(loss_of(other, x, y) - dense, abs=1e-5)
    profile = cb.probes.layer_profile(model, "global@0.2+int2").set_index("layer")
    compressed = cb.compress.compressed(model, "global@0.2+int2")
    zeros = {name: int((compressed.get_parameter(name) == 0).sum()) for name in ("0.weight", "3.weight")}
    assert profile["zeros"].to_dict() == zeros
    assert sum(zeros.values()) > 0.3 * len(values)  # quantization makes some of its own


def test_draws_of_a_calibration_curve_are_different_images_of_the_training_set():
    train, test = cb.data.load("digits")
    test = test.sample(60)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    table = cb.probes.calibration_curve(model, test, train, "global@0.5", [30, 60], draws=2)
    assert table[["size", "draw"]].to_numpy().tolist() == [[0, 0], [30, 0], [30, 1], [60, 0], [60, 1]]
    x, y = next(test.batches(60))
    for row in table.itertuples():
        other = cb.compress.compressed(model, "global@0.5")
        if row.size:
            cb.compress.tune_batchnorm(other, train.calibration(row.size, True, seed=row.draw))
        assert row.loss == pytest.approx(loss_of(other, x, y), rel=1e-5)
    assert table["loss"].nunique() == 5
    plain = cb.probes.calibration_curve(model, test, train, "global@0.5", [30], draws=1, augment=False)
    assert plain["loss"].iloc[1] != table["loss"].iloc[1]
    pd.testing.assert_frame_equal(
        table, cb.probes.calibration_curve(model, test, train, "global@0.5", [30, 60], draws=2)
    )
