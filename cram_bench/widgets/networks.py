"""What is explored: networks with labels, what they are evaluated and tuned on, and how that is called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from cram_bench.checks import instance, integer
from cram_bench.data import AT_ONCE, Batches, Dataset, some
from cram_bench.recipes import METHODS
from cram_bench.runs import Run
from cram_bench.widgets.subject import Subject

TUNED_ON = 250
"""Examples that BatchNorm is tuned on, unless another number is given."""
LOOKED_AT = 1024
"""Training examples that are held for pruners that look."""


@dataclass(frozen=True)
class Networks:
    """Networks on the same data.

    Attributes:
        subjects: label → what makes its `Subject`.
        methods: label → method, which decides the look.
        sample: what all are evaluated on.
        looked_at: training data for pruners; None: there are none.
        what: what the examples of the sample are called.
        tuned_on: how many examples BatchNorm is tuned on, 0 for none.
        failed: lines about runs that failed.
    """

    subjects: Mapping[str, Callable[[], Subject]]
    methods: Mapping[str, str]
    sample: Dataset
    looked_at: Dataset | None
    what: str
    tuned_on: int
    failed: Sequence[str] = field(default=())


def of_runs(runs: Sequence[Run], sample: int, calibration: int) -> Networks:
    """Return the networks of finished runs; each is tuned on examples that are augmented as in its training.

    Raises:
        ValueError: there is no finished run, or they are of several data sets.
    """
    for run in runs:
        instance("a run", run, Run, "a Run, such as cram_bench.runs.ensure returns")
    finished = [run for run in runs if run.failure is None]
    if not finished:
        raise ValueError("the explorer needs at least one finished run")
    data = {(d.dataset, d.resize, d.holdout) for d in (run.experiment.data for run in finished)}
    if len(data) > 1:
        raise ValueError(f"the explorer compares runs on one data set, not on (name, resize, holdout) {sorted(data)}")
    train, test = finished[0].experiment.load_data()
    drawn = test.sample(sample)
    batches = {
        augment: train.calibration(calibration, augment=augment, batch_size=AT_ONCE)
        for augment in {run.experiment.data.augment for run in finished}
    }

    def subject(run: Run) -> Callable[[], Subject]:
        return lambda: Subject(run.load_model(), drawn, batches[run.experiment.data.augment], train)

    named = labelled(finished)
    return Networks(
        {label: subject(run) for label, run in named.items()},
        {label: run.experiment.method for label, run in named.items()},
        drawn,
        train,
        f"{'held-out training' if finished[0].experiment.data.holdout else 'test'} examples",
        calibration,
        [f"{run.label}: failed: {run.failure}" for run in runs if run.failure],
    )


def of_models(
    models: Mapping[str, nn.Module], data: Batches | None, calibration: Batches | int | None, sample: int
) -> Networks:
    """Return networks of any origin; copies are worked on.

    Args:
        models: label → classifier.
        data: what they are evaluated on.
        calibration: training data: for BatchNorm tuning 250 examples of it, more for pruners that look; without them
            neither is there.
        sample: examples of `data`.

    Raises:
        ValueError: there is no model or no data, or a model gives no logits for these.
        TypeError: something is of another kind.
    """
    if not models:
        raise ValueError("the explorer needs at least one model")
    for label, model in models.items():
        instance("a label", label, str, "a text")
        instance(f"the model {label!r}", model, nn.Module, "a torch model")
    if data is None:
        raise ValueError("models need data to be evaluated on: explorer({'mine': model}, data=test, calibration=train)")
    drawn = some(data, sample)
    train = None if calibration is None or isinstance(calibration, int) else calibration
    looked_at = None if train is None else some(train, LOOKED_AT, name="your training data")
    if isinstance(train, Dataset):
        batches = train.calibration(TUNED_ON, batch_size=AT_ONCE)
    else:
        batches = [] if looked_at is None else looked_at.calibration(TUNED_ON, augment=False, batch_size=AT_ONCE)

    def subject(model: nn.Module) -> Callable[[], Subject]:
        return lambda: Subject(copy.deepcopy(model), drawn, batches, looked_at)

    first = next(iter(models))
    ready = {first: subject(models[first])()}  # says at once what does not fit
    looks = [*METHODS]
    return Networks(
        {label: (lambda: ready[first]) if label == first else subject(model) for label, model in models.items()},
        {label: looks[place % len(looks)] for place, label in enumerate(models)},
        drawn,
        looked_at,
        "examples of your data" if drawn.name == "your data" else f"examples of {drawn.name}",
        sum(len(labels) for _, labels in batches),
    )


def labelled(runs: Sequence[Run]) -> dict[str, Run]:
    """Give every run a label of its own: method, seed and epochs, and where that is not enough model and id."""
    plain = [f"{run.label}, {run.experiment.epochs} epochs" for run in runs]
    return {
        label if plain.count(label) == 1 else f"{label}, {run.experiment.model}, {run.id}": run
        for label, run in zip(plain, runs, strict=True)
    }


def of(
    subjects: Sequence[Run] | Mapping[str, nn.Module],
    data: Batches | None,
    calibration: Batches | int | None,
    sample: int,
) -> Networks:
    """Return what is explored of finished runs, or of models and their data."""
    integer("sample", sample, 1)
    if isinstance(calibration, int):
        integer("calibration", calibration, 2)
    if isinstance(subjects, Mapping):
        return of_models(subjects, data, calibration, sample)
    instance("runs", subjects, (list, tuple), "a list of runs, or models by their label")
    if data is not None or not (calibration is None or isinstance(calibration, int)):
        raise ValueError("runs know their own data: leave data= out, and give calibration= as a number")
    return of_runs(subjects, sample, TUNED_ON if calibration is None else calibration)
