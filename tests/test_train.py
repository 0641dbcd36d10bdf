import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F

import cram_bench as cb
from cram_bench.progress import Progress
from cram_bench.train import Callback, DivergedError, cosine, evaluate, fit


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
    fit(model, sgd(model), *digits, epochs=2, batch_size=64, warmup_epochs=0.5, callbacks=[record])
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
    assert len(lines) <= 12
    assert lines[0].startswith("SGD, seed 0: epoch 1/12, loss ")
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

    ramp = cb.train.Ramp()
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
