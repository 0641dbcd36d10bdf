import copy
import dataclasses
import importlib.util
import io
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import cram_bench as cb
from cram_bench.progress import Progress
from cram_bench.schedules import Cosine, cosine
from cram_bench.train import Callback, DivergedError, evaluate, fit


@pytest.fixture
def digits():
    train, test = cb.data.load("digits")
    return train.sample(256), test.sample(100)


def network():
    torch.manual_seed(0)
    return cb.models.create("convnet", 10, 1)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 3), (1, 0), (5, 5)])
def test_cosine_with_warm_up(total, warmup):
    factor = cosine(total, warmup)
    for step in range(total):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert factor(step) == pytest.approx(expected, abs=1e-15)


def test_the_learning_rate_follows_the_schedule(digits):
    class Record(Callback):
        def __init__(self):
            self.rates = []

        def on_step(self, fit, step, loss, correct, seen):
            self.rates.append(fit.optimizer.param_groups[0]["lr"])  # already that of the next step

    model, record = network(), Record()
    fit(model, sgd(model), *digits, epochs=2, batch_size=64, schedule=Cosine(warmup_epochs=0.5), callbacks=[record])
    factor = cosine(8, 2)
    assert record.rates == pytest.approx([0.1 * factor(step) for step in range(1, 9)])


def test_one_epoch_equals_a_plain_loop(digits):
    """The loop adds nothing to the textbook: same data, same schedule, same weights, bit for bit."""
    train, test = digits
    model, plain = network(), network()
    history = fit(model, sgd(model), train, test, epochs=1, batch_size=64, augment=False)
    plain.to(memory_format=torch.channels_last).train()
    optimizer, factor, losses, hits = sgd(plain), cosine(4), [], 0
    for step, (x, y) in enumerate(train.batches(64, seed=0, channels_last=True)):
        optimizer.param_groups[0]["lr"] = 0.1 * factor(step)
        logits = plain(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        hits += int((logits.argmax(1) == y).sum())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert history[0]["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert history[0]["train_accuracy"] == hits / 256


def test_evaluate_against_a_direct_calculation(digits):
    model = network()
    model.convs[0].eval()  # a mode of its own must come back too
    modes = [module.training for module in model.modules()]
    result = evaluate(model, digits[1], batch_size=33)
    assert [module.training for module in model.modules()] == modes
    logits = copy.deepcopy(model).eval()(digits[1].normalise(digits[1].images))
    labels = digits[1].labels
    nats = -torch.log_softmax(logits.double(), 1)[torch.arange(len(labels)), labels]
    assert result["loss"] == pytest.approx(float(nats.detach().mean()), rel=1e-5)
    assert result["accuracy"] == float((logits.argmax(1) == labels).double().mean())


def test_the_same_twice(digits):
    rows = []
    for _ in range(2):
        model = network()
        torch.manual_seed(len(rows))  # what was drawn before does not matter
        rows.append(fit(model, sgd(model), *digits, epochs=2, batch_size=64, seed=3))
    keys = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
    assert [[row[key] for key in keys] for row in rows[0]] == [[row[key] for key in keys] for row in rows[1]]


def test_training_leaves_the_default_generator_alone(digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = copy.deepcopy(network())
    torch.manual_seed(5)
    fit(model, sgd(model), digits[0], epochs=1, batch_size=64)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns_in_either_precision(precision, digits):
    model = network()
    history = fit(model, sgd(model), *digits, epochs=6, batch_size=32, precision=precision)
    assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]
    assert all(p.dtype is torch.float32 for p in model.parameters())


def test_divergence_is_an_error(digits):
    model = network()
    with pytest.raises(DivergedError, match="the training loss is (nan|inf) in epoch 1"):
        fit(model, sgd(model, lr=1e30), *digits, epochs=2, batch_size=64)


def test_unknown_precision(digits):
    model = network()
    with pytest.raises(ValueError, match="float32 or bfloat16, not 'float16'"):
        fit(model, sgd(model), *digits, epochs=1, batch_size=64, precision="float16")


def test_without_a_compiler_there_is_one_warning_and_the_same_result(digits, monkeypatch):
    def no_compiler(function, **options):
        def broken(*arguments):
            raise RuntimeError("no C++ compiler\nand a long story")

        return broken

    plain = network()
    fit(plain, sgd(plain), digits[0], epochs=1, batch_size=64)
    monkeypatch.setattr(torch, "compile", no_compiler)
    model = network()
    with pytest.warns(UserWarning, match="goes on without it: no C\\+\\+ compiler$") as caught:
        fit(model, sgd(model), digits[0], epochs=1, batch_size=64, compile=True)
    assert len(caught) == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_progress_in_a_log_is_plain_lines(digits):
    log = io.StringIO()
    model = network()
    fit(model, sgd(model), *digits, epochs=12, batch_size=128, callbacks=[Progress("SGD, seed 0", log)])
    lines = log.getvalue().splitlines()
    assert len(lines) <= 10
    assert lines[0].startswith("SGD, seed 0: epoch 2/12, loss ")
    assert "s left" in lines[0]
    assert lines[-1].startswith("SGD, seed 0: epoch 12/12")
    assert "left" not in lines[-1]
    assert not set(log.getvalue()) & {"\r", "\x1b", "█"}


def test_progress_on_a_terminal_is_a_bar(digits):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    model = network()
    fit(model, sgd(model), *digits, epochs=2, batch_size=64, callbacks=[Progress("SGD", terminal)])
    assert "SGD" in terminal.getvalue()
    assert "8/8" in terminal.getvalue()
    assert "loss" in terminal.getvalue()


def test_the_compiled_loss_is_one_graph(digits, monkeypatch):
    """What breaks the graph costs time in every step and changes no number, so that only this sees it."""
    compiled = []

    def whole(function, **options):
        compiled.append(options)
        return compile_(function, fullgraph=True, backend="eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", whole)
    model = cb.models.create("convnet", 10, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, sgd(model), digits[0], epochs=1, batch_size=64, precision="bfloat16", compile=True)
    assert compiled


def test_a_compiler_that_fails_without_a_word(digits, monkeypatch):
    def broken(function, **options):
        def call(*arguments):
            raise NotImplementedError

        return call

    monkeypatch.setattr(torch, "compile", broken)
    train = digits[0].take(range(64))
    model = cb.models.create("convnet", 10, 1)
    with pytest.warns(UserWarning, match=r"torch.compile does not work here.*NotImplementedError"):
        cb.train.fit(model, torch.optim.SGD(model.parameters(), lr=0.1), train, epochs=1, batch_size=32, compile=True)


class Watch(cb.train.Callback):
    """Notes the modes and the running correct answers of every step."""

    def __init__(self):
        self.modes, self.orders = [], {}

    def on_step(self, fit, step, loss, correct, seen):
        self.modes.append(fit.model.training)
        self.orders.setdefault(fit.epoch, []).append(float(loss))


def test_training_is_in_training_mode_and_every_epoch_has_its_own_order():
    train = cb.data.load("digits")[0].take(range(256))
    model, watch = cb.models.create("convnet", 10, 1).eval(), Watch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the weights stay: only the order tells epochs apart
    cb.train.fit(model, optimizer, train, epochs=2, batch_size=64, augment=False, callbacks=[watch])
    assert all(watch.modes)
    assert watch.orders[0] != watch.orders[1]


def test_halves_give_each_gradient_its_half_of_the_batch(digits):
    """Against the formula: g on the first half, g̃ on the second at C(θ + ρ g), and a plain momentum step."""
    train, ours, theirs = digits[0], network(), network()
    compressor = cb.compress.Magnitude(0.5)
    optimizer = cb.optim.CrAM(ours, sgd(ours), compressor, rho=0.2)
    history = fit(ours, optimizer, train, epochs=1, batch_size=64, halves=True, seed=0)
    velocity = [torch.zeros_like(p) for p in theirs.parameters()]
    losses, correct = [], 0
    for step, (x, y) in enumerate(train.batches(64, seed=0, augment=True, drop_last=True, channels_last=True)):
        parameters = list(theirs.parameters())
        logits = theirs.train()(x[:32])
        losses.append(F.cross_entropy(logits, y[:32]))
        correct += int((logits.argmax(1) == y[:32]).sum())
        first = torch.autograd.grad(losses[-1], parameters)
        other = copy.deepcopy(theirs)
        with torch.no_grad():
            for p, g in zip(other.parameters(), first, strict=True):
                p.add_(g, alpha=0.2)
        masks = cb.compress.apply_(other, compressor)
        second = torch.autograd.grad(F.cross_entropy(other(x[32:]), y[32:]), list(other.parameters()))
        lr = 0.1 * cosine(4)(step)
        for (name, p), v, g, s in zip(theirs.named_parameters(), velocity, first, second, strict=True):
            v.mul_(0.9).add_(g + (s * masks[name] if name in masks else s))
            p.data.sub_(v, alpha=lr)
    for ours_, theirs_ in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-3, atol=1e-4)
    assert history[0]["train_loss"] == pytest.approx(float(sum(losses).detach()) / 4, rel=1e-3)
    assert history[0]["train_accuracy"] == pytest.approx(correct / 128, abs=0.02)


def test_the_ramp_goes_from_plain_steps_to_the_setting(digits):
    model = network()
    optimizer = cb.optim.CrAMSingle(model, sgd(model), cb.compress.Magnitude(0.5), plain=0.2)
    seen = []

    class Look(Callback):
        def on_step(self, fit, step, loss, correct, seen_):
            seen.append(optimizer.plain)

    ramp = cb.callbacks.Ramp()
    fit(model, optimizer, digits[0], epochs=2, batch_size=64, callbacks=[Look(), ramp])
    assert seen == pytest.approx([1 - 0.8 * step / 8 for step in range(8)])
    assert optimizer.plain == 0.2


def test_the_test_set_is_evaluated_now_and_then_and_at_the_end(digits):
    train, test = digits
    model, other = network(), network()
    rows = fit(model, sgd(model), train, test, epochs=5, batch_size=64, test_every=2)
    assert ["test_accuracy" in row for row in rows] == [False, True, False, True, True]
    fit(other, sgd(other), train, test, epochs=5, batch_size=64)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


class Used(Callback):
    """Notes the learning rate that each step uses, by a hook on the optimizer."""

    def __init__(self, optimizer):
        self.rates = []
        optimizer.register_step_pre_hook(lambda own, *_: self.rates.append(own.param_groups[0]["lr"]))


def test_the_images_that_a_batch_leaves_over_are_no_step_of_the_schedule(digits):
    model = network()
    optimizer = sgd(model)
    used = Used(optimizer)
    fit(model, optimizer, digits[0].take(range(250)), epochs=2, batch_size=64, callbacks=[used])  # 3 steps an epoch
    assert used.rates == pytest.approx([0.1 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])


def test_the_learning_rates_of_two_epochs_by_hand(digits):
    """Eight steps, two of them warm-up: 0.1 times 1/2, 1, then the half cosine of six steps from its top."""
    model = network()
    optimizer = sgd(model)
    used = Used(optimizer)
    rows = fit(model, optimizer, *digits, epochs=2, batch_size=64, schedule=Cosine(warmup_epochs=0.5))
    by_hand = [0.05, 0.1, 0.1, 0.09330127018922194, 0.075, 0.05, 0.025, 0.006698729810778059]
    assert used.rates == pytest.approx(by_hand, abs=1e-15)
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.075])
    other = network()
    optimizer = sgd(other, lr=0.4)
    used = Used(optimizer)
    fit(other, optimizer, digits[0], epochs=1, batch_size=64)  # no warm-up: the first step has the whole rate
    assert used.rates == pytest.approx([0.4, 0.34142135623730954, 0.2, 0.05857864376269045], abs=1e-15)


@pytest.mark.parametrize(("warmup_epochs", "steps"), [(0.1, 0), (0.3, 1), (0.4, 2), (0.7, 3)])
def test_a_warm_up_that_ends_within_a_step_is_the_nearest_number_of_steps(warmup_epochs, steps, digits):
    model = network()
    optimizer = sgd(model)
    used = Used(optimizer)
    fit(model, optimizer, digits[0], epochs=1, batch_size=64, schedule=Cosine(warmup_epochs=warmup_epochs))
    assert used.rates == pytest.approx([0.1 * cosine(4, steps)(step) for step in range(4)], abs=1e-15)


def test_three_epochs_equal_a_plain_loop_and_every_row_is_its_own_epochs(digits):
    """The weights are those of the last epoch, whichever was best; rates, losses and tests are written out by hand."""
    train, test = digits
    model, plain = network(), network()
    rows = fit(model, sgd(model, 0.3), train, test, epochs=3, batch_size=64, seed=5)
    plain.to(memory_format=torch.channels_last)
    optimizer, expected = sgd(plain), []
    for epoch in range(3):
        plain.train()
        losses, hits = [], 0
        batches = train.batches(64, seed=5 * 1_000_003 + epoch, augment=True, channels_last=True)
        for step, (x, y) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = 0.3 * (1 + math.cos(math.pi * (4 * epoch + step) / 12)) / 2
            logits = plain(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            hits += int((logits.argmax(1) == y).sum())
        plain.eval()
        with torch.no_grad():
            logits = plain(test.normalise(test.images))
        expected.append(
            {
                "epoch": epoch + 1,
                "lr": 0.3 * (1 + math.cos(math.pi * 4 * epoch / 12)) / 2,
                "train_loss": sum(losses) / 4,
                "train_accuracy": hits / 256,
                "test_loss": float(F.cross_entropy(logits, test.labels)),
                "test_accuracy": float((logits.argmax(1) == test.labels).double().mean()),
            }
        )
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert len({row["test_loss"] for row in rows}) == 3
    for row, by_hand in zip(rows, expected, strict=True):
        assert row.pop("seconds") > 0
        assert row == pytest.approx(by_hand, rel=1e-4)


class Seen(torch.nn.Module):
    """A network that notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.network, self.inputs = network(), []

    def forward(self, x):
        if self.training:
            self.inputs.append(x.detach().clone())
        return self.network(x)


def inputs_of(train, seed, epochs=2, augment=False):
    """What each epoch was trained on, the batches of it one after the other."""
    model = Seen()
    fit(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        train,
        epochs=epochs,
        batch_size=64,
        seed=seed,
        augment=augment,
    )
    return torch.cat(model.inputs).chunk(epochs)


def test_every_seed_and_every_epoch_has_its_own_order(digits):
    epochs = [*inputs_of(digits[0], 0), *inputs_of(digits[0], 1)]
    again = inputs_of(digits[0], 0)
    assert torch.equal(epochs[0], again[0])
    assert torch.equal(epochs[1], again[1])
    rows = [{tuple(image.flatten().tolist()) for image in epoch} for epoch in epochs]
    for index, one in enumerate(epochs):
        assert rows[index] == rows[0]  # the same images …
        for other in epochs[index + 1 :]:
            assert (one == other).flatten(1).all(1).float().mean() < 0.1  # … elsewhere


def one_image(flip):
    """A set of 256 copies of one image, brighter to the right: what is not alike was augmented."""
    image = (torch.arange(16).repeat(16, 1) * 10 + 60).to(torch.uint8).expand(256, 1, 16, 16).contiguous()
    labels = torch.arange(256) % 10
    names = tuple(map(str, range(10)))
    return cb.data.Images("ramp", image, labels, names, torch.zeros(1), torch.ones(1), flip)


def test_every_seed_and_every_epoch_is_augmented_in_its_own_way():
    epochs = [*inputs_of(one_image(True), 0, augment=True), *inputs_of(one_image(True), 1, augment=True)]
    assert torch.equal(epochs[0], inputs_of(one_image(True), 0, augment=True)[0])
    for index, one in enumerate(epochs):
        for other in epochs[index + 1 :]:
            assert (one == other).flatten(1).all(1).float().mean() < 0.3


@pytest.mark.parametrize(("flip", "share"), [(True, 0.5), (False, 0.0)])
def test_about_half_of_the_images_are_mirrored_where_the_data_allow_it(flip, share):
    """And each is cropped: padded by two pixels of black, at 25 places."""
    inputs = torch.cat(inputs_of(one_image(flip), 3, augment=True))
    middle = inputs[:, 0, 4:12, 4:12]
    mirrored = (middle.diff(dim=2) < 0).all(2).all(1)
    assert torch.equal(~mirrored, (middle.diff(dim=2) > 0).all(2).all(1))
    assert float(mirrored.float().mean()) == pytest.approx(share, abs=0.1 if flip else 0)
    plain = torch.cat(inputs_of(one_image(flip), 3))
    assert (plain == plain[0]).all()
    black = torch.stack([(inputs[:, 0, 0] == 0).all(1), (inputs[:, 0, :, 0] == 0).all(1)]).float().mean(1)
    assert black == pytest.approx([0.4, 0.4], abs=0.1)  # two of five places let the border in at either side


def test_dropout_is_drawn_anew_for_every_seed_and_epoch(digits):
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head, self.masks = torch.nn.Dropout(0.5), torch.nn.Linear(64, 10), []

        def forward(self, x):
            if self.training:
                self.masks.append(self.drop(torch.ones(64)))
            return self.head(x.flatten(1))

    def masks_of(seed):
        model = Dropped()
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1), digits[0], epochs=2, batch_size=64, seed=seed)
        return torch.stack(model.masks)

    zero, one = masks_of(0), masks_of(1)
    assert torch.equal(zero, masks_of(0))
    assert not torch.equal(zero[:4], zero[4:])
    assert not torch.equal(zero, one)
    assert len(zero.unique(dim=0)) == 8


def test_two_seeds_start_from_other_weights_and_see_other_batches(monkeypatch):
    """Through the run store: what is trained starts as `build_model` says and sees what its own seed gives."""
    firsts = []
    batches = cb.data.Images.batches

    def spied(self, *arguments, **options):
        listed = list(batches(self, *arguments, **options))
        if options.get("drop_last"):
            firsts.append(listed[0][0])
        return iter(listed)

    monkeypatch.setattr(cb.data.Images, "batches", spied)
    weights = []
    for seed in (0, 1):
        experiment = cb.recipes.recipe("digits", "sgd", seed=seed, epochs=1, lr=1e-30, weight_decay=0.0)
        run = cb.runs.ensure(experiment, progress=False)
        start = experiment.build_model(experiment.load_data()[0])
        trained = run.load_model()
        for ours, theirs in zip(start.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-20)  # zeros took one step of 1e-30
        weights.append([p for p in trained.parameters() if p.ndim > 1])
    assert not any(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert len(firsts) == 2
    assert not torch.equal(*firsts)


def test_a_run_is_its_last_epoch():
    """The history's last row is what the kept weights give; the first or the best epoch would differ."""
    experiment = cb.recipes.recipe("digits", "sgd", epochs=3, lr=0.5)
    run = cb.runs.ensure(experiment, progress=False)
    test = experiment.load_data()[1]
    result = evaluate(run.load_model(), test)
    rows = run.history
    assert rows["epoch"].tolist() == [1, 2, 3]
    assert rows["test_loss"].iloc[-1] == pytest.approx(result["loss"], rel=1e-6)
    assert rows["test_accuracy"].iloc[-1] == result["accuracy"]
    assert rows["test_loss"].nunique() == 3


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("method", ["cram+ ramp", "cram-single ramp", "cram held", "adamw"])
def test_a_resumed_fit_forgets_nothing(method, when, digits):
    """Momentum, moments, draws, masks, the learning rate and where the ramp is: bit for bit, and the same rows."""
    levels = [cb.compress.Magnitude(s) for s in (0.3, 0.6, 0.9)]
    builds = {
        "cram+ ramp": lambda m: cb.optim.CrAM(m, sgd(m), levels, plain=0.1),
        "cram-single ramp": lambda m: cb.optim.CrAMSingle(m, sgd(m), levels, plain=0.2, ascent="gradient"),
        "cram held": lambda m: cb.optim.CrAM(m, sgd(m), levels, mask_interval=4),
        "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
    }

    class Stop(Callback):
        def on_epoch(self, fit):
            if fit.epoch == when:
                file = io.BytesIO()
                torch.save(fit.state_dict(), file)
                self.saved = file.getvalue()
                raise KeyboardInterrupt

    class Resume(Callback):
        def __init__(self, saved):
            self.saved = saved

        def on_start(self, fit):
            fit.load_state_dict(torch.load(io.BytesIO(self.saved), weights_only=True))

    class Plain(Callback):
        def __init__(self):
            self.seen = []

        def on_step(self, fit, step, loss, correct, seen):
            self.seen.append(getattr(fit.optimizer, "plain", None))

    ramp = [cb.callbacks.Ramp()] if "ramp" in method else []
    options = {"epochs": 3, "batch_size": 64, "schedule": Cosine(warmup_epochs=0.5)}
    straight, stopped, resumed = network(), network(), network()
    whole, part, rest, stop = Plain(), Plain(), Plain(), Stop()
    rows = fit(straight, builds[method](straight), *digits, callbacks=[*ramp, whole], **options)
    optimizer = builds[method](stopped)
    setting = getattr(optimizer, "plain", None)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, optimizer, *digits, callbacks=[*ramp, part, stop], **options)
    assert getattr(optimizer, "plain", None) == setting  # put back, also after an interrupt
    again = fit(resumed, builds[method](resumed), *digits, callbacks=[Resume(stop.saved), *ramp, rest], **options)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert part.seen + rest.seen == whole.seen
    assert len(rest.seen) == 4 * (3 - when)
    for one, other in zip(rows, again, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


class Wrapped(torch.nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.network, self.wrap = network(), wrap

    def forward(self, x):
        return self.wrap(self.network(x))


@pytest.mark.parametrize(
    "wrap", [lambda y: (y, 1), lambda y: {"logits": y}, lambda y: SimpleNamespace(logits=y), lambda y: {"out": y}]
)
def test_outputs_are_read_as_probes_read_them(wrap, digits):
    """The same training, and the same evaluation, as of the network inside."""
    plain, wrapped = network(), Wrapped(wrap)
    rows = [fit(m, sgd(m), *digits, epochs=1, batch_size=64) for m in (plain, wrapped)]
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True))
    assert [row["test_loss"] for row in rows[0]] == pytest.approx([row["test_loss"] for row in rows[1]], rel=1e-6)


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (lambda y: {"scores": y}, TypeError, "no logits are found"),
        (lambda y: y[:, 0], ValueError, r"logits of shape \(n, classes\), and have shape \(64,\)"),
    ],
)
def test_outputs_without_logits_are_one_line(wrap, error, message, digits):
    model = Wrapped(wrap)
    with pytest.raises(error, match=message):
        fit(model, sgd(model), digits[0], epochs=1, batch_size=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_any_type_are_trained(dtype, digits):
    """Under ``set_default_dtype(float64)`` a network is built in float64; the data stay float32."""
    single, other = network(), network().to(dtype)
    rows = [fit(m, sgd(m), *digits, epochs=1, batch_size=64)[0] for m in (single, other)]
    assert all(p.dtype is dtype for p in other.parameters())
    close = 1e-4 if dtype is torch.float64 else 0.1
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=close)
    assert rows[0]["test_loss"] == pytest.approx(rows[1]["test_loss"], rel=close)
    torch.set_default_dtype(torch.float64)
    try:
        model = network()
        row = fit(model, sgd(model), *digits, epochs=1, batch_size=64)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert math.isfinite(row["test_loss"])


def test_lbfgs_and_lazy_models_are_one_line(digits):
    model = network()
    with pytest.raises(TypeError, match="LBFGS does not take the channels-last kernels"):
        fit(model, torch.optim.LBFGS(model.parameters()), digits[0], epochs=1, batch_size=64)
    lazy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
    with pytest.raises(ValueError, match="'1.weight' is not initialised yet"):
        fit(lazy, sgd(lazy), digits[0], epochs=1, batch_size=64)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), ("meta", torch.float32), ("cpu", torch.float64), ("meta", torch.float64)],
)
@pytest.mark.parametrize("method", cb.recipes.METHODS)
def test_the_same_numbers_under_any_defaults_of_torch(method, device, dtype, digits):
    """Order, crops, coins and draws: the meta device's could not be read, and float64 draws other numbers."""
    experiment, start = cb.recipes.recipe("digits", method, epochs=2), network()

    def trained():
        model = copy.deepcopy(start)
        optimizer = experiment.build_optimizer(model)
        train = dataclasses.replace(digits[0], flip=True)
        options = {"batch_size": 64, "seed": 3, "schedule": Cosine(warmup_epochs=0.5), "halves": experiment.step.halved}
        rows = fit(model, optimizer, train, digits[1], epochs=2, **options)
        return model.state_dict(), [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    weights, rows = trained()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        others, other_rows = trained()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert other_rows == rows
    for name, value in weights.items():
        assert others[name].dtype is value.dtype
        assert torch.equal(others[name], value), name


def test_a_model_without_values_is_one_line(digits):
    with torch.device("meta"):
        model = cb.models.create("convnet", 10, 1)
    for call in (
        lambda: fit(model, sgd(model), digits[0], epochs=1, batch_size=64),
        lambda: cb.optim.SAM(model, sgd(model)),
        lambda: cb.probes.sparsity_curve(model, digits[1], ["global@0.5"]),
    ):
        with pytest.raises(
            ValueError, match="is on the meta device and has no values: build the model on a real device$"
        ):
            call()


def test_tensorboard_has_the_history_also_of_a_training_that_goes_on(digits, tmp_path):
    """Epochs that were begun again, after a crash say, are shown once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train, test = digits
    model = network()
    history = fit(
        model, sgd(model), train, test, epochs=3, batch_size=64, test_every=3,
        callbacks=[cb.callbacks.TensorBoard(tmp_path / "curves")],
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert set(found) == {"loss/train", "accuracy/train", "loss/test", "accuracy/test", "lr", "seconds"}
    for tag, name in (("loss/train", "train_loss"), ("accuracy/train", "train_accuracy"), ("lr", "lr")):
        assert [step for step, _ in found[tag]] == [1, 2, 3]
        assert [value for _, value in found[tag]] == pytest.approx([row[name] for row in history], rel=1e-6)
    assert [step for step, _ in found["accuracy/test"]] == [3]

    again = SimpleNamespace(epoch=1, history=[{"epoch": 2, "train_loss": 7.0}])
    callback = cb.callbacks.TensorBoard(tmp_path / "curves")
    callback.on_start(again)
    callback.on_epoch(again)
    callback.on_end(again)
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train")][1:] == [(2, 7.0)]


def test_without_tensorboard_one_line_says_how_to_install_it(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"^curves of .* need tensorboard.*cram-bench\[tensorboard\]'$"):
        cb.callbacks.TensorBoard(tmp_path / "curves")
    assert not (tmp_path / "curves").exists()
