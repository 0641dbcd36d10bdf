"""What became of the experiments of a sweep: a state of each, and a table from the run store."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cram_bench.experiment import Experiment, differing, setting
from cram_bench.files import write
from cram_bench.runs import Run, RunError, Store
from cram_bench.runs.store import rows as rows_of

OF_THE_MACHINE = ("seconds", "device", "threads", "commit", "finished")
"""The last columns of `table`: what depends on when and where a run was trained."""

STATES = ("waiting", "running", "finished", "cached", "failed", "died", "damaged")
"""What an experiment of a sweep may be: *cached* was finished before, *failed* diverged or raised an exception, *died*
lost its worker too often, *damaged* has files in the store that cannot be used."""

_KEEP = ("dataset", "model", "method", "seed", "epochs")


@dataclass(frozen=True)
class State:
    """One of `STATES`, and why, or where it stands."""

    name: str
    note: str = ""


def counts(states: Mapping[str, State]) -> str:
    """Say how many are in which state.

    >>> counts({"a": State("finished"), "b": State("running"), "c": State("finished")})
    '3 experiments: 1 running, 2 finished'
    """
    many = Counter(state.name for state in states.values())
    listed = ", ".join(f"{many[name]} {name}" for name in STATES if many[name])
    return f"{len(states)} experiment{'s' * (len(states) != 1)}: {listed}"


def table(
    experiments: Sequence[Experiment], store: Store | None = None, problems: Mapping[str, State] | None = None
) -> pd.DataFrame:
    """Collect results: a row per experiment, in order, whoever trained it.

    Columns: run (the id), dataset, model, method, seed, epochs, the other settings that vary, state (``finished``,
    ``failed``, ``damaged`` or ``missing``), epoch (the last), accuracy (dense, on the test set, a fraction), loss
    (nats), reason (of a failure); then `OF_THE_MACHINE`, empty unless finished.

    Args:
        experiments: which.
        store: where; by default ``Store()``.
        problems: id → what became of experiments that are neither finished nor noted as diverged in the store.
    """
    store = store or Store()
    varying = differing(experiments, besides=_KEEP)
    by_id, found, rows = {each.id: each for each in experiments}, found_in(experiments, store), []
    known = rows_of([run for run in found.values() if isinstance(run, Run)], store)
    for each in experiments:
        row: dict[str, Any] = {"run": each.id}
        for name in (*_KEEP, *varying):
            value = setting(each, name)
            row[name] = " ".join(value) if isinstance(value, list) else value
        there = found.get(each.id)
        if isinstance(there, Run):
            row |= _result(known[there.path])
        elif isinstance(there, State):
            row |= {"state": there.name, "reason": there.note}
        elif reason := _failure(each, by_id, store):
            row |= {"state": "failed", "reason": reason}
        elif problem := (problems or {}).get(each.id):
            row |= {"state": problem.name, "reason": problem.note}
        else:
            row |= {"state": "missing"}
        rows.append(row)
    columns = ["run", *_KEEP, *varying, "state", "epoch", "accuracy", "loss", "reason", *OF_THE_MACHINE]
    return pd.DataFrame(rows, columns=columns).astype({"epoch": "Int64", "threads": "Int64"})


def found_in(experiments: Sequence[Experiment], store: Store) -> dict[str, Run | State]:
    """Return what the store has of experiments: id → its finished run, or that it is damaged."""
    found: dict[str, Run | State] = {}
    for each in experiments:
        try:
            if run := store.find(each):
                found[each.id] = run
            else:
                store.failure(each)
        except RunError as error:  # one bad folder must not stop all others
            found[each.id] = State("damaged", str(error))
    return found


def _failure(experiment: Experiment, by_id: Mapping[str, Experiment], store: Store) -> str | None:
    """Return why an experiment, or the one of the sweep that it starts from, diverged."""
    with contextlib.suppress(RunError):  # a damaged source is a row of its own
        if reason := store.failure(experiment):
            return reason
    for id in experiment.needs:
        if (source := by_id.get(id)) and _failure(source, by_id, store):
            what = "the run it starts from" if id == experiment.start else "its teacher"
            return f"{what}, {id}, failed"
    return None


def _result(known: Mapping[str, Any] | Exception) -> dict[str, Any]:
    if isinstance(known, Exception):  # one bad folder must not hide all others
        return {"state": "damaged", "reason": str(known)}
    last = known["last"]
    found = {"state": "finished", "epoch": int(last["epoch"]), "accuracy": last["test_accuracy"]}
    return found | {"loss": last.get("test_loss")} | {name: known["environment"][name] for name in OF_THE_MACHINE}


def save(results: pd.DataFrame, folder: str | os.PathLike[str]) -> Path:
    """Write `results.csv` into a folder, whole or not at all; return its path."""
    path = Path(folder) / "results.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, results.to_csv(index=False))
    return path
