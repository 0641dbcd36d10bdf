"""Pruners that look: exact counts, nested masks, one look for all sparsities, and a model that stays as it was."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cram_bench as cb
from cram_bench.compress import Magnitude, PruneThenQuantize, prunable, quantized
from cram_bench.curvature import Layout, chunks, obs
from cram_bench.curvature.fisher import fisher
from cram_bench.curvature.layout import pieces
from cram_bench.preserve import preserved
from cram_bench.prune import OBD, PRUNERS, Specification, fitted, is_name, parse
from cram_bench.prune.obd import Uncorrected

FEW = settings(max_examples=40, deadline=None)
BLOCKS = ("obert", "obs", "cap", "greedy")
LOOK = "gradients=12,batch=2"


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5)).to(dtype)


def data(count=24):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(count, 1, 4, 4, generator=draw), torch.randint(5, (count,), generator=draw))]


def spec(kind, rest="@0.5", more=""):
    return f"{kind}({LOOK}{more}){rest}"


def pruned(kind, rest="@0.5", more="", model=None):
    model = small() if model is None else model
    masks = cb.prune.apply_(model, spec(kind, rest, more), data())
    return model, masks


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def looked():
    return {
        kind: pruner(gradients=12, batch=2).fit(small(), data()) for kind, pruner in PRUNERS.items() if kind in KINDS
    }


KINDS = ("obd", "mfac", *BLOCKS)


@FEW
@given(st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 1))
def test_counts_are_exact_and_masks_nested(looked, kind, one, two):
    low, high = (looked[kind].masks(s) for s in sorted((one, two)))
    count = 36 + 80
    assert (low.count, low.zeros, high.zeros) == (count, *(round(s * count) for s in sorted((one, two))))
    for name, mask in high.items():
        assert not bool((mask & ~low[name]).any())
    values = looked[kind].values(high)
    for name, mask in high.items():
        assert not values[name][~mask].any()
        assert bool(values[name].isfinite().all())


def test_of_one_tensor_alone_the_sparsity_is_its_own(looked):
    for found in looked.values():
        masks = found.masks(0.5, ["4.weight"])
        assert (list(masks), masks.zeros) == (["4.weight"], 40)
        assert found.seconds > 0


@pytest.mark.parametrize("at", ["", "global@0.5"])
def test_obd_is_its_formula_at_the_weights_where_gradients_are_taken(at):
    model, before = small(), state(small())
    keys = PRUNERS["obd"](gradients=12, batch=2, at=at).fit(model, data()).keys
    assert unchanged(model, before)
    other, examples = small(), chunks(data(), 12, 2)
    if at:
        cb.compress.apply_(other, at)
        cb.compress.tune_batchnorm(other, [x for x, _ in examples])
    layout = Layout.of(prunable(other), 64)
    diagonal = layout.unpack(fisher(other, prunable(other), examples, layout, blocks=False).diagonal)
    damping = 0.03 * sum(float(part.sum()) for part in diagonal.values()) / 116
    for name, weight in prunable(model).items():
        expected = weight.detach().double().square() * (diagonal[name] + damping) / 2
        torch.testing.assert_close(keys[name], expected, rtol=1e-5, atol=0)


def test_mfac_is_damped_by_the_mean_diagonal():
    found = PRUNERS["mfac"](gradients=12, batch=2, damping=0.5).fit(small(), data())
    weights = prunable(model := small())
    diagonal = fisher(model, weights, chunks(data(), 12, 2), Layout.of(weights, 64), blocks=False).diagonal
    assert found.gram.damping == pytest.approx(0.5 * float(diagonal.sum()) / 116, rel=1e-5)


def test_weights_go_in_groups_and_are_corrected_in_groups():
    found = PRUNERS["obert"](gradients=12, batch=2, block=8, group=4).fit(small(), data())
    (part,), masks = found.parts, found.masks(0.5)
    matrices = found.whole.damped(slice(0, part.rows), found.scale)
    inverses, weights = obs.inverse(matrices), part.pack(found.weights).double()
    ranks, keep = part.pack(found.keys), part.pack(masks, fill=True)
    expected = obs.group_saliency(inverses, weights, 4)
    each = expected.repeat_interleave(4, 1)
    assert torch.equal(ranks[part.real()], each[part.real()])
    values = part.pack(found.solve(masks))
    torch.testing.assert_close(values, obs.sum_of_singles(inverses, weights, keep, 4), rtol=1e-9, atol=1e-12)


def test_cap_ranks_by_the_loss_of_a_block_so_far_and_greedy_by_the_increments():
    root = torch.randn(3, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices, weights = root @ root.mT, root[..., 0]
    arguments = obs.inverse(matrices), weights, torch.ones(3, 6, dtype=torch.bool)
    order, increments = obs.removal(*arguments)
    so_far = increments.cumsum(1)
    torch.testing.assert_close(so_far[:, -1], torch.einsum("ni,nij,nj->n", weights, matrices, weights) / 2)
    torch.testing.assert_close(PRUNERS["cap"]().rank(*arguments).gather(1, order), so_far)
    torch.testing.assert_close(PRUNERS["greedy"]().rank(*arguments).gather(1, order), increments.cummax(1).values)


@pytest.mark.parametrize("kind", KINDS)
def test_one_look_serves_every_sparsity(kind, monkeypatch):
    calls = []
    pruner = PRUNERS[kind]
    look = pruner.look
    monkeypatch.setattr(pruner, "look", lambda self, *a, **k: calls.append(1) or look(self, *a, **k))
    found = fitted([parse(spec(kind, f"@{s}")) for s in (0.2, 0.5, 0.9)], small(), data())
    for compressor, sparsity in zip(found, (0.2, 0.5, 0.9), strict=True):
        masks = compressor.apply_(prunable(small()))
        assert masks.zeros == round(sparsity * 116)
        assert compressor.gradients == 24
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "cap"])
def test_a_huge_damping_is_global_magnitude_and_corrects_nothing(kind):
    model, masks = pruned(kind, more=",damping=1e9")
    expected = small()
    theirs = cb.compress.apply_(expected, Magnitude(0.5))
    for name, mask in masks.items():
        assert torch.equal(mask, theirs[name])
        torch.testing.assert_close(prunable(model)[name], prunable(expected)[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "levels"),
    [("x4@0.8", [0.2, 0.4, 0.6, 0.8]), ("x4g@0.9375", [0.5, 0.75, 0.875, 0.9375])],
)
@pytest.mark.parametrize("kind", KINDS)
def test_in_steps_what_is_gone_stays_gone(kind, text, levels, monkeypatch):
    found = parse(spec(kind, text))
    assert found.levels() == pytest.approx(levels)
    gone = []
    fit = PRUNERS[kind].fit

    def note(self, model, *a, **k):
        gone.append(k["gone"])
        return fit(self, model, *a, **k)

    monkeypatch.setattr(PRUNERS[kind], "fit", note)
    model, before = small(), state(small())
    (compressor,) = fitted([found], model, data())
    assert unchanged(model, before)
    assert str(compressor) == str(found)
    assert compressor.gradients == len(levels) * 24
    assert compressor.seconds > 0
    masks = compressor.apply_(prunable(model))
    sets = [{name: torch.zeros_like(mask) for name, mask in masks.items()}, *gone[1:]]
    sets.append({name: ~mask for name, mask in masks.items()})
    assert not gone[0]
    for level, earlier, later in zip([0, *levels], [sets[0], *sets], sets, strict=False):
        assert sum(int(m.sum()) for m in later.values()) == round(level * 116)
        assert all(not bool((earlier[name] & ~later[name]).any()) for name in later)


@pytest.mark.parametrize("text", ["2:4+", "global@0.9+", "uniform@0.5+"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_somebody_else(kind, text):
    model = small()
    (compressor,) = fitted([parse(text + spec(kind, ""))], model, data())
    theirs = cb.compress.parse(text[:-1]).masks(prunable(model))
    assert str(compressor) == text + spec(kind, "")
    masks = compressor.apply_(prunable(model))
    for name, mask in masks.items():
        assert torch.equal(mask, theirs[name])
        assert not prunable(model)[name][~mask].any()


@pytest.mark.parametrize("text", ["@0.5+int8", "x2@0.5+int4"])
def test_quantized_after(text):
    bits = int(text[-1])
    model, masks = pruned("greedy", text)
    for name, weight in prunable(model).items():
        assert not weight[~masks[name]].any()
        assert len(weight.detach()[0].unique()) < 2**bits
        torch.testing.assert_close(quantized(weight, bits), weight.detach(), rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- how pruning is written

damping = st.floats(1e-30, 1e30, allow_subnormal=False)
written = st.builds(
    lambda kind, values, masks, sparsity, steps, geometric, bits: (
        (f"{masks}+{kind}{values}" if masks else f"{kind}{values}{steps}{geometric if steps else ''}@{sparsity!r}")
        + (f"+int{bits}" if bits else "")
    ),
    st.sampled_from(KINDS),
    st.just("") | damping.map("(damping={!r})".format) | st.just("(update=none,seed=3)").filter(bool),
    st.sampled_from(["", "", "2:4", "2:4-reference", "global@0.9", "uniform@0.25"]),
    st.floats(0, 1, allow_subnormal=False),
    st.sampled_from(["", "x2", "x16"]),
    st.sampled_from(["", "g"]),
    st.sampled_from([0, 4, 8]),
).filter(lambda text: not ("obd" in text and "update" in text))


@FEW
@given(written)
def test_a_specification_reads_what_it_writes(text):
    found = parse(text)
    assert isinstance(found, Specification)
    assert parse(str(found)) == found
    assert str(parse(str(found))) == str(found)


@pytest.mark.parametrize("pattern", ["greedy", "global+obs", "global"])
def test_a_grid_refuses_to_leave_no_weight(pattern):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), and .* leaves no weight"):
        cb.prune.grid([pattern], [0.5, 1.0])


@pytest.mark.parametrize("text", ["greedy(block=32)x4", "obertx16g", "obs", "mfac(damping=1e+16)"])
def test_names_without_a_sparsity(text):
    assert is_name(text)
    assert parse(f"{text}@0.5").sparsity == 0.5
    assert not is_name(f"{text}@0.5")
    assert not is_name(f"2:4+{text}")
    assert not is_name("global")


def test_settings_are_written_with_an_equals_sign_or_a_colon():
    assert parse("greedy(block:32,damping:0.1)@0.9") == parse("greedy(block=32,damping=0.1)@0.9")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gredy@0.9", ("unknown", "greedy@0.9", "did you mean 'greedy'")),
        ("greedy", ("needs a sparsity", "greedy@0.9")),
        ("greedy@-0.1", ("'greedy@-0.1'", "[0, 1]", "greedy@0.9")),
        ("greedy@1.5", ("sparsity", "[0, 1]", "1.5")),
        ("greedy(blok=3)@0.9", ("blok", "did you mean 'block'")),
        ("greedy(block=0)@0.9", ("block", "at least 1", "0")),
        ("greedy(damping=0)@0.9", ("damping", "positive", "0")),
        ("greedy(block=3,block=4)@0.9", ("block", "twice")),
        ("obs(update=some)@0.9", ("update", "none, single or joint", "'some'")),
        ("obert(group=5)@0.9", ("group", "divide", "48")),
        ("obsx0@0.9", ("steps", "at least 1", "0")),
        ("2:4+obs@0.9", ("2:4", "sparsity", "one step")),
        ("greedy(block@0.9", ("not understood", "greedy@0.9")),
    ],
)
def test_what_is_wrong_is_one_line(text, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        parse(text)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert [word for word in words if word not in line] == []


def test_cram_refuses_pruners():
    for kind in PRUNERS:
        for text in (f"{kind}@0.9", f"{kind}(seed=1)x4@0.9+int8", f"2:4+{kind}"):
            with pytest.raises(ValueError, match=r"looks at gradients or inputs.*CrAM.*cb\.prune\.apply_") as caught:
                cb.compress.parse(text)
            assert "\n" not in str(caught.value)
    model = small()
    ready = fitted([parse(spec("obd")), parse(spec("obd", "@0.5+int8"))], model, data())
    for compressor in (*ready, parse(spec("obd"))):
        with pytest.raises(TypeError, match="looks at gradients or inputs: prune with it after the training"):
            cb.optim.CrAM(model, torch.optim.SGD(model.parameters(), lr=0.1), [compressor])


# ---------------------------------------------------------------- what cannot be done, and the model after it


class Zero(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0


def poisoned():
    ((x, y),) = data()
    x[7] = torch.nan
    return [(x, y)]


@pytest.mark.parametrize("kind", KINDS)
def test_failing_looks_are_one_line_and_leave_the_model(kind):
    flat = [(torch.ones(24, 3), torch.zeros(24, dtype=torch.long))]
    for model, batches, line in (
        (small(), poisoned(), "gradient of 0.weight at batch .* is not finite"),
        (small(), data(23), "gradients=12, of 2 examples each, needs 24 examples, and there are 23"),
        (Zero(3, 2), flat, f"all 12 gradients are zero, so {kind} cannot rank"),
    ):
        model.train()
        before = state(model)
        with pytest.raises(ValueError, match=line) as caught:
            cb.prune.apply_(model, spec(kind), batches)
        assert "\n" not in str(caught.value)
        assert unchanged(model, before)
        assert model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="looks at examples: give batches="):
        cb.prune.apply_(small(), spec(kind))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_solve_that_fails_names_layer_and_remedy_and_prunes_nothing(kind, monkeypatch):
    monkeypatch.setattr("cram_bench.prune.fisher.pieces", lambda rows, width: pieces(rows, width, 1))  # a block each
    model = small()
    found = PRUNERS[kind](gradients=12, batch=2, update="joint").fit(model, data())
    found.whole.diagonal[-1] = -1.0  # of the last tensor
    before = state(model)
    with pytest.raises(
        ValueError, match=rf"block of 4.weight is not positive definite with damping 0.0[13]: .*{kind}\(damp"
    ):
        found.apply_(model, 0.5)
    assert unchanged(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_and_a_changed_one(kind):
    model = small()
    found = PRUNERS[kind](gradients=12, batch=2).fit(model, data())
    with pytest.raises(ValueError, match=r"looked at 0.weight, which this model has not"):
        found.apply_(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), 0.5)
    with pytest.raises(ValueError, match="has not looked at 1.weight"):
        found.at(0.5).apply_(prunable(nn.Sequential(nn.Flatten(), nn.Linear(3, 2))))
    found.apply_(model, 0.5)
    before = state(model)
    with pytest.raises(ValueError, match=r"0.weight has changed since .* looked at the model: fit it again"):
        found.apply_(model, 0.9)
    assert unchanged(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_small_memory_gives_the_same(kind):
    if kind == "mfac":
        with pytest.raises(ValueError, match="mfac holds 12 gradients of 116 weights"):
            pruned(kind, more=",memory=1e-9")
        return
    (one, masks), (two, theirs) = pruned(kind, more=""), pruned(kind, more=",memory=1e-9")
    assert all(torch.equal(mask, theirs[name]) for name, mask in masks.items())
    for name, weight in prunable(one).items():
        torch.testing.assert_close(weight, prunable(two)[name], rtol=1e-4, atol=1e-5)
    found = PRUNERS[kind](gradients=12, batch=2, memory=1e-9).fit(small(), data())
    assert found.gradients == (24 if kind == "obd" else 3 * 24)  # the diagonal of all, then each of two layers
    found.solve(found.masks(0.5))
    assert found.gradients == (24 if kind == "obd" else 5 * 24)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mfac", "obd")])
def test_several_sparsities_share_the_passes_that_small_memory_needs(kind):
    """Blocks that do not fit together are collected once for all sparsities of a table, not once for each."""
    levels = (0.5, 0.8, 0.9)

    def curve(more, specs):
        model, rows = small(), []
        for compressor in fitted(
            [parse(f"{kind}(gradients:12,batch:2{more})@{spec}") for spec in specs], model, data()
        ):
            with preserved(model):
                compressor.apply_(prunable(model))
                rows.append({name: weight.detach().clone() for name, weight in prunable(model).items()})
            seen = compressor.prune.gradients if isinstance(compressor, PruneThenQuantize) else compressor.gradients
        return rows, seen

    specs = [*levels, "0.8+int8"]
    together, seen = curve(",memory:1e-9", specs)
    assert seen == 5 * 24  # three while looking; each of two layers once more, for all four
    alone = [curve("", [spec])[0][0] for spec in specs]
    for one, other in zip(together, alone, strict=True):
        for name, weight in one.items():
            torch.testing.assert_close(weight, other[name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- any torch model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.b(torch.tanh(self.a(x.flatten(1)))))


class Own(Tied):
    def prunable(self):
        return ["head.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_wrapped_tied_declared_and_excluded(kind):
    plain, masks = pruned(kind)
    inner = small()
    _, theirs = pruned(kind, model=nn.DataParallel(inner))
    assert all(torch.equal(mask, theirs[name]) for name, mask in masks.items())
    for name, weight in prunable(plain).items():
        torch.testing.assert_close(weight, prunable(inner)[name])
    assert list(pruned(kind, model=torch.compile(small(), backend="eager"))[1]) == list(masks)
    assert list(pruned(kind, model=Tied())[1]) == ["a.weight", "head.weight"]
    assert list(pruned(kind, model=Own())[1]) == ["head.weight"]
    model = small()
    before = state(model)
    masks = cb.prune.apply_(model, spec(kind), data(), exclude=["0.*"])
    assert list(masks) == ["4.weight"]
    assert torch.equal(model[0].weight, before["0.weight"])
    assert masks.dense["0.weight"].reason == "excluded"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_other_precisions(kind, dtype):
    model, masks = pruned(kind, model=small(dtype))
    assert masks.zeros == 58
    for name, weight in prunable(model).items():
        assert weight.dtype is dtype
        assert not weight[~masks[name]].any()
        assert bool(weight.isfinite().all())


def test_the_correction_lowers_the_loss_on_the_examples():
    """On a network that fits its examples the modelled loss and the loss agree in what is better."""
    model = small(torch.float64)
    ((x, y),) = data(64)
    x = x.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    losses = {}
    for text in ("global@0.4", "greedy(gradients=64,batch=1)@0.4"):
        other = copy.deepcopy(model)
        cb.prune.apply_(other, text, [(x, y)])
        losses[text] = float(F.cross_entropy(other(x), y).detach())
    assert losses["greedy(gradients=64,batch=1)@0.4"] < losses["global@0.4"]


def test_the_pruner_of_contributing_is_one_file_and_one_line(tmp_path, monkeypatch):
    """What CONTRIBUTING shows is run as it stands there: by hand, in steps, and what it looked at is counted."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "(Pruner)" in block)
    (tmp_path / "snip_of_contributing.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    snip = importlib.import_module("snip_of_contributing").SNIP
    monkeypatch.setitem(PRUNERS, snip.kind, snip)
    model, batches = small().eval(), data()
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    asked = (model[4].weight * model[4].weight.grad).abs()
    with pytest.raises(ValueError, match="samples=128 needs 128 examples, and there are 24: .* samples=24"):
        cb.prune.apply_(model, "snip@0.5", batches)
    found = snip(samples=24).fit(model, batches)
    torch.testing.assert_close(found.keys["4.weight"], asked)
    assert found.gradients == 24
    table = cb.probes.sparsity_curve(model, batches, ["snip(samples=24)x4@0.5", "2:4+snip(samples=24)"], batches)
    assert table["gradients"].tolist()[-2:] == [24, 24]
    assert 96 in table["gradients"].tolist()
    masks = cb.prune.apply_(model, "snip(samples=24)x4@0.5", batches)
    assert masks.sparsity == pytest.approx(0.5, abs=0.01)


def test_what_is_gone_goes_first_whatever_a_pruner_says():
    """Keys may be negative, and a look may forget what was pruned before."""

    class Forgetful(OBD):
        kind = "forgetful"

        def look(self, model, weights, batches, **options):
            return Uncorrected(self, weights, {name: -weight.abs() for name, weight in weights.items()})

    model = small()
    gone = {name: torch.rand(weight.shape) < 0.3 for name, weight in prunable(model).items()}
    fitted = Forgetful(gradients=2, batch=2).fit(model, data(), gone=gone)
    masks = fitted.masks(0.6)
    assert fitted.gradients == 4
    assert all(not masks[name][mask].any() for name, mask in gone.items())
