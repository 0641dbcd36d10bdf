import errno
import io
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cram_bench as cb
from cram_bench import cli
from cram_bench.experiment import names
from cram_bench.recipes import recipe
from cram_bench.settings import ORIGINAL


def run(capsys, *arguments: str) -> tuple[int, list[str], str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_train_prints_the_folder_last_and_finds_it_again(capsys, tmp_path):
    arguments = ("train", "--dataset", "digits", "--method", "cram+-multi", "--epochs", "1", "--seed", "3")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    folder = out[-1]
    assert (pd.read_csv(f"{folder}/history.csv")["epoch"] == [1]).all()
    status, out, err = run(capsys, *arguments)
    last = pd.read_csv(f"{folder}/history.csv").iloc[-1]
    said = f"{last['train_accuracy']:.1%} in training, {last['test_accuracy']:.1%} in test"
    assert (status, out, err) == (0, [folder], f"CrAM+-Multi, seed 3, 1 epoch: accuracy {said}\n")
    status, out, _ = run(capsys, "runs", "--csv")
    assert status == 0
    assert out[1].split(",")[:7] == [
        folder.rpartition("/")[2],
        "digits",
        "convnet",
        "cram+-multi",
        "3",
        "1",
        "finished",
    ]
    status, out, _ = run(capsys, "probe", folder, "--sample", "100", "--out", str(tmp_path / "out"))
    assert status == 0
    assert {path.stem for path in (tmp_path / "out" / "tables").iterdir()} == {
        "sparsity_curve", "cram_gap", "sam_sharpness", "loss_in_ball", "layer_blame", "curvature",
    }  # fmt: skip


def test_probe_measures_what_the_library_does_on_the_data_of_the_run(capsys, tmp_path):
    settings = ("-s", "augment", "false", "-s", "holdout", "300")
    status, out, err = run(capsys, "train", "--dataset", "digits", "--epochs", "1", *settings)
    assert status == 0
    trained = cb.runs.Run.open(Path(out[-1]))
    accuracy = pd.read_csv(trained.path / "history.csv")["test_accuracy"].iloc[-1]
    assert err.endswith(f"{accuracy:.1%} in validation\n")
    _, out, _ = run(capsys, "runs")
    assert f"{accuracy:.1%}" in out[-1]
    options = ("--sample", "60", "--calibration", "200", "--out", str(tmp_path / "out"))
    assert run(capsys, "probe", trained.id, *options)[0] == 0
    train, held_out = trained.experiment.load_data()
    model, sample = trained.load_model(), train.sample(60)
    for name, expected in {
        "sparsity_curve": cb.probes.sparsity_curve(
            model, held_out, ["global@0.9"], train.calibration(200, augment=False)
        ),
        "cram_gap": cb.probes.cram_gap(model, sample, ["global@0.9"]),
        "sam_sharpness": cb.probes.sam_sharpness(model, sample, [0.05, 0.1, 0.2]),
        "layer_blame": cb.probes.layer_blame(model, sample, "global@0.9"),
    }.items():
        found = pd.read_csv(tmp_path / "out" / "tables" / f"{name}.csv")
        if "pattern" in found:
            found = found[found["sparsity"].isin(expected["sparsity"]) & (found["pattern"] == "global")]
        pd.testing.assert_frame_equal(found.reset_index(drop=True), expected, rtol=1e-4, atol=1e-6)


def test_somebody_elses_weights_are_probed(capsys, tmp_path):
    model = cb.models.create("convnet", 10, 1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    status, out, _ = run(capsys, "probe", file, "--arch", "convnet", "--data", "digits", "--sample", "50")
    assert status == 0
    assert "sparsity_curve" in out
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert f"prunable: {weights:,} weights in 4 tensors; dense: no other matrix" in out
    for arguments, message in (
        (["probe", file], "needs --arch"),
        (["probe", file, "--arch", "resnet20", "--data", "digits"], "does not fit resnet20"),
        (["probe", file, "--arch", "convet", "--data", "digits"], "did you mean 'convnet'"),
        (["probe", "0123", "--arch", "convnet"], "belong to a file of weights"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--method", "sdg"], "unknown method 'sdg'; did you mean 'sgd'"),
        (["train", "--dataset", "cifr10"], "unknown data set"),
        (["train", "--epochs", "0"], "epochs must be from 1 to 1000000, not 0"),
        (["train", "-s", "lr", "fast"], "lr must be of type float, not 'fast'"),
        (["train", "-s", "lr", "[1"], "'[1', is not YAML"),
        (["train", "-s", "lr", "1", "-s", "lr", "2"], "lr is given twice"),
        (["train", "-s", "seed", "3"], "seed is given as --seed, not with -s"),
        (["report", "-p", "output", "x"], "output is no free parameter"),
        (["train", "-s", "learning_rate", "1"], "unknown setting 'learning_rate'"),
        (["train", "-s", "batch_size", "100000", "--epochs", "1"], "larger than the training data"),
        (["probe", "nowhere"], "0 finished runs"),
        (["report", "-p", "epcohs", "3"], "unknown parameter 'epcohs'; did you mean 'epochs'"),
        (["train", "-s", "learning_rate", "1"], "did you mean 'lr'? `cram-bench settings` lists them"),
        (["settings", "cram+multi"], "unknown method 'cram+multi'; did you mean 'cram+-multi'"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, [])
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("0.9", 0.9),
        ("-2", -2),
        ("[2:4, 4:8]", ["2:4", "4:8"]),
        ("true", True),
        ("[.5]", [0.5]),
        ("x", "x"),
        ("yes", "yes"),
        ("1_000", 1000),
    ],
)
def test_values_are_read_as_one_expects(text, value):
    read = cli.commands._values([["name", text]])["name"]
    assert (read, type(read)) == (value, type(value))


def test_the_help_lists_every_notebook_of_a_report(capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    words = re.findall(r"\w+", capsys.readouterr().out)
    assert set(cb.report.NOTEBOOKS) <= set(words)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_loads_nothing_heavy(option):
    code = (
        "import sys, cram_bench.cli as c\n"
        f"try: c.main(['{option}'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'pandas', 'numpy', 'matplotlib', 'IPython'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cb.__version__ in done.stdout or option == "--help"


def test_settings_lists_every_setting_with_type_default_and_meaning(capsys):
    status, out, _ = run(capsys, "settings", "--csv")
    table = pd.read_csv(io.StringIO("\n".join(out)), keep_default_na=False).set_index("setting")
    assert status == 0
    assert {name.removeprefix("--") for name in table.index} == set(names()) >= set(ORIGINAL)
    assert {name for name in table.index if name.startswith("--")} == {"--dataset", "--method", "--epochs", "--seed"}
    assert table.loc["lr"].tolist() == ["float", "0.1", "Peak learning rate, positive."]
    assert table["meaning"].str.len().min() > 8
    status, out, _ = run(capsys, "settings")
    assert status == 0
    assert re.search(r"^lr +float +Peak learning rate, positive\. \(0\.1\)$", "\n".join(out), re.MULTILINE)
    assert max(map(len, out)) <= 120


@pytest.mark.parametrize("method", cb.recipes.METHODS)
def test_what_settings_lists_of_a_method_is_what_it_takes_with_its_defaults(capsys, method):
    """Every default is read back as `-s` reads it, and gives the recipe itself."""
    status, out, _ = run(capsys, "settings", method, "--csv")
    table = pd.read_csv(io.StringIO("\n".join(out)), keep_default_na=False).set_index("setting")
    values = cli.commands._values(
        [[name, text] for name, text in table["default"].items() if not name.startswith("--")]
    )
    wanted = recipe("digits", method)
    assert recipe("digits", method, **values) == wanted
    assert table.loc["--method", "default"] == method
    left = set(names()) - {name.removeprefix("--") for name in table.index}
    assert ("compressors" in left, "rho" in left) == (not wanted.step.compresses, wanted.step.kind == "plain")
    assert ("momentum" in left) == (method == "adamw")
    assert ("ascent" in left) == (method != "cram-single")


def test_help_lists_every_data_set_method_and_recipe(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--help"])
    assert done.value.code == 0
    lists = dict(
        line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line and line[0] != " "
    )
    assert lists["methods"].split(", ") == list(cb.recipes.METHODS)
    assert lists["recipes"].split(", ") == list(cb.recipes.RECIPES)
    assert lists["data sets"].split(", ")[:-1] == ["digits", *cb.data.TORCHVISION, *cb.data.SENTENCES]


def test_an_error_without_words_is_named(capsys, monkeypatch):
    class OddError(Exception):
        pass

    for error, said in (
        (RuntimeError(), "cram-bench: RuntimeError"),
        (RuntimeError("\n   it hurts\n more"), "cram-bench: it hurts"),
        (AssertionError(), "cram-bench: AssertionError (cram-bench --debug … shows where)"),
        (OddError("why"), "cram-bench: OddError: why (cram-bench --debug … shows where)"),
        (KeyError("x"), "cram-bench: KeyError: 'x' (cram-bench --debug … shows where)"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"),
         "cram-bench: No space left on device; free some space there, and the same command goes on: '/a'"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "cram-bench: Permission denied: '/a'"),
        (OSError("no number"), "cram-bench: no number"),
        (ModuleNotFoundError("No module named 'x'"), "cram-bench: No module named 'x'"),
    ):  # fmt: skip
        monkeypatch.setattr("cram_bench.runs.Store", lambda *a, error=error: (_ for _ in ()).throw(error))
        assert run(capsys, "runs") == (1, [], f"{said}\n")
        with pytest.raises(type(error)):
            cli.main(["--debug", "runs"])


def test_ctrl_c_says_what_goes_on(capsys, monkeypatch):
    def pressed(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr("cram_bench.runs.Store", pressed)
    assert run(capsys, "runs") == (130, [], "interrupted\n")
    monkeypatch.setattr("cram_bench.runs.ensure", pressed)
    assert run(capsys, "train") == (130, [], "interrupted; the same command goes on from the last finished epoch\n")


def test_warnings_are_one_line_without_a_place_in_the_code(capsys):
    status, out, _ = run(capsys, "train", "--epochs", "1")
    folder = Path(out[-1])
    (folder / "settings.json").write_text("{")
    status, out, err = run(capsys, "runs")
    assert status == 0
    assert err.startswith(f"cram-bench: left out: {folder / 'settings.json'} is damaged")
    assert err.count("\n") == 1


def test_a_setting_given_as_an_option_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--lr", "0.1"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --lr 0.1; settings are given as -s NAME VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["report", "--dataset", "digits"], "papermill", "report"),
        (["report", "--dataset", "digits"], "nbconvert", "report"),
        (["report", "--dataset", "digits"], "nbformat", "report"),
        (["report", "--dataset", "digits"], "ipykernel", "report"),
        (["sweep", "sweep.yaml"], "submitit", "sweep"),
        (["train", "--dataset", "sst2"], "transformers", "language"),
        (["train", "--dataset", "sst2", "-s", "model", "hub:x"], "transformers", "language"),
    ],
)
def test_a_missing_extra_is_named_before_anything_trains(capsys, monkeypatch, tmp_path, arguments, module, extra):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text("{dataset: digits, methods: [sgd], epochs: 1}")
    for split in ("train", "test"):
        (tmp_path / "data" / "sst2").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "sst2" / f"{split}.tsv").write_text("good\t1\nbad\t0\n")
    monkeypatch.setenv("CRAM_BENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setitem(sys.modules, module, None)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, [])
    assert err.count("\n") == 1
    assert f"pip install 'cram-bench[{extra}]'" in err


def test_the_explorer_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ModuleNotFoundError, match=r"ipywidgets.*pip install 'cram-bench\[lab\]'"):
        cb.widgets.explorer([])


def test_every_extra_that_a_message_names_is_one():
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    code = "".join(path.read_text() for path in Path(cb.__file__).parent.rglob("*.py"))
    named = set(re.findall(r"cram-bench\[(\w+)\]", code)) | set(re.findall(r'needs\("[^"]+", "(\w+)"', code))
    assert named <= extras.keys()


@pytest.mark.skipif(os.name != "posix", reason="needs modes of folders")
@pytest.mark.parametrize("option", ["--out", "--folder", "--reports", "--into"])
@pytest.mark.parametrize("kind", ["closed", "file"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(capsys, monkeypatch, tmp_path, option, kind):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text("{dataset: digits, methods: [sgd], epochs: 1}")
    Path("file").write_text("x")
    Path("closed").mkdir()
    command = {"--out": ["probe", "0123"], "--folder": ["sweep", "sweep.yaml"], "--reports": ["report"],
               "--into": ["reproduce", "nothing"]}[option]  # fmt: skip
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *a, **k: "closed" not in str(path) and access(path, *a, **k))
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained"))
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(capsys, *command, option, f"{kind}/deep/er")
    assert (status, out) == (1, [])
    wanted = f"{option} cannot be written: Permission denied: '{tmp_path / 'closed'}'"
    assert (wanted if kind == "closed" else f"{option} must be a folder, and {tmp_path / 'file'} is none") in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_long_steps_show_that_they_go_on():
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        with pytest.raises(ZeroDivisionError), cb.progress.working("curvature", stream):
            raise ZeroDivisionError
    assert log.getvalue() == "curvature …\n"
    assert terminal.getvalue().startswith("\rcurvature … 0 s")
    assert terminal.getvalue().endswith("\r\x1b[K")  # nothing of it stays


def test_the_last_state_of_the_bar_is_that_of_the_last_epoch():
    terminal, wanted = Terminal(), recipe("digits", epochs=2)
    train, test = wanted.load_data()
    model = wanted.build_model(train)
    rows = cb.train.fit(model, wanted.build_optimizer(model), train, test, epochs=2, batch_size=128,
                        callbacks=[cb.progress.Progress("it", terminal)])  # fmt: skip
    last = re.split(r"[\r\n]+", terminal.getvalue().strip())[-1]
    assert f"accuracy {rows[-1]['train_accuracy']:.1%}, test {rows[-1]['test_accuracy']:.1%}" in last


def test_the_output_of_a_notebook_keeps_what_a_finished_epoch_said(monkeypatch):
    drawn, clock = [], SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(cb.progress, "time", clock)
    monkeypatch.setattr(cb.progress, "_in_notebook", lambda: True)
    progress = cb.progress.Progress("it")
    progress.bar = SimpleNamespace(update=lambda shown: drawn.append(shown.data))
    row = {"train_loss": 0.5, "train_accuracy": 0.9, "test_accuracy": 0.8}
    fit = SimpleNamespace(epoch=0, epochs=2, steps_per_epoch=2, history=[row])
    loss, correct = torch.tensor(1.0), torch.tensor(1.0)
    progress.start = clock.now
    for seconds, call in (
        (4, lambda: progress.on_step(fit, 1, loss, correct, 2)),
        (2, lambda: progress.on_epoch(SimpleNamespace(**vars(fit) | {"epoch": 1}))),
        (0.1, lambda: progress.on_step(SimpleNamespace(**vars(fit) | {"epoch": 1}), 0, loss, correct, 2)),
        (0.5, lambda: progress.on_step(SimpleNamespace(**vars(fit) | {"epoch": 1}), 0, loss, correct, 2)),
        (4, lambda: progress.on_epoch(SimpleNamespace(**vars(fit) | {"epoch": 2}))),
    ):
        clock.now += seconds
        call()
    said = [(re.search('value="(.*?)"', text)[1], text.partition("it: ")[2]) for text in drawn]
    assert said == [
        ("0.5000", "epoch 1/2, loss 0.500, accuracy 50.0%, 4 s left</div>"),
        ("0.5000", "epoch 1/2, loss 0.500, accuracy 90.0%, test 80.0%, 6 s left</div>"),
        ("0.7500", "epoch 2/2, loss 0.500, accuracy 50.0%, 2 s left</div>"),
        ("1.0000", "epoch 2/2, loss 0.500, accuracy 90.0%, test 80.0%, 11 s</div>"),
    ]


def shown_in_a_log(monkeypatch, epochs, start=0):
    """The lines of a training of so many epochs that goes on after `start`; an epoch takes 4 s by this clock."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(cb.progress, "time", clock)
    log = io.StringIO()
    progress = cb.progress.Progress("it", log)
    row = {"train_loss": 0.5, "train_accuracy": 0.9}
    fit = SimpleNamespace(epoch=start, epochs=epochs, steps_per_epoch=1, history=[row])
    progress.on_start(fit)
    while fit.epoch < epochs:
        fit.epoch, clock.now = fit.epoch + 1, clock.now + 4
        progress.on_epoch(fit)
    return log.getvalue().splitlines()


@pytest.mark.parametrize("epochs", [1, 9, 10, 11, 12, 19, 20, 95, 101, 200])
def test_a_log_has_ten_lines_at_most_and_the_last_epoch(epochs, monkeypatch):
    lines = shown_in_a_log(monkeypatch, epochs)
    assert min(epochs, 5) <= len(lines) <= 10
    assert lines[-1] == f"it: epoch {epochs}/{epochs}, loss 0.500, accuracy 90.0%, {4 * epochs} s"


def test_the_time_left_of_a_training_that_goes_on_is_by_the_epochs_of_now(monkeypatch):
    lines = shown_in_a_log(monkeypatch, 10, start=6)
    assert [line.rpartition(", ")[2] for line in lines] == ["12 s left", "8 s left", "4 s left", "16 s"]


def test_a_folder_of_images_trains_with_no_code_change(capsys, tmp_path):
    for split, count in (("train", 8), ("test", 4)):
        for label, colour in (("day", 220), ("night", 30)):
            folder = tmp_path / "sky" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), (colour, colour - index, colour)).save(folder / f"{index}.png")
    status, out, err = run(
        capsys,
        "train",
        "--dataset",
        str(tmp_path / "sky"),
        "--epochs",
        "1",
        "-s",
        "batch_size",
        "8",
        "-s",
        "model",
        "convnet",
    )
    assert status == 0, err
    assert (pd.read_csv(f"{out[-1]}/history.csv")["test_accuracy"].between(0, 1)).all()
