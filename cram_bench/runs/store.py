"""Runs in their folders, and the store that finds them; the folders are described in `cram_bench.runs`.

What needs torch is imported where it is used: `Store.table` of runs that the index knows does without.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cram_bench import untrusted
from cram_bench.checks import instance, one_line
from cram_bench.files import HeldError, Holder, Lock, cache_root, holder, locked, parsed, unsealed
from cram_bench.runs.index import Index, Row, is_id

if TYPE_CHECKING:
    from torch import nn

    from cram_bench.experiment import Experiment

FILES = ("settings.json", "history.csv", "model.safetensors")
_REMEDY = "put that file back, or train it again"
CONTENT = (*FILES, "environment.json")
STRUCTURE = "structure.json"  # of a network that was shrunk
_KEPT = ("dataset", "model", "method", "seed", "epochs")  # in every table
_ENVIRONMENT = ("seconds", "device", "threads", "compile", "commit", "finished")
FORMAT = 1  # of a run's folder; raise it when an older version could misread a new one


class RunError(ValueError):
    """A run is missing, damaged or not what its name says; the message says which and where."""


@dataclass(frozen=True)
class Run:
    """A finished run in its folder, or a failed one, whose `failure` says why."""

    path: Path
    experiment: Experiment
    failure: str | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open a finished run's folder.

        Raises:
            RunError: it is no such folder, or its settings are damaged.
        """
        path = Path(path)
        if not finished(path):
            raise RunError(f"{path} is not a finished run: it has no model.safetensors")
        return cls(path, _experiment(path, _environment(path)))

    @property
    def id(self) -> str:
        """Hash of the settings."""
        return self.experiment.id

    @property
    def label(self) -> str:
        """Short description for progress and tables."""
        return describe(self.experiment)

    @property
    def environment(self) -> dict[str, Any]:
        """Commit, versions, device, times, command, shape of the data and checksums, as written by the training.

        Raises:
            RunError: the file is missing or damaged, or of a newer version of this package.
        """
        return _environment(self.path)

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch: lr, losses, accuracies (fractions), seconds.

        Raises:
            RunError: the file is damaged.
        """
        return _history(self.path, _environment(self.path))

    @property
    def structure(self) -> dict[str, list[int]] | None:
        """Which units stay in a network that was shrunk, as `cram_bench.deploy.shrink` takes it; None: it is whole.

        Raises:
            RunError: ``structure.json`` is missing, damaged or of a newer version.
        """
        from cram_bench.deploy.structure import parsed as read

        environment = _environment(self.path)
        if STRUCTURE not in environment["sha256"]:
            return None
        content = _read(self.path, STRUCTURE, environment)
        try:
            return read(content)
        except ValueError as error:
            raise RunError(f"{self.path / STRUCTURE} is damaged or no structure: {one_line(error)}") from error

    def load_model(self) -> nn.Module:
        """Build the network and load its trained weights, in eval mode on the CPU.

        A network that was shrunk has a ``structure.json`` beside its weights, which is read before them.

        Raises:
            RunError: a file does not match its checksum or the network, or the weights are no finite numbers.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        from cram_bench import models
        from cram_bench._defaults import usual_defaults
        from cram_bench.deploy.structure import shrink

        environment = _environment(self.path)
        content, shape = _read(self.path, "model.safetensors", environment), environment["data"]
        with torch.random.fork_rng(), usual_defaults():
            torch.manual_seed(self.experiment.seed)  # of what is drawn and not saved
            model = models.create(self.experiment.model, shape["num_classes"], shape["channels"], shape["image_size"])
        if (kept := self.structure) is not None:
            try:
                model = shrink(model, kept)
            except (ValueError, TypeError) as error:
                raise RunError(
                    f"{self.path / STRUCTURE} does not fit {self.experiment.model}: {one_line(error)[:200]}"
                ) from error
        try:
            models.check_values(model, weights := load(content))
            model.load_state_dict(weights)
        except (SafetensorError, RuntimeError, ValueError) as error:
            file, reason = self.path / "model.safetensors", " ".join(str(error).split())[:200]
            raise RunError(f"{file} does not fit {self.experiment.model}: {reason}") from error
        return model.to(memory_format=torch.channels_last).eval()


class Store:
    """Runs under one folder, by default ``CRAM_BENCH_RUNS``, else the user's cache folder.

    Args:
        root: the folder; created when the first run is.
        also: folders of finished runs that are only read, such as those committed beside a report.

    Raises:
        RunError: `root` is a file.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, also: Sequence[str | os.PathLike[str]] = ()) -> None:
        self.root = Path(root or os.environ.get("CRAM_BENCH_RUNS") or cache_root() / "runs").expanduser().absolute()
        if self.root.exists() and not self.root.is_dir():
            raise RunError(f"the run store must be a folder, and {self.root} is none; CRAM_BENCH_RUNS names it")
        self.also = tuple(Path(path) for path in also)

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def find(self, experiment: Experiment) -> Run | None:
        """Return the finished run of `experiment`, or None.

        Raises:
            RunError: a folder has its name and holds another experiment.
        """
        id = experiment.id
        for root in (self.root, *self.also):
            if finished(path := root / id):
                run = Run.open(path)
                if run.experiment != experiment:
                    raise RunError(f"{path} holds other settings than its name says; move it away")
                return run
        for index in self._indices():  # a default that changed since gives the same settings another name
            if name := index.elsewhere(id):
                with contextlib.suppress(RunError):
                    if (run := Run.open(index.root / name)).experiment == experiment:
                        return run
        return None

    def open(self, name: str | os.PathLike[str]) -> Run:
        """Return a finished run by its folder, its id, or the beginning of its id.

        Raises:
            RunError: no finished run, or more than one, is called so.
        """
        instance("a run", name, (str, os.PathLike), "a folder or the beginning of an id")
        if Path(name).is_dir():
            return Run.open(name)
        name = str(name)
        found: dict[str, Path] = {}
        for index in self._indices():
            for folder in [name] if is_id(name) else index.beginning(name):
                if finished(path := index.root / folder):
                    found.setdefault(folder, path)
        if not found or not is_id(name):  # a default that changed since gives the same settings another name
            for index in self._indices():
                for id, folder in index.others().items():
                    if id.startswith(name) and finished(path := index.root / folder):
                        found.setdefault(id, path)
        if len(found) != 1:
            how = "`cram-bench runs` lists them"
            raise RunError(f"{len(found)} finished runs in {self.root} are called {name!r}; {how}")
        return Run.open(next(iter(found.values())))

    def finished(self, id: str) -> Run:
        """Return the finished run of this whole id, from this store's folders and no other.

        Raises:
            RunError: there is none.
        """
        for root in (self.root, *self.also):
            if finished(root / id):
                return Run.open(root / id)
        for root in (self.root, *self.also):
            if lacks_weights(root / id):
                raise RunError(f"{root / id} has lost its model.safetensors; {_REMEDY}")
        raise RunError(f"no finished run in {self.root} is called {id!r}; `cram-bench runs` lists them")

    def runs(self) -> list[Run]:
        """Return all finished runs, ordered by their settings; warn about folders that are none or damaged."""
        from cram_bench.experiment import Experiment

        listed = []
        for index, name, row in self._rows():
            try:
                listed.append(Run(index.root / name, Experiment.of(row["settings"])))
            except (ValueError, TypeError) as error:  # remembered of a version that allowed them
                warnings.warn(f"left out: the settings in {index.root / name} cannot be used: {error}", stacklevel=2)
        return listed

    def table(self) -> pd.DataFrame:
        """List finished, failed and unfinished runs, a row each.

        Columns: run (the id), dataset, model, method, seed, epochs, state (``finished``, ``failed``, ``training``,
        ``stopped``: the process that trains it was, ``interrupted``), epoch (the last), accuracy (on the test set, a
        fraction), holder (the process that trains it).
        """
        rows = []
        for _, _, row in self._rows():
            epoch, accuracy = int(row["last"]["epoch"]), row["last"]["test_accuracy"]
            rows.append(_row(row["id"], row["settings"], "finished", epoch=epoch, accuracy=accuracy))
        names = Index(self.root / ".training").folders()
        begun = [
            f".training/{name}" for name in names if not finished(self.root / name)
        ]  # else killed before it was tidied
        # A folder without settings has just begun.
        for name, known in Index(self.root).rows(begun, _begun, needs="settings.json").items():
            path = self.root / name
            if isinstance(known, Exception):
                warnings.warn(f"left out: {path / 'settings.json'} cannot be used: {known}", stacklevel=2)
                continue
            id, settings = known["id"], known["settings"]
            if os.path.lexists(path / "failed.json"):
                row = _row(id, settings, "failed")
            elif at := self.holder(path.name):
                row = _row(id, settings, "stopped" if at.stopped else "training", holder=str(at))
            else:
                row = _row(id, settings, "interrupted")
            rows.append(row)
        columns = ["run", *_KEPT, "state", "epoch", "accuracy", "holder"]
        return pd.DataFrame(rows, columns=columns)

    def failure(self, experiment: Experiment) -> str | None:
        """Return why `experiment` failed, if it did."""
        file = self.root / ".training" / experiment.id / "failed.json"
        try:
            return str(parsed(untrusted.contents(file, untrusted.NOTE))["reason"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} is damaged; delete {file.parent} to train again") from error

    @contextlib.contextmanager
    def lock(self, experiment: Experiment, wait: float | None = None) -> Iterator[Lock]:
        """Hold the run of `experiment` alone; wait while another living process holds it, and say which.

        Args:
            experiment: whose run.
            wait: seconds to wait at most; by default without a limit.

        Raises:
            RunError: another process held it for longer.
            OSError: the store cannot be written, or cannot be locked.
        """
        path = self._lock(experiment.id)

        def waiting(by: Holder) -> None:
            print(f"waiting for the process that trains {experiment.id}: {by}", file=sys.stderr)

        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(locked(path, wait, waiting))
            except HeldError as error:
                raise RunError(
                    f"{experiment.id} is being trained by {error.holder}; waited {wait:g} s for it"
                ) from None
            except OSError as error:
                how = "set CRAM_BENCH_RUNS to a folder of your own"
                raise type(error)(
                    error.errno, f"the run store cannot be written: {error.strerror}; {how}", str(path)
                ) from error
            yield lock

    def tidy(self, experiment: Experiment) -> None:
        """Remove what is left of a training that was killed just after its run was finished in this store."""
        work = self.root / ".training" / experiment.id
        if work.is_dir() and finished(self.root / experiment.id):
            with contextlib.suppress(OSError), locked(self._lock(experiment.id), wait=0):  # nobody is at it
                shutil.rmtree(work, ignore_errors=True)

    def holder(self, id: str) -> Holder | None:
        """Return the process that trains the run of this id, or None where none does."""
        try:
            return holder(self._lock(id))
        except OSError:  # a lock that nobody can take
            return None

    def _lock(self, id: str) -> Path:
        return self.root / ".locks" / f"{id}.lock"

    def _indices(self) -> list[Index]:
        """Return what looks into this store's folders; those that are only read get no index."""
        return [Index(self.root), *(Index(root, keep=False) for root in self.also)]

    def _rows(self) -> list[tuple[Index, str, Row]]:
        """Return index, folder and row of all finished runs, one an id, ordered by settings; warn of the rest."""
        found: dict[str, tuple[Index, str, Row]] = {}
        for index in reversed(self._indices()):
            for name in foreign(index.root):
                what = "holds a model, and a run's folder is called by its id, twelve hexadecimal digits"
                warnings.warn(f"left out: {index.root / name} {what}", stacklevel=4)
            folders = index.folders()
            known = index.rows(folders, _described)
            for name in folders:
                if name not in known and lacks_weights(index.root / name):
                    what = f"has lost its model.safetensors; {_REMEDY}"
                    warnings.warn(f"left out: {index.root / name} {what}", stacklevel=4)
            for name, row in known.items():
                if isinstance(row, Exception):  # one bad folder must not hide all others
                    warnings.warn(f"left out: {row}", stacklevel=4)
                else:
                    found[name] = index, name, row
        return sorted(
            found.values(), key=lambda each: [repr(value) for _, value in sorted(each[2]["settings"].items())]
        )


def rows(runs: Iterable[Run], store: Store | None = None) -> dict[Path, Row | Exception]:
    """Return what tables say of finished runs, or why a run cannot be read, by the run's folder."""
    by_root: dict[Path, list[str]] = {}
    for run in runs:
        by_root.setdefault(run.path.parent, []).append(run.path.name)
    found: dict[Path, Row | Exception] = {}
    for root, names in by_root.items():
        index = Index(root, keep=store is not None and root == store.root)
        found |= {root / name: row for name, row in index.rows(names, _described).items()}
    return found


def finished(path: Path) -> bool:
    """Tell whether a folder holds a model, which a finished run does; False where it cannot be looked into."""
    return os.path.isfile(os.path.join(path, "model.safetensors"))


def lacks_weights(path: Path) -> bool:
    """Tell whether a folder is a run's whose weights are not there any more: a run gets its name when it has them."""
    return is_id(path.name) and os.path.isdir(path) and not finished(path)


def foreign(root: Path) -> list[str]:
    """Return the names of folders that hold a model and are not named as runs are, such as copies."""
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and not is_id(entry.name)]
        return sorted(name for name in names if finished(root / name))
    return []


def _described(path: Path) -> Row:
    """Return what tables say of a finished run: its id and settings, the last epoch, and its environment in short.

    Raises:
        RunError: it cannot be read.
    """
    environment = _environment(path)
    experiment = _experiment(path, environment)
    try:
        last = _history(path, environment).iloc[-1]
        numbers = {name: float(last[name]) for name in ("epoch", "test_accuracy", "test_loss") if name in last}
        int(numbers["epoch"]), numbers["test_accuracy"]
    except (KeyError, TypeError, OverflowError) as error:
        raise RunError(f"history.csv in {path} cannot be used: {error!r}") from error
    kept = {name: environment.get(name) for name in _ENVIRONMENT}
    return {"id": experiment.id, "settings": experiment.settings(), "last": numbers, "environment": kept}


def _begun(path: Path) -> Row:
    """Return id and settings of a run that has begun and is not finished.

    Raises:
        ValueError: they cannot be used.
    """
    from cram_bench.experiment import Experiment

    try:
        experiment = Experiment.of(parsed(untrusted.contents(path / "settings.json", untrusted.NOTE)))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(one_line(error)) from error
    return {"id": experiment.id, "settings": experiment.settings()}


def _environment(path: Path) -> dict[str, Any]:
    """Read environment.json, which vouches for itself and for the other files."""
    try:
        content = unsealed(
            untrusted.contents(path / "environment.json", untrusted.NOTE).decode("utf-8"), "environment.json"
        )
        needed = [content["sha256"][name] for name in FILES]
        needed += [content["data"][name] for name in ("num_classes", "channels", "image_size")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise RunError(f"{path / 'environment.json'} is damaged: {reason}; delete {path} to train it again") from error
    if content.get("format", 1) != FORMAT:
        raise RunError(
            f"{path} has format {content['format']}, of another version of cram_bench; this one reads {FORMAT}"
        )
    return content


def _experiment(path: Path, environment: dict[str, Any]) -> Experiment:
    from cram_bench.experiment import Experiment

    settings = _read(path, "settings.json", environment)
    try:
        return Experiment.of(parsed(settings))
    except (ValueError, TypeError) as error:
        raise RunError(f"the settings in {path} cannot be used: {error}") from error


def _history(path: Path, environment: dict[str, Any]) -> pd.DataFrame:
    content = _read(path, "history.csv", environment)
    try:
        history = pd.read_csv(io.BytesIO(content))
        if history.empty or "epoch" not in history:
            raise ValueError("it has no epoch")
    except ValueError as error:
        raise RunError(f"history.csv in {path} cannot be used: {error}") from error
    return history


def _read(path: Path, name: str, environment: dict[str, Any]) -> bytes:
    """Return the content of a file of a run, compared with its checksum."""
    expected, file = environment["sha256"][name], path / name
    try:
        if name.endswith(".csv"):
            content = untrusted.table(file).getvalue()
        elif name.endswith(".json"):
            content = untrusted.contents(file, untrusted.NOTE)
        else:
            untrusted.tensors(file)
            content = untrusted.contents(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {one_line(error)}; delete {path} to train it again") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise RunError(f"{file} is damaged: its checksum does not match; delete {path} to train it again")
    return content


def summary(runs: Sequence[Run]) -> pd.DataFrame:
    """Say what stands behind a comparison: a row per run with its settings, state, result, device and commit.

    Raises:
        RunError: a finished run cannot be read.
    """
    known, listed = rows(run for run in runs if run.failure is None), []
    for run in runs:
        row: dict[str, Any] = {"run": run.id} | {n: getattr(run.experiment, n) for n in ("method", "seed", "epochs")}
        if run.failure is None:
            if isinstance(said := known[run.path], Exception):
                raise said
            row |= {"state": "finished", "dense_accuracy": said["last"]["test_accuracy"]} | said["environment"]
        else:
            row |= {"state": f"failed: {run.failure}"}
        listed.append(row)
    return pd.DataFrame(listed)


def describe(experiment: Experiment) -> str:
    """Return ``method, seed s`` as figures and progress bars call a run."""
    from cram_bench.recipes import label

    return f"{label(experiment.method)}, seed {experiment.seed}"


def _row(id: str, settings: Mapping[str, Any], state: str, **more: Any) -> dict[str, Any]:
    return {"run": id} | {name: settings[name] for name in _KEPT} | {"state": state} | more
