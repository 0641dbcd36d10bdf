"""Experiments → runs: train what the store lacks, go on with what was interrupted."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import hashlib
import io
import json
import pickle
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cram_bench import models
from cram_bench._defaults import usual_defaults
from cram_bench.checks import instance, number, one_line
from cram_bench.compress import Masks, apply_
from cram_bench.data import Dataset, fingerprint
from cram_bench.deploy import composed, shrink, swap_
from cram_bench.deploy.structure import described
from cram_bench.distributed import Group
from cram_bench.experiment import Experiment
from cram_bench.files import Lock, sealed, sha256, write, write_tensors
from cram_bench.losses import Loss
from cram_bench.optim import HeldMasks
from cram_bench.optim.cram import CompressingStep
from cram_bench.outputs import fitting, logits_of
from cram_bench.preserve import modes_kept, preserved
from cram_bench.progress import Progress
from cram_bench.runs import environment, publishing
from cram_bench.runs.how import Machine
from cram_bench.runs.store import FILES, FORMAT, STRUCTURE, Run, RunError, Store, describe, lacks_weights
from cram_bench.runs.teachers import taught
from cram_bench.train import Callback, DivergedError, Fit, check_trainable, fit


def ensure(
    experiment: Experiment,
    store: Store | None = None,
    *,
    progress: bool = True,
    group: Group | None = None,
    wait: float | None = None,
    **machine: Any,
) -> Run:
    """Return the finished run of `experiment`; train it, or go on training it, if there is none.

    Args:
        experiment: what to train.
        store: where; by default ``Store()``.
        progress: show a bar, or lines where there is no terminal.
        group: processes that train it together, as `cram_bench.distributed.joined` gives them. All call this alike and
            get the run; the first writes it, in a folder that all must see.
        wait: seconds to wait at most for another process that trains this run; by default without a limit.
        machine: device, threads, compile, workers and sparse, as `Machine` has them.

    Raises:
        DivergedError: the training's loss is not finite, now or when it was tried before.
        DataError: the data set is missing or malformed.
        RunError: the store holds something else under this name, the images of a folder have changed since, or another
            process trains it for longer than `wait`.
        ValueError: the device is not here, there is no thread, or the data do not fit the settings.
        TypeError: an argument has another type.
    """
    instance("experiment", experiment, Experiment, "an Experiment, such as cram_bench.recipes.recipe returns")
    instance("store", store, (Store, type(None)), "a Store")
    how = Machine(**machine)
    if wait is not None:
        number("wait", wait, 0)
    store = store or Store()
    group = group or Group()

    def finished() -> str | None:
        if (run := store.find(experiment)) is None:
            return None
        store.tidy(experiment)
        return str(run.path)

    if path := group.broadcast(finished):
        return _same_data(Run.open(path))
    with store.lock(experiment, wait) if group.first else contextlib.nullcontext() as lock:
        if path := group.broadcast(finished):  # another process finished it while this one waited
            return _same_data(Run.open(path))
        if reason := group.broadcast(lambda: store.failure(experiment)):
            again = f"delete {store.root / '.training' / experiment.id} to try again"
            raise DivergedError(f"{describe(experiment)} failed before: {reason}; {again}")
        with usual_defaults():
            return _train(experiment, store, how.joined(group), progress, group, lock)


_looked = contextvars.ContextVar[dict[str, str | None] | None]("fingerprints of one call of ensure_all", default=None)


def _same_data(run: Run) -> Run:
    """Return the run, unless it was trained on other images than its folder holds now."""
    known, dataset = _looked.get(), run.experiment.data.dataset
    now = known[dataset] if known and dataset in known else fingerprint(dataset)
    if known is not None:
        known[dataset] = now
    then = run.environment["data"].get("fingerprint")
    if now and then and now != then:
        where = f"the images in {run.experiment.data.dataset} have changed since {run.path} was trained"
        raise RunError(f"{where}; move that run away to train again")
    return run


def ensure_all(experiments: Sequence[Experiment], store: Store | None = None, **options: Any) -> list[Run]:
    """Return a run for every experiment, in order; one that diverges is returned with its `failure`, not dropped.

    An image folder is looked at once for all that is found trained, and again after each training.
    """
    instance("experiments", experiments, (list, tuple), "a list of experiments")
    store = store or Store()
    runs, before = [], _looked.set({})
    try:
        for experiment in experiments:
            try:
                runs.append(ensure(experiment, store, **options))
            except DivergedError as error:
                runs.append(Run(store.root / ".training" / experiment.id, experiment, failure=str(error)))
    finally:
        _looked.reset(before)
    return runs


def _train(experiment: Experiment, store: Store, how: Machine, progress: bool, group: Group, lock: Lock | None) -> Run:
    if (known := _looked.get()) is not None:
        known.clear()  # what is trained now takes time
    begun = _begin(experiment, store, how, group)
    if group.first:
        begun.how.warn_of(experiment)
    work = _work_folder(experiment, store, begun.images, begun.structure, group)
    started, here = (
        time.time(),
        environment.machine(begun.how.place),
    )  # before the first step: code may be changed later
    callbacks: list[Callback] = [
        Checkpoint(work / "checkpoint.pt", write=group.first),
        *experiment.step.callbacks(begun.train),
        *experiment.pruning.callbacks(begun.train),
        *([Progress(describe(experiment))] if progress and group.first else []),
    ]
    try:
        with begun.how.limits() as threads:
            history = fit(
                begun.model,
                begun.optimizer,
                begun.train,
                begun.test,
                epochs=experiment.epochs,
                batch_size=experiment.batch_size,
                seed=experiment.seed,
                loss=begun.loss,
                schedule=experiment.schedule,
                augment=experiment.data.augment,
                halves=experiment.step.halved,
                test_every=_test_every(begun, experiment),
                precision=experiment.precision,
                compile=bool(begun.how.compile),
                callbacks=callbacks,
                group=group,
            )
    except DivergedError as error:
        reason = json.dumps({"reason": str(error)})
        group.broadcast(lambda: write(work / "failed.json", reason))
        raise
    model = begun.model.module if isinstance(begun.model, DistributedDataParallel) else begun.model
    if changed := [name for name, value in _volatile(model).items() if not torch.equal(value, begun.volatile[name])]:
        what = f"training changed {changed[0]!r}, a buffer that {experiment.model} does not save"
        warnings.warn(f"{what}; the run, when loaded, has it as it was before", stacklevel=3)
    final = store.root / experiment.id
    if lock is None:  # not the first of the group
        group.wait()  # until the first process has written it
        return Run.open(final)
    description = {
        "format": FORMAT,
        **here,
        **group.describe(),
        "threads": threads,
        "compile": begun.how.compile,
        **({"sparse": True} if begun.how.sparse else {}),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(sum(row["seconds"] for row in history), 1),
        "data": _shape(begun.train, begun.test) | {"fingerprint": begun.images},
    }
    publishing.publish(_staged(work, experiment, history, model, begun.structure, description), final, lock)
    store.tidy(experiment)
    group.wait()
    return Run(final, experiment)


def _test_every(begun: _Begun, experiment: Experiment) -> int:
    """Return after how many epochs to test: a test, a forward pass, must not take longer than the epoch before it."""
    if len(begun.test) > 3 * len(begun.train):
        return experiment.epochs
    return 5 if begun.how.compile else 1  # a tenth of a long epoch goes to the test set otherwise


@dataclass
class _Begun:
    """A training that is ready for its first step."""

    how: Machine
    images: str | None
    """Fingerprint of the images of a folder."""
    train: Dataset
    test: Dataset
    model: nn.Module
    optimizer: Optimizer
    loss: Loss
    volatile: dict[str, Tensor]
    structure: dict[str, list[int]] | None
    """Which units stay in a network that is smaller than its name says."""


def _begin(experiment: Experiment, store: Store, how: Machine, group: Group) -> _Begun:
    """Load and build everything, and so find out what does not fit before anything is written."""
    group.check(experiment.batch_size, experiment.step.halved)
    images = group.broadcast(lambda: fingerprint(experiment.data.dataset))
    train, test = (part.to(how.place) for part in group.in_order(lambda: experiment.load_data(how.workers)))
    if experiment.batch_size > len(train):
        raise ValueError(
            f"batch_size {experiment.batch_size} is larger than the training data, {len(train)} {train.noun}"
        )
    model = experiment.build_model(train)
    check_trainable(model)
    model = model.to(how.place).to(memory_format=torch.channels_last)
    _try(model, experiment.model, train)
    volatile = {name: value.clone() for name, value in _volatile(model).items()}
    masks, structure = None, None
    if experiment.start:
        model, masks, structure = _inherit(model, experiment, store, group)
        model = model.to(how.place).to(memory_format=torch.channels_last)
        volatile = {name: value.clone() for name, value in _volatile(model).items()}
    loss = taught(experiment, store, train, how.place)
    if how.sparse and experiment.precision == "float32":
        with how.suited(experiment, train).limits():
            sample = next(train.batches(experiment.batch_size, channels_last=True))[0]
            _make_sparse(model, experiment, masks is not None, fitting(model)(sample))
    model = group.parallel(model, unused=models.is_encoder(experiment.model))
    optimizer = experiment.build_optimizer(model)
    if masks is not None:
        optimizer = HeldMasks(model, optimizer, masks)
    return _Begun(how.suited(experiment, train), images, train, test, model, optimizer, loss, volatile, structure)


def _make_sparse(model: nn.Module, experiment: Experiment, held: bool, sample: Any) -> None:
    """Let layers compute at nonzeros only: all passes of a model that holds masks, CrAM's pass at compressed weights.

    Of several compressors that decides which leaves most weights: what is faster with those is with fewer. A pass with
    more nonzeros, as the one at θ, a sparse layer computes densely.
    """
    step = experiment.step
    if held:
        swap_(model, sample)
    elif isinstance(step, CompressingStep) and step.sparse_gradients:
        left = [(_weights_left(model, each), each) for each in step.compressors]
        with preserved(model):
            apply_(model, max(left)[1])
            swap_(model, sample)


def _weights_left(model: nn.Module, compressor: str) -> int:
    return sum(int(mask.sum()) for mask in apply_(copy.deepcopy(model), compressor).values())


def _work_folder(
    experiment: Experiment, store: Store, images: str | None, structure: dict[str, list[int]] | None, group: Group
) -> Path:
    """Make the folder of an unfinished training; drop a checkpoint that is of other images."""
    work = store.root / ".training" / experiment.id
    if group.first:
        for root in (store.root, *store.also):
            if lacks_weights(path := root / experiment.id):
                warnings.warn(f"{path} has lost its model.safetensors and is trained again", stacklevel=4)
        work.mkdir(parents=True, exist_ok=True)
        note = work / "data.json"
        if note.exists() and note.read_bytes() != f"{json.dumps(images)}\n".encode():
            (work / "checkpoint.pt").unlink(missing_ok=True)
            warnings.warn(f"the images in {experiment.data.dataset} have changed, training starts anew", stacklevel=4)
        write(note, json.dumps(images) + "\n")
        if structure is not None:
            units, now = work / STRUCTURE, json.dumps(structure).encode()
            if units.exists() and units.read_bytes() != now and (work / "checkpoint.pt").exists():
                (work / "checkpoint.pt").unlink()
                warnings.warn("other units go on this machine than before, training starts anew", stacklevel=4)
            write(units, now)
        write(work / "settings.json", json.dumps(experiment.settings(), indent=2))
    group.wait()
    return work


def _staged(
    work: Path,
    experiment: Experiment,
    history: list[dict[str, float]],
    model: nn.Module,
    structure: dict[str, list[int]] | None,
    description: dict[str, Any],
) -> Path:
    """Write the files of a finished run beside its checkpoint, which goes when the run has its final name."""
    staged = publishing.staging(work)
    write(staged / "settings.json", json.dumps(experiment.settings(), indent=2))
    write(staged / "history.csv", pd.DataFrame(history).to_csv(index=False))
    write_tensors(staged / "model.safetensors", models.storable(model))
    files = list(FILES)
    if structure is not None:
        write(staged / STRUCTURE, described(model, structure))
        files.append(STRUCTURE)
    description["sha256"] = {name: sha256(staged / name) for name in files}
    write(staged / "environment.json", sealed(description, "environment.json"))
    return staged


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
            warnings.warn(f"{self.path} is damaged, training starts anew: {one_line(error)}", stacklevel=2)
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
        self.path.parent.mkdir(exist_ok=True)  # another process may have finished the same run, and tidied
        # a checkpoint is the file of torch and its SHA-256, which torch does not check
        write(self.path, file.getvalue() + hashlib.sha256(file.getvalue()).digest())


def _inherit(
    model: nn.Module, experiment: Experiment, store: Store, group: Group
) -> tuple[nn.Module, Masks | None, dict[str, list[int]] | None]:
    """Start from a finished run: pruned if asked, with a fresh head for other data.

    Returns:
        `model`, or what is left of it; the masks to hold; which units stay.
    """
    if (store.root / ".training" / experiment.start / "failed.json").exists():
        raise DivergedError(f"the run it starts from, {experiment.start}, failed")
    run = store.finished(experiment.start)
    source = run.load_model()

    def known() -> Dataset:
        return run.experiment.load_data()[0]  # what the source was trained on

    structure = run.structure
    masks = experiment.pruning.apply_(source, known)
    # by one process: which units go may turn on the last bit, and weights are sent to all when the model is shared
    if kept := group.broadcast(lambda: experiment.pruning.shrink_(source, known)):
        source = shrink(source, kept)
        structure = composed(structure or {}, kept)
    if structure is not None:
        model = shrink(model, structure)
    fresh = set(models.head(model)) if run.experiment.data.dataset != experiment.data.dataset else set()
    weights = {name: value for name, value in source.state_dict().items() if name not in fresh}
    own = model.state_dict()
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise RunError(f"{run.path} does not fit {experiment.model}: {name} is missing or has another shape")
    model.load_state_dict(own | weights)
    held = None if masks is None else Masks({name: mask for name, mask in masks.items() if name not in fresh})
    return model, held, structure


def _try(model: nn.Module, name: str, train: Dataset) -> None:
    """Refuse, before the first step, a network that could not train on these data, or not be saved afterwards."""
    model.load_state_dict(models.storable(model))
    try:
        with modes_kept(model), torch.no_grad():
            output = model.eval()(fitting(model)(train.trial))
    except Exception as error:  # whatever the network says
        raise ValueError(f"model {name!r} cannot take {train.form}: {one_line(error)}") from error
    logits = logits_of(output)
    if logits.ndim != 2 or logits.shape[1] < train.num_classes:
        wanted = f"logits of shape (n, {train.num_classes}), one a class"
        raise ValueError(f"model {name!r} must return {wanted}, and returns shape {tuple(logits.shape)}")


def _volatile(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are in no state."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _shape(train: Dataset, test: Dataset) -> dict[str, Any]:
    return {
        "num_classes": train.num_classes,
        "channels": train.channels,
        "image_size": train.image_size,
        "train": len(train),
        "test": len(test),
    }
