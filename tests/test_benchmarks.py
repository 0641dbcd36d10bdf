"""The benchmarks run, on small sizes; what they measure is another matter."""

import time
from functools import partial

import pytest
import torch

import cram_bench as cb
from benchmarks import peer, preconditioners, sections, sparse_layers, timing


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sections, "STEPS", 1)
    monkeypatch.setattr(sections, "BATCH", 8)
    monkeypatch.setattr(timing, "REPEATS", 3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
    half = torch.full((3,), 0.5)
    return cb.data.Images("random", images, torch.arange(16) % 10, tuple("abcdefghij"), half, half)


@pytest.mark.parametrize("method", ["sgd", "sam", "cram+", "cram-single"])
def test_our_side_trains(method, small):
    trainer = sections.Trainer(method, small, precision="float32", compile=False)
    before = trainer.model.conv1.weight.clone()
    trainer()
    assert not torch.equal(trainer.model.conv1.weight, before)


def test_the_peers_step_is_ours(small):
    """One step of the straightforward implementation and one of ours, from the same weights: the same in float64."""
    model, other = (cb.models.create("resnet20", 10).double().train() for _ in range(2))
    other.load_state_dict(model.state_dict())
    inputs, labels = small.normalise(small.images).double(), small.labels
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    base = torch.optim.SGD(model.parameters(), **options)
    optimizer = cb.optim.CrAM(model, base, cb.compress.Magnitude(0.7), rho=0.2)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    theirs = peer.cram_plus_step(other, torch.optim.SGD(other.parameters(), **options), inputs, labels, [0.7], 0.2)
    assert float(loss.detach()) == pytest.approx(theirs, rel=1e-12)
    kept = {name: int(mask.sum()) for name, mask in peer.global_masks(other, 0.7).items()}
    assert abs(sum(kept.values()) - 0.3 * sum(p.numel() for p in other.parameters() if p.ndim > 1)) <= 1
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8, msg=name)


def test_memory_is_counted_and_stays_below_two_copies(small):
    found = {line.name: line.ratio for line in sections.memory()}
    assert 0 < found["extra memory in weights"] <= 2.01  # and the loss, the labels …
    assert 0 < found["extra memory of sam in weights"] <= 2.01


def test_turns():
    line = timing.in_turns(
        "x", lambda: time.sleep(0.001), lambda: time.sleep(0.004), kind="speed", unit="ms", repeats=3
    )
    assert line.low <= line.ratio <= line.high
    assert line.ratio > 1
    with pytest.raises(ValueError, match="kind must be speed or cost, not 'price'"):
        timing.in_turns("x", list, list, kind="price")


def test_accuracy_beside_the_eager_implementation(small, monkeypatch):
    fit = cb.train.fit
    monkeypatch.setattr(cb.train, "fit", lambda *given, **how: fit(*given, **how | {"compile": False}))
    monkeypatch.setattr(sections, "data", lambda: (small, small))
    monkeypatch.setattr(sections, "SEEDS", 2)
    lines = list(sections.accuracy())
    assert len(lines) == 2
    assert all(line.low <= line.ratio <= line.high and line.unit == "%" for line in lines)


def test_a_hessian_vector_product_is_compared_with_curvlinops(small, monkeypatch):
    monkeypatch.setattr(sections, "data", lambda: (small, small))
    lines = list(sections.hessian())
    assert [line.name for line in lines] == [
        "hessian-vector product over curvlinops",
        "hessian-vector product over curvlinops, three batches",
    ]
    assert all(line.low <= line.ratio <= line.high for line in lines)


def test_preconditioners_are_compared_with_sgd(small, monkeypatch):
    trainer = partial(sections.Trainer, precision="float32", compile=False)
    methods = {"s-m-fac": {"gradients": 5}, "lowrank-m-fac": {"gradients": 40}, "ggt": {"gradients": 3}}
    monkeypatch.setattr(sections, "Trainer", trainer)
    monkeypatch.setattr(sections, "data", lambda: (small, small))
    monkeypatch.setattr(preconditioners, "METHODS", methods)
    monkeypatch.setattr(preconditioners, "LENGTHS", (40,))
    monkeypatch.setattr(preconditioners, "LIMIT", 30 * 2**20)  # 40 whole gradients are 42 MiB
    monkeypatch.setattr(preconditioners, "WIDE", wide := {"s-m-fac": {"gradients": 3}})
    monkeypatch.setattr(preconditioners, "NETWORKS", {"0.27M": "resnet20", "0.02M": "convnet"})
    empty = []

    def in_turns(name, ours, peer, kind, unit):
        window = ours.func.__self__ if isinstance(ours, partial) else ours.optimizer.window
        empty.extend([name] * (window.filled < window.gradients))
        assert kind == "cost"
        return name, ours(), peer()

    monkeypatch.setattr(preconditioners, "in_turns", in_turns)
    lines = list(preconditioners.preconditioners())
    assert not empty  # a ring that fills is faster than a full one
    timed = [line for line in lines if isinstance(line, tuple)]
    pushes = [f"push of {ring}, 0.27M, m 40" for ring in ("s-m-fac", "low rank")]
    pushes += [f"push of {ring}, 0.02M, m 40" for ring in ("dense", "s-m-fac", "low rank")]
    steps = [*(f"{m} step over sgd, 0.27M" for m in methods), *(f"{m} step over sgd, 0.02M" for m in wide)]
    assert [line[0].split(", over")[0] for line in timed] == [*steps, *pushes]
    for _, u, gradient in timed[len(steps) :]:
        assert u.shape == gradient.shape
        assert u.isfinite().all()
        assert u.any()
    memory = {line.name: line.ratio for line in lines if not isinstance(line, tuple)}
    assert memory["memory of dense, 0.27M, m 40, over dense"] == 1
    assert 0.02 < memory["memory of s-m-fac, 0.27M, m 40, over dense"] < 0.06
    whole = next(line for line in lines if not isinstance(line, tuple))
    count = sum(p.numel() for p in cb.models.create("resnet20", 10).parameters())
    assert (whole.ours, whole.peer, whole.unit) == (*[pytest.approx((40 * 4 * count + 8 * 40**2) / 2**20)] * 2, "MiB")


def test_a_large_store_is_compared_with_a_small_one(monkeypatch):
    monkeypatch.setattr(sections, "LARGE", 12)
    monkeypatch.setattr(sections, "SMALL", 6)
    monkeypatch.setattr(sections, "in_turns", lambda name, *sides, kind: (name, kind, [side() for side in sides]))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    lines = list(sections.store())
    names = [name.removesuffix(", 12 runs over 6") for name, _, _ in lines]
    assert names[2:] == ["open by id", "open by the beginning of an id", "cram-bench runs", "a new run on the digits"]
    assert {kind for _, kind, _ in lines} == {"cost"}


@pytest.mark.parametrize("name", sparse_layers.LAYERS)
def test_a_sparse_layer_and_its_peers_compute_the_same(name):
    build, size = sparse_layers.LAYERS[name]
    torch.manual_seed(0)
    ours, peers = sparse_layers.of_layer(build(), torch.randn(2, *size), 0.9)
    assert list(peers) == ["dense float32", "dense bfloat16", *["torch CSR"] * name.startswith("linear")]
    x, weight, *_ = ours()
    assert 0.85 < float((weight == 0).float().mean()) < 0.95
    wide, full, *_ = peers["dense float32"]()
    torch.testing.assert_close(x, wide, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weight, full * (weight != 0), rtol=1e-3, atol=1e-3)
    half, *_ = peers["dense bfloat16"]()
    assert half.dtype is torch.bfloat16
    if "torch CSR" in peers:
        values, turned, _ = peers["torch CSR"]()
        torch.testing.assert_close(turned.t(), x, rtol=1e-3, atol=1e-4)
        full = values.to_dense()  # torch computes it at zeros too
        torch.testing.assert_close(full * (weight != 0), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cram", [False, True])
def test_steps_of_a_sparse_network(cram, monkeypatch):
    monkeypatch.setattr(sparse_layers, "BATCH", 4)
    ours, peers = sparse_layers.of_step(0.95, cram)
    before = [float(work()) for work in (ours, *peers.values())]
    assert before == pytest.approx([before[0]] * 3, rel=0.05)
