"""Every step rule against the formula written out by hand in float64."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cram_bench as cb
from cram_bench.compress import NM, Magnitude, PruneThenQuantize, Quantize

LR, MOMENTUM, DECAY, STEPS = 0.1, 0.9, 5e-4, 20


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def sgd(model, lr=LR):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=DECAY)


def loss_at(values, x, y):
    """The loss of `small_model` in training mode, from its six tensors, without any module."""
    w1, b1, scale, shift, w2, b2 = values
    hidden = x @ w1.T + b1
    hidden = (hidden - hidden.mean(0)) / torch.sqrt(hidden.var(0, correction=0) + 1e-5) * scale + shift
    logits = torch.tanh(hidden) @ w2.T + b2
    return (logits.logsumexp(1) - logits[torch.arange(len(y)), y]).mean()


def gradient_at(values, x, y):
    leaves = [value.detach().clone().requires_grad_() for value in values]
    return torch.autograd.grad(loss_at(leaves, x, y), leaves)


def largest_kept(values, sparsity):
    """Global magnitude masks over the two matrices by a full sort."""
    flat = torch.cat([values[0].flatten(), values[4].flatten()]).abs()
    drop = set(flat.argsort()[: round(sparsity * len(flat))].tolist())
    keep = torch.tensor([index not in drop for index in range(len(flat))], dtype=torch.float64)
    first, second = keep[: values[0].numel()], keep[values[0].numel() :]
    masks = [torch.ones_like(value) for value in values]
    masks[0], masks[4] = first.view_as(values[0]), second.view_as(values[4])
    return masks


def two_of_four(values):
    masks = [torch.ones_like(value) for value in values]
    for index in (0, 4):
        for row in range(len(values[index])):
            for start in range(0, values[index].shape[1], 4):
                group = values[index][row, start : start + 4].abs()
                for lowest in group.argsort()[:2].tolist():
                    masks[index][row, start + lowest] = 0
    return masks


def rounded(value, bits):
    """Symmetric rounding to 2^(b − 1) − 1 steps a row, entry by entry."""
    result = value.clone()
    for row in range(len(value)):
        step = max(abs(entry) for entry in value[row].tolist()) / (2 ** (bits - 1) - 1)
        for column, entry in enumerate(value[row].tolist()):
            result[row, column] = round(entry / step) * step
    return result


def hand_sam(values, x, y, draw, rho=0.05, adaptive=False):
    g = gradient_at(values, x, y)
    scaled = [v.abs() * gi for v, gi in zip(values, g, strict=True)] if adaptive else g
    norm = math.sqrt(sum(float((s * s).sum()) for s in scaled))
    step = [v * v * gi if adaptive else gi for v, gi in zip(values, g, strict=True)]
    return gradient_at([v + rho * s / norm for v, s in zip(values, step, strict=True)], x, y)


def hand_cram(values, x, y, draw, sparsities=(0.5,), rho=0.2, plus=True, sparse=True, pattern=None, bits=0):
    g = gradient_at(values, x, y)
    moved = [v + rho * gi for v, gi in zip(values, g, strict=True)]
    sparsity = sparsities[int(torch.randint(len(sparsities), (), generator=draw))]
    masks = pattern(moved) if pattern else largest_kept(moved, sparsity)
    compressed = [v * m for v, m in zip(moved, masks, strict=True)]
    if bits:
        compressed[0], compressed[4] = rounded(compressed[0], bits), rounded(compressed[4], bits)
    second = gradient_at(compressed, x, y)
    if sparse:
        second = [m * s for m, s in zip(masks, second, strict=True)]
    return [s + gi for s, gi in zip(second, g, strict=True)] if plus else second


class Hand:
    """A step rule with a memory, in float64: the masks that are held, or what the last step did."""

    def __init__(self, rule, **settings):
        self.rule, self.settings, self.memory = rule, settings, {}

    def __call__(self, values, x, y, draw):
        return self.rule(self.memory, values, x, y, draw, **self.settings)


def hand_normalized(values, x, y, draw, rho=0.3, sparsity=0.5):
    g = gradient_at(values, x, y)
    norm = math.sqrt(sum(float((gi * gi).sum()) for gi in g))
    moved = [v + rho * gi / norm for v, gi in zip(values, g, strict=True)]
    torch.randint(1, (), generator=draw)
    masks = largest_kept(moved, sparsity)
    second = gradient_at([v * m for v, m in zip(moved, masks, strict=True)], x, y)
    return [m * s + gi for m, s, gi in zip(masks, second, g, strict=True)]


def hand_sometimes(values, x, y, draw):
    if float(torch.rand((), generator=draw)) < 0.4:
        return gradient_at(values, x, y)
    return hand_cram(values, x, y, draw)


def hand_held(memory, values, x, y, draw, sparsities, interval, rho=0.2):
    """Masks of a sparsity serve `interval` uses of it, counted per sparsity."""
    g = gradient_at(values, x, y)
    moved = [v + rho * gi for v, gi in zip(values, g, strict=True)]
    index = int(torch.randint(len(sparsities), (), generator=draw))
    uses, masks = memory.get(index, (interval, None))
    if uses == interval:
        uses, masks = 0, largest_kept(moved, sparsities[index])
    memory[index] = (uses + 1, masks)
    second = gradient_at([v * m for v, m in zip(moved, masks, strict=True)], x, y)
    return [m * s + gi for m, s, gi in zip(masks, second, g, strict=True)]


def hand_momentum_sam(memory, values, x, y, draw, rho=0.3):
    """The velocity is kept here once more: v ← μ v + g + λ θ."""
    velocity = memory.get("v", [torch.zeros_like(v) for v in values])
    norm = math.sqrt(sum(float((v * v).sum()) for v in velocity)) or 1.0
    g = gradient_at([p - rho * v / norm for p, v in zip(values, velocity, strict=True)], x, y)
    memory["v"] = [MOMENTUM * v + gi + DECAY * p for v, gi, p in zip(velocity, g, values, strict=True)]
    return g


def hand_single(memory, values, x, y, draw, sparsities, rho, plain=0.5, ascent="gradient", sparse=True, norm=False):
    velocity = memory.get("v", [torch.zeros_like(v) for v in values])
    up = memory.get("g", [torch.zeros_like(v) for v in values]) if ascent == "gradient" else [-v for v in velocity]
    if norm:
        length = math.sqrt(sum(float((u * u).sum()) for u in up)) or 1.0
        up = [u / length for u in up]
    if float(torch.rand((), generator=draw)) < plain:
        g = gradient_at(values, x, y)
    else:
        moved = [v + rho * u for v, u in zip(values, up, strict=True)]
        masks = largest_kept(moved, sparsities[int(torch.randint(len(sparsities), (), generator=draw))])
        g = gradient_at([v * m for v, m in zip(moved, masks, strict=True)], x, y)
        if sparse:
            g = [m * gi for m, gi in zip(masks, g, strict=True)]
    memory["g"] = g
    memory["v"] = [MOMENTUM * v + gi + DECAY * p for v, gi, p in zip(velocity, g, values, strict=True)]
    return g


def four_of_eight(values):
    masks = [torch.ones_like(value) for value in values]
    for row in range(len(values[0])):  # eight inputs: one group a row; the second matrix has twelve and stays dense
        for lowest in values[0][row].abs().argsort()[:4].tolist():
            masks[0][row, lowest] = 0
    return masks


def uniformly_kept(values, sparsity=0.5):
    masks = [torch.ones_like(value) for value in values]
    for index in (0, 4):
        flat = masks[index].view(-1)
        flat[values[index].abs().flatten().argsort()[: round(sparsity * flat.numel())]] = 0
    return masks


def strictly_kept(values, sparsity=0.5):
    """The authors' rule: strictly above the ⌈n(1 − k)⌉-th largest magnitude of all."""
    flat = sorted((abs(e) for index in (0, 4) for e in values[index].flatten().tolist()), reverse=True)
    threshold = flat[math.ceil(len(flat) * (1 - sparsity)) - 1]
    masks = [torch.ones_like(value) for value in values]
    for index in (0, 4):
        masks[index] = (values[index].abs() > threshold).double()
    return masks


LEVELS = (0.3, 0.5, 0.7, 0.9)
RULES = {
    "sam": (lambda m, b: cb.optim.SAM(m, b, rho=0.05), hand_sam, {}),
    "asam": (lambda m, b: cb.optim.SAM(m, b, rho=0.5, adaptive=True), hand_sam, {"rho": 0.5, "adaptive": True}),
    "cram": (lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5), plus=False), hand_cram, {"plus": False}),
    "cram+": (lambda m, b: cb.optim.CrAM(m, b, [Magnitude(0.5)]), hand_cram, {}),
    "cram+-multi": (
        lambda m, b: cb.optim.CrAM(m, b, [Magnitude(s) for s in LEVELS], rho=0.15, seed=7),
        hand_cram,
        {"sparsities": LEVELS, "rho": 0.15},
    ),
    "cram+ dense gradients": (
        lambda m, b: cb.optim.CrAM(m, b, [Magnitude(0.5)], sparse_gradients=False),
        hand_cram,
        {"sparse": False},
    ),
    "cram+ int8": (lambda m, b: cb.optim.CrAM(m, b, Quantize(8)), hand_cram, {"sparsities": (0.0,), "bits": 8}),
    "cram+ pruned int8": (
        lambda m, b: cb.optim.CrAM(m, b, PruneThenQuantize(Magnitude(0.5), Quantize(8))),
        hand_cram,
        {"bits": 8},
    ),
    "cram+ 2:4": (lambda m, b: cb.optim.CrAM(m, b, [NM(2, 4)]), hand_cram, {"pattern": two_of_four}),
    "cram+ 4:8": (lambda m, b: cb.optim.CrAM(m, b, [NM(4, 8)]), hand_cram, {"pattern": four_of_eight}),
    "cram+ uniform": (
        lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5, "uniform")),
        hand_cram,
        {"pattern": uniformly_kept},
    ),
    "cram+ reference": (
        lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5, reference=True)),
        hand_cram,
        {"pattern": strictly_kept},
    ),
    "cram+ int4": (lambda m, b: cb.optim.CrAM(m, b, Quantize(4)), hand_cram, {"sparsities": (0.0,), "bits": 4}),
    "cram+ normalized": (
        lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5), rho=0.3, normalize=True),
        hand_normalized,
        {},
    ),
    "cram+-multi held masks": (
        lambda m, b: cb.optim.CrAM(m, b, [Magnitude(s) for s in LEVELS], seed=7, mask_interval=3),
        Hand(hand_held, sparsities=LEVELS, interval=3),
        {},
    ),
    "cram+ with plain steps": (
        lambda m, b: cb.optim.CrAM(m, b, Magnitude(0.5), plain=0.4),
        hand_sometimes,
        {},
    ),
    "momentum-sam": (lambda m, b: cb.optim.MomentumSAM(m, b), Hand(hand_momentum_sam), {}),
    "cram-single multi": (
        lambda m, b: cb.optim.CrAMSingle(m, b, [Magnitude(s) for s in LEVELS], rho=0.2, ascent="gradient", seed=7),
        Hand(hand_single, sparsities=LEVELS, rho=0.2),
        {},
    ),
    "cram-single momentum": (
        lambda m, b: cb.optim.CrAMSingle(m, b, Magnitude(0.5), 0.05, plain=0.3, sparse_gradients=False, normalize=True),
        Hand(hand_single, sparsities=(0.5,), rho=0.05, plain=0.3, ascent="momentum", sparse=False, norm=True),
        {},
    ),
}
ONE_PASS = [rule for rule in RULES if rule.startswith(("momentum-sam", "cram-single"))]
TWO_PASS = [rule for rule in RULES if rule not in ONE_PASS]


@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_equal_the_formula(rule, small_model, small_batch):
    build, by_hand, settings = copy.deepcopy(RULES[rule])
    values = [p.detach().clone() for p in small_model.parameters()]
    velocity = [torch.zeros_like(v) for v in values]
    draw = torch.Generator().manual_seed(7 if "multi" in rule else 0)
    optimizer = build(small_model, sgd(small_model))
    closure = closure_of(small_model, optimizer, *small_batch)
    for _ in range(STEPS):
        expected = loss_at(values, *small_batch).item()
        loss = optimizer.step(closure).item()
        if rule in TWO_PASS:
            assert loss == pytest.approx(expected, abs=1e-10)  # the loss at the true weights
        gradient = by_hand(values, *small_batch, draw, **settings)
        for index, g in enumerate(gradient):
            velocity[index] = MOMENTUM * velocity[index] + g + DECAY * values[index]
            values[index] = values[index] - LR * velocity[index]
    for ours, theirs in zip(small_model.parameters(), values, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-10)


def test_any_base_optimizer(small_model, small_batch):
    """AdamW fed with the hand-made gradient goes the same way."""
    reference = copy.deepcopy(small_model)
    adam = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    optimizer = cb.optim.CrAM(small_model, torch.optim.AdamW(small_model.parameters(), lr=1e-2), [Magnitude(0.5)])
    draw = torch.Generator()
    for _ in range(5):
        optimizer.step(closure_of(small_model, optimizer, *small_batch))
        gradient = hand_cram([p.detach() for p in reference.parameters()], *small_batch, draw)
        for parameter, g in zip(reference.parameters(), gradient, strict=True):
            parameter.grad = g
        adam.step()
    for ours, theirs in zip(small_model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", TWO_PASS)
def test_batchnorm_statistics_are_those_of_one_plain_pass(rule, small_model, small_batch):
    reference = copy.deepcopy(small_model)
    reference(small_batch[0])
    optimizer = RULES[rule][0](small_model, sgd(small_model))
    optimizer.step(closure_of(small_model, optimizer, *small_batch))
    for ours, theirs in zip(small_model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", ["sam", "cram+-multi", "cram+-multi held masks", "cram-single multi", "momentum-sam"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_closure_that_raises_leaves_everything_as_it_was(rule, call, small_model, small_batch):
    if rule in ONE_PASS and call == 2:
        pytest.skip("there is no second call")
    optimizer = RULES[rule][0](small_model, sgd(small_model))
    closure = closure_of(small_model, optimizer, *small_batch)
    for _ in range(3):
        optimizer.step(closure)
    before, state = copy.deepcopy(small_model.state_dict()), copy.deepcopy(optimizer.state_dict())
    calls = iter(range(1, 10))

    def breaking():
        loss = closure()
        if next(calls) == call:
            raise RuntimeError("out of memory")
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(breaking)
    assert all(torch.equal(value, before[name]) for name, value in small_model.state_dict().items())
    assert same(optimizer.state_dict(), state)  # the draw and the held masks too
    assert all(p.requires_grad for p in small_model.parameters())
    assert all(m.training for m in small_model.modules())
    assert math.isfinite(optimizer.step(closure).detach())  # and training goes on


@pytest.mark.parametrize("rule", RULES)
def test_resume_is_bit_for_bit(rule, small_model, small_batch):
    build = RULES[rule][0]
    straight, interrupted = copy.deepcopy(small_model), copy.deepcopy(small_model)
    optimizer = build(straight, sgd(straight))
    for _ in range(6):
        optimizer.step(closure_of(straight, optimizer, *small_batch))

    optimizer = build(interrupted, sgd(interrupted))
    for _ in range(3):
        optimizer.step(closure_of(interrupted, optimizer, *small_batch))
    file = io.BytesIO()  # as a checkpoint is: nothing but tensors and plain values
    torch.save((interrupted.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = copy.deepcopy(small_model)
    resumed.load_state_dict(saved[0])
    optimizer = build(resumed, sgd(resumed))
    optimizer.load_state_dict(saved[1])
    for _ in range(3):
        optimizer.step(closure_of(resumed, optimizer, *small_batch))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_state_dict_holds_little_more_than_the_bases(small_model, small_batch):
    """Neither masks nor copies of weights end up in a checkpoint."""
    base = sgd(small_model)
    optimizer = cb.optim.CrAM(small_model, base, [Magnitude(0.5)])
    optimizer.step(closure_of(small_model, optimizer, *small_batch))
    first, plain = optimizer.state_dict()["param_groups"][0], base.state_dict()["param_groups"][0]
    assert first.keys() - plain.keys() == {"cram"}
    assert size(first["cram"]) == size([optimizer.draw.generator.get_state()])
    assert optimizer.state is base.state
    with pytest.raises(ValueError, match="not saved by CrAM"):
        optimizer.load_state_dict(base.state_dict())


@pytest.mark.filterwarnings("error")
def test_schedulers_act_on_the_wrapper(small_model, small_batch):
    base = sgd(small_model)
    optimizer = cb.optim.SAM(small_model, base)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for _ in range(2):
        optimizer.step(closure_of(small_model, optimizer, *small_batch))
        scheduler.step()
    assert base.param_groups[0]["lr"] == pytest.approx(LR / 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # gives the base new group objects
    scheduler.step()
    assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < LR / 2


def test_groups_keep_their_own_settings(small_model, small_batch):
    """Rho 0 in one group: its weights do not move in the ascent, and so it equals a hand step with that."""
    first, second = list(small_model.parameters())[:4], list(small_model.parameters())[4:]
    groups = [{"params": first, "rho": 0.0}, {"params": second, "lr": 0.05}]
    optimizer = cb.optim.CrAM(small_model, torch.optim.SGD(groups, lr=LR), [Magnitude(0.5)], rho=0.3)
    values = [p.detach().clone() for p in small_model.parameters()]
    g = gradient_at(values, *small_batch)
    rhos = [0.0] * 4 + [0.3] * 2
    moved = [v + r * gi for v, r, gi in zip(values, rhos, g, strict=True)]
    masks = largest_kept(moved, 0.5)
    s = gradient_at([v * m for v, m in zip(moved, masks, strict=True)], *small_batch)
    optimizer.step(closure_of(small_model, optimizer, *small_batch))
    for index, parameter in enumerate(small_model.parameters()):
        expected = values[index] - (LR if index < 4 else 0.05) * (g[index] + masks[index] * s[index])
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["sam", "cram+"])
def test_accumulation_inside_the_closure_equals_the_joined_batch(rule, small_batch):
    torch.manual_seed(0)
    joined = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()  # BatchNorm sees each batch alone
    split = copy.deepcopy(joined)
    x, y = small_batch
    one = RULES[rule][0](joined, sgd(joined))
    one.step(closure_of(joined, one, x, y))
    two = RULES[rule][0](split, sgd(split))

    def closure():
        two.zero_grad()
        total = 0.0
        for part in (slice(0, 8), slice(8, 32)):
            loss = F.cross_entropy(split(x[part]), y[part], reduction="sum") / len(y)
            loss.backward()
            total += loss.detach()
        return total

    two.step(closure)
    for ours, theirs in zip(split.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["sam", "asam", "cram", "cram+-multi", "cram+ 2:4"])
def test_frozen_and_unused_weights_are_left_alone(rule, small_batch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.frozen, self.unused = nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.used(x))

    torch.manual_seed(0)
    model = Model().double()
    before = copy.deepcopy(model.state_dict())
    optimizer = RULES[rule][0](model, sgd(model))
    optimizer.step(closure_of(model, optimizer, *small_batch))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("used"), name


def test_a_weight_that_the_second_pass_leaves_out_keeps_its_first_gradient(small_model, small_batch):
    """Such as that of a layer which is dropped at random: CrAM+ adds nothing to g there, and CrAM has no gradient."""
    for plus in (True, False):
        seen, passes = {}, []
        base = sgd(small_model)
        base.register_step_pre_hook(lambda *_, seen=seen: seen.update(grad=small_model[0].bias.grad))
        optimizer = cb.optim.CrAM(small_model, base, Magnitude(0.5), plus=plus)

        def closure(optimizer=optimizer, passes=passes):
            optimizer.zero_grad()
            loss = F.cross_entropy(small_model(small_batch[0]), small_batch[1])
            loss.backward()
            passes.append(small_model[0].bias.grad.clone())
            if len(passes) == 2:
                small_model[0].bias.grad = None
            return loss

        optimizer.step(closure)
        assert len(passes) == 2
        assert torch.equal(seen["grad"], passes[0]) if plus else seen["grad"] is None


def test_a_model_without_any_gradient_is_left_alone(small_model, small_batch):
    small_model.requires_grad_(False)
    before = copy.deepcopy([p.clone() for p in small_model.parameters()])
    for optimizer in (
        cb.optim.SAM(small_model, sgd(small_model)),
        cb.optim.CrAM(small_model, sgd(small_model), Magnitude(0.5)),
    ):
        optimizer.step(lambda: F.cross_entropy(small_model(small_batch[0]), small_batch[1]))
    assert all(torch.equal(p, q) for p, q in zip(small_model.parameters(), before, strict=True))


def test_set_to_none_does_not_matter(small_model, small_batch):
    """A closure that zeroes gradients in place must not wipe the first pass's."""
    other = copy.deepcopy(small_model)
    optimizer = cb.optim.CrAM(small_model, sgd(small_model), Magnitude(0.5))
    optimizer.step(closure_of(small_model, optimizer, *small_batch))
    zeroing = cb.optim.CrAM(other, sgd(other), Magnitude(0.5))

    def closure():
        zeroing.zero_grad(set_to_none=False)
        loss = F.cross_entropy(other(small_batch[0]), small_batch[1])
        loss.backward()
        return loss

    zeroing.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(small_model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda m: cb.optim.SAM(m, sgd(m), rho=-1), ValueError, "rho.*not -1"),
        (lambda m: cb.optim.SAM(m, sgd(m), rho=math.nan), ValueError, "rho.*not nan"),
        (lambda m: cb.optim.CrAM(m, sgd(m), Magnitude(0.5), rho=math.inf), ValueError, "rho.*not inf"),
        (lambda m: cb.optim.CrAM(m, sgd(m), []), ValueError, "at least one compressor"),
        (lambda m: cb.optim.CrAM(m, sgd(m), [0.5]), TypeError, "not 0.5"),
        (lambda m: cb.optim.SAM(m, sgd(nn.Linear(2, 2))), ValueError, "not in the model"),
        (lambda m: cb.optim.CrAM(m, sgd(m), Magnitude(0.5), exclude=["conv.*"]), ValueError, "'conv.\\*' matches no"),
        (lambda m: cb.optim.SAM(m, sgd(m)).step(), TypeError, "needs a closure"),
        (lambda m: cb.optim.CrAM(m, sgd(m), Magnitude(0.5), mask_interval=0), ValueError, "mask_interval.*not 0"),
        (lambda m: cb.optim.CrAMSingle(m, sgd(m), Magnitude(0.5), plain=1), ValueError, "plain.*not 1"),
        (lambda m: cb.optim.CrAMSingle(m, sgd(m), Magnitude(0.5), ascent="up"), ValueError, "ascent.*not 'up'"),
        (
            lambda m: cb.optim.MomentumSAM(m, torch.optim.SGD(m.parameters(), lr=0.1)),
            ValueError,
            "keeps none: SGD",
        ),
        (
            lambda m: cb.optim.MomentumSAM(m, torch.optim.AdamW(m.parameters(), betas=(0.0, 0.999))),
            ValueError,
            "keeps none: AdamW",
        ),
    ],
)
def test_bad_input(build, error, message, small_model):
    with pytest.raises(error, match=message):
        build(small_model)


@pytest.mark.parametrize("method", ["sam", "cram"])
def test_a_group_added_later_has_the_settings(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    optimizer = cb.optim.SAM(model, base) if method == "sam" else cb.optim.CrAM(model, base, Magnitude(0.5))
    optimizer.add_param_group({"params": list(model[1].parameters())})
    before = model[1].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.param_groups[1]["rho"] == optimizer.param_groups[0]["rho"]
    assert not torch.equal(before, model[1].weight)


def test_a_foreign_group_is_refused_later_too():
    model = nn.Linear(4, 4)
    optimizer = cb.optim.SAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="not in the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("rho", [-1.0, float("nan")])
def test_the_radius_of_a_group_is_checked(rho):
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="rho"):
        cb.optim.SAM(model, torch.optim.SGD([{"params": model.parameters(), "rho": rho}], lr=0.1))


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_in_the_closure_leaves_everything_as_it_was(call, small_model, small_batch):
    optimizer = cb.optim.SAM(small_model, torch.optim.SGD(small_model.parameters(), lr=0.1))
    before = {name: value.clone() for name, value in small_model.state_dict().items()}
    calls = []

    def closure():
        calls.append(1)
        loss = small_model(small_batch[0]).square().mean()
        if len(calls) == call:
            raise KeyboardInterrupt  # not an Exception
        loss.backward()
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(value, before[name]) for name, value in small_model.state_dict().items())


def scaled_closure(model, optimizer, scaler, x, y, factor=1.0):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * factor
        scaler.scale(loss).backward()
        return loss

    return closure


@pytest.mark.parametrize("rule", RULES)
def test_a_grad_scaler_changes_nothing_but_the_scale(rule, small_model, small_batch):
    """The scale is a power of two, so in float64 scaling and unscaling are exact."""
    other = copy.deepcopy(small_model)
    plain, scaled = RULES[rule][0](small_model, sgd(small_model)), RULES[rule][0](other, sgd(other))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for _ in range(5):
        loss = plain.step(closure_of(small_model, plain, *small_batch))
        assert scaled.step(scaled_closure(other, scaled, scaler, *small_batch), scaler=scaler) == loss
        scaler.update()
    assert scaler.get_scale() == 2.0**12
    for ours, theirs in zip(small_model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", ["sam", "cram+-multi", "momentum-sam", "cram-single multi"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_a_scaler_skips_the_step_whose_gradient_overflows(rule, call, scale, small_model, small_batch):
    optimizer = RULES[rule][0](small_model, sgd(small_model))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    calls = iter(range(1, 10))

    def closure():
        factor = math.inf if next(calls) == (call if rule in TWO_PASS else 1) else 1.0
        return scaled_closure(small_model, optimizer, scaler, *small_batch, factor)()

    before = [p.clone() for p in small_model.parameters()]
    optimizer.step(closure, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == scale / 2
    assert all(torch.equal(p, q) for p, q in zip(small_model.parameters(), before, strict=True))
    for _ in range(4):  # nothing of the overflow is remembered
        optimizer.step(scaled_closure(small_model, optimizer, scaler, *small_batch), scaler=scaler)
        scaler.update()
    assert all(p.isfinite().all() for p in small_model.parameters())
    assert not torch.equal(before[0], next(small_model.parameters()))


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_hook_on_the_base_optimizer_clips_what_it_steps_with(scaling, fused, small_model, small_batch):
    base = torch.optim.SGD(small_model.parameters(), lr=1.0, fused=fused)
    base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(small_model.parameters(), 0.01) and None)
    optimizer = cb.optim.CrAM(small_model, base, Magnitude(0.5))
    before = [p.detach().clone() for p in small_model.parameters()]
    scaler = torch.amp.GradScaler("cpu", enabled=scaling)
    optimizer.step(scaled_closure(small_model, optimizer, scaler, *small_batch), scaler=scaler)
    moved = [p.detach() - q for p, q in zip(small_model.parameters(), before, strict=True)]
    assert math.sqrt(sum(float(m.square().sum()) for m in moved)) == pytest.approx(0.01, rel=1e-4)


def test_the_next_ascent_is_along_the_gradient_before_it_was_clipped(small_model, small_batch):
    base = torch.optim.SGD(small_model.parameters(), lr=1.0)
    optimizer = cb.optim.CrAMSingle(small_model, base, Magnitude(0.5), ascent="gradient")
    base.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in small_model.parameters()]))
    base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(small_model.parameters(), 0.01) and None)
    seen = []
    optimizer.step(scaled_closure(small_model, optimizer, torch.amp.GradScaler("cpu", enabled=False), *small_batch))
    assert same(optimizer.state_dict()["param_groups"][0]["cram"]["last"], seen[0])


def same(one, other):
    """Whether two state dicts are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def size(value):
    """Bytes of the tensors in a state dict."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0


@pytest.mark.parametrize("levels", [(0.5, 0.7, 0.9), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)])
def test_held_masks_take_little_room(levels):
    torch.manual_seed(0)
    model = cb.models.create("resnet20", 10)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = cb.optim.CrAM(model, base, [Magnitude(s) for s in levels], mask_interval=20)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    for _ in range(4 * len(levels)):
        optimizer.step(closure_of(model, optimizer, x, y))
    state = optimizer.state_dict()
    assert len(state["param_groups"][0]["cram"]["held"]) >= len(levels) - 1
    assert size(state) <= 1.1 * size(base.state_dict())


def test_the_state_of_other_masks_is_refused(small_model):
    def cram(**settings):
        return cb.optim.CrAM(small_model, sgd(small_model), [Magnitude(0.5), Magnitude(0.9)], **settings)

    state = cram(mask_interval=2).state_dict()
    with pytest.raises(ValueError, match="mask_interval 2, not 1"):
        cram().load_state_dict(state)
    with pytest.raises(ValueError, match=r"\['global@0.5', 'global@0.9'\], not \['global@0.5'\]"):
        cb.optim.CrAM(small_model, sgd(small_model), Magnitude(0.5), mask_interval=2).load_state_dict(state)
    single = cb.optim.CrAMSingle(small_model, sgd(small_model), Magnitude(0.5))
    with pytest.raises(ValueError, match="saved by CrAM, not by CrAMSingle"):
        single.load_state_dict(state)


@pytest.mark.parametrize(
    "base", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), torch.optim.AdamW]
)
def test_held_masks_are_never_revived(base, small_model, small_batch):
    """Not by momentum gathered while the model was dense, nor by weight decay."""
    inner = base(small_model.parameters())
    for _ in range(3):
        closure_of(small_model, inner, *small_batch)()
        inner.step()
    masks = cb.compress.apply_(small_model, Magnitude(0.7))
    optimizer = cb.optim.HeldMasks(small_model, inner, masks)
    start = small_model[0].weight.detach().clone()
    for _ in range(10):
        optimizer.step(closure_of(small_model, optimizer, *small_batch))
        for name, mask in masks.items():
            assert not small_model.get_parameter(name)[~mask].any()
    assert not torch.equal(small_model[0].weight, start)


def test_held_masks_equal_masked_sgd_by_hand(small_model, small_batch):
    masks = cb.compress.apply_(small_model, Magnitude(0.5))
    held = {index: masks[name].double() for index, name in ((0, "0.weight"), (4, "3.weight"))}
    values = [p.detach().clone() for p in small_model.parameters()]
    velocity = [torch.zeros_like(v) for v in values]
    optimizer = cb.optim.HeldMasks(small_model, sgd(small_model), masks)
    for _ in range(STEPS):
        optimizer.step(closure_of(small_model, optimizer, *small_batch))
        for index, g in enumerate(gradient_at(values, *small_batch)):
            velocity[index] = MOMENTUM * velocity[index] + g * held.get(index, 1.0) + DECAY * values[index]
        values = [v - LR * step for v, step in zip(values, velocity, strict=True)]
    for ours, theirs, gathered in zip(small_model.parameters(), values, velocity, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-10)
        torch.testing.assert_close(optimizer.state[ours]["momentum_buffer"], gathered, rtol=0, atol=1e-10)


def test_held_masks_name_what_stays_dense():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    masks = cb.compress.apply_(model, Magnitude(0.5))
    assert set(masks.dense) == {"0.weight"} == set(cb.optim.HeldMasks(model, sgd(model), masks).masks.dense)


def test_masks_are_held_over_a_plain_optimizer_only(small_model):
    masks = cb.compress.apply_(small_model, Magnitude(0.5))
    with pytest.raises(TypeError, match="not over SAM"):
        cb.optim.HeldMasks(small_model, cb.optim.SAM(small_model, sgd(small_model)), masks)
    with pytest.raises(ValueError, match="fits no parameter"):
        cb.optim.HeldMasks(small_model[0], torch.optim.SGD(small_model[0].parameters(), lr=0.1), masks)


@pytest.mark.parametrize(
    ("scope", "kept"),
    [("global", [[3.0, 2.0], [], [9.0]]), ("uniform", [[3.0, 2.0, 1.0], [0.6], [9.0, 0.1]])],
)
def test_the_reference_rule_by_hand(scope, kept):
    """Eight weights at 50 %: above the fourth largest, 1.0. Uniform: the first tensor and the last stay dense."""
    weights = {"a": torch.tensor([3.0, -2.0, 1.0]), "b": torch.tensor([0.5, 0.6, 0.4]), "c": torch.tensor([9.0, 0.1])}
    compressor = Magnitude(0.5, scope, reference=True)
    assert cb.compress.parse(str(compressor)) == compressor
    masks = compressor.masks(weights)
    assert [sorted(weights[n][m].abs().tolist(), reverse=True) for n, m in masks.items()] == [
        pytest.approx(expected) for expected in kept
    ]
    assert Magnitude(0.0, scope, reference=True).masks(weights).zeros == 0
    assert Magnitude(1.0, "global", reference=True).masks(weights).zeros == 8


@pytest.mark.parametrize(
    "rule", ["sam", "momentum-sam", "cram+-multi", "cram-single momentum", "cram+-multi held masks"]
)
def test_a_checkpoint_is_hardly_larger_than_the_bases(rule):
    torch.manual_seed(0)
    model = cb.models.create("resnet20", 10)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = RULES[rule][0](model, base)
    for _ in range(4):
        optimizer.step(closure_of(model, optimizer, torch.randn(8, 3, 32, 32), torch.arange(8)))
    assert size(optimizer.state_dict()) <= 1.1 * size(base.state_dict())
