"""A file or a mapping → the experiments of a sweep."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cram_bench import _yaml, data
from cram_bench.executors import SweepError
from cram_bench.experiment import Experiment, names
from cram_bench.models import unknown
from cram_bench.recipes import recipe

LIMIT = 10_000
"""Experiments a sweep may have: a slip of the pen in a grid is noticed before it fills the memory."""

_LISTS = {"methods": "method", "seeds": "seed"}


def read(path: str | os.PathLike[str]) -> list[Experiment]:
    """Return the experiments of a YAML file, as `experiments` does.

    Raises:
        SweepError: the file is no YAML, or an experiment in it is not allowed; the message names the file.
        OSError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_yaml.MOST + 1)  # whatever is there: it may have no end
        return experiments(_yaml.load(content.decode("utf-8")))
    except (ValueError, TypeError) as error:
        raise SweepError(f"{path}: {error}") from error


def experiments(spec: Any) -> list[Experiment]:
    """Return the experiments that a mapping describes, each once; a repeated one is warned about.

    Args:
        spec: settings of `Experiment` that all share, and either ``experiments``, a list of mappings with the settings
            of each, or any of ``methods`` (names), ``seeds`` (a number n for 0 … n − 1, or a list) and ``grid``
            (setting → values), of which every combination is taken: methods outermost, seeds innermost. What is not
            given is as in `recipe`.

    Raises:
        ValueError: a name is unknown (with a suggestion), a value not allowed, or there are none or too many
            experiments.
        TypeError: a setting has another type than its field.

    >>> [e.optimizer.lr for e in experiments({"methods": ["sgd"], "grid": {"lr": [0.1, 0.2]}})]
    [0.1, 0.2]
    """
    if not isinstance(spec, Mapping):
        raise SweepError(f"a sweep is a mapping such as 'methods: [sgd, cram+]', not {_short(spec)}")
    settings = names(bare=True)
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
    images = data.training_size(experiment.data.dataset)
    if images and experiment.data.holdout >= images:
        raise SweepError(f"holdout must be below the {images} training images, not {experiment.data.holdout}")
    if images and experiment.batch_size > images - experiment.data.holdout:
        left = images - experiment.data.holdout
        raise SweepError(f"batch_size {experiment.batch_size} is larger than the training data, {left} images")
    return experiment


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
