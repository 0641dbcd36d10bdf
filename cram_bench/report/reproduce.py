"""Make a report again from what it says of itself, and say what differs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cram_bench import runs
from cram_bench.checks import unknown
from cram_bench.experiment import Experiment
from cram_bench.files import sha256
from cram_bench.report.building import ReportError, build, note
from cram_bench.report.notebook import Notebook, find
from cram_bench.train import DivergedError
from cram_bench.untrusted import inside, table

_OF_THE_MACHINE = ["seconds", "device", "threads", "compile", "commit", "finished"]
"""Columns of ``tables/runs.csv`` that say where and when, not what."""


def reproduce(
    folder: str | os.PathLike[str],
    into: str | os.PathLike[str],
    *,
    retrain: bool = True,
    progress: bool = True,
    notebooks: str | os.PathLike[str] | None = None,
    folders: Mapping[str, str | os.PathLike[str]] | None = None,
) -> pd.DataFrame:
    """Train the runs of a report anew, each on as many threads as then, build the report again, and compare.

    On one machine with the same versions every row says ``same``: trainings and probes are deterministic on the CPU.

    Args:
        folder: of a report that `cram_bench.report.build` wrote.
        into: a folder for the new report and its runs.
        retrain: train in a store of its own in `into`; otherwise runs of the usual store serve, and what they lack
            is trained.
        progress: show the trainings.
        notebooks: the folder of the notebooks; by default those of this package. A report has no say in it: they are
            code.
        folders: where the image folders are that the report names without their paths.

    Returns:
        A row per fact, run and table: kind, name, state (``same``, ``differs``, ``missing`` or ``edited``: the file of
        the old report is not the one that was written), detail.

    Raises:
        ReportError: the folder holds no report, one of a version that did not note how it was made, or a damaged note,
            or one that asks for more than a report may; or the place of an image folder is not given.
    """
    folder, into = Path(folder).resolve(), Path(into).resolve()
    about = _placed(note(folder), folders or {})
    if into in (folder, folder.parent):
        raise ReportError(f"{into} holds the report that is to be compared; name another folder")
    new = into / folder.name
    store = runs.Store(into / "runs" if retrain else None)
    rows = _facts(about, find(notebooks)) + _edited(folder, about)
    if retrain:
        _refuse_others(store, about)
    for then in about["runs"]:
        rows.append(_run(then, store, progress))
    shutil.rmtree(new / ".done", ignore_errors=True)  # notebooks are executed anew
    built = build(**about["build"], notebooks=notebooks, reports=into, name=folder.name, store=store, progress=progress)
    for notebook, error in built.failures.items():
        rows.append(("notebook", notebook, "differs", error))
    for name in sorted(about["sha256"]):
        if name.endswith(".csv"):
            rows.append(("table", name, *_table(inside(folder, name), built.folder / name, about["ids"])))
    return pd.DataFrame(rows, columns=["kind", "name", "state", "detail"])


def _refuse_others(store: runs.Store, about: dict[str, Any]) -> None:
    """Refuse runs of an earlier reproduction that other versions made: they would say ``same`` and prove nothing."""
    now = runs.machine()
    for then in about["runs"]:
        run = store.find(Experiment.of(then["settings"]))
        if run and (run.environment["versions"], run.environment["commit"]) != (now["versions"], now["commit"]):
            raise ReportError(f"{run.path} is of an earlier reproduction with other versions; name another folder")


def _placed(about: dict[str, Any], folders: Mapping[str, str | os.PathLike[str]]) -> dict[str, Any]:
    """Return the note with the image folders' places; what runs begin with goes by id, which changes with them."""
    needed = about.get("folders", [])
    for name in folders:
        if name not in needed:
            raise ReportError(unknown("image folder", name, needed) if needed else "the report names no image folder")
    for name in needed:
        if name not in folders:
            raise ReportError(
                f"the report is on the image folder {name!r} and does not say where that is: --folder {name}=PATH"
            )
    places = {name: str(Path(path).expanduser().resolve()) for name, path in folders.items()}
    for path in places.values():
        if not Path(path).is_dir():
            raise ReportError(f"{path} is not a folder of images")
    if not places:
        return about | {"ids": {}}

    def placed(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
        return {key: places.get(value, value) if key in names else value for key, value in values.items()}

    asked = placed(about["build"], "dataset")
    asked["parameters"] = placed(asked.get("parameters") or {}, "target")
    ids: dict[str, str] = {}
    found = []
    for run in about["runs"]:
        settings = placed(run["settings"], "dataset")
        settings["start"] = ids.get(settings.get("start", ""), settings.get("start", ""))
        ids[run["id"]] = Experiment.of(settings).id
        found.append(run | {"settings": settings})
    return about | {"build": asked, "runs": found, "ids": ids}


def _facts(about: dict[str, Any], known: Mapping[str, Notebook]) -> list[tuple[str, str, str, str]]:
    now = runs.machine()
    rows = []
    for name, then in about["versions"].items():
        current = now["versions"].get(name, "none")
        rows.append(("version", name, "same" if current == then else "differs", f"{then}, now {current}"))
    trained = [run for run in about["runs"] if "commit" in run]
    for then in sorted({run["commit"] for run in trained}):
        state = "same" if then == now["commit"] else "differs"
        rows.append(("version", "cram_bench", state, f"{then}, now {now['commit']}"))
    for kind, then in sorted({(run.get("device_type", "cpu"), run["device"]) for run in trained}):
        here = "none" if kind == "cuda" and not torch.cuda.is_available() else runs.machine(kind)["device"]
        rows.append(("device", kind, "same" if then == here else "differs", f"{then}, now {here}"))
    for stem, digest in about["notebooks"].items():
        if stem not in known or sha256(known[stem].path) != digest:
            rows.append(("version", stem, "differs", "another version of the notebook"))
    return rows


def _edited(folder: Path, about: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, digest in about["sha256"].items():
        if name != "report.json":
            path = inside(folder, name)
            state = "missing" if not path.is_file() else "edited" if sha256(path) != digest else ""
            if state:
                rows.append(("file", name, state, "of the report that is reproduced"))
    return rows


def _run(then: dict[str, Any], store: runs.Store, progress: bool) -> tuple[str, str, str, str]:
    experiment = Experiment.of(then["settings"])
    how = {name: then[name] for name in ("threads", "compile") if name in then}
    try:
        run = runs.ensure(experiment, store, device=then.get("device_type"), progress=progress, **how)
    except DivergedError as error:
        state = "same" if "failure" in then else "differs"
        return "run", then["id"], state, f"{runs.describe(experiment)}: {error}"
    now = run.environment["sha256"]["model.safetensors"]
    state = "same" if now == then.get("weights") else "differs"
    return (
        "run",
        then["id"],
        state,
        f"{runs.describe(experiment)}: weights {then.get('weights', 'none')[:8]}, now {now[:8]}",
    )


def _table(old: Path, new: Path, ids: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Compare two tables: state and detail. `ids` are of the runs that have others now, their data being elsewhere."""
    for path, which in ((old, "old"), (new, "new")):
        if not path.is_file():
            return "missing", f"in the {which} report"
    texts = dict.fromkeys(("run", "id"), str)  # an id of digits and an e is no number
    before, now = (pd.read_csv(table(path), dtype=texts) for path in (old, new))
    before = before.replace(ids) if ids else before
    before, now = (table.drop(columns=_OF_THE_MACHINE, errors="ignore") for table in (before, now))
    if list(before.columns) != list(now.columns) or len(before) != len(now):
        return "differs", f"{len(before)} rows of {list(before.columns)}, now {len(now)} of {list(now.columns)}"
    found = []
    for name in before.columns:
        one, other = before[name], now[name]
        unequal = ~((one == other) | (one.isna() & other.isna()))
        if unequal.any():
            size = ""
            if pd.api.types.is_numeric_dtype(one) and pd.api.types.is_numeric_dtype(other):
                size = f", by {(one.astype(float) - other.astype(float)).abs().max():.2g} at most"
            found.append(f"{name} in {int(unequal.sum())} of {len(one)} rows{size}")
    return ("differs", "; ".join(found)) if found else ("same", f"{len(before)} rows")
