"""The notebooks through papermill on digits, and what the report's folder then holds."""

import base64
import html
import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from PIL import Image

import cram_bench as cb
from cram_bench import cli, report
from cram_bench.files import sealed, sha256, unsealed
from cram_bench.report import building, findings, pages
from cram_bench.report.plan import plan

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
    run = cb.runs.Store().find(cb.recipes.recipe("digits", "sgd", epochs=2))
    train, test = cb.data.load("digits")
    curve = cb.probes.sparsity_curve(run.load_model(), test, ["global@0.9"], calibration=train)
    ours = table[(table["method"] == "sgd") & (table["sparsity"] == 0.9)]["accuracy"].tolist()
    assert ours == curve[curve["sparsity"] == 0.9]["accuracy"].tolist()


def test_the_tables_are_what_the_library_gives(built):
    """Whatever a notebook does with parameters, samples and runs: the same calls here give the same numbers."""
    tables = {path.stem: pd.read_csv(path) for path in (built.folder / "tables").glob("*.csv")}
    experiments = cb.recipes.grid("digits", SMALL["methods"], 1, epochs=2)
    trained = [cb.runs.Store().find(experiment) for experiment in experiments]
    train, test = cb.data.load("digits")
    part, calibrating = train.sample(SMALL["sample"], seed=0), train.calibration(augment=experiments[0].data.augment)
    levels, probes = ["global@0.5", "global@0.9"], cb.probes
    slices = probes.over_runs(trained, probes.loss_in_ball, part, radius=0.5, directions=1)
    few = part.sample(200, seed=0)
    claims = probes.over_runs(trained, probes.stability, part, "global@0.9", calibrating, rho=0.2, few=few)
    claims = probes.with_random_directions(claims, slices)
    decided = probes.verdicts(claims, ["cram+-multi"], "sgd")
    curves = probes.over_runs(
        trained, probes.sparsity_curve, test, levels, train.calibration(2000, experiments[0].data.augment)
    )
    ours = {
        "accuracy_vs_sparsity": curves,
        "cram_gap": probes.over_runs(trained, probes.cram_gap, part, levels, rho=0.2, calibration=calibrating),
        "loss_along_compression": probes.over_runs(trained, probes.loss_along_compressions, part, levels),
        "sam_sharpness": probes.over_runs(trained, probes.sam_sharpness, part, [0.02, 0.05, 0.1, 0.2]),
        "loss_in_ball": slices,
        "loss_in_plane": probes.over_runs(trained, probes.loss_in_plane, part, radius=0.5, points=11),
        "stability": claims,
        "verdicts": decided,
    }
    assert tables.keys() == {*ours, "runs", "accuracy_summary", "verdicts_summary"}
    for name, table in ours.items():
        pd.testing.assert_frame_equal(tables[name], table, rtol=1e-2, atol=1e-4, check_dtype=False, obj=name)
    assert tables["runs"]["run"].tolist() == [run.id for run in trained]
    assert tables["runs"]["dense_accuracy"].tolist() == [run.history["test_accuracy"].iloc[-1] for run in trained]
    summary = probes.accuracy_table(tables["accuracy_vs_sparsity"])
    assert tables["accuracy_summary"].set_index("accuracy, %").astype(str).equals(summary.astype(str))
    shown = pd.read_csv(built.folder / "tables" / "verdicts_summary.csv", dtype=str).fillna("")
    # of the table that was written: on another number of threads the last digit of a trace is another
    assert shown.to_numpy().tolist() == probes.verdict_table(tables["verdicts"]).to_numpy().tolist()


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
    executes = building.execute_all
    monkeypatch.setattr(
        building, "execute_all", lambda *given, **how: (threads.append(how["threads"]), executes(*given, **how))[1]
    )
    report.build("digits", "quick", 1, SMALL, reports=folders[0])
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"executing accuracy_vs_sparsity.ipynb, 1 of 1\naccuracy_vs_sparsity.ipynb done in \d+ s\n", said
    )
    assert threads == [1]  # of each kernel, on digits


def test_a_failing_notebook_is_named_and_the_others_appear(built, folders, tmp_path, capsys):
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
    given = ["--seeds", "1", "--reports", str(tmp_path / "again"), "--notebooks", str(notebooks)]
    given += [word for name, value in SMALL.items() for word in ("-p", name, json.dumps(value))]
    assert cli.main(["report", *given, "--notebook", "loss_stability"]) == 1
    assert "the notebook loss_stability failed: cell 3: RuntimeError: no such luck" in capsys.readouterr().err
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
        ({"epochs": "3"}, TypeError, "epochs must be int like its default 0, not '3'"),
        ({"epochs": -3}, ValueError, "epochs must be from 1 to 1000000, not -3"),
        ({"methods": ["sdg"]}, ValueError, "unknown method 'sdg'; did you mean 'sgd'"),
        ({"methods": []}, TypeError, "methods must be list\\[str\\] like its default"),
        ({"sparsities": [0.5, "much"]}, TypeError, "sparsities must be list\\[float\\] like its default"),
        ({"sparsities": [1.5]}, ValueError, "sparsity must be in \\[0, 1\\]"),
        ({"patterns": ["globl"]}, ValueError, "unknown compressor 'globl@"),
        ({"model": "resnet21"}, ValueError, "unknown model 'resnet21'; did you mean 'resnet"),
        ({"seeds": 2}, ValueError, "seeds is no free parameter: use --dataset, --seeds"),
        ({"calibration": True}, TypeError, "calibration must be int like its default"),
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


def test_a_table_keeps_eight_digits_and_its_named_index(tmp_path):
    table = pd.DataFrame({"loss": [0.12345678, 123456.78]}, index=["a", "b"])
    shown = report.Output(tmp_path).table(table, "plain")
    report.Output(tmp_path).table(table.rename_axis("what"), "named")
    assert shown is table
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "tables" / "plain.csv"), table.reset_index(drop=True), rtol=1e-7
    )
    assert list(pd.read_csv(tmp_path / "tables" / "named.csv")) == ["what", "loss"]


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
    assert "<dd>digits and grey, convnet, 1 and 2 epochs, seed 0, float32</dd>" in index
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
    ours = [run for run in cb.runs.Store().runs() if run.experiment.pruning.prune == "global@0.9"]
    assert len(ours) == 3


@pytest.mark.parametrize("questions", [("equal_costs",), ()])
def test_a_question_that_is_not_known_is_refused_before_anything_trains(questions, folders):
    with pytest.raises(ValueError, match="did you mean 'equal_cost'|at least one notebook"):
        report.build("digits", questions=questions, reports=folders[0] / "none")
    assert not (folders[0] / "none").exists()


def test_the_page_carries_a_chart_and_the_shelf_compares_reports(built):
    index = (built.folder / "index.html").read_text()
    spec = json.loads(re.search(r"^draw\((\{.*\}), document.currentScript", index, re.MULTILINE)[1])
    table = pd.read_csv(built.folder / "tables" / "accuracy_vs_sparsity.csv")
    tuned = table[table["calibrated"] & (table["method"] == "sgd")].set_index("sparsity")["accuracy"]
    (rows,) = spec["datasets"].values()
    (row,) = [r for r in rows if (r["method"], r["level"], r["tuned"]) == ("SGD", "90 %", True)]
    assert (row["mean"], row["std"]) == (pytest.approx(100 * tuned[0.9]), None)
    assert len(index.encode()) < 2**21 + sum(len(figure.read_bytes()) * 4 / 3 for figure in built.folder.rglob("*.svg"))
    assert not re.search(r'<img src="(?!data:)', index)  # the page alone can be sent to somebody
    pictures = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', index)
    assert base64.b64decode(pictures[0][0]) == (built.folder / "figures" / "accuracy_vs_sparsity.svg").read_bytes()
    assert pictures[0][1].startswith("Test accuracy against sparsity")
    assert "aria-valuetext" in index
    index = re.sub(r"base64,[^\"]*", "", index).replace(spec["$schema"], "")
    assert "http" not in re.sub(r"https?://(www.w3.org|arxiv.org)", "", index)  # nothing from the network
    shelf = (built.folder.parent / "index.html").read_text()
    assert f"{built.folder.name}/figures/accuracy_vs_sparsity.svg" in shelf
    assert "CrAM+-Multi" in shelf


# ---------------------------------------------------------------- made anew from tables


def changed(folder, change):
    """Change what a report says of itself, and seal it again."""
    about = unsealed((folder / "report.json").read_text(), "report.json")
    change(about)
    (folder / "report.json").write_text(sealed(about, "report.json"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_is_made_anew_from_its_tables_without_its_runs(built, tmp_path, monkeypatch, capsys):
    """Verdicts and pages follow the tables; measurements, runs and the note of the measurement stay."""
    monkeypatch.setenv("CRAM_BENCH_RUNS", str(tmp_path / "none"))
    folder = tmp_path / "moved"
    shutil.copytree(built.folder, folder, ignore=shutil.ignore_patterns(".done"))
    shutil.rmtree(folder / "runs" / cb.recipes.recipe("digits", "sgd", epochs=2).id)
    file = folder / "tables" / "stability.csv"
    table = pd.read_csv(file)
    table["loss"] = table["method"].map({"sgd": 2.3, "cram+-multi": 0.2})
    table.drop(columns="ascent_gap").to_csv(file, index=False)  # as an older version measured
    (folder / "tables" / "left_over.csv").write_text("a\n1\n")
    assert cli.main(["renew", str(folder)]) == 1
    assert (
        "stability.csv is not the table that was measured; restore it, or build the report" in capsys.readouterr().err
    )

    def sealed_again(about):
        about["sha256"] |= {
            f"tables/{name}.csv": sha256(folder / "tables" / f"{name}.csv") for name in ("stability", "left_over")
        }

    changed(folder, sealed_again)
    before = report.note(folder)
    assert cli.main(["renew", str(folder)]) == 0
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.glob(".moved*"))
    assert not (folder / "tables" / "left_over.csv").exists()
    after = report.note(folder)
    for name in ("accuracy_vs_sparsity", "cram_gap", "loss_in_ball", "loss_in_plane", "sam_sharpness", "runs"):
        assert (folder / "tables" / f"{name}.csv").read_bytes() == (
            built.folder / "tables" / f"{name}.csv"
        ).read_bytes()
    assert all(sha256(folder / name) == digest for name, digest in after["sha256"].items() if name != "report.json")
    assert {"index.html", "loss_stability.html", "loss_stability.ipynb", "tables/verdicts_summary.csv"} < set(
        after["sha256"]
    )
    assert [after[name] for name in ("build", "runs", "versions")] == [
        before[name] for name in ("build", "runs", "versions")
    ]
    assert after["renewed"] == cb.runs.commit()
    assert set(pd.read_csv(folder / "tables" / "verdicts.csv")["verdict"]) == {"not comparable"}
    index = (folder / "index.html").read_text()
    assert "Nothing was trained or measured anew: the weights of 1 of 2 runs are kept" in index
    assert f"<dt>Measured</dt><dd>{before['facts']['Report made']}</dd>" in index
    assert "<h1>How much accuracy does one-shot pruning cost?</h1>" in index
    assert '<p class="about">moved: ' in index
    assert "Not measured in this report: ascent_gap." in index
    notebook = (folder / "loss_stability.ipynb").read_text()
    assert "stability: read from the table that was measured before; nothing is measured anew" in notebook
    assert str(tmp_path) not in notebook
    once = report.note(folder)["facts"]
    assert cli.main(["renew", str(folder)]) == 0
    assert report.note(folder)["facts"]["Measured"] == once["Measured"]


def test_a_report_that_cannot_be_made_anew_stays_as_it_was(built, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(built.folder, folder)
    before = contents(folder)
    notebooks = tmp_path / "notebooks"
    shutil.copytree(report.notebooks_folder(), notebooks)
    broken = nbformat.read(notebooks / "accuracy_vs_sparsity.ipynb", as_version=4)
    broken.cells[2].source += "\nraise RuntimeError('no such luck')"
    nbformat.write(broken, notebooks / "accuracy_vs_sparsity.ipynb")
    assert "no such luck" in report.renew(folder, notebooks).failures["accuracy_vs_sparsity"]
    assert contents(folder) == before
    changed(folder, lambda about: about["build"].update(questions=["anatomy"], parameters={}, seeds=None))
    with pytest.raises(report.ReportError, match="anatomy measures as it goes; build the report instead"):
        report.renew(folder)
    with pytest.raises(report.ReportError, match="is not a report"):
        report.renew(tmp_path)
    assert not list(tmp_path.glob(".moved*"))


def test_a_report_made_anew_is_never_lost_between_the_old_and_the_new(built, tmp_path, monkeypatch):
    folder = tmp_path / "moved"
    shutil.copytree(built.folder, folder)
    before = contents(folder)
    rename = os.rename

    def breaks(source, target):
        if Path(target) == folder and Path(source).name.endswith(".part"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(building, "_execute", lambda *a, **k: {})
    monkeypatch.setattr("os.rename", breaks)
    with pytest.raises(OSError, match="Input/output error"):
        report.renew(folder)
    assert contents(folder) == before
    monkeypatch.setattr("os.rename", rename)
    os.rename(folder, tmp_path / ".moved.old")  # as a kill between the two would leave it
    report.renew(folder)
    assert {name for name in contents(folder) if name.suffix == ".csv"} == {n for n in before if n.suffix == ".csv"}


def test_notebooks_measure_through_their_output_alone():
    """What is measured beside it would be trained and measured when a report is made anew from tables."""
    for stem in report.NOTEBOOKS:
        path = report.notebooks_folder() / f"{stem}.ipynb"
        if "tables" in report.find()[stem].parameters:
            cells = json.loads(path.read_text())["cells"]
            source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
            for call in ("over_runs(", "ensure_all(", "summary(", "transfer_accuracy(", "load_model("):
                assert f"cb.probes.{call}" not in source, (stem, call)
                assert f"cb.runs.{call}" not in source, (stem, call)
        else:
            assert stem == "anatomy"


# ---------------------------------------------------------------- one network in detail


def test_anatomy_is_executed_and_its_tables_are_the_librarys(folders):
    small = {
        "epochs": 1,
        "target_epochs": 1,
        "sample": 60,
        "curvature_sample": 20,
        "sizes": [20],
        "radii": [0.1],
        "points": 3,
    }
    built = report.build("digits", "full", None, small, questions=["anatomy"], reports=folders[0])
    assert built.failures == {}
    tables = {path.stem: pd.read_csv(path) for path in (built.folder / "tables").glob("*.csv")}
    figures = {path.stem for path in (built.folder / "figures").glob("*.svg")}
    assert {f"figures/{name}.svg" for name in figures} | {f"tables/{name}.csv" for name in tables} == {
        name for name in report.outputs(report.notebooks_folder() / "anatomy.ipynb") if not name.endswith("png")
    }
    other, dense, tuned = (
        cb.runs.Store().find(e) for e in cb.recipes.anatomy("digits", ["sgd", "cram+-multi"], "", 1, 0.9, 1)
    )
    assert tables["anatomy_runs"]["run"].tolist() == [other.id, dense.id, tuned.id]
    train, test = cb.data.load("digits")
    part, model = train.sample(60, seed=0), dense.load_model()
    calibrating = train.calibration(augment=dense.experiment.data.augment)
    ours = {
        "layer_blame": cb.probes.layer_blame(model, part, "global@0.9"),
        "calibration_curve": cb.probes.calibration_curve(
            model, test, train, "global@0.9", [20], augment=dense.experiment.data.augment
        ),
        "flips": cb.probes.flips(model, test, "global@0.9", calibration=calibrating),
        "sharpness_over_radii": cb.probes.sharpness_over_radii(model, part, [0.1]),
    }
    for name, table in ours.items():
        pd.testing.assert_frame_equal(tables[name], table, rtol=1e-3, atol=1e-5, check_dtype=False, obj=name)
    assert len(tables["planes"]) == 2 * 9
    assert len(tables["plane_through_three"]) == 9


# ---------------------------------------------------------------- what must be noticed


def test_a_folder_that_cannot_be_written_is_noticed_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained"))
    (tmp_path / "file").touch()
    assert cli.main(["report", "--reports", str(tmp_path / "file" / "reports")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--reports must be a folder, and" in err
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OSError, match="--reports cannot be written"):
        report.build("digits", reports=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_training_that_failed_is_said_at_the_end(monkeypatch, capsys, tmp_path):
    lost = report.Built(tmp_path, {}, {"SAM, seed 0": "the training loss is nan in epoch 1"})
    monkeypatch.setattr(report, "build", lambda *a, **k: lost)
    assert cli.main(["report"]) == 1
    assert "the training SAM, seed 0 failed: the training loss is nan" in capsys.readouterr().err
    monkeypatch.setattr(report, "build", lambda *a, **k: report.Built(tmp_path, {}))
    assert cli.main(["report"]) == 0


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_a_report_is_called_by_its_profile_and_says_it(profile):
    """Whatever else is asked for; and what is made again is of the same profile, whatever the notebook's own is."""
    quick = "-quick" if profile == "quick" else ""
    for questions, rest in ((None, ""), (["second_order"], "-second-order"), (["equal_cost"], "-equal-cost")):
        for seeds in (None, 2):
            planned = plan("digits", profile, seeds, {}, questions)
            assert planned.name == f"digits-convnet{quick}{rest}"
            assert report.building._asked(planned, seeds, {})["profile"] == profile
    usual = plan("digits", "", None, {}, ["second_order"])
    assert (usual.name, usual.profile) == ("digits-convnet-second-order", "full")
    assert plan("digits").name == "digits-convnet-quick"


def test_a_name_that_is_given_is_the_folders_and_failed_trainings_are_returned(monkeypatch, tmp_path):
    lost = cb.runs.Run(tmp_path / "none", cb.recipes.recipe("digits", "sgd", epochs=1), failure="it is nan")
    monkeypatch.setattr(report.building, "_execute", lambda *arguments, **where: {})
    monkeypatch.setattr(report.building.runs, "ensure_all", lambda *arguments, **how: [lost])
    built = report.build("digits", "quick", 1, {"epochs": 1}, reports=tmp_path, name="mine")
    assert built.folder == tmp_path / "mine"
    assert built.trainings == {"SGD, seed 0": "it is nan"}


def test_of_several_seeds_all_runs_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(report.building, "_execute", lambda *arguments, **where: {})
    small = {"epochs": 1, "methods": ["sgd"]}
    asked = {"questions": ["accuracy_vs_sparsity"], "reports": tmp_path, "keep_runs": True}
    built = report.build("digits", "quick", 2, small, **asked)
    assert {cb.runs.Run.open(path).experiment.seed for path in (built.folder / "runs").iterdir()} == {0, 1}


def test_a_notebook_is_executed_again_when_anything_it_depends_on_changed(built, tmp_path, monkeypatch):
    path = tmp_path / "accuracy_vs_sparsity.ipynb"
    path.write_bytes((report.notebooks_folder() / path.name).read_bytes())
    run = cb.runs.Store().find(cb.recipes.recipe("digits", "sgd", epochs=2))
    other = cb.runs.Store().find(cb.recipes.recipe("digits", "cram+-multi", epochs=2))
    package = tmp_path / "package"
    package.mkdir()
    (package / "probes.py").write_text("1")
    monkeypatch.setattr(building, "PACKAGE", package)
    key = building._key(path, {"epochs": 2}, [run])
    assert building._key(path, {"epochs": 2, "output": "elsewhere"}, [run]) == key
    keys = [key, building._key(path, {"epochs": 3}, [run]), building._key(path, {"epochs": 2}, [run, other])]
    keys.append(building._key(path, {"epochs": 2}, [other]))
    keys.append(building._key(path, {"epochs": 2}, [run], {"/data/birds": "birds"}))
    failed = cb.runs.Run(run.path, run.experiment, failure="the loss is nan")
    keys.append(building._key(path, {"epochs": 2}, [failed]))
    (package / "probes.py").write_text("2")
    keys.append(building._key(path, {"epochs": 2}, [run]))
    path.write_text(path.read_text() + " ")
    keys.append(building._key(path, {"epochs": 2}, [run]))
    assert len(set(keys)) == len(keys)


# ---------------------------------------------------------------- the numbers on the page


def table_of(method, seed, cells):
    rows = [
        (method, seed, pattern, sparsity, calibrated, accuracy)
        for (pattern, sparsity, calibrated), accuracy in cells.items()
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "pattern", "sparsity", "calibrated", "accuracy"])


def cells_of(markup):
    rows = re.findall(r"<tr.*?</tr>", markup, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def test_the_page_shows_the_tables_it_stands_on_and_one_dense_accuracy(built):
    index = (built.folder / "index.html").read_text()
    shown = [cells_of(markup) for markup in re.findall(r"<table.*?</table>", index, re.DOTALL)]
    summary = pd.read_csv(built.folder / "tables" / "accuracy_summary.csv", dtype=str).fillna("")
    verdicts = pd.read_csv(built.folder / "tables" / "verdicts_summary.csv", dtype=str).fillna("")
    trained = ["trained at", "dense", "30, 40 … 90 %"]
    accuracy, decided = (next(table for table in shown if name in table[0]) for name in ("trained at", "quantity"))
    assert [row[1] for row in accuracy] == trained
    assert [row[:1] + row[2:] for row in accuracy] == [list(summary.columns), *summary.to_numpy().tolist()]
    assert decided == [list(verdicts.columns), *verdicts.to_numpy().tolist()]
    (drawn,) = json.loads(re.search(r"^draw\((\{.*\}), document.currentScript", index, re.MULTILINE)[1])[
        "datasets"
    ].values()
    for name, dense in zip(("SGD", "CrAM+-Multi"), summary["dense"], strict=True):
        for tuned in (True, False):
            (row,) = [r for r in drawn if (r["method"], r["level"], r["tuned"]) == (name, "dense", tuned)]
            assert f"{row['mean']:.1f}" == dense
    told = findings.findings(built.folder, report.DEFAULT)
    assert len(told) == 2
    assert pages.said(told) in index
    assert index.index('class="result"') < index.index("<img")


def test_facts_are_english_and_escaped():
    def run(seed, threads, **settings):
        known = {"dataset": "cifar10", "model": "resnet20", "epochs": 15, "seed": seed, "precision": "bfloat16"}
        return {
            "settings": known | settings,
            "commit": "abc",
            "device": "a <b> & c",
            "threads": threads,
            "seconds": 90.0,
        }

    machine = {"command": "x", "commit": "def", "versions": {"python": "3.11"}}
    one = pages.facts([run(0, 1)], "report -p a '<b>'", machine)
    assert one["Experiment"] == "cifar10, resnet20 (shortcuts without parameters), 15 epochs, seed 0, bfloat16"
    assert one["Device"] == "a &lt;b&gt; &amp; c; 1.5 minutes of training in all, on 1 thread"
    assert one["Command"] == "<code>report -p a &#39;&lt;b&gt;&#39;</code>"
    runs = [run(2, 2, model="resnet20-projection"), run(0, 1), run(1, 1, epochs=1), {**run(3, 9), "failure": "nan"}]
    several = pages.facts(runs, "", machine, measured="<then>")
    assert several["Experiment"] == "cifar10, resnet20-projection, 1 and 15 epochs, seeds 0, 1, 2 and 3, bfloat16"
    assert several["Device"].endswith("4.5 minutes of training in all, on 1 or 2 threads")
    assert (several["Measured"], several["Command"]) == ("&lt;then&gt;", "<code>x</code>")
    assert "def" in several["Report made"]


def test_what_a_page_is_told_is_escaped(tmp_path):
    (tmp_path / "tables").mkdir()
    pd.DataFrame({"accuracy, %": ["<i>"], "dense": ["<u>"]}).to_csv(
        tmp_path / "tables" / "language_summary.csv", index=False
    )
    pages.index(tmp_path, ["language"], [], {"<b>": "<script>"}, {}, "<em>", "<name>")
    index = (tmp_path / "index.html").read_text()
    for mark in ("<i>", "<u>", "<b></b>", "<script>", "<em>", "<name>"):
        assert mark not in index.replace("<i>n</i>", "")
    for mark in ("&lt;i&gt;", "&lt;u&gt;", "&lt;b&gt;", "&lt;script&gt;", "&lt;em&gt;", "&lt;name&gt;"):
        assert mark in index
