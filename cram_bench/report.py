"""Notebooks → a report: papermill executes them, every figure and table lands in files, a page leads through.

A notebook uses three things from here: `check_parameters`, `Output.figure` and `Output.table`. `build` is what
``cram-bench report`` runs.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import html
import inspect
import io
import json
import os
import re
import shutil
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import pandas as pd

from cram_bench import comparisons, compress, experiment, pages, runs
from cram_bench._checks import instance, integer, items, needs, number, shown, unknown
from cram_bench._executing import Notebook, default_parameters, execute_all, outputs
from cram_bench._files import check_writable, sealed, sha256, unsealed, whole, write
from cram_bench.data import is_folder
from cram_bench.experiment import Experiment

NOTEBOOKS: dict[str, Callable[..., Any]] = {
    "accuracy_vs_sparsity": experiment.grid,
    "loss_stability": experiment.grid,
    "equal_cost": comparisons.equal_cost,
    "ablations": comparisons.ablations,
    "transfer": comparisons.transfer,
    "language": comparisons.language,
    "anatomy": comparisons.anatomy,
}
"""Notebook → the function of its own parameters that returns its experiments. A new one is a file and a line here."""
DEFAULT = ("accuracy_vs_sparsity", "loss_stability")
"""The notebooks of a report that does not name its own, in order; the first leads."""


# ---------------------------------------------------------------- used in notebooks


def check_parameters(namespace: Mapping[str, Any], **types_by_name: Any) -> None:
    """Refuse a misspelt or ill-typed notebook parameter. Call it with ``globals()`` right after the imports.

    Args:
        namespace: the notebook's global names: its parameters, and those that papermill put in.
        types_by_name: every parameter and its type: ``str``, ``int``, ``float``, ``bool`` or ``list[…]`` of these.
            An integer serves where a float is asked.

    Raises:
        NameError: a name is no parameter, with a suggestion, or a parameter is missing.
        TypeError: a value has another type.
        ValueError: a number is negative or not finite, or too small.

    >>> check_parameters({"epochs": 3, "epcohs": 5}, epochs=int)
    Traceback (most recent call last):
    NameError: unknown parameter 'epcohs'; did you mean 'epochs'? (allowed: epochs)
    """
    given = _assigned_literals(namespace["In"]) if "In" in namespace else set(namespace)
    for name, value in namespace.items():
        if name in types_by_name:
            if not _is_a(value, kind := types_by_name[name]):
                raise TypeError(f"parameter {name} must be {_name_of(kind)}, not {shown(value)}")
            _check_range(name, value)
        elif name in given and not name.startswith("_") and not isinstance(value, types.ModuleType):
            raise NameError(unknown("parameter", name, list(types_by_name)))
    if missing := [name for name in types_by_name if name not in namespace]:
        raise NameError(f"parameter {missing[0]!r} is missing")


def _assigned_literals(cells: Sequence[str]) -> set[str]:
    """Name what was assigned in cells that assign literals and do nothing else: parameters, and what papermill injects.

    Other names in a running notebook are its own results; they are there when its cells are run again.
    """
    names = set()
    for source in cells:
        if source.startswith("# Parameters\n"):  # papermill's own cell, which writes NaN as a call
            with contextlib.suppress(SyntaxError):
                names |= {node.id for node in ast.walk(ast.parse(source)) if _stored(node)}  # type: ignore[attr-defined]
            continue
        try:
            statements = ast.parse(source).body
            for statement in statements:
                ast.literal_eval(statement.value)  # type: ignore[attr-defined]
            names |= {target.id for statement in statements for target in statement.targets}  # type: ignore[attr-defined]
        except (SyntaxError, AttributeError, ValueError):
            continue
    return names


def _stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


_COUNTS = ("calibration", "sample", "curvature_sample", "directions", "target_epochs")
"""Parameters that count something of which there must be one at least; 0 seeds or epochs mean the usual number."""


def _check_range(name: str, value: Any) -> None:
    """Refuse numbers that no notebook can use: negative ones, NaN and infinities, and nothing where something is counted."""
    if name in _COUNTS:
        integer(f"parameter {name}", value, 1)
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, (int, float)) and not isinstance(each, bool):
            number(f"parameter {name}", each, 0)


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _name_of(kind: Any) -> str:
    return str(kind) if get_origin(kind) else kind.__name__


class Output:
    """Where a notebook leaves its figures and tables; without a folder they are only shown.

    Args:
        folder: of the report, or empty.
        tables: a folder of tables that were measured before, or empty. With it nothing is trained or measured: `runs`
            is empty and `measured` reads, so that figures, texts and verdicts are made anew from the same numbers.
    """

    def __init__(self, folder: str | os.PathLike[str] = "", tables: str | os.PathLike[str] = "") -> None:
        self.folder = Path(folder) if folder else None
        self.tables = Path(tables) if tables else None

    def runs(self, experiments: Sequence[Experiment], store: runs.Store) -> list[runs.Run]:
        """Return the runs of the experiments, trained now or found finished; none where tables are given."""
        return [] if self.tables else runs.ensure_all(experiments, store)

    def measured(
        self, name: str, measure: Callable[..., pd.DataFrame], *arguments: Any, **options: Any
    ) -> pd.DataFrame:
        """Return ``measure(*arguments, **options)``, or the table of that name where tables are given; write it.

        Raises:
            FileNotFoundError: the folder of tables has no such table.
        """
        if self.tables is None:
            return self.table(measure(*arguments, **options), name)
        print(f"{name}: read from the table that was measured before; nothing is measured anew")  # noqa: T201
        # An id of digits and an e is no number.
        table = pd.read_csv(self.tables / f"{name}.csv", dtype=dict.fromkeys(("run", "id", "commit"), str))
        return self.table(table, name)

    def figure(self, figure: Any, name: str, alt: str) -> Any:
        """Write ``figures/NAME.svg`` and ``.png``, and return the picture for the notebook to show.

        Args:
            figure: a matplotlib figure.
            name: of the files.
            alt: what the figure shows, for readers who do not see it.
        """
        from IPython.display import Image

        from cram_bench.plots import style

        with style():
            if self.folder is not None:
                folder = self.folder / "figures"
                folder.mkdir(parents=True, exist_ok=True)
                for suffix, metadata in (("svg", {"Date": None, "Title": alt}), ("png", {"Title": alt})):
                    with whole(folder / f"{name}.{suffix}") as part:
                        figure.savefig(part, format=suffix, metadata=metadata)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
        return Image(buffer.getvalue(), width=int(figure.get_figwidth() * 110), alt=alt)

    def table(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write ``tables/NAME.csv``, and return the table for the notebook to show."""
        if self.folder is not None:
            folder = self.folder / "tables"
            folder.mkdir(parents=True, exist_ok=True)
            named_index = table.index.name is not None
            write(folder / f"{name}.csv", table.to_csv(index=named_index, float_format="%.8g"))
        return table


# ---------------------------------------------------------------- building a report


@dataclass(frozen=True)
class Built:
    """A report that was built: its folder, and what failed, with the reason: notebooks by name, trainings as they are called."""

    folder: Path
    failures: dict[str, str]
    trainings: dict[str, str] = field(default_factory=dict)


def notebooks_folder() -> Path:
    """Return the folder of the notebooks: the checkout's, or the one that was installed with the package."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "notebooks", here / "_notebooks"):
        if (folder / f"{DEFAULT[0]}.ipynb").exists():
            return folder
    raise FileNotFoundError(
        "the notebooks of cram_bench are not beside the package; give their folder with --notebooks"
    )


def build(
    dataset: str | None = None,
    profile: str = "quick",
    seeds: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    questions: Sequence[str] = DEFAULT,
    reports: str | os.PathLike[str] = "reports",
    notebooks: str | os.PathLike[str] | None = None,
    name: str | None = None,
    store: runs.Store | None = None,
    keep_runs: bool = False,
    command: str = "",
    **how: Any,
) -> Built:
    """Train what is missing, execute the notebooks, and write the report's folder.

    Args:
        dataset: a name or the path of an image folder; by default that of the first notebook.
        profile: one of `cram_bench.experiment.PROFILES`.
        seeds: seeds 0 … n − 1; by default 3 for digits, else 1.
        parameters: notebook parameters by name; each must belong to at least one notebook.
        questions: which notebooks to execute, of `NOTEBOOKS`; the first leads.
        reports: the folder that holds reports.
        notebooks: the folder of the notebooks; by default those of this package.
        name: of the report's folder; by default dataset-model, with ``-quick`` after it for that profile.
        store: the run store; by default ``Store()``, and the runs that are kept beside the report.
        keep_runs: copy the finished seed-0 runs to ``runs/`` in the report.
        command: what to print as the command that made the report.
        how: device, threads and compile, as in `cram_bench.runs.ensure`.

    Raises:
        ValueError: a name is unknown or a value not allowed; nothing has been trained then.
        TypeError: a parameter has another type than its default in the notebook.
    """
    if name is not None:
        check_name(name)
    check_writable(reports, "--reports")  # before hours of training, not after
    plan = _plan(dataset, profile, seeds, parameters, questions, notebooks)
    title = re.sub(r"[:/\\]", "-", f"{Path(plan.wanted[0].dataset).name}-{plan.wanted[0].model}")
    folder = Path(reports).absolute() / (
        name or "-".join([title, *(["quick"] if profile == "quick" else []), *_beyond(questions)])
    )
    store = store or runs.Store(also=[folder / "runs"])
    trained = runs.ensure_all(plan.wanted, store, **how)
    folder.mkdir(parents=True, exist_ok=True)
    failures = _execute(plan, folder, trained, store=str(store.root))
    if keep_runs:
        _copy_runs([run for run in trained if run.experiment.seed == 0 and run.failure is None], folder / "runs")
    identities = [_identity(run) for run in trained]
    facts = pages.facts(identities, command, runs.machine())
    pages.index(folder, plan.questions, identities, failures, facts)
    asked = {"dataset": plan.given["dataset"], "profile": profile, "seeds": seeds, "parameters": dict(parameters or {})}
    if "target" in asked["parameters"]:
        asked["parameters"]["target"] = plan.given["target"]
    about = {
        "title": plan.questions[0].replace("_", " "),
        "facts": facts,
        "build": asked | {"questions": plan.questions},
        "runs": identities,
        "versions": runs.machine()["versions"],
    }
    _write_note(folder, about, plan.paths)
    pages.shelf(folder.parent)
    return Built(folder, failures, {run.label: run.failure for run in trained if run.failure is not None})


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
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():  # a renewal was killed between its two last steps
        os.rename(old, folder)
    about = note(folder)
    for name, digest in about["sha256"].items():
        if name.endswith(".csv") and (not (folder / name).is_file() or sha256(folder / name) != digest):
            raise ReportError(f"{folder / name} is not the table that was measured; restore it, or build the report")
    asked = about["build"]
    plan = _plan(
        **{key: asked[key] for key in ("dataset", "profile", "seeds", "parameters", "questions")}, notebooks=notebooks
    )
    for path in plan.paths:
        if "tables" not in plan.defaults[path]:
            raise ReportError(f"the notebook {path.stem} measures as it goes; build the report instead")
    part = folder.with_name(f".{folder.name}.part")
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns(".done"))
    try:
        failures = _execute(plan, part, [], tables=str(folder / "tables"))
        if failures:
            return Built(folder, failures)
        machine = runs.machine()
        made = about["facts"].get("Measured", about["facts"].get("Report made", "before"))
        kept = sum((folder / "runs" / run["id"]).is_dir() for run in about["runs"])
        total = len(about["runs"])
        reason = (
            f"Figures, verdicts and texts were made anew from the tables at commit {machine['commit']}. Nothing was trained or "
            f"measured anew: the weights of {kept or 'none'} of the {total} runs are kept beside this report."
        )
        command = html.unescape(re.sub(r"</?code>", "", about["facts"].get("Command", "")))
        facts = pages.facts(about["runs"], command, machine | {"versions": about["versions"]}, measured=made)
        for name in set(about["sha256"]) - {p.relative_to(part).as_posix() for p in _made(part, plan.paths)}:
            (part / name).unlink(missing_ok=True)  # nothing old stands beside what is new
        pages.index(part, plan.questions, about["runs"], {}, facts, reason, folder.name)
        _write_note(part, about | {"facts": facts, "renewed": machine["commit"]}, plan.paths)
        os.rename(folder, old)
        try:
            os.rename(part, folder)
        except BaseException:
            os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    pages.shelf(folder.parent)
    return Built(folder, {})


def note(folder: Path) -> dict[str, Any]:
    """Read ``report.json``, what a report says of itself.

    Raises:
        ReportError: there is none, or it is damaged or of a version that did not note how the report was made.
    """
    file = folder / "report.json"
    try:
        about = unsealed(file.read_text(encoding="utf-8"), file.name)
    except FileNotFoundError:
        raise ReportError(f"{folder} is not a report: it has no report.json") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} is damaged: {error}") from error
    if not {"build", "runs", "versions", "notebooks", "sha256"} <= about.keys():
        raise ReportError(f"{file} does not say how the report was made; an older version wrote it")
    return about


class ReportError(ValueError):
    """A report cannot be made again; the message says which and why."""


@dataclass(frozen=True)
class _Plan:
    """Which notebooks a report executes, with which parameters, and the experiments they need."""

    paths: list[Path]
    defaults: dict[Path, dict[str, Any]]
    given: dict[str, Any]
    wanted: list[Experiment]

    @property
    def questions(self) -> list[str]:
        return [path.stem for path in self.paths]


def _plan(
    dataset: str | None,
    profile: str,
    seeds: int | None,
    parameters: Mapping[str, Any] | None,
    questions: Sequence[str],
    notebooks: str | os.PathLike[str] | None,
) -> _Plan:
    """Check everything that a report was asked for; nothing has been trained or written then."""
    instance("parameters", parameters, (Mapping, type(None)), "a mapping of names to values")
    questions = items("questions", questions, "names of notebooks") if questions else []
    if seeds is not None:
        integer("seeds", seeds, 1)
    if reserved := sorted({"dataset", "seeds", "store", "output", "tables"} & (parameters or {}).keys()):
        raise ValueError(f"{reserved[0]} is no free parameter: use --dataset, --seeds, --reports or CRAM_BENCH_RUNS")
    needs("reports", "report", "papermill", "nbconvert", "nbformat", "ipykernel")
    folder_of_notebooks = Path(notebooks) if notebooks else notebooks_folder()
    for question in questions:
        if question not in NOTEBOOKS:
            raise ValueError(unknown("notebook", question, list(NOTEBOOKS)))
    if not questions:
        raise ValueError("a report needs at least one notebook")
    paths = [folder_of_notebooks / f"{stem}.ipynb" for stem in dict.fromkeys(questions)]
    defaults = {path: default_parameters(path) for path in paths}
    if dataset is None:
        dataset = str(defaults[paths[0]]["dataset"])
    changes = experiment.profile_changes(dataset, profile)
    given: dict[str, Any] = {
        "dataset": dataset,
        "seeds": seeds if seeds is not None else (3 if dataset == "digits" else 1),
        **changes,
        **(parameters or {}),
    }
    if is_folder(target := str(given.get("target", "digits"))):
        given["target"] = str(Path(target).expanduser().resolve())  # the notebook runs in another folder
    allowed = {key: value for known in defaults.values() for key, value in known.items()}
    if seeds is None and "seeds" not in allowed:  # notebooks about one network
        del given["seeds"]
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(unknown("parameter", key, list(allowed)))
        if not _like(value, allowed[key]):
            raise TypeError(f"parameter {key} must be like its default {allowed[key]!r}, not {shown(value)}")
        if key not in ("seeds", "epochs"):  # the experiments check those
            _check_range(key, value)
    own = {path: known | {key: given[key] for key in given.keys() & known.keys()} for path, known in defaults.items()}
    planned = [_planned(NOTEBOOKS[path.stem], own[path]) for path in paths]
    wanted = list(dict.fromkeys(experiment for listed in planned for experiment in listed))
    if "sparsities" in given or "patterns" in given:
        compress.grid(given.get("patterns", ["global"]), given.get("sparsities", [0.5]))
    return _Plan(paths, defaults, given | {"dataset": wanted[0].dataset}, wanted)


def _execute(plan: _Plan, folder: Path, trained: Sequence[runs.Run], **where: str) -> dict[str, str]:
    """Execute the notebooks into `folder`; return those that failed → the error."""
    given = plan.given | {"output": str(folder)} | where
    injected = {path: {k: v for k, v in given.items() if k in plan.defaults[path]} for path in plan.paths}
    listed = [Notebook(path, own, _key(path, own, trained)) for path, own in injected.items()]
    # On 8×8 images threads wait for each other more than they compute: each kernel keeps to a core.
    return execute_all(listed, folder, threads=1 if plan.wanted[0].dataset == "digits" else 0)


def _write_note(folder: Path, about: Mapping[str, Any], notebooks: Sequence[Path]) -> None:
    content = dict(about) | {
        "notebooks": {path.stem: sha256(path) for path in notebooks},
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


def _made(folder: Path, notebooks: Sequence[Path]) -> list[Path]:
    """List the files of a report that its notebooks made."""
    pages_of = [folder / f"{path.stem}.{suffix}" for path in notebooks for suffix in ("ipynb", "html")]
    others = [folder / name for path in notebooks for name in outputs(path)]
    return sorted({path for path in (folder / "index.html", *pages_of, *others) if path.exists()})


def check_name(name: Any) -> None:
    r"""Refuse a name that is no single folder's: a report stays in the folder of reports.

    >>> check_name("../elsewhere")
    Traceback (most recent call last):
    ValueError: a report's name must be that of one folder, without / or \ and not beginning with a dot, not '../elsewhere'
    """
    instance("a report's name", name, str, "a text")
    if not name.isprintable() or not re.fullmatch(r"[^./\\][^/\\]{0,199}", name):
        rule = "that of one folder, without / or \\ and not beginning with a dot"
        raise ValueError(f"a report's name must be {rule}, not {shown(name)}")


def _planned(plan: Callable[..., Any], parameters: Mapping[str, Any]) -> list[Experiment]:
    """Return the experiments of a notebook with these parameters."""
    accepted = inspect.signature(plan).parameters
    return list(_flat(plan(**{name: value for name, value in parameters.items() if name in accepted})))


def _flat(planned: Any) -> Iterable[Experiment]:
    if isinstance(planned, Experiment):
        yield planned
    else:
        for part in planned.values() if isinstance(planned, Mapping) else planned:
            yield from _flat(part)


def _beyond(questions: Sequence[str]) -> list[str]:
    """Name the notebooks in a report's folder where they are not the usual ones."""
    return [] if tuple(questions) == DEFAULT else [question.replace("_", "-") for question in questions]


def _like(value: Any, default: Any) -> bool:
    if isinstance(default, list):
        return (
            isinstance(value, list) and bool(value) and (not default or all(_like(item, default[0]) for item in value))
        )
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _key(path: Path, parameters: dict[str, Any], trained: Sequence[runs.Run]) -> str:
    """Hash all that a notebook's result depends on: its source, its parameters, the runs, this package's code."""
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py"))]
    portable = {name: value for name, value in parameters.items() if name not in ("output", "store", "tables")}
    identities = [(run.id, run.failure or run.environment["sha256"]) for run in trained]
    digest = hashlib.sha256(path.read_bytes() + json.dumps([portable, identities], sort_keys=True).encode())
    for content in code:
        digest.update(content)
    return digest.hexdigest()


def _copy_runs(finished: Sequence[runs.Run], folder: Path) -> None:
    for run in finished:
        target = folder / run.id
        if run.path.resolve() != target.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f".{run.id}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(run.path, part)
            if target.exists():
                shutil.rmtree(target)
            os.rename(part, target)
