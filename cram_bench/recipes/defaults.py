"""The experiment that suits a data set, with the constants of a method."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cram_bench import data
from cram_bench.checks import integer, items, unknown
from cram_bench.experiment import KINDS, Experiment, names
from cram_bench.recipes.methods import known
from cram_bench.settings import rows

_SUITS: dict[str, dict[str, Any]] = {
    "digits": {"model": "convnet", "epochs": 20, "augment": True},
    # 10 epochs as a default that two cores can carry; the paper trains 200
    "images": {"model": "resnet20", "epochs": 10, "precision": "bfloat16"},
    "sentences": {
        "model": "minilm", "epochs": 3, "batch_size": 32, "precision": "bfloat16", "optimizer": "adamw", "lr": 1e-4,
        "weight_decay": 0.01,
    },
}  # fmt: skip

PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {"digits": {"epochs": 20}, "images": {"epochs": 2}, "sentences": {"epochs": 1}},
    "full": {"digits": {"epochs": 60}, "images": {"epochs": 10}, "sentences": {"epochs": 3}},
}
"""Profile → settings for digits, sentences and all other data."""


def recipe(dataset: str, method: str = "sgd", **changes: Any) -> Experiment:
    """Return the experiment that suits a data set, with the constants of a method, and any setting changed by name.

    Args:
        dataset: a name or the path of an image folder. Where that holds few images, the batch is smaller than 128, and
            SGD's learning rate with it, in proportion (arXiv 1706.02677), unless `changes` has either; AdamW keeps its
            own, which did better so.
        method: one of `METHODS`.
        changes: settings of the experiment, by their flat names.

    Raises:
        ValueError: a name is unknown (with a suggestion), no part of the experiment has the setting, or a value is not
            allowed.
        TypeError: a value has another type than its setting.

    >>> recipe("cifar10", "cram+-multi", seed=1).step.compressors[:2]
    ('global@0.3', 'global@0.4')
    """
    how = known(method)
    dataset = data.Data(dataset).dataset  # refuses what is no name
    how.refuse(method, changes)
    kind = _kind(dataset)
    suits = _SUITS[kind]
    if how.constants.get("optimizer", suits.get("optimizer")) != suits.get("optimizer"):  # it has a rate of its own
        suits = {name: value for name, value in suits.items() if name not in ("optimizer", "lr", "weight_decay")}
    settings: dict[str, Any] = {**how.constants, **suits, **(how.sentences if kind == "sentences" else {})}
    if data.is_folder(dataset):
        dataset = str(Path(dataset).expanduser().resolve())
    if kind == "images" and "batch_size" not in changes:
        settings["batch_size"] = size = _batch_size(dataset)
        if size < 128 and changes.get("optimizer", settings.get("optimizer", "sgd")) == "sgd":
            settings["lr"] = settings.get("lr", 0.1) * size / 128
    whole = Experiment.of({"dataset": dataset, "method": method, **settings})
    if "warmup_epochs" not in changes and type(epochs := changes.get("epochs", whole.epochs)) is int and epochs > 0:
        changes = changes | {"warmup_epochs": min(epochs, 10**9) / 40}  # the paper's 5 of 200
    return whole.but(**changes)


def profile_changes(dataset: str, profile: str) -> dict[str, Any]:
    """Return the settings of a report's profile: ``quick`` is for a first look, ``full`` for numbers to quote.

    Raises:
        ValueError: the profile is unknown.
    """
    dataset = data.Data(dataset).dataset
    if not isinstance(profile, str):
        raise TypeError(f"profile must be of type str, not {profile!r}")
    if profile not in PROFILES:
        raise ValueError(unknown("profile", profile, list(PROFILES)))
    changes = dict(PROFILES[profile][_kind(dataset)])
    if images := data.is_folder(dataset) and data.training_size(dataset):
        changes["epochs"] = max(changes["epochs"], min(60, 10_000 // images))  # few images need more passes
    return changes


def grid(
    dataset: str,
    methods: Sequence[str],
    seeds: int | Sequence[int],
    model: str = "",
    epochs: int = 0,
    precision: str = "",
    **changes: Any,
) -> list[Experiment]:
    """Return one experiment per method and seed, methods outermost.

    Args:
        dataset: a name or the path of an image folder.
        methods: names in `METHODS`.
        seeds: a number n for the seeds 0 … n − 1, or the seeds themselves.
        model: empty for what suits the data set.
        epochs: 0 for what suits the data set.
        precision: ``float32`` or ``bfloat16``, empty for what suits the data set.
        changes: any other setting of the experiment.

    Raises:
        ValueError: a name is unknown, a value not allowed, or there is no method or no seed.
        TypeError: something is no list, or a value has another type than its setting.
    """
    asked = {"model": model, "epochs": epochs, "precision": precision}
    changes |= {name: value for name, value in asked.items() if value not in ("", 0) or value is False}
    listed = range(integer("seeds", seeds, 1, 10_000)) if isinstance(seeds, int) else items("seeds", seeds, "seeds")
    methods = items("methods", methods, "names such as 'sgd'")
    return [recipe(dataset, method, seed=seed, **changes) for method in methods for seed in listed]


def _kind(dataset: str) -> str:
    return "digits" if dataset == "digits" else "sentences" if dataset in data.SENTENCES else "images"


def _batch_size(dataset: str) -> int:
    """128 as in the paper, or for a small image folder the power of two that leaves eight steps an epoch."""
    images = data.training_size(dataset)
    return 128 if images == 0 else max(2, min(128, 2 ** int(math.log2(max(2, images / 8)))))


def settings(method: str = "", dataset: str = "digits") -> list[dict[str, str]]:
    """List what may be set for a method, or at all: a row each of setting, type, default of the recipe, meaning.

    Raises:
        ValueError: the method or the data set is unknown.
    """
    experiment = recipe(dataset, method or "sgd")
    parts = dict.fromkeys((Experiment, *map(type, experiment.parts)))
    if not method:
        parts |= dict.fromkeys(part for known in KINDS.values() for part in known.values())
    values = experiment.settings()
    found = {row["setting"]: row for part in reversed(parts) for row in rows(part, values)}
    for role, kinds in KINDS.items():
        if len(kinds) > 1:
            meaning = f"Which {role}: {', '.join(kinds)}."
            found[role] = {"setting": role, "type": "str", "default": values[role], "meaning": meaning}
    return [
        row | {"default": row["default"] or "''" if isinstance(row["default"], str) else json.dumps(row["default"])}
        for row in (found[name] for name in names() if name in found)
    ]
