"""Wrong calls of the command line, and wrong parameters of the notebooks: one line, and nothing is left behind.

`ROWS` and `NOTEBOOKS` go on from `test_bad_input.ROWS`.
"""

import json
import re
import shutil

import matplotlib.font_manager  # noqa: F401  its cache is no file that a test finds
import nbformat
import pandas as pd
import papermill
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_bad_input import QUICK, check_line, found
from test_bad_input import ROWS as LIBRARY

import cram_bench as cb
from cram_bench import cli, report
from cram_bench.recipes import recipe
from cram_bench.runs import Store, ensure

SYSTEM = "!!python/object/apply:os.system ['touch executed']"
TRAIN = ("train", "--epochs", "1")
PROBE = ("probe", "other.safetensors", "--arch", "convnet", "--data", "digits")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with one finished run; only read."""
    store = Store(tmp_path_factory.mktemp("made"))
    ensure(recipe("digits", epochs=1), store, progress=False)
    return store


@pytest.fixture
def folder(store, tmp_path, monkeypatch):
    """The folder where one stands: a file, a truncated and a foreign safetensors file, and the store in ``runs``."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(store.root, tmp_path / "runs")
    (tmp_path / "file").write_text("x")
    cb.compress.Masks(
        {"w": cb.probes.random_direction(cb.models.create("convnet", 2, 1), 0)["linear.weight"] > 0}
    ).save("other.safetensors")
    shutil.copy("other.safetensors", "short.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-50])
    return tmp_path


# what is typed, the exit status, words of the line on stderr
ROWS = [
    ("method", [*TRAIN, "--method", "sdg"], 1, ("'sdg'", "did you mean 'sgd'")),
    ("dataset", [*TRAIN, "--dataset", "cifr10"], 1, ("cifr10'", "did you mean 'cifar10'")),
    ("dataset is a file", [*TRAIN, "--dataset", "file"], 1, ("file", "neither a folder")),
    ("dataset is empty", [*TRAIN, "--dataset", "."], 1, ("no folder train/", "test/<class>/*")),
    ("epochs zero", ["train", "--epochs", "0"], 1, ("epochs", "from 1", "not 0")),
    ("epochs a word", ["train", "--epochs", "ten"], 2, ("--epochs", "int", "'ten'")),
    ("epochs nan", ["train", "--epochs", "nan"], 2, ("--epochs", "int", "'nan'")),
    ("seed negative", [*TRAIN, "--seed", "-1"], 1, ("seed", "from 0", "-1")),
    ("setting unknown", [*TRAIN, "-s", "learning_rate", "1"], 1, ("'learning_rate'", "did you mean 'lr'", "settings")),
    ("setting misspelt", [*TRAIN, "-s", "batchsize", "8"], 1, ("'batchsize'", "did you mean 'batch_size'")),
    ("setting without a value", [*TRAIN, "-s", "lr"], 2, ("-s", "2 arguments")),
    ("setting twice", [*TRAIN, "-s", "lr", "1", "-s", "lr", "2"], 1, ("lr is given twice",)),
    ("setting of an option", [*TRAIN, "-s", "seed", "3"], 1, ("seed", "--seed, not with -s")),
    ("lr a word", [*TRAIN, "-s", "lr", "fast"], 1, ("lr", "float", "'fast'")),
    ("lr nan", [*TRAIN, "-s", "lr", ".nan"], 1, ("lr", "positive", "nan")),
    ("lr empty", [*TRAIN, "-s", "lr", ""], 1, ("lr", "float", "None")),
    ("lr a date", [*TRAIN, "-s", "lr", "2001-02-03"], 1, ("lr", "float", "2001")),
    ("lr a date that is none", [*TRAIN, "-s", "lr", "2001-13-45"], 1, ("lr", "'2001-13-45'", "YAML of plain values")),
    ("lr half a list", [*TRAIN, "-s", "lr", "[1"], 1, ("lr", "'[1'", "YAML")),
    ("lr a mapping", [*TRAIN, "-s", "lr", "{a: 1}"], 1, ("lr", "float", "{'a': 1}")),
    ("lr a list without end", [*TRAIN, "-s", "lr", "&a [*a]"], 1, ("lr", "&a [*a]", "YAML of plain values")),
    ("lr too deep", [*TRAIN, "-s", "lr", "[" * 5000], 1, ("lr", "[[[", "YAML")),
    ("lr 10,000 digits", [*TRAIN, "-s", "lr", "9" * 10_000], 1, ("lr", "999", "YAML")),
    ("a tag that runs", [*TRAIN, "-s", "lr", SYSTEM], 1, ("lr", "os.system", "YAML of plain values")),
    ("a tag that makes", [*TRAIN, "-s", "model", "!!python/name:os.system"], 1, ("model", "os.system", "plain values")),
    ("a tag that does not fit", [*TRAIN, "-s", "lr", "!!timestamp x"], 1, ("lr", "!!timestamp x", "plain values")),
    ("bool for int", [*TRAIN, "-s", "batch_size", "true"], 1, ("batch_size", "int", "True")),
    ("batch larger than the data", [*TRAIN, "-s", "batch_size", "9999"], 1, ("batch_size 9999", "1297 images")),
    ("batch of one", [*TRAIN, "-s", "batch_size", "1"], 1, ("batch_size", "at least 2", "not 1")),
    ("model and data", [*TRAIN, "-s", "model", "torchvision:resnet18"], 1, ("torchvision:resnet18", "3 channels")),
    ("model and language", [*TRAIN, "-s", "model", "minilm"], 1, ("'minilm'", "'digits'")),
    ("sparsity one", [*TRAIN, "--method", "cram", "-s", "compressors", "[global@1.0]"], 1, ("[0, 1)", "global@1")),
    ("compressors a text", [*TRAIN, "--method", "cram", "-s", "compressors", "2:4"], 1,
     ("compressors", "list", "'2:4'")),
    ("start upwards", [*TRAIN, "-s", "start", "../../etc"], 1, ("start", "twelve hexadecimal", "'../../etc'")),
    ("start the root", [*TRAIN, "-s", "start", "/"], 1, ("start", "twelve hexadecimal", "'/'")),
    ("start that is not there", [*TRAIN, "-s", "start", "'000000000000'"], 1, ("no finished run", "'000000000000'")),
    ("start of another model", [*TRAIN, "-s", "start", "ID", "-s", "model", "resnet20"], 1, ("does not fit resnet20",)),
    ("device", [*TRAIN, "--device", "gpu"], 1, ("device", "cpu", "'gpu'")),
    ("device that is not here", [*TRAIN, "--device", "cuda:99"], 1, ("device", "cpu", "'cuda:99'")),
    ("no thread", [*TRAIN, "--threads", "0"], 1, ("threads", "at least 1", "not 0")),
    ("fewer than none", [*TRAIN, "--threads", "-2"], 1, ("threads", "at least 1", "-2")),
    ("a wait in the past", [*TRAIN, "--wait", "-1"], 1, ("wait", ">= 0", "-1")),
    ("a wait without end", [*TRAIN, "--wait", "nan"], 1, ("wait", "finite", "nan")),
    ("a wait in words", [*TRAIN, "--wait", "long"], 2, ("--wait", "float", "'long'")),
    ("threads a word", [*TRAIN, "--threads", "all"], 2, ("--threads", "int", "'all'")),
    ("no command", [], 2, ("command",)),
    ("command unknown", ["trian"], 2, ("'trian'", "train")),
    ("option unknown", ["train", "--epoch-count", "3"], 2, ("--epoch-count",)),
    ("diverges", ["train", "--epochs", "2", "-s", "lr", "1e30"], 1, ("in epoch 1", "try a lower lr")),
    ("probe upwards", ["probe", "../../x"], 1, ("0 finished runs", "'../../x'", "cram-bench runs")),
    ("probe a folder", ["probe", ".."], 1, ("..", "not a finished run")),
    ("probe sample", ["probe", "ID", "--sample", "0"], 1, ("sample", "at least 1", "not 0")),
    ("probe calibration", ["probe", "ID", "--calibration", "-5"], 1, ("sample", "at least 1", "-5")),
    ("probe into a file", ["probe", "ID", "--out", "file"], 1, ("--out", "folder", "file")),
    ("probe arch of a run", ["probe", "ID", "--arch", "convnet"], 1, ("--arch", "file of weights")),
    ("probe crop of a run", ["probe", "ID", "--crop", "32"], 1, ("--crop", "file of weights")),
    ("a folder without a place", ["reproduce", "x", "--folder", "birds"], 1, ("--folder", "NAME=PATH", "'birds'")),
    ("a folder twice", ["reproduce", "x", "--folder", "a=b", "--folder", "a=c"], 1, ("--folder a", "twice")),
    ("probe rename of a run", ["probe", "ID", "--rename", "a=b"], 1, ("--rename", "file of weights")),
    ("probe rename half", [*PROBE, "--rename", "a"], 1, ("--rename", "OLD=NEW", "'a'")),
    ("probe rename twice", [*PROBE, "--rename", "a=b", "--rename", "a=c"], 1, ("--rename a", "twice")),
    ("probe rename nothing", [*PROBE, "--rename", "a=b"], 1, ("'a'", "no part of a name", "'w'")),
    ("probe no weights", ["probe", "file", *PROBE[2:]], 1, ("file", "damaged", "no file of torch")),
    ("settings method", ["settings", "sdg"], 1, ("'sdg'", "did you mean 'sgd'")),
    (
        "probe crop of a named set",
        ["probe", "other.safetensors", "--arch", "convnet", "--data", "digits", "--crop", "8"],
        1,
        ("crop", "image folder", "'digits'"),
    ),
    ("probe without arch", ["probe", "other.safetensors"], 1, ("--arch", "--data")),
    (
        "probe nothing",
        ["probe", "none.safetensors", "--arch", "convnet", "--data", "digits"],
        1,
        ("none.safetensors",),
    ),
    (
        "probe truncated",
        ["probe", "short.safetensors", "--arch", "convnet", "--data", "digits"],
        1,
        ("short.safetensors", "not readable as safetensors"),
    ),
    (
        "probe another model",
        ["probe", "other.safetensors", "--arch", "convnet", "--data", "digits"],
        1,
        ("other.safetensors", "does not fit convnet", "17 names missing", "'convs.0.weight'", "--rename OLD=NEW"),
    ),
    ("report dataset", ["report", "--dataset", "cifr10"], 1, ("cifr10'", "did you mean 'cifar10'")),
    ("report profile", ["report", "--profile", "fast"], 1, ("'fast'", "quick, full")),
    ("report seeds", ["report", "--seeds", "0"], 1, ("seeds", "at least 1", "not 0")),
    ("report name upwards", ["report", "--name", "../../evil"], 1, ("name", "one folder", "'../../evil'")),
    ("report name a root", ["report", "--name", "/evil"], 1, ("name", "one folder", "'/evil'")),
    ("report name dots", ["report", "--name", ".."], 1, ("name", "one folder", "'..'")),
    ("report name empty", ["report", "--name", ""], 1, ("name", "one folder", "''")),
    ("report name two lines", ["report", "--name", "a\nb"], 1, ("name", "one folder", "a\\nb")),
    ("report into a file", ["report", "--reports", "file"], 1, ("must be a folder", "file")),
    ("report notebook", ["report", "--notebook", "equal_costs"], 1, ("'equal_costs'", "did you mean 'equal_cost'")),
    ("report notebook upwards", ["report", "--notebook", "../x"], 1, ("'../x'", "accuracy_vs_sparsity")),
    ("report notebooks", ["report", "--notebooks", "none"], 1, ("No such file or directory", "'none'")),
    ("report parameter", ["report", "-p", "epcohs", "3"], 1, ("'epcohs'", "did you mean 'epochs'")),
    ("report tag", ["report", "-p", "model", SYSTEM], 1, ("model", "os.system", "YAML of plain values")),
    ("report output", ["report", "-p", "output", "/etc"], 1, ("output", "no free parameter")),
    ("report epochs", ["report", "-p", "epochs", "-3"], 1, ("epochs", "from 1", "-3")),
    ("report threads", ["report", "-p", "epochs", "1", "--threads", "0"], 1, ("threads", "at least 1", "not 0")),
]  # fmt: skip


def typed(arguments, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    return status, *capsys.readouterr()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("arguments", "status", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_wrong_call_is_one_line_and_leaves_nothing(arguments, status, words, folder, capsys, monkeypatch):
    monkeypatch.setenv("CRAM_BENCH_RUNS", str(folder / "runs"))
    cb.data.load("digits")  # what it keeps of its images is no trace of a call, nor what matplotlib keeps of fonts
    cb.plots.look("sgd")
    before = found(folder)
    (own,) = Store().runs()
    returned, out, err = typed([own.id if argument == "ID" else argument for argument in arguments], capsys)
    assert returned == status
    lines = err.splitlines()
    assert "Traceback" not in err
    if status == 1:
        assert out == ""
        assert len(lines) == 1
        check_line(lines[0], ("cram-bench: ", *words))
    else:
        check_line(lines[-1], ("error: ", *words))  # the lines before say how it is called
    left = {name.rpartition("/")[2] for name in set(found(folder)) - set(before)}
    assert left <= ({"failed.json", "settings.json", "data.json"} if "1e30" in arguments else set())
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("variable", ["CRAM_BENCH_RUNS", "CRAM_BENCH_DATA"])
@pytest.mark.parametrize("command", [["runs"], [*TRAIN, "--dataset", "cifar10"], ["report", "--dataset", "cifar10"]])
def test_a_variable_that_names_a_file(variable, command, folder, capsys, monkeypatch):
    if variable == "CRAM_BENCH_DATA" and command == ["runs"]:
        pytest.skip("reads no data")
    monkeypatch.setenv(variable, str(folder / "file"))
    status, out, err = typed(command, capsys)
    assert (status, out) == (1, "")
    check_line(err.strip(), ("must be a folder", f"{folder / 'file'}", variable))


def test_a_run_that_failed_stands_in_the_list(folder, capsys):
    assert typed(["train", "--epochs", "1", "-s", "lr", "1e30"], capsys)[0] == 1
    status, out, _ = typed(["runs"], capsys)
    assert status == 0
    assert "failed" in out


VALUES = st.text(max_size=30) | st.sampled_from(
    ["!!int x", "!!float [1]", "!!set {a}", "!!binary x", "*a", "1e999", "0x", "? a", "'", "-", "\x00",
     "---\na\n---\nb", "!!null 3"]
) | st.integers().map(str) | st.floats().map(repr)  # fmt: skip


@QUICK
@given(
    st.sampled_from(["lr", "epochs", "model", "compressors", "start", "augment", "lrr", ""]) | st.text(max_size=5),
    VALUES,
)
def test_any_setting_is_read_or_refused_in_one_line(name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cram_bench.runs.ensure", lambda *a, **k: (_ for _ in ()).throw(ValueError("as far as it goes")))
        heard = []
        patch.setattr("builtins.print", lambda text, **k: heard.append(text))
        try:
            assert cli.main(["train", "-s", name, value]) == 1
        except SystemExit:  # argparse, of a value that looks like an option
            return
        check_line(" ".join(heard), ("cram-bench: ",))
        assert len(heard) == 1


# ---------------------------------------------------------------- notebooks

CODE = '__import__("os").system("touch executed")'
QUOTED = f"x'\"\n{CODE}\n#"

# parameters of report.build, its other arguments, exception, words
NOTEBOOKS = [
    ("unknown", {"epcohs": 3}, {}, ValueError, ("'epcohs'", "did you mean 'epochs'")),
    ("a list of them", [1], {}, TypeError, ("parameters", "mapping", "[1]")),
    ("text for int", {"epochs": "3"}, {}, TypeError, ("epochs", "default 0", "'3'")),
    ("bool for int", {"calibration": True}, {}, TypeError, ("calibration", "default 2000", "True")),
    ("none", {"model": None}, {}, TypeError, ("model", "default ''", "None")),
    ("text for list", {"methods": "sgd"}, {}, TypeError, ("methods", "'sgd'")),
    ("empty list", {"sparsities": []}, {}, TypeError, ("sparsities", "[]")),
    ("a word among numbers", {"sparsities": [0.5, "much"]}, {}, TypeError, ("sparsities", "'much'")),
    ("sparsity one", {"sparsities": [1.0]}, {}, ValueError, ("[0, 1)", "global@1")),
    ("sparsity nan", {"sparsities": [float("nan")]}, {}, ValueError, ("sparsities", "finite", "nan")),
    ("sparsity negative", {"sparsities": [-0.5]}, {}, ValueError, ("sparsities", ">= 0", "-0.5")),
    ("pattern", {"patterns": ["globl"]}, {}, ValueError, ("'globl@", "global@0.9")),
    ("pattern 5:4", {"patterns": ["5:4"]}, {}, ValueError, ("0 < n <= m", "5:4")),
    ("method", {"methods": ["sgd", "crm"]}, {}, ValueError, ("'crm'", "did you mean 'cram'")),
    ("model", {"model": "resnet21"}, {}, ValueError, ("'resnet21'", "did you mean 'resnet20'")),
    ("no calibration", {"calibration": 0}, {}, ValueError, ("calibration", "at least 1", "not 0")),
    ("no sample", {"sample": -1}, {}, ValueError, ("sample", "at least 1", "-1")),
    ("no direction", {"directions": 0}, {}, ValueError, ("directions", "at least 1", "not 0")),
    ("rho nan", {"rho": float("nan")}, {}, ValueError, ("rho", "finite", "nan")),
    ("radii infinite", {"radii": [float("inf")]}, {}, ValueError, ("radii", "finite", "inf")),
    ("ball negative", {"ball": -0.5}, {}, ValueError, ("ball", ">= 0", "-0.5")),
    ("reserved", {"store": "/etc"}, {}, ValueError, ("store", "no free parameter", "CRAM_BENCH_RUNS")),
    ("code as a model", {"model": QUOTED}, {}, ValueError, ("unknown model", "__import__")),
    ("code as a method", {"methods": [QUOTED]}, {}, ValueError, ("unknown method", "__import__")),
    ("code as a pattern", {"patterns": [QUOTED]}, {}, ValueError, ("unknown compressor", "__import__")),
    ("code as a name", {CODE: 1}, {}, ValueError, ("unknown parameter", "__import__")),
    ("code as a data set", {}, {"dataset": QUOTED}, ValueError, ("unknown data set", "__import__")),
    ("target of another", {"target": "digits"}, {"questions": ["transfer"]}, ValueError, ("transfer", "'digits'")),
    ("target epochs", {"target_epochs": 0}, {"questions": ["transfer"]}, ValueError,
     ("target_epochs", "at least 1", "not 0")),
    ("questions a text", {}, {"questions": "equal_cost"}, TypeError, ("questions", "list", "'equal_cost'")),
    ("no question", {}, {"questions": []}, ValueError, ("at least one notebook",)),
    ("seeds true", {}, {"seeds": True}, TypeError, ("seeds", "integer", "True")),
    ("name a number", {}, {"name": 5}, TypeError, ("name", "text", "5")),
    ("name upwards", {}, {"name": "a/../../b"}, ValueError, ("name", "one folder", "'a/../../b'")),
    ("paths a text", {}, {"paths": "no"}, TypeError, ("paths", "True or False", "'no'")),
    ("keep_runs a number", {}, {"keep_runs": 1}, TypeError, ("keep_runs", "True or False", "not 1")),
    ("profile none", {}, {"profile": None}, TypeError, ("profile", "str", "None")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "options", "error", "words"), [row[1:] for row in NOTEBOOKS], ids=[row[0] for row in NOTEBOOKS]
)
def test_a_wrong_parameter_is_refused_before_anything_trains(parameters, options, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(error) as caught:
        report.build(**({"dataset": "digits", "parameters": parameters, "reports": tmp_path / "reports"} | options))
    check_line(str(caught.value), words)
    assert not found(tmp_path)
    assert not (tmp_path / "reports").exists()


# in a notebook's own check, without `build` before it: parameters, exception, words
CHECKED = [
    ("unknown", {"epcohs": 3}, NameError, ("'epcohs'", "did you mean 'epochs'")),
    ("missing", {}, NameError, ("'epochs'", "missing")),
    ("bool", {"epochs": True}, TypeError, ("epochs", "int", "True")),
    ("text", {"epochs": QUOTED}, TypeError, ("epochs", "int", "__import__")),
    ("none", {"epochs": None}, TypeError, ("epochs", "int", "None")),
    ("negative", {"epochs": -1}, ValueError, ("epochs", ">= 0", "-1")),
    ("nan", {"epochs": 1, "rho": float("nan")}, ValueError, ("rho", "finite", "nan")),
    ("list", {"epochs": 1, "rho": [0.1]}, TypeError, ("rho", "float", "[0.1]")),
    (
        "nan under a wrong name",
        {"epochs": 1, "roh": float("nan"), "In": ["", "# Parameters\nroh = float('nan')\n"]},
        NameError,
        ("'roh'", "did you mean 'rho'"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("namespace", "error", "words"), [row[1:] for row in CHECKED], ids=[row[0] for row in CHECKED])
def test_a_notebook_refuses_by_itself(namespace, error, words):
    defaults = {"rho": 0.1}
    with pytest.raises(error) as caught:
        report.check_parameters(defaults | namespace, epochs=int, rho=float)
    check_line(str(caught.value), words)


def test_what_papermill_is_given_arrives_as_plain_text_and_is_not_executed(tmp_path):
    """Texts that would end a Python string, or that are code, as the values of every kind of parameter."""
    values = {
        "a": QUOTED, "b": f'"; {CODE}; "', "c": f'"""\n{CODE}\n"""', "d": "\\", "e": f"\\\"+{CODE}+\\\"",
        "f": [f"']; {CODE}; ['", "${x}", "{x}"], "g": "\u2028\r\x00\x1b", "h": f"'''{CODE}'''",
    }  # fmt: skip
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
    )
    defaults = "\n".join(f"{name} = {[''] if isinstance(value, list) else ''!r}" for name, value in values.items())
    notebook.cells = [
        nbformat.v4.new_code_cell(defaults, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import json\nimport cram_bench as cb\n"
            "cb.report.check_parameters(globals(), f=list[str], "
            f"**dict.fromkeys({[n for n in values if n != 'f']!r}, str))\n"
            "with open('values.json', 'w') as file:\n"
            f"    json.dump({{name: globals()[name] for name in {list(values)!r}}}, file)"
        ),
    ]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(
        tmp_path / "in.ipynb",
        tmp_path / "out.ipynb",
        values,
        progress_bar=False,
        cwd=str(tmp_path),
        kernel_name="python3",
    )
    assert json.loads((tmp_path / "values.json").read_text()) == values
    assert not (tmp_path / "executed").exists()


def test_a_report_on_a_folder_named_like_code_with_a_run_that_fails(tmp_path, monkeypatch):
    """The name arrives as a name; the failed run shows as failed, and the results of the other are all there."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / """a'"; __import__('os').system('touch executed'); <script>alert(1)</script>""".replace("/", "_")
    for split in ("train", "test"):
        for index, name in enumerate(("cat", "dog")):
            (data / split / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (8, 8), (90 * index + number, 9, 9)).save(data / split / name / f"{number}.png")
    changes = {"epochs": 1, "model": "convnet"}
    failing = recipe(data, "sam", **changes)
    work = tmp_path / "runs" / ".training" / failing.id  # a report has no parameter that makes one method diverge
    work.mkdir(parents=True)
    (work / "settings.json").write_text(json.dumps(failing.settings()))
    (work / "failed.json").write_text(json.dumps({"reason": "the training loss is nan in epoch 1"}))
    built = report.build(
        str(data), "quick", 1, changes | {"methods": ["sgd", "sam"], "sparsities": [0.5]},
        questions=["accuracy_vs_sparsity"], reports=tmp_path / "reports",
    )  # fmt: skip
    assert built.failures == {}
    assert built.folder.parent == tmp_path / "reports"
    tables = {path.stem: pd.read_csv(path) for path in (built.folder / "tables").glob("*.csv")}
    curves = tables["accuracy_vs_sparsity"]
    assert curves.loc[curves["method"] == "sgd", "accuracy"].notna().tolist() == [True] * 4
    assert curves.loc[curves["method"] == "sam", "accuracy"].isna().tolist() == [True]
    states = tables["runs"].set_index("method")["state"]
    assert states["sgd"] == "finished"
    assert states["sam"].startswith("failed: ")
    page = (built.folder / "index.html").read_text()
    assert "failed" in page
    assert "SAM: failed" in re.sub(r"<!--|-->", "", (built.folder / "figures" / "accuracy_vs_sparsity.svg").read_text())
    assert "<script>alert(1)" not in page
    assert not list(tmp_path.rglob("executed"))


def test_how_many_bad_inputs_are_tried(counted):
    """The number that the documentation gives: of all the tables together."""
    assert len(LIBRARY) + len(ROWS) + len(NOTEBOOKS) + len(CHECKED) >= 300
    counted("wrong inputs", len(LIBRARY) + len(ROWS) + len(NOTEBOOKS) + len(CHECKED))
    for rows in (ROWS, NOTEBOOKS, CHECKED):
        assert len({row[0] for row in rows}) == len(rows)
