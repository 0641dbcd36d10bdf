"""Notebooks → a report: papermill executes them, every figure and table lands in files, a page leads through."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cram_bench import runs, untrusted
from cram_bench.checks import instance, one_line, shown
from cram_bench.files import check_writable, sealed, sha256, unsealed, write
from cram_bench.report import folders, page, pages
from cram_bench.report.execute import Job, execute_all
from cram_bench.report.findings import counted
from cram_bench.report.notebook import Notebook, outputs
from cram_bench.report.plan import Plan, plan

PACKAGE = Path(__file__).resolve().parents[1]
"""A change in it makes all notebooks anew."""
ASKED = ("dataset", "profile", "questions", "seeds", "parameters")
"""What a report says to `build` when it is made again."""


@dataclass(frozen=True)
class Built:
    """A report that was built: its folder, and what failed and why: notebooks by name, trainings as they are called."""

    folder: Path
    failures: dict[str, str]
    trainings: dict[str, str] = field(default_factory=dict)


def build(
    dataset: str | None = None,
    profile: str = "",
    seeds: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    questions: Sequence[str] | None = None,
    reports: str | os.PathLike[str] = "reports",
    notebooks: str | os.PathLike[str] | None = None,
    name: str | None = None,
    store: runs.Store | None = None,
    keep_runs: bool = False,
    command: str = "",
    paths: bool = False,
    **how: Any,
) -> Built:
    """Train what is missing, execute the notebooks, and write the report's folder.

    A notebook that fails is named and stops no other; so is one that hangs, which has computed nothing for
    `cram_bench.report.execute.PATIENCE` seconds, a quarter of an hour.

    Args:
        dataset: a name or the path of an image folder; by default that of the first notebook.
        profile: one of `cram_bench.recipes.PROFILES`; by default that of the first notebook.
        seeds: seeds 0 … n − 1; by default 3 for digits, else 1.
        parameters: notebook parameters by name; each must belong to at least one notebook.
        questions: which notebooks to execute, the first leads; by default the usual ones of the folder.
        reports: the folder that holds reports.
        notebooks: the folder of the notebooks; by default those of this package.
        name: of the report's folder; by default dataset-model, with ``-quick`` after it for that profile.
        store: the run store; by default ``Store()``, and the runs that are kept beside the report.
        keep_runs: copy the finished runs, weights of all seeds, to ``runs/`` in the report.
        command: what to print as the command that made the report.
        paths: write where image folders are; otherwise all that is published has their names alone.
        how: device, threads and compile, as in `cram_bench.runs.ensure`.

    Raises:
        ValueError: a name is unknown or a value not allowed; nothing has been trained then. Or runs are to be kept
            beside a report without paths, which they have.
        TypeError: a parameter has another type than the notebook annotates.
    """
    if name is not None:
        check_name(name)
    instance("keep_runs", keep_runs, bool, "True or False")
    instance("paths", paths, bool, "True or False")  # "no" would publish them
    check_writable(reports, "--reports")  # before hours of training, not after
    planned = plan(dataset, profile, seeds, parameters, questions, notebooks)
    names = {} if paths else planned.folders
    if names and keep_runs:
        raise ValueError(
            f"runs say where the image folder {next(iter(names.values()))!r} is; keep them with --paths, or not"
        )
    folder = Path(reports).absolute() / (name or planned.name)
    store = store or runs.Store(also=[folder / "runs"])
    trained = runs.ensure_all(planned.wanted, store, **how)
    folder.mkdir(parents=True, exist_ok=True)
    failures = folders.everywhere(_execute(planned, folder, trained, names, store=str(store.root)), names)
    for run in trained if keep_runs else ():
        if run.failure is None:
            runs.copy(run, folder / "runs")
    identities, machine = folders.everywhere([_identity(run) for run in trained], names), runs.machine()
    command = command or machine["command"]
    facts = pages.facts(identities, command if paths else folders.in_command(command, names), machine)
    question = planned.notebooks[0].question
    pages.index(folder, planned.questions, identities, failures, facts, question=question)
    about = {
        "title": planned.questions[0].replace("_", " "),
        "question": question,
        "facts": facts,
        "build": folders.everywhere(_asked(planned, seeds, parameters or {}), names),
        **({"folders": list(names.values())} if names else {}),
        "runs": identities,
        "versions": machine["versions"],
    }
    _write_note(folder, about, planned.notebooks)
    pages.shelf(folder.parent)
    return Built(folder, failures, {run.label: run.failure for run in trained if run.failure is not None})


def _asked(planned: Plan, seeds: int | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `build` that make the same report anywhere: folders by their whole path."""
    resolved = {name: planned.given[name] if name == "target" else value for name, value in parameters.items()}
    own = {"dataset": planned.given["dataset"], "profile": planned.profile, "questions": planned.questions}
    return {**own, "seeds": seeds, "parameters": resolved}


def renew(folder: str | os.PathLike[str], notebooks: str | os.PathLike[str] | None = None) -> Built:
    """Make figures, verdicts, texts and pages of a report anew from its tables; train and measure nothing.

    For reports of which the runs are gone, after the code that draws and judges has changed. The notebooks are executed
    with the tables for measurements, and the page says so. A report whose notebooks fail stays as it was.

    Args:
        folder: of a report that `build` wrote.
        notebooks: the folder of the notebooks; by default those of this package.

    Raises:
        ReportError: the folder holds no report, one whose tables were edited, or one of a notebook that is not made of
            tables.
    """
    folder = Path(folder).resolve()
    part, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
    if old.is_dir() and not folder.exists():  # a renewal was killed between its two last steps
        os.rename(old, folder)
    about = note(folder)
    for name, digest in about["sha256"].items():
        if name.endswith(".csv") and (not (folder / name).is_file() or sha256(folder / name) != digest):
            raise ReportError(f"{folder / name} is not the table that was measured; restore it, or build the report")
    planned = plan(**about["build"], notebooks=notebooks)
    names = {path: name for path, name in planned.folders.items() if name in about.get("folders", [])}
    for notebook in planned.notebooks:
        if "tables" not in notebook.parameters:
            raise ReportError(f"the notebook {notebook.name} measures as it goes; build the report instead")
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(folder, part, symlinks=True, ignore=shutil.ignore_patterns(".done"))
    try:
        failures = _execute(planned, part, [], names, tables=str(folder / "tables"))
        if not failures:
            _write_anew(part, planned, about, folder.name)
            _exchange(folder, part, old)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    if not failures:
        pages.shelf(folder.parent)
    return Built(folder, failures)


def _write_anew(folder: Path, planned: Plan, about: Mapping[str, Any], name: str) -> None:
    """Write page and note of a report executed from its tables; remove what its notebooks no longer make."""
    machine, total = runs.machine(), len(about["runs"])
    measured = about["facts"].get("Measured", about["facts"].get("Report made", "before"))
    kept = sum((folder / "runs" / run["id"]).is_dir() for run in about["runs"])
    reason = (
        f"Figures, verdicts and texts were made anew from the tables at commit {machine['commit']}. Nothing was "
        f"trained or measured anew: the weights of {kept or 'none'} of {counted(total, 'run')} are kept beside it."
    )
    command = folders.in_command(page.plain(about["facts"].get("Command", "")), {})
    facts = pages.facts(about["runs"], command, machine | {"versions": about["versions"]}, measured=measured)
    for file in set(about["sha256"]) - {
        path.relative_to(folder).as_posix() for path in _made(folder, planned.notebooks)
    }:
        (folder / file).unlink(missing_ok=True)  # nothing old stands beside what is new
    question = planned.notebooks[0].question
    pages.index(folder, planned.questions, about["runs"], {}, facts, reason, name, question)
    anew = {"question": question, "facts": facts, "renewed": machine["commit"]}
    _write_note(folder, dict(about) | anew, planned.notebooks)


def _exchange(folder: Path, part: Path, old: Path) -> None:
    """Put `part` in the place of `folder`, which becomes `old`, or leave both as they are."""
    os.rename(folder, old)
    try:
        os.rename(part, folder)
    except BaseException:
        os.rename(old, folder)
        raise


def note(folder: Path) -> dict[str, Any]:
    """Read ``report.json``, what a report says of itself: data, which whoever sent it may have written.

    Raises:
        ReportError: there is none, or it is damaged or of a version that did not note how the report was made, or asks
            for more than a report may, or names a file that is not in it.
    """
    file = folder / "report.json"
    try:
        about = unsealed(untrusted.contents(file, pages.REPORT).decode("utf-8"), file.name)
    except FileNotFoundError:
        raise ReportError(f"{folder} is not a report: it has no report.json") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} is damaged: {one_line(error)}") from error
    if not {"build", "runs", "versions", "notebooks", "sha256"} <= about.keys():
        raise ReportError(f"{file} does not say how the report was made; an older version wrote it")
    try:
        _check_note(folder, about)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReportError(f"{file} cannot be used: {one_line(error)}") from error
    return about


def _check_note(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse what no report says: `build` gets nothing else from it, and paths stay in its folder."""
    for name in about["build"]:
        if name not in ASKED:
            raise ValueError(
                f"it sets {shown(name)}, and a report may set {', '.join(ASKED)}; notebooks come with --notebooks"
            )
    for name in about["sha256"]:
        untrusted.inside(folder, name)
    for name in [*about["notebooks"], *about.get("folders", []), *about.get("title", "a").split()]:
        check_name(name)
    for run in about["runs"]:
        if not re.fullmatch("[0-9a-f]{6,64}", run["id"]) or not isinstance(run["settings"], dict):
            raise ValueError(f"{shown(run['id'])} is not a run's id, or it has no settings")
    for kind, pairs in (("facts", about.get("facts", {})), ("versions", about["versions"])):
        for name, value in pairs.items():
            instance(f"{name} in {kind}", value, str, "a text")


class ReportError(ValueError):
    """A report cannot be made again; the message says which and why."""


def _execute(
    planned: Plan, folder: Path, trained: Sequence[runs.Run], names: Mapping[str, str], **where: str
) -> dict[str, str]:
    """Execute the notebooks into `folder`; return those that failed → the error."""
    injected = [
        (notebook.path, planned.parameters(notebook, output=str(folder), **where)) for notebook in planned.notebooks
    ]
    jobs = [Job(path, parameters, _key(path, parameters, trained, names), names) for path, parameters in injected]
    # On 8×8 images threads wait for each other more than they compute: each kernel keeps to a core.
    return execute_all(jobs, folder, threads=1 if planned.wanted[0].data.dataset == "digits" else 0)


def _write_note(folder: Path, about: Mapping[str, Any], notebooks: Sequence[Notebook]) -> None:
    content = {
        **about,
        "notebooks": {notebook.name: sha256(notebook.path) for notebook in notebooks},
        "sha256": {path.relative_to(folder).as_posix(): sha256(path) for path in _made(folder, notebooks)},
    }
    write(folder / "report.json", sealed(content, "report.json"))


def _identity(run: runs.Run) -> dict[str, Any]:
    """Say what a run was and how it was made, for who makes it again."""
    identity: dict[str, Any] = {"id": run.id, "settings": run.experiment.settings()}
    if run.failure is not None:
        return identity | {"failure": run.failure}
    environment = run.environment
    names = ("commit", "device", "device_type", "threads", "compile", "seconds")
    return (
        identity
        | {"weights": environment["sha256"]["model.safetensors"]}
        | {n: environment[n] for n in names if n in environment}
    )


def _made(folder: Path, notebooks: Sequence[Notebook]) -> list[Path]:
    """List the files of a report that its notebooks made."""
    names = [f"{notebook.name}.{suffix}" for notebook in notebooks for suffix in ("ipynb", "html")]
    names += [name for notebook in notebooks for name in outputs(notebook.path)]
    return sorted({path for name in ("index.html", *names) if (path := folder / name).exists()})


def check_name(name: Any) -> None:
    r"""Refuse a name that is no single folder's: a report stays in the folder of reports.

    >>> check_name("../elsewhere")
    Traceback (most recent call last):
    ValueError: a report's name must be that of one folder, without / or \ and not beginning with a dot, not
    '../elsewhere'
    """
    instance("a report's name", name, str, "a text")
    if not name.isprintable() or not re.fullmatch(r"[^./\\][^/\\]{0,199}", name):
        rule = "that of one folder, without / or \\ and not beginning with a dot"
        raise ValueError(f"a report's name must be {rule}, not {shown(name)}")


def _key(
    path: Path, parameters: dict[str, Any], trained: Sequence[runs.Run], names: Mapping[str, str] | None = None
) -> str:
    """Hash all that a notebook's result depends on: source, parameters, runs, names, this package's code."""
    code = [file.read_bytes() for file in sorted(PACKAGE.rglob("*")) if file.suffix in (".py", ".html", ".css", ".js")]
    portable = {name: value for name, value in parameters.items() if name not in ("output", "store", "tables")}
    identities = [(run.id, run.failure or run.environment["sha256"]) for run in trained]
    digest = hashlib.sha256(
        path.read_bytes() + json.dumps([portable, identities, dict(names or {})], sort_keys=True).encode()
    )
    for content in code:
        digest.update(content)
    return digest.hexdigest()
