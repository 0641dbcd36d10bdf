"""Structures of networks, physically smaller copies of them, their folders and their latencies."""

import copy
import itertools
import json
import re
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import cram_bench as cb
from cram_bench import deploy, prune, runs
from cram_bench.deploy.latency import _calls
from cram_bench.deploy.structure import BiasMap, read
from cram_bench.files import sealed, sha256, unsealed
from cram_bench.models.resnet import Block, ResNet
from cram_bench.models.vit import ViT
from cram_bench.prune.structured import structures, widths


class Text(nn.Module):
    """A small encoder of transformers' BERT as `Encoder` has it, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
        )
        self.body, self.classifier = BertModel(config, add_pooling_layer=False), nn.Linear(24, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        present = ids != 0
        hidden = self.body(input_ids=ids, attention_mask=present.long()).last_hidden_state
        return self.classifier((hidden * present[..., None]).sum(1) / present.sum(1, keepdim=True))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=24, n_layer=2, n_head=3, pad_token_id=0, num_labels=3)
    return GPT2ForSequenceClassification(config)


def ids(count: int = 6, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(1, 30, (count, 7), generator=torch.Generator().manual_seed(seed))
    return drawn.masked_fill(torch.arange(7) > 2 + torch.arange(count)[:, None] % 5, 0)


def images(count: int = 4, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def torchvision() -> nn.Module:
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.resnet import ResNet as Theirs

    return Theirs(BasicBlock, [1, 1, 1, 1], num_classes=3)


MODELS = {
    "bert": (Text, ids),
    "gpt2": (gpt2, ids),
    "vit": (lambda: ViT(3, image_size=16, dim=24, depth=2, heads=3), images),
    "resnet": (lambda: ResNet((1, 2), 8, 3), images),
    "resnet-projection": (lambda: ResNet((1, 1), 8, 3, project=True), lambda: images(side=15)),
    "torchvision": (torchvision, images),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """A model with all that initialisation leaves at zero or one drawn too, and a batch for it."""
    torch.manual_seed(0)
    build, batch = MODELS[name]
    model, inputs = build().to(dtype).eval(), batch()
    with torch.no_grad():
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and tensor.ndim == 1 and tensor.is_floating_point():
                    tensor.copy_(0.3 + torch.rand(tensor.shape, dtype=dtype))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # so that attention is not even
    return model, inputs.to(dtype) if inputs.is_floating_point() else inputs


def logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return cb.outputs.logits_of(model(inputs))


def masked(model: nn.Module, kept: dict) -> nn.Module:
    """A copy in which the weights of units that went are zero: the columns of what follows them, by hand."""
    model = copy.deepcopy(model)
    for name, units in kept.items():
        each = structures(model)[name]
        module = model.get_submodule(each.output)
        gone = [u * each.size + i for u in range(each.count) if u not in units for i in range(each.size)]
        with torch.no_grad():
            if type(module).__name__ == "Conv1D":
                module.weight[gone] = 0
            else:
                module.weight[:, gone] = 0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_what_is_shrunk_answers_as_what_is_masked(name: str) -> None:
    """Any units of any structure, all of one and all of all at once; and nothing changes the model."""
    model, inputs = made(name)
    found, before = structures(model), copy.deepcopy(model.state_dict())
    some = {key: [u for u in range(each.count) if u % 3 != 1] for key, each in found.items()}
    cases = [
        some,
        {key: () for key in found},
        *({key: ()} for key in found),
        {key: [each.count - 1] for key, each in found.items()},
        {},
        {key: range(each.count) for key, each in found.items()},
    ]
    dense = logits(model, inputs)
    for kept in cases:
        small = deploy.shrink(model, kept)
        assert (logits(small, inputs) - logits(masked(model, kept), inputs)).abs().max() < 1e-10
        gone = any(len(tuple(units)) < found[key].count for key, units in kept.items())
        assert gone != torch.equal(logits(small, inputs), dense)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_units_that_stay(name: str) -> None:
    """Counted by hand: a unit's outputs of what leads to it, biases and BatchNorm too, and inputs of what follows."""
    model, _ = made(name)
    found = structures(model)
    whole = sum(tensor.numel() for tensor in model.state_dict().values())
    for key, each in found.items():
        output = model.get_submodule(each.output).weight
        unit = output.numel() // each.count
        for part in each.inputs:
            tensors = model.get_submodule(part).state_dict().values()
            unit += sum(tensor.numel() for tensor in tensors if tensor.ndim) // each.count
        small = deploy.shrink(model, {key: range(each.count - 1)})
        assert whole - sum(tensor.numel() for tensor in small.state_dict().values()) == unit
        for parameter in small.parameters():
            assert parameter.is_contiguous() or parameter.ndim == 4
            assert parameter.requires_grad


def test_structures_are_those_of_the_house_s_networks() -> None:
    """Heads of 32 or 64 features, four times the width, channels of every block."""
    found = structures(cb.models.create("vit_tiny", 10))
    assert len(found) == 24
    assert (found["layers.3.heads"].count, found["layers.3.heads"].size, found["layers.3.heads"].packed) == (3, 64, 3)
    assert found["layers.11.columns"].count == 768
    found = structures(cb.models.create("resnet20", 10))
    assert [each.count for each in found.values()] == [16] * 3 + [32] * 3 + [64] * 3
    assert len(structures(cb.models.create("torchvision:resnet18", 10))) == 8
    bert = structures(Text())
    assert list(bert) == [f"body.encoder.layer.{i}.{kind}" for i in range(2) for kind in ("heads", "columns")]
    assert bert["body.encoder.layer.1.heads"].output == "body.encoder.layer.1.attention.output.dense"
    for model in (nn.Linear(3, 3), cb.models.create("vgg16_bn", 10), cb.models.create("torchvision:resnet50", 10)):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no structures that are known"):
            structures(model)


def test_minilm_has_twelve_heads_and_1536_columns_a_layer() -> None:
    model = cb.models.create("minilm", 2)
    found = structures(model)
    assert [(each.kind, each.count, each.size) for each in found.values()] == [
        ("heads", 12, 32),
        ("columns", 1536, 1),
    ] * 6
    kept = {name: range(0, each.count, 2) for name, each in found.items()}
    words = torch.tensor([[101, 2023, 2003, 102], [101, 102, 0, 0]])
    small = deploy.shrink(model.eval(), kept)
    assert (logits(small, words) - logits(masked(model, kept), words)).abs().max() < 1e-5
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == 6 * (
        6 * (4 * 384 * 32 + 3 * 32) + 768 * (2 * 384 + 1)
    )


def test_widths_are_multiples_of_sixteen_from_all_to_none() -> None:
    found = widths(1536)
    assert found[:5] == [1536, 1392, 1248, 1120, 1008]  # ⌈0.9ⁱ · 1536⌉ = 1383, 1245, 1120, 1008
    assert found[-2:] == [16, 0]
    assert all(width % 16 == 0 for width in found)
    assert all(a > b for a, b in itertools.pairwise(found))
    assert widths(100)[:3] == [100, 96, 84]  # in steps of 12
    assert widths(1) == [1, 0]
    assert widths(7)[-3:] == [2, 1, 0]


def test_a_shrunk_network_can_be_shrunk_again_and_trained() -> None:
    """As a gradual pruner does: units are counted anew, and what was dropped is no structure any more."""
    for name in MODELS:
        model, inputs = made(name, torch.float32)
        first = {
            key: (() if i == 0 else range(each.count - 1)) for i, (key, each) in enumerate(structures(model).items())
        }
        small = deploy.shrink(model, first)
        found = structures(small) if len(first) > 1 else {}
        assert list(found) == list(first)[1:]
        again = deploy.shrink(small, {key: range(1, each.count) for key, each in found.items()})
        expected = masked(model, {key: range(1, len(tuple(units))) for key, units in first.items()})
        assert (logits(again, inputs) - logits(expected, inputs)).abs().max() < 1e-4
        again.train()
        cb.outputs.logits_of(again(inputs)).sum().backward()
        for each in structures(again).values() if len(first) > 1 else ():
            for part in (*each.inputs, each.output):
                gradient = again.get_submodule(part).weight.grad
                assert gradient is not None
                assert gradient.shape == again.get_submodule(part).weight.shape


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_network_back(name: str, tmp_path: Path) -> None:
    """Structure before weights, bit for bit, into a freshly built network; the file is as large as `size` says."""
    model, inputs = made(name, torch.float32)
    kept = {key: (() if i % 2 else range(1, each.count)) for i, (key, each) in enumerate(structures(model).items())}
    small = deploy.shrink(model, kept)
    deploy.save(small, kept, tmp_path / "small")
    fresh = MODELS[name][0]()
    back = deploy.load(fresh, tmp_path / "small").eval()
    assert torch.equal(logits(back, inputs), logits(small, inputs))
    assert read(tmp_path / "small" / "structure.json") == {key: list(units) for key, units in kept.items()}
    weights = tmp_path / "small" / "model.safetensors"
    assert deploy.size(small) == weights.stat().st_size < 0.95 * deploy.size(model)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit .* of that structure: .*missing|shape"):
        write_structure(tmp_path / "small", {key: list(range(each.count)) for key, each in structures(model).items()})
        deploy.load(fresh, tmp_path / "small")


def write_structure(folder: Path, kept: object, **more: object) -> None:
    (folder / "structure.json").write_text(sealed({"format": 1, "kept": kept} | more, "structure.json"))


def test_a_damaged_structure_is_named_in_one_line(tmp_path: Path) -> None:
    model, _ = made("resnet", torch.float32)
    kept = {"layer1.0.channels": [0, 1]}
    small = deploy.shrink(model, kept)
    deploy.save(small, kept, tmp_path)
    file = tmp_path / "structure.json"
    sound = file.read_text()
    cases = [
        (lambda: file.write_text(sound.replace("1\n", "2\n")), "checksum"),
        (lambda: file.write_text(sound[:30]), "structure.json is damaged or no structure"),
        (lambda: file.write_bytes(b"\xff\xfe"), "structure.json is damaged or no structure"),
        (lambda: write_structure(tmp_path, kept, format=2), "format 2, and this version reads 1"),
        (lambda: write_structure(tmp_path, [1]), "no mapping to lists of units"),
        (lambda: write_structure(tmp_path, {"layer1.0.channels": 3}), "no mapping to lists of units"),
        (lambda: file.write_text(sealed({"format": 1}, "structure.json")), "it has no 'kept'"),
        (lambda: write_structure(tmp_path, {"layer1.9.channels": []}), "unknown structure 'layer1.9.channels'"),
        (lambda: write_structure(tmp_path, {"layer1.0.channels": [8]}), "from 0 to 7, not 8"),
        (lambda: write_structure(tmp_path, {"layer1.0.channels": ["a"]}), "must be an integer, not 'a'"),
        (lambda: write_structure(tmp_path, {"layer1.0.channels": [1, 1]}), "must differ"),
        (
            lambda: write_structure(tmp_path, {"layer1.0.channels": [0]}),
            "model.safetensors does not fit ResNet of that",
        ),
    ]
    for damage, words in cases:
        damage()
        with pytest.raises(ValueError, match=words.replace(".", r"\.")) as error:
            deploy.load(model, tmp_path)
        assert "\n" not in str(error.value)
        assert str(tmp_path) in str(error.value)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="structure.json"):
        deploy.load(model, tmp_path)
    with pytest.raises(ValueError, match="has 2 units, and structure says 3"):
        deploy.save(small, {"layer1.0.channels": [0, 1, 2]}, tmp_path)
    with pytest.raises(ValueError, match="has 0 units, and structure says 1"):
        deploy.save(small, {"layer1.8.channels": [0]}, tmp_path)
    assert json.loads(sound)["kept"] == kept


def test_wrong_structures_are_refused() -> None:
    model, _ = made("resnet", torch.float32)
    for structure, kind, words in [
        ({"layer1.0.chanels": []}, ValueError, "did you mean 'layer1.0.channels'"),
        ({"layer1.0.channels": [8]}, ValueError, "a unit of 'layer1.0.channels' must be from 0 to 7, not 8"),
        ({"layer1.0.channels": [-1]}, ValueError, "from 0 to 7, not -1"),
        ({"layer1.0.channels": [1, 1]}, ValueError, "must differ"),
        ({"layer1.0.channels": 3}, TypeError, "must be a list of units, not 3"),
        ([1], TypeError, "structure must be a mapping"),
    ]:
        with pytest.raises(kind, match=words) as error:
            deploy.shrink(model, structure)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="model must be a torch model"):
        deploy.shrink(None, {})


class Clock:
    """Time that passes with the multiplications of what runs: no test waits, and latencies are known by hand."""

    def __init__(self) -> None:
        self.now, self.warm = 0.0, set()

    def __call__(self) -> float:
        return self.now

    def attend(self, model: nn.Module) -> None:
        def count(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            positions = output.numel() // output.shape[-1 if output.ndim == 3 else 1] if output.numel() else 0
            self.now += module.weight.numel() * positions
            if id(module) not in self.warm:  # a first run takes longer
                self.now += 1e9
                self.warm.add(id(module))

        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(count)


@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "resnet-projection"])
def test_latencies_are_those_of_each_option(name: str) -> None:
    """Under a clock of multiplications: as many as the layers of a structure have at that width, and an exact sum."""
    model, inputs = made(name, torch.float32)
    clock = Clock()
    clock.attend(model)
    table = deploy.latency(model, inputs, repeats=1, clock=clock)
    found = structures(model)
    rows = table.set_index(["structure", "units"])["seconds"]
    for key, each in found.items():
        assert [units for at, units in rows.index if at == key] == each.options
        assert rows[key, 0] == 0
        parts = [model.get_submodule(part).weight for part in (*each.inputs, each.output)]
        first = each.name.startswith("layer1")
        area = {
            "bert": 6 * 7,
            "vit": 4 * 17,
            "resnet": 4 * (256 if first else 64),
            "resnet-projection": 4 * (225 if first else 64),  # whose shortcut cannot be removed
        }[name]
        unit = sum(part.numel() for part in parts if part.ndim > 1) // each.count
        assert [rows[key, units] for units in each.options] == [area * unit * units for units in each.options]
    whole = rows["fixed", 0] + sum(rows[key, each.count] for key, each in found.items())
    assert rows["dense", 0] == whole
    assert set(table["kind"]) == {"fixed", "dense", *(each.kind for each in found.values())}
    assert table["batch"].unique().tolist() == [len(inputs)]
    assert table["length"].unique().tolist() == [7 if name == "bert" else 0]
    assert table["precision"].unique().tolist() == ["float32"]


def test_layers_that_are_alike_but_for_what_they_see_are_measured_apart() -> None:
    torch.manual_seed(0)
    model, clock = nn.Sequential(Block(8, 8, 1, False), nn.MaxPool2d(2), Block(8, 8, 1, False)), Clock()
    clock.attend(model)
    rows = deploy.latency(model, torch.randn(2, 8, 8, 8), repeats=1, clock=clock).set_index(["structure", "units"])
    assert rows["seconds"]["0.channels", 8] == 4 * rows["seconds"]["2.channels", 8] > 0


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.Conv2d(4, 5, (3, 2), dilation=(2, 1), padding=(2, 0), stride=(1, 3), bias=False),
        nn.Conv2d(4, 5, 3, padding="same", dilation=2),
        nn.Conv2d(4, 5, 4, padding="valid"),
    ],
    ids=str,
)
def test_what_is_left_of_a_convolution_is_what_it_is_at_zero(convolution: nn.Conv2d) -> None:
    x = torch.randn(2, 4, 9, 11)
    with torch.no_grad():
        convolution.weight.zero_()
        assert torch.equal(BiasMap(convolution, 5)(x), convolution(x))
        assert BiasMap(convolution, 0)(x).shape == (2, 0, *convolution(x).shape[2:])


def test_what_is_frozen_stays_frozen() -> None:
    model, _ = made("resnet", torch.float32)
    model.layer1[0].conv1.weight.requires_grad_(False)
    small = deploy.shrink(model, {"layer1.0.channels": [0, 3]})
    assert [p.requires_grad for p in small.layer1[0].parameters()] == [False, True, True, True, True, True]


def test_a_table_can_be_kept(tmp_path: Path) -> None:
    """As CSV, and read back the same; of GPT-2, whose cache must not grow from run to run; in bfloat16."""
    model, inputs = made("gpt2", torch.float32)
    state = copy.deepcopy(model.state_dict())
    types = set()
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, output: types.add(output.dtype))
    (args, kwargs), *_ = _calls(model, ["transformer.h.0"], lambda: model(inputs)).values()
    assert model.config.use_cache
    assert not any(type(value).__name__.endswith("Cache") for value in (*args, *kwargs.values()))
    types.clear()
    table = deploy.latency(model, inputs, precision="bfloat16", repeats=1)
    assert types == {torch.bfloat16}
    table.to_csv(tmp_path / "table.csv", index=False)
    again = pd.read_csv(tmp_path / "table.csv")
    pd.testing.assert_frame_equal(table, again, check_dtype=False, rtol=1e-12)
    assert table["precision"].unique().tolist() == ["bfloat16"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for wrong, words in [
        ({"precision": "float8"}, "unknown precision 'float8'"),
        ({"repeats": 0}, "repeats must be at least 1, not 0"),
        ({"forward": lambda network, x: None}, "do not run"),
    ]:
        with pytest.raises(ValueError, match=words):
            deploy.latency(model, inputs, **wrong)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on digits whose network has structures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRAM_BENCH_RUNS", str(tmp_path_factory.mktemp("runs")))
        return runs.ensure(cb.recipes.recipe("digits", "sgd", epochs=1, model="resnet20"), progress=False)


def test_a_run_holds_a_shrunk_network(whole, tmp_path: Path) -> None:
    """It is loaded bit for bit, by a folder, and copied whole; a run without one is whole, and loads as ever."""
    model = whole.load_model()
    kept = {"layer1.0.channels": [0, 3, 5], "layer2.1.channels": [], "layer3.0.channels": range(1, 64)}
    small = deploy.shrink(model, kept)
    run = runs.write_shrunk(whole, small, kept, tmp_path / "small")
    assert whole.structure is None
    assert run.structure == {name: list(units) for name, units in kept.items()}
    loaded, inputs = runs.Store().open(tmp_path / "small").load_model(), torch.randn(5, 1, 8, 8)
    assert torch.equal(logits(loaded, inputs), logits(small, inputs))
    assert run.experiment == whole.experiment
    pd.testing.assert_frame_equal(run.history, whole.history)
    copied = runs.Run.open(runs.copy(run, tmp_path / "copies"))
    assert torch.equal(logits(copied.load_model(), inputs), logits(small, inputs))
    again = {"layer1.0.channels": [2], "layer1.1.channels": [7]}
    both = deploy.composed(kept, again)
    assert both["layer1.0.channels"] == [5]
    third = runs.write_shrunk(run, deploy.shrink(small, again), both, tmp_path / "smaller").load_model()
    assert torch.allclose(logits(third, inputs), logits(deploy.shrink(model, both), inputs), atol=1e-5)
    with pytest.raises(ValueError, match="small is there already: name a new folder"):
        runs.write_shrunk(whole, small, kept, tmp_path / "small")
    with pytest.raises(ValueError, match="has 3 units, and structure says 2"):
        runs.write_shrunk(whole, small, kept | {"layer1.0.channels": [0, 1]}, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copies", "small", "smaller"]


def test_a_smaller_network_is_trained_stage_by_stage_with_a_teacher(whole) -> None:
    """Prune, distil, prune what is left, distil: each run holds its network, in terms of the whole one."""
    store = runs.Store(whole.path.parent)
    first = whole.experiment.but(
        start=whole.id, pruning="structured", units="8 16 0 32 32 32 64 64 40", looked_at=64, loss="distil",
        teacher=whole.id,
    )  # fmt: skip
    one = runs.ensure(first, store, progress=False)
    found = structures(whole.load_model())
    assert [len(one.structure[name]) for name in found] == [8, 16, 0, 32, 32, 32, 64, 64, 40]
    left = structures(one.load_model())
    assert [each.count for each in left.values()] == [8, 16, 32, 32, 32, 64, 64, 40]  # what is gone counts no more
    two = runs.ensure(first.but(start=one.id, units="8 10 32 32 32 64 64 20"), store, progress=False)
    assert [len(two.structure[name]) for name in found] == [8, 10, 0, 32, 32, 32, 64, 64, 20]
    assert all(set(two.structure[name]) <= set(one.structure[name]) for name in found)
    three = runs.ensure(whole.experiment.but(start=two.id, lr=0.01), store, progress=False)  # trained on, unpruned
    assert three.structure == two.structure
    _, test = whole.experiment.load_data()
    for run in (one, two, three):
        accuracy = cb.train.evaluate(run.load_model(), test)["accuracy"]
        assert accuracy == run.history["test_accuracy"].iloc[-1]
    expected = prune.structured.to_counts(whole.load_model(), whole.experiment.load_data()[0], [8, 16, 0] + [
        each.count for each in list(found.values())[3:-1]] + [40], samples=64)  # fmt: skip
    assert {name: list(units) for name, units in expected.structure.items()} == one.structure


def test_a_training_goes_on_only_with_the_units_that_it_began_with(whole, monkeypatch) -> None:
    """Interrupted after an epoch it ends where it would have; with other units it begins anew."""
    store = runs.Store(whole.path.parent)
    experiment = whole.experiment.but(
        start=whole.id, pruning="structured", units="8 16 16 32 32 32 64 64 40", looked_at=64, epochs=2,
    )  # fmt: skip
    on_epoch = runs.Checkpoint.on_epoch

    def killed(self: runs.Checkpoint, fit: cb.train.Fit) -> None:
        on_epoch(self, fit)
        raise KeyboardInterrupt

    def interrupted() -> Path:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runs.Checkpoint, "on_epoch", killed)
            runs.ensure(experiment, store, progress=False)
        return store.root / ".training" / experiment.id

    file = interrupted() / "structure.json"
    units = json.loads(file.read_text())
    units["layer1.0.channels"] = [unit for unit in range(16) if unit not in units["layer1.0.channels"]]
    file.write_text(json.dumps(units))
    with pytest.warns(UserWarning, match="other units go on this machine than before, training starts anew"):
        interrupted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = runs.ensure(experiment, store, progress=False)
    assert run.history["epoch"].tolist() == [1, 2]
    assert len(run.structure["layer1.0.channels"]) == 8


def test_counts_of_units_are_refused_in_one_line(whole) -> None:
    experiment = whole.experiment.but(start=whole.id, pruning="structured", units="1 2")
    with pytest.raises(ValueError, match="counts must be one for each of the 9 structures, not 2"):
        runs.ensure(experiment, runs.Store(whole.path.parent), progress=False)
    with pytest.raises(ValueError, match="the units of 'layer1.0.channels' that stay must be from 0 to 16, not 17"):
        runs.ensure(experiment.but(units="17" + " 1" * 8), runs.Store(whole.path.parent), progress=False)
    for units in ("", "a", "1,2", "1 -2", "1" * 9):
        with pytest.raises(ValueError, match="units must be counts with a space between") as error:
            experiment.but(units=units)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="pruning 'structured' needs start, the id of a run"):
        whole.experiment.but(pruning="structured", units="1 2")


def test_a_run_whose_structure_is_wrong_is_refused_in_one_line(whole, tmp_path: Path) -> None:
    """Whoever writes a structure can write its checksums too."""
    kept = {"layer1.0.channels": [0, 3, 5]}
    run = runs.write_shrunk(whole, deploy.shrink(whole.load_model(), kept), kept, tmp_path / "small")
    file, note = run.path / "structure.json", run.path / "environment.json"
    sound = note.read_text()

    def told(**more: object) -> None:
        about = unsealed(sound, note.name)
        note.write_text(sealed(about | {"sha256": about["sha256"] | {file.name: sha256(file)}} | more, note.name))

    def written(structure: object) -> None:
        write_structure(run.path, structure)
        told()

    def unvouched() -> None:
        about = unsealed(sound, note.name)
        note.write_text(sealed(about | {"sha256": {n: s for n, s in about["sha256"].items() if n != file.name}}, ""))

    cases = [
        (lambda: written({"layer1.0.channels": [0, 3]}), "model.safetensors does not fit resnet20"),
        (lambda: written({"layer9.0.channels": []}), "structure.json does not fit resnet20: unknown structure"),
        (lambda: written({"layer1.0.channels": [10**30]}), "structure.json does not fit resnet20: a unit of"),
        (lambda: written({"layer1.0.channels": [[]]}), "must be an integer, not []"),
        (lambda: written([1]), "structure.json is damaged or no structure: 'kept' is no mapping"),
        (lambda: (file.write_bytes(b"\xff"), told()), "structure.json is damaged or no structure"),
        (lambda: file.write_text("{}"), "its checksum does not match"),
        (lambda: file.unlink(), "structure.json cannot be read: "),
        (unvouched, "environment.json is damaged"),
    ]
    for damage, words in cases:
        damage()
        with pytest.raises(runs.RunError, match=re.escape(words)) as error:
            run.load_model()
        assert "\n" not in str(error.value)
        assert str(run.path) in str(error.value)
