"""What `cram-bench explore` opens: runs of the store, or a network with the weights of a file or of its library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cram_bench import data as datasets
from cram_bench import models
from cram_bench.data import Dataset
from cram_bench.runs import Store
from cram_bench.widgets.panel import Explorer
from cram_bench.widgets.start import Start


def opened(
    runs: Sequence[str] = (),
    data: str = "",
    model: str = "",
    weights: str = "",
    rename: Mapping[str, str] | None = None,
    crop: int = 0,
    sample: int = 1000,
    calibration: int | None = None,
    store: str = "",
) -> Explorer | Start:
    """Return the panel over what is named; where nothing is, a page on which to choose it.

    Args:
        runs: folders of finished runs, or beginnings of their ids.
        data: of a model: a data set or an image folder. Of runs, it must be theirs, and may be left out.
        model: a network by name; without `weights`, with its library's own: ``torchvision:NAME``,
            ``timm:NAME`` or ``hub:NAME``.
        weights: a file of weights for it, as `cram_bench.models.load_` takes it.
        rename: as `cram_bench.models.load_` takes it.
        crop: as `cram_bench.data.load` takes it.
        sample: examples to evaluate on.
        calibration: of runs, training examples that BatchNorm is tuned on.
        store: folder of the runs; empty for the usual one.

    Raises:
        ValueError: what is named does not go together, or cannot be had.
    """
    if runs:
        if model or weights:
            raise ValueError("give runs, or a model with its data, not both")
        found = [Store(store or None).open(name) for name in runs]
        if data and (other := [run for run in found if run.experiment.data.dataset != data]):
            raise ValueError(f"the run {other[0].id} is on {other[0].experiment.data.dataset!r}, not on {data!r}")
        return Explorer(found, calibration=calibration, sample=sample)
    if not model and not weights:
        return Start(data, store, sample, calibration)
    train, test, network = of_model(model, data, weights, rename or {}, crop)
    return Explorer({model: network}, test, train, sample)


def of_model(
    model: str, data: str, weights: str = "", rename: Mapping[str, str] | None = None, crop: int = 0
) -> tuple[Dataset, Dataset, nn.Module]:
    """Return (train, test, network) of a network by name, with weights of a file or of its library.

    Raises:
        ValueError: something is missing or does not fit; the message says what to give.
    """
    if not model:
        raise ValueError("a file of weights needs --model, the network that it belongs to, such as resnet20")
    if not data:
        raise ValueError("a model needs --data, a data set or an image folder to evaluate it on, such as cifar10")
    if not weights:
        if ":" not in model:
            models.check(model)
        network = models.pretrained(model)
        train, test = datasets.load(data, crop=crop)
        return train, test, fitted(network, model, train)
    if model.startswith("hub:"):
        raise ValueError("hub:NAME brings its own weights: leave --weights out")
    models.check(model)
    train, test = datasets.load(data, crop=crop, model=model)
    network = models.create(model, train.num_classes, train.channels, train.image_size)
    models.load_(network, weights, rename, kind=model)
    return train, test, network


def fitted(network: nn.Module, name: str, train: Dataset) -> nn.Module:
    """Return a network that takes these data and answers their classes.

    Raises:
        ValueError: it does not; the message says why.
    """
    import torch

    from cram_bench.checks import one_line
    from cram_bench.outputs import classes_of, logits_of

    try:
        with torch.no_grad():
            logits: Any = classes_of(logits_of(network.eval()(train.trial)))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{name} does not take {train.form} of {train.name}: {one_line(error)}") from error
    if logits.shape[1] != train.num_classes:
        raise ValueError(
            f"{name} answers {logits.shape[1]} classes, and {train.name} has {train.num_classes}: give --weights FILE "
            "of a network that was trained on these data"
        )
    return network
