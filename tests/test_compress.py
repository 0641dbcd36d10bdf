import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cram_bench as cb
from cram_bench.compress import NM, Magnitude, Masks, rank

# Few distinct values, so that ties are the rule and not the exception; and some of any kind.
scores = st.lists(
    st.sampled_from([0.0, 0.5, 0.5, 1.0, 2.0]) | st.floats(0, 2.0**90, width=32, allow_subnormal=False),
    min_size=1,
    max_size=60,
)


@given(scores, st.data())
def test_keep_largest_against_a_full_sort(values, data):
    zeros = data.draw(st.integers(0, len(values)))
    keep = cb.compress.keep_largest(torch.tensor(values), zeros)
    by_value_then_position = sorted(range(len(values)), key=lambda i: (torch.tensor(values[i]).item(), i))
    assert [i for i in range(len(values)) if not keep[i]] == sorted(by_value_then_position[:zeros])


@pytest.mark.parametrize("zeros", [-1, 4])
def test_keep_largest_refuses_impossible_counts(zeros):
    with pytest.raises(ValueError, match=f"cannot drop {zeros} of 3"):
        cb.compress.keep_largest(torch.ones(3), zeros)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        cb.compress.keep_largest(torch.tensor([1.0, float("nan"), 0.5, 2.0]), 3)


weights = st.lists(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=20), min_size=1, max_size=4
).map(lambda rows: {str(index): torch.tensor(row) for index, row in enumerate(rows)})


@given(weights, st.floats(0, 1))
def test_exactly_the_asked_number_of_zeros(tensors, sparsity):
    count = sum(tensor.numel() for tensor in tensors.values())
    masks = Magnitude(sparsity).masks(tensors)
    assert (masks.zeros, masks.count) == (round(sparsity * count), count)
    uniform = Magnitude(sparsity, "uniform").masks(tensors)
    for name, tensor in tensors.items():
        assert int((~uniform[name]).sum()) == round(sparsity * tensor.numel())
    # Nothing kept is smaller than something dropped.
    kept = torch.cat([tensor[masks[name]] for name, tensor in tensors.items()]).abs()
    dropped = torch.cat([tensor[~masks[name]] for name, tensor in tensors.items()]).abs()
    assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 0), (0.5, 6), (1.0, 12)])
def test_all_equal_weights(scope, sparsity, zeros):
    assert Magnitude(sparsity, scope).masks({"w": torch.full((3, 4), 0.1)}).zeros == zeros


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 0), (0.4, 0), (0.6, 1), (1.0, 1)])
def test_one_element_tensors(sparsity, zeros):
    assert Magnitude(sparsity).masks({"w": torch.ones(1, 1)}).zeros == zeros


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2)])
def test_n_of_m_groups_run_along_the_input_channels(n, m, layout):
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    mask = NM(n, m).masks({"w": weight})["w"]
    for out in range(6):
        for start in range(0, 8, m):
            for y in range(3):
                for x in range(3):
                    group, kept = weight[out, start : start + m, y, x], mask[out, start : start + m, y, x]
                    assert int(kept.sum()) == n
                    assert set(group[kept].tolist()) == set(sorted(group.tolist(), key=abs)[-n:])


def test_n_of_m_leaves_what_does_not_divide_dense_and_names_it():
    tensors = {"first": torch.randn(4, 3, 3, 3), "linear": torch.randn(5, 8)}
    assert NM(2, 4).dense(tensors) == ["first"]
    masks = NM(2, 4).masks(tensors)
    assert bool(masks["first"].all())
    assert masks.zeros == 20


@pytest.mark.parametrize(
    "spec", ["global@0.9", "uniform@0.5", "2:4", "4:8", "global@1", "global@0", "int8", "uniform@0.9+int4", "2:4+int8"]
)
def test_specifications_round_trip(spec):
    assert str(cb.compress.parse(spec)) == spec
    assert cb.compress.parse(spec) == cb.compress.parse(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "global",
        "globl@0.5",
        "global@1.1",
        "global@nan",
        "0:4",
        "5:4",
        "global@0.5 ",
        "int1",
        "int8+2:4",
        "int8+int4",
    ],
)
def test_bad_specifications(spec):
    with pytest.raises(ValueError, match="unknown compressor|in \\[0, 1\\]|keeps n of every m|bits must be"):
        cb.compress.parse(spec)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_sparsity_out_of_range(value):
    with pytest.raises(ValueError, match="sparsity must be in"):
        Magnitude(value)


def test_masks_hold_nothing_but_zero_and_one():
    assert Masks({"w": torch.tensor([0.0, 1.0])})["w"].dtype is torch.bool
    with pytest.raises(ValueError, match=r"mask 'w' holds 0.5"):
        Masks({"w": torch.tensor([0.5, 1.0])})


def test_masks_are_saved_loaded_and_applied(tmp_path, small_model):
    masks = Magnitude(0.7).masks(cb.compress.prunable(small_model))
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "masks.safetensors"]
    assert set(loaded) == set(masks)
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    names = [name for name, _ in small_model.named_parameters()]
    loaded.apply_(small_model)
    assert cb.compress.sparsity(small_model) == masks.sparsity
    assert [name for name, _ in small_model.named_parameters()] == names
    assert Masks.of(cb.compress.prunable(small_model)).zeros == masks.zeros


def test_masking_leaves_plain_zeros():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[-1.0, float("inf")]])
    Masks({"weight": torch.tensor([[False, False]])}).apply_(layer)
    assert layer.weight.tolist() == [[0.0, 0.0]]
    assert not torch.signbit(layer.weight).any()


@pytest.mark.parametrize("wrong", [{"nowhere": torch.ones(1)}, {"0.weight": torch.ones(2, 2)}])
def test_masks_that_do_not_fit_change_nothing(wrong, small_model):
    before = copy.deepcopy(small_model.state_dict())
    with pytest.raises(ValueError, match="fits no parameter|has shape"):
        Masks({"3.weight": torch.zeros(4, 12), **wrong}).apply_(small_model)
    assert all(torch.equal(value, before[name]) for name, value in small_model.state_dict().items())


def test_a_compressed_model_can_be_copied(small_model):
    pruned = cb.compress.compressed(small_model, Magnitude(0.8))
    assert cb.compress.sparsity(small_model) == 0
    twin = copy.deepcopy(pruned)
    assert cb.compress.sparsity(twin) == cb.compress.sparsity(pruned) == round(0.8 * 144) / 144
    assert list(twin.state_dict()) == list(small_model.state_dict())


def test_applied_restores_also_after_an_exception(small_model):
    before = copy.deepcopy(small_model.state_dict())
    with pytest.raises(RuntimeError, match="half-way"), cb.compress.applied(small_model, Magnitude(0.8)) as masks:
        assert cb.compress.sparsity(small_model) == masks.sparsity
        raise RuntimeError("half-way")
    assert all(torch.equal(value, before[name]) for name, value in small_model.state_dict().items())


class Opinionated(nn.Sequential):
    def prunable(self):
        return ["0.weight"]


class Mistaken(nn.Sequential):
    def prunable(self):
        return ["7.weight"]


def test_the_model_says_what_is_prunable():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Embedding(3, 3), nn.Linear(4, 2)]
    assert list(cb.compress.prunable(nn.Sequential(*layers))) == ["0.weight", "4.weight"]
    assert list(cb.compress.prunable(Opinionated(*layers))) == ["0.weight"]
    assert list(cb.compress.prunable(nn.Sequential(*layers), exclude=["0.*"])) == ["4.weight"]
    assert list(cb.compress.prunable(nn.MultiheadAttention(4, 2))) == ["in_proj_weight", "out_proj.weight"]
    with pytest.raises(ValueError, match="'7.weight', which is not a parameter"):
        cb.compress.prunable(Mistaken(*layers))
    with pytest.raises(ValueError, match="matches no parameter"):
        cb.compress.prunable(nn.Sequential(*layers), exclude=["conv*"])
    with pytest.raises(ValueError, match="no prunable weight"):
        cb.compress.prunable(nn.BatchNorm2d(3))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("spec", ["int{}", "global@0.7+int{}", "2:4+int{}"])
def test_quantization_against_a_search_over_all_levels(bits, spec):
    weight = torch.randn(5, 8, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[4] = 0
    model = nn.Sequential(nn.Conv2d(8, 5, 3, bias=False).double())
    model[0].weight.data = weight.clone()
    compressor = cb.compress.parse(spec.format(bits))
    masks = cb.compress.apply_(model, compressor)
    pruned = weight * masks["0.weight"]
    top = 2 ** (bits - 1) - 1
    for channel in range(5):
        peak = pruned[channel].abs().max()
        levels = torch.arange(-top, top + 1, dtype=torch.float64) * peak / top
        nearest = levels[(pruned[channel].flatten()[:, None] - levels).abs().argmin(1)]
        torch.testing.assert_close(model[0].weight[channel].flatten().detach(), nearest, rtol=0, atol=1e-12)
    assert not model[0].weight[~masks["0.weight"]].any()
    assert masks.zeros == (0 if spec.startswith("int") else compressor.prune.masks({"0.weight": weight}).zeros)


@pytest.mark.parametrize("sizes", [(30,), (7, 0, 23), (1, 9, 20)])
def test_batchnorm_tuning_is_the_pooled_mean_and_variance(sizes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, 5, 5, generator=generator, dtype=torch.float64) * 3 + 10
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).double()
    weights = copy.deepcopy(list(model.parameters()))
    cb.compress.tune_batchnorm(model, [(part, None) for part in x.split(sizes)])
    channel = x.transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(model[0].running_mean, channel.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[0].running_var, channel.var(1), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(module.training for module in model.modules())
    assert int(model[0].num_batches_tracked) == 0


def test_batchnorm_tuning_of_deeper_layers_sees_what_they_see(small_model, small_batch):
    small_model.eval()
    cb.compress.tune_batchnorm(small_model, [small_batch[0]])
    hidden = small_model[0](small_batch[0])
    torch.testing.assert_close(small_model[1].running_var, hidden.var(0).detach(), rtol=1e-6, atol=1e-6)
    assert not small_model.training


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 8, dtype=torch.float64)], [None]])
def test_batchnorm_tuning_that_fails_changes_nothing(batches, small_model):
    before = copy.deepcopy(small_model.state_dict())
    with pytest.raises((ValueError, TypeError)):
        cb.compress.tune_batchnorm(small_model, batches)
    assert all(torch.equal(value, before[name]) for name, value in small_model.state_dict().items())
    assert not small_model[1]._forward_pre_hooks


def test_batchnorm_tuning_passes_by_what_keeps_no_statistics():
    x = torch.tensor([[1.0], [3.0]])
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1, track_running_stats=False))
    cb.compress.tune_batchnorm(model, [x])
    assert (model[0].running_mean.item(), model[1].running_mean) == (2.0, None)
    cb.compress.tune_batchnorm(model[1], iter([]))


def test_batchnorm_tuning_without_batchnorm_reads_nothing():
    cb.compress.tune_batchnorm(nn.Linear(2, 2), iter([]))


@given(st.floats(0, 1), st.sampled_from(["global", "uniform"]))
def test_any_sparsity_reads_back_from_its_specification(sparsity, scope):
    assert cb.compress.parse(str(Magnitude(sparsity, scope))) == Magnitude(sparsity, scope)


def test_a_grid_takes_numpys_floats():
    assert cb.compress.grid(["global"], np.linspace(0.25, 0.75, 3)) == [Magnitude(s) for s in (0.25, 0.5, 0.75)]


def test_tuning_of_a_float64_model_is_float64():
    batches = [
        3 + 2 * torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (7, 2, 30)
    ]
    model, joined = nn.BatchNorm1d(3).double(), torch.cat(batches)
    cb.compress.tune_batchnorm(model, batches)
    torch.testing.assert_close(model.running_mean, joined.sum(0) / 39, rtol=1e-12, atol=0)
    squares = (joined - joined.sum(0) / 39).square().sum(0)
    torch.testing.assert_close(model.running_var, squares / 38, rtol=1e-12, atol=0)


def test_tuning_normalises_a_later_layers_input_by_its_batch():
    generator = torch.Generator().manual_seed(1)
    batches = [3 + 2 * torch.randn(n, 3, generator=generator) for n in (7, 2, 30)]
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    cb.compress.tune_batchnorm(model, batches)
    inner = torch.cat([(b - b.mean(0)) / (b.var(0, correction=0) + model[0].eps).sqrt() for b in batches]).double()
    torch.testing.assert_close(model[1].running_mean.double(), inner.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), inner.var(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_applied_puts_gradients_and_flags_back(fails, small_model, small_batch):
    small_model[0].bias.requires_grad_(False)
    small_model(small_batch[0]).sum().backward()
    gradient = small_model[3].weight.grad.clone()

    def block():
        with cb.compress.applied(small_model, Magnitude(0.9)):
            small_model[0].bias.requires_grad_(True)
            small_model[3].weight.grad = None
            small_model(small_batch[0]).sum().backward()
            if fails:
                raise RuntimeError("inside")

    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            block()
    else:
        block()
    assert not small_model[0].bias.requires_grad
    assert small_model[0].bias.grad is None
    assert torch.equal(small_model[3].weight.grad, gradient)


@pytest.mark.parametrize("kind", ["normal", "few values", "rising", "periodic", "constant", "heavy tail"])
@pytest.mark.parametrize("rank", [1, 2, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_large_selections_are_exact(kind, rank):
    """Against a full sort; also where a sample taken at equal steps misleads."""
    count = 1_100_003
    generator = torch.Generator().manual_seed(0)
    scores = {
        "normal": torch.randn(count, generator=generator).abs(),
        "few values": torch.randint(4, (count,), generator=generator).float(),
        "rising": torch.arange(count, dtype=torch.float32),
        "periodic": torch.arange(count, dtype=torch.float32) % 16,
        "constant": torch.ones(count),
        "heavy tail": torch.randn(count, generator=generator).pow(9).abs(),
    }[kind]
    k = rank if isinstance(rank, int) else round(rank * count)
    keep = cb.compress.keep_largest(scores, k)
    assert int(keep.sum()) == count - k
    assert k == count or scores[keep].min() >= scores[~keep].max()


@pytest.mark.parametrize("step", [7, 1_000_001])
def test_a_nan_among_many_weights_is_noticed(step):
    scores = torch.rand(1_100_003)
    scores[5::step] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        cb.compress.keep_largest(scores, 500_000)


def by_sorting(parts, zeros):
    """What stays, from a stable sort of all magnitudes row by row: slow and plain."""
    flat = torch.cat([part.double().abs().reshape(-1) for part in parts])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[:zeros]] = False
    return [piece.view(part.shape) for part, piece in zip(parts, keep.split([p.numel() for p in parts]), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_selection_over_tensors_of_any_layout(dtype, share):
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 32, 3, 3), (10, 64), (7,), (0, 3), (128, 64, 1, 1), ()]
    parts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    parts[0] = parts[0].to(memory_format=torch.channels_last)
    parts[1] = torch.randn(64, 20, generator=generator).to(dtype).T[::2]  # a view with gaps
    parts.append(parts[0].round().contiguous(memory_format=torch.channels_last))  # ties in another order of memory
    zeros = round(share * sum(part.numel() for part in parts))
    found = rank.keep_largest_across(parts, zeros)
    for mask, expected in zip(found, by_sorting(parts, zeros), strict=True):
        assert torch.equal(mask, expected)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@given(
    st.lists(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), max_size=9), min_size=1, max_size=5), st.data()
)
def test_selection_over_tensors_against_a_sort(values, data):
    parts = [torch.tensor(listed) for listed in values]
    zeros = data.draw(st.integers(0, sum(map(len, values))))
    for mask, expected in zip(rank.keep_largest_across(parts, zeros), by_sorting(parts, zeros), strict=True):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("kind", ["normal", "rising", "ties"])
def test_selection_in_several_threads(kind):
    count = rank._PARALLEL + 12_345
    generator = torch.Generator().manual_seed(0)
    scores = {
        "normal": torch.randn(count, generator=generator),
        "rising": torch.arange(count) * 1.0,
        "ties": torch.randint(9, (count,), generator=generator).float(),
    }[kind]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        parts = [scores[:1_000_000], scores[1_000_000:]]
        found = torch.cat(rank.keep_largest_across(parts, count // 2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, torch.cat(by_sorting(parts, count // 2)))


def test_where_torch_selects_the_same_weights_stay():
    """The way of other devices, taken on the CPU."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(40, 30, generator=generator).round(decimals=1), torch.randn(50, generator=generator)]
    for mask, expected in zip(rank._by_torch(parts, 600, True), rank.keep_largest_across(parts, 600), strict=True):
        assert torch.equal(mask, expected)
