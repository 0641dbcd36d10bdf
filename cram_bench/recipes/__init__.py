"""Experiments that somebody describes: a file a paper, with its methods, constants and labels; and sets of them."""

from cram_bench.recipes.comparisons import (
    ablations,
    aim,
    anatomy,
    equal_cost,
    language,
    preconditioners,
    prices,
    speed,
    transfer,
)
from cram_bench.recipes.defaults import PROFILES, grid, profile_changes, recipe, settings
from cram_bench.recipes.imagenet import RECIPES, imagenet_resnet50, named
from cram_bench.recipes.method import Method
from cram_bench.recipes.methods import METHODS, known, label

__all__ = [
    "METHODS",
    "PROFILES",
    "RECIPES",
    "Method",
    "ablations",
    "aim",
    "anatomy",
    "equal_cost",
    "grid",
    "imagenet_resnet50",
    "known",
    "label",
    "language",
    "named",
    "preconditioners",
    "prices",
    "profile_changes",
    "recipe",
    "settings",
    "speed",
    "transfer",
]
