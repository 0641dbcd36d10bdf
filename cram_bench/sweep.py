"""Many trainings over many processes or machines, over one run store.

experiments = sweep.read("sweep.yaml")
table = sweep.run(experiments, executor="slurm", slurm={"partition": "gpu"})

store/.sweeps/NAME/
  results.csv          a row per experiment, in their order
  lock                 held while a command follows the sweep
  jobs.json            jobs on Slurm that may still run
  notes/ID.json        an exception of an experiment, other than that it diverged
  20260101-120000-7/   logs of the jobs of one command
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cram_bench import _yaml, data
from cram_bench.executors import Executor, Local, NoAnswerError, Slurm, SweepError, slurm_parameters, write
from cram_bench.experiment import Experiment, recipe
from cram_bench.models import unknown
from cram_bench.runs import Run, RunError, Store, describe

LIMIT = 10_000
"""Experiments a sweep may have: a slip of the pen in a grid is noticed before it fills the memory."""

OF_THE_MACHINE = ("seconds", "device", "threads", "commit", "finished")
"""The last columns of `table`: what depends on when and where a run was trained."""

STATES = ("waiting", "running", "finished", "cached", "failed", "died", "damaged")
"""What an experiment of a sweep may be: *cached* was finished before, *failed* diverged or raised an exception, *died* lost its
worker too often, *damaged* has files in the store that cannot be used."""

_KEEP = ("dataset", "model", "method", "seed", "epochs")
_LISTS = {"methods": "method", "seeds": "seed"}
_OPTIONS = ["device", "threads", "compile", "progress"]


@dataclass(frozen=True)
class State:
    """One of `STATES`, and why, or where it stands."""

    name: str
    note: str = ""


def read(path: str | os.PathLike[str]) -> list[Experiment]:
    """Return the experiments of a YAML file, as `experiments` does.

    Raises:
        SweepError: the file is no YAML, or an experiment in it is not allowed; the message names the file.
        OSError: there is no such file.
    """
    try:
        return experiments(_yaml.load(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SweepError(f"{path}: {error}") from error


def experiments(spec: Any) -> list[Experiment]:
    """Return the experiments that a mapping describes, each once; a repeated one is warned about.

    Args:
        spec: settings of `Experiment` that all share, and either ``experiments``, a list of mappings with the settings of each, or
            any of ``methods`` (names), ``seeds`` (a number n for 0 … n − 1, or a list) and ``grid`` (setting → values), of which
            every combination is taken: methods outermost, seeds innermost. What is not given is as in `recipe`.

    Raises:
        ValueError: a name is unknown (with a suggestion), a value not allowed, or there are none or too many experiments.
        TypeError: a setting has another type than its field.

    >>> [e.lr for e in experiments({"methods": ["sgd"], "grid": {"lr": [0.1, 0.2]}})]
    [0.1, 0.2]
    """
    if not isinstance(spec, Mapping):
        raise SweepError(f"a sweep is a mapping such as 'methods: [sgd, cram+]', not {_short(spec)}")
    settings = [item.name for item in fields(Experiment)]
    _known(spec, [*settings, *_LISTS, "grid", "experiments"])
    shared = {name: value for name, value in spec.items() if name in settings}
    for name, value in shared.items():
        if isinstance(value, list) and name != "compressors":
            where = next((many for many, one in _LISTS.items() if one == name), "grid")
            raise SweepError(f"{name} is one value, not {_short(value)}; several go under {where}")
    if "experiments" in spec:
        if clash := [name for name in (*_LISTS, "grid") if name in spec]:
            raise SweepError(f"{clash[0]} and experiments exclude each other")
        listed = _items("experiments", spec["experiments"])
        if len(listed) > LIMIT:
            raise SweepError(f"a sweep may have {LIMIT} experiments, not {len(listed)}")
        found = [_numbered(number, each, shared, settings) for number, each in enumerate(listed, 1)]
    else:
        found = [_one(shared | each) for each in _combinations(spec, shared, settings)]
    unique = list(dict.fromkeys(found))
    if len(unique) < len(found):
        warnings.warn(
            f"{len(found) - len(unique)} of {len(found)} experiments are repeated; each is trained once", stacklevel=2
        )
    return unique


def _combinations(spec: Mapping[str, Any], shared: Mapping[str, Any], settings: list[str]) -> list[dict[str, Any]]:
    grid = spec.get("grid", {})
    if not isinstance(grid, Mapping):
        raise SweepError(f"grid must map settings to lists of values, not {_short(grid)}")
    _known(grid, settings)
    axes: dict[str, Sequence[Any]] = {name: _items(f"{name} in the grid", values) for name, values in grid.items()}
    many: dict[str, Sequence[Any]] = {}
    if "methods" in spec:
        many["method"] = _items("methods", spec["methods"])
    if "seeds" in spec:
        many["seed"] = _seeds(spec["seeds"])
    for name in (*many, *axes):
        if name in shared or (name in many and name in axes):
            raise SweepError(f"{name} is given twice")
    axes = {name: many[name] for name in many if name == "method"} | axes
    axes |= {name: many[name] for name in many if name == "seed"}
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > LIMIT:
        raise SweepError(f"a sweep may have {LIMIT} experiments, not {count}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _known(names: Mapping[Any, Any], allowed: list[str]) -> None:
    for name in names:
        if name not in allowed:
            raise SweepError(unknown("setting", str(name), allowed))


def _items(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise SweepError(f"{name} must be a list of at least one value, not {_short(value)}")
    return value


def _seeds(value: Any) -> Sequence[Any]:
    if type(value) is int:
        if not 1 <= value <= LIMIT:
            raise SweepError(f"seeds must be a number from 1 to {LIMIT}, or a list of seeds, not {value}")
        return range(value)
    if not isinstance(value, list):
        raise SweepError(f"seeds must be a number from 1 to {LIMIT}, or a list of seeds, not {_short(value)}")
    return _items("seeds", value)


def _numbered(number: int, each: Any, shared: Mapping[str, Any], settings: list[str]) -> Experiment:
    try:
        if not isinstance(each, Mapping):
            raise SweepError(f"it must be a mapping of settings, not {_short(each)}")
        _known(each, settings)
        return _one({**shared, **each})
    except (ValueError, TypeError) as error:
        raise SweepError(f"experiment {number}: {error}") from error


def _one(settings: dict[str, Any]) -> Experiment:
    for name in ("dataset", "method"):
        if not isinstance(settings.get(name, ""), str):
            raise SweepError(f"{name} must be of type str, not {_short(settings[name])}")
    dataset, method = settings.pop("dataset", "digits"), settings.pop("method", "sgd")
    if data.is_folder(dataset) and not Path(dataset).expanduser().is_dir():
        data.load(dataset)  # raises, with a suggestion
    experiment = recipe(dataset, method, **settings)
    images = data.training_size(experiment.dataset)
    if images and experiment.holdout >= images:
        raise SweepError(f"holdout must be below the {images} training images, not {experiment.holdout}")
    if images and experiment.batch_size > images - experiment.holdout:
        left = images - experiment.holdout
        raise SweepError(f"batch_size {experiment.batch_size} is larger than the training data, {left} images")
    return experiment


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def table(
    experiments: Sequence[Experiment], store: Store | None = None, problems: Mapping[str, State] | None = None
) -> pd.DataFrame:
    """Collect results: a row per experiment, in order, whoever trained it.

    Columns: run (the id), dataset, model, method, seed, epochs, the other settings that vary, state (``finished``, ``failed``,
    ``damaged`` or ``missing``), epoch (the last), accuracy (dense, on the test set, a fraction), loss (nats), reason (of a failure); then
    `OF_THE_MACHINE`, empty unless finished.

    Args:
        experiments: which.
        store: where; by default ``Store()``.
        problems: id → what became of experiments that are neither finished nor noted as diverged in the store.
    """
    store = store or Store()
    varying = [
        item.name
        for item in fields(Experiment)
        if item.name not in _KEEP and len({getattr(each, item.name) for each in experiments}) > 1
    ]
    by_id, found, rows = {each.id: each for each in experiments}, _found(experiments, store), []
    for each in experiments:
        row: dict[str, Any] = {"run": each.id}
        for name in (*_KEEP, *varying):
            value = getattr(each, name)
            row[name] = " ".join(value) if isinstance(value, tuple) else value
        there = found.get(each.id)
        if isinstance(there, Run):
            row |= _result(there)
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


def _found(experiments: Sequence[Experiment], store: Store) -> dict[str, Run | State]:
    """Return what the store has of experiments: id → its finished run, or that it is damaged. Reads the whole store once."""
    found: dict[str, Run | State] = {}
    elsewhere: dict[Experiment, Run] | None = None
    for each in experiments:
        try:
            if any((root / each.id / "model.safetensors").is_file() for root in (store.root, *store.also)):
                found[each.id] = store.find(each) or State("damaged", "it went while it was read")
                continue
            store.failure(each)
        except RunError as error:  # one bad folder must not stop all others
            found[each.id] = State("damaged", str(error))
            continue
        if elsewhere is None:  # a default that changed since gives the same settings another name
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                elsewhere = {run.experiment: run for run in store.runs()}
        if each in elsewhere:
            found[each.id] = elsewhere[each]
    return found


def _failure(experiment: Experiment, by_id: Mapping[str, Experiment], store: Store) -> str | None:
    """Return why an experiment, or the one of the sweep that it starts from, diverged."""
    with contextlib.suppress(RunError):  # a damaged source is a row of its own
        if reason := store.failure(experiment):
            return reason
    source = by_id.get(experiment.start)
    return f"the run it starts from, {source.id}, failed" if source and _failure(source, by_id, store) else None


def _result(run: Run) -> dict[str, Any]:
    try:
        last, environment = run.history.iloc[-1], run.environment
        found = {
            "state": "finished",
            "epoch": int(last["epoch"]),
            "accuracy": last["test_accuracy"],
            "loss": last["test_loss"],
        }
        return found | {name: environment[name] for name in OF_THE_MACHINE}
    except (OSError, ValueError, KeyError, IndexError) as error:  # one bad folder must not hide all others
        return {"state": "damaged", "reason": f"{run.path}: {error!r}"}


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

    A job whose worker dies, or comes to its time limit, is submitted again and goes on from its last epoch. Calling it again,
    also after it was interrupted or killed, goes on where things stand: finished runs are found, and jobs on Slurm that still run
    are waited for.

    Args:
        experiments: which; each is trained once.
        store: where; by default ``Store()``. On Slurm all nodes must see it.
        executor: ``local``, ``slurm``, or an `Executor` of your own.
        name: of the folder with logs and results in the store, and of the jobs on Slurm.
        workers: jobs at once; by default, as many processes as GPUs or else cores, and on Slurm what Slurm lets.
        per_job: experiments that a job trains one after the other; more than one repays where a training takes seconds.
        retries: how often an experiment is tried again after its worker died, counted anew after each job that saved an epoch.
        retry_failed: train those anew that diverged before.
        slurm: parameters for `slurm_parameters`.
        patience: seconds for which squeue, or sbatch once it took a job, may fail; and after which a job is given up, and
            submitted again, whose state Slurm does not know.
        every: seconds between two looks, by default the executor's.
        stream: where to show states, by default standard error.
        options: device, threads, compile and progress, of `runs.ensure`; here a process sees one GPU, its own, so no ``cuda:1``.

    Raises:
        SweepError: an argument is not allowed, Slurm refuses the jobs or does not answer (its jobs go on), or another command
            follows this sweep.
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
        if each.start and each.start not in ids:
            store.open(each.start)  # raises where there is no such run
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
        stack.enter_context(_alone(folder / "lock", name))
        if retry_failed:
            for each in wanted:
                _forget_failure(each, store)
        follow = _Follow(wanted, store, backend, folder / "notes", per_job, retries, patience)
        while not follow.look():
            view.show(follow.states)
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
def _alone(path: Path, name: str) -> Iterator[None]:
    """Hold the sweep's lock; refuse where another command does for longer than a worker's look takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        limit = time.monotonic() + 3
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise SweepError(
                        f"another command follows the sweep {name!r} in this store; wait for it or stop it"
                    ) from None
                time.sleep(0.05)
        yield


def _forget_failure(experiment: Experiment, store: Store) -> None:
    with contextlib.suppress(RunError):  # a damaged note is told of, not deleted
        if not store.failure(experiment):
            return
        with store.lock(experiment):
            if store.failure(experiment):
                shutil.rmtree(store.root / ".training" / experiment.id)


class _Follow:
    """The state of a sweep as it goes: what waits, which jobs hold what, what became of it."""

    def __init__(
        self,
        wanted: Sequence[Experiment],
        store: Store,
        backend: Executor,
        notes: Path,
        per_job: int,
        retries: int,
        patience: float,
    ) -> None:
        self.store, self.backend, self.notes = store, backend, notes
        self.per_job, self.retries, self.patience = per_job, retries, patience
        self.wanted = {each.id: each for each in wanted}
        found = _found(wanted, store)
        self.states = {
            key: there if isinstance(there := found.get(key), State) else State("cached" if there else "waiting")
            for key in self.wanted
        }
        self.jobs = {job: [key for key in held if key in self.wanted] for job, held in backend.attach().items()}
        held = {key for keys in self.jobs.values() for key in keys}
        for key in self.open():
            if key not in held:  # what an earlier command met is tried again
                (notes / f"{key}.json").unlink(missing_ok=True)
        self.queue = [key for key in self.open() if key not in held]
        self.alone: list[str] = []  # whose worker died: they share their next one with nobody
        self.deaths: Counter[str] = Counter()
        self.silent: dict[str, float] = {}
        self.since: dict[str, float] = {}  # when squeue, and when sbatch, began to fail
        self.submitted = False
        self.saved = {key: self._saved(key) for key in held}  # the last epoch's time when the job was submitted

    def open(self) -> list[str]:
        return [key for key, state in self.states.items() if state.name in ("waiting", "running")]

    def look(self) -> bool:
        """Look once at jobs and store, submit what can be; return whether all is settled."""
        found = self._poll()  # before the store: what a job finished before it ended is there then
        if any(state == "ended" for state, _ in found.values()):
            os.listdir(self.store.root)  # a network file system looks again
        self._settle()
        for job, (state, reason) in found.items():
            left = [key for key in self.jobs[job] if key in self.open()]
            if state == "ended":
                self._ended(job, left, reason)
            else:
                for key in left:
                    tries = f"try {self.deaths[key] + 1}" if self.deaths[key] else ""
                    running = state == "running" and key == left[0]
                    self.states[key] = State(
                        "running" if running else "waiting", "; ".join(filter(None, (reason, tries)))
                    )
        if self.open():
            self._submit()
        return not self.open()

    def _poll(self) -> dict[str, tuple[str, str]]:
        now = time.monotonic()
        try:
            found = self.backend.poll(list(self.jobs)) if self.jobs else {}
        except NoAnswerError as error:  # says nothing of the jobs, which go on
            self._bear("squeue", error)
            for key in (key for held in self.jobs.values() for key in held if key in self.open()):
                self.states[key] = State(self.states[key].name, str(error))
            return {}
        self.since.pop("squeue", None)
        for job, (state, reason) in found.items():
            if state != "unknown":
                self.silent.pop(job, None)
            elif now - self.silent.setdefault(job, now) > self.patience:
                found[job] = "ended", f"no word of it for {self.patience:g} s, {reason}"
        return found

    def _bear(self, command: str, error: SweepError) -> None:
        """Bear with a command of Slurm that fails, for so long as there is patience."""
        now = time.monotonic()
        if now - self.since.setdefault(command, now) > self.patience:
            raise SweepError(f"{command} fails for {self.patience:g} s: {error}") from error

    def _saved(self, key: str) -> int | None:
        """Return when the last epoch of a training was saved."""
        try:
            return (self.store.root / ".training" / key / "checkpoint.pt").stat().st_mtime_ns
        except OSError:
            return None

    def _settle(self) -> None:
        for key in self.open():
            if (self.store.root / key / "model.safetensors").is_file():  # find() would read all runs, at every look
                self.states[key] = State("finished")
                continue
            try:
                reason = self.store.failure(self.wanted[key])
            except RunError as error:
                self.states[key] = State("damaged", str(error))
                continue
            if reason:
                self.states[key] = State("failed", reason)
            elif (note := self._note(key)) and not note["again"]:
                self.states[key] = State("failed", note["reason"])
        waits = set(self.open())
        self.queue = [key for key in self.queue if key in waits]
        self.alone = [key for key in self.alone if key in waits]

    def _note(self, key: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.notes / f"{key}.json").read_text())
        except FileNotFoundError:
            return None

    def _ended(self, job: str, left: list[str], reason: str) -> None:
        """Queue again what an ended job left; the first of it is what its worker died of."""
        log = self.backend.log(job)
        self.backend.forget(job)
        del self.jobs[job]
        self.silent.pop(job, None)
        if not left:
            return
        first = left[0]
        if (saved := self._saved(first)) is not None and saved != self.saved.get(first):
            self.deaths[first] = 0  # it gets on: a long training may meet many time limits
        self.deaths[first] += 1
        note = self._note(first)
        why = (note or {}).get("reason") or f"its worker ended without a result{f' ({reason})' if reason else ''}"
        if log:
            why += f"; see {log}"
        if reason == "CANCELLED":  # by somebody, who does not want it back
            for key in left:
                self.states[key] = State("died", "cancelled on Slurm")
        elif self.deaths[first] > self.retries:
            self.states[first] = State("died", why)
            self.queue = left[1:] + self.queue
        else:
            (self.notes / f"{first}.json").unlink(missing_ok=True)
            self.states[first] = State("waiting", f"try {self.deaths[first] + 1}: {why}")
            self.alone.append(first)
            self.queue = left[1:] + self.queue

    def _submit(self) -> None:
        waits = set(self.open())
        ready = [key for key in self.queue if self.wanted[key].start not in waits]
        groups = [[key] for key in self.alone]
        groups += [ready[start : start + self.per_job] for start in range(0, len(ready), self.per_job)]
        groups = groups[: self.backend.room()]
        if not groups:
            return
        saved = {key: self._saved(key) for group in groups for key in group}
        try:
            jobs = self.backend.submit([[(key, self.wanted[key].settings()) for key in group] for group in groups])
        except SweepError as error:
            if not self.submitted:  # what is wrong from the start stays wrong
                raise
            self._bear("sbatch", error)
            return
        self.since.pop("sbatch", None)
        self.submitted = True
        self.saved |= saved
        groups = groups[: len(jobs)]
        self.jobs |= zip(jobs, groups, strict=True)
        sent = {key for group in groups for key in group}
        self.queue = [key for key in self.queue if key not in sent]
        self.alone = [key for key in self.alone if key not in sent]


class View:
    """Show the states of a sweep: a table that is updated in place on a terminal, a few plain lines in a log.

    In a log there is a line for each tenth that is settled, and one for each experiment that failed or whose worker died.

    Args:
        experiments: in the order of the table.
        stream: where to, by default standard error.
    """

    def __init__(self, experiments: Sequence[Experiment], stream: Any = None) -> None:
        self.stream = stream or sys.stderr
        varying = [
            item.name
            for item in fields(Experiment)
            if item.name not in ("method", "seed", "warmup_epochs")
            and len({getattr(e, item.name) for e in experiments}) > 1
        ]
        self.labels = {}
        for each in experiments:
            values = [(name, getattr(each, name)) for name in varying]
            shown = [f"{name} {' '.join(v) if isinstance(v, tuple) else v}" for name, v in values if v not in ((), "")]
            self.labels[each.id] = ", ".join([describe(each), *shown])
        self.tenth, self.told = -1, dict[str, State]()
        self.live: Any = None

    def __enter__(self) -> View:
        if self.stream.isatty():
            with contextlib.suppress(ImportError):  # plain lines, then
                from rich.console import Console
                from rich.live import Live

                self.live = Live(console=Console(file=self.stream), auto_refresh=False, vertical_overflow="ellipsis")
                self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, states: Mapping[str, State]) -> None:
        """Show how things stand."""
        if self.live is not None:
            if states != self.told:  # no flicker
                self.told = dict(states)
                self.live.update(self._table(states), refresh=True)
            return
        for key, state in states.items():
            lost = state.name in ("failed", "died", "damaged") or re.match(r"try \d+: ", state.note)
            if lost and self.told.get(key) != state:
                self.told[key] = state
                self.say(f"{self.labels[key]}: {state.name}, {state.note}")
        settled = sum(state.name not in ("waiting", "running") for state in states.values())
        tenth = 10 * settled // max(1, len(states))
        if tenth > self.tenth:
            self.tenth = tenth
            self.say(counts(states))

    def say(self, line: str) -> None:
        """Print a line, above the table if there is one."""
        if line and self.live is not None:
            self.live.console.print(line, markup=False, highlight=False)
        elif line:
            print(line, file=self.stream, flush=True)

    def _table(self, states: Mapping[str, State]) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        colours = {"running": "cyan", "finished": "green", "cached": "green", "failed": "red"}
        colours |= {"died": "red", "damaged": "red"}
        shown = Table(box=None, pad_edge=False)
        for column in ("run", "experiment", "state", ""):
            shown.add_column(column, overflow="ellipsis", no_wrap=True)
        few = len(states) <= self.live.console.height - 4
        for key, state in states.items():
            if few or state.name in ("running", "failed", "died", "damaged"):
                cells = (key, self.labels[key], Text(state.name, colours.get(state.name, "")), Text(state.note))
                shown.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
        return Group(Text(counts(states)), shown)


def counts(states: Mapping[str, State]) -> str:
    """Say how many are in which state.

    >>> counts({"a": State("finished"), "b": State("running"), "c": State("finished")})
    '3 experiments: 1 running, 2 finished'
    """
    many = Counter(state.name for state in states.values())
    listed = ", ".join(f"{many[name]} {name}" for name in STATES if many[name])
    return f"{len(states)} experiment{'s' * (len(states) != 1)}: {listed}"


def save(results: pd.DataFrame, folder: str | os.PathLike[str]) -> Path:
    """Write `results.csv` into a folder, whole or not at all; return its path."""
    path = Path(folder) / "results.csv"
    write(path, results.to_csv(index=False).rstrip("\n"))
    return path
