"""A report made twice on one machine is the same to the last byte of its weights and tables."""

import io
import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest

from cram_bench import cli, report
from cram_bench.files import sealed, sha256, unsealed
from cram_bench.recipes import recipe
from cram_bench.report.reproduce import ReportError, _edited, _run, _table, reproduce
from cram_bench.train import DivergedError

SMALL = {"epochs": 2, "sparsities": [0.5, 0.9], "methods": ["sgd", "cram-single"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CRAM_BENCH_RUNS", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("own")))
        reports = tmp_path_factory.mktemp("reports")
        made = report.build("digits", "quick", 1, SMALL, questions=["accuracy_vs_sparsity"], reports=reports)
    assert not made.failures
    return made.folder


def test_a_report_is_the_same_when_made_again(built, tmp_path, capsys):
    assert cli.main(["reproduce", str(built), "--into", str(tmp_path / "again"), "--csv"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert set(table["state"]) == {"same"}
    assert table["kind"].value_counts().to_dict() == {"version": 4, "table": 3, "run": 2, "device": 1}
    for name in ("accuracy_vs_sparsity", "accuracy_summary"):
        again = tmp_path / "again" / built.name / "tables" / f"{name}.csv"
        assert again.read_bytes() == (built / "tables" / f"{name}.csv").read_bytes()


def test_what_differs_is_said(built, tmp_path, capsys):
    edited = tmp_path / "edited" / built.name
    shutil.copytree(built, edited)
    file = edited / "tables" / "accuracy_vs_sparsity.csv"
    table = pd.read_csv(file)
    table.loc[1, "accuracy"] += 0.25
    table.to_csv(file, index=False)
    (edited / "accuracy_vs_sparsity.html").unlink()
    about = unsealed((edited / "report.json").read_text(), "report.json")
    about["runs"][0]["weights"] = "0" * 64
    about["versions"]["torch"] = "1.0"
    (edited / "report.json").write_text(sealed(about, "report.json"))
    assert cli.main(["reproduce", str(edited), "--into", str(tmp_path / "again")]) == 1
    said = capsys.readouterr().out
    assert "1.0, now" in said
    assert "SGD, seed 0: weights 00000000, now" in said
    assert "accuracy in 1 of" in said
    assert "by 0.25 at most" in said
    rows = reproduce(edited, tmp_path / "again", progress=False).set_index("name")
    assert rows.loc["accuracy_vs_sparsity.html", "state"] == "missing"
    states = {name: rows.loc[name, "state"] for name in rows.index[rows["kind"] == "run"]}
    assert states == {about["runs"][0]["id"]: "differs", about["runs"][1]["id"]: "same"}
    assert set(rows.loc["tables/accuracy_vs_sparsity.csv", "state"]) == {"edited", "differs"}


@pytest.mark.parametrize(
    ("before", "now", "state"),
    [("x\n1.5\n", "x\n1.5\n", "same"), ("x,y\n1,\n", "x,y\n1,\n", "same"), ("x,y\n1,2\n", "x,y\n1,\n", "differs"),
     ("x,y\n1,\n", "x,y\n1,2\n", "differs"), ("x\n1\n", "x\n1\n2\n", "differs"), ("x\na\n", "x\nb\n", "differs")],
)  # fmt: skip
def test_a_value_that_came_or_went_differs_too(before, now, state, tmp_path):
    for name, text in (("old.csv", before), ("new.csv", now)):
        (tmp_path / name).write_text(text)
    assert _table(tmp_path / "old.csv", tmp_path / "new.csv")[0] == state


def test_every_file_that_a_report_names_must_be_there_as_it_was(tmp_path):
    """Figures and pages too, not only tables; and a table that is not made again is not the same."""
    contents = {name: f"of {name}\n" for name in ("index.html", "figures/a.svg", "figures/a.png", "tables/a.csv")}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    about = {"sha256": {name: sha256(tmp_path / name) for name in contents}}
    assert _edited(tmp_path, about) == []
    for name in contents:
        (tmp_path / name).write_text("x")
        assert [row[:3] for row in _edited(tmp_path, about)] == [("file", name, "edited")]
        (tmp_path / name).unlink()
        assert [row[:3] for row in _edited(tmp_path, about)] == [("file", name, "missing")]
        (tmp_path / name).write_text(contents[name])
    (tmp_path / "there.csv").write_text("x\n1\n")
    assert _table(tmp_path / "there.csv", tmp_path / "none.csv") == ("missing", "in the new report")
    assert _table(tmp_path / "none.csv", tmp_path / "there.csv") == ("missing", "in the old report")


def test_a_run_is_trained_as_it_was_and_one_that_failed_must_fail_again(monkeypatch):
    then = {"id": "0123456789ab", "settings": recipe("digits", "sgd", epochs=1).settings()}
    asked = []

    def train(experiment, store, **how):
        asked.append(how)
        return SimpleNamespace(environment={"sha256": {"model.safetensors": "f" * 64}})

    monkeypatch.setattr("cram_bench.runs.ensure", train)
    how = {"threads": 3, "compile": False, "device_type": "cpu"}
    assert _run(then | how | {"weights": "f" * 64}, None, False)[2] == "same"
    assert _run(then | how | {"weights": "0" * 64}, None, False)[2] == "differs"
    assert _run(then | {"failure": "the loss is nan"}, None, False)[2] == "differs"
    assert asked[0] == {"device": "cpu", "threads": 3, "compile": False, "progress": False}

    def fail(*arguments, **how):
        raise DivergedError("the loss is nan")

    monkeypatch.setattr("cram_bench.runs.ensure", fail)
    assert _run(then | {"failure": "the loss is nan"}, None, False)[2] == "same"
    assert _run(then | how | {"weights": "f" * 64}, None, False)[2] == "differs"


@pytest.mark.parametrize(
    ("kind", "state", "status"),
    [("version", "differs", 0), ("device", "differs", 0), ("run", "differs", 1), ("table", "differs", 1),
     ("table", "missing", 1), ("notebook", "differs", 1), ("file", "edited", 1), ("table", "same", 0)],
)  # fmt: skip
def test_the_exit_status_is_1_where_a_result_differs(kind, state, status, monkeypatch, tmp_path):
    rows = pd.DataFrame([("run", "a", "same", ""), (kind, "b", state, "")], columns=["kind", "name", "state", "detail"])
    monkeypatch.setattr("cram_bench.report.reproduce.reproduce", lambda *a, **k: rows)
    assert cli.main(["reproduce", "there", "--into", str(tmp_path / "here")]) == status


def test_a_damaged_or_an_old_note_is_refused(built, tmp_path):
    with pytest.raises(ReportError, match="is not a report: it has no report.json"):
        reproduce(tmp_path, tmp_path / "again")
    with pytest.raises(ReportError, match="holds the report that is to be compared"):
        reproduce(built, built.parent)
    (tmp_path / "report.json").write_text((built / "report.json").read_text().replace('"epochs": 2', '"epochs": 3'))
    with pytest.raises(ReportError, match="is damaged: its checksum does not match"):
        reproduce(tmp_path, tmp_path / "again")
    (tmp_path / "report.json").write_text(json.dumps({"title": "x", "facts": {}}))
    with pytest.raises(ReportError, match="does not say how the report was made; an older version wrote it"):
        reproduce(tmp_path, tmp_path / "again")
