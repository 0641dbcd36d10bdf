"""Beside other optimizers, and inside other people's loops."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

import cram_bench as cb
from cram_bench.compress import Magnitude

LR = 0.1
TWO_PASS = {
    "sam": lambda m, b: cb.optim.SAM(m, b, rho=0.3),
    "cram": lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5), plus=False),
    "cram without ascent": lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5), rho=0.0, plus=False),
    "cram+": lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5)),
}
ONE_PASS = {
    "momentum-sam": lambda m, b: cb.optim.MomentumSAM(m, b),
    "cram-single": lambda m, b: cb.optim.CrAMSingle(m, b, Magnitude(0.5), plain=0.0),
}
METHODS = TWO_PASS | ONE_PASS


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4)).double()


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients(model, batch):
    return torch.autograd.grad(loss_of(model, batch), list(model.parameters()))


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


def rest(model):
    return [p for p in model.parameters() if p.ndim != 2]


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("method", TWO_PASS)
def test_beside_muon_the_other_optimizer_steps_with_the_gradient_at_the_true_weights(method, set_to_none, small_batch):
    """By hand: the base's own parameters move, the others stay; afterwards these have g and nothing else."""
    model, by_hand = network(), network()
    muon = torch.optim.Muon(matrices(model), lr=LR)
    adam = torch.optim.AdamW(rest(model), lr=0.01)
    optimizer = TWO_PASS[method](model, muon)
    other = torch.optim.AdamW(rest(by_hand), lr=0.01)
    base = torch.optim.Muon(matrices(by_hand), lr=LR)

    def closure():
        optimizer.zero_grad(set_to_none)
        adam.zero_grad(set_to_none)
        loss = loss_of(model, small_batch)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        g = dict(zip(by_hand.parameters(), gradients(by_hand, small_batch), strict=True))
        for ours, theirs in zip(rest(model), rest(by_hand), strict=True):
            torch.testing.assert_close(ours.grad, g[theirs], rtol=0, atol=1e-12)
        adam.step()
        moved = copy.deepcopy(by_hand)
        norm = torch.stack([g[p].square().sum() for p in matrices(by_hand)]).sum().sqrt()
        radius = {"sam": 0.3 / norm, "cram without ascent": 0.0}.get(method, 0.2)
        with torch.no_grad():
            for p, q in zip(matrices(moved), matrices(by_hand), strict=True):
                p.add_(g[q] * radius)
        masks = cb.compress.apply_(moved, Magnitude(0.5)) if "cram" in method else {}
        second = dict(zip((n for n, _ in moved.named_parameters()), gradients(moved, small_batch), strict=True))
        for name, p in by_hand.named_parameters():
            masked = second[name] * masks[name] if name in masks else second[name]
            p.grad = g[p] if p.ndim != 2 else masked + g[p] if method == "cram+" else masked
        other.step()
        base.step()
        for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", TWO_PASS)
def test_a_scaler_skips_both_optimizers_or_none_of_their_gradients(method, small_batch):
    """The other optimizer's gradients are still scaled after the step, as its own `scaler.step` expects."""
    one, two = network(), network()
    for model, scale in ((one, 1.0), (two, 2.0**8)):
        adam = torch.optim.AdamW(rest(model), lr=0.01)
        optimizer = TWO_PASS[method](model, torch.optim.SGD(matrices(model), lr=LR))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)

        def closure(model=model, adam=adam, optimizer=optimizer, scaler=scaler):
            optimizer.zero_grad()
            adam.zero_grad()
            loss = loss_of(model, small_batch)
            scaler.scale(loss).backward()
            return loss

        for _ in range(3):
            optimizer.step(closure, scaler=scaler)
            scaler.step(adam)
            scaler.update()
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ONE_PASS)
def test_with_one_gradient_a_step_the_other_optimizer_gets_that_one(method, small_batch):
    model = network()
    optimizer = ONE_PASS[method](model, torch.optim.SGD(matrices(model), lr=LR, momentum=0.9))
    seen = []

    def closure():
        model.zero_grad()
        loss = loss_of(model, small_batch)
        loss.backward()
        seen.append([p.grad.clone() for p in rest(model)])
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(seen) == 2
    assert all(torch.equal(p.grad, g) for p, g in zip(rest(model), seen[-1], strict=True))


def test_a_parameter_of_one_pass_only_gets_what_that_pass_gave(small_batch):
    """`first` is used by the first evaluation alone, `second` by the second: CrAM+ adds what there is of both."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(8, 4).double()
            self.first, self.second = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.body(x) * (self.first if self.calls % 2 else self.second)

    for method, build in TWO_PASS.items():
        model = Sometimes()
        optimizer = build(model, torch.optim.SGD(model.parameters(), lr=LR))
        taken = []

        def closure(model=model, optimizer=optimizer, taken=taken):
            optimizer.zero_grad()
            loss = loss_of(model, small_batch)
            loss.backward()
            taken.append([None if p.grad is None else p.grad.clone() for p in (model.first, model.second)])
            return loss

        optimizer.step(closure)
        (first, none), (gone, second) = taken
        assert none is None
        assert gone is None
        plain = method == "cram+"
        expected = 1 - LR * first if plain else torch.ones(4, dtype=torch.float64)
        torch.testing.assert_close(model.first.detach(), expected, rtol=0, atol=1e-12, msg=method)
        torch.testing.assert_close(model.second.detach(), 1 - LR * second, rtol=0, atol=1e-12, msg=method)


# What a closure may and may not do.


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_accumulating_outside_the_closure_is_refused(method, set_to_none, small_batch):
    model = network()
    optimizer = METHODS[method](model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))

    def backward():
        loss = loss_of(model, small_batch)
        loss.backward()
        return loss

    def closure():
        optimizer.zero_grad(set_to_none)
        return backward()

    for _ in range(2):
        optimizer.step(closure)  # leaves gradients behind, which the closure clears, in either way
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad(set_to_none)
    backward()  # the first micro-batch
    with pytest.raises(RuntimeError, match=r"^the closure adds to gradients of before the step.*inside the closure"):
        optimizer.step(backward)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    optimizer.step(closure)  # and training goes on


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_clearing_before_the_step_is_as_good_as_in_the_closure(method, set_to_none, small_batch):
    one, two = network(), network()
    for model, outside in ((one, False), (two, True)):
        optimizer = METHODS[method](model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))

        def closure(model=model, optimizer=optimizer, outside=outside):
            if not outside:
                optimizer.zero_grad()
            loss = loss_of(model, small_batch)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
            if outside:
                optimizer.zero_grad(set_to_none)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_gradients_that_a_closure_computes_its_own_way_are_not_refused(small_batch):
    """`autograd.grad` adds to nothing, and a closure may assign what it likes."""
    model = network()
    optimizer = cb.optim.SAM(model, torch.optim.SGD(model.parameters(), lr=LR))

    def closure():
        loss = loss_of(model, small_batch)
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            parameter.grad = gradient
        return loss

    for _ in range(3):
        optimizer.step(closure)


def test_held_masks_may_accumulate_outside(small_batch):
    """All gradients are those at the true weights, so micro-batches before the step count as they should."""
    x, y = small_batch
    one, two = network(), network()
    for model, split in ((one, False), (two, True)):
        base = torch.optim.SGD(model.parameters(), lr=LR)
        optimizer = cb.optim.HeldMasks(model, base, cb.compress.apply_(model, Magnitude(0.5)))
        for _ in range(3):
            optimizer.zero_grad()
            if split:
                (loss_of(model, (x[:16], y[:16])) / 2).backward()

            def closure(model=model, split=split):
                loss = loss_of(model, (x[16:], y[16:])) / 2 if split else loss_of(model, (x, y))
                loss.backward()
                return loss

            optimizer.step(closure)
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_step_returns_what_the_closure_returned_first(method, small_batch):
    model = network()
    optimizer = METHODS[method](model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))
    for kind in (float, lambda loss: (loss.detach(), "logits"), lambda loss: {"loss": loss.detach()}):
        values = []

        def closure(kind=kind, values=values):
            model.zero_grad()
            loss = loss_of(model, small_batch)
            loss.backward()
            values.append(kind(loss))
            return values[-1]

        assert optimizer.step(closure) is values[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="must return the loss, and it returned None"):
        optimizer.step(lambda: None)
    with pytest.raises(RuntimeError, match="scalar outputs"):  # torch's own words for a loss of many numbers
        optimizer.step(lambda: F.cross_entropy(model(small_batch[0]), small_batch[1], reduction="none").backward())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# What cannot be wrapped.

BUILD = METHODS | {"held": lambda m, b: cb.optim.HeldMasks(m, b, cb.compress.Masks({}))}


@pytest.mark.parametrize("method", [*TWO_PASS, "held"])
def test_a_base_that_evaluates_the_closure_itself_is_refused(method):
    class Own(torch.optim.SGD):
        def step(self, closure):
            return super().step(closure)

    for kind in (torch.optim.LBFGS, Own):
        model = network()
        with pytest.raises(TypeError, match=f"^{kind.__name__} evaluates the closure itself.*such as torch.optim.SGD$"):
            BUILD[method](model, kind(model.parameters(), lr=LR))


@pytest.mark.parametrize("method", BUILD)
def test_a_wrapper_over_a_wrapper_is_refused(method):
    model = network()
    base = cb.optim.SAM(model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))
    with pytest.raises(TypeError, match="is built over a plain torch optimizer, not over SAM$"):
        BUILD[method](model, base)


@pytest.mark.parametrize(
    "lazy", [lambda: nn.LazyLinear(6), lambda: nn.Sequential(nn.Linear(4, 6), nn.LazyBatchNorm1d())]
)
@pytest.mark.parametrize("method", BUILD)
def test_a_lazy_model_is_refused_until_it_has_seen_a_batch(method, lazy):
    model = nn.Sequential(lazy(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"^'0\..*' is not initialised yet: call the model on one batch"):
        BUILD[method](model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))
    model(torch.randn(5, 4))
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    optimizer = BUILD[method](model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("method", BUILD)
def test_complex_parameters_are_refused(method):
    model = network()
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.cfloat))
    with pytest.raises(ValueError, match=r"shape \(3,\) is complex; .*view_as_real"):
        BUILD[method](model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))
    base = torch.optim.SGD([p for p in model.parameters() if not p.is_complex()], lr=LR, momentum=0.9)
    BUILD[method](model, base)  # another optimizer may hold it


# Other people's loops.


def by_hand_in_micro_batches(build, batches, parts, clip=None):
    """The reference: a plain closure over all parts of a batch."""
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    if clip:
        base.register_step_pre_hook(lambda *_: clip_grad_norm_(model.parameters(), clip) and None)
    optimizer = build(model, base)
    for x, y in batches:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_of(model, part) / parts).backward()
            return 0.0

        optimizer.step(closure)
    return model


def some_batches(count=4):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 16, 8, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(4, (count, 16), generator=generator), strict=True))


def close(one, other):
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")

    def build(steps):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)

    yield build
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_for_accelerate(method, accelerator):
    """As the documentation says it: gradient_accumulation_steps stays 1, the micro-batches are in the closure."""
    accelerator = accelerator(1)
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    base.register_step_pre_hook(lambda *_: clip_grad_norm_(model.parameters(), 0.5) and None)
    model, optimizer = accelerator.prepare(model, METHODS[method](model, base))
    for x, y in some_batches():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            total = 0.0
            for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
                loss = F.cross_entropy(model(part_x), part_y) / 4
                accelerator.backward(loss)
                total += loss.detach()
            return total

        optimizer.step(closure)
    close(model, by_hand_in_micro_batches(METHODS[method], some_batches(), 4, clip=0.5))


@pytest.mark.parametrize("method", [*METHODS, "held"])
def test_the_accumulation_of_accelerate_is_refused(method, accelerator):
    """It calls step once in four batches, and would train on a quarter of the data at a quarter of the rate."""
    accelerator = accelerator(4)
    model = network()
    optimizer = BUILD[method](model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))
    model, prepared = accelerator.prepare(model, optimizer)
    before = copy.deepcopy(model.state_dict())

    def closure():
        prepared.zero_grad()
        loss = loss_of(model, some_batches(1)[0])
        accelerator.backward(loss)
        return loss

    with pytest.raises(RuntimeError, match=r"^gradient_accumulation_steps is 4.*leave it at 1.*inside the closure$"):
        for _ in range(4):
            with accelerator.accumulate(model):
                prepared.step(closure)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match="needs a closure"):  # Accelerate's usual loop
        prepared.step()
    optimizer.step(closure)  # called by oneself it may be on, for another training


def fit_with_lightning(build, batches, accumulate=1, automatic=True, clip=None):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.network = network()

        def configure_optimizers(self):
            base = torch.optim.SGD(self.network.parameters(), lr=LR, momentum=0.9)
            if clip:
                base.register_step_pre_hook(lambda *_: clip_grad_norm_(self.network.parameters(), clip) and None)
            return build(self.network, base)

        def training_step(self, batch, index):
            if automatic:
                return loss_of(self.network, batch)
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                total = 0.0
                for part_x, part_y in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
                    loss = F.cross_entropy(self.network(part_x), part_y) / 4
                    self.manual_backward(loss)
                    total += loss.detach()
                return total

            optimizer.step(closure)
            return None

    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accumulate_grad_batches=accumulate,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module.network


@pytest.mark.parametrize("method", [*METHODS, "held"])
def test_the_recipe_for_lightning(method):
    """Automatic optimization gives the step its closure; a hook on the base clips the gradient that is stepped with."""
    batches = some_batches()
    masked = method == "held"
    build = BUILD[method] if not masked else BUILD["held"]
    close(
        fit_with_lightning(build, batches, clip=0.5),
        by_hand_in_micro_batches(build, batches, 1, clip=0.5),
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_for_lightning_with_micro_batches(method):
    """Manual optimization, with the micro-batches in the closure."""
    batches = some_batches()
    close(
        fit_with_lightning(METHODS[method], batches, automatic=False),
        by_hand_in_micro_batches(METHODS[method], batches, 4),
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_accumulation_of_lightning_is_refused(method):
    with pytest.raises(RuntimeError, match=r"adds to gradients of before the step.*accumulate_grad_batches=1"):
        fit_with_lightning(METHODS[method], some_batches(), accumulate=2)


def test_held_masks_accumulate_in_lightning():
    x = torch.cat([x for x, _ in some_batches()]), torch.cat([y for _, y in some_batches()])
    joined = [(x[0][:32], x[1][:32]), (x[0][32:], x[1][32:])]
    close(
        fit_with_lightning(BUILD["held"], some_batches(), accumulate=2),
        by_hand_in_micro_batches(BUILD["held"], joined, 1),
    )
