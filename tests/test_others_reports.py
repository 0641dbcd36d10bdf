"""Reports that somebody else sent: what they say is data, and what is published of one's own machine is little."""

import html
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import cram_bench as cb
from cram_bench import cli, executors, files, report, runs, untrusted
from cram_bench.files import sealed
from cram_bench.report import ReportError, folders, pages
from cram_bench.report.page import fact
from cram_bench.report.reproduce import reproduce

ESCAPE = "\x1b[2J\x9b31m\x07"
EVIL = """<img src=x onerror=alert(1)>'"</script><!--"""
TRIED: list[str] = []
"""What was tried so far, for the number that the README gives."""


@pytest.fixture(autouse=True)
def noted(counted):
    yield
    counted("reports of others", TRIED.count("report"))
    counted("texts of others: in a terminal and on the shelf", TRIED.count("text"))


def sent(folder: Path, **changes) -> Path:
    """Write what a report says of itself, with its checksum in order."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {
        "dataset": "digits",
        "profile": "quick",
        "questions": ["accuracy_vs_sparsity"],
        "seeds": 1,
        "parameters": {},
    }
    facts = {"Experiment": "digits", "Command": "<code>cram-bench report</code>"}
    about = {
        "title": "accuracy vs sparsity",
        "facts": facts,
        "build": asked,
        "runs": [],
        "versions": {},
        "notebooks": {},
    }
    about |= {"sha256": {}} | changes
    if "asked" in changes:
        about["build"] = asked | about.pop("asked")
    (folder / "report.json").write_text(sealed(about, "report.json"))
    return folder


def both(folder: Path, tmp_path: Path) -> list[str]:
    """Return how `reproduce` and `renew` refuse a report."""
    said = []
    for call in (lambda: reproduce(folder, tmp_path / "again", progress=False), lambda: report.renew(folder)):
        TRIED.append("report")
        with pytest.raises(ReportError) as caught:
            call()
        said.append(str(caught.value))
        assert len(said[-1].splitlines()) == 1
    assert not (tmp_path / "again").exists()
    return said


@pytest.mark.parametrize(
    ("name", "value"),
    [("notebooks", "notebooks"), ("reports", ".."), ("store", "x"), ("keep_runs", True), ("device", "cpu"),
     ("command", "rm")],
)  # fmt: skip
def test_a_report_does_not_choose_what_is_run(name, value, tmp_path):
    """Least of all the folder of notebooks, which may lie beside it and are code."""
    shutil.copytree(report.notebooks_folder(), tmp_path / "theirs" / "notebooks")
    folder = sent(tmp_path / "theirs", asked={name: str(tmp_path / "theirs" / value) if name == "notebooks" else value})
    allowed = "a report may set dataset, profile, questions, seeds, parameters; notebooks come with --notebooks"
    assert both(folder, tmp_path) == [f"{folder}/report.json cannot be used: it sets {name!r}, and {allowed}"] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": {"../victim.csv": "0"}},
        {"sha256": {"tables/../../victim.csv": "0"}},
        {"sha256": {"{victim}": "0"}},
        {"sha256": {"link.csv": "0"}},
        {"sha256": {"out/victim.csv": "0"}},
        {"sha256": {"a\0b": "0"}},
        {"notebooks": {"../victim": "0"}},
        {"runs": [{"id": "../victim", "settings": {}}]},
        {"runs": [{"id": "0123456789ab", "settings": "x"}]},
        {"runs": ["x"]},
        {"title": "../victim"},
        {"folders": ["../victim"]},
        {"build": []},
        {"facts": {"Command": ["x"]}},
    ],
    ids=str,
)
def test_paths_of_a_report_stay_in_it(changes, tmp_path):
    victim, folder = tmp_path / "victim.csv", tmp_path / "theirs"
    victim.write_text("mine")
    if "{victim}" in changes.get("sha256", {}):
        changes = {"sha256": {str(victim): "0"}}
    folder.mkdir()
    (folder / "link.csv").symlink_to(victim)
    (folder / "out").symlink_to(tmp_path)
    sent(folder, **changes)
    for said in both(folder, tmp_path) if changes != {"build": []} else []:
        assert said.startswith(f"{folder}/report.json cannot be used: ")
    if changes == {"build": []}:
        with pytest.raises((ReportError, TypeError)):
            reproduce(folder, tmp_path / "again", progress=False)
    assert victim.read_text() == "mine"


def test_a_note_is_read_from_a_file_within_bounds(tmp_path):
    for name, make in (("pipe", os.mkfifo), ("device", lambda path: path.symlink_to("/dev/zero"))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "report.json")
        TRIED.append("report")
        with pytest.raises(ReportError, match=f"is damaged: it is a {name}, not a file"):
            report.building.note(tmp_path / name)
    with pytest.warns(UserWarning, match=r"left out of .*it is a (pipe|device), not a file"):
        pages.shelf(tmp_path)


def test_facts_of_others_are_text_on_the_shelf_and_in_a_report(tmp_path):
    """They were markup, written by whoever wrote report.json."""
    facts = {"Experiment": EVIL, "Device": f"<code>{EVIL}", "Report made": html.escape(EVIL)}
    sent(tmp_path / "theirs", title="x", facts=facts)
    TRIED.extend(["text"] * len(facts))
    pages.shelf(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<img" not in page
    assert "<script" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;&#39;&#34;&lt;/script&gt;&lt;!--") == 4  # the experiment twice
    assert fact("<code>a &amp; b</code>") == "<code>a &amp; b</code>"  # as this package writes it


@pytest.mark.parametrize(
    "changes", [{"title": "../theirs"}, {"facts": {"Experiment": ["x"]}}, {"title": 3}, {"question": ["x"]}], ids=str
)
def test_a_report_that_leads_elsewhere_is_left_out_of_the_shelf(changes, tmp_path):
    (tmp_path / "figures").mkdir()
    sent(tmp_path / "theirs", **changes)
    TRIED.append("report")
    with pytest.warns(UserWarning, match="left out of .*index.html") as caught:
        pages.shelf(tmp_path)
    assert len(str(caught[0].message).splitlines()) == 1
    assert "<section>" not in (tmp_path / "index.html").read_text()


def test_a_figure_and_a_table_are_of_the_report(tmp_path):
    (tmp_path / "secret.svg").write_text("<svg>mine</svg>")
    (tmp_path / "r" / "figures").mkdir(parents=True)
    (tmp_path / "r" / "tables").mkdir()
    (tmp_path / "r" / "figures" / "a.svg").symlink_to(tmp_path / "secret.svg")
    (tmp_path / "r" / "tables" / "a.csv").symlink_to(tmp_path / "secret.svg")
    for read in (pages.figure, pages._read):
        TRIED.append("report")
        with pytest.raises(ValueError, match="leads out of"):
            read(tmp_path / "r", "a")


# ---------------------------------------------------------------- what a terminal gets


def test_nothing_that_is_printed_commands_the_terminal(tmp_path, monkeypatch, capsys):
    table = pd.DataFrame({"run": ["0" * 12], "dataset": [ESCAPE], "accuracy": [0.5], "holder": [None]})
    monkeypatch.setattr(runs.Store, "table", lambda self: table)
    folder = tmp_path / f"set{ESCAPE}"
    for name in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "train" / "cat" / f"{ESCAPE}.txt").touch()
    os.mkfifo(folder / "train" / "cat" / f"{ESCAPE}.png")
    (tmp_path / "w.pth").touch()
    calls = [["runs"], ["runs", "--csv"], ["train", "--dataset", f"no{ESCAPE}"], ["train", "--dataset", str(folder)],
             ["train", "--dataset", "digits", "-s", f"lr{ESCAPE}", "1"], ["reproduce", f"no{ESCAPE}"],
             ["probe", str(tmp_path / "w.pth"), "--arch", "convnet", "--data", str(folder)]]  # fmt: skip
    for call in calls:
        TRIED.append("text")
        cli.main(call)
        said = capsys.readouterr()
        assert said.out + said.err
        assert not set(said.out + said.err) & {"\x1b", "\x9b", "\x07"}, call
    assert untrusted.printable(f"a\tb\n{ESCAPE}\u202e") == "a\tb\n\\x1b[2J\\x9b31m\\x07\\u202e"
    log = io.StringIO()
    with cb.progress.working(ESCAPE, log):
        pass
    assert "\x1b" not in log.getvalue() + cb.progress.Progress(ESCAPE, log).label


def test_nothing_that_a_sweep_or_a_probe_prints_commands_the_terminal(tmp_path, monkeypatch, capsys):
    experiment = cb.experiment.Experiment(method=ESCAPE)
    log = io.StringIO()
    cb.sweep.View([experiment], log).show({experiment.id: cb.sweep.State("failed", ESCAPE)})
    cb.probes.over_runs([runs.Run(tmp_path, experiment, failure=ESCAPE)], len, progress=True)

    def fails(*_, **__):
        raise ValueError(ESCAPE)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "ensure", fails)
        executors.work([experiment.settings()], str(tmp_path / "runs"), str(tmp_path / "notes"), {})
    said = capsys.readouterr()
    printed = [log.getvalue(), said.out, said.err, str(files.Holder(1, ESCAPE, "now"))]
    for each in printed:
        TRIED.append("text")
        assert "\\x1b[2J" in each
        assert not set(each) & {"\x1b", "\x9b", "\x07"}


# ---------------------------------------------------------------- what is published


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A report on an image folder whose path says much."""
    where = tmp_path_factory.mktemp("author's zoé & co") / "birds"
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 8)):
        for label, name in enumerate(("owl", "wren")):
            (where / split / name).mkdir(parents=True)
            for place in range(count):
                pixels = generator.integers(0, 128, (8, 8, 3)) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(where / split / name / f"{place}.png")
        (where / split / "notes.txt").touch()  # a warning names the folder
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CRAM_BENCH_RUNS", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("own")))
        small = {"epochs": 1, "sparsities": [0.5], "methods": ["sgd"], "model": "convnet"}
        how = {"questions": ["accuracy_vs_sparsity"], "reports": tmp_path_factory.mktemp("reports")}
        with pytest.raises(
            ValueError, match="runs say where the image folder 'birds' is; keep them with --paths, or not"
        ):
            report.build(str(where), "quick", 1, small, keep_runs=True, **how)
        command = f'cram-bench report --dataset "{where}" --reports /somewhere/else'
        with pytest.warns(UserWarning, match="are skipped"):
            built = report.build(str(where), "quick", 1, small, command=command, **how)
    assert not built.failures
    return where, built.folder


def test_a_report_on_an_image_folder_has_its_name_and_not_its_path(birds):
    where, folder = birds
    looked = 0
    for path in (path for path in folder.rglob("*") if path.suffix in (".html", ".ipynb", ".json", ".csv", ".svg")):
        text = path.read_text()
        for form in (where.parent.name, "author", "zo\\xe9", "zo\\u00e9", "zoé", "/somewhere"):
            assert form not in text, f"{form} in {path.relative_to(folder)}"
        looked += 1
    assert looked > 6
    about = json.loads((folder / "report.json").read_text())
    assert about["build"]["dataset"] == about["runs"][0]["settings"]["dataset"] == "birds"
    assert about["facts"]["Command"] == "<code>cram-bench report --dataset birds --reports else</code>"
    assert 'dataset = "birds"' in (folder / "accuracy_vs_sparsity.ipynb").read_text().replace('\\"', '"')


def test_reproduce_asks_where_the_folder_is(birds, tmp_path):
    where, folder = birds
    asks = "the report is on the image folder 'birds' and does not say where that is: --folder birds=PATH"
    for given, words in (
        ({}, asks),
        ({"brids": "x"}, "unknown image folder 'brids'; did you mean 'birds'?"),
        ({"birds": tmp_path / "none"}, "none is not a folder of images"),
    ):
        with pytest.raises(ReportError, match=re.escape(words)):
            reproduce(folder, tmp_path / "again", progress=False, folders=given)
    moved = tmp_path / "moved"
    shutil.copytree(where, moved)
    with pytest.warns(UserWarning, match="are skipped"):
        table = reproduce(folder, tmp_path / "again", progress=False, folders={"birds": moved})
    assert set(table["state"]) == {"same"}, table.to_string()


def test_names_stand_for_paths_in_every_way_of_writing_them():
    path = '/data/zoé\'s "own" & co/birds'
    names = folders.named([path, "digits"])
    papermill = path.encode("unicode_escape").decode().replace('"', '\\"')
    for written in (path, html.escape(path), html.escape(path, quote=False), repr(path)[1:-1], papermill):
        assert folders.without(f"in {written}/x", names) == "in birds/x"
    within = {"/data/birds": "birds", "/data/birds/small": "small"}
    assert folders.without("/data/birds/small/a and /data/birds/b", within) == "small/a and birds/b"
    assert folders.everywhere({"a": [path, {"b": f"in {path}/x"}], "c": 3}, names) == {
        "a": ["birds", {"b": "in birds/x"}],
        "c": 3,
    }
