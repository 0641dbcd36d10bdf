"""Sparse layers against float64, with the kernel and without; exchanging layers and putting them back."""

import copy
import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import cram_bench as cb
from cram_bench.compress import Magnitude, apply_, prunable
from cram_bench.deploy import (
    ChannelwiseBatchNorm2d,
    CompilerError,
    SparseConv2d,
    SparseLinear,
    dense_,
    kernel,
    nonzeros,
    normalisation,
    swap_,
    swapping,
)
from cram_bench.deploy.kernel import FLAGS, compiled, find_compiler, fingerprint, load
from cram_bench.deploy.memory import Memory, memory
from cram_bench.optim import HeldMasks
from cram_bench.preserve import clones
from cram_bench.runs.how import Machine

ROOT = Path(__file__).resolve().parent.parent
NO_COMPILER = os.environ.get("CRAM_BENCH_TEST_NO_COMPILER") == "1"  # the tests that run themselves again


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """One thread, and the kernel however few weights are zero."""
    monkeypatch.setattr(nonzeros, "_MOST", 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def eager(monkeypatch):
    """Threads share out work however little it is."""
    monkeypatch.setattr(nonzeros, "WORK", 1)


def sparse(layer, keep=0.2, seed=0):
    """A layer whose weights are mostly zero, the first row and the first column of all inputs among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < keep)
        if len(layer.weight) > 1 and layer.weight.shape[1] > 1:
            layer.weight[0] = 0
            layer.weight[:, 0] = 0
    return layer


def compare(layer, x, tolerance=1e-5):
    """Outputs and gradients of the sparse layer against the dense one's in float64, each relative to its norm."""
    exact = copy.deepcopy(layer).double()
    layer.__class__ = swapping.SPARSE[type(layer)]
    wide, x = x.double().requires_grad_(), x.clone().requires_grad_()
    y, found = exact(wide), layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy.double())
    found.backward(dy)
    assert found.dtype is torch.float32
    assert torch.equal(layer.weight.grad[layer.weight == 0], torch.zeros(int((layer.weight == 0).sum())))
    pairs = [(found, y), (x.grad, wide.grad), (layer.weight.grad, exact.weight.grad * (exact.weight != 0))]
    if layer.bias is not None:
        pairs.append((layer.bias.grad, exact.bias.grad))
    for ours, right in pairs:
        assert ours.shape == right.shape
        assert float((ours - right).detach().norm()) <= tolerance * float(right.detach().norm())


LINEAR = [(1, 65, 43), (5, 65, 43), (37, 16, 1), (130, 7, 90), (300, 700, 20)]
CONVOLUTIONS = {
    "3x3": ((3, 1, 1), (32, 32)),
    "1x1": ((1, 1, 0), (8, 8)),
    "5x5": ((5, 1, 2), (9, 13)),
    "3x3 stride 2": ((3, 2, 1), (32, 32)),
    "3x3 stride 2, odd": ((3, 2, 1), (15, 18)),
    "1x1 stride 2": ((1, 2, 0), (16, 16)),
    "5x5 stride 3": ((5, 3, 0), (20, 19)),
    "3x3 unpadded": ((3, 1, 0), (3, 3)),
    "padded by more than the kernel": ((3, 1, 4), (5, 6)),
    "dilated": ((3, 1, 2, 2), (10, 11)),
    "dilated by its stride": ((3, 3, 2, 3), (12, 12)),
    "not square, in groups": (((3, 5), (1, 2), (0, 3), (2, 1), 2), (14, 11)),
    "depthwise": ((3, 1, 1, 1, 6), (8, 8)),
    "same": ((3, 1, "same"), (7, 7)),
    "same, even": (((2, 4), 1, "same"), (7, 9)),
    "circular": ((3, 1, 1, 1, 1, True, "circular"), (8, 8)),
    "reflected": ((3, 2, 1, 1, 1, False, "reflect"), (9, 8)),
    "wide": ((3, 1, 1), (2, 70)),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", LINEAR, ids=str)
def test_a_linear_layer_against_float64(size, count, eager):
    torch.set_num_threads(count)
    batch, inputs, outputs = size
    compare(sparse(nn.Linear(inputs, outputs)), torch.randn(batch, inputs))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_convolution_against_float64(name, count, eager):
    torch.set_num_threads(count)
    options, size = CONVOLUTIONS[name]
    for batch in (5, 1):
        compare(sparse(nn.Conv2d(6, 12, *options)), torch.randn(batch, 6, *size))


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_of_images_and_the_smaller_last_one(count, eager, monkeypatch):
    monkeypatch.setattr(nonzeros, "_CACHE", 40_000)
    torch.set_num_threads(count)
    for batch in (7, 11, 20):
        compare(sparse(nn.Conv2d(16, 4, 3, padding=1)), torch.randn(batch, 16, 9, 10))
        compare(sparse(nn.Conv2d(4, 16, 3, 2, padding=1)), torch.randn(batch, 4, 17, 16))
        compare(sparse(nn.Linear(300, 40)), torch.randn(10 * batch, 300))


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_and_everything_is_zero(keep):
    layer = nn.Conv2d(5, 3, 3, padding=1)
    with torch.no_grad():
        layer.weight.mul_(keep)
    compare(layer, torch.randn(3, 5, 6, 6))
    layer = nn.Linear(20, 4)
    with torch.no_grad():
        layer.weight.mul_(keep)
    compare(layer, torch.randn(3, 20))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_convolution_against_float64(data, eager):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    groups, inputs, outputs = draw(1, 2), draw(1, 4), draw(1, 4)
    size, stride = (draw(1, 4), draw(1, 4)), (draw(1, 3), draw(1, 3))
    padding, dilation = (draw(0, 3), draw(0, 3)), (draw(1, 3), draw(1, 3))
    image = (draw(1, 20), draw(1, 40))
    assume(all(image[i] + 2 * padding[i] > dilation[i] * (size[i] - 1) for i in (0, 1)))
    torch.set_num_threads(draw(1, 2))
    layer = nn.Conv2d(
        groups * inputs, groups * outputs, size, stride, padding, dilation, groups, data.draw(st.booleans())
    )
    compare(sparse(layer, data.draw(st.floats(0, 1))), torch.randn(draw(1, 9), groups * inputs, *image))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (1, 7)], ids=str)
def test_a_linear_layer_takes_any_number_of_dimensions(shape):
    compare(sparse(nn.Linear(7, 5), 0.5), torch.randn(shape))


def test_an_image_without_a_batch():
    compare(sparse(nn.Conv2d(3, 4, 3)), torch.randn(3, 8, 8))


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1)], ids=["linear", "convolution"])
@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "weight bias", "input bias", "input weight"])
def test_what_needs_no_gradient_gets_none(layer, frozen):
    layer = sparse(copy.deepcopy(layer), 0.5)
    dense = copy.deepcopy(layer)
    dense_x = torch.randn(4, 6, 7, 6) if layer.weight.ndim == 4 else torch.randn(4, 6)
    x = dense_x.clone()
    layer.__class__ = swapping.SPARSE[type(layer)]
    for each, given_x in ((dense, dense_x), (layer, x)):
        for name in ("weight", "bias"):
            getattr(each, name).requires_grad_(name not in frozen)
        given_x.requires_grad_("input" not in frozen)
        each(given_x).square().sum().backward()
    pairs = [(dense_x, x), (dense.weight, layer.weight), (dense.bias, layer.bias)]
    for name, (expected, found) in zip(("input", "weight", "bias"), pairs, strict=True):
        assert (found.grad is None) == (name in frozen)
        if found.grad is not None:
            right = expected.grad * (expected != 0) if name == "weight" else expected.grad
            torch.testing.assert_close(found.grad, right, rtol=1e-4, atol=1e-5)


def test_inputs_in_any_memory_format():
    x = torch.randn(4, 6, 9, 7)
    layer = sparse(nn.Conv2d(6, 5, 3, padding=1))
    layer.__class__ = SparseConv2d
    expected = layer(x)
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(
        layer(torch.randn(4, 9, 7, 12)[..., ::2].copy_(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), expected
    )
    layer.to(memory_format=torch.channels_last)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


def test_the_same_numbers_twice():
    """Sums are made in one order, however often; and a thread more changes none of those of a weight."""
    layer = sparse(nn.Linear(200, 100))
    layer.__class__ = SparseLinear
    x = torch.randn(64, 200)
    (first,), (second,) = (torch.autograd.grad(layer(x).square().sum(), layer.weight) for _ in range(2))
    assert torch.equal(first, second)


# ---------------------------------------------------------------- weights that change


def test_weights_may_change_and_so_may_their_zeros():
    layer = sparse(nn.Linear(30, 20))
    layer.__class__ = SparseLinear
    x = torch.randn(8, 30)
    dense = F.linear
    for change in (
        lambda w: w.mul_(2.0),
        lambda w: w.data.mul_(-1.0),
        lambda w: w.masked_fill_(torch.rand(w.shape) < 0.5, 0.0),  # fewer
        lambda w: w.data.copy_(torch.randn(w.shape) * (torch.rand(w.shape) < 0.3)),  # others
        lambda w: w.data.roll(1, 1),
        lambda w: w.data.copy_(w.data.roll(1, 1)),  # as many, elsewhere
        lambda w: w.data.fill_(0.0),
        lambda w: w.data.fill_(1.0),
    ):
        layer(x)
        with torch.no_grad():
            change(layer.weight)
        torch.testing.assert_close(layer(x), dense(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        assert bool((gradient[layer.weight == 0] == 0).all())


def test_the_gradient_is_that_of_the_weights_of_the_forward_pass():
    layer = sparse(nn.Linear(30, 20))
    layer.__class__ = SparseLinear
    x = torch.randn(8, 30, requires_grad=True)
    y = layer(x)
    before = layer.weight.detach().clone()
    layer.weight.data.mul_(3.0)  # as another pass with other weights does, behind autograd's back
    layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(8, 20) @ before)


@pytest.mark.skipif(NO_COMPILER, reason="about the kernel")
def test_the_dense_layer_computes_where_few_weights_are_zero(monkeypatch):
    """As in the first pass of CrAM; what was found for the second is still known after it."""
    monkeypatch.setattr(nonzeros, "_MOST", 0.5)
    layer = nn.Linear(10, 10)
    layer.__class__ = SparseLinear
    whole, x = layer.weight.detach().clone(), torch.randn(3, 10)
    found = []
    monkeypatch.setattr(nonzeros.Nonzeros, "__init__", counted_init(found, nonzeros.Nonzeros.__init__))
    for kept, times in ((5, 1), (10, 1), (5, 1), (6, 1), (4, 2)):
        layer.weight.data.copy_(whole).view(-1)[kept * 10 :] = 0
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
        assert len(found) == times


def counted_init(found, original):
    def init(self, *given):
        found.append(self)
        original(self, *given)

    return init


def test_nan_and_infinity_come_through():
    layer = sparse(nn.Linear(30, 20))
    with torch.no_grad():
        layer.weight[3, 5], layer.weight[4, 6] = float("nan"), float("inf")
    layer.__class__ = SparseLinear
    y = layer(torch.ones(2, 30))
    assert bool(y[:, 3].isnan().all())
    assert bool((y[:, 4] == float("inf")).all())
    assert bool(y[:, 5:].isfinite().all())


def test_a_second_derivative_goes_through_the_dense_layer():
    for layer, x in (
        (sparse(nn.Linear(6, 5), 0.5), torch.randn(4, 6)),
        (sparse(nn.Conv2d(3, 5, 3, padding=1), 0.5), torch.randn(4, 3, 5, 5)),
    ):
        second = []
        for each in (copy.deepcopy(layer), layer):
            if each is layer:
                each.__class__ = swapping.SPARSE[type(layer)]
            given_x = x.clone().requires_grad_()
            gx, gw = torch.autograd.grad(each(given_x).sin().sum(), (given_x, each.weight), create_graph=True)
            gw = gw * (each.weight != 0)
            second.append(torch.autograd.grad(gx.square().sum() + gw.pow(3).sum(), (given_x, each.weight, each.bias)))
        mask = layer.weight != 0
        for index, (right, ours) in enumerate(zip(*second, strict=True)):
            torch.testing.assert_close(ours, right * mask if index == 1 else right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_types_are_computed_densely(kind):
    layer = sparse(nn.Linear(6, 5), 0.5).to(kind)
    x = torch.randn(4, 6, dtype=kind)
    expected = layer(x)
    layer.__class__ = SparseLinear
    assert torch.equal(layer(x), expected)
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert gradient.dtype is kind
    assert bool((gradient[layer.weight == 0] == 0).all())


def test_autocast_leaves_sparse_layers_in_float32():
    layer = sparse(nn.Linear(6, 5), 0.5)
    layer.__class__ = SparseLinear
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    assert torch.equal(y, layer(x.bfloat16().float()))


def test_transforms_of_torch_func():
    layer = sparse(nn.Linear(6, 5), 0.5)
    x = torch.randn(4, 6)
    expected = torch.func.vmap(layer)(x)
    layer.__class__ = SparseLinear
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    call = torch.func.functional_call(layer, {"weight": layer.weight * 2}, (x,))
    torch.testing.assert_close(call, F.linear(x, layer.weight * 2, layer.bias))


# ---------------------------------------------------------------- swapping


@pytest.fixture
def always(monkeypatch):
    """Whatever the clock says, sparse layers are the faster."""
    monkeypatch.setattr(swapping, "medians", lambda works, repeats: ([work() for work in works], [0.002, 0.001])[1])


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = cb.models.create("resnet20", 10)
    apply_(model, Magnitude(0.9))
    return model


def images(count=6):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_swapping_and_putting_back(model, always):
    """Names, values, modes, gradients, and what is random stay; outputs are the same, and again bit for bit."""
    model.train()
    before, kinds = bits(model), [type(m) for m in model.modules()]
    parameters, state = list(model.parameters()), torch.get_rng_state()
    table = swap_(model, images())
    assert torch.equal(torch.get_rng_state(), state)
    assert same(bits(model), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in parameters)
    assert all(m.training for m in model.modules())
    assert list(table.columns) == list(swapping.COLUMNS)
    assert table["taken"].all()
    norms = table[table["kind"] == "BatchNorm2d"]
    assert norms["layer"].tolist() == [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(norms["reason"]) == {"channel by channel is 2.00 × as fast"}
    assert all(type(m) is ChannelwiseBatchNorm2d for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    taken, table = table["layer"].tolist(), table[table["kind"] != "BatchNorm2d"]
    assert len(table) == 20
    assert table["layer"].tolist() == [
        name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    assert table["weights"].sum() == sum(w.numel() for w in prunable(model).values())
    assert (table["weights"] * table["sparsity"]).sum() == pytest.approx(0.9 * table["weights"].sum(), abs=1)
    assert table["speedup"].tolist() == pytest.approx([2.0] * 20)
    assert set(table["reason"]) == {"sparse is 2.00 × as fast"}
    assert sum(isinstance(m, (SparseConv2d, SparseLinear)) for m in model.modules()) == 20
    assert list(prunable(model)) == table["layer"].add(".weight").tolist()
    model.eval()
    ours = model(images())
    memory().empty(1 << 20)  # lent and given back
    assert memory().unused >= 1 << 22
    names = dense_(model)
    assert memory().unused == 0
    assert sorted(names) == sorted(taken)
    assert [type(m) for m in model.modules()] == kinds
    assert same(bits(model), before)
    torch.testing.assert_close(ours, model(images()), rtol=1e-4, atol=1e-4)
    assert not any("_products" in vars(m) for m in model.modules())


def test_a_layer_is_taken_only_where_it_is_faster(model, monkeypatch):
    times = itertools.chain([(0.003, 0.001), (0.001, 0.002), (0.001, 0.001)], itertools.repeat((0.001, 0.004)))
    monkeypatch.setattr(swapping, "medians", lambda works, repeats: next(times))
    table = swap_(model, images())
    assert table["taken"].tolist() == [True] + [False] * 38
    assert table["reason"].tolist()[38] == "torch's is 4.00 × as fast"
    assert table["reason"].tolist()[:3] == [
        "sparse is 3.00 × as fast",
        "dense is 2.00 × as fast",
        "dense is 1.00 × as fast",
    ]
    assert (table["dense_ms"].tolist()[0], table["sparse_ms"].tolist()[0]) == (3.0, 1.0)
    assert type(model.conv1) is SparseConv2d
    assert type(model.layer1[0].conv1) is nn.Conv2d
    again = swap_(model, images())  # what was taken stays, and is not asked again
    assert "conv1" not in again["layer"].tolist()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_median_of_warm_runs_decides(threads, monkeypatch):
    times = [9.0, 3.0, 1.0, 1.0, 2.0, 8.0]  # of the dense and the sparse layer in turns
    clock = itertools.chain.from_iterable((10.0 * i, 10.0 * i + t) for i, t in enumerate(times))
    calls = []
    name = "thread_time" if threads == 1 else "perf_counter"  # of one thread, others take no part in it
    monkeypatch.setattr(swapping.time, name, lambda: next(clock))
    torch.set_num_threads(threads)
    found = swapping.medians([lambda: calls.append("dense"), lambda: calls.append("sparse")], 3)
    assert found == [2.0, 3.0]
    assert calls == ["dense", "sparse"] * 4


def test_what_is_timed_is_what_the_layer_gets(monkeypatch, model):
    """Forward and backward on the inputs of the model; the gradient of the pixels, which nobody needs, is left out."""
    seen = {}

    def note(layer, x, other, backward, repeats):
        seen[layer] = (x.shape, x.requires_grad, backward, repeats)
        return 1.0, 2.0

    monkeypatch.setattr(swapping, "_medians", note)
    swap_(model, images(), backward=False, repeats=7)
    assert seen[model.conv1] == ((6, 3, 32, 32), False, False, 7)
    assert seen[model.layer2[0].conv2] == ((6, 32, 16, 16), True, False, 7)


class Odd(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_left_says_why(always):
    model = nn.ModuleDict({
        "zeros": sparse(nn.Linear(4, 4)), "full": nn.Linear(4, 4), "odd": sparse(Odd(4, 4)),
        "unused": sparse(nn.Linear(4, 4)), "wide": sparse(nn.Linear(4, 4)).double(), "meta": nn.Linear(4, 4),
        "norm": torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "pruned": prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
    })  # fmt: skip
    model["meta"] = nn.Linear(4, 4)

    def forward(x):
        for name, layer in model.items():
            if name != "unused":
                x = layer(x.double() if name == "wide" else x).float()
        return x

    model.forward = forward
    table = swap_(model, torch.randn(3, 4)).set_index("layer")
    assert table.loc["zeros", "taken"]
    assert not table["taken"].drop("zeros").any()
    reasons = table["reason"]
    assert reasons["full"] == reasons["meta"] == "no weight is zero"
    assert reasons["odd"] == "Odd may compute otherwise than the layer that it comes from"
    assert reasons["unused"] == "the sample does not run it"
    assert reasons["wide"] == "its weights are float64, and the kernel is for float32"
    assert reasons["norm"] == reasons["pruned"] == "its weight is computed from other parameters"
    assert table["dense_ms"].drop("zeros").isna().all()


def test_real_times_decide_something():
    """No second is asserted: every row has positive times, and their ratio is what decided."""
    torch.manual_seed(0)
    model = nn.Sequential(sparse(nn.Linear(300, 200), 0.02), nn.ReLU(), sparse(nn.Linear(200, 10), 0.9))
    table = swap_(model, torch.randn(64, 300), repeats=3)
    assert (table[["dense_ms", "sparse_ms"]] > 0).all(axis=None)
    assert (table["taken"] == (table["speedup"] > 1)).all()
    kinds = [SparseLinear if taken else nn.Linear for taken in table["taken"]]
    assert [type(model[0]), type(model[2])] == kinds
    assert not any("_products" in vars(m) for m in model.modules())  # nothing of what was timed is kept


def test_a_model_that_fails_on_the_sample_is_left_as_it_was(model, always):
    before = bits(model)
    with pytest.raises(RuntimeError):
        swap_(model, torch.randn(2, 4, 32, 32))
    assert same(bits(model), before)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(isinstance(m, SparseConv2d) for m in model.modules())


def test_copies_pickles_and_checkpoints(model, always):
    swap_(model, images())
    model.eval()
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any("_products" in vars(m) for m in other.modules())
        assert torch.equal(other(images()), expected)
        other.conv1.weight.data.zero_()  # not a view of the other's
    assert torch.equal(model(images()), expected)
    plain = cb.models.create("resnet20", 10).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(images()), expected, rtol=1e-4, atol=1e-4)
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    assert torch.equal(model(images()), expected)


def test_masks_and_probes_go_on(always):
    _, test = cb.data.load("digits")
    torch.manual_seed(0)
    model, few = cb.models.create("convnet", 10, 1), test.sample(60)
    masks = apply_(model, Magnitude(0.8))
    names = list(prunable(model))

    def probed():
        curve = cb.probes.sparsity_curve(model, few, ["global@0.9", "2:4"])
        return [*curve["loss"].tolist(), float(cb.probes.curvature(model, few, vectors=2)["value"].iloc[-1])]

    dense = probed()
    swap_(model, next(few.batches(20))[0])
    assert any(isinstance(m, SparseConv2d) for m in model.modules())
    assert list(prunable(model)) == names
    masks.apply_(model)
    assert probed()[:-1] == pytest.approx(dense[:-1], rel=1e-3)


def test_fine_tuning_with_held_masks_is_that_of_the_dense_model(model, always):
    """The same three steps up to rounding, and what was pruned stays an exact zero."""
    runs = []
    other = copy.deepcopy(model)
    labels = torch.arange(6)
    for each in (model, other):
        each.eval()  # statistics of six images would blow rounding up
        masks = cb.compress.Masks.of(prunable(each))
        if each is other:
            swap_(each, images())
        base = torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
        optimizer = HeldMasks(each, base, masks)

        def closure(each=each, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(each(images()), labels)
            loss.backward()
            return loss.detach()

        runs.append([float(optimizer.step(closure)) for _ in range(3)])
        assert all(bool((w[~masks[name]] == 0).all()) for name, w in prunable(each).items())
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0][2] != pytest.approx(runs[0][0], rel=1e-3)
    for one, two in zip(clones(list(model.parameters())), other.parameters(), strict=True):
        torch.testing.assert_close(one, two.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("plus", [False, True])
def test_a_step_of_cram_with_a_sparse_second_pass_is_that_of_the_dense_model(plus, always, monkeypatch):
    """The first pass sees no zero and is dense; of the second CrAM takes the gradient at nonzeros only."""
    monkeypatch.setattr(nonzeros, "_MOST", 0.4)
    torch.manual_seed(0)
    model = cb.models.create("resnet20", 10).eval()
    other = copy.deepcopy(model)
    pruned = copy.deepcopy(model)
    apply_(pruned, Magnitude(0.9))
    swap_(pruned, images())
    for layer, sparse_layer in zip(other.modules(), pruned.modules(), strict=True):
        layer.__class__ = sparse_layer.__class__
    losses, labels = [], torch.arange(6)
    for each in (model, other):
        base = torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9)
        optimizer = cb.optim.CrAM(each, base, Magnitude(0.9), rho=0.001, plus=plus)
        for _ in range(2):

            def closure(each=each, optimizer=optimizer):
                optimizer.zero_grad()
                loss = F.cross_entropy(each(images()), labels)
                loss.backward()
                losses.append(float(loss.detach()))
                return loss.detach()

            optimizer.step(closure)
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-3)
    for one, two in zip(clones(list(model.parameters())), other.parameters(), strict=True):
        torch.testing.assert_close(one, two.detach(), rtol=1e-2, atol=1e-4)


def test_a_training_may_use_them_and_is_the_same_experiment(always, monkeypatch):
    store = cb.runs.Store()
    source = cb.runs.ensure(cb.recipes.recipe("digits", epochs=1), store, progress=False)
    tuned = cb.recipes.recipe("digits", epochs=1, start=source.id, prune="global@0.9", lr=0.01)
    dense = cb.runs.ensure(tuned, store, progress=False)
    history, weights = dense.history, bits(dense.load_model())
    assert "sparse" not in dense.environment
    shutil.rmtree(dense.path)
    seen, plain = [], SparseConv2d.forward
    monkeypatch.setattr(SparseConv2d, "forward", lambda layer, x: (seen.append(layer), plain(layer, x))[1])
    sparse_run = cb.runs.ensure(tuned, store, progress=False, sparse=True)
    assert seen
    assert sparse_run.id == dense.id
    assert sparse_run.environment["sparse"] is True
    assert not any(isinstance(m, (SparseConv2d, SparseLinear)) for m in sparse_run.load_model().modules())
    ours = bits(sparse_run.load_model())
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name] == 0, weights[name] == 0) for name in prunable(sparse_run.load_model()))
    assert sparse_run.history["train_loss"].tolist() == pytest.approx(history["train_loss"].tolist(), rel=1e-2)
    seen.clear()
    unpruned = cb.recipes.recipe("digits", epochs=1, seed=1)
    half = cb.recipes.recipe("digits", epochs=1, start=source.id, prune="global@0.9", lr=0.01, precision="bfloat16")
    for experiment in (unpruned, half):  # nothing is held, or a dense layer in bfloat16 would be the rival
        cb.runs.ensure(experiment, store, progress=False, sparse=True)
    assert not seen


def test_one_process_and_no_compilation():
    train, _ = cb.data.load("digits")
    long = cb.recipes.recipe("digits", epochs=155)
    assert Machine().suited(long, train).compile is True
    assert Machine(sparse=True).suited(long, train).compile is False
    several = types.SimpleNamespace(world=2, device="cpu")
    with pytest.raises(ValueError, match="sparse is for one process, not for 2"):
        Machine(sparse=True).joined(several)


def test_a_training_with_cram_may_compute_its_second_pass_sparsely(monkeypatch):
    """Timed at the compressor that leaves most; at θ, where no weight is zero, layers compute densely."""
    seen, store = [], cb.runs.Store()
    experiment = cb.recipes.recipe("digits", "cram+", epochs=1, compressors=("global@0.95", "global@0.9"))
    dense = cb.runs.ensure(experiment, store, progress=False)
    shutil.rmtree(dense.path)

    def timed(layer, x, other, backward, repeats):
        seen.append((layer.weight.numel(), int((layer.weight != 0).sum())))
        return 2.0, 1.0

    monkeypatch.setattr(swapping, "_medians", timed)
    monkeypatch.setattr(nonzeros, "_MOST", 0.4)
    products, plain = [], nonzeros._Product.forward

    def forward(ctx, x, weight, *rest):
        products.append(float((weight != 0).float().mean()))
        return plain(ctx, x, weight, *rest)

    monkeypatch.setattr(nonzeros._Product, "forward", staticmethod(forward))
    run = cb.runs.ensure(experiment, store, progress=False, sparse=True)
    layers = seen[: len(prunable(run.load_model()))]
    assert sum(kept for _, kept in layers) / sum(size for size, _ in layers) == pytest.approx(0.1, abs=0.01)
    assert run.id == dense.id
    assert products or NO_COMPILER
    assert max(products, default=0) <= 0.4
    assert run.history["train_loss"].tolist() == pytest.approx(dense.history["train_loss"].tolist(), rel=0.02)
    shutil.rmtree(run.path)
    seen.clear()
    other = cb.recipes.recipe("digits", "cram+", epochs=1, sparse_gradients=False)  # needs the gradient at zeros too
    cb.runs.ensure(other, store, progress=False, sparse=True)
    assert not seen


# ---------------------------------------------------------------- BatchNorm and memory


def normalised(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    wanted = (x, *layer.parameters())
    return [y.detach(), *torch.autograd.grad(y, wanted, dy), *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [(1, 1, 3, 3), (5, 3, 7, 7), (4, 16, 8, 8), (3, 5, 50, 50), (2, 3, 1, 1)], ids=str)
def test_batch_norm_by_channel_against_float64(size, affine, count, eager):
    torch.set_num_threads(count)
    torch.manual_seed(0)
    x, dy = 100 + 3 * torch.randn(size), torch.randn(size)
    layer = ChannelwiseBatchNorm2d(size[1], affine=affine, momentum=0.3)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    exact = nn.BatchNorm2d(size[1], affine=affine, momentum=0.3).double()
    exact.load_state_dict(layer.state_dict())
    layer(x + 1)  # statistics and counts go on from there
    exact(x.double() + 1)
    for ours, right in zip(normalised(layer, x, dy), normalised(exact, x.double(), dy.double()), strict=True):
        assert ours.shape == right.shape
        assert float((ours - right).double().norm()) <= 2e-5 * float(right.double().norm()) + 1e-5
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.skipif(NO_COMPILER, reason="about the kernel")
def test_batch_norm_by_channel_is_torchs_where_it_is_not_meant(monkeypatch):
    calls = []
    forward = normalisation._Normalised.forward
    monkeypatch.setattr(
        normalisation._Normalised, "forward", staticmethod(lambda *given: (calls.append(1), forward(*given))[1])
    )
    x = torch.randn(4, 6, 5, 5)
    layer, dense = ChannelwiseBatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, momentum=None)
    for _ in range(3):  # momentum None: the mean of all batches
        layer(x * 2)
        dense(x * 2)
    assert len(calls) == 3
    for name, buffer in dense.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer)
    dense.load_state_dict(layer.state_dict())
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(last), dense(last))
    assert torch.equal(layer.eval()(x), dense.eval()(x))
    wide, dense_wide = layer.double().train(), dense.double().train()
    assert torch.equal(wide(x.double()), dense_wide(x.double()))
    with pytest.raises(ValueError, match="expected 4D input"):
        ChannelwiseBatchNorm2d(6)(x[0])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ChannelwiseBatchNorm2d(6)(x[:1, :, :1, :1])
    assert len(calls) == 3
    without = ChannelwiseBatchNorm2d(6, track_running_stats=False)
    torch.testing.assert_close(without(x), nn.BatchNorm2d(6, track_running_stats=False)(x))
    given = ChannelwiseBatchNorm2d(6)
    given.weight.requires_grad_(False)
    given(x).sum().backward()
    assert given.weight.grad is None
    assert given.bias.grad.tolist() == [100.0] * 6


def test_a_second_derivative_of_batch_norm_by_channel():
    x = torch.randn(3, 2, 4, 4)
    found = []
    for layer in (nn.BatchNorm2d(2), ChannelwiseBatchNorm2d(2)):
        given_x = x.clone().requires_grad_()
        gx, gw = torch.autograd.grad(layer(given_x).sin().sum(), (given_x, layer.weight), create_graph=True)
        found.append(torch.autograd.grad(gx.square().sum() + gw.pow(3).sum(), (given_x, *layer.parameters())))
    for right, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


def test_timing_batch_norm_leaves_its_statistics(model):
    before = bits(model.train())
    swap_(model, images(), repeats=1)
    assert same(bits(model), before)
    model.eval()
    assert "BatchNorm2d" not in swap_(model, images(), backward=False, repeats=1)["kind"].tolist()
    rest = swap_(model, images(), repeats=1)
    assert set(rest.loc[rest["kind"] == "BatchNorm2d", "reason"]) <= {"it does not train"}


def test_memory_is_used_again_when_no_tensor_looks_at_it():
    kept = Memory(most=10 << 20)
    first = kept.empty(2, 1 << 18)
    place, part = first.data_ptr(), first[1].view(512, 512)
    assert first.dtype is torch.float32
    assert first.shape == (2, 1 << 18)
    del first
    assert kept.empty(1 << 19).data_ptr() != place  # a part of it is in use
    assert kept.unused == 2 << 20
    part.fill_(7.0)
    del part
    assert kept.unused == 4 << 20
    again = kept.empty(1 << 19), kept.empty(1 << 19)
    assert place in {tensor.data_ptr() for tensor in again}
    assert kept.unused == 0
    kept.clear()
    del again  # lent before: not kept any more
    assert kept.unused == 0


def test_memory_that_is_kept_is_bounded():
    kept = Memory(most=5 << 20)
    several = [kept.empty(1 << 19) for _ in range(4)]
    several.clear()
    assert kept.unused == 4 << 20
    small = kept.empty(100)
    del small
    assert kept.unused == 4 << 20
    large = kept.empty(1 << 20)  # of another size: what would not stand beside it goes
    assert kept.unused == 0
    del large
    assert kept.unused == 4 << 20


@pytest.mark.skipif(NO_COMPILER, reason="about the kernel")
def test_outputs_and_gradients_lie_in_memory_that_is_kept():
    memory().clear()
    layer = sparse(nn.Conv2d(16, 16, 3, padding=1))
    layer.__class__ = SparseConv2d
    chain = nn.Sequential(layer, ChannelwiseBatchNorm2d(16))
    x = torch.randn(16, 16, 32, 32, requires_grad=True)
    chain(x).sum().backward()
    x.grad = None
    assert memory().unused == 2 << 20  # outputs of both, which the gradients then took
    dense_(chain)


@pytest.mark.parametrize("width", [32, 48, 33])
def test_large_outputs_are_streamed(width, monkeypatch):
    """Above 16 MiB, past the caches, where lines are whole vectors; the numbers are the same."""
    layer = sparse(nn.Conv2d(4, 33, 3, padding=1), 0.1)
    x = torch.randn(70, 4, 60, width)
    dense = layer(x)
    layer.__class__ = SparseConv2d
    torch.testing.assert_close(layer(x), dense, rtol=1e-4, atol=1e-5)
    layer = sparse(nn.Conv2d(33, 4, 3, padding=1), 0.1)
    x = torch.randn(70, 33, 60, width, requires_grad=True)
    (right,) = torch.autograd.grad(layer(x).square().sum(), x)
    layer.__class__ = SparseConv2d
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the kernel


needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="there is no compiler here, on purpose")


@needs_compiler
def test_the_kernel_is_compiled_here():
    """Elsewhere its tests would test what stands in for it."""
    assert compiled() is not None


def python(code, **environment):
    call = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300, check=False)


@needs_compiler
def test_a_denormal_number_survives_the_kernel():
    done = python(
        "import torch\n"
        "tiny = torch.tensor([1e-40])\n"
        "from cram_bench.deploy import SparseLinear\nfrom cram_bench.deploy.kernel import compiled\n"
        "assert compiled() is not None\n"
        "assert 4.9e-41 < float(tiny * 0.5) < 5.1e-41, tiny * 0.5\n"
        "layer = SparseLinear(2, 1, bias=False)\n"
        "layer.weight.data.copy_(torch.tensor([[1e-40, 0.0]]))\n"
        "y = layer(torch.tensor([[0.5, 1.0]]))\n"
        "assert 4.9e-41 < float(y) < 5.1e-41, y\n"
        "y.backward()\n"
        "import numpy\n"
        "assert numpy.float32(1e-40) * numpy.float32(0.5) > 0\n"
        "print(layer.weight.grad.tolist())\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[0.5, 0.0]]\n"


def test_flags_that_change_the_process_are_not_used():
    changing = {"-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only", "-fassociative-math"}
    assert not changing & set(FLAGS)


def test_without_a_compiler_the_same_tests_pass(tmp_path):
    """Run this file again in a process that finds no compiler."""
    if NO_COMPILER:
        pytest.skip("this is it")
    chosen = "float64 or change or held or nan or gradient or zero or swapping or copies or second"
    call = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        f"({chosen}) and not without",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "CC" and not k.startswith("PYTEST")}
    environment |= {"PATH": str(tmp_path), "CRAM_BENCH_TEST_NO_COMPILER": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) > 50


@pytest.mark.skipif(not NO_COMPILER, reason="run by the test above")
def test_one_warning_says_that_there_is_no_compiler_held(monkeypatch):
    compiled.cache_clear()
    layer = sparse(nn.Linear(6, 5), 0.5)
    layer.__class__ = SparseLinear
    both = torch.randn(3, 6), torch.randn(3, 6)
    with pytest.warns(UserWarning, match="slower: no compiler was found, neither .CC nor cc, gcc, clang") as caught:
        list(map(layer, both))
    assert len(caught) == 1


@needs_compiler
def test_compiled_once_for_several_processes(tmp_path):
    code = "from cram_bench.deploy.kernel import compiled; assert compiled() is not None"
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: python(code, XDG_CACHE_HOME=str(tmp_path)), range(3)))
    assert all(one.returncode == 0 and not one.stderr for one in done), [one.stderr for one in done]
    files = sorted(path.name for path in (tmp_path / "cram_bench" / "kernels").iterdir())
    assert files == [files[0], f"{files[0]}.lock", f"{files[0]}.sha256"]
    assert files[0].endswith(".so")


@needs_compiler
def test_a_damaged_kernel_is_compiled_anew(tmp_path):
    load(tmp_path)
    (path,) = tmp_path.glob("*.so")
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    assert load(tmp_path).lanes in (4, 8, 16)
    assert path.stat().st_size == len(whole)


@needs_compiler
def test_a_kernel_is_loaded_not_compiled_again(tmp_path, monkeypatch):
    load(tmp_path)
    monkeypatch.setattr(kernel, "_compile", lambda *given: pytest.fail("compiled again"))
    load(tmp_path)


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert load(tmp_path / "file" / "kernels").lanes in (4, 8, 16)


def test_the_name_of_a_kernel_says_all_that_it_depends_on(tmp_path, monkeypatch):
    compilers = []
    for number in (1, 2):
        path = tmp_path / f"compiler{number}"
        path.write_text(f"#!{sys.executable}\nprint({number})\n")
        path.chmod(0o755)
        compilers.append([str(path)])
    first = fingerprint(b"source", compilers[0])
    assert first == fingerprint(b"source", compilers[0])
    others = {fingerprint(b"other", compilers[0]), fingerprint(b"source", compilers[1])}
    others.add(fingerprint(b"source", [*compilers[0], "-m32"]))
    path = Path(compilers[0][0])
    path.write_text(path.read_text().replace("1", "7"))  # a new version under the same name
    others.add(fingerprint(b"source", compilers[0]))
    path.write_text(path.read_text().replace("7", "1"))
    monkeypatch.setattr(kernel, "FLAGS", (*FLAGS, "-g"))
    others.add(fingerprint(b"source", compilers[0]))
    monkeypatch.setattr(kernel, "FLAGS", FLAGS)
    monkeypatch.setattr(kernel, "_processor", lambda: b"another")
    others.add(fingerprint(b"source", compilers[0]))
    assert len(others | {first}) == 7


def test_a_compiler_is_looked_for(tmp_path, monkeypatch):
    for name in ("clang", "mine"):
        (tmp_path / name).write_text("#!/bin/false\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert find_compiler() == [str(tmp_path / "clang")]
    monkeypatch.setenv("CC", "mine -m64")
    assert find_compiler() == [str(tmp_path / "mine"), "-m64"]
    with pytest.raises(CompilerError, match="mine failed: exit status 1"):
        kernel._compile(b"", tmp_path / "x", [str(tmp_path / "mine")])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompilerError, match="no compiler was found"):
        find_compiler()


@needs_compiler
def test_an_error_of_the_compiler_is_one_line(tmp_path):
    with pytest.raises(CompilerError, match=r"failed: <stdin>:1:\d+: error: ") as caught:
        kernel._compile(b"int x = y;\nint z = w;\n", tmp_path / "x.so", find_compiler())
    assert "\n" not in str(caught.value)


@needs_compiler
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_vectors_of_other_processors(processor, tmp_path, monkeypatch, eager):
    """The same source with vectors of 8 and of 4 floats."""
    if kernel.platform.machine() != "x86_64":
        pytest.skip("names of x86-64")
    monkeypatch.setattr(kernel, "FLAGS", tuple(f"-march={processor}" if "march" in f else f for f in FLAGS))
    other = load(tmp_path)
    assert other.lanes == {"x86-64-v3": 8, "x86-64": 4}[processor]
    monkeypatch.setattr(nonzeros, "compiled", lambda: other)
    monkeypatch.setattr(normalisation, "compiled", lambda: other)
    for size in ((5, 3, 7, 7), (3, 5, 50, 50)):
        x, dy = torch.randn(size), torch.randn(size)
        pairs = normalised(ChannelwiseBatchNorm2d(size[1]), x, dy), normalised(nn.BatchNorm2d(size[1]), x, dy)
        for ours, right in zip(*pairs, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
    for batch, inputs, outputs in LINEAR:
        compare(sparse(nn.Linear(inputs, outputs)), torch.randn(batch, inputs))
    for name in ("3x3", "5x5", "3x3 stride 2, odd", "not square, in groups", "wide"):
        options, size = CONVOLUTIONS[name]
        compare(sparse(nn.Conv2d(6, 12, *options)), torch.randn(5, 6, *size))


def test_the_source_is_in_the_package():
    assert b"find_nonzeros" in resources.files("cram_bench.deploy").joinpath("kernel.c").read_bytes()


def test_importing_compiles_nothing(tmp_path):
    done = python("import cram_bench.deploy", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
