"""What is prunable: every matrix of every kind of model is, or is named and counted as dense, or is refused."""

import copy

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import cram_bench as cb
from cram_bench.compress import NM, Compressor, Dense, Magnitude, Masks, Quantize, prunable, quantized, sparsity


def matrices(model):
    """Name → count of weights of every parameter with two dimensions or more, each once."""
    return {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}


def sizes(weights):
    return {name: weight.numel() for name, weight in weights.items()}


def zeros_among(model):
    """The zeros in all matrices of a model, counted without the library."""
    return sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)


class Experts(nn.Module):
    """A layer of a mixture of experts, with their matrices in one parameter of three dimensions."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.stacked = nn.Parameter(torch.randn(3, 8, 4))


class Declaring(nn.Module):
    """A model that says itself what is prunable: the stacked experts, not the router."""

    def __init__(self):
        super().__init__()
        self.layer = Experts()
        self.head = nn.Linear(4, 2)

    def prunable(self):
        return ["layer.stacked", "head.weight"]


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 5, 4))
        self.more = nn.ParameterList([torch.randn(3, 3), torch.randn(3)])
        self.named = nn.ParameterDict({"u": torch.randn(2, 2)})
        self.linear = nn.Linear(4, 4)


def conv1d(inputs, outputs):
    utils = pytest.importorskip("transformers.pytorch_utils")
    return utils.Conv1D(outputs, inputs)


KINDS = {
    "convolutions": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 2, 3)), {}),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.ConvTranspose3d(4, 2, 3)),
        {},
    ),
    "linear": (lambda: nn.ModuleList([nn.Linear(3, 4), nn.Bilinear(3, 2, 4)]), {}),
    "attention": (lambda: nn.MultiheadAttention(4, 2), {}),
    "attention, separate": (
        lambda: nn.MultiheadAttention(4, 2, kdim=6, vdim=5, add_bias_kv=True),
        {"bias_k": (4, "own parameter of MultiheadAttention"), "bias_v": (4, "own parameter of MultiheadAttention")},
    ),
    "recurrent": (
        lambda: nn.ModuleList([nn.RNN(3, 4, 2, bidirectional=True), nn.GRU(3, 4), nn.LSTM(3, 4, proj_size=2)]),
        {},
    ),
    "cells": (lambda: nn.ModuleList([nn.RNNCell(3, 4), nn.GRUCell(3, 4), nn.LSTMCell(3, 4)]), {}),
    "Conv1D": (lambda: nn.Sequential(conv1d(4, 8)), {}),
    "embeddings": (
        lambda: nn.ModuleList([nn.Embedding(5, 4), nn.EmbeddingBag(3, 4), nn.Linear(4, 2)]),
        {"0.weight": (20, "embedding"), "1.weight": (12, "embedding")},
    ),
    "normalisations": (
        lambda: nn.Sequential(nn.LayerNorm([3, 4]), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        {"0.weight": (12, "normalisation"), "0.bias": (12, "normalisation")},
    ),
    "experts": (Experts, {"stacked": (96, "own parameter of Experts")}),
    "experts, declared": (Declaring, {"layer.router.weight": (12, "not named by Declaring.prunable()")}),
    "own parameters": (
        Positions,
        {
            "tokens": (20, "own parameter of Positions"),
            "more.0": (9, "own parameter of ParameterList"),
            "named.u": (4, "own parameter of ParameterDict"),
        },
    ),
    "integers": (
        lambda: nn.ModuleList([nn.Linear(2, 2), packed(nn.Linear(4, 4))]),
        {"1.weight": (16, "of type uint8")},
    ),
    "vit_tiny": (lambda: cb.models.create("vit_tiny", 10), None),
}


def packed(layer):
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["global@0.5", "uniform-reference@0.9", "2:4", "2:4-reference", "int8", "2:4+int8"])
def test_every_matrix_is_prunable_or_named_as_dense(kind, spec):
    build, expected = KINDS[kind]
    torch.manual_seed(0)
    model = build()
    weights = prunable(model)
    if expected is not None:
        assert weights.dense == expected
    assert list(weights) == [name for name, _ in model.named_parameters() if name in weights]
    assert sizes(weights) | {name: count for name, (count, _) in weights.dense.items()} == matrices(model)
    assert not weights.keys() & weights.dense.keys()

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = cb.compress.parse(spec).masks(weights)
    masks = cb.compress.apply_(model, spec)
    assert chosen.dense == masks.dense
    assert masks.keys() == weights.keys()
    assert weights.dense.items() <= masks.dense.items()
    after = dict(model.named_parameters())
    for name, (count, reason) in masks.dense.items():
        assert reason
        assert count == after[name].numel()
        assert name not in masks or bool(masks[name].all())
        if name in weights.dense:
            assert torch.equal(after[name], before[name])
    if "int" not in spec:  # which makes zeros of its own
        born = sum(int((p == 0).sum()) for name, p in before.items() if matrices(model).get(name))
        assert zeros_among(model) - born == masks.zeros == round(sparsity(model) * sum(sizes(weights).values()))
    assert masks.dense_weights == sum(count for count, _ in masks.dense.values())
    left = sum(count for name, (count, _) in masks.dense.items() if name not in masks)
    assert masks.count + left == sum(matrices(model).values())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2])
def test_transposed_convolutions_are_grouped_along_their_inputs(groups, rank):
    torch.manual_seed(0)
    kind = nn.ConvTranspose1d if rank == 1 else nn.ConvTranspose2d
    layer = kind(8 * groups, 3 * groups, 3, groups=groups, bias=False)
    weight = layer.weight.detach().clone()  # (inputs, outputs of a group, …)
    masks = cb.compress.apply_(layer, "2:4")
    quantize = copy.deepcopy(layer)
    cb.compress.apply_(quantize, "int4")
    flat, kept, rounded = (t.detach().flatten(2) for t in (weight, masks["weight"], quantize.weight))
    for group in range(groups):
        for out in range(3):
            inputs = slice(8 * group, 8 * group + 8)
            for place in range(flat.shape[2]):
                for start in (0, 4):
                    four = flat[inputs, out, place][start : start + 4].abs()
                    assert set(four[kept[inputs, out, place][start : start + 4]].tolist()) == set(
                        four.topk(2)[0].tolist()
                    )
            channel = torch.where(kept[inputs, out], flat[inputs, out], 0)
            scale = channel.abs().max() / 7
            torch.testing.assert_close(rounded[inputs, out], (channel / scale).round() * scale)
    assert torch.equal(layer.weight, torch.where(masks["weight"], weight, 0))


@pytest.mark.parametrize("spec", ["2:4", "int4", "2:4+int8", "global@0.5", "global@0.5+int4"])
def test_conv1d_is_the_linear_layer_that_it_computes(spec):
    torch.manual_seed(0)
    layer, linear = conv1d(8, 6), nn.Linear(8, 6)
    nn.init.normal_(layer.weight)
    linear.weight.data = layer.weight.data.T.contiguous()
    ours, theirs = (cb.compress.apply_(model, spec) for model in (layer, linear))
    assert torch.equal(layer.weight, linear.weight.T)
    assert ours.zeros == theirs.zeros


def test_stacked_experts_that_the_model_names():
    """By magnitude like any other weight; n:m cannot know which dimension counts the inputs, and says so."""
    torch.manual_seed(0)
    model = Declaring()
    masks = cb.compress.apply_(model, "2:4")
    assert masks.dense["layer.stacked"] == (96, "2:4 groups inputs, and which dimension counts them is not known")
    assert (masks.zeros, masks.count) == (4, 104)
    assert cb.compress.apply_(model, Magnitude(0.9)).zeros == round(0.9 * 104) == zeros_among(model)


def test_nested_models_that_decide_themselves():
    nested = nn.Sequential(nn.Linear(2, 2), Declaring())
    assert list(prunable(nested)) == ["0.weight", "1.layer.stacked", "1.head.weight"]

    class Forgetful(nn.Sequential):
        def prunable(self):
            return ["1.head.weight"]

    assert list(prunable(Forgetful(*nested))) == ["1.head.weight"]  # the outermost decides for all inside
    assert prunable(Forgetful(*nested)).dense["1.layer.stacked"].reason == "not named by Forgetful.prunable()"
    twice = nn.ModuleList([nested[1], nested[1]])
    assert list(prunable(twice)) == ["0.layer.stacked", "0.head.weight"]


class Forwarding(nn.Module):
    """A wrapper of somebody else's, which passes on what it does not know."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(model)


WRAPPERS = {
    "compiled": torch.compile,
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "checkpointed": checkpointed,
    "compiled DistributedDataParallel": lambda model: torch.compile(DistributedDataParallel(model)),
    "compiled AveragedModel of a compiled model": lambda model: torch.compile(AveragedModel(torch.compile(model))),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("build", [network, Declaring], ids=["by layers", "by itself"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_changes_nothing(name, build, group, tmp_path):
    torch.manual_seed(0)
    plain = build()
    wrapped = WRAPPERS[name](copy.deepcopy(plain))
    ours, theirs = prunable(plain), prunable(wrapped)
    assert sizes(ours) == sizes(theirs)
    assert list(ours) == list(theirs)
    assert ours.dense == theirs.dense
    assert all(any(weight is p for p in wrapped.parameters()) for weight in theirs.values())
    first = next(iter(ours))
    assert first not in prunable(wrapped, exclude=[first])
    full = next(name for name, p in wrapped.named_parameters() if p is theirs[first])
    assert prunable(wrapped, exclude=[full]).dense[first].reason == "excluded"

    masks = cb.compress.apply_(wrapped, "global@0.7")
    cb.compress.apply_(plain, "global@0.7")
    assert sparsity(wrapped) == sparsity(plain) == masks.sparsity > 0
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    for model in (build(), WRAPPERS[name](build())):  # onto the plain one, and onto another that is wrapped
        loaded.apply_(model)
        assert zeros_among(model) == masks.zeros
    back = WRAPPERS[name](build())
    Masks.of(prunable(plain)).apply_(back)
    assert sparsity(back) == masks.sparsity


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_masks_of_other_tools_may_have_a_wrappers_names(prefix):
    model = network()
    Masks({f"{prefix}3.weight": torch.zeros(4, 8)}).apply_(model)
    assert zeros_among(model) == 32
    with pytest.raises(ValueError, match=f"mask '{prefix}7.weight' fits no parameter of Sequential"):
        Masks({f"{prefix}7.weight": torch.zeros(4, 8)}).apply_(model)


def test_a_layer_that_is_called_module_is_no_wrapper():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert list(prunable(Holder())) == ["module.weight"]
    Masks({"module.weight": torch.zeros(2, 2)}).apply_(model := Holder())
    assert zeros_among(model) == 4


def test_a_wrapper_within_a_model():
    plain = nn.Sequential(network(), nn.Linear(4, 2))
    wrapped = nn.Sequential(torch.compile(copy.deepcopy(plain[0])), copy.deepcopy(plain[1]))
    assert list(prunable(wrapped)) == list(prunable(plain)) == ["0.0.weight", "0.3.weight", "1.weight"]
    cb.compress.apply_(wrapped, "2:4").apply_(plain)
    assert zeros_among(plain) == zeros_among(wrapped) > 0

    class Enumerating(nn.Sequential):
        def prunable(self):  # by the names that the wrapper has given
            return [name for name, p in self.named_parameters() if p.ndim == 2]

    assert list(prunable(Enumerating(*wrapped))) == ["0.3.weight", "1.weight"]
    assert list(prunable(torch.compile(Enumerating(*wrapped)))) == ["0.3.weight", "1.weight"]


def test_a_wrapper_that_passes_on_what_it_does_not_know():
    assert list(prunable(Forwarding(Declaring()))) == ["inner.layer.stacked", "inner.head.weight"]


def test_optimizers_of_wrapped_models(group):
    for wrap in WRAPPERS.values():
        model = wrap(Declaring())
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        assert list(cb.optim.CrAM(model, base, Magnitude(0.5)).prunable) == ["layer.stacked", "head.weight"]
        masks = cb.compress.Magnitude(0.5).masks(prunable(Declaring()))
        held = cb.optim.HeldMasks(model, base, masks)
        assert zeros_among(model) == masks.zeros
        assert held.masks.dense == masks.dense != {}


def test_a_transposed_weight_is_grouped_by_its_inputs_in_training_too():
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 3, 1, bias=False)  # 3 outputs do not divide by 4
    optimizer = cb.optim.CrAM(model, torch.optim.SGD(model.parameters(), lr=0.1), NM(2, 4), mask_interval=2)
    assert optimizer.draw.apply_().zeros == 6
    again = cb.optim.CrAM(model, torch.optim.SGD(model.parameters(), lr=0.1), NM(2, 4), mask_interval=2)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.draw.held[0]["weight"], optimizer.draw.held[0]["weight"])


def test_layer_probes_of_a_wrapped_model():
    batches = [(torch.randn(6, 3, 3, 3), torch.arange(6) % 4)]
    model = network()
    for probe in (
        lambda m: cb.probes.layer_sensitivity(m, batches, [0.5]),
        lambda m: cb.probes.layer_blame(m, batches, "global@0.5"),
        lambda m: cb.probes.sparsity_curve(m, batches, ["global@0.5"]),
    ):
        plain = probe(model)
        for wrapped in (AveragedModel(model), DataParallel(model)):  # where values lie in memory moves their last digit
            pd.testing.assert_frame_equal(plain, probe(wrapped), rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    def __init__(self, order):
        super().__init__()
        embedding, linear, between = nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(4, 4)
        linear.weight = embedding.weight
        parts = {"embedding": embedding, "head": linear, "between": between}
        for name in order:
            setattr(self, name, parts[name])


@pytest.mark.parametrize("order", [["embedding", "between", "head"], ["head", "between", "embedding"]])
def test_a_tied_head_is_an_embedding_whatever_comes_first(order):
    model = Tied(order)
    weights = prunable(model)
    assert list(weights) == ["between.weight"]
    assert weights.dense == {f"{order[0]}.weight": (20, "shared with an embedding")}
    for alias in ("embedding", "head"):
        Masks({f"{alias}.weight": torch.zeros(5, 4)}).apply_(tied := Tied(order))
        assert zeros_among(tied) == 20

    class Deciding(Tied):
        def prunable(self):
            return ["head.weight"]

    assert sizes(prunable(Deciding(order))) == {f"{order[0]}.weight": 20}
    outside = nn.ModuleList([Deciding(order), nn.Embedding(5, 4)])
    outside[1].weight = outside[0].head.weight
    with pytest.raises(ValueError, match="no prunable weight"):
        prunable(outside)


@pytest.mark.parametrize("first", [0, 1])
def test_a_shared_layer_counts_once(first):
    shared = nn.Linear(3, 3)
    listed = nn.ParameterList([shared.weight])
    model = nn.ModuleList([listed, shared] if first else [shared, listed])
    assert sizes(prunable(model)) == {"0.0" if first else "0.weight": 9}
    assert prunable(model).dense == {}
    for alias in ("0.0", "1.weight") if first else ("0.weight", "1.0"):
        with pytest.raises(ValueError, match=r"no prunable weight.*dense: .* 9 \(excluded\)"):
            prunable(model, exclude=[alias])


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "weight_norm": (
        parametrizations.weight_norm,
        "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    ),
    "spectral_norm": (
        parametrizations.spectral_norm,
        "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    ),
    "prune": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        "torch.nn.utils.prune.remove(module, 'weight')",
    ),
    "old weight_norm": (old_weight_norm, "torch.nn.utils.remove_weight_norm(module, 'weight')"),
    "old spectral_norm": (nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm(module, 'weight')"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused_with_the_remedy(kind, wrap):
    apply, remedy = COMPUTED[kind]
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(apply(nn.Conv2d(4, 4, 3))))
    model = wrap(inner)
    for call in (
        lambda: prunable(model),
        lambda: sparsity(model),
        lambda: cb.compress.apply_(model, "global@0.9"),
        lambda: Masks({"1.0.weight": torch.zeros(4, 4, 3, 3)}).apply_(model),
        lambda: cb.optim.CrAM(model, torch.optim.SGD(model.parameters(), lr=0.1), Magnitude(0.5)),
    ):
        before = copy.deepcopy(inner.state_dict())
        with pytest.raises(
            ValueError, match=r"^1\.0\.weight is computed from other parameters at every use"
        ) as refused:
            call()
        assert remedy in str(refused.value)
        assert "\n" not in str(refused.value)
        assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())

    left = prunable(model, exclude=["1.0.weight"])
    assert list(left) == ["0.weight"]
    plain = dict(inner.named_parameters())
    assert {name: count for name, (count, _) in left.dense.items()} == {
        name: p.numel() for name, p in plain.items() if p.ndim > 1 and name != "0.weight"
    }
    assert {reason for _, reason in left.dense.values()} == {"1.0.weight is computed from it"}

    said = str(refused.value)
    names = {"torch": torch, "model": model}
    exec(said.partition("module = ")[1] + said.partition("module = ")[2].partition(", or leave")[0], names)
    exec(remedy, names)  # the remedy is one
    assert sizes(prunable(model)) == {"0.weight": 108, "1.0.weight": 144}
    cb.compress.apply_(model, "global@0.9")
    assert int((inner[1][0].weight == 0).sum()) + int((inner[0].weight == 0).sum()) == round(0.9 * 252)


def test_other_computed_weights():
    recurrent = nn.ModuleList([parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")])
    with pytest.raises(
        ValueError, match=r"0\.weight_hh_l0 is computed .*remove_parametrizations\(module, 'weight_hh_l0'\)"
    ):
        prunable(recurrent)
    bias = prune.l1_unstructured(nn.Linear(3, 4), "bias", 0.5)  # no matrix
    assert list(prunable(bias)) == ["weight"]
    embedding = nn.Sequential(parametrizations.weight_norm(nn.Embedding(5, 4)), nn.Linear(4, 2))  # not prunable anyway
    assert list(prunable(embedding)) == ["1.weight"]
    assert {reason for _, reason in prunable(embedding).dense.values()} == {"0.weight is computed from it"}

    class Deciding(nn.Sequential):
        named = "1.weight"

        def prunable(self):
            return [self.named]

    deciding = Deciding(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    assert list(prunable(deciding)) == ["1.weight"]
    for deciding.named in ("0.weight", "0.parametrizations.weight.original1"):
        with pytest.raises(ValueError, match=r"0\.weight is computed from other"):
            prunable(deciding)


def test_lazy_layers_are_refused_until_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyConv1d(3, 1))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: run a batch through the model first"):
        prunable(model)
    model(torch.randn(2, 5, 3))
    assert sizes(prunable(model)) == {"0.weight": 12, "2.weight": 15}


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ("weight", TypeError, "must return a list of parameter names, not 'weight'"),
        (None, TypeError, "must return a list of parameter names, not None"),
        (["weight", 3], ValueError, "names '3', which is not a parameter of it"),
    ],
)
def test_what_a_model_may_answer(answer, kind, message):
    class Answering(nn.Linear):
        def prunable(self):
            return answer

    with pytest.raises(kind, match=f"Answering.prunable\\(\\) {message}"):
        prunable(Answering(2, 2))


def test_sharded_weights_are_refused(group):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Linear(4, 4), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="weight is sharded over devices: compress the model before fully_shard"):
        prunable(model)


def test_excluded_matrices_are_named():
    model = network()
    weights = prunable(model, exclude=["0.*", "1.*"])
    assert weights.dense == {"0.weight": (216, "excluded")}
    masks = cb.compress.apply_(model, "uniform@0.5", exclude={"0.weight": None}.keys())
    assert masks.dense == weights.dense
    assert masks.dense_weights == 216
    assert repr(masks) == (
        "Masks(1 tensors, 16 of 32 weights zero, sparsity 0.5000; 216 dense: 0.weight 216 (excluded))"
    )


@pytest.mark.parametrize("one_shot", [iter, lambda patterns: (pattern for pattern in patterns)])
def test_an_iterator_of_patterns_is_refused_by_everything_that_excludes(one_shot):
    """It would be empty from the second row of a table on."""
    model, batches = network(), [(torch.randn(6, 3, 3, 3), torch.arange(6) % 4)]
    for call in (
        lambda e: prunable(model, e),
        lambda e: sparsity(model, e),
        lambda e: cb.compress.apply_(model, "2:4", e),
        lambda e: cb.compress.compressed(model, "2:4", e),
        lambda e: cb.probes.sparsity_curve(model, batches, ["2:4", "global@0.5"], exclude=e),
        lambda e: cb.probes.layer_sensitivity(model, batches, exclude=e),
        lambda e: cb.probes.layer_profile(model, "2:4", e),
        lambda e: cb.probes.layer_blame(model, batches, "2:4", e),
        lambda e: cb.probes.weight_histogram(model, exclude=e),
        lambda e: cb.optim.CrAM(model, torch.optim.SGD(model.parameters(), lr=0.1), Magnitude(0.5), exclude=e),
    ):
        with pytest.raises(TypeError, match="exclude is read more than once, so it must be a list of patterns, not <"):
            call(one_shot(["0.*"]))
        call(("0.*",))
    curve = cb.probes.sparsity_curve(network(), batches, ["global@0.5", "global@0.9"], exclude=["0.*"])
    assert curve["dense_weights"].tolist() == [216, 216, 216]


def test_masks_keep_what_is_dense_in_their_file(tmp_path):
    model = nn.Sequential(nn.Embedding(3, 4), nn.Conv1d(3, 4, 1), nn.Linear(4, 2))
    masks = NM(2, 4).masks(prunable(model))
    assert masks.dense == {
        "0.weight": Dense(12, "embedding"),
        "1.weight": Dense(12, "its 3 inputs do not divide into groups of 4"),
    }
    assert (masks.zeros, masks.count, masks.dense_weights) == (4, 20, 24)
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert loaded.dense == masks.dense
    assert isinstance(loaded.dense["0.weight"], Dense)
    assert repr(loaded) == repr(masks)
    assert Masks.of(prunable(model)).dense == {"0.weight": (12, "embedding")}
    assert Masks({"w": torch.ones(2)}).dense == {}


@pytest.mark.parametrize("dense", ["[]", "{", '{"w": 3}', '{"w": ["many", "why"]}'])
def test_a_file_that_does_not_say_what_is_dense_is_refused(dense, tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", {"dense": dense})
    with pytest.raises(ValueError, match=r"m\.safetensors does not hold masks"):
        Masks.load(tmp_path / "m.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", {"format": "pt"})  # of another tool
    assert Masks.load(tmp_path / "m.safetensors").dense == {}


def test_the_compressor_of_somebody_else_names_them_too():
    class Nothing(Compressor):
        sparsity, pattern = 0.0, "nothing"

        def masks(self, weights):
            return Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})

    masks = cb.compress.apply_(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)), Nothing())
    assert masks.dense == {"0.weight": (12, "embedding")}


def test_the_table_counts_what_is_dense():
    model = cb.models.create("vit_tiny", 3, in_channels=1, image_size=8)
    batches = [(torch.randn(4, 1, 8, 8), torch.arange(4) % 3)]
    curve = cb.probes.sparsity_curve(model, batches, ["global@0.5", "2:4", "uniform-reference@0.5"])
    known = prunable(model)
    named = sum(count for count, _ in known.dense.values())
    assert named == model.token.numel() + model.positions.numel()
    not_divided = sum(w.numel() for w in known.values() if w.shape[1] % 4)
    ends = sum(w.numel() for w in (next(iter(known.values())), next(reversed(known.values()))))
    assert curve["dense_weights"].tolist() == [named, named, named + not_divided, named + ends]


def reference(weight, n, m):
    """The authors' grouping, by hand: one value after the other, channels last."""
    order = [
        (o, i, y, x)
        for o in range(weight.shape[0])
        for y in range(weight.shape[2])
        for x in range(weight.shape[3])
        for i in range(weight.shape[1])
    ]
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for start in range(0, len(order), m):
        group = sorted(order[start : start + m], key=lambda place: abs(float(weight[place])))
        for place in group[m - n :]:
            mask[place] = True
    return mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_reference_grouping_of_n_of_m(n, m, layout):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(16, 3, 3, 3, generator=generator).to(memory_format=layout)  # 3 channels
    inner = torch.randn(3, 24, 3, 3, generator=generator).to(memory_format=layout)
    linear = torch.randn(8, 9, generator=generator)  # 9 inputs: groups go on in the next row
    masks = NM(n, m, reference=True).masks({"first": first, "inner": inner, "linear": linear})
    assert torch.equal(masks["first"], reference(first, n, m))
    assert torch.equal(masks["inner"], reference(inner, n, m))
    assert torch.equal(masks["linear"], reference(linear[:, :, None, None], n, m)[:, :, 0, 0])
    assert masks.sparsity == pytest.approx(1 - n / m, abs=1e-12)
    assert masks.dense == {}
    assert torch.equal(masks["inner"], NM(n, m).masks({"inner": inner})["inner"])  # where channels divide they agree
    assert NM(n, m).dense({"first": first, "linear": linear}) == ([] if m == 3 else ["first", "linear"])


def test_reference_grouping_leaves_what_the_authors_leave():
    weights = {"odd": torch.ones(3, 3), "kernel": torch.ones(4, 4, 3), "cube": torch.ones(2, 2, 2, 2, 2)}
    masks = NM(2, 4, reference=True).masks(weights)
    assert masks.zeros == 0
    assert masks.dense == {
        "odd": (9, "its 9 weights do not divide into groups of 4"),
        "kernel": (48, "2:4-reference groups tensors of 2 or 4 dimensions, not of 3"),
        "cube": (32, "2:4-reference groups tensors of 2 or 4 dimensions, not of 5"),
    }
    assert cb.compress.parse("2:4-reference") == NM(2, 4, reference=True) != NM(2, 4)
    assert str(NM(4, 8, reference=True)) == NM(4, 8, reference=True).pattern == "4:8-reference"
    assert cb.compress.parse("2:4-reference+int8").prune == NM(2, 4, reference=True)
    assert cb.compress.grid(["2:4-reference"], [0.5]) == [NM(2, 4, reference=True)]


HALF = [torch.float16, torch.bfloat16]


@given(st.integers(0, 2**32), st.sampled_from(HALF), st.integers(2, 16), st.integers(-130, 4))
@settings(max_examples=60, deadline=None)
def test_half_precision_is_quantized_as_in_float64(seed, dtype, bits, exponent):
    weight = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(seed)).mul_(2.0**exponent).to(dtype)
    found = quantized(weight, bits)
    assert found.dtype is dtype
    exact = weight.double()
    scale = exact.abs().amax((1, 2), keepdim=True) / (2 ** (bits - 1) - 1)
    levels = (exact / torch.where(scale > 0, scale, 1)).round() * scale
    assert torch.equal(found, levels.to(dtype))
    assert torch.equal(found.flatten(1).any(1), weight.flatten(1).any(1))  # no channel is lost


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_no_channel_is_lost_however_small(bits, dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    weight = torch.tensor([[1.0, -3.0, 0.0, 2.0]], dtype=dtype) * smallest
    assert weight.count_nonzero() == 3
    error = (quantized(weight, bits).double() - weight.double()).abs().max()
    assert error <= (0 if dtype is torch.float64 else 1.5 / 127 * smallest)


@given(st.integers(0, 2**32), st.integers(2, 16))
@settings(max_examples=40, deadline=None)
def test_single_precision_is_quantized_as_before(seed, bits):
    weight = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(seed))
    weight[3] = 0
    scale = (weight.abs().flatten(1).amax(1) / (2 ** (bits - 1) - 1)).view(-1, 1, 1)
    scale[3] = 1
    assert torch.equal(quantized(weight, bits), (weight / scale).round() * scale)


@pytest.mark.parametrize("spec", ["global@0.5", "uniform@0.5", "global-reference@0.5", "2:4", "2:4-reference", "int16"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_models_are_compressed_like_their_copies_in_double(spec, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 4)).to(dtype)
    exact = copy.deepcopy(model).double()
    masks, theirs = (cb.compress.apply_(one, spec) for one in (model, exact))
    assert masks.zeros == theirs.zeros
    assert all(torch.equal(masks[name], theirs[name]) for name in masks)
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(one, other.to(dtype))


def test_a_vector_that_the_model_names_is_its_own_scale():
    class Deciding(nn.Linear):
        def prunable(self):
            return ["weight", "bias"]

    layer = Deciding(4, 3)
    bias = layer.bias.detach().clone()
    cb.compress.apply_(layer, Quantize(8))
    torch.testing.assert_close(layer.bias.detach(), bias)


def leaf(kind):
    return {
        "linear": lambda: nn.Linear(4, 3),
        "conv": lambda: nn.Conv2d(4, 2, 3),
        "transposed": lambda: nn.ConvTranspose1d(4, 6, 2, groups=2),
        "embedding": lambda: nn.Embedding(3, 4),
        "recurrent": lambda: nn.GRU(4, 2),
        "norm": lambda: nn.LayerNorm([2, 4]),
        "experts": Experts,
        "declaring": Declaring,
        "own": Positions,
    }[kind]()


KINDS_OF_LEAF = ["linear", "conv", "transposed", "embedding", "recurrent", "norm", "experts", "declaring", "own"]


@given(
    st.lists(st.sampled_from(KINDS_OF_LEAF), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["again", "compiled", "averaged", "inside"])), max_size=3),
    st.sampled_from(["global@0.5", "uniform@0.7", "2:4", "2:4-reference", "4:8"]),
    st.lists(st.integers(0, 4), max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_prunable_and_dense_are_all_matrices(kinds, changes, spec, excluded):
    torch.manual_seed(0)
    parts = [leaf(kind) for kind in ["linear", *kinds]]
    for index, change in changes:
        one = parts[index % len(parts)]
        if change == "compiled" and "_orig_mod" in one._modules:
            change = "again"  # torch refuses to compile a container twice
        wrap = {"compiled": torch.compile, "averaged": AveragedModel, "inside": lambda m: nn.ModuleList([m])}
        parts.append(wrap[change](one) if change in wrap else one)
    model = nn.ModuleList(parts)
    patterns = sorted({f"{index % len(kinds) + 1}.*" for index in excluded})
    weights = prunable(model, patterns)
    assert len({*map(id, weights.values())}) == len(weights)
    assert not weights.keys() & weights.dense.keys()
    every = [p for p in model.parameters() if p.ndim > 1]  # by identity
    assert len(weights) + len(weights.dense) == len(every)
    named = sum(sizes(weights).values()) + sum(count for count, _ in weights.dense.values())
    assert named == sum(p.numel() for p in every)
    known = cb.compress.lookup(model)
    assert {id(known[name]) for name in [*weights, *weights.dense]} == {id(p) for p in every}

    before = zeros_among(model)
    masks = cb.compress.apply_(model, spec, patterns)
    assert zeros_among(model) - before == masks.zeros
    assert all(bool(masks[name].all()) for name in masks.dense if name in masks)
    if spec.startswith("global"):
        assert masks.zeros == round(0.5 * masks.count)
