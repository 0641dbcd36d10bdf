"""SAFE: twenty steps against its formulas in float64, the rise of its penalty, its end, and its state."""

import copy
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cram_bench as cb
from cram_bench import runs
from cram_bench.optim.safe import SAFE, Rise
from cram_bench.recipes import recipe
from cram_bench.runs import Store, ensure

ETA, MU, DECAY, RHO, LAMBDA, EVERY = 0.2, 0.9, 0.01, 0.3, 0.4, 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def top(weights, sparsity):
    """The largest magnitudes of all matrices together, as the loop over a sorted list finds them."""
    every = sorted(
        (abs(value), place, index)
        for place, w in enumerate(weights)
        for index, value in enumerate(w.flatten().tolist())
    )
    dropped = every[: round(sparsity * len(every))]
    flat = [w.clone().flatten() for w in weights]
    for _, place, index in dropped:
        flat[place][index] = 0.0
    return [f.view(w.shape) for f, w in zip(flat, weights, strict=True)]


def penalty(step, steps):
    return LAMBDA * (1 - math.cos(math.pi * step / steps)) / 2


def by_hand(x, y, steps, sparsity):
    """W ← base step with g(w + ρ g/‖g‖) + λ_t(w − z + u); every K steps z = TopK(w + u), u += w − z; in float64."""
    model = network()
    parameters = [p.detach().clone() for p in model.parameters()]
    matrices = [0, 2]

    def gradient(at):
        at = [p.clone().requires_grad_() for p in at]
        hidden = torch.tanh(x @ at[0].T + at[1])
        return torch.autograd.grad(F.cross_entropy(hidden @ at[2].T + at[3], y), at)

    z = top([parameters[m] for m in matrices], sparsity)
    u = [torch.zeros_like(w) for w in z]
    velocity = None
    for step in range(steps):
        g = gradient(parameters)
        norm = math.sqrt(sum(float(part.square().sum()) for part in g))
        g = list(gradient([p + RHO * part / norm for p, part in zip(parameters, g, strict=True)]))
        for place, m in enumerate(matrices):
            g[m] = g[m] + penalty(step, steps) * (parameters[m] - z[place] + u[place])
        g = [part + DECAY * p for part, p in zip(g, parameters, strict=True)]
        velocity = g if velocity is None else [MU * v + part for v, part in zip(velocity, g, strict=True)]
        parameters = [p - ETA * v for p, v in zip(parameters, velocity, strict=True)]
        if (step + 1) % EVERY == 0:
            z = top([parameters[m] + u[place] for place, m in enumerate(matrices)], sparsity)
            u = [u[place] + parameters[m] - z[place] for place, m in enumerate(matrices)]
    return parameters, z, u


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def built(sparsity=0.75, **changes):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=ETA, momentum=MU, weight_decay=DECAY)
    return model, SAFE(model, base, **({"sparsity": sparsity, "rho": RHO, "penalty": LAMBDA, "every": EVERY} | changes))


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_twenty_steps_are_the_formulas(sparsity, small_batch):
    model, optimizer = built(sparsity)
    for step in range(20):
        optimizer.penalty = penalty(step, 20)
        optimizer.step(closure_of(model, optimizer, *small_batch))
    parameters, z, u = by_hand(*small_batch, 20, sparsity)
    for ours, theirs in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(optimizer.sparse.values(), z, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert torch.equal(ours == 0, theirs == 0)
    for ours, theirs in zip(optimizer.dual.values(), u, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    masks = optimizer.project_()
    assert masks.zeros == round(sparsity * 144)
    for ours, theirs in zip(
        (model[0].weight, model[2].weight), top([parameters[0], parameters[2]], sparsity), strict=True
    ):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-9)


def test_it_starts_from_the_projected_weights_and_leaves_the_model_alone():
    model, optimizer = built(0.5)
    before = network()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    z = top([model[0].weight.detach(), model[2].weight.detach()], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.sparse.values(), z, strict=True))
    assert not any(bool(u.any()) for u in optimizer.dual.values())
    assert set(optimizer.sparse) == {"0.weight", "2.weight"}  # biases are not pulled


def test_without_a_penalty_it_is_sam(small_batch):
    model, optimizer = built(penalty=0.0)
    other = network()
    sam = cb.optim.SAM(other, torch.optim.SGD(other.parameters(), lr=ETA, momentum=MU, weight_decay=DECAY), rho=RHO)
    for _ in range(7):
        optimizer.step(closure_of(model, optimizer, *small_batch))
        sam.step(closure_of(other, sam, *small_batch))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_goes_on_bit_for_bit(small_batch):
    """At step 8 of 20, between two projections, with z and u of the first."""
    straight, optimizer = built()
    for _ in range(8):
        optimizer.step(closure_of(straight, optimizer, *small_batch))
    model, again = built()
    model.load_state_dict(straight.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(12):
        optimizer.step(closure_of(straight, optimizer, *small_batch))
        again.step(closure_of(model, again, *small_batch))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(optimizer.dual[name], again.dual[name]) for name in again.dual)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: torch.optim.SGD(network().parameters(), lr=0.1), "was not saved by SAFE"),
        (lambda: built(0.5)[1], "saved with sparsity 0.5, not 0.75"),
        (lambda: built(every=7)[1], "saved with every 7, not 6"),
    ],
)
def test_a_state_of_another_is_one_line(other, message):
    _, optimizer = built()
    before = {name: value.clone() for name, value in optimizer.sparse.items()}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other().state_dict())
    assert all(torch.equal(optimizer.sparse[name], value) for name, value in before.items())


def test_a_state_of_another_model_is_one_line():
    _, optimizer = built()
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    theirs = SAFE(model, torch.optim.SGD(model.parameters(), lr=ETA, momentum=MU), 0.75, every=EVERY)
    with pytest.raises(ValueError, match="the state was saved for another model"):
        optimizer.load_state_dict(theirs.state_dict())


def test_a_step_that_a_scaler_leaves_out_counts_for_nothing(small_batch):
    model = network().float()
    optimizer = SAFE(model, torch.optim.SGD(model.parameters(), lr=ETA), 0.75, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    x, y = small_batch

    def closure(factor=1.0):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.float()), y) * factor
        scaler.scale(loss).backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(lambda: closure(float("inf")), scaler=scaler)
    scaler.update()
    assert optimizer.count == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    optimizer.step(closure, scaler=scaler)
    assert optimizer.count == 1
    plain = network().float()
    other = SAFE(plain, torch.optim.SGD(plain.parameters(), lr=ETA), 0.75, every=1)
    other.step(closure_of(plain, other, x.float(), y))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):  # the pull is not scaled
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- in training


def test_the_penalty_rises_as_a_half_cosine_and_the_end_is_sparse_with_batchnorm_tuned():
    experiment = recipe("digits", "safe", epochs=2, penalty=0.3, sparsity=0.8)
    train, test = experiment.load_data()
    model = experiment.build_model(train)
    optimizer = experiment.build_optimizer(model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.penalty))
    rows = cb.train.fit(model, optimizer, train, test, epochs=2, batch_size=128, callbacks=[Rise(train)])
    steps = 2 * (len(train) // 128)
    assert seen == pytest.approx([0.3 * (1 - math.cos(math.pi * t / steps)) / 2 for t in range(steps)])
    assert optimizer.penalty == 0.3
    weights = cb.compress.prunable(model)
    count = sum(weight.numel() for weight in weights.values())
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(0.8 * count)
    assert rows[-1]["test_accuracy"] == cb.train.evaluate(model, test)["accuracy"]  # of the sparse network
    tuned = copy.deepcopy(model)
    cb.compress.tune_batchnorm(tuned, train.calibration(10_000))
    for a, b in zip(tuned.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b)


def test_without_a_penalty_it_pulls_as_much_as_the_papers_training():
    """1e-3 over 200 epochs of 391 steps is 0.0133 over 15 of them, whose half cosine sums to half of 78.2."""
    for epochs in (1, 3):
        experiment = recipe("digits", "safe", epochs=epochs)
        train, test = experiment.load_data()
        model = experiment.build_model(train)
        optimizer = experiment.build_optimizer(model)
        seen = []
        optimizer.register_step_pre_hook(lambda *_, own=optimizer, seen=seen: seen.append(own.penalty))
        cb.train.fit(model, optimizer, train, test, epochs=epochs, batch_size=128, callbacks=[Rise(train)])
        assert sum(seen) == pytest.approx(78.2 / 2 * (1 - 1 / len(seen)), rel=0.02)
        assert seen[0] == 0
        assert optimizer.penalty == 0  # as it was


@pytest.mark.parametrize("epoch", [1, 2])
def test_resume(epoch, tmp_path, monkeypatch):
    experiment = recipe("digits", "safe", epochs=3, penalty=0.3, **{"step.every": 7})
    straight = ensure(experiment, Store(tmp_path / "straight"), progress=False)
    store, on_epoch = Store(tmp_path / "interrupted"), runs.Checkpoint.on_epoch

    def interrupted(self, fit):
        on_epoch(self, fit)
        if fit.epoch == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "on_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure(experiment, store, progress=False)
    resumed = ensure(experiment, store, progress=False)
    assert (resumed.path / "model.safetensors").read_bytes() == (straight.path / "model.safetensors").read_bytes()
    pd.testing.assert_frame_equal(resumed.history.drop(columns="seconds"), straight.history.drop(columns="seconds"))
    assert cb.compress.sparsity(resumed.load_model()) == pytest.approx(0.9, abs=1e-4)


def test_two_gradients_a_step():
    assert recipe("digits", "safe", epochs=10).gradients == 20.0
    assert recipe("digits", "safe", epochs=10, halves=True).gradients == 10.0


def test_what_is_excluded_is_not_pulled():
    _, optimizer = built(exclude=["2.weight"])
    assert set(optimizer.sparse) == set(optimizer.dual) == {"0.weight"}
    assert optimizer.project_().zeros == 72


def test_a_state_whose_dual_is_of_another_model_is_one_line():
    _, optimizer = built()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["safe"]["dual"]["0.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="the state was saved for another model"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sparsity": 1.0}, "sparsity must be in"), ({"penalty": -1.0}, "penalty"), ({"every": 0}, "every"),
     ({"rho": -1.0}, "rho"), ({"sparsity": math.nan}, "sparsity")],
)  # fmt: skip
def test_what_cannot_be_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        built(**changes)
    assert len(str(caught.value).splitlines()) == 1
