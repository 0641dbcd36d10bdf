"""Which weights of a model are prunable: the model says so, or the rule of the paper does."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import nn

from cram_bench._checks import instance

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def prunable(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Name the weights that compression may zero, in the order of ``model.named_parameters()``.

    A model that has a method ``prunable()`` returning parameter names decides for itself. For every other model
    it is the rule of CrAM (arXiv 2207.14200, authors' code): the weight matrices and kernels (ndim > 1) of
    convolutions and linear layers, first convolution and classifier included; attention's packed input
    projections count as linear. Biases, normalisations, embeddings and tokens stay.

    Args:
        model: any torch model.
        exclude: shell patterns over parameter names, such as ``"conv1.*"`` or ``"*.shortcut.*"``, to leave dense.

    Returns:
        Parameter name → parameter.

    Raises:
        TypeError: `model` is no torch model, or `exclude` no list.
        ValueError: the model names a weight it does not have, a pattern matches nothing, or nothing is left.

    >>> list(prunable(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))))
    ['0.weight', '3.weight']
    """
    instance("model", model, nn.Module, "a torch model")
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list of patterns, not {exclude!r}")
    parameters = dict(model.named_parameters())
    if callable(declared := getattr(model, "prunable", None)):
        named = set(declared())
        if missing := sorted(named - parameters.keys()):
            raise ValueError(f"{type(model).__name__}.prunable() names {missing[0]!r}, which is not a parameter of it")
    else:
        named = set(_by_layer(model))
    for pattern in exclude:
        matched = {name for name in parameters if fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(
                f"exclude pattern {pattern!r} matches no parameter; names look like {next(iter(parameters))!r}"
            )
        named -= matched
    weights = {name: parameter for name, parameter in parameters.items() if name in named}
    if not weights:
        raise ValueError(f"{type(model).__name__} has no prunable weight: no convolution or linear layer is left")
    return weights


def _by_layer(model: nn.Module) -> Iterable[str]:
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, _LAYERS):
            yield f"{dot}weight"
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield f"{dot}in_proj_weight"
