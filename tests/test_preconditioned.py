"""Preconditioned optimizers against explicit matrices in float64, and against their own formulas by hand."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cram_bench as cb
from cram_bench.compress import Magnitude
from cram_bench.compress.rank import NaNError
from cram_bench.optim import EFCP, GGT, MFAC, Dense, LowRank, TopK, preconditioned, spectra
from cram_bench.optim.spectra import Inverse, Root
from cram_bench.optim.window import Window

CPU = torch.device("cpu")
SHAPES = [torch.Size(shape) for shape in ((16, 12), (16,), (6, 4, 3, 3), (5,))]
SIZE = sum(map(math.prod, SHAPES))
RINGS = {
    "dense": Dense(),
    "topk": TopK(0.1),
    "topk in blocks": TopK(0.1, block=64),
    "topk without feedback": TopK(0.1, feedback=False),
    "low rank": LowRank(2),
    "low rank without feedback": LowRank(2, feedback=False),
}


def stream(count, norm=1.0, size=SIZE, dtype=torch.float32):
    """Gradients of this norm that agree as those of a training do: a common part, and noise."""
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(size, generator=generator, dtype=torch.float64)
    rows = mean + 2 * torch.randn(count, size, generator=generator, dtype=torch.float64)
    return (rows * norm / rows.norm(dim=1, keepdim=True)).to(dtype)


def window_of(ring, spectrum, rows, dtype=torch.float32, shapes=SHAPES):
    window = Window(ring, spectrum, rows, dtype)
    window.extend(shapes, CPU)
    return window


def as_matrices(flat):
    return [p.view(s) for p, s in zip(flat.split([math.prod(s) for s in SHAPES]), SHAPES, strict=True)]


class ByHand:
    """What a ring keeps of each gradient, written down once more, in float64."""

    def __init__(self, ring):
        self.ring, self.error = ring, torch.zeros(SIZE, dtype=torch.float64)

    def __call__(self, gradient, window):
        if isinstance(self.ring, LowRank):  # what the float32 factors say; those are looked at below
            return held(window, (window.count - 1) % window.gradients)
        total = gradient.double() + (self.error if getattr(self.ring, "feedback", False) else 0)
        kept = self.keep(total)
        self.error = total - kept
        return kept

    def keep(self, total):
        if isinstance(self.ring, Dense):
            return total
        block = self.ring.block or SIZE
        kept = torch.zeros_like(total)
        for start in range(0, SIZE, block):
            part = total[start : start + block]
            best = part.abs().argsort(descending=True)[: round(0.1 * len(part))] + start
            kept[best] = total[best]
        return kept


def held(window, place):
    """The row that factors hold, multiplied out in float64."""
    parts, out = [part[place].double() for part in window.rows.parts], []
    while parts:
        first = parts.pop(0)
        out.append((first.T @ parts.pop(0)).flatten() if first.ndim == 2 else first)
    return torch.cat(out)


def inverse(damping, rows, divisor):
    """(λI + GᵀG/n)⁻¹ g of the last row g: a float64 solve, refined by residuals in extended precision.

    At λ = 1e-9 and |g| = 15 the float64 solve alone is wrong in its fifth digit.
    """
    fisher = damping * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows / divisor
    factor, wide = torch.linalg.cholesky(fisher), rows.numpy().astype(np.longdouble)
    u = np.zeros(rows.shape[1], np.longdouble)
    for _ in range(3):
        residual = wide[-1] - damping * u - wide.T @ (wide @ u) / divisor
        u += torch.cholesky_solve(torch.from_numpy(residual.astype(np.float64))[:, None], factor)[:, 0].numpy()
    return torch.from_numpy(u.astype(np.float64))


def relative(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(("divisor", "rows"), [("count", 24), ("window", 70)])  # blocks eliminated last: one, three
@pytest.mark.parametrize("norm", [0.7, 15.0])
@pytest.mark.parametrize("kind", RINGS)
def test_u_is_that_of_the_explicit_inverse(kind, rows, norm, divisor):
    """Filling, full and wrapped; rows in float32, the truth from what they hold, beyond float64."""
    ring = RINGS[kind]
    gradients = stream(2 * rows + 7, norm)
    for damping in (1e-3, 1e-6, 1e-9):
        window, by_hand, kept = window_of(ring, Inverse(damping, divisor), rows), ByHand(ring), []
        for step, gradient in enumerate(gradients):
            u = window.push(gradient)
            kept.append(by_hand(gradient, window))
            if step in (4, rows - 1, rows + 13, 2 * rows + 6):
                there = torch.stack(kept[-rows:])
                n = len(there) if divisor == "count" else rows
                assert relative(u, inverse(damping, there, n)) < 5e-6, (damping, step)


def test_woodbury_in_float32_would_fail_it():
    """The formula that is published, of gradients as large as a network's: no digit is left, where ours has six."""
    rows, damping = stream(24, 15.0), 1e-5
    window = window_of(Dense(), Inverse(damping), 24)
    u = [window.push(gradient) for gradient in rows][-1]
    last = rows[-1]
    inner = torch.linalg.solve(damping * 24 * torch.eye(24) + rows @ rows.T, rows @ last)
    woodbury = (last - rows.T @ inner) / damping
    truth = inverse(damping, rows.double(), 24)
    assert relative(u, truth) < 5e-6
    assert relative(woodbury, truth) > 0.05


@pytest.mark.parametrize("kind", RINGS)
def test_gradients_that_repeat_are_no_trouble(kind):
    """Full batches: every row alike, so the Gram matrix is singular but for the damping."""
    gradient = stream(1, 15.0)[0]
    window, by_hand, kept = window_of(RINGS[kind], Inverse(1e-5, "count"), 40), ByHand(RINGS[kind]), []
    for _ in range(60):
        u = window.push(gradient)
        kept.append(by_hand(gradient, window))
    assert relative(u, inverse(1e-5, torch.stack(kept[-40:]), 40)) < 5e-6


@pytest.mark.parametrize("kind", RINGS)
def test_gradients_that_nearly_repeat_need_products_in_float64(kind):
    """They differ by 1e-4 of their length: products rounded to float32 would leave no digit of their differences."""
    rows = stream(1, 15.0) + 1e-4 * stream(31, 15.0)
    window, by_hand, kept = window_of(RINGS[kind], Inverse(1e-7, "count"), 31), ByHand(RINGS[kind]), []
    for gradient in rows:
        u = window.push(gradient)
        kept.append(by_hand(gradient, window))
    assert relative(u, inverse(1e-7, torch.stack(kept), 31)) < 5e-6


def test_the_root_of_gradients_that_repeat():
    """The Gram matrix has rounded zeros on both sides of zero; one direction is left: u = g/(ε + √n |g|)."""
    gradient = stream(1, 15.0)[0]
    window = window_of(Dense(), Root(1e-2), 40)
    for step in range(60):
        u = window.push(gradient)
        norm = float(gradient.double().norm()) * min(step + 1, 40) ** 0.5
        assert relative(u, gradient.double() / (1e-2 + norm)) < 1e-5, step


@pytest.mark.parametrize("norm", [0.7, 15.0])
@pytest.mark.parametrize("kind", RINGS)
def test_ggt_is_the_explicit_root_of_the_matrix(kind, norm):
    ring = RINGS[kind]
    for damping in (1e-1, 1e-5):
        window, by_hand, kept = window_of(ring, Root(damping), 20), ByHand(ring), []
        for step, gradient in enumerate(stream(47, norm)):
            u = window.push(gradient)
            kept.append(by_hand(gradient, window))
            if step in (0, 7, 19, 46):
                there = torch.stack(kept[-20:])
                _, values, vectors = torch.linalg.svd(there, full_matrices=True)  # of GᵀG, with all its zeros
                values = F.pad(values, (0, SIZE - len(values)))
                truth = vectors.T @ ((vectors @ kept[-1]) / (values + damping))
                assert relative(u, truth) < 1e-5, (damping, step)


@pytest.mark.parametrize("spectrum", [lambda: Inverse(1e-4), lambda: Root(1e-5)])
def test_a_density_of_one_is_dense(spectrum):
    dense, sparse = (window_of(ring, spectrum(), 9) for ring in (Dense(), TopK(1.0)))
    for gradient in stream(25):
        torch.testing.assert_close(dense.push(gradient), sparse.push(gradient), rtol=1e-9, atol=1e-12)
    assert not sparse.rows.carried[0].any()


@settings(max_examples=15, deadline=None)
@given(
    density=st.floats(0.001, 1), block=st.integers(0, 600), steps=st.integers(1, 12), half=st.booleans(),
    rank=st.integers(0, 3),
)  # fmt: skip
def test_nothing_is_lost(density, block, steps, half, rank):
    """Σc + e = Σg, whatever is kept and in whatever it is stored."""
    ring = LowRank(rank) if rank else TopK(density, block)
    window = window_of(ring, Inverse(1e-3), 12, torch.bfloat16 if half else torch.float32)
    gradients = stream(steps)
    for gradient in gradients:
        window.push(gradient)
    total = window.rows.matrix(steps).sum(0) + window.rows.carried[0].double()
    torch.testing.assert_close(total, gradients.double().sum(0), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("density", "block", "kept"), [(0.01, 0, 4), (0.1, 0, 43), (0.1, 100, 43), (1e-9, 0, 1)])
def test_how_many_entries_a_row_keeps(density, block, kept):
    """κd rounded, one at least; in blocks 10 of each 100, and 3 of the 29 that are left of 429."""
    window = window_of(TopK(density, block), Inverse(1e-3), 3)
    index, values = window.rows.parts
    assert (SIZE, index.shape, index.dtype, values.shape) == (429, (3, kept), torch.int32, (3, kept))
    gradient = stream(1)[0]
    window.push(gradient)
    assert len(set(index[0].tolist())) == kept
    assert torch.equal(values[0], gradient[index[0]])
    if block:
        assert index[0].div(100, rounding_mode="floor").bincount().tolist() == [10, 10, 10, 10, 3]


@pytest.mark.parametrize("feedback", [True, False])
def test_factors_are_one_power_iteration_each(feedback):
    """P = orthonormal(A Q'), Q = AᵀP, warm-started and with error feedback, once more in float64."""
    window = window_of(LowRank(2, feedback), Inverse(1e-3), 20, torch.float64)
    error = torch.zeros(SIZE, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    warm = [torch.randn(2, s[1:].numel(), generator=generator, dtype=torch.float64) for s in SHAPES if len(s) > 1]
    for step, gradient in enumerate(stream(12, dtype=torch.float64)):
        window.push(gradient)
        total, out, onward = gradient + error, [], []
        for piece in as_matrices(total):
            if piece.ndim == 1:
                out.append(piece)
                continue
            matrix = piece.flatten(1)
            left = torch.linalg.qr(matrix @ warm[len(onward)].T).Q
            onward.append(left.T @ matrix)
            out.append((left @ left.T @ matrix).flatten())
        warm, kept = onward, torch.cat(out)
        error = total - kept if feedback else error
        torch.testing.assert_close(held(window, step), kept, rtol=0, atol=1e-9)


def test_products_of_factors_are_those_of_the_matrices():
    window = window_of(LowRank(2), Inverse(1e-3), 8)
    for gradient in stream(11):
        window.push(gradient)
    matrix = window.rows.matrix(8)
    torch.testing.assert_close(window.gram, matrix @ matrix.T, rtol=1e-12, atol=1e-12)
    for row in matrix:
        assert [int(torch.linalg.matrix_rank(m.flatten(1), rtol=1e-5)) for m in as_matrices(row) if m.ndim > 1] == [
            2,
            2,
        ]
    one_dimensional = [part.shape for part in window.rows.parts if part.ndim == 2]
    assert one_dimensional == [(8, 16), (8, 5)]


def test_factors_that_would_save_nothing_are_not_taken():
    window = window_of(LowRank(3), Inverse(1e-3), 4, shapes=[torch.Size((6, 6)), torch.Size((6, 7))])
    assert [part.shape for part in window.rows.parts] == [(4, 36), (4, 3, 6), (4, 3, 7)]


def test_a_gradient_that_stays_is_found_by_the_power_iteration():
    """Of a constant gradient of rank 2 and one more, all but the least direction is kept at once, warm-started."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(16, 12))
    gradient = torch.zeros(SIZE)
    gradient[:192] = (u[:, :3] @ torch.diag(torch.tensor([9.0, 4.0, 1e-3])) @ v[:3]).flatten()
    window = window_of(LowRank(2, feedback=False), Inverse(1e-3), 5)
    for _ in range(5):
        window.push(gradient)
    assert relative(window.rows.matrix(5)[4], gradient.double()) < 2e-4


# The optimizers


def sgd(model, lr=0.1, **how):
    return torch.optim.SGD(model.parameters(), lr=lr, **how)


OPTIMIZERS = {
    "m-fac": lambda m, b, **how: MFAC(m, b, 6, 1e-2, **how),
    "m-fac of many": lambda m, b, **how: MFAC(m, b, 40, 1e-2, **how),
    "ggt": lambda m, b, **how: GGT(m, b, 6, 1e-2, **how),
    "s-m-fac": lambda m, b, **how: EFCP(m, b, TopK(0.2), "mfac", 6, 1e-2, **how),
    "s-ggt": lambda m, b, **how: EFCP(m, b, TopK(0.2, block=32), "ggt", 6, 1e-2, **how),
    "low rank": lambda m, b, **how: EFCP(m, b, LowRank(1), "mfac", 6, 1e-2, **how),
}


def train(model, optimizer, batch, steps, scale=1.0):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1]) * scale
            loss.backward()
            return loss

        optimizer.step(closure)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def close(one, other, atol=1e-12):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def gradient_of(model, batch):
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("decay", ["none", "in the ring", "decoupled", "the base's"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_by_hand(momentum, decay, small_model, small_batch):
    """By v ← μv + u; θ ← θ − ηv, u from the explicit inverse; weight decay where it was asked for."""
    other, rows, velocity = copy.deepcopy(small_model), [], 0.0
    weights = list(other.parameters())
    base = sgd(small_model, momentum=momentum, weight_decay=0.02 if decay == "the base's" else 0.0)
    how = {
        "none": {},
        "the base's": {},
        "in the ring": {"decay": 0.02},
        "decoupled": {"decay": 0.02, "decoupled": True},
    }
    optimizer = MFAC(small_model, base, 4, 1e-2, "count", dtype=torch.float64, **how[decay])
    train(small_model, optimizer, small_batch, 7)
    for _ in range(7):
        theta = torch.cat([p.detach().flatten() for p in weights])
        gradient = gradient_of(other, small_batch)
        rows.append(gradient + 0.02 * theta if decay == "in the ring" else gradient)
        there = torch.stack(rows[-4:])
        fisher = 1e-2 * torch.eye(len(theta), dtype=torch.float64) + there.T @ there / len(there)
        u = torch.linalg.solve(fisher, rows[-1])
        velocity = momentum * velocity + u + (0.02 * theta if decay == "the base's" else 0)
        theta = (theta * 0.98 if decay == "decoupled" else theta) - 0.1 * velocity
        with torch.no_grad():
            for parameter, piece in zip(weights, theta.split([p.numel() for p in weights]), strict=True):
                parameter.copy_(piece.view(parameter.shape))
    close(small_model, other, 1e-9)


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("before", [0, 3, 6, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resuming_is_bit_for_bit_wherever_the_ring_is(kind, dtype, before, small_model, small_batch):
    before = before * 7 if kind == "m-fac of many" else before
    optimizer = OPTIMIZERS[kind](small_model, sgd(small_model, momentum=0.9), dtype=dtype)
    train(small_model, optimizer, small_batch, before)
    other = copy.deepcopy(small_model)
    twin = OPTIMIZERS[kind](other, sgd(other, momentum=0.9), dtype=dtype)
    train(copy.deepcopy(other), twin, small_batch, 2)  # it has been elsewhere
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    train(small_model, optimizer, small_batch, 9)
    train(other, twin, small_batch, 9)
    assert equal(small_model, other)
    assert twin.window.count == before + 9


@pytest.mark.parametrize("piece", ["rows", "error", "gram", "count"])
def test_every_piece_of_the_ring_matters(piece, small_model, small_batch):
    """Each forgotten alone ends elsewhere, so the test of resuming can see it."""
    optimizer = OPTIMIZERS["s-m-fac"](small_model, sgd(small_model))
    train(small_model, optimizer, small_batch, 9)
    other, forgetful = copy.deepcopy((small_model, optimizer))
    forget = {
        "rows": lambda w: w.rows.parts[1].mul_(1.01),
        "error": lambda w: w.rows.carried[0].zero_(),
        "gram": lambda w: w.gram.mul_(1.01),
        "count": lambda w: setattr(w, "count", w.count + 1),
    }
    forget[piece](forgetful.window)
    train(small_model, optimizer, small_batch, 3)
    train(other, forgetful, small_batch, 3)
    assert not equal(small_model, other)


def test_a_factor_of_other_rows_is_not_used_after_loading(small_model, small_batch):
    """Both rings are full and stand at the same place; what is kept from step to step is of the rows before."""
    optimizer = OPTIMIZERS["m-fac of many"](small_model, sgd(small_model))
    train(small_model, optimizer, small_batch, 44)
    other = copy.deepcopy(small_model)
    twin = OPTIMIZERS["m-fac of many"](other, sgd(other))
    train(other, twin, (small_batch[0].flip(0), small_batch[1]), 45)
    other.load_state_dict(small_model.state_dict())
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    train(small_model, optimizer, small_batch, 2)
    train(other, twin, small_batch, 2)
    assert equal(small_model, other)


def test_a_checkpoint_of_a_ring_that_fills_holds_what_there_is(small_model, small_batch):
    optimizer = MFAC(small_model, sgd(small_model), 1000)
    train(small_model, optimizer, small_batch, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    count = sum(p.numel() for p in small_model.parameters())
    assert len(file.getvalue()) < 4 * 3 * count + 20_000 < 4 * 1000 * count


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradients_may_be_accumulated_and_need_no_closure(kind, small_batch):
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    other, third = copy.deepcopy(one), copy.deepcopy(one)
    whole, parts, inside = (OPTIMIZERS[kind](m, sgd(m)) for m in (one, other, third))
    train(one, whole, small_batch, 5)

    def accumulate(model, optimizer):
        optimizer.zero_grad()
        for x, y in zip(small_batch[0].chunk(4), small_batch[1].chunk(4), strict=True):
            loss = F.cross_entropy(model(x), y) / 4
            loss.backward()
        return loss.detach()

    for _ in range(5):
        accumulate(other, parts)
        assert parts.step() is None
        assert inside.step(lambda: accumulate(third, inside)) > 0
    close(one, other, 1e-7)
    assert equal(other, third)


def test_clipping_before_the_ring_and_after_it(small_model, small_batch):
    """A hook on the optimizer clips what enters, a hook on its base what it makes of that."""
    optimizer = MFAC(small_model, base := sgd(small_model), 4, 1e-2, dtype=torch.float64)
    parameters, entered, stepped = list(small_model.parameters()), [], []

    def norm():
        return float(torch.cat([p.grad.flatten() for p in parameters]).norm())

    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(parameters, 0.01) and None)
    base.register_step_pre_hook(lambda *_: stepped.append(norm()))
    for _ in range(3):
        gradient_of(small_model, small_batch)
        optimizer.step()
        entered.append(float(optimizer.window.rows.matrix(len(entered) + 1)[-1].norm()))
    assert entered == pytest.approx([0.01] * 3, rel=1e-3)
    assert min(stepped) > 0.01
    base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(parameters, 0.005) and None)
    base.register_step_pre_hook(lambda *_: stepped.append(norm()))
    gradient_of(small_model, small_batch)
    optimizer.step()
    assert stepped[-1] == pytest.approx(0.005, rel=1e-3)


@pytest.mark.parametrize("through", ["the scaler", "the step"])
@pytest.mark.parametrize("kind", ["m-fac", "s-m-fac"])
def test_a_scaler_gives_the_ring_true_and_finite_gradients(kind, through, small_model, small_batch):
    model, plain = small_model.float(), copy.deepcopy(small_model).float()
    batch = small_batch[0].float(), small_batch[1]
    optimizer = OPTIMIZERS[kind](model, sgd(model), decay=0.01, decoupled=True)
    other = OPTIMIZERS[kind](plain, sgd(plain), decay=0.01, decoupled=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(6):
        before = copy.deepcopy(model.state_dict())

        def closure(step=step):
            optimizer.zero_grad()
            loss = scaler.scale(F.cross_entropy(model(batch[0]), batch[1]))
            (loss * math.inf if step == 2 else loss).backward()
            return loss.detach()

        if through == "the scaler":
            closure()
            scaler.step(optimizer)
        else:
            optimizer.step(closure, scaler=scaler)
        scaler.update()
        if step == 2:
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            assert optimizer.window.count == 2
    plain(batch[0])  # the running statistics of the step that was skipped
    train(plain, other, batch, 5)
    close(model, plain, 1e-6)


def test_groups_have_their_own_rate_and_decay_and_one_ring(small_model, small_batch):
    other = copy.deepcopy(small_model)
    groups = [{"params": list(small_model[0].parameters()), "lr": 0.0, "decay": 0.5}]
    groups.append({"params": [*small_model[1].parameters(), *small_model[3].parameters()]})
    optimizer = MFAC(small_model, torch.optim.SGD(groups, lr=0.1), 4, 1e-2, dtype=torch.float64)
    weights = small_model[0].weight.clone()
    gradient_of(small_model, small_batch)
    entering = small_model[0].weight.grad + 0.5 * weights, small_model[3].weight.grad.clone()
    optimizer.step()
    rows = optimizer.window.rows.matrix(1)[0]
    torch.testing.assert_close(rows[:96].view(12, 8), entering[0])
    torch.testing.assert_close(rows[-52:-4].view(4, 12), entering[1])
    assert torch.equal(small_model[0].weight, weights)
    assert not torch.equal(small_model[3].weight, other[3].weight)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_frozen_stays_and_what_thaws_joins(kind, small_batch):
    """Frozen from the start: as if it were not there. Thawed: columns are added. Frozen again: it does not move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    other = copy.deepcopy(model)
    optimizer = OPTIMIZERS[kind](model, sgd(model))
    alone = OPTIMIZERS[kind](other, torch.optim.SGD(other[2].parameters(), lr=0.1))
    model[0].requires_grad_(False)
    other[0].requires_grad_(False)
    train(model, optimizer, small_batch, 4)
    train(other, alone, small_batch, 4)
    assert equal(model, other)
    assert optimizer.window.rows.columns == 52
    model[0].requires_grad_(True)
    before = model[0].weight.clone()
    gram = optimizer.window.gram[:4, :4].clone()
    train(model, optimizer, small_batch, 1)
    assert torch.equal(optimizer.window.gram[:4, :4], gram)  # the rows that were there are as they were
    assert optimizer.window.rows.columns == 52 + 108
    assert not torch.equal(model[0].weight, before)
    train(model, optimizer, small_batch, 2)
    model[0].requires_grad_(False)
    weights = model[0].weight.clone()
    rows = optimizer.window.rows
    slices = [where for where, shape in zip(rows._slices(), rows.shapes, strict=True) if shape in ((12, 8), (12,))]
    waits = [rows.carried[0][where].clone() for where in slices] if rows.carried else []
    warm = [start.clone() for start in rows.carried[1:]]
    train(model, optimizer, small_batch, 2)
    assert torch.equal(model[0].weight, weights)
    assert [torch.equal(*pair) for pair in zip(rows.carried[1:], warm, strict=True)] == [False, True][: len(warm)]
    newest = rows.matrix(6)[8 % 6]
    for where in slices:
        assert not newest[where].any()
    assert all(torch.equal(rows.carried[0][where], value) for where, value in zip(slices, waits, strict=bool(waits)))
    twin = OPTIMIZERS[kind](copied := copy.deepcopy(model), sgd(copied))
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    for each, own in ((model, optimizer), (copied, twin)):
        each[0].requires_grad_(True)
        train(each, own, small_batch, 3)
    assert equal(model, copied)


def test_a_sparse_gradient_enters_whole():
    torch.manual_seed(0)
    results = []
    for sparse in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 2))
        optimizer = MFAC(model, sgd(model), 4, 1e-2)
        train(model, optimizer, (torch.tensor([[1, 2], [2, 5]]), torch.tensor([0, 1])), 3)
        results.append(model)
    close(*results, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision(dtype, small_batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)
    optimizer = MFAC(model, sgd(model, 0.01), 4, 1e-2, decay=0.01)
    batch = small_batch[0].to(dtype), small_batch[1]
    gradient = gradient_of(model, batch).float()
    entering = gradient + 0.01 * torch.cat([p.detach().float().flatten() for p in model.parameters()])
    optimizer.step()
    torch.testing.assert_close(optimizer.window.rows.parts[0][0], entering, rtol=1e-6, atol=1e-8)
    assert all(p.dtype is dtype and p.isfinite().all() for p in model.parameters())


WRAPPERS = {
    "sam": lambda m, b: cb.optim.SAM(m, b, 0.1),
    "momentum-sam": lambda m, b: cb.optim.MomentumSAM(m, b),
    "cram+": lambda m, b: cb.optim.CrAM(m, b, [Magnitude(0.3), Magnitude(0.7)], seed=3),
    "cram-single": lambda m, b: cb.optim.CrAMSingle(m, b, [Magnitude(0.5)], seed=3),
    "held": lambda m, b: cb.optim.HeldMasks(m, b, cb.compress.apply_(m, Magnitude(0.5))),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_as_the_base_of_another(wrapper, kind, small_model, small_batch):
    """What enters the ring is the gradient that the wrapper gives any base, and it resumes bit for bit."""
    plain = copy.deepcopy(small_model)
    usual = WRAPPERS[wrapper](plain, sgd(plain, momentum=0.9))
    train(plain, usual, small_batch, 1)
    given = torch.cat([p.grad.flatten() for p in plain.parameters()])
    optimizer = WRAPPERS[wrapper](small_model, OPTIMIZERS[kind](small_model, sgd(small_model, momentum=0.9)))
    window, pushed = optimizer.base.window, []
    push = window.push
    window.push = lambda gradient, absent: pushed.append(gradient) or push(gradient, absent)
    train(small_model, optimizer, small_batch, 1)
    torch.testing.assert_close(pushed[0].double(), given, rtol=0, atol=1e-6)
    del window.push
    train(small_model, optimizer, small_batch, 7)
    other = copy.deepcopy(small_model)
    twin = WRAPPERS[wrapper](other, OPTIMIZERS[kind](other, sgd(other, momentum=0.9)))
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    train(small_model, optimizer, small_batch, 4)
    train(other, twin, small_batch, 4)
    assert equal(small_model, other)
    assert twin.base.window.count == 12


def test_under_a_scaler_as_the_base_of_sam(small_model, small_batch):
    model, plain = small_model.float(), copy.deepcopy(small_model).float()
    batch = small_batch[0].float(), small_batch[1]
    optimizer, other = (cb.optim.SAM(m, MFAC(m, sgd(m), 4, 1e-2), 0.1) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(4):

        def closure():
            optimizer.zero_grad()
            loss = scaler.scale(F.cross_entropy(model(batch[0]), batch[1]))
            loss.backward()
            return loss.detach()

        optimizer.step(closure, scaler=scaler)
        scaler.update()
    train(plain, other, batch, 4)
    close(model, plain, 1e-6)


# Memory, and what is refused


def test_memory_is_a_thirtieth_of_dense():
    """ResNet-20, m 1024, κ 1 %: places and values, the error and the Gram matrix, without building anything."""
    shapes = [p.shape for p in cb.models.create("resnet20", num_classes=10).parameters()]
    count = sum(map(math.prod, shapes))
    dense = Window(Dense(), Inverse(1e-4), 1024).needed(shapes)
    sparse = Window(TopK(0.01), Inverse(1e-4), 1024).needed(shapes)
    kept = round(0.01 * count)
    assert dense == 4 * 1024 * count + 8 * 1024**2
    assert sparse == 1024 * kept * 8 + 4 * count + 8 * 1024**2
    assert sparse <= dense / 30
    assert Window(TopK(0.01), Inverse(1e-4), 1024, torch.bfloat16).needed(shapes) == sparse - 2 * 1024 * kept
    assert Window(LowRank(4), Inverse(1e-4), 1024).needed(shapes) < dense / 8


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_needed_is_what_is_taken(kind, small_model, small_batch):
    optimizer = OPTIMIZERS[kind](small_model, sgd(small_model))
    train(small_model, optimizer, small_batch, 2)
    assert optimizer.nbytes == optimizer.window.needed([p.shape for p in small_model.parameters()])


def test_a_checkpoint_of_a_gigabyte_says_so(small_model, small_batch, monkeypatch):
    assert preconditioned.LARGE == 10**9
    monkeypatch.setattr(preconditioned, "LARGE", 4000)
    optimizer = MFAC(small_model, sgd(small_model), 6)
    train(small_model, optimizer, small_batch, 6)
    with pytest.warns(UserWarning, match=r"MFAC holds 0\.00 GB of gradients: dtype=torch\.bfloat16 halves it.*TopK"):
        optimizer.state_dict()
    half = MFAC(small_model, sgd(small_model), 60, dtype=torch.bfloat16)
    train(small_model, half, small_batch, 60)
    with pytest.warns(UserWarning, match=r"of gradients: fewer gradients or EFCP"):
        half.state_dict()
    small = EFCP(small_model, sgd(small_model), TopK(0.01), gradients=6)
    train(small_model, small, small_batch, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.state_dict()


def state_of(optimizer):
    window = optimizer.window
    weights = [p.detach().clone() for p in optimizer.model.parameters()]
    return copy.deepcopy((window.count, window.gram, window.rows.parts, window.rows.carried, weights))


def same(one, other):
    tensors = [[torch.tensor(s[0]), s[1], *s[2], *s[3], *s[4]] for s in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_moves(kind, value, small_model, small_batch):
    optimizer = OPTIMIZERS[kind](small_model, sgd(small_model), decay=0.1, decoupled=True)
    train(small_model, optimizer, small_batch, 8)
    before, twin = state_of(optimizer), copy.deepcopy((small_model, optimizer))
    gradient_of(small_model, small_batch)
    small_model[3].bias.grad[1] = value
    with pytest.raises(NaNError, match=r"gradient of a parameter of shape \(4,\) is not finite"):
        optimizer.step()
    assert same(state_of(optimizer), before)
    small_model.load_state_dict(twin[0].state_dict())
    train(small_model, optimizer, small_batch, 5)
    train(twin[0], twin[1], small_batch, 5)
    assert equal(small_model, twin[0])


def test_a_damping_that_is_lost_is_refused_and_nothing_moves(small_model, small_batch, monkeypatch):
    with pytest.raises(
        ValueError, match="damping 0.001 is lost in rounding beside gradients of norm 1.0e\\+00; raise it"
    ):
        Inverse(1e-3).coefficients(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), 1, 2)
    optimizer = OPTIMIZERS["s-m-fac"](small_model, sgd(small_model, 0.0))
    for steps in (2, 6):  # while the ring fills, and when a row is replaced
        train(small_model, optimizer, small_batch, steps)
        before, twin = state_of(optimizer), copy.deepcopy((small_model, optimizer))
        gradient_of(small_model, small_batch)
        with monkeypatch.context() as patched:
            patched.setattr(torch.linalg, "cholesky_ex", lambda a: (a, torch.tensor(1)))
            with pytest.raises(ValueError, match="raise it"):
                optimizer.step()
        assert same(state_of(optimizer), before)
        small_model.load_state_dict(twin[0].state_dict())  # running statistics
        train(small_model, optimizer, small_batch, 3)
        train(twin[0], twin[1], small_batch, 3)
        assert equal(small_model, twin[0])


def test_a_checkpoint_of_another_ring_is_refused_and_nothing_changes(small_model, small_batch):
    optimizer = OPTIMIZERS["s-m-fac"](small_model, sgd(small_model, momentum=0.9))
    train(small_model, optimizer, small_batch, 8)
    before = state_of(optimizer)
    wide = nn.Sequential(nn.Linear(8, 13), nn.BatchNorm1d(13), nn.Tanh(), nn.Linear(13, 4)).double()
    others = {
        "saved by MFAC": MFAC(small_model, sgd(small_model), 6),
        r"ring TopK\(density=0.1.* of 6 gradients": EFCP(small_model, sgd(small_model), TopK(0.1), gradients=6),
        r"LowRank\(rank=1": EFCP(small_model, sgd(small_model), LowRank(1), gradients=6),
        "of 7 gradients": EFCP(small_model, sgd(small_model), TopK(0.2), gradients=7),
        "bfloat16": EFCP(small_model, sgd(small_model), TopK(0.2), gradients=6, dtype=torch.bfloat16),
        "of spectrum 'ggt', and this optimizer has 'mfac'": EFCP(small_model, sgd(small_model), TopK(0.2), "ggt", 6),
        "other shapes": EFCP(wide, sgd(wide), TopK(0.2), gradients=6),
    }
    for message, other in others.items():
        train(other.model, other, small_batch, 2)
        before = state_of(optimizer)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(through_a_file(other.state_dict()))
        assert same(state_of(optimizer), before)
    before = state_of(optimizer)
    for piece in ("method", "columns", "kept", "count", "parts", "carried", "gram"):
        torn = through_a_file(optimizer.state_dict())
        del torn["param_groups"][0]["preconditioner"][piece]
        with pytest.raises(ValueError, match=f"not whole: its entry 'preconditioner' has no '{piece}'"):
            optimizer.load_state_dict(torn)
    torn = through_a_file(optimizer.state_dict())
    torn["param_groups"][0]["preconditioner"]["gram"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="other shapes"):
        optimizer.load_state_dict(torn)
    with pytest.raises(TypeError, match="must be what state_dict\\(\\) returned, not None"):
        optimizer.load_state_dict(None)
    assert same(state_of(optimizer), before)
    with pytest.raises(ValueError, match=r"no entry 'preconditioner'.*optimizer\.base\.load_state_dict"):
        optimizer.load_state_dict(sgd(small_model).state_dict())


def test_a_checkpoint_that_the_base_refuses_leaves_the_ring_as_it_was(small_model, small_batch):
    optimizer = OPTIMIZERS["s-m-fac"](small_model, sgd(small_model, momentum=0.9))
    train(small_model, optimizer, small_batch, 3)
    state = through_a_file(optimizer.state_dict())
    state["param_groups"].append({key: value for key, value in state["param_groups"][0].items()})
    train(small_model, optimizer, small_batch, 2)
    before = state_of(optimizer)
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(state)
    assert same(state_of(optimizer), before)


def test_the_step_by_which_torch_prepares_a_state_enters_no_ring(small_model):
    """At learning rate 0, with gradients of 0: as `torch.distributed.checkpoint` does."""
    optimizer = MFAC(small_model, sgd(small_model, 0.0), 6)
    for parameter in small_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    cb.optim.SAM(small_model, optimizer).step()
    assert optimizer.window.count == 0
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert optimizer.window.count == 1


def test_a_group_that_is_added_has_its_decay_checked(small_model, small_batch):
    optimizer = MFAC(small_model, torch.optim.SGD(small_model[0].parameters(), lr=0.1), 6, decay=0.1, decoupled=True)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], not 1\.5"):
        optimizer.add_param_group({"params": list(small_model[3].parameters()), "decay": 1.5})
    assert len(optimizer.param_groups) == 1
    optimizer.base.add_param_group({"params": list(small_model[3].parameters()), "decay": -1.0})
    gradient_of(small_model, small_batch)
    with pytest.raises(ValueError, match="decay must be .* not -1"):
        optimizer.step()
    assert optimizer.window.count == 0


def test_what_is_not_said_is_as_the_papers_have_it(small_model):
    base = sgd(small_model)
    found = {}
    for optimizer in (MFAC(small_model, base), GGT(small_model, base), EFCP(small_model, base)):
        window = optimizer.window
        how = getattr(window.spectrum, "divisor", "root")
        found[type(optimizer).__name__] = (window.ring, window.gradients, window.spectrum.damping, how, window.dtype)
        assert (optimizer.settings, optimizer.decoupled) == ({"decay": 0.0}, False)
    assert found == {
        "MFAC": (Dense(), 1024, 1e-5, "window", torch.float32),
        "GGT": (Dense(), 100, 1e-5, "root", torch.float32),
        "EFCP": (TopK(0.01, 0, True), 1024, 1e-4, "window", torch.float32),
    }
    assert LowRank() == LowRank(4, feedback=True)
    root = EFCP(small_model, base, LowRank(2), "ggt", 9, 0.5).window
    assert (type(root.spectrum), root.spectrum.damping, root.gradients) == (Root, 0.5, 9)


def test_a_ring_that_does_not_fit_into_memory_is_refused(small_model, small_batch):
    optimizer = MFAC(small_model, sgd(small_model), 10**9)
    weights = copy.deepcopy(small_model.state_dict())
    gradient_of(small_model, small_batch)
    with pytest.raises(ValueError, match=r"1000000000 gradients in a ring Dense\(\) need .* GB, and this machine has"):
        optimizer.step()
    assert all(torch.equal(p, weights[name]) for name, p in small_model.named_parameters())


def test_none_is_built_over_a_wrapper(small_model):
    base = sgd(small_model)
    for inner in (cb.optim.SAM(small_model, base), MFAC(small_model, base)):
        with pytest.raises(
            TypeError, match=f"MFAC is built over a plain torch optimizer, not over {type(inner).__name__}"
        ):
            MFAC(small_model, inner)
    with pytest.raises(TypeError, match="SAM is built over a plain torch optimizer, not over SAM"):
        cb.optim.SAM(small_model, cb.optim.SAM(small_model, base))


@pytest.mark.parametrize("divisor", ["window", "count"])
def test_the_factor_that_is_kept_is_that_of_the_rows(divisor, monkeypatch):
    """A step that keeps it equals one that does not; it is made anew once a block, not once a step."""
    rows, kept, anew = stream(3 * 70), Inverse(1e-4, divisor), []
    window, other = window_of(Dense(), kept, 70), window_of(Dense(), Inverse(1e-4, divisor), 70)
    factor = Inverse._factor
    for step, gradient in enumerate(rows):
        other.spectrum.forget()
        truth = other.push(gradient)
        monkeypatch.setattr(
            Inverse, "_factor", lambda self, gram, shift: anew.append(len(gram)) or factor(self, gram, shift)
        )
        torch.testing.assert_close(window.push(gradient), truth, rtol=0, atol=0)
        monkeypatch.setattr(Inverse, "_factor", factor)
        if step == 70:
            anew.clear()
    assert [n for n in anew if n > spectra.BLOCK] == [38, 64, 38, 38, 64]
