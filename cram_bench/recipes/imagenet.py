"""Recipes for ImageNet, and the names by which the command line knows whole recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cram_bench.checks import unknown
from cram_bench.experiment import Experiment
from cram_bench.recipes.defaults import recipe
from cram_bench.recipes.methods import known


def imagenet_resnet50(dataset: str, method: str = "cram+-multi", **changes: Any) -> Experiment:
    """Return the ImageNet experiment of the CrAM paper (arXiv 2207.14200): ResNet-50, 100 epochs, batch 512.

    SGD at 0.2 with weight decay 1e-4, cosine after 5 % of warm-up; for the CrAM methods of the paper ρ = 0.05, and the
    sparsities 0.5, 0.7 and 0.9 for Multi. Images are streamed in random crops of 224 pixels. bfloat16, and whatever
    another method sets itself, is not the paper's.

    Args:
        dataset: the path of an image folder.
        method: one of `METHODS`.
        changes: settings of the experiment, each of which may be changed.

    Raises:
        ValueError: as `recipe`.

    >>> imagenet_resnet50("imagenet", compressors=["2:4", "4:8"], crop=160).optimizer.lr
    0.2
    """
    how = known(method)
    settings: dict[str, Any] = {
        "model": "torchvision:resnet50", "crop": 224, "epochs": 100, "batch_size": 512, "lr": 0.2, "weight_decay": 1e-4,
    }  # fmt: skip
    if how.constants.get("optimizer", "sgd") != "sgd":
        del settings["lr"], settings["weight_decay"]  # they are of SGD
    settings = {name: value for name, value in settings.items() if name not in how.constants}
    settings |= dict(how.imagenet) | changes
    if type(settings["epochs"]) is int and settings["epochs"] > 0:  # else it is refused below
        settings.setdefault("warmup_epochs", settings["epochs"] / 20)
    return recipe(dataset, method, **settings)


RECIPES: dict[str, Callable[..., Experiment]] = {"imagenet-resnet50": imagenet_resnet50}
"""Settings of a paper, by the name that the command line uses: each a function as `recipe` is."""


def named(name: str | None) -> Callable[..., Experiment]:
    """Return the recipe called `name`, or `recipe` for none.

    Raises:
        ValueError: there is none, with a suggestion.
    """
    if name and name not in RECIPES:
        raise ValueError(unknown("recipe", name, list(RECIPES)))
    return RECIPES[name] if name else recipe
