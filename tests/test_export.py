"""Networks out of here: ONNX files, folders for a hub, and the command that writes them."""

import importlib.util
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_structure import logits, made, write_structure
from torch import nn

import cram_bench as cb
from cram_bench import cli, deploy, runs
from cram_bench.deploy.onnx import COLUMNS
from cram_bench.prune.structured import structures

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="ONNX files need the extra deploy: onnx, onnxruntime and onnxscript",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRAM_BENCH_RUNS", str(tmp_path_factory.mktemp("runs")))
        return runs.ensure(cb.recipes.recipe("digits", "sgd", epochs=1, model="resnet20"), progress=False)


def called(capsys, *arguments: object) -> tuple[int, list[str], str]:
    status = cli.main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


@needs_onnx
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_onnxruntime_answers_as_torch(name: str, tmp_path: Path) -> None:
    """Heads, columns and a whole attention gone; for other numbers of examples and tokens than it was written with."""
    model, inputs = made(name, torch.float32)
    kept = {
        key: () if i == 0 else [u for u in range(each.count) if u % 3]
        for i, (key, each) in enumerate(structures(model).items())
    }
    small = deploy.shrink(model, kept)
    deploy.write_onnx(small, inputs, tmp_path / "model.onnx")
    kinds = deploy.write_onnx(small, inputs, tmp_path / "int8.onnx", int8=True)
    assert kinds["MatMulInteger"] > 0
    other = inputs[:3, :5] if name == "bert" else inputs[:1]
    batches = [(x, torch.zeros(len(x), dtype=torch.long)) for x in (inputs, other)]
    found = deploy.compared(small, batches, [tmp_path / "model.onnx", tmp_path / "int8.onnx"], inputs, repeats=1)
    assert found["max_difference"][0] == 0.0
    assert found["max_difference"][1] < 1e-4
    spread = float(logits(small, inputs).std())
    assert 1e-4 < found["max_difference"][2] < spread
    assert found["precision"].tolist() == ["float32", "float32", "int8"]
    assert found["examples"].tolist() == [sum(len(x) for x, _ in batches)] * 3
    assert found["length"].tolist() == [7 if name == "bert" else 0] * 3
    assert found["bytes"].tolist()[1:] == [(tmp_path / f"{each}.onnx").stat().st_size for each in ("model", "int8")]


@needs_onnx
def test_differences_and_accuracies_are_those_of_the_files(tmp_path: Path) -> None:
    """Of a network whose file says half a logit more for one class; counted by hand."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.randn(6, 1, 2, 2)
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[1].bias[1] += 0.5
    deploy.write_onnx(other, x, tmp_path / "a.onnx")
    labels = logits(model, x).argmax(1)
    found = deploy.compared(model, [(x[:4], labels[:4]), (x[4:], labels[4:])], [tmp_path / "a.onnx"], x, repeats=2)
    assert tuple(found.columns) == COLUMNS
    assert found["max_difference"].tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    assert found["accuracy"].tolist() == [1.0, float((logits(other, x).argmax(1) == labels).double().mean())]
    assert found["batch"].tolist() == [6, 6]
    with pytest.raises(ValueError, match="examples in inputs must be at least 2, not 1"):
        deploy.write_onnx(model, x[:1], tmp_path / "b.onnx")
    with pytest.raises(ValueError, match="has no product of matrices that 8 bits would do for: no int8"):
        deploy.write_onnx(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten()), x, tmp_path / "b.onnx", int8=True)
    with pytest.raises(ValueError, match="a\\.onnx cannot be run by onnxruntime") as error:
        (tmp_path / "a.onnx").write_text("x")
        deploy.compared(model, [(x, labels)], [tmp_path / "a.onnx"], x)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx"]


@needs_onnx
def test_export_writes_a_smaller_network_that_onnxruntime_runs(run, capsys, tmp_path: Path) -> None:
    """Pruned for a speed-up, shrunk, compared with torch; the same for a folder that commands take, and of that."""
    small = tmp_path / "small"
    status, out, err = called(capsys, "export", run.path, "--to", "run", small, "--speedup", 1.3, "--repeats", 1)
    assert (status, out[-1]) == (0, str(small)), err
    gone = runs.Run.open(small)
    assert 0 < sum(p.numel() for p in gone.load_model().parameters()) < 260_000
    assert any(len(units) < 16 for units in gone.structure.values())
    onnx = tmp_path / "model.onnx"
    status, out, err = called(capsys, "export", small, "--to", "onnx", onnx, "--batch", 8, "--threads", 1)
    assert (status, out[-1]) == (0, str(onnx)), err
    table = [line.split() for line in out[1:3]]
    assert {"torch", "onnxruntime"} == {line[2] for line in table}
    assert float(re.search("largest difference of a logit: (.*)", "\n".join(out))[1]) < 1e-3


def test_a_missing_extra_is_named_in_one_line(run, capsys, tmp_path: Path, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnx" else found(name, *more))
    status, out, err = called(capsys, "export", run.path, "--to", "onnx", tmp_path / "a.onnx")
    assert (status, out) == (1, [])
    assert err == "cram-bench: ONNX files need onnx, which is not installed: pip install 'cram-bench[deploy]'\n"
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "hub", "new", "--int8"), "--int8 belongs to --to onnx, not to --to hub"),
        (("--to", "hub", "."), ". is there already: name a new folder"),
        (("--to", "hub", "new", "--batch", "1"), "--batch must be at least 2, not 1"),
        (("--to", "hub", "new", "--repeats", "0"), "--repeats must be at least 1, not 0"),
        (("--to", "hub", "new", "--speedup", "0.5"), "--speedup must be a finite number >= 1, not 0.5"),
        (("--to", "hub", "new", "-p", "greedyy@0.9"), "did you mean 'greedy'"),
        (("--to", "hub", "new", "--threads", "0"), "threads must be at least 1, not 0"),
        (("--to", "run", "new", "-p", "global@0.5"), "goes as a whole, so there is no smaller network: try --speedup"),
        (("--to", "run", "new", "--speedup", "1000000"), "a speed-up of 1e+06 cannot be reached"),
    ],
)
def test_a_wrong_export_is_one_line_and_writes_nothing(arguments, words, run, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = called(capsys, "export", run.path, *arguments)
    assert (status, out) == (1, [])
    lines = [line for line in err.splitlines() if not line.endswith("…")]
    assert len(lines) == 1
    assert words in lines[0]
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_a_folder_for_a_hub_gives_the_network_back(run, capsys, tmp_path: Path) -> None:
    """Bit for bit; all numbers of its card are in its table or its settings."""
    folder = tmp_path / "hub"
    more = ("-p", "global@0.5", "--repeats", "1", "--calibration", "500")
    status, out, err = called(capsys, "export", run.path, "--to", "hub", folder, *more)
    assert (status, out[-1]) == (0, str(folder)), err
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "results.csv",
    ]  # fmt: skip
    table, config = pd.read_csv(folder / "results.csv"), json.loads((folder / "config.json").read_text())
    assert table["state"].tolist() == ["as trained", "global@0.5"]
    assert table["sparsity"].tolist() == pytest.approx([0.0, 0.5], abs=1e-4)
    train, test = run.experiment.load_data()
    assert table["accuracy"][0] == cb.train.evaluate(run.load_model(), test)["accuracy"]
    back = deploy.from_hub(folder)
    assert table["accuracy"][1] == cb.train.evaluate(back, test)["accuracy"]
    card = (folder / "README.md").read_text()
    known = f"{config} " + " ".join(
        f"{value:.2%} {value:.4g} {value:.2f} {value:,.0f} {value}"
        for value in table.select_dtypes("number").to_numpy().flatten()
    ) + " ".join(table["state"])  # fmt: skip
    numbers = re.findall(r"\d[\d.,]*%?", card.replace("\\", ""))
    assert len(numbers) > 10
    assert [number for number in numbers if number.rstrip(".,") not in known] == []
    assert f"{table['accuracy'][1]:.2%}" in card


def test_a_shrunk_network_comes_back_from_its_folder(tmp_path: Path, run) -> None:
    model = run.load_model()
    kept = {"layer1.0.channels": [1, 2], "layer3.2.channels": []}
    small = deploy.shrink(model, kept)
    table = pd.DataFrame({"state": ["small"], "accuracy": [0.5]})
    _, test = run.experiment.load_data()
    hostile = "birds <b>|x\n# y"
    settings = run.experiment.settings() | {"dataset": f"/home/somebody/{hostile}"}
    deploy.write_hub(small, tmp_path / "hub", settings, test, table, kept)
    back, x = deploy.from_hub(tmp_path / "hub"), torch.randn(3, 1, 8, 8)
    assert torch.equal(logits(back, x), logits(small, x))
    text = (tmp_path / "hub" / "README.md").read_text() + (tmp_path / "hub" / "config.json").read_text()
    assert "somebody" not in text
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "<b>" not in card
    assert "\n# y" not in card
    with pytest.raises(ValueError, match="hub is there already: name a new folder"):
        deploy.write_hub(small, tmp_path / "hub", settings, test, table, kept)
    with pytest.raises(ValueError, match="accuracy"):
        deploy.write_hub(small, tmp_path / "other", settings, test, table[["state"]], kept)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["hub"]


def test_a_folder_of_a_hub_that_is_wrong_is_one_line(tmp_path: Path, run) -> None:
    """Whatever somebody else wrote: sizes are bounded before a network is built of them."""
    model = run.load_model()
    _, test = run.experiment.load_data()
    table = pd.DataFrame({"state": ["dense"], "accuracy": [0.5]})
    folder = deploy.write_hub(model, tmp_path / "hub", run.experiment.settings(), test, table)
    file = folder / "config.json"
    sound = json.loads(file.read_text())
    cases = [
        (lambda: file.write_text("[" * 100_000), "config.json describes no network"),
        (lambda: file.write_text("[]"), "config.json describes no network"),
        (lambda: file.write_bytes(b"\xff"), "config.json describes no network"),
        (lambda: file.write_text("{}"), "it has no 'model'"),
        (lambda: file.write_text(json.dumps(sound | {"num_classes": 10**12})), "num_classes must be from 1 to 100000"),
        (lambda: file.write_text(json.dumps(sound | {"image_size": 10**6})), "image_size must be from 1 to 1024"),
        (lambda: file.write_text(json.dumps(sound | {"channels": "3"})), "channels must be an integer"),
        (lambda: file.write_text(json.dumps(sound | {"model": "resnet2"})), "unknown model 'resnet2'"),
        (lambda: file.write_text(json.dumps(sound | {"model": ["resnet20"]})), "config.json describes no network"),
        (lambda: file.write_text(json.dumps(sound | {"num_classes": 11})), "model.safetensors does not fit resnet20"),
        (lambda: write_structure(folder, {"layer9": []}), "structure.json does not fit resnet20: unknown structure"),
        (lambda: (folder / "structure.json").write_text("{}"), "structure.json does not fit resnet20"),
    ]
    for damage, words in cases:
        file.write_text(json.dumps(sound))
        damage()
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            deploy.from_hub(folder)
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)
    file.write_text("x" * (2**22 + 1))
    with pytest.raises(OSError, match="and may have 4,194,304"):
        deploy.from_hub(folder)
