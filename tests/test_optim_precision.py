"""Where the second gradient is taken, in half precision, mixed types and sparse gradients: float64 by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cram_bench as cb
from cram_bench.compress import Magnitude

HALF = [torch.float16, torch.bfloat16]
RHO = 0.25


class Bag(nn.Module):
    """Three tensors and a matrix that is prunable, of any types."""

    def __init__(self, types):
        super().__init__()
        torch.manual_seed(0)
        self.values = nn.ParameterList(torch.randn(5).to(kind) for kind in types)
        self.matrix = nn.Linear(4, 3, bias=False).to(types[0])


def plain(m, b):
    return cb.optim.CrAM(m, b, Magnitude(0.0), RHO, normalize=True)


def single(ascent):
    return lambda m, b: cb.optim.CrAMSingle(m, b, Magnitude(0.0), RHO, plain=0.0, ascent=ascent, normalize=True)


ASCENTS = {
    "sam": lambda m, b: cb.optim.SAM(m, b, RHO),
    "asam": lambda m, b: cb.optim.SAM(m, b, RHO, adaptive=True),
    "cram": plain,
    "momentum-sam": lambda m, b: cb.optim.MomentumSAM(m, b, RHO),
    "cram-single momentum": single("momentum"),
    "cram-single gradient": single("gradient"),
}


def where(kind, model, directions):
    """The weights at a step's last evaluation; `directions` are gradients, or momenta, in float64."""
    optimizer = ASCENTS[kind](model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9))
    parameters = list(model.parameters())
    given = [d.to(p.dtype) for p, d in zip(parameters, directions, strict=True)]
    if "momentum" in kind:
        for parameter, value in zip(parameters, given, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = value.clone()
    seen = []

    def closure():
        seen.append([p.detach().clone().double() for p in parameters])
        for parameter, value in zip(parameters, given, strict=True):
            parameter.grad = value.clone()
        return 0.0

    for _ in range(2 if kind == "cram-single gradient" else 1):
        optimizer.step(closure)
    assert all(p.isfinite().all() for p in parameters)
    return seen[-1], [g.double() for g in given]


def by_hand(kind, values, directions):
    scaled = [v.abs() * d for v, d in zip(values, directions, strict=True)] if kind == "asam" else directions
    norm = math.sqrt(sum(float((s * s).sum()) for s in scaled))
    up = [v.abs() * s for v, s in zip(values, scaled, strict=True)] if kind == "asam" else directions
    sign = -1 if "momentum" in kind else 1
    return [v + sign * RHO * u / norm if norm else v for v, u in zip(values, up, strict=True)]


SIZES = {
    "zero": lambda p: torch.zeros(p.shape),
    "tiny": lambda p: torch.linspace(0, 3e-7, p.numel()).view(
        p.shape
    ),  # 1/‖g‖ is no float16, and some entries are zero
    "usual": lambda p: torch.linspace(-1, 2, p.numel()).view(p.shape),
    "huge": lambda p: torch.linspace(-3e4, 3e4, p.numel()).view(p.shape),  # ‖g‖ is no float16
}


@pytest.mark.parametrize("kind", ASCENTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("types", [*([t] * 3 for t in HALF), [torch.float16, torch.float32, torch.float64]])
def test_half_precision_ascends_by_the_float32_norm(kind, size, types):
    model = Bag(types)
    values = [p.detach().double() for p in model.parameters()]
    seen, directions = where(kind, model, [SIZES[size](p).double() for p in model.parameters()])
    for ours, theirs, parameter in zip(seen, by_hand(kind, values, directions), model.parameters(), strict=True):
        kept = theirs.to(parameter.dtype)
        epsilon = torch.finfo(parameter.dtype).eps if parameter.dtype in HALF else 1e-6
        torch.testing.assert_close(ours, kept.double(), rtol=epsilon, atol=1e-7 if size == "zero" else 2e-6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", [*ASCENTS, "cram unnormalised"])
def test_half_precision_weights_survive_a_gradient_of_zero(kind, dtype):
    """The case that was found: the network is saturated, its gradient zero, and the weights became NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    build = ASCENTS.get(kind, lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5)))
    optimizer = build(model, base)
    for factor in (0.0, 1.0, 0.0):

        def closure(factor=factor):
            optimizer.zero_grad()
            loss = (model(torch.ones(2, 4, dtype=dtype)).float() * factor).square().sum()
            loss.backward()
            return loss.detach()

        assert math.isfinite(optimizer.step(closure))
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_norm_is_over_all_groups_and_each_group_has_its_radius(small_model, small_batch):
    """The step of SAM by hand, in float64; taken per group, or with one radius for all, it would differ."""
    parameters = list(small_model.parameters())
    groups = [{"params": parameters[:2], "rho": 0.4}, {"params": parameters[2:]}]
    for kind, adaptive, own in (("sam", False, {}), ("asam", True, {}), ("both", True, {"adaptive": False})):
        groups[0] |= own
        optimizer = cb.optim.SAM(small_model, torch.optim.SGD(groups, lr=0.0), rho=0.1, adaptive=adaptive)
        seen = []

        def closure(optimizer=optimizer, seen=seen):
            optimizer.zero_grad()
            seen.append([p.detach().clone() for p in parameters])
            loss = F.cross_entropy(small_model(small_batch[0]), small_batch[1])
            loss.backward()
            seen.append([p.grad.clone() for p in parameters])
            return loss

        optimizer.step(closure)
        start, gradients, moved = seen[:3]
        adapts = [adaptive if index >= 2 else own.get("adaptive", adaptive) for index in range(len(start))]
        size = [v.abs() if alike else torch.ones_like(v) for v, alike in zip(start, adapts, strict=True)]
        norm = math.sqrt(sum(float((s * g).square().sum()) for s, g in zip(size, gradients, strict=True)))
        for index, (ours, v, s, g) in enumerate(zip(moved, start, size, gradients, strict=True)):
            expected = v + (0.4 if index < 2 else 0.1) * s * s * g / norm
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12, msg=kind)
        for group in groups:
            group.pop("adaptive", None)


@pytest.mark.parametrize("kind", ["sam", "momentum-sam", "cram", "cram-single momentum", "cram-single gradient"])
def test_the_radius_of_a_group_counts_in_every_method(kind, small_model):
    """One group stays where it is, the other moves by its own ρ: both directions have the norm 1 over both groups."""
    parameters = list(small_model.parameters())
    groups = [{"params": parameters[:2], "rho": 0.0}, {"params": parameters[2:], "rho": 0.5}]
    optimizer = ASCENTS[kind](small_model, torch.optim.SGD(groups, lr=0.0, momentum=0.9))
    count = sum(p.numel() for p in parameters)
    sign = -1 if "momentum" in kind else 1
    for parameter in parameters:
        if sign < 0:
            optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    seen = []

    def closure():
        seen.append([p.detach().clone() for p in parameters])
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        return 0.0

    start = [p.detach().clone() for p in parameters]
    for _ in range(2 if kind == "cram-single gradient" else 1):
        optimizer.step(closure)
    for index, (v, ours) in enumerate(zip(start, seen[-1], strict=True)):
        expected = v + (0 if index < 2 else sign * 0.5 / math.sqrt(count))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


class Words(nn.Module):
    def __init__(self, sparse, bag):
        super().__init__()
        torch.manual_seed(0)
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.table, self.head = kind(7, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, words):
        rows = self.table(words)
        return self.head(rows if rows.dim() == 2 else rows.mean(1))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("kind", [*ASCENTS, "cram unnormalised", "cram unpruned gradients", "held"])
def test_sparse_gradients_do_what_dense_ones_do(kind, bag, scaled):
    """Words are repeated, so that the sparse gradient has rows more than once."""
    build = ASCENTS | {
        "cram unnormalised": lambda m, b: cb.optim.CrAM(m, b, [Magnitude(0.3), Magnitude(0.6)]),
        "cram unpruned gradients": lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5), sparse_gradients=False),
        "held": lambda m, b: cb.optim.HeldMasks(m, b, cb.compress.apply_(m, Magnitude(0.5))),
    }
    models = [Words(sparse, bag).double() for sparse in (True, False)]
    words, labels = torch.tensor([[0, 1, 1], [2, 1, 5], [3, 3, 3]]), torch.tensor([0, 1, 2])
    for model in models:
        optimizer = build[kind](model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)

        def closure(model=model, optimizer=optimizer, scaler=scaler):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(words), labels)
            scaler.scale(loss).backward()
            return loss.detach()

        for _ in range(4):
            optimizer.step(closure, scaler=scaler)
            scaler.update()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert models[0].table.weight.grad.is_sparse


@pytest.mark.parametrize("kind", [*ASCENTS, "cram unnormalised"])
def test_default_types_and_devices_change_nothing(kind, small_model, small_batch):
    """The draws stay on the CPU and in float32: a training resumed under other defaults draws the same."""
    builds = ASCENTS | {
        "cram unnormalised": lambda m, b: cb.optim.CrAM(m, b, [Magnitude(0.3), Magnitude(0.6)], plain=0.4)
    }
    models = [copy.deepcopy(small_model) for _ in range(3)]
    for model, default in zip(models, ("none", "type", "device"), strict=True):
        try:
            if default == "type":
                torch.set_default_dtype(torch.float64)
            if default == "device":
                torch.set_default_device("meta")
            base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            optimizer = builds[kind](model, base)
            for _ in range(6):

                def closure(model=model, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(small_batch[0]), small_batch[1])
                    loss.backward()
                    return loss

                optimizer.step(closure)
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    for other in models[1:]:
        assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), other.parameters(), strict=True))
