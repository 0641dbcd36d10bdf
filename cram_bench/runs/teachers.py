"""Who teaches in a distillation: a run of the store, a classifier of the hub, or a network and a file of weights."""

from __future__ import annotations

import re

import torch
from torch import nn

from cram_bench import models
from cram_bench._defaults import usual_defaults
from cram_bench.checks import one_line
from cram_bench.data import Dataset
from cram_bench.experiment import Experiment
from cram_bench.losses import Distil, Loss
from cram_bench.outputs import fitting, logits_of
from cram_bench.runs.store import Store
from cram_bench.train import DivergedError


def taught(experiment: Experiment, store: Store, train: Dataset, place: torch.device | str) -> Loss:
    """Return the loss of an experiment, with its teacher on `place` where it has one.

    Raises:
        DivergedError: the teacher's own training failed.
        RunError: the store has no such run, or more than one.
        ValueError: it is no teacher, has other classes, or does not take these data.
    """
    loss = experiment.loss
    if not (isinstance(loss, Distil) and loss.passes):
        return loss
    teacher = _teacher(loss.teacher, experiment, store, train)
    try:
        with torch.no_grad():
            logits = logits_of(teacher.to(place).eval()(fitting(teacher)(train.trial)))
    except Exception as error:  # whatever the network says
        raise ValueError(f"teacher {loss.teacher!r} cannot take {train.form}: {one_line(error)}") from error
    if logits.ndim != 2 or logits.shape[1] != train.num_classes:
        count = logits.shape[1] if logits.ndim == 2 else f"outputs of shape {tuple(logits.shape)}"
        raise ValueError(f"teacher {loss.teacher!r} must have the {train.num_classes} classes of the data, not {count}")
    return loss.taught(teacher.to(memory_format=torch.channels_last), experiment.precision)


def _teacher(name: str, experiment: Experiment, store: Store, train: Dataset) -> nn.Module:
    if re.fullmatch("[0-9a-f]{4,12}", name):
        if (store.root / ".training" / name / "failed.json").exists():
            raise DivergedError(f"its teacher, {name}, failed")
        run = store.open(name)
        if (theirs := run.experiment.data.dataset) != experiment.data.dataset:
            data = experiment.data.dataset
            raise ValueError(f"teacher {name!r} knows the classes of {theirs!r}: take one that was trained on {data!r}")
        if models.is_encoder(experiment.model):
            models.check_tokens(run.experiment.model, experiment.model)
        return run.load_model()
    if name.startswith("hub:"):
        return models.Classifier(name, experiment.model)
    kind, equals, file = name.partition("=")
    if not equals:
        raise ValueError(f"teacher must be the id of a run, hub:NAME or NAME=FILE, not {name!r}")
    with torch.random.fork_rng(), usual_defaults():
        model = models.create(kind, train.num_classes, train.channels, train.image_size)
    models.load_(model, file, kind=kind)
    return model
