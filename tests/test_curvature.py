"""Gradients, Fisher blocks, the kernels of Optimal Brain Surgeon and M-FAC's form, against explicit float64 algebra."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import cram_bench as cb
from cram_bench.compress import prunable
from cram_bench.curvature import Gram, Layout, chunks, gradients, joint, obs, removal, singles
from cram_bench.curvature.fisher import Fisher, fisher, groups
from cram_bench.curvature.layout import pieces

FEW = settings(max_examples=30, deadline=None)


def close(ours, theirs, relative):
    """Compare relative to the largest entry."""
    torch.testing.assert_close(
        ours.double(), theirs.double(), rtol=0, atol=relative * float(theirs.abs().max()) + 1e-14, check_dtype=False
    )


def small(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    model[1].running_mean.normal_()
    return model.to(dtype)


def examples(count=12, size=2, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 4, 4, generator=draw, dtype=dtype), torch.randint(4, (size,), generator=draw))
        for _ in range(count)
    ]


def by_hand(model, batches):
    """The gradients of the mean losses in eval mode, each by an ordinary backward pass."""
    rows = []
    for x, y in batches:
        model.eval().zero_grad()
        F.cross_entropy(model(x), y).backward()
        rows.append({name: weight.grad.clone() for name, weight in prunable(model).items()})
    model.zero_grad()
    return rows


def definite(rows, width, seed=0, condition=1e-2):
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(rows, width, width, generator=draw, dtype=torch.float64)
    weights = torch.randn(rows, width, generator=draw, dtype=torch.float64)
    return root @ root.mT / width + condition * torch.eye(width, dtype=torch.float64), weights


def increase(matrix, weights, values):
    change = values - weights
    return float(change @ matrix @ change / 2)


def least(matrix, weights, gone):
    """Minimise ½ δᵀFδ under δ_S = −w_S by its optimality conditions with multipliers."""
    width, rows = len(weights), torch.eye(len(weights), dtype=torch.float64)[gone]
    system = torch.zeros(width + len(rows), width + len(rows), dtype=torch.float64)
    system[:width, :width], system[:width, width:], system[width:, :width] = matrix, rows.T, rows
    right = torch.cat([torch.zeros(width, dtype=torch.float64), -weights[gone]])
    return weights + torch.linalg.solve(system, right)[:width]


# ---------------------------------------------------------------- layouts and examples

shapes = st.dictionaries(
    st.sampled_from("abcdef"), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1
)


@FEW
@given(shapes, st.integers(0, 9), st.integers(1, 200))
def test_packing_round_trips_and_groups_are_whole_tensors(shapes, size, most):
    layout = Layout(shapes, size)
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    packed = layout.pack(tensors, fill=7.0)
    assert packed.shape == (layout.rows, layout.width) == layout.real().shape
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in layout.unpack(packed).items())
    assert int(layout.real().sum()) == sum(tensor.numel() for tensor in tensors.values())
    assert bool((packed[~layout.real()] == 7.0).all())
    if size:
        names = [name for name, count in layout.blocks.items() for _ in range(count)]
        assert [layout.name_of(row) for row in range(layout.rows)] == names
    parts = layout.groups(most)
    assert [name for part in parts for name in part.shapes] == list(shapes)
    for part in parts if size else ():
        assert len(part.shapes) == 1 or sum(part.counts.values()) <= most
    cut = pieces(layout.rows, layout.width, most)
    assert [row for rows in cut for row in range(rows.start, rows.stop)] == list(range(layout.rows))


def images(count):
    x = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 2, 2).contiguous()
    return cb.data.Images("own", x, torch.arange(count) % 3, ("a", "b", "c"), torch.zeros(1), torch.ones(1))


def test_chunks_of_a_data_set_are_a_draw_without_replacement():
    data = images(23)
    found = chunks(data, 5, 4, seed=3)
    assert [len(labels) for _, labels in found] == [4] * 5
    seen = torch.cat([255 * x[:, 0, 0, 0] for x, _ in found]).round().int().tolist()
    assert len(set(seen)) == 20
    assert seen != sorted(seen)
    for x, y in found:
        assert torch.equal(y, (255 * x[:, 0, 0, 0]).round().long() % 3)
    again, other = chunks(data, 5, 4, seed=3), chunks(data, 5, 4, seed=4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(found, other, strict=True))
    some, others = (
        {float(x) for batch, _ in chunks(data, 2, 4, seed=seed) for x in batch[:, 0, 0, 0]} for seed in (3, 4)
    )
    assert some != others  # not the same in another order
    assert len(chunks(data, 23, 1)) == 23


def uneven(inputs, labels, cuts):
    edges = [0, *cuts, len(labels)]
    return [(rows(inputs, slice(a, b)), labels[a:b]) for a, b in itertools.pairwise(edges)]


def rows(inputs, index):
    return cb.outputs.rows_of(inputs, index)


KINDS = {
    "tensor": lambda x: x,
    "mapping": lambda x: {"ids": x, "more": (x + 1, x + 2)},
    "tuple": lambda x: (x, [x * 2]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(), (3, 5), (1, 2, 3, 11)])
def test_uneven_batches_are_cut_anew(kind, cuts):
    x = torch.arange(12.0)[:, None]
    found = chunks(uneven(KINDS[kind](x), torch.arange(12), cuts), 4, 3)
    assert [labels.tolist() for _, labels in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    for inputs, labels in found:
        expected = KINDS[kind](labels[:, None].float())
        ours, theirs = (list(cb.outputs.tensors_of(value)) for value in (inputs, expected))
        assert type(inputs) is type(expected)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_loader_is_read_no_further_than_needed():
    loader = DataLoader(TensorDataset(torch.arange(20.0)[:, None], torch.arange(20)), batch_size=7)
    assert [labels.tolist() for _, labels in chunks(loader, 2, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def endless():
        yield torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)
        raise AssertionError("read on")

    class Data:
        def __iter__(self):
            return endless()

    assert len(chunks(Data(), 2, 2)) == 2


@pytest.mark.parametrize("data", [images(11), [(torch.zeros(11, 1), torch.zeros(11, dtype=torch.long))]])
def test_too_few_examples_are_one_line(data):
    line = r"gradients=3, of 4 examples each, needs 12 .*, and there are 11: give more, or ask for fewer: gradients=2$"
    with pytest.raises(ValueError, match=line):
        chunks(data, 3, 4)
    with pytest.raises(ValueError, match=r"^samples=12 needs 12 examples, and there are 11: .* fewer: samples=11$"):
        chunks(data, 3, 4, setting=("samples", 1))
    with pytest.raises(ValueError, match=r"there are 11: give more$"):
        chunks(data, 3, 12)


# ---------------------------------------------------------------- gradients


def test_gradients_are_those_of_a_backward_pass_in_eval_mode():
    model, batches = small(), examples()
    weights = prunable(model)
    expected = by_hand(model, batches)
    model.train()
    for ours, theirs in zip(gradients(model, weights, batches), expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in weights)


def test_batches_of_one_give_per_sample_gradients():
    model = small().eval()
    ((x, y),) = examples(1, 5)
    weights = prunable(model)
    rest = {name: p.detach() for name, p in model.named_parameters() if name not in weights} | dict(
        model.named_buffers()
    )

    def one(own, x, y):
        return F.cross_entropy(torch.func.functional_call(model, (own, rest), (x[None],)), y[None])

    own = {name: weight.detach() for name, weight in weights.items()}
    each = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(own, x, y)
    for index, ours in enumerate(gradients(model, weights, chunks([(x, y)], 5, 1))):
        for name in weights:
            close(ours[name], each[name][index], 1e-12)


@pytest.mark.parametrize("end", ["all", "some", "error", "no_grad"])
def test_the_model_is_left_as_it_was(end):
    model, batches = small(), examples()
    model.train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.full_like(model[4].weight, 2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if end == "error":
        batches[3][0][0] = torch.nan
        with pytest.raises(ValueError, match=r"the gradient of 0.weight at batch 4 is not finite: .*, nan, "):
            list(gradients(model, prunable(model), batches))
    elif end == "some":
        stream = gradients(model, prunable(model), batches)
        next(stream)
        stream.close()
    else:
        with torch.set_grad_enabled(end == "all"):
            for _ in gradients(model, prunable(model), batches):
                assert torch.is_grad_enabled() == (end == "all")  # the mode does not leak to whoever takes them
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, True, True, False, True]
    assert not model[0].weight.requires_grad
    assert model[0].weight.grad is None
    assert bool((model[4].weight.grad == 2).all())
    assert model[1].num_batches_tracked == 0


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_buffers_that_change_in_eval_mode_too_are_put_back():
    model = Counting()
    assert len(list(gradients(model, prunable(model), [(torch.ones(2, 3), torch.tensor([0, 1]))] * 3))) == 3
    assert model.calls == 0


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("model", "options", "line"),
    [
        (Detached(3, 2), {}, "the loss has no gradient: .* no_grad"),
        (nn.Linear(3, 2), {"loss": lambda outputs, targets: 1.0}, "loss must return one number, .* not 1.0"),
        (
            nn.Linear(3, 2),
            {"loss": lambda outputs, targets: outputs},
            r"loss must return one number, .* shape \(2, 2\)",
        ),
        (nn.Linear(3, 1), {}, "labels must be from 0 to 0"),
        (nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (2, 1))), {}, r"logits of shape \(n, classes\)"),
    ],
)
def test_a_loss_that_is_none_is_one_line(model, options, line):
    batch = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=line) as caught:
        list(gradients(model, prunable(model), batch, **options))
    assert "\n" not in str(caught.value)


def test_own_forward_and_loss_are_used_and_an_unused_weight_has_gradient_zero():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    (found,) = gradients(
        model, prunable(model), [(x, y)], lambda m, x: m["used"](x), lambda out, y: ((out[:, 0] - y) ** 2).mean()
    )
    residual = (model["used"](x)[:, 0] - y).detach()
    close(found["used.weight"][0], 2 * (residual[:, None] * x).mean(0), 1e-12)
    assert not found["idle.weight"].any()


# ---------------------------------------------------------------- Fisher blocks


def loop(layout, grads):
    """(1/m) Σ g gᵀ of every block, a gradient and a block at a time."""
    total = torch.zeros(layout.rows, layout.width, layout.width, dtype=torch.float64)
    for gradient in grads:
        for row, g in enumerate(layout.pack(gradient).double()):
            total[row] += torch.outer(g, g)
    return total / len(grads)


@pytest.mark.parametrize("size", [1, 5, 8, 100])
@pytest.mark.parametrize("memory", [2 << 30, 1])
def test_every_block_is_the_mean_of_outer_products(size, memory):
    model, batches = small(), examples(70)  # more than are multiplied at once
    weights = prunable(model)
    layout = Layout.of(weights, size)
    expected = loop(layout, by_hand(model, batches))
    ours = fisher(model, weights, batches, layout, memory=memory)
    close(ours.blocks, expected, 1e-6)
    close(ours.diagonal, expected.diagonal(dim1=1, dim2=2), 1e-6)
    assert ours.count == 70
    every = slice(0, layout.rows)
    close(ours.damped(every, 0.5), expected + 0.5 * torch.eye(size), 1e-6)
    assert fisher(model, weights, batches, layout, blocks=False).blocks is None
    assert torch.equal(fisher(model, weights, batches, layout, blocks=False).diagonal, ours.diagonal) or memory == 1


def test_several_groups_give_what_one_gives():
    model, batches = small(), examples()
    weights = prunable(model)
    layout = Layout.of(weights, 4)
    assert len(groups(layout)) == 1
    parts = groups(layout, 8 * 12 * 74)  # of 75 entries, each with its row of a block, in float64, and eight more
    assert len(parts) == 2
    assert len(groups(layout, 8 * 12 * 75)) == 1
    parts = groups(layout, 8 * 12 * 30)
    assert [list(part.shapes) for part in parts] == [["0.weight"], ["4.weight"]]
    whole = fisher(model, weights, batches, layout).blocks
    found = [fisher(model, weights, batches, part, memory=8 * 12 * 30).blocks for part in parts]
    close(torch.cat(found), whole, 1e-6)


def test_what_is_gone_has_gradient_zero():
    model, batches = small(), examples()
    weights = prunable(model)
    gone = {"4.weight": torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.5}
    layout = Layout.of(weights, 6)
    rows = [
        {n: g.masked_fill(gone[n], 0) if n in gone else g for n, g in row.items()} for row in by_hand(model, batches)
    ]
    close(fisher(model, weights, batches, layout, gone=gone).blocks, loop(layout, rows), 1e-6)


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, batches = small(), examples(9)  # an odd number: shares of five and four
    weights = prunable(model)
    found = fisher(DistributedDataParallel(model), weights, batches, Layout.of(weights, 8))
    batches[0][0][0] = torch.nan  # the first process alone sees it
    try:
        fisher(model, weights, batches, Layout.of(weights, 8))
        line = ""
    except ValueError as error:
        line = str(error)
    torch.save((found.blocks, found.diagonal, found.count, line), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds_and_fail_together(tmp_path):
    torch.multiprocessing.spawn(work, (os.fspath(tmp_path),), nprocs=2)
    model, batches = small(), examples(9)
    weights = prunable(model)
    alone = fisher(model, weights, batches, Layout.of(weights, 8))
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for blocks, diagonal, count, _ in both:
        close(blocks, alone.blocks, 1e-6)
        close(diagonal, alone.diagonal, 1e-6)
        assert count == 9
    assert torch.equal(both[0][0], both[1][0])
    assert "at batch 1 is not finite" in both[0][3]
    assert "another process" in both[1][3]


# ---------------------------------------------------------------- the kernels


def test_inverse_and_the_row_that_has_none():
    matrices, _ = definite(4, 6)
    close(obs.inverse(matrices) @ matrices, torch.eye(6).expand(4, 6, 6), 1e-9)
    matrices[2] -= 10 * torch.eye(6)
    with pytest.raises(obs.NotDefinite) as caught:
        obs.inverse(matrices)
    assert caught.value.row == 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_saliency_is_the_least_increase_there_is(size):
    matrices, weights = definite(5, 8)
    inverses = obs.inverse(matrices)
    found = singles(inverses, weights) if size == 1 else obs.group_saliency(inverses, weights, size)
    assert found.shape == (5, 8 // size)
    for row in range(5):
        for group in range(8 // size):
            gone = torch.zeros(8, dtype=torch.bool)
            gone[group * size : (group + 1) * size] = True
            best = least(matrices[row], weights[row], gone)
            assert float(found[row, group]) == pytest.approx(increase(matrices[row], weights[row], best), rel=1e-7)


def one_by_one(matrix, weights, present):
    """Remove greedily with a new inverse of what is left at every step: (index, increment, weights after it)."""
    left = [i for i in range(len(weights)) if present[i]]
    values, before = weights.clone(), 0.0
    gone = torch.zeros(len(weights), dtype=torch.bool)
    while left:
        trials = []
        for index in left:
            trial = gone.clone()
            trial[index] = True
            after = least(matrix, weights, trial)
            trials.append((increase(matrix, weights, after), index, after))
        total, index, values = min(trials, key=lambda trial: trial[0])
        gone[index] = True
        left.remove(index)
        yield index, total - before, values, gone.clone()
        before = total


def test_removal_one_by_one_at_every_count():
    matrices, weights = definite(6, 9, condition=1e-3)
    present = torch.ones(6, 9, dtype=torch.bool)
    present[3, 7:], present[4] = False, False
    for row in (3, 4):  # what is no weight stands apart, as the filling of a block does
        matrices[row][~present[row]] = 0
        matrices[row][:, ~present[row]] = 0
        matrices[row].diagonal()[~present[row]] = 0.1
    weights = weights.masked_fill(~present, 0)
    weights[5, 2] = 0.0
    order, increments = removal(obs.inverse(matrices), weights, present)
    assert order[5, 0] == 2
    assert increments[5, 0] == 0
    for row in range(6):
        count = int(present[row].sum())
        assert order[row, count:].tolist() == [-1] * (9 - count)
        assert bool(increments[row, count:].isinf().all())
        total = 0.0
        for step, (index, rise, values, gone) in enumerate(one_by_one(matrices[row], weights[row], present[row])):
            total += float(increments[row, step])
            assert int(order[row, step]) == index
            assert float(increments[row, step]) == pytest.approx(rise, rel=1e-7, abs=1e-12)
            solved = joint(matrices[row][None], weights[row][None], ~gone[None])[0]
            close(solved, values, 1e-5)
            assert not solved[gone].any()
            assert total == pytest.approx(increase(matrices[row], weights[row], solved), rel=1e-7, abs=1e-12)


def test_removal_leaves_its_arguments_and_stops_where_rounding_ate_the_matrix():
    matrices, weights = definite(2, 4)
    inverses, present = obs.inverse(matrices), torch.ones(2, 4, dtype=torch.bool)
    before = inverses.clone(), weights.clone(), present.clone()
    removal(inverses, weights, present)
    assert all(map(torch.equal, before, (inverses, weights, present)))
    indefinite = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    with pytest.raises(obs.NotDefinite):
        removal(indefinite, torch.ones(1, 2), present[:1, :2])


@FEW
@given(st.integers(0, 10**6), st.integers(1, 3), st.data())
def test_joint_never_costs_more_than_the_sum_of_singles_or_no_correction(seed, size, data):
    width = 4 * size
    matrices, weights = definite(1, width, seed)
    keep = torch.tensor([data.draw(st.lists(st.booleans(), min_size=width, max_size=width))])
    best = joint(matrices, weights, keep)
    others = [weights.masked_fill(~keep, 0)]
    for group in {1, size}:
        others.append(obs.sum_of_singles(obs.inverse(matrices), weights, keep, group))
    cost = increase(matrices[0], weights[0], best[0])
    for other in others:
        assert not other[~keep].any()
        assert cost <= increase(matrices[0], weights[0], other[0]) * (1 + 1e-9) + 1e-12
    close(best[0], least(matrices[0], weights[0], ~keep[0]), 1e-8)
    if int((~keep).sum()) == 1:
        close(others[1], best, 1e-9)


@pytest.mark.parametrize("scale", [1.0, 3.7])
def test_a_diagonal_fisher_leaves_what_stays_bit_for_bit(scale):
    _, weights = definite(3, 8)
    diagonal = torch.diag_embed(scale * (1 + torch.rand(3, 8, generator=torch.Generator().manual_seed(0)).double()))
    keep = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    for values in (joint(diagonal, weights, keep), obs.sum_of_singles(obs.inverse(diagonal), weights, keep)):
        assert torch.equal(values, weights.masked_fill(~keep, 0))


def test_groups_that_do_not_interact_are_solved_by_the_sum():
    matrices, weights = definite(1, 8)
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))
    keep = torch.tensor([[True] * 4 + [False] * 4])
    summed = obs.sum_of_singles(obs.inverse(matrices * blocks), weights, keep, 4)
    close(summed, joint(matrices * blocks, weights, keep), 1e-9)


# ---------------------------------------------------------------- M-FAC's form


def rings(blocks, m, width, seed=0):
    return torch.randn(blocks, m, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("blocks", "m", "width"), [(1, 3, 11), (1, 20, 6), (4, 5, 8), (3, 1, 4), (2, 12, 5)])
def test_gram_is_the_inverse_without_the_matrix(blocks, m, width):
    G, damping = rings(blocks, m, width), 0.05
    gram = Gram(G, damping)
    matrices = damping * torch.eye(width, dtype=torch.float64) + G.mT @ G / m
    inverses = torch.linalg.inv(matrices)
    x = rings(blocks, 1, width, 1)[:, 0]
    close(gram.diagonal(), inverses.diagonal(dim1=1, dim2=2), 1e-9)
    close(gram.solve(x), (inverses @ x[..., None])[..., 0], 1e-9)
    for share in (0.0, 0.5, 1.0):
        keep = torch.rand(blocks, width, generator=torch.Generator().manual_seed(2)) >= share
        ours = gram.joint(x, keep)
        close(ours, joint(matrices, x, keep), 1e-9) if keep.any() else None
        assert not ours[~keep].any()
    assert torch.equal(gram.joint(x, torch.ones(blocks, width, dtype=torch.bool)), x)


@pytest.mark.parametrize(("m", "width"), [(3, 10), (12, 5)])
def test_the_published_recursion_is_the_same_inverse(m, width):
    """v_i = g_i/λ − Σ_{j<i} (v_jᵀg_i/den_j) v_j with den_i = m + g_iᵀv_i (arXiv 2107.03356)."""
    (G,), damping = rings(1, m, width), 0.02
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for g in G:
        v = g / damping - sum(((u @ g / den) * u for u, den in found), torch.zeros(width, dtype=torch.float64))
        found.append((v, m + g @ v))
    (x,) = rings(1, 1, width, 1)[0]
    gram = Gram(G[None], damping)
    close(gram.solve(x[None])[0], x / damping - sum((v @ x / den) * v for v, den in found), 1e-8)
    close(gram.diagonal()[0], 1 / damping - sum(v.square() / den for v, den in found), 1e-8)


def test_pieces_of_wide_blocks_are_summed():
    G = rings(1, 2, (1 << 16) + 7)
    x = rings(1, 1, (1 << 16) + 7, 1)[:, 0]
    inner = 2 * 0.3 * torch.eye(2, dtype=torch.float64) + G[0] @ G[0].T
    close(Gram(G, 0.3).solve(x)[0], (x[0] - G[0].T @ torch.linalg.solve(inner, G[0] @ x[0])) / 0.3, 1e-10)


def test_a_gram_matrix_that_cannot_be_factored_names_its_block():
    with pytest.raises(obs.NotDefinite) as caught:
        Gram(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]), 0.0).factor()
    assert caught.value.row == 1


def test_a_layer_of_far_greater_gradients_has_a_damping_that_float32_resolves():
    layout = Layout({"small": (4,), "large": (4,)}, 4)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 2, 4, generator=generator) * torch.tensor([1.0, 1e6])[:, None]
    rows[:, 1, 1:] = rows[:, 1, :1]  # of rank one, so that rounding makes its least eigenvalues negative
    blocks = torch.einsum("mri,mrj->rij", rows, rows) / 200
    found = Fisher(layout, blocks, (rows.double().square().sum(0) / 200), 200)
    damped = found.damped(slice(0, 2), 1e-3)
    own = found.diagonal
    assert torch.equal(damped[0].diagonal(), own[0] + 1e-3)
    assert torch.equal(damped[1].diagonal(), own[1] + 1e-6 * own[1].max())
    obs.inverse(damped)
