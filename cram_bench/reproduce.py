"""Make a report again from what it says of itself, and say what differs."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pandas as pd

from cram_bench import report, runs
from cram_bench._files import sha256, unsealed
from cram_bench.experiment import Experiment
from cram_bench.train import DivergedError

_OF_THE_MACHINE = ["seconds", "device", "threads", "compile", "commit", "finished"]
"""Columns of ``tables/runs.csv`` that say where and when, not what."""


class ReportError(ValueError):
    """A report cannot be made again; the message says which and why."""


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
    folder, into = Path(folder), Path(into).absolute()
    about = _about(folder)
    if into == folder.absolute().parent or into == folder.absolute():
        raise ReportError(f"{into} holds the report that is to be compared; name another folder")
    rows = _facts(about) + _edited(folder, about)
    store = runs.Store(into / "runs" if retrain else None)
    for then in about["runs"]:
        rows.append(_run(then, store, progress))
    built = report.build(**about["build"], reports=into, name=folder.name, store=store, progress=progress)
    for notebook, error in built.failures.items():
        rows.append(("notebook", notebook, "differs", error))
    for name in sorted(about["sha256"]):
        if name.endswith(".csv"):
            rows.append(("table", name, *_table(folder / name, built.folder / name)))
    return pd.DataFrame(rows, columns=["kind", "name", "state", "detail"])


def _about(folder: Path) -> dict[str, Any]:
    file = folder / "report.json"
    try:
        about = unsealed(file.read_text(), file.name)
    except FileNotFoundError:
        raise ReportError(f"{folder} is not a report: it has no report.json") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} is damaged: {error}") from error
    if not {"build", "runs", "versions", "sha256"} <= about.keys():
        raise ReportError(f"{file} does not say how the report was made; an older version wrote it")
    return about


def _facts(about: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    now = runs.machine()
    rows = []
    for name, then in about["versions"].items():
        current = now["versions"].get(name, "none")
        rows.append(("version", name, "same" if current == then else "differs", f"{then}, now {current}"))
    commits = ", ".join(sorted({run["commit"] for run in about["runs"] if "commit" in run}))
    rows.append(
        ("version", "cram_bench", "same" if commits == now["commit"] else "differs", f"{commits}, now {now['commit']}")
    )
    devices = ", ".join(sorted({run["device"] for run in about["runs"] if "device" in run}))
    rows.append(
        ("device", "device", "same" if devices == now["device"] else "differs", f"{devices}, now {now['device']}")
    )
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
        run = runs.ensure(experiment, store, progress=progress, **how)
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
    before, now = (pd.read_csv(io.StringIO(path.read_text())) for path in (old, new))
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
