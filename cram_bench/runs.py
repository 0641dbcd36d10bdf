"""The run store: a run is a folder named by the hash of its settings.

    store/
      1f0c…/               a finished run: settings.json, history.csv, model.safetensors, environment.json
      .training/1f0c…/     one that trains, was interrupted or failed: settings.json, checkpoint.pt or failed.json
      .locks/1f0c….lock    held by the process that trains it; the system frees it when that process dies

A folder gets its final name by one rename when everything in it is written, so what has the name is whole. Its
environment.json holds the SHA-256 of all files, itself included, and every reading compares.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cram_bench import compress, models
from cram_bench._checks import instance, integer
from cram_bench._files import sealed, sha256, sync_folder, unsealed, write, write_tensors
from cram_bench.compress import Masks
from cram_bench.data import Dataset, fingerprint
from cram_bench.distributed import Group
from cram_bench.experiment import METHODS, Experiment
from cram_bench.optim import HeldMasks
from cram_bench.progress import Progress
from cram_bench.train import Callback, DivergedError, Fit, Ramp, fit

_FILES = ("settings.json", "history.csv", "model.safetensors")
_FORMAT = 1  # of a run's folder; raise it when an older version could misread a new one


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
        with torch.random.fork_rng():
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
                    if Experiment.of(json.loads((path / "settings.json").read_text())) == experiment:
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
        raise RunError(f"no finished run in {self.root} is called {id!r}; `cram-bench runs` lists them")

    def runs(self) -> list[Run]:
        """Return all finished runs, ordered by their settings."""
        found = {}
        for root in (*reversed(self.also), self.root):
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
                experiment = Experiment.of(json.loads((path / "settings.json").read_text()))
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
            return json.loads(file.read_text())["reason"] if file.exists() else None
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
            file = open(path, "w")  # noqa: SIM115
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
            with contextlib.suppress(OSError), open(self.root / ".locks" / f"{experiment.id}.lock", "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody is at it
                shutil.rmtree(work, ignore_errors=True)

    def _locked(self, experiment: Experiment) -> bool:
        path = self.root / ".locks" / f"{experiment.id}.lock"
        if not path.exists():
            return False
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _environment(path: Path) -> dict[str, Any]:
    """Read environment.json, which vouches for itself and for the other files."""
    try:
        content = unsealed((path / "environment.json").read_text(), "environment.json")
        needed = [content["sha256"][name] for name in _FILES]
        needed += [content["data"][name] for name in ("num_classes", "channels", "image_size")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else _reason(error)
        raise RunError(f"{path / 'environment.json'} is damaged: {reason}; delete {path} to train it again") from error
    if content.get("format", 1) != _FORMAT:
        raise RunError(
            f"{path} has format {content['format']}, of another version of cram_bench; this one reads {_FORMAT}"
        )
    return content


def _read(path: Path, name: str) -> bytes:
    """Return the content of a file of a run, compared with its checksum."""
    expected = _environment(path)["sha256"][name]
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise RunError(f"{path / name} cannot be read: {_reason(error)}; delete {path} to train it again") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise RunError(f"{path / name} is damaged: its checksum does not match; delete {path} to train it again")
    return content


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


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


def ensure(
    experiment: Experiment,
    store: Store | None = None,
    *,
    device: str | None = None,
    compile: bool | None = None,
    threads: int | None = None,
    progress: bool = True,
    workers: int | None = None,
    group: Group | None = None,
) -> Run:
    """Return the finished run of `experiment`; train it, or go on training it, if there is none.

    Args:
        experiment: what to train.
        store: where; by default ``Store()``.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.
        compile: use torch.compile; by default where the training is long enough to repay the minute it takes.
        threads: of torch on the CPU; by default one for tiny images, where more only wait for each other.
        progress: show a bar, or lines where there is no terminal.
        workers: processes that decode streamed images, by default a CPU each, and eight at most.
        group: processes that train it together, as `cram_bench.distributed.joined` gives them. All call this alike and
            get the run; the first writes it, in a folder that all must see.

    Raises:
        DivergedError: the training's loss is not finite, now or when it was tried before.
        DataError: the data set is missing or malformed.
        RunError: the store holds something else under this name, or the images of a folder have changed since.
        ValueError: the device is not here, there is no thread, or the data do not fit the settings.
        TypeError: an argument has another type.
    """
    instance("experiment", experiment, Experiment, "an Experiment, such as cram_bench.experiment.recipe returns")
    instance("store", store, (Store, type(None)), "a Store")
    device = _device(device)
    if threads is not None:
        integer("threads", threads, 1)
    store = store or Store()
    group = group or Group()

    def finished() -> str | None:
        if (run := store.find(experiment)) is None:
            return None
        store.tidy(experiment)
        return str(run.path)

    if path := group.told(finished):
        return _same_data(Run.open(path))
    with store.lock(experiment) if group.first else contextlib.nullcontext():
        if path := group.told(finished):  # another process finished it while this one waited
            return _same_data(Run.open(path))
        if reason := group.told(lambda: store.failure(experiment)):
            again = f"delete {store.root / '.training' / experiment.id} to try again"
            raise DivergedError(f"{describe(experiment)} failed before: {reason}; {again}")
        return _train(experiment, store, device, compile, threads, progress, workers, group)


def _same_data(run: Run) -> Run:
    """Return the run, unless it was trained on other images than its folder holds now."""
    now, then = fingerprint(run.experiment.dataset), run.environment["data"].get("fingerprint")
    if now and then and now != then:
        where = f"the images in {run.experiment.dataset} have changed since {run.path} was trained"
        raise RunError(f"{where}; move that run away to train again")
    return run


def ensure_all(experiments: Sequence[Experiment], store: Store | None = None, **options: Any) -> list[Run]:
    """Return a run for every experiment, in order; one that diverges is returned with its `failure`, not dropped."""
    instance("experiments", experiments, (list, tuple), "a list of experiments")
    store = store or Store()
    runs = []
    for experiment in experiments:
        try:
            runs.append(ensure(experiment, store, **options))
        except DivergedError as error:
            runs.append(Run(store.root / ".training" / experiment.id, experiment, failure=str(error)))
    return runs


def _train(
    experiment: Experiment,
    store: Store,
    device: str,
    compile: bool | None,
    threads: int | None,
    progress: bool,
    workers: int | None,
    group: Group,
) -> Run:
    group.check(experiment.batch_size, experiment.halves)
    if compile and group.world > 1:
        raise ValueError(f"compile is for one process, not for {group.world}; leave it out")
    images = group.told(lambda: fingerprint(experiment.dataset))
    device = group.device or device
    train, test = (part.to(device) for part in group.in_order(lambda: experiment.load_data(workers)))
    if experiment.batch_size > len(train):
        raise ValueError(f"batch_size {experiment.batch_size} is larger than the training data, {len(train)} images")
    if compile is None:
        compile = group.world == 1 and train.images.ndim == 4 and experiment.epochs * len(train) >= 200_000
    if threads is None and train.images.ndim == 4 and train.images[0].numel() <= 256:
        threads = 1
    # what does not fit is found out before anything is written
    model = experiment.build_model(train).to(device).to(memory_format=torch.channels_last)
    masks = _inherit(model, experiment, store) if experiment.start else None
    model = group.parallel(model, unused=models.is_encoder(experiment.model))
    optimizer = experiment.build_optimizer(model)
    if masks is not None:
        optimizer = HeldMasks(model, optimizer, masks)
    work = store.root / ".training" / experiment.id
    if group.first:
        work.mkdir(parents=True, exist_ok=True)
        note = work / "data.json"
        if note.exists() and note.read_bytes() != f"{json.dumps(images)}\n".encode():
            (work / "checkpoint.pt").unlink(missing_ok=True)
            warnings.warn(f"the images in {experiment.dataset} have changed, training starts anew", stacklevel=3)
        write(note, json.dumps(images) + "\n")
        write(work / "settings.json", json.dumps(experiment.settings(), indent=2))
    group.wait()
    started = time.time()
    callbacks: list[Callback] = [
        Checkpoint(work / "checkpoint.pt", write=group.first),
        *([Ramp()] if experiment.ramp else []),
        *([Progress(describe(experiment))] if progress and group.first else []),
    ]
    try:
        with _threads(threads):
            used = torch.get_num_threads()
            history = fit(
                model,
                optimizer,
                train,
                test,
                epochs=experiment.epochs,
                batch_size=experiment.batch_size,
                seed=experiment.seed,
                warmup_epochs=experiment.warmup_epochs,
                augment=experiment.augment,
                halves=experiment.halves,
                test_every=5 if compile else 1,  # a tenth of a long epoch goes to the test set otherwise
                precision=experiment.precision,
                compile=compile,
                callbacks=callbacks,
                group=group,
            )
    except DivergedError as error:
        reason = json.dumps({"reason": str(error)})
        group.told(lambda: write(work / "failed.json", reason))
        raise
    final = store.root / experiment.id
    if not group.first:
        group.wait()  # until the first process has written it
        return Run.open(final)
    staged = work / "finished"  # beside the checkpoint, which goes when the run has its final name
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    write(staged / "settings.json", json.dumps(experiment.settings(), indent=2))
    write(staged / "history.csv", pd.DataFrame(history).to_csv(index=False))
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in inner.state_dict().items()}
    write_tensors(staged / "model.safetensors", weights)
    description = {
        "format": _FORMAT,
        **machine(device),
        **group.describe(),
        "threads": used,
        "compile": compile,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(sum(row["seconds"] for row in history), 1),
        "data": _shape(train, test) | {"fingerprint": images},
        "sha256": {name: sha256(staged / name) for name in _FILES},
    }
    write(staged / "environment.json", sealed(description, "environment.json"))
    if final.exists():  # without weights, or find() would have taken it
        shutil.rmtree(final)
    os.rename(staged, final)
    sync_folder(store.root)
    shutil.rmtree(work, ignore_errors=True)
    group.wait()
    return Run(final, experiment)


class Checkpoint(Callback):
    """Write the state after every epoch, whole or not at all; load it when training starts again."""

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path = path
        self.write = write

    def on_start(self, fit: Fit) -> None:
        if not self.path.exists():
            return
        try:
            data = self.path.read_bytes()
            content, digest = data[:-32], data[-32:]
            if hashlib.sha256(content).digest() != digest:
                raise ValueError("its checksum does not match")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # runs nothing
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            warnings.warn(f"{self.path} is damaged, training starts anew: {_reason(error)}", stacklevel=2)
            return
        try:
            fit.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:  # `fit` may have half of it
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"{self.path} is of another training, delete it to start anew: {reason}") from error

    def on_epoch(self, fit: Fit) -> None:
        if not self.write:
            return
        file = io.BytesIO()
        torch.save(fit.state_dict(), file)
        # a checkpoint is the file of torch and its SHA-256, which torch does not check
        write(self.path, file.getvalue() + hashlib.sha256(file.getvalue()).digest())


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe what runs here: commit, versions, device, platform and command."""
    import torchvision

    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "device": f"{name}, {os.cpu_count()} cores" if device == "cpu" else name,
        "device_type": device.partition(":")[0],
        "platform": platform.platform(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def commit() -> str:
    """Return the commit of this package's checkout, ``+changes`` when its code differs, or ``unknown``."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed.strip() else "")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _inherit(model: nn.Module, experiment: Experiment, store: Store) -> Masks | None:
    """Start `model` from a finished run: pruned if asked, with a fresh head where the data are others. Return the masks."""
    if (store.root / ".training" / experiment.start / "failed.json").exists():
        raise DivergedError(f"the run it starts from, {experiment.start}, failed")
    run = store.finished(experiment.start)
    source = run.load_model()
    masks = compress.apply_(source, compress.parse(experiment.prune)) if experiment.prune else None
    fresh = set(models.head(model)) if run.experiment.dataset != experiment.dataset else set()
    weights = {name: value for name, value in source.state_dict().items() if name not in fresh}
    own = model.state_dict()
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise RunError(f"{run.path} does not fit {experiment.model}: {name} is missing or has another shape")
    model.load_state_dict(own | weights)
    return None if masks is None else Masks({name: mask for name, mask in masks.items() if name not in fresh})


def _device(name: str | None) -> str:
    """Return where to train: `name`, if it is here; by default a GPU if there is one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name is None:
        return allowed[min(1, gpus)]
    if name not in allowed:
        raise ValueError(f"device must be {' or '.join(allowed)}, which are here, not {name!r}")
    return name


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shape(train: Dataset, test: Dataset) -> dict[str, Any]:
    return {
        "num_classes": train.num_classes,
        "channels": train.channels,
        "image_size": train.image_size,
        "train": len(train),
        "test": len(test),
    }


def _row(experiment: Experiment, state: str, epoch: int | None, accuracy: Any) -> dict[str, Any]:
    keep = ("dataset", "model", "method", "seed", "epochs")
    settings = {name: getattr(experiment, name) for name in keep}
    return {"run": experiment.id, **settings, "state": state, "epoch": epoch, "accuracy": accuracy}
