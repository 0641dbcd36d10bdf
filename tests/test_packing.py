"""Networks on disk: what is packed comes back, its bytes by hand, and what compounding costs in accuracy."""

import gzip

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cram_bench as cb
from cram_bench import compress, deploy, probes


def network(name="convnet"):
    torch.manual_seed(3)
    return cb.models.create(name, 10, 1, 8)


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("spec", ["global@0", "global@0.8", "2:4", "global@0.999"])
@pytest.mark.parametrize("bits", [0, 8])
def test_what_is_packed_comes_back_through_a_file(spec, bits, tmp_path):
    """As it was, or with 8 bits what ``+int8`` makes of it."""
    model, other = network(), cb.models.create("convnet", 10, 1, 8)
    compress.apply_(model, spec)
    save_file(deploy.pack(model, bits), tmp_path / "packed.safetensors")
    if bits:
        compress.apply_(model, "int8")
    deploy.unpack_(other, load_file(tmp_path / "packed.safetensors"))
    assert same(model, other)


class Layers(nn.Module):
    """Outputs in the second dimension, with groups; a tied weight; buffers."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.norm(self.up(x)).mean((2, 3))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 8])
def test_layers_of_every_layout_and_type_come_back(bits, dtype):
    torch.manual_seed(4)
    model, other = Layers().to(dtype), Layers().to(dtype)
    compress.apply_(model, "global@0.5")
    packed = deploy.pack(model, bits)
    if bits:
        compress.apply_(model, "int8")
    deploy.unpack_(other, packed)
    assert same(model, other)
    assert other.second.weight is other.first.weight


def test_the_bytes_by_hand():
    """Of 1,000 entries, 250 not zero: 125 bytes say where, 4 or 1 hold each, and 4 a row its scale; none where full."""
    model = nn.Linear(100, 10)
    with torch.no_grad():
        model.weight.copy_((torch.arange(1000) % 4 == 0).view(10, 100))
    assert {n: v.nbytes for n, v in deploy.pack(model).items()} == {
        "bias": 40, "weight:zeros": 125, "weight:values": 1000
    }  # fmt: skip
    rounded = deploy.pack(model, 8)
    assert {n: v.nbytes for n, v in rounded.items()} == {
        "bias": 40, "weight:zeros": 125, "weight:levels": 250, "weight:scales": 40
    }  # fmt: skip
    assert rounded["weight:levels"].unique().tolist() == [127]
    found = deploy.sizes(rounded)
    assert found["weights"] == 415
    from safetensors.torch import save

    assert found["file"] == len(save(rounded)) > 455
    assert gzip.decompress(gzip.compress(save(rounded), 6, mtime=0)) == save(rounded)
    assert found["gzip"] == len(gzip.compress(save(rounded), 6, mtime=0)) < 455
    model = nn.Linear(100, 10)
    assert {n: v.nbytes for n, v in deploy.pack(model).items()} == {"bias": 40, "weight:values": 4000}


def test_what_is_excluded_is_stored_whole():
    model = network()
    name = list(compress.prunable(model))[-1]
    packed = deploy.pack(model, 8, [name])
    assert torch.equal(packed[name], dict(model.named_parameters())[name])
    other = cb.models.create("convnet", 10, 1, 8)
    deploy.unpack_(other, packed, [name])
    assert torch.equal(dict(other.named_parameters())[name], dict(model.named_parameters())[name])


def test_a_model_is_as_before_and_a_shared_weight_is_packed_once():
    model, before = network(), network()
    deploy.pack(model, 8)
    assert same(model, before)
    assert not [name for name in deploy.pack(Layers()) if name.startswith("second.weight")]


def test_what_cannot_be_packed_or_does_not_fit_is_one_line():
    model = network()
    name = next(iter(compress.prunable(model)))
    with pytest.raises(ValueError, match="^bits must be 8, or 0 for values as they are, not 4$"):
        deploy.pack(model, 4)
    compress.apply_(model, "global@0.5")
    packed = deploy.pack(model)
    for part in ("zeros", "values"):
        wrong = {**packed, f"{name}:{part}": packed[f"{name}:{part}"][:-1]}
        with pytest.raises(
            ValueError, match=f"^what is packed of {name} is of another size: it has [\\d,]+ entries here$"
        ):
            deploy.unpack_(model, wrong)
    whole = deploy.pack(network())
    with pytest.raises(ValueError, match="is of another size"):
        deploy.unpack_(model, {**whole, f"{name}:values": whole[f"{name}:values"][:-1]})
    with pytest.raises(ValueError, match=f"^nothing is packed of {name}$"):
        deploy.unpack_(model, {key: value for key, value in packed.items() if key != f"{name}:values"})


# ---------------------------------------------------------------- compounding


def test_compounding_is_pruned_then_rounded_and_its_bytes_are_of_what_was_evaluated():
    train, test = cb.data.load("digits")
    model, before = network(), network()
    specs = ["global@0", "int8", "obd(gradients=16)@0.8", "obd(gradients=16)@0.8+int8"]
    table = probes.stored(model, test, specs, train.calibration(200), batches=train)
    assert same(model, before)
    assert table["pattern"].tolist() == ["global", "int8", "obd(gradients=16)", "obd(gradients=16)+int8"]
    assert table["sparsity"].tolist() == [0.0, 0.0, 0.8, 0.8]
    for spec, row in zip(specs, table.to_dict("records"), strict=True):
        own = network()
        cb.prune.apply_(own, spec.removesuffix("+int8"), train) if spec != "int8" else None
        packed = deploy.pack(own, 8 if spec.endswith("int8") else 0)
        assert {name: row[name] for name in ("weights", "file", "gzip")} == deploy.sizes(packed)
        deploy.unpack_(own, packed)
        if spec != "global@0":
            compress.tune_batchnorm(own, train.calibration(200))
        measured = cb.train.evaluate(own, test)
        assert (row["accuracy"], row["loss"]) == (measured["accuracy"], pytest.approx(measured["loss"], rel=1e-6))
    assert table["share"].tolist() == [gzipped / table["gzip"][0] for gzipped in table["gzip"]]
    plain = table.set_index("pattern")["weights"]
    assert plain["global"] == 4 * sum(w.numel() for w in compress.prunable(model).values())
    assert plain["int8"] < plain["global"] / 3.9
    assert plain["obd(gradients=16)+int8"] < plain["obd(gradients=16)"] / 2.5 < plain["global"] / 5


def test_only_8_bits_are_packed():
    with pytest.raises(ValueError, match="bits must be 8"):
        probes.stored(network(), cb.data.load("digits")[1], ["int4"])
