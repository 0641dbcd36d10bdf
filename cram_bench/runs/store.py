"""Runs in their folders, and the store that finds them; the folders are described in `cram_bench.runs`."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from cram_bench import models
from cram_bench._checks import instance, said
from cram_bench._defaults import usual_defaults
from cram_bench._files import unsealed
from cram_bench.experiment import METHODS, Experiment

FILES = ("settings.json", "history.csv", "model.safetensors")
_REMEDY = "put that file back, or train it again"
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
        if not (path / "model.safetensors").is_file():
            raise RunError(f"{path} is not a finished run: it has no model.safetensors")
        settings = _read(path, "settings.json")
        try:
            return cls(path, Experiment.of(json.loads(settings)))
        except (ValueError, TypeError) as error:
            raise RunError(f"the settings in {path} cannot be used: {error}") from error

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
        content = _read(self.path, "history.csv")
        try:
            history = pd.read_csv(io.BytesIO(content))
            if history.empty or "epoch" not in history:
                raise ValueError("it has no epoch")
        except ValueError as error:
            raise RunError(f"history.csv in {self.path} cannot be used: {error}") from error
        return history

    def load_model(self) -> nn.Module:
        """Build the network and load its trained weights, in eval mode on the CPU.

        Raises:
            RunError: the weights do not match their checksum or the network.
        """
        content, shape = _read(self.path, "model.safetensors"), self.environment["data"]
        with torch.random.fork_rng(), usual_defaults():
            torch.manual_seed(self.experiment.seed)  # of what is drawn and not saved
            model = models.create(self.experiment.model, shape["num_classes"], shape["channels"], shape["image_size"])
        try:
            model.load_state_dict(load(content))
        except (SafetensorError, RuntimeError) as error:
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
        from cram_bench.data import cache_root

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
        roots = [root for root in (self.root, *self.also) if root.is_dir()]
        for root in roots:
            path = root / experiment.id
            if (path / "model.safetensors").is_file():
                run = Run.open(path)
                if run.experiment != experiment:
                    raise RunError(f"{path} holds other settings than its name says; move it away")
                return run
        for root in roots:  # a default that changed since gives the same settings another name
            for path in _folders(root):
                with contextlib.suppress(OSError, ValueError, TypeError):
                    if Experiment.of(json.loads((path / "settings.json").read_text(encoding="utf-8"))) == experiment:
                        return Run.open(path)
        return None

    def open(self, name: str | os.PathLike[str]) -> Run:
        """Return a finished run by its folder, its id, or the beginning of its id.

        Raises:
            RunError: no finished run, or more than one, is called so.
        """
        instance("a run", name, (str, os.PathLike), "a folder or the beginning of an id")
        if Path(name).is_dir():
            return Run.open(name)
        matches = [run for run in self.runs() if run.id.startswith(str(name))]
        if len(matches) != 1:
            raise RunError(
                f"{len(matches)} finished runs in {self.root} are called {str(name)!r}; `cram-bench runs` lists them"
            )
        return matches[0]

    def finished(self, id: str) -> Run:
        """Return the finished run of this whole id, from this store's folders and no other.

        Raises:
            RunError: there is none.
        """
        for root in (self.root, *self.also):
            if (root / id / "model.safetensors").is_file():
                return Run.open(root / id)
        for path in (path for root in (self.root, *self.also) for path in lost(root, id)):
            raise RunError(f"{path} has lost its model.safetensors; {_REMEDY}")
        raise RunError(f"no finished run in {self.root} is called {id!r}; `cram-bench runs` lists them")

    def runs(self) -> list[Run]:
        """Return all finished runs, ordered by their settings."""
        found = {}
        for root in (*reversed(self.also), self.root):
            for path in lost(root):
                warnings.warn(f"left out: {path} has lost its model.safetensors; {_REMEDY}", stacklevel=2)
            for path in _folders(root):
                try:
                    found[path.name] = Run.open(path)
                except RunError as error:  # one bad folder must not hide all others
                    warnings.warn(f"left out: {error}", stacklevel=2)
        return sorted(found.values(), key=lambda run: json.dumps(run.experiment.settings(), sort_keys=True))

    def table(self) -> pd.DataFrame:
        """List finished, failed and unfinished runs, a row each, with state, last epoch and test accuracy."""
        rows = []
        for run in self.runs():
            try:
                last = run.history.iloc[-1]
            except RunError as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
                continue
            rows.append(_row(run.experiment, "finished", int(last["epoch"]), last.get("test_accuracy")))
        for path in sorted((self.root / ".training").glob("*")):
            try:
                experiment = Experiment.of(json.loads((path / "settings.json").read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue
            if (self.root / path.name / "model.safetensors").is_file():  # finished, and killed before it was tidied
                continue
            state = (
                "failed"
                if (path / "failed.json").exists()
                else "training"
                if self._locked(experiment)
                else "interrupted"
            )
            rows.append(_row(experiment, state, None, None))
        return pd.DataFrame(
            rows, columns=["run", "dataset", "model", "method", "seed", "epochs", "state", "epoch", "accuracy"]
        )

    def failure(self, experiment: Experiment) -> str | None:
        """Return why `experiment` failed, if it did."""
        file = self.root / ".training" / experiment.id / "failed.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))["reason"] if file.exists() else None
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} is damaged; delete {file.parent} to train again") from error

    @contextlib.contextmanager
    def lock(self, experiment: Experiment) -> Iterator[None]:
        """Hold the run of `experiment` alone; wait while another living process holds it.

        Raises:
            OSError: the store cannot be written.
        """
        path = self.root / ".locks" / f"{experiment.id}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            how = "set CRAM_BENCH_RUNS to a folder of your own"
            raise type(error)(
                error.errno, f"the run store cannot be written: {error.strerror}; {how}", str(path)
            ) from error
        with file, _forgotten_by_children(file):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the process that trains {experiment.id}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def tidy(self, experiment: Experiment) -> None:
        """Remove what is left of a training that was killed just after its run was finished in this store."""
        work = self.root / ".training" / experiment.id
        if work.is_dir() and (self.root / experiment.id / "model.safetensors").is_file():
            with (
                contextlib.suppress(OSError),
                open(self.root / ".locks" / f"{experiment.id}.lock", "w", encoding="utf-8") as file,
            ):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody is at it
                shutil.rmtree(work, ignore_errors=True)

    def _locked(self, experiment: Experiment) -> bool:
        path = self.root / ".locks" / f"{experiment.id}.lock"
        if not path.exists():
            return False
        with open(path, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _environment(path: Path) -> dict[str, Any]:
    """Read environment.json, which vouches for itself and for the other files."""
    try:
        content = unsealed((path / "environment.json").read_text(encoding="utf-8"), "environment.json")
        needed = [content["sha256"][name] for name in FILES]
        needed += [content["data"][name] for name in ("num_classes", "channels", "image_size")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else said(error)
        raise RunError(f"{path / 'environment.json'} is damaged: {reason}; delete {path} to train it again") from error
    if content.get("format", 1) != FORMAT:
        raise RunError(
            f"{path} has format {content['format']}, of another version of cram_bench; this one reads {FORMAT}"
        )
    return content


def _read(path: Path, name: str) -> bytes:
    """Return the content of a file of a run, compared with its checksum."""
    expected = _environment(path)["sha256"][name]
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise RunError(f"{path / name} cannot be read: {said(error)}; delete {path} to train it again") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise RunError(f"{path / name} is damaged: its checksum does not match; delete {path} to train it again")
    return content


_held: set[Any] = set()  # lock files of this process
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


@contextlib.contextmanager
def _forgotten_by_children(file: Any) -> Iterator[None]:
    """Let forked workers close a lock file: one that outlives a killed training would go on holding the lock."""
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)


def _folders(root: Path) -> list[Path]:
    """Return the folders of finished runs in a store."""
    return [path for path in sorted(root.glob("[0-9a-f]*")) if (path / "model.safetensors").is_file()]


def lost(root: Path, id: str = "*") -> list[Path]:
    """Return the folders of runs whose weights are not there any more: a run gets its name when it has them."""
    named = [path for path in sorted(root.glob(id)) if re.fullmatch("[0-9a-f]{12}", path.name) and path.is_dir()]
    return [path for path in named if not (path / "model.safetensors").is_file()]


def summary(runs: Sequence[Run]) -> pd.DataFrame:
    """Say what stands behind a comparison: a row per run with its settings, state, result, device and commit."""
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": run.id} | {n: getattr(run.experiment, n) for n in ("method", "seed", "epochs")}
        if run.failure is None:
            environment = run.environment
            row |= {"state": "finished", "dense_accuracy": run.history["test_accuracy"].iloc[-1]}
            row |= {
                name: environment[name] for name in ("seconds", "device", "threads", "compile", "commit", "finished")
            }
        else:
            row |= {"state": f"failed: {run.failure}"}
        rows.append(row)
    return pd.DataFrame(rows)


def describe(experiment: Experiment) -> str:
    """Return ``method, seed s`` as figures and progress bars call a run."""
    return f"{METHODS[experiment.method].label}, seed {experiment.seed}"


def _row(experiment: Experiment, state: str, epoch: int | None, accuracy: Any) -> dict[str, Any]:
    keep = ("dataset", "model", "method", "seed", "epochs")
    settings = {name: getattr(experiment, name) for name in keep}
    return {"run": experiment.id, **settings, "state": state, "epoch": epoch, "accuracy": accuracy}
