"""The notebooks through papermill on digits, and what the report's folder then holds."""

import base64
import json
import re
import shutil

import nbformat
import pandas as pd
import pytest
from PIL import Image

import cram_bench as cb
from cram_bench import report

SMALL = {"epochs": 2, "sample": 200, "directions": 1, "sparsities": [0.5, 0.9], "methods": ["sgd", "cram+-multi"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return (reports, runs, caches) shared by the tests of this file: building a report takes a while."""
    return tmp_path_factory.mktemp("reports"), tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_runs(folders, monkeypatch):
    monkeypatch.setenv("CRAM_BENCH_RUNS", str(folders[1]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders[2]))


@pytest.fixture(scope="module")
def built(folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRAM_BENCH_RUNS", str(folders[1]))
        patch.setenv("XDG_CACHE_HOME", str(folders[2]))
        return report.build(
            "digits", "quick", 1, SMALL, reports=folders[0], keep_runs=True, command="cram-bench report"
        )


def test_the_report_is_complete(built):
    assert built.failures == {}
    assert built.folder.name == "digits-convnet-quick"
    for stem in report.DEFAULT:
        assert (built.folder / f"{stem}.html").stat().st_size > 1000
        assert nbformat.read(built.folder / f"{stem}.ipynb", as_version=4).cells
    figures = {path.stem for path in (built.folder / "figures").glob("*.svg")}
    assert figures == {path.stem for path in (built.folder / "figures").glob("*.png")}
    assert {"accuracy_vs_sparsity", "cram_gap", "loss_in_ball", "loss_in_plane", "sam_sharpness"} <= figures
    index = (built.folder / "index.html").read_text()
    assert index.index("figures/accuracy_vs_sparsity.svg") < index.index("<table") < index.index("cram-bench report")
    assert cb.runs.commit() in index
    assert not list(built.folder.rglob("*.part*"))
    committed = sorted((built.folder / "runs").iterdir())
    assert len(committed) == 2
    assert all(cb.runs.Run.open(path).experiment.seed == 0 for path in committed)


def test_the_main_table_has_its_columns_and_agrees_with_the_library(built):
    table = pd.read_csv(built.folder / "tables" / "accuracy_vs_sparsity.csv")
    names = ["method", "seed", "pattern", "sparsity", "calibrated", "accuracy", "loss"]
    assert list(table.columns) == [*names, "dense_weights"]
    assert set(table["sparsity"]) == {0.0, 0.5, 0.9}
    run = cb.runs.Store().find(cb.experiment.recipe("digits", "sgd", epochs=2))
    train, test = cb.data.load("digits")
    curve = cb.probes.sparsity_curve(run.load_model(), test, ["global@0.9"], calibration=train)
    ours = table[(table["method"] == "sgd") & (table["sparsity"] == 0.9)]["accuracy"].tolist()
    assert ours == curve[curve["sparsity"] == 0.9]["accuracy"].tolist()


def test_no_path_of_this_machine_is_written_into_the_report(built, folders):
    for path in built.folder.rglob("*"):
        if path.suffix in {".ipynb", ".html", ".csv", ".json", ".svg"}:
            text = path.read_text()
            assert str(folders[0]) not in text, path
            assert str(folders[1]) not in text, path


def test_a_table_that_was_changed_is_made_again(built, folders):
    file = built.folder / "tables" / "accuracy_vs_sparsity.csv"
    before = file.read_bytes()
    file.write_bytes(before.replace(b"global", b"grobal", 1))
    report.build("digits", "quick", 1, SMALL, reports=folders[0], keep_runs=True, command="cram-bench report")
    assert file.read_bytes() == before


def test_running_again_does_nothing_and_a_removed_output_is_made_again(built, folders, monkeypatch, capsys):
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained again"))
    report.build("digits", "quick", 1, SMALL, reports=folders[0])
    assert "executing" not in capsys.readouterr().err
    (built.folder / "figures" / "accuracy_vs_sparsity.svg").unlink()
    threads = []
    executes = report.execute_all
    monkeypatch.setattr(
        report, "execute_all", lambda *given, **how: (threads.append(how["threads"]), executes(*given, **how))[1]
    )
    report.build("digits", "quick", 1, SMALL, reports=folders[0])
    assert re.findall(r"executing (\w+)", capsys.readouterr().err) == ["accuracy_vs_sparsity"]
    assert threads == [1]  # of each kernel, on digits


def test_a_failing_notebook_is_named_and_the_others_appear(built, folders, tmp_path):
    notebooks = tmp_path / "notebooks"
    shutil.copytree(report.notebooks_folder(), notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    broken = nbformat.read(notebooks / "loss_stability.ipynb", as_version=4)
    broken.cells[2].source += "\nraise RuntimeError('no such luck')"
    nbformat.write(broken, notebooks / "loss_stability.ipynb")
    result = report.build("digits", "quick", 1, SMALL, reports=tmp_path, notebooks=notebooks)
    assert list(result.failures) == ["loss_stability"]
    assert "no such luck" in result.failures["loss_stability"]
    index = (result.folder / "index.html").read_text()
    assert "no such luck" in index
    assert (result.folder / "figures" / "accuracy_vs_sparsity.svg").exists()
    assert (result.folder / "loss_stability.html").exists()


def test_a_notebook_whose_kernel_dies_is_named_too(built, tmp_path):
    notebooks = tmp_path / "notebooks"
    shutil.copytree(report.notebooks_folder(), notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    broken = nbformat.read(notebooks / "accuracy_vs_sparsity.ipynb", as_version=4)
    broken.cells[2].source = "import os\nos._exit(1)"
    nbformat.write(broken, notebooks / "accuracy_vs_sparsity.ipynb")
    result = report.build("digits", "quick", 1, SMALL, reports=tmp_path, notebooks=notebooks)
    assert list(result.failures) == ["accuracy_vs_sparsity"]
    assert (result.folder / "figures" / "cram_gap.svg").exists()


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"epcohs": 3}, ValueError, "unknown parameter 'epcohs'; did you mean 'epochs'"),
        ({"epochs": "3"}, TypeError, "epochs must be like its default 0, not '3'"),
        ({"epochs": -3}, ValueError, "epochs must be from 1 to 1000000, not -3"),
        ({"methods": ["sdg"]}, ValueError, "unknown method 'sdg'; did you mean 'sgd'"),
        ({"methods": []}, TypeError, "methods must be like its default"),
        ({"sparsities": [0.5, "much"]}, TypeError, "sparsities must be like its default"),
        ({"sparsities": [1.5]}, ValueError, "sparsity must be in \\[0, 1\\]"),
        ({"patterns": ["globl"]}, ValueError, "unknown compressor 'globl@"),
        ({"model": "resnet21"}, ValueError, "unknown model 'resnet21'; did you mean 'resnet"),
        ({"seeds": 2}, ValueError, "seeds is no free parameter: use --dataset, --seeds"),
        ({"calibration": True}, TypeError, "calibration must be like its default"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_trains(parameters, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(error, match=message):
        report.build("digits", parameters=parameters, reports=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown profile 'fast'"):
        report.build("digits", "fast", reports=tmp_path)


def test_a_notebook_alone_refuses_what_papermill_only_warns_about(tmp_path):
    import papermill

    path = report.notebooks_folder() / "accuracy_vs_sparsity.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'epochs'"):
        papermill.execute_notebook(
            path, tmp_path / "out.ipynb", {"epcohs": 3}, progress_bar=False, kernel_name="python3"
        )


@pytest.mark.parametrize(
    ("namespace", "error", "message"),
    [
        ({"epochs": True}, TypeError, "epochs must be int, not True"),
        ({"epochs": 1.5}, TypeError, "epochs must be int, not 1.5"),
        ({}, NameError, "'epochs' is missing"),
    ],
)
def test_check_parameters(namespace, error, message):
    with pytest.raises(error, match=message):
        report.check_parameters(namespace, epochs=int)
    report.check_parameters({"epochs": 1, "cb": cb, "_private": 0, "In": []}, epochs=int)
    report.check_parameters({"rho": 1}, rho=float)


def test_a_notebook_can_be_run_again_in_the_same_kernel():
    """Its own results are global names by then, and no parameters."""
    cells = ["epochs = 3\nrates = [0.1]", "import x\nout = x.Output(epochs)", "# Parameters\nepcohs = 5"]
    namespace = {"epochs": 3, "rates": [0.1], "out": object(), "In": ["", *cells[:2]]}
    report.check_parameters(namespace, epochs=int, rates=list[float])
    with pytest.raises(NameError, match="'epcohs'; did you mean 'epochs'"):
        report.check_parameters(namespace | {"epcohs": 5, "In": cells}, epochs=int, rates=list[float])


def test_the_outputs_of_a_notebook_are_known_beforehand(built):
    listed = {name for stem in report.DEFAULT for name in report.outputs(built.folder / f"{stem}.ipynb")}
    found = {
        f"{path.parent.name}/{path.name}" for part in ("figures", "tables") for path in (built.folder / part).iterdir()
    }
    assert listed == found


def test_notebooks_are_committed_bare_and_hold_no_functions():
    for path in sorted(report.notebooks_folder().glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code), path
        source = "\n".join("".join(cell["source"]) for cell in code)
        assert "def " not in source, path
        assert "lambda" not in source, path
        assert path.stem in {*report.NOTEBOOKS, "explore"}  # explore is for the reader, not for a report


def test_a_report_answers_the_questions_it_is_asked(folders, monkeypatch):
    for split, count in (("train", 8), ("test", 4)):
        for label in ("dark", "light"):
            (folders[0] / "grey" / split / label).mkdir(parents=True)
            for index in range(count):
                shade = 20 * index + (0 if label == "dark" else 100)
                Image.new("L", (8, 8), shade).save(folders[0] / "grey" / split / label / f"{index}.png")
    monkeypatch.chdir(folders[0])
    small = {"epochs": 1, "sparsities": [0.5, 0.9], "target": "grey", "target_epochs": 1}
    questions = ("transfer", "equal_cost", "ablations")
    built = report.build("digits", "quick", 1, small, questions=questions, reports=folders[0])
    assert built.failures == {}
    assert built.folder.name == "digits-convnet-quick-transfer-equal-cost-ablations"
    index = (built.folder / "index.html").read_text()
    assert "<dd>digits and grey, convnet, 1, 2 epochs, seeds 0, float32</dd>" in index
    assert index.index("figures/transfer.svg") < index.index("<table") < index.index("figures/ablations.svg")
    tables = {path.stem: pd.read_csv(path) for path in (built.folder / "tables").glob("*.csv")}
    transferred = tables["transfer"]
    assert set(zip(transferred["method"], transferred["sparsity"], strict=True)) == {
        (method, level) for method in ("sgd", "sam", "cram+-multi") for level in (0.0, 0.5, 0.9)
    }
    cost = tables["accuracy_by_cost"].groupby("method")[["epochs", "gradients"]].max()
    assert set(cost["gradients"]) == {2}
    assert cost.loc["sgd", "epochs"] == cost.loc["cram-half", "epochs"] == 2 * cost.loc["sam", "epochs"] == 2
    assert list(tables["ablations_summary"]["accuracy, %"])[:2] == ["CrAM+-Multi", "ramp"]
    assert tables["ablations_summary"]["90"].between(0, 100).all()
    assert len(tables["ablations_spread"]) == 12 * (2 + 2)  # changes × (two levels tuned; dense, untuned and tuned)
    ours = [run for run in cb.runs.Store().runs() if run.experiment.prune == "global@0.9"]
    assert len(ours) == 3


@pytest.mark.parametrize("questions", [("equal_costs",), ()])
def test_a_question_that_is_not_known_is_refused_before_anything_trains(questions, folders):
    with pytest.raises(ValueError, match="did you mean 'equal_cost'|at least one notebook"):
        report.build("digits", questions=questions, reports=folders[0] / "none")
    assert not (folders[0] / "none").exists()


def test_the_page_carries_a_slider_and_the_shelf_compares_reports(built):
    index = (built.folder / "index.html").read_text()
    data = json.loads(re.search(r"const data = (\{.*?\}), \$ =", index)[1])
    table = pd.read_csv(built.folder / "tables" / "accuracy_vs_sparsity.csv")
    tuned = table[table["calibrated"] & (table["method"] == "sgd")].set_index("sparsity")["accuracy"]
    assert data["values"]["global|True"]["sgd"]["0.9"] == [pytest.approx(tuned[0.9]), None]
    assert data["methods"]["sgd"] == ["SGD", "#000000", ""]
    assert len({tuple(look) for look in data["methods"].values()}) == len(data["methods"])
    assert not re.search(r'<img src="(?!data:)', index)  # the page alone can be sent to somebody
    pictures = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', index)
    assert base64.b64decode(pictures[0][0]) == (built.folder / "figures" / "accuracy_vs_sparsity.svg").read_bytes()
    assert pictures[0][1].startswith("Test accuracy against sparsity")
    assert "aria-valuetext" in index
    index = re.sub(r"base64,[^\"]*", "", index)
    assert "http" not in re.sub(r"https?://(www.w3.org|arxiv.org)", "", index)  # nothing from the network
    shelf = (built.folder.parent / "index.html").read_text()
    assert f"{built.folder.name}/figures/accuracy_vs_sparsity.svg" in shelf
    assert "CrAM+-Multi" in shelf
