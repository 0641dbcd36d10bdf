"""A sweep from its first job to its table."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cram_bench.checks import number
from cram_bench.executors import Executor, Local, Slurm, SweepError, slurm_parameters
from cram_bench.experiment import Experiment
from cram_bench.files import HeldError, Lock, locked
from cram_bench.models import unknown
from cram_bench.runs import RunError, Store
from cram_bench.sweep.following import Follow
from cram_bench.sweep.results import table
from cram_bench.sweep.view import View

_OPTIONS = ["device", "threads", "compile", "progress", "wait"]


def run(
    experiments: Sequence[Experiment],
    store: Store | None = None,
    executor: str | Executor = "local",
    *,
    name: str = "sweep",
    workers: int | None = None,
    per_job: int = 1,
    retries: int = 3,
    retry_failed: bool = False,
    slurm: Mapping[str, Any] | None = None,
    patience: float = 600.0,
    every: float | None = None,
    stream: Any = None,
    **options: Any,
) -> pd.DataFrame:
    """Train what is missing, on as many processes or machines as allowed; return the results as `table` does.

    A job whose worker dies, or comes to its time limit, is submitted again and goes on from its last epoch. Calling it
    again, also after it was interrupted or killed, goes on where things stand: finished runs are found, and jobs on
    Slurm that still run are waited for.

    Args:
        experiments: which; each is trained once.
        store: where; by default ``Store()``. On Slurm all nodes must see it.
        executor: ``local``, ``slurm``, or an `Executor` of your own.
        name: of the folder with logs and results in the store, and of the jobs on Slurm.
        workers: jobs at once; by default, as many processes as GPUs or else cores, and on Slurm what Slurm lets.
        per_job: experiments that a job trains one after the other; more than one repays where a training takes seconds.
        retries: how often an experiment is tried again after its worker died, counted anew after each job that saved an
            epoch.
        retry_failed: train those anew that diverged before.
        slurm: parameters for `slurm_parameters`.
        patience: seconds for which squeue, or sbatch once it took a job, may fail; and after which a job is given up,
            and submitted again, whose state Slurm does not know.
        every: seconds between two looks, by default the executor's.
        stream: where to show states, by default standard error.
        options: device, threads, compile, progress and wait, of `runs.ensure`; here a process sees one GPU, its own, so
            no ``cuda:1``.

    Raises:
        SweepError: an argument is not allowed, Slurm refuses the jobs or does not answer (its jobs go on), or another
            command follows this sweep.
        KeyboardInterrupt: as ever; local processes are stopped then, jobs on Slurm go on.
    """
    store, wanted = store or Store(), list(dict.fromkeys(experiments))
    for label, value, least in (("workers", workers, 1), ("per_job", per_job, 1), ("retries", retries, 0)):
        if value is not None and (type(value) is not int or value < least):
            raise SweepError(f"{label} must be a whole number, at least {least}, not {value!r}")
    if isinstance(executor, str) and executor not in ("local", "slurm"):
        raise SweepError(unknown("executor", executor, ["local", "slurm"]))
    if executor != "slurm" and slurm:
        raise SweepError("Slurm's parameters need the executor slurm")
    _check(options, executor)
    ids = {each.id for each in wanted}
    for each in wanted:
        for needed in each.needs:
            if needed not in ids:
                store.open(needed)  # raises where there is no such run
    parameters = slurm_parameters(slurm or {}) if executor == "slurm" else {}
    name = safe(name)
    folder = store.root / ".sweeps" / name
    common = {
        "store": str(store.root),
        "notes": str(folder / "notes"),
        "options": options,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    with contextlib.ExitStack() as stack:
        view = stack.enter_context(View(wanted, stream))
        backend: Executor
        if executor == "slurm":
            backend = Slurm(folder, name, common, parameters, workers or 0)
        elif isinstance(executor, str):
            backend = _local(folder, common, workers, options)
        else:
            backend = executor
        # After the lock is free, for local workers end then.
        stack.push(lambda error, *_: view.say(backend.close(settled=error is None)))
        lock = stack.enter_context(_alone(folder / "lock", name))
        if retry_failed:
            for each in wanted:
                _forget_failure(each, store)
        follow = Follow(wanted, store, backend, folder / "notes", per_job, retries, patience)
        while not follow.look():
            view.show(follow.states)
            if not lock.held():
                raise SweepError(f"somebody removed {lock.path}, which keeps other commands out; give this one again")
            time.sleep(backend.every if every is None else every)
        view.show(follow.states)
        problems = {key: state for key, state in follow.states.items() if state.name in ("failed", "died", "damaged")}
        return table(wanted, store, problems)


def safe(name: str) -> str:
    """Return a name that is one folder's and one job's.

    >>> safe("../lr & rho"), safe("..")
    ('lr-rho', 'sweep')
    """
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).strip(".-") or "sweep"


def name_of(path: str | os.PathLike[str]) -> str:
    """Return the name of a file's sweep: files of one name in different folders are different sweeps.

    >>> name_of("/a/lr.yaml"), name_of("/b/lr.yaml")
    ('lr-22a05a', 'lr-cccc59')
    """
    whole = Path(path).expanduser().resolve()
    return f"{safe(whole.stem)}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:6]}"


def _check(options: Mapping[str, Any], executor: str | Executor) -> None:
    """Refuse options that every worker would refuse."""
    for name, value in options.items():
        if name not in _OPTIONS:
            raise SweepError(unknown("option", name, _OPTIONS))
        if value is None:
            continue
        if name == "threads" and (type(value) is not int or value < 1):
            raise SweepError(f"threads must be a whole number, at least 1, not {value!r}")
        if name == "wait":
            try:
                number("wait", value, 0)
            except (TypeError, ValueError) as error:
                raise SweepError(str(error)) from None
        if name in ("compile", "progress") and not isinstance(value, bool):
            raise SweepError(f"{name} must be True or False, not {value!r}")
        if name == "device":
            allowed, cuda = ["cpu", "cuda"], r"cuda(:\d+)?"
            if executor == "local":  # a process sees one GPU, its own; what a node of Slurm has is not known here
                allowed, cuda = ["cpu", *(["cuda"] if torch.cuda.device_count() else [])], "cuda"
            if value != "cpu" and not ("cuda" in allowed and re.fullmatch(cuda, str(value))):
                raise SweepError(f"device must be {' or '.join(allowed)} in a sweep, not {value!r}")


def _local(folder: Path, common: dict[str, Any], workers: int | None, options: Mapping[str, Any]) -> Local:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus: list[str] = []
    if options.get("device") != "cpu" and (count := torch.cuda.device_count()):
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        gpus = visible or [str(index) for index in range(count)]
    workers = workers or len(gpus) or cores
    # Processes of many threads each would fight for the cores; what is given, here or in the environment, goes before.
    threads = 0 if options.get("threads") else max(1, cores // workers)
    return Local(folder, folder / "lock", common, workers, gpus, threads)


@contextlib.contextmanager
def _alone(path: Path, name: str) -> Iterator[Lock]:
    """Hold the sweep's lock; refuse where another command does for longer than a worker's look takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(path, wait=3))
        except HeldError as error:
            what = f"another command follows the sweep {name!r} in this store, {error.holder}"
            raise SweepError(f"{what}; wait for it or stop it") from None
        yield lock


def _forget_failure(experiment: Experiment, store: Store) -> None:
    with contextlib.suppress(RunError):  # a damaged note is told of, not deleted
        if not store.failure(experiment):
            return
        with store.lock(experiment):
            if store.failure(experiment):
                shutil.rmtree(store.root / ".training" / experiment.id)
