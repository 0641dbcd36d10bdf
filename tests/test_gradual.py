"""Gradual pruning: the cubic to one weight, masks that only shrink, exact zeros over every optimizer, exact resume."""

import itertools
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cram_bench as cb
from cram_bench import runs
from cram_bench.optim.gradual import Gradual, GradualMasks, Shrink, cubic
from cram_bench.recipes import recipe
from cram_bench.runs import Store, ensure
from cram_bench.schedules import Cycles


def tiny(method="gmp*", **changes):
    return recipe("digits", method, **({"epochs": 3} | changes))


# ---------------------------------------------------------------- the schedule


def test_the_cubic_by_hand():
    """s_f + (s_i − s_f)(1 − x)³ at x = 0, ¼, ½, ¾, 1, and nothing beyond its ends."""
    by_hand = [0.6, 0.95 - 0.35 * 27 / 64, 0.95 - 0.35 / 8, 0.95 - 0.35 / 64, 0.95]
    assert [cubic(x / 4, 0.6, 0.95) for x in range(5)] == pytest.approx(by_hand, abs=1e-15)
    assert (cubic(-0.1, 0.6, 0.95), cubic(1.1, 0.6, 0.95)) == (pytest.approx(0.6), pytest.approx(0.95))


def test_obert_s_schedule_of_30_epochs():
    """Dense for 2 epochs, then every 4 to epoch 26; the rate is rewound at each of them and ends at a tenth."""
    experiment = recipe("sst2", "obert", epochs=30)
    steps = 30 * 1000
    assert [round(step / 1000) for step in experiment.pruning.levels(steps)] == [2, 6, 10, 14, 18, 22, 26]
    assert all(abs(step / 1000 - round(step / 1000)) < 0.005 for step in experiment.pruning.levels(steps))
    assert list(experiment.pruning.levels(steps).values())[::6] == [pytest.approx(0.7), pytest.approx(0.9)]
    factor = experiment.but(warmup_epochs=0.0).schedule.factor(30, 1000)
    for step in experiment.pruning.levels(steps):
        assert factor(step - 2) == pytest.approx(0.1, abs=0.001)  # one step more or less, for shares are rounded
        assert factor(step + 2) == pytest.approx(1.0, abs=0.001)
    assert factor(0) == 1.0
    assert factor(steps) == pytest.approx(0.1)


@given(
    begin=st.floats(0, 1), end=st.floats(0, 1), times=st.integers(1, 60), steps=st.integers(1, 300),
    low=st.floats(0, 0.99), high=st.floats(0, 0.99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_schedule_begins_ends_and_rises(begin, end, times, steps, low, high):
    begin, end, low, high = min(begin, end), max(begin, end), min(low, high), max(low, high)
    levels = Gradual(initial=low, final=high, begin=begin, end=end, times=times).levels(steps)
    first, last = round(begin * steps), round(end * steps)
    places, values = list(levels), list(levels.values())
    assert places == sorted(places)
    assert places[-1] == last
    assert len(places) <= times
    assert values == sorted(values)
    assert values[-1] == high
    if times > 1 and first < last:
        assert places[0] == first
        assert values[0] == pytest.approx(low)
        assert max(b - a for a, b in itertools.pairwise(places)) <= math.ceil((last - first) / (times - 1)) + 1


# ---------------------------------------------------------------- in training


class Watch(cb.callbacks.Callback):
    """Note, after every step, the zeros and the masks."""

    def __init__(self):
        self.seen, self.masks = {}, []

    def on_step(self, fit, step, loss, correct, seen):
        weights = cb.compress.prunable(fit.model)
        now = {name: (weight == 0).clone() for name, weight in weights.items()}
        self.seen[fit.epoch * fit.steps_per_epoch + step + 1] = sum(int(zero.sum()) for zero in now.values())
        self.masks.append(now)


OPTIMIZERS = ["sgd", "adamw", "sam", "momentum-sam", "cram+-multi", "cram-single", "cram-half", "cram+-looking"]


def experiment_over(method, **changes):
    gradual = {"pruning": "gradual", "begin": 0.2, "end": 0.7, "times": 5, "initial": 0.5, "final": 0.93}
    more = {"step.pruner": "obd(gradients=16)"} if method == "cram+-looking" else {}
    return recipe("digits", method, **({"epochs": 3, "weight_decay": 0.05} | gradual | more | changes))


def watched(experiment):
    train, _ = experiment.load_data()
    model = experiment.build_model(train)
    optimizer = experiment.build_optimizer(model)
    watch = Watch()
    callbacks = [*experiment.step.callbacks(train), *experiment.pruning.callbacks(train), watch]
    cb.train.fit(model, optimizer, train, epochs=experiment.epochs, batch_size=128, schedule=experiment.schedule,
                 halves=experiment.step.halved, callbacks=callbacks)  # fmt: skip
    assert not optimizer._optimizer_step_pre_hooks  # let go of in the end
    assert not optimizer._optimizer_step_post_hooks
    return watch, model, optimizer, len(train) // 128 * experiment.epochs


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_sparsity_is_the_cubic_at_every_step_and_masks_are_nested(method):
    """To one weight, counted after every step as exact zeros, under momentum and strong weight decay."""
    experiment = experiment_over(method)
    watch, model, _, steps = watched(experiment)
    count = sum(weight.numel() for weight in cb.compress.prunable(model).values())
    first, last = round(0.2 * steps), round(0.7 * steps)
    places = [first + round(place * (last - first) / 4) for place in range(5)]
    expected, wanted = 0, {}
    for step in range(1, steps + 1):
        if step in places:
            share = (step - first) / (last - first)
            expected = round((0.93 + (0.5 - 0.93) * (1 - share) ** 3) * count)
        wanted[step] = expected
    assert watch.seen == wanted
    assert expected == round(0.93 * count)
    for before, after in itertools.pairwise(watch.masks):
        assert all(bool((after[name] | ~before[name]).all()) for name in before)


def test_a_schedule_from_the_beginning_prunes_before_the_first_step():
    watch, model, _, _ = watched(experiment_over("sgd", begin=0.0, epochs=1))
    assert watch.seen[1] == round(0.5 * sum(weight.numel() for weight in cb.compress.prunable(model).values()))


@pytest.mark.parametrize(
    "pruner", ["uniform", "obd(gradients=32)", "obert(gradients=32)", "greedy(gradients=32,block=16)"]
)
def test_any_pruner_at_each_step(pruner):
    watch, model, _, steps = watched(experiment_over("sgd", pruner=pruner))
    weights = cb.compress.prunable(model)
    count = sum(weight.numel() for weight in weights.values())
    allowed = len(weights) / 2 if pruner == "uniform" else 0.5  # which rounds in every tensor
    for step, level in experiment_over("sgd").pruning.levels(steps).items():
        assert abs(watch.seen[step] - level * count) <= allowed
    for before, after in itertools.pairwise(watch.masks):
        assert all(bool((after[name] | ~before[name]).all()) for name in before)


def test_a_pruner_that_looks_ranks_and_corrects_what_is_left():
    """As its own `fit` with what is gone: the same masks, the same corrected values."""
    train, _ = cb.data.load("digits")
    torch.manual_seed(1)
    model = cb.models.create("convnet", 10, 1, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradual = GradualMasks(model, optimizer)
    gone = None
    for seed, sparsity in ((3, 0.5), (7, 0.8)):
        pruner = cb.prune.OBERT(gradients=32, seed=seed)
        other = cb.models.create("convnet", 10, 1, 8)
        other.load_state_dict(model.state_dict())
        fitted = pruner.fit(other, train, gone=gone)
        masks = fitted.apply_(other, sparsity)
        held = gradual.prune_("obert(gradients=32)", sparsity, train, seed=seed)
        assert all(torch.equal(held[name], masks[name]) for name in masks)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        gone = {name: ~mask for name, mask in masks.items()}
    with pytest.raises(ValueError, match="looks at examples: give batches="):
        gradual.prune_("obert(gradients=32)", 0.9)


def test_it_looks_at_other_images_every_time(monkeypatch):
    seeds = []
    fit = cb.prune.OBD.fit
    monkeypatch.setattr(cb.prune.OBD, "fit", lambda self, *a, **k: seeds.append(self.seed) or fit(self, *a, **k))
    _, _, _, steps = watched(experiment_over("sgd", pruner="obd(gradients=16)"))
    assert seeds == list(experiment_over("sgd").pruning.levels(steps))


def step_on(model, optimizer, x, y, closure=True):
    def evaluate():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    if closure == "by name":
        return optimizer.step(closure=evaluate)
    return optimizer.step(evaluate) if closure else (evaluate(), optimizer.step())[0]


def test_a_plain_step_by_hand(small_batch):
    """By v ← μv + M⊙g + λθ, θ ← M⊙(θ − ηv), with a closure and without; what is pruned has no momentum."""
    for closure in (True, "by name", False):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(8, 4)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        gradual = GradualMasks(model, optimizer)
        theta, v = model[0].weight.detach().clone(), torch.zeros(4, 8, dtype=torch.float64)
        mask = torch.ones_like(theta, dtype=torch.bool)
        x, y = small_batch
        for number in range(6):
            if number in (2, 4):
                sparsity = {2: 0.5, 4: 0.75}[number]
                order = theta.abs().flatten().argsort()
                mask = torch.ones(32, dtype=torch.bool)
                mask[order[: int(sparsity * 32)]] = False
                mask = mask.view(4, 8)
                held = gradual.prune_("global", sparsity)["0.weight"]
                assert torch.equal(held, mask)
                theta, v = theta * mask, v * mask
                torch.testing.assert_close(optimizer.state[model[0].weight]["momentum_buffer"], v, rtol=1e-12, atol=0)
            bias = model[0].bias.detach().clone()
            weight = theta.clone().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(x @ weight.T + bias, y), [weight])
            step_on(model, optimizer, x, y, closure)
            v = 0.9 * v + mask * g + 0.01 * theta
            theta = mask * (theta - 0.1 * v)
            torch.testing.assert_close(model[0].weight.detach(), theta, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(optimizer.state[model[0].weight]["momentum_buffer"], v, rtol=1e-12, atol=1e-15)
            assert int((model[0].weight == 0).sum()) == int((~mask).sum())
        gradual.release()
        step_on(model, optimizer, x, y, closure)
        assert not bool((model[0].weight == 0).any())


def test_an_ascent_goes_along_what_is_left(small_batch):
    """SAM over held masks: g at θ + ρ M⊙g/‖M⊙g‖ and not at θ + ρ g/‖g‖."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).double()
    optimizer = cb.optim.SAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    mask = GradualMasks(model, optimizer).prune_("global", 0.75)["0.weight"]
    theta = model[0].weight.detach().clone()
    x, y = small_batch

    def gradient(weight):
        weight = weight.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(x @ weight.T, y), [weight])[0]

    g = mask * gradient(theta)
    expected = theta - 0.1 * mask * gradient(theta + 0.5 * g / g.norm())
    step_on(model, optimizer, x, y)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-8, atol=1e-8)
    wrong = theta - 0.1 * mask * gradient(theta + 0.5 * gradient(theta) / gradient(theta).norm())
    assert float((wrong - expected).abs().max()) > 1e-3


def test_a_weight_that_is_zero_by_chance_does_not_bring_back_one_that_was_pruned():
    """Both are zero, and ties go by place: the pruned one stays pruned all the same."""
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1, 0.2]]))
    gradual = GradualMasks(model, torch.optim.SGD(model.parameters(), lr=0.1))
    gradual.prune_("global", 2 / 6)  # the last two
    with torch.no_grad():
        model.weight[0, 0] = 0.0
    before = {name: weight.clone() for name, weight in gradual.weights.items()}
    assert gradual.prune_("global", 2 / 6)["weight"].tolist() == [[True, True, True, True, False, False]]
    assert torch.equal(model.weight, before["weight"])
    assert gradual.prune_("global", 3 / 6)["weight"].tolist() == [[False, True, True, True, False, False]]
    with pytest.raises(ValueError, match="masks only shrink: 1 of these weights are pruned already"):
        gradual.prune_("global", 2 / 6)
    with pytest.raises(ValueError, match="masks only shrink: 3 of these"):
        gradual.shrink_({"weight": torch.ones(1, 6, dtype=torch.bool)})
    assert gradual.masks["weight"].tolist() == [[False, True, True, True, False, False]]
    assert gradual.masks.sparsity == 0.5


def test_what_is_excluded_stays_dense():
    model = cb.models.create("convnet", 10, 1, 8)
    gradual = GradualMasks(
        model, torch.optim.SGD(model.parameters(), lr=0.1), exclude=["linear*", "classifier*", "*fc*"][:0]
    )
    name = list(gradual.weights)[-1]
    gradual = GradualMasks(model, torch.optim.SGD(model.parameters(), lr=0.1), exclude=[name])
    gradual.prune_("global", 0.9)
    gradual.prune_("obd(gradients=16)", 0.95, cb.data.load("digits")[0])
    assert name not in gradual.masks
    assert not bool((dict(model.named_parameters())[name] == 0).any())
    assert gradual.masks.sparsity == pytest.approx(0.95, abs=1e-3)


def test_masks_name_what_stays_dense():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    dense = cb.compress.prunable(model, ["2.weight"]).dense
    gradual = GradualMasks(model, torch.optim.SGD(model.parameters(), lr=0.1), exclude=["2.weight"])
    assert {"0.weight", "2.weight"} <= set(dense) == set(gradual.masks.dense)
    assert set(gradual.prune_("global", 0.5).dense) == set(dense)
    assert set(gradual.shrink_(dict(gradual.masks)).dense) == set(dense)


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [(1.0, ValueError, "global@1 leaves no weight"), ("0.5", TypeError, "sparsity must be a number, not '0.5'"),
     (1.5, ValueError, r"sparsity must be in \[0, 1\], not 1.5")],
)  # fmt: skip
def test_a_sparsity_that_cannot_be_leaves_the_weights(sparsity, error, message):
    model = nn.Linear(6, 1)
    before = model.weight.detach().clone()
    gradual = GradualMasks(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(error, match=message):
        gradual.prune_("global", sparsity)
    assert torch.equal(model.weight, before)


def test_who_is_no_model_or_optimizer_is_one_line():
    model = nn.Linear(6, 1)
    with pytest.raises(TypeError, match="^optimizer must be a torch optimizer, not 'sgd'$"):
        GradualMasks(model, "sgd")
    with pytest.raises(TypeError, match="^model must be a torch model, not 3$"):
        GradualMasks(3, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("method", ["gmp*", "obert", "cram+-multi", "cram-single", "adamw"])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resume_in_mid_schedule(method, epoch, tmp_path, monkeypatch):
    experiment = (
        experiment_over(method, epochs=4)
        if method not in ("gmp*", "obert")
        else tiny(method, epochs=4, pruner="global" if method == "gmp*" else "obert(gradients=32)", times=9, end=0.8)
    )
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
    assert cb.compress.sparsity(resumed.load_model()) == pytest.approx(experiment.pruning.final, abs=1e-4)


def test_the_masks_of_a_checkpoint_are_held_and_not_what_happens_to_be_zero():
    """A weight that is left, and zero by chance when the checkpoint is written, goes on being trained."""
    train, _ = cb.data.load("digits")
    model = cb.models.create("convnet", 10, 1, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shrink = Shrink(Gradual(begin=0.0, end=0.0, final=0.5), train)
    fit = cb.train.Fit(model, optimizer, None, epochs=2, steps_per_epoch=3)
    shrink.on_start(fit)
    shrink.on_end(fit)
    name, weight = next(iter(cb.compress.prunable(model).items()))
    place = shrink.held.masks[name].nonzero()[0]
    with torch.no_grad():
        weight[tuple(place)] = 0.0
    fit.epoch = 1
    again = Shrink(shrink.gradual, train)
    again.load_state_dict(shrink.state_dict())
    again.on_start(fit)
    assert all(torch.equal(mask, shrink.held.masks[key]) for key, mask in again.held.masks.items())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight[tuple(place)].item() == pytest.approx(-0.1)


def test_gradual_from_a_run_and_with_nothing_to_prune_it_is_that_training(tmp_path):
    """With a final sparsity of 0 nothing changes, bit for bit; from a run it starts at that run's weights."""
    store = Store(tmp_path)
    dense = {"pruning": "gradual", "initial": 0.0, "final": 0.0}
    same = [ensure(tiny("sgd", **changes), store, progress=False) for changes in ({}, dense)]
    assert (same[0].path / "model.safetensors").read_bytes() == (same[1].path / "model.safetensors").read_bytes()
    tuned = ensure(tiny(start=same[0].id, epochs=1, lr=1e-6, final=0.6), store, progress=False)
    pruned = cb.compress.compressed(same[0].load_model(), "global@0.6")
    for a, b in zip(tuned.load_model().parameters(), pruned.parameters(), strict=True):
        assert float((a - b).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end": 1.2}, "end must be a share of the training, from 0 to 1, not 1.2"),
        ({"pruning.begin": -0.1}, "begin must be a share of the training, from 0 to 1, not -0.1"),
        ({"pruning.begin": 0.6, "end": 0.4}, "end must be at least begin, 0.6, and is 0.4"),
        ({"initial": 0.8, "final": 0.7}, "final must be at least initial, 0.8, and is 0.7"),
        ({"final": 1.0}, r"final must be in \[0, 1\), not 1.0"),
        ({"times": 0}, "times must be at least 1, not 0"),
        ({"pruning.pruner": "global@0.9"}, "pruner must be global, uniform or a pruner without a sparsity or steps"),
        ({"pruning.pruner": "2:4"}, "pruner must be global, uniform or a pruner"),
        ({"pruning.pruner": "obertx4"}, "without a sparsity or steps, not 'obertx4'"),
        ({"pruning.pruner": "obert(blok=3)"}, "unknown setting of obert 'blok'"),
        ({"cycles": 0}, "cycles must be at least 1, not 0"),
        ({"rewind": 1.0}, r"rewind must be in \[0, 1\), not 1.0"),
        ({"warmup_epochs": 5.0}, "warmup_epochs must be from 0 to the number of epochs, not 5.0"),
        ({"prune": "global@0.5"}, "has no setting 'prune': it belongs to the pruning one-shot"),
    ],
)
def test_what_cannot_be_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny(**changes)
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------- the learning rate


def test_cycles_by_hand():
    """10 epochs of 10 steps: 2 steps of warm-up, a line to step 40, then two cycles of 30, each to a fifth."""
    factor = Cycles(warmup_epochs=0.2, rewind=0.4, cycles=2, floor=0.2).factor(10, 10)
    assert [factor(0), factor(1), factor(2)] == [0.5, 1.0, 1.0]
    assert factor(21) == pytest.approx(1 - 0.8 / 2)
    assert factor(39) == pytest.approx(1 - 0.8 * 37 / 38)
    assert [factor(40), factor(70)] == [1.0, 1.0]
    assert factor(55) == factor(85) == pytest.approx(0.6)
    assert factor(100) == pytest.approx(0.2)


def test_the_rate_is_high_while_pruning_ends():
    for dataset, method in (("digits", "gmp*"), ("cifar10", "gmp*"), ("sst2", "gmp*"), ("sst2", "obert")):
        experiment = recipe(dataset, method)
        factor = experiment.schedule.factor(experiment.epochs, 1000)
        last = max(experiment.pruning.levels(1000 * experiment.epochs))
        assert factor(last + 2) > 0.6
        assert factor(1000 * experiment.epochs - 1) < 0.11


@given(
    rewind=st.floats(0, 0.99), count=st.integers(1, 9), floor=st.floats(0, 0.99), warmup=st.floats(0, 3),
    epochs=st.integers(1, 9), steps=st.integers(1, 9),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_schedule_of_cycles_stays_between_its_floor_and_one(rewind, count, floor, warmup, epochs, steps):
    factor = Cycles(warmup, rewind, count, floor).factor(epochs, steps)
    warm = round(warmup * steps)
    values = [factor(step) for step in range(epochs * steps + 1)]
    assert all(0 < value <= 1 for value in values[:warm])
    assert all(floor - 1e-12 <= value <= 1 for value in values[warm:])
    rises = sum(b > a + 1e-12 for a, b in itertools.pairwise(values[warm:]))
    assert rises <= count


def test_a_shorter_training_is_the_same_shape():
    long, short = tiny(epochs=40), tiny(epochs=20)
    assert long.schedule.stretched(20, 40) == {"warmup_epochs": short.schedule.warmup_epochs}
    assert [2 * step for step in short.pruning.levels(200)] == pytest.approx(list(long.pruning.levels(400)), abs=2)
