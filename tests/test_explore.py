"""Any classifier in the explorer, and `cram-bench explore`: what is opened, and what is refused in one line."""

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cram_bench as cb
from cram_bench import cli
from cram_bench.cli import exploring
from cram_bench.widgets import choices, opening, start

for module in ("ipywidgets", "anywidget", "altair", "vl_convert"):
    pytest.importorskip(module)


def images(count, channels=3):
    torch.manual_seed(count)
    return torch.randn(count, channels, 8, 8), torch.arange(count) % 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


class Wrapped(nn.Module):
    """Gives its logits as transformers does."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return {"logits": self.body(x)}


@pytest.mark.parametrize(("kind", "model"), [("batches", network), ("loader", Wrapped), ("data set", network)])
def test_any_classifier_is_explored_and_left_as_it_was(kind, model):
    pairs = images(40), images(60)
    given = {
        "batches": [[(x[:25], y[:25]), (x[25:], y[25:])] for x, y in pairs],
        "loader": [DataLoader(TensorDataset(*pair), batch_size=7) for pair in pairs],
        "data set": [cb.data.some([pair], 100, name="four") for pair in pairs],
    }[kind]
    mine = model().train()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    explorer = cb.widgets.explorer({"mine": mine}, data=given[0], calibration=given[1])
    assert explorer.wait()
    assert "ready" in explorer.status.value
    assert "60 training examples; 40 examples of " in explorer.numbers.value
    assert mine.training
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    copy = model()
    curve = cb.probes.sparsity_curve(copy, [pairs[0]], ["global@0.8"], [(x, y) for x, y in [pairs[1]]])
    (here,) = [row for row in explorer.curve.rows["curve"] if row["here"]]
    wanted = curve[(curve["calibrated"]) & (curve["sparsity"] == 0.8)]["accuracy"].item()
    assert here["mean"] == pytest.approx(100 * wanted, abs=2.6)  # one example
    explorer.close()


def test_without_training_data_nothing_is_tuned_and_no_pruner_looks():
    explorer = cb.widgets.explorer({"a": network(), "b": Wrapped()}, data=[images(30)])
    assert explorer.wait()
    assert explorer.tune.disabled
    assert [name for name, _ in explorer.pattern.options] == list(cb.widgets.PATTERNS)
    assert "untuned; 30 examples of your data" in explorer.numbers.value
    assert "the networks differ in theirs" in explorer.blamed.value
    explorer.close()


def test_every_pruner_of_the_house_is_offered_and_answers():
    train = cb.data.some([images(40)], 40)
    offered = dict(choices.options(train))
    assert {name for name in cb.prune.PRUNERS if name != "layerwise"} <= offered.keys()
    subject = cb.widgets.Subject(network(), cb.data.some([images(30)], 30), list(train.batches(40)), train)
    for name, spec in offered.items():
        (question,) = cb.prune.grid([spec], [0.8])
        found = subject.answer(question, tuned=True)
        assert found.zeros == found.weights - sum((w != 0).sum() for w in pruned(question, train)), name
        assert found.zeros >= 16, name


def pruned(question, train):
    model = network().eval()
    cb.prune.apply_(model, question, train)
    return cb.models.prunable(model).values()


def test_a_layer_that_is_clicked_at_is_looked_into():
    explorer = cb.widgets.explorer({"mine": network()}, data=[images(30)])
    assert explorer.wait()
    assert explorer.layer.options == ("the costliest", "0.weight", "5.weight")
    explorer.layers.picked = "5.weight"
    assert explorer.wait()
    assert explorer.layer.value == "5.weight"
    assert explorer.detail.alt.endswith(": 5.weight")
    model, data = network(), [images(30)]
    table = cb.probes.layer_sensitivity(model, data, [0.5, 0.9], exclude=["0.weight"])
    drawn = {row["sparsity"]: row["rise"] for row in explorer.detail.rows["alone"]}
    assert [drawn[50], drawn[90]] == pytest.approx(list(table["rise"]), abs=1e-5)
    dense = [row["share"] for row in explorer.detail.rows["spread"] if row["state"] == "dense"]
    kept = [row["share"] for row in explorer.detail.rows["spread"] if row["state"] == "compressed"]
    assert sum(dense) == pytest.approx(100)
    zeros = {row["layer"]: row["share"] for row in explorer.layers.rows["layers"]}["5.weight"]
    assert sum(kept) == pytest.approx(100 - zeros)
    explorer.layers.picked = "no such layer"
    assert explorer.layer.value == "5.weight"
    explorer.close()


def test_the_error_of_a_rise_is_that_of_paired_differences():
    explorer = cb.widgets.explorer({"mine": network()}, data=[images(30)])
    explorer.sparsity.value = 0.9
    assert explorer.wait()
    dense, x, y = network().eval(), *images(30)
    masks = cb.compress.apply_(pruned := network().eval(), "global@0.9")
    alone = network().eval()
    with torch.no_grad():
        alone[5].weight.copy_(pruned[5].weight)
        losses = [nn.functional.cross_entropy(each(x), y, reduction="none").double() for each in (alone, dense)]
    difference = losses[0] - losses[1]
    (row,) = [row for row in explorer.layers.rows["layers"] if row["layer"] == "5.weight"]
    assert row["rise"] == pytest.approx(difference.mean().item(), abs=1e-5)
    assert (row["high"] - row["low"]) / 2 == pytest.approx(difference.std().item() / 30**0.5, rel=1e-3)
    assert row["zeros"] == int((~masks["5.weight"]).sum())
    explorer.close()


def test_latency_is_measured_when_it_is_asked_for_and_remembered(monkeypatch):
    explorer = cb.widgets.explorer({"mine": network()}, data=[images(40)])
    assert explorer.wait()
    assert "ms for 32" not in explorer.costs.value
    asked = []

    def timed(models, inputs, repeats):
        asked.append((len(models), len(inputs), repeats))
        return [0.006, 0.003]

    monkeypatch.setattr("cram_bench.deploy.timed", timed)
    explorer.time.click()
    assert explorer.wait()
    assert asked == [(2, 32, 11)]
    assert "ms for 32" in explorer.costs.value
    assert ">3<" in explorer.costs.value
    assert ">2.00<" in explorer.costs.value
    explorer.sparsity.value = 0.5
    assert explorer.wait()
    assert "ms for 32" not in explorer.costs.value
    explorer.sparsity.value = 0.8
    assert explorer.wait()
    assert "ms for 32" in explorer.costs.value
    assert len(asked) == 1
    explorer.close()


def test_sizes_are_those_of_what_is_stored():
    explorer = cb.widgets.explorer({"mine": network()}, data=[images(40)])
    assert explorer.wait()
    weights = 8 * 27 + 32
    others = sum(t.nbytes for t in network().state_dict().values()) - 4 * weights
    left = weights - round(0.8 * weights)
    subject = explorer._subjects["mine"]
    assert subject.answer(explorer.compressor, False).bytes == -(-(32 * left + weights) // 8) + others
    explorer.bits.value = "8 bits"
    assert explorer.wait()
    kept = subject.model
    masks = cb.compress.apply_(network(), "global@0.8+int8")
    assert masks.zeros == weights - left
    assert subject.answer(explorer.compressor, False).bytes <= -(-(8 * left + weights) // 8) + others
    assert kept is subject.model
    explorer.close()


def test_a_first_look_comes_before_the_whole_sample(monkeypatch):
    seen = []
    tell = cb.widgets.Explorer._tell

    def watched(self, known):
        seen.append({label: found.count for label, (_, found) in known.items()})
        tell(self, known)

    monkeypatch.setattr(cb.widgets.Explorer, "_tell", watched)
    explorer = cb.widgets.explorer({"mine": network()}, data=[images(300)], calibration=[images(260)])
    assert explorer.wait()
    assert seen[0] == {"mine": 100}
    assert seen[-1] == {"mine": 300}
    look = explorer._subjects["mine"].look(explorer.compressor, True)
    assert (look.count, look.tuned_on) == (100, 125)
    explorer.close()


def test_a_pruner_that_looks_stops_where_there_is_a_newer_question():
    from cram_bench.widgets.subject import Subject

    subject = Subject(network(), cb.data.some([images(30)], 30), [], cb.data.some([images(64)], 64))

    def newer():
        raise KeyError("newer")

    with pytest.raises(KeyError, match="newer"):
        subject.operator(cb.prune.parse("obd(gradients=8)@0.5"), newer)
    assert not subject.pruners
    assert subject.operator(cb.prune.parse("obd(gradients=8)@0.5")).sparsity == 0.5


def test_examples_are_drawn_from_all_of_the_data():
    x, y = torch.arange(1000.0)[:, None, None, None].expand(-1, 1, 2, 2), torch.arange(1000) % 7
    whole = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 1000, 50)]
    for data in (whole, DataLoader(TensorDataset(x, y), batch_size=50), iter_only(whole)):
        drawn = cb.data.some(data, 100)
        places = drawn.inputs[:, 0, 0, 0]
        assert len(drawn) == len(places.unique()) == 100
        assert torch.equal(drawn.labels, places.long() % 7)
        assert 400 < places.mean() < 600
    assert len(cb.data.some(whole, 10**6)) == 1000


class iter_only:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_pictures_of_somebody_elses_inputs_are_stretched():
    drawn = cb.data.some([images(5)], 5)
    pictures = drawn.pictures([0, 3])
    assert pictures.shape == (2, 3, 8, 8)
    assert pictures.amin((1, 2, 3)).tolist() == [0, 0]
    assert pictures.amax((1, 2, 3)).tolist() == [255, 255]
    assert cb.data.some([(torch.randn(3, 9), torch.arange(3))], 3).pictures([0]) is None


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: cb.widgets.explorer({}), ValueError, "at least one model"),
        (lambda: cb.widgets.explorer({"a": network()}), ValueError, "need data"),
        (lambda: cb.widgets.explorer({"a": 3}, data=[images(4)]), TypeError, "torch model, not 3"),
        (lambda: cb.widgets.explorer({1: network()}, data=[images(4)]), TypeError, "a label must be a text"),
        (lambda: cb.widgets.explorer({"a": network()}, data=[]), ValueError, "empty"),
        (lambda: cb.widgets.explorer({"a": network()}, data=7), TypeError, "data must be"),
        (
            lambda: cb.widgets.explorer({"a": network()}, data=[(images(4)[0], torch.full((4,), 9))]),
            ValueError,
            "4 logits, and the data have a label 9",
        ),
        (
            lambda: cb.widgets.explorer({"a": network()}, data=[({"x": images(4)[0]}, images(4)[1])]),
            TypeError,
            "inputs must be a tensor of images",
        ),
        (lambda: cb.data.some([(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2))], 2), ValueError, "labels"),
    ],
)
def test_what_cannot_be_explored_is_one_line(call, kind, words):
    with pytest.raises(kind, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


def run(capsys, *arguments):
    status = cli.main([*arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ("0 finished runs", "'nothing'")),
        (["--model", "resnet20"], ("--data", "cifar10")),
        (["--model", "resnet20", "--data", "digits"], ("no weights of its own", "timm:NAME")),
        (["--model", "resnet2", "--data", "digits"], ("'resnet2'", "did you mean 'resnet20'")),
        (["--weights", "no.safetensors", "--data", "digits"], ("--model", "resnet20")),
        (["--weights", "no.safetensors", "--data", "digits", "--model", "convnet"], ("No such file", "no.safetensors")),
        (["--model", "torchvision:resnet1", "--data", "digits"], ("'resnet1'", "did you mean")),
        (["--model", "hub:somewhere", "--data", "digits", "--weights", "x"], ("brings its own weights",)),
        (["--data", "digts"], ("digts'", "did you mean 'digits'")),
        (["--crop", "3"], ("--crop", "--model")),
        (["--port", "0"], ("--port", "from 1 to 65535", "not 0")),
        (["--sample", "0"], ("--sample", "at least 1")),
        (["--rename", "x", "--model", "convnet"], ("OLD=NEW",)),
    ],
)
def test_a_wrong_call_is_one_line_and_opens_nothing(capsys, monkeypatch, tmp_path, arguments, words):
    pytest.importorskip("voila")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.execve", lambda *a: pytest.fail("opened"))
    status, out, err = run(capsys, "explore", *arguments, "--no-browser")
    (line,) = [line for line in err.splitlines() if not line.endswith(" …")]
    assert (status, out) == (1, "")
    assert all(word in line for word in words), line


def test_a_missing_library_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "voila", None)
    assert "pip install 'cram-bench[lab]'" in run(capsys, "explore")[2]
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        cb.models.pretrained("timm:resnet18")
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        cb.models.create("timm:resnet18", 10)


def test_a_port_that_is_taken_is_refused(capsys, monkeypatch):
    pytest.importorskip("voila")
    monkeypatch.setattr("os.execve", lambda *a: pytest.fail("opened"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert f"--port {port} is taken" in run(capsys, "explore", "--port", port)[2]


def test_what_is_opened_is_written_down_and_runs_nothing_of_its_texts(capsys, monkeypatch, tmp_path):
    pytest.importorskip("voila")
    monkeypatch.chdir(tmp_path)
    trained = cb.runs.ensure(cb.recipes.recipe("digits", epochs=1), progress=False)
    (tmp_path / "net.safetensors").write_bytes((trained.path / "model.safetensors").read_bytes())
    ran = []
    monkeypatch.setattr("os.execve", lambda *arguments: ran.append(arguments))
    assert run(capsys, "explore", "--model", "convnet", "--data", "digits", "--weights", "net.safetensors")[0] == 0
    ((program, words, environment),) = ran
    assert program == sys.executable
    assert any(word.startswith("--Voila.token=") and len(word) > 30 for word in words)
    assert "--Voila.ip=127.0.0.1" in words
    content = json.loads(Path(words[3]).read_text())
    source = content["cells"][0]["source"]
    assert str(tmp_path / "net.safetensors") in source
    assert environment["CRAM_BENCH_RUNS"] == str(cb.runs.Store().root)
    hostile = "'); import os; os.abort() #\n\\"
    cell = json.loads(exploring.notebook({"data": hostile, "sample": 3}))["cells"][0]["source"]
    given = {}
    monkeypatch.setattr("cram_bench.widgets.opening.opened", lambda **options: given.update(options))
    exec(cell, {})
    assert given == {"data": hostile, "sample": 3}


def test_names_of_folders_are_whole():
    parsed = argparse.Namespace(
        run_names=["abc"], model="hub:.", data="digits", weights="w.pth", rename=[], crop=0, sample=1, calibration=2
    )
    options = exploring.named(parsed)
    assert options["model"] == f"hub:{os.getcwd()}"
    assert options["data"] == "digits"
    assert options["weights"].startswith("/")
    assert options["runs"] == ["abc"]


def test_runs_and_files_are_opened():
    run = cb.runs.ensure(cb.recipes.recipe("digits", epochs=1), progress=False)
    panel = opening.opened(runs=[run.id[:8]], sample=50, calibration=50)
    assert panel.wait()
    numbers = panel.numbers.value
    panel.close()
    other = opening.opened(model="convnet", data="digits", weights=str(run.path / "model.safetensors"), sample=50)
    assert other.wait()
    assert "50 examples of digits" in other.numbers.value
    assert "50 test examples" in numbers
    other.close()
    with pytest.raises(ValueError, match="not both"):
        opening.opened(runs=[run.id], model="convnet")
    with pytest.raises(ValueError, match="is on 'digits', not on 'mnist'"):
        opening.opened(runs=[run.id], data="mnist")


def wait_for(page):
    for _ in range(1200):
        if not page.button.disabled:
            return
        time.sleep(0.05)
    pytest.fail(page.status.value)


def test_the_page_opens_runs_trains_what_is_missing_and_says_what_is_wrong(tmp_path):
    page = opening.opened()
    assert (page.data.value, page.what.value) == ("digits", start.TRAIN)  # the store is empty
    shown = [c for c in page.controls.children if c.layout.display != "none" and getattr(c, "description", "")]
    assert [control.description for control in shown] == ["data", "what", "methods", "epochs", "open"]
    page.methods.value, page.epochs.value = ("sgd",), 1
    page.button.click()
    wait_for(page)
    assert page.explorer is not None, page.status.value
    assert page.explorer.wait()
    assert page.below.children == (page.explorer.widget,)
    first = page.explorer
    page.what.value = start.RUNS
    assert len(page.runs.options) == 1
    page.button.click()
    wait_for(page)
    assert page.explorer is not first
    (run,) = cb.runs.Store().runs()
    page.what.value = start.FILE
    assert page.file.layout.display is None
    assert page.runs.layout.display == "none"
    page.button.click()
    wait_for(page)
    assert "name a file of weights" in page.status.value
    page.file.value, page.model.value = str(run.path / "model.safetensors"), "convnet"
    page.button.click()
    wait_for(page)
    assert page.explorer.wait()
    assert "examples of digits" in page.explorer.numbers.value
    page.what.value, page.model.value = start.NAMED, "convnet"
    page.button.click()
    wait_for(page)
    assert "no weights of its own" in page.status.value
    page.close()


def test_a_pretrained_network_must_answer_the_classes_of_the_data(monkeypatch):
    monkeypatch.setattr("cram_bench.models.pretrained", lambda name: network())
    with pytest.raises(ValueError, match="does not take images of 1 × 8 × 8 of digits"):
        opening.of_model("timm:some", "digits")
    first = nn.Sequential(nn.Conv2d(1, 3, 1), network())
    monkeypatch.setattr("cram_bench.models.pretrained", lambda name: first)
    with pytest.raises(ValueError, match="answers 4 classes, and digits has 10: give --weights"):
        opening.of_model("timm:some", "digits")


def test_a_classifier_of_the_hub_is_read_from_its_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = cb.models.pretrained(f"hub:{tmp_path}").eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(pixel_values=x).logits)


def test_networks_of_timm_are_built_for_the_data():
    timm = pytest.importorskip("timm")
    for name in ("resnet10t", "vit_tiny_patch16_224"):
        model = cb.models.create(f"timm:{name}", 5, 1, 32).eval()
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="unknown timm classifier 'resnet10'; did you mean"):
        cb.models.create("timm:resnet10", 5)
    assert timm.is_model("resnet10t")


def test_a_pattern_that_decides_its_sparsity_has_no_slider():
    assert choices.decides("2:4+obs(gradients=4)")
    explorer = cb.widgets.explorer({"mine": network(), "other": network()}, data=[images(20)])
    explorer.pattern.value = "2:4"
    assert explorer.sparsity.layout.display == "none"
    assert explorer.runs.layout.display is None
    explorer.pattern.value = "uniform"
    assert explorer.sparsity.layout.display is None
    explorer.close()
