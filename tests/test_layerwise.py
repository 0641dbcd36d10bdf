"""Second moments of layer inputs, and the pruners that stand on them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cram_bench as cb
from cram_bench.curvature import obs
from cram_bench.curvature.inputs import groups, layers, moments
from cram_bench.prune import PRUNERS, ExactOBS, SparseGPT
from cram_bench.prune.layerwise import sweep


def inputs(*shape: int, count: int = 16, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [(x, torch.zeros(count, dtype=torch.long))]


def spd(size: int, seed: int = 0) -> torch.Tensor:
    a = torch.randn(size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 4),
    ).double().train()  # fmt: skip


def seen(module: nn.Module, batches: list, name: str = "weight") -> torch.Tensor:
    return moments(module, layers(module, dict(module.named_parameters()))[0], batches).matrices[name]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=(2, 1)),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="reflect", groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2),
        nn.Conv1d(4, 6, 2, padding="same", groups=2, padding_mode="replicate"),
        nn.Linear(4, 3),
    ],
    ids=str,
)
def test_moments_are_of_what_the_weights_multiply(module: nn.Module) -> None:
    """Whatever the layer: the sum of squares of its outputs is ½ N tr(W H Wᵀ), for any weights."""
    module = module.double()
    shape = {"Conv2d": (4, 9, 10), "Conv1d": (4, 11), "Linear": (5, 4)}[type(module).__name__]
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    batches = inputs(*shape)
    known, _ = layers(module, {"weight": module.weight})
    found = moments(module, known, batches)
    for seed in range(3):
        torch.manual_seed(seed)
        nn.init.normal_(module.weight)
        rows = known["weight"].rows(module.weight.detach())
        energy = torch.einsum("gri,gij,grj->", rows, found.matrices["weight"], rows) * found.counts["weight"] / 2
        assert energy.item() == pytest.approx(module(batches[0][0]).square().sum().item(), rel=1e-10)
    assert torch.equal(known["weight"].back(rows), module.weight.detach())


def test_a_convolutions_moments_are_those_of_its_patches() -> None:
    """Against the patches cut out one by one."""
    module, batches = nn.Conv2d(2, 1, 2, stride=2).double(), inputs(2, 4, 6, count=3)
    x = batches[0][0]
    patches = [x[n, :, i : i + 2, j : j + 2].flatten() for n in range(3) for i in (0, 2) for j in (0, 2, 4)]
    columns = torch.stack(patches, 1)
    assert torch.allclose(seen(module, batches)[0], 2 / 18 * columns @ columns.T, rtol=1e-12)


def test_shared_layers_add_up_and_transformers_layers_lie_the_other_way() -> None:
    """A layer used twice sees both inputs; ``Conv1D`` stores (inputs, outputs)."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.a(x)))

    model, batches = Twice().double(), inputs(4)
    x = batches[0][0]
    both = torch.cat([x, F.relu(model.a(x))]).detach()
    assert torch.allclose(seen(model, batches, "a.weight")[0], 2 / 32 * both.T @ both, rtol=1e-12)

    library = pytest.importorskip("transformers.pytorch_utils")
    layer = library.Conv1D(3, 4).double()
    known, _ = layers(layer, {"weight": layer.weight})
    assert known["weight"].rows(layer.weight).shape == (1, 3, 4)
    assert torch.equal(known["weight"].back(known["weight"].rows(layer.weight)), layer.weight)
    assert torch.allclose(moments(layer, known, batches).matrices["weight"][0], 2 / 16 * x.T @ x, rtol=1e-12)


def test_a_weight_that_others_use_too_is_not_seen() -> None:
    """Tied to an embedding, or shared by convolutions of different groups."""
    tied = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    tied["head"].weight = tied["embed"].weight
    known, others = layers(tied, dict(tied.named_parameters()))
    assert not known
    assert "Embedding" in others["embed.weight"]
    shared = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(8, 4, 1, groups=2, bias=False))
    shared[1].weight = shared[0].weight
    known, others = layers(shared, dict(shared.named_parameters()))
    assert not known
    assert others == {"0.weight": "layers of different kinds share it"}


@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv1d(4, 6, 3, stride=2)], ids=str)
def test_an_example_without_a_batch_is_a_batch_of_one(module: nn.Module) -> None:
    """Convolutions take both."""
    shape = (4, 9, 10) if isinstance(module, nn.Conv2d) else (4, 11)
    ((x, y),) = inputs(*shape, count=1)
    assert torch.equal(seen(module.double(), [(x[0], y)]), seen(module, [(x, y)]))


def test_tokens_of_padding_stay_out() -> None:
    """Whatever padding holds: H is that of the tokens."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.layer(self.embed(ids))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.body(ids, attention_mask=(ids != 0).long())

    model, ids = Model().double(), torch.tensor([[3, 4, 0, 0], [5, 0, 0, 0], [1, 2, 3, 4]])
    known, _ = layers(model, {"body.layer.weight": model.body.layer.weight})
    found = moments(model, known, [(ids, torch.zeros(3))])
    x = model.body.embed(ids[ids != 0]).detach()
    assert found.counts["body.layer.weight"] == 7
    assert torch.allclose(found.matrices["body.layer.weight"][0], 2 / 7 * x.T @ x, rtol=1e-12)


def test_parts_of_a_budget_see_the_same() -> None:
    """In several passes: the same keys, masks and values."""
    model, batches = net(), inputs(3, 8, 8)
    one = ExactOBS(samples=16).fit(model, batches)
    many = ExactOBS(samples=16, memory=1e-9).fit(model, batches)
    assert len(groups(one.known, 1)) == 4
    assert many.gradients == 4 * one.gradients
    masks = one.masks(0.5)
    for name, value in one.solve(masks).items():
        assert torch.allclose(many.keys[name], one.keys[name], rtol=1e-9)
        assert torch.allclose(many.solve(masks)[name], value, rtol=1e-9)


@pytest.mark.parametrize("size", [1, 7, 32, 75])
def test_removal_of_rows_is_removal_one_by_one(size: int) -> None:
    """Order and increments against the inverse of what is left, made anew at every step."""
    matrix, rows = spd(size), torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order, increments = obs.removal_of_rows(obs.inverse(matrix[None])[0], rows, entries=2 * size * size)
    for row, went, costs in zip(rows, order.tolist(), increments.tolist(), strict=True):
        left, values = list(range(size)), row.clone()
        for step in range(size):
            inverse = matrix[left][:, left].inverse()
            scores = values[left].square() / (2 * inverse.diagonal())
            at = int(scores.argmin())
            assert left[at] == went[step]
            assert scores[at].item() == pytest.approx(costs[step], rel=1e-7, abs=1e-12)
            values[left] -= inverse[:, at] * values[left[at]] / inverse[at, at]
            values[left.pop(at)] = 0.0
        change = -row
        assert sum(costs) == pytest.approx(float(change @ matrix @ change) / 2, rel=1e-9)  # all gone


def test_the_joint_solve_of_rows_is_the_least() -> None:
    """Against a solve row by row; rows of which all or nothing stays; the sum of increments is the true increase."""
    matrix, rows = spd(20), torch.randn(6, 20, dtype=torch.float64)
    keep = torch.rand(6, 20) < torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.1])[:, None]
    found = obs.joint_of_rows(matrix, rows, keep, entries=900)
    assert torch.equal(found[5], rows[5])
    assert not found[0].any()
    for row, kept, out in zip(rows, keep, found, strict=True):
        exact = torch.zeros_like(row)
        exact[kept] = row[kept] + torch.linalg.solve(matrix[kept][:, kept], matrix[kept][:, ~kept] @ row[~kept])
        assert torch.allclose(out, exact, rtol=1e-9, atol=1e-12)
    order, increments = obs.removal_of_rows(obs.inverse(matrix[None])[0], rows)
    went = torch.ones_like(keep).scatter_(1, order[:, :9], torch.zeros(6, 9, dtype=torch.bool))
    change = obs.joint_of_rows(matrix, rows, went) - rows
    assert torch.allclose((change @ matrix * change).sum(1) / 2, increments[:, :9].sum(1), rtol=1e-9)


def test_sweep_is_the_published_loop() -> None:
    """SparseGPT's columns one by one, with the inverse of the columns not yet passed; counts to the weight."""
    matrix, rows = spd(21), torch.randn(5, 21, dtype=torch.float64)
    upper = torch.linalg.cholesky(matrix.inverse(), upper=True)
    for zeros in (0, 1, 50, 104, 105):
        keep, values = sweep(upper[None], rows[None], zeros=zeros, block=8)
        assert int((~keep).sum()) == zeros
        again = rows.clone()
        for i in range(21):
            inverse = matrix[i:, i:].inverse()
            asked = again[:, i].masked_fill(keep[0, :, i], 0.0)
            again[:, i:] -= asked[:, None] * inverse[0] / inverse[0, 0]
        assert torch.allclose(values[0], again.masked_fill(~keep[0], 0.0), rtol=1e-9, atol=1e-12)
        assert torch.equal(sweep(upper[None], rows[None], keep, block=8)[1], values)


@pytest.mark.parametrize("kind", ["exactobs", "sparsegpt", "exactobs(scope=global)"])
def test_counts_are_exact_and_the_ends_dense(kind: str) -> None:
    """Exactly what was asked of all prunable weights; the first and last layer stay, and say so."""
    model, batches = net(), inputs(3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    name, _, rest = kind.partition("(")
    options = {"scope": "global"} if rest else {}
    fitted = PRUNERS[name](samples=16, **options).fit(model, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    count = sum(weight.numel() for weight in cb.compress.prunable(model).values())
    for sparsity in (0.0, 0.123, 0.5, 0.8):
        masks = fitted.masks(sparsity)
        assert masks.zeros == round(sparsity * count)
        assert masks["0.weight"].all()
        assert masks["8.weight"].all()
        assert {key: matrix.reason for key, matrix in masks.dense.items()} == {
            "0.weight": "the network's first or last layer", "8.weight": "the network's first or last layer"
        }  # fmt: skip
        values = fitted.values(masks)
        assert all(not value[~masks[key]].any() for key, value in values.items())
        assert torch.equal(values["0.weight"], before["0.weight"])
    if not options:
        share = [float((~fitted.masks(0.5)[key]).double().mean()) for key in ("3.weight", "6.weight")]
        assert share[0] == pytest.approx(share[1], abs=0.01)
    assert fitted.masks(0.5, ["8.weight"]).zeros == 40  # asked for by name alone
    with pytest.raises(ValueError, match=r"sparsity 0\.99 of .*ends=pruned"):
        fitted.masks(0.99)
    pruned = PRUNERS[name](samples=16, ends="pruned", **options).fit(model, batches)
    assert pruned.apply_(model, 0.99).zeros == round(0.99 * count)


class Transformer(nn.Module):
    """With parameters of its own, as a model with learned positions has."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 5, 8))
        self.first = nn.Linear(4, 8)
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks(self.first(x) + self.positions).mean(1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_ends_of_a_transformer_are_its_layers_and_attention_is_named() -> None:
    torch.manual_seed(0)
    model, batches = Transformer().double(), inputs(5, 4, count=16)
    masks = ExactOBS(samples=16).fit(model, batches).masks(0.3)
    reasons = {name: matrix.reason for name, matrix in masks.dense.items() if name != "positions"}
    end, unseen = "the network's first or last layer", "the inputs of a MultiheadAttention are not seen"
    assert reasons == {
        "first.weight": end,
        "last.weight": end,
        "blocks.layers.0.self_attn.in_proj_weight": unseen,
        "blocks.layers.0.self_attn.out_proj.weight": unseen,
    }
    with pytest.raises(ValueError, match="take greedy, which reaches all"):  # ends=pruned would not do
        ExactOBS(samples=16).fit(model, batches).masks(0.9)


def test_across_layers_increments_count_by_the_energy_of_their_layer() -> None:
    """So that a layer whose weights are 64 times as large is pruned no less; not so without the division."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).double(), inputs(6)
    pruner = ExactOBS(samples=16, scope="global", ends="pruned")
    before = pruner.fit(model, batches).masks(0.5)
    with torch.no_grad():
        model[1].weight.mul_(64)
    after = pruner.fit(model, batches).masks(0.5)
    assert all(0 < int(mask.sum()) < mask.numel() for mask in before.values())
    assert all(torch.equal(mask, after[name]) for name, mask in before.items())


def test_exact_obs_corrects_any_masks_and_is_better() -> None:
    """2:4 and magnitudes too; the outputs of a layer are nearer than those of its masks alone, and sweep is between."""
    model, batches = net(), inputs(3, 8, 8, count=64)
    fitted = ExactOBS(samples=64, damping=1e-6).fit(model, batches)
    swept = SparseGPT(samples=64, damping=1e-6).fit(model, batches)
    name, _, matrices, _ = next(iter(fitted.seen(["6.weight"])))
    masks = cb.compress.parse("2:4").masks(cb.compress.prunable(model))

    def error(values: torch.Tensor) -> float:
        change = values - fitted.weights[name]
        return float((change @ matrices[0] * change).sum())

    errors = [error(way(dict(masks))[name]) for way in (fitted.solve, swept.solve)]
    assert 0 < errors[0] < errors[1] < error(fitted.weights[name] * masks[name])
    spec = cb.prune.parse("2:4+layerwise(samples=64)")
    assert str(spec) == "2:4+exactobs(samples=64)"
    cb.prune.apply_(model, spec, batches)
    assert torch.equal(model[6].weight != 0, masks["6.weight"])


def test_inputs_that_do_not_interact_leave_what_stays() -> None:
    """With H = I kept weights are the same bit for bit, and the order is that of magnitudes in a row."""
    rows, eye = torch.randn(4, 9, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    order, _ = obs.removal_of_rows(eye, rows)
    assert torch.equal(order, rows.abs().argsort(1))
    keep = torch.rand(4, 9) < 0.5
    assert torch.equal(obs.joint_of_rows(eye, rows, keep), rows.masked_fill(~keep, 0.0))
    assert torch.equal(sweep(eye[None], rows[None], keep[None])[1][0], rows.masked_fill(~keep, 0.0))


def test_dead_inputs_go_first_and_at_no_cost() -> None:
    """An input that is always zero: its weights go before all others, and what a mask keeps of them is the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    (x, y), *_ = inputs(6)
    x[:, 2] = 0
    for pruner in (ExactOBS(samples=16, ends="pruned"), SparseGPT(samples=16, ends="pruned")):
        fitted = pruner.fit(model, [(x, y)])
        moment = 2 / 16 * x.T @ x
        expected = moment + pruner.damping * moment.diagonal().sum() / 5 * torch.eye(6, dtype=torch.float64)
        expected[2, 2] = 1.0  # five inputs are not always zero
        _, _, matrices, dead = next(iter(fitted.seen(["0.weight"])))
        assert torch.allclose(matrices[0], expected, rtol=1e-12)
        assert dead.tolist() == [[False, False, True, False, False, False]]
        masks = fitted.masks(5 / 30)
        assert not masks["0.weight"][:, 2].any()
        assert torch.equal(fitted.solve(masks)["0.weight"][:, [0, 1, 3]], model[0].weight[:, [0, 1, 3]].detach())


@pytest.mark.parametrize("pruner", [ExactOBS(samples=16), SparseGPT(samples=16)])
def test_in_steps_what_is_gone_stays_gone(pruner: cb.prune.Pruner) -> None:
    """Two steps, and masks of somebody else that leave a layer more zeros than it would get."""
    model, batches = net(), inputs(3, 8, 8)
    first = pruner.fit(model, batches)
    masks = first.apply_(model, 0.4)
    second = pruner.fit(model, batches, gone={name: ~mask for name, mask in masks.items()})
    for name, mask in second.masks(0.7).items():
        assert not (mask & ~masks[name]).any()
    with pytest.raises(ValueError, match="were pruned before"):
        second.masks(0.2)


def test_what_cannot_be_seen_stays_dense_by_name() -> None:
    """Recurrent layers, and one that the pass did not run."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.a, self.b, self.c = (
                nn.GRU(4, 4, batch_first=True),
                nn.Linear(4, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 2),
            )
            self.idle = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(self.gru(x)[0])))[:, 0]

    model = Odd().double()
    fitted = ExactOBS(samples=16).fit(model, inputs(3, 4))
    masks = fitted.masks(0.1)
    assert "GRU" in masks.dense["gru.weight_ih_l0"].reason
    assert "no pass" in masks.dense["idle.weight"].reason
    assert masks.zeros == round(0.1 * masks.count)
    assert masks["gru.weight_ih_l0"].all()
    assert masks["idle.weight"].all()


def test_a_failure_leaves_the_model() -> None:
    """Inputs that are not finite, or all zero; nothing to see; too few examples: one line, and the model as it was."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    (x, y), *_ = inputs(3, 8, 8)
    broken = x.clone()
    broken[0, 0, 0, 0] = torch.inf
    cases = [
        (model, ExactOBS(samples=16), [(broken, y)], "not finite"),
        (model, ExactOBS(samples=16), [(x * 0, y)], "all inputs of the layer of 0.weight are zero"),
        (model, SparseGPT(samples=17), [(x, y)], "17"),
        (nn.GRU(4, 4).double(), ExactOBS(samples=16), inputs(3, 4), "take greedy"),
    ]
    for subject, pruner, batches, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            pruner.fit(subject, batches)
        assert "\n" not in str(error.value)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_matrix_that_cannot_be_factored_is_named() -> None:
    """Twice the same input, and a damping that float64 does not see."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    (x, y), *_ = inputs(4)
    x[:, 1] = x[:, 0]
    with pytest.raises(ValueError, match=r"0\.weight are not positive definite .*damping=0\.001"):
        ExactOBS(samples=16, damping=1e-300).fit(model, [(x, y)])
