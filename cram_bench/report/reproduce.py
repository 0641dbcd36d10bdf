"""Make a report again from what it says of itself, and say what differs."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cram_bench import runs
from cram_bench._files import sha256
from cram_bench.experiment import Experiment
from cram_bench.report.building import ReportError, build, note
from cram_bench.report.notebook import notebooks_folder
from cram_bench.train import DivergedError

_OF_THE_MACHINE = ["seconds", "device", "threads", "compile", "commit", "finished"]
"""Columns of ``tables/runs.csv`` that say where and when, not what."""


def reproduce(
    folder: str | os.PathLike[str], into: str | os.PathLike[str], *, retrain: bool = True, progress: bool = True
) -> pd.DataFrame:
    """Train the runs of a report anew, each on as many threads as then, build the report again, and compare.

    On one machine with the same versions every row says ``same``: trainings and probes are deterministic on the CPU.

    Args:
        folder: of a report that `cram_bench.report.build` wrote.
        into: a folder for the new report and its runs.
        retrain: train in a store of its own in `into`; otherwise runs of the usual store serve, and what they lack
            is trained.
        progress: show the trainings.

    Returns:
        A row per fact, run and table: kind, name, state (``same``, ``differs``, ``missing`` or ``edited``: the file of
        the old report is not the one that was written), detail.

    Raises:
        ReportError: the folder holds no report, one of a version that did not note how it was made, or a damaged note.
    """
    folder, into = Path(folder).resolve(), Path(into).resolve()
    about = note(folder)
    if into in (folder, folder.parent):
        raise ReportError(f"{into} holds the report that is to be compared; name another folder")
    new = into / folder.name
    store = runs.Store(into / "runs" if retrain else None)
    rows = _facts(about) + _edited(folder, about)
    if retrain:
        _refuse_others(store, about)
    for then in about["runs"]:
        rows.append(_run(then, store, progress))
    shutil.rmtree(new / ".done", ignore_errors=True)  # notebooks are executed anew
    built = build(**about["build"], reports=into, name=folder.name, store=store, progress=progress)
    for notebook, error in built.failures.items():
        rows.append(("notebook", notebook, "differs", error))
    for name in sorted(about["sha256"]):
        if name.endswith(".csv"):
            rows.append(("table", name, *_table(folder / name, built.folder / name)))
    return pd.DataFrame(rows, columns=["kind", "name", "state", "detail"])


def _refuse_others(store: runs.Store, about: dict[str, Any]) -> None:
    """Refuse runs of an earlier reproduction that other versions made: they would say ``same`` and prove nothing."""
    now = runs.machine()
    for then in about["runs"]:
        run = store.find(Experiment.of(then["settings"]))
        if run and (run.environment["versions"], run.environment["commit"]) != (now["versions"], now["commit"]):
            raise ReportError(f"{run.path} is of an earlier reproduction with other versions; name another folder")


def _facts(about: dict[str, Any]) -> list[tuple[str, str, str, str]]:
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
        if sha256(notebooks_folder() / f"{stem}.ipynb") != digest:
            rows.append(("version", stem, "differs", "another version of the notebook"))
    return rows


def _edited(folder: Path, about: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, digest in about["sha256"].items():
        if name != "report.json":
            path = folder / name
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


def _table(old: Path, new: Path) -> tuple[str, str]:
    """Compare two tables: state and detail."""
    for path, which in ((old, "old"), (new, "new")):
        if not path.is_file():
            return "missing", f"in the {which} report"
    before, now = (pd.read_csv(io.StringIO(path.read_text(encoding="utf-8"))) for path in (old, new))
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
