"""Compression operators: which weights stay, with which values. Imports no other room of the house.

    masks = cb.compress.apply_(model, cb.compress.Magnitude(0.9))    # prunes in place
    cb.compress.tune_batchnorm(model, calibration_batches)
    masks.save("masks.safetensors")

A new operator is a new file with a subclass of `Compressor`, and a line in `parse`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from cram_bench.checks import instance, items, number, shown
from cram_bench.compress.base import Compressor
from cram_bench.compress.batchnorm import tune_batchnorm
from cram_bench.compress.magnitude import Magnitude
from cram_bench.compress.masks import Dense, Masks, listing
from cram_bench.compress.n_of_m import NM
from cram_bench.compress.names import lookup
from cram_bench.compress.quantize import PruneThenQuantize, Quantize, quantized
from cram_bench.compress.rank import NaNError
from cram_bench.compress.select import keep_largest, keep_n_of_m, zeros_for
from cram_bench.compress.size import stored_bytes
from cram_bench.compress.statistics import Statistics, correct_statistics, layer_statistics
from cram_bench.compress.weights import Weights, dense_of, prunable
from cram_bench.preserve import preserved

__all__ = [
    "NM",
    "Compressor",
    "Dense",
    "Magnitude",
    "Masks",
    "PruneThenQuantize",
    "Quantize",
    "Statistics",
    "Weights",
    "applied",
    "apply_",
    "check_leaves",
    "compressed",
    "correct_statistics",
    "dense_of",
    "grid",
    "keep_largest",
    "keep_n_of_m",
    "layer_statistics",
    "listing",
    "lookup",
    "parse",
    "prunable",
    "quantized",
    "sparsity",
    "stored_bytes",
    "tune_batchnorm",
    "zeros_for",
]


# the pruners of `cram_bench.prune`
_LOOKING = ("obd", "mfac", "obert", "obs", "cap", "greedy", "exactobs", "sparsegpt", "layerwise")


def parse(spec: str | Compressor) -> Compressor:
    """Read a compressor's specification: ``global@0.9``, ``uniform@0.5``, ``2:4``, ``int8``, ``global@0.9+int8``.

    ``global-reference@0.9``, ``uniform-reference@0.9`` and ``2:4-reference`` follow the rules of the authors' code
    (`Magnitude`, `NM`). A compressor is returned as it is.

    Raises:
        ValueError: it is none of these.
        TypeError: it is neither a text nor a compressor.

    >>> parse("uniform@0.5")
    Magnitude(sparsity=0.5, scope='uniform', reference=False)
    >>> str(parse("2:4"))
    '2:4'
    """
    if isinstance(spec, Compressor):
        return spec
    instance("a compressor", spec, str, "a text such as 'global@0.9' or a Compressor")
    if match := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})(-reference)?", spec):
        return NM(int(match[1]), int(match[2]), bool(match[3]))
    if match := re.fullmatch(r"(global|uniform)(-reference)?@([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)", spec):
        return Magnitude(float(match[3]), "uniform" if match[1] == "uniform" else "global", bool(match[2]))
    if match := re.fullmatch(r"int([0-9]{1,9})", spec):
        return Quantize(int(match[1]))
    if spec.count("+") == 1:
        prune, quantize = (parse(part) for part in spec.split("+"))
        if isinstance(quantize, Quantize) and not isinstance(prune, Quantize):
            return PruneThenQuantize(prune, quantize)
    if any(re.split(r"x[0-9]|[(@]", part, maxsplit=1)[0] in _LOOKING for part in spec[:500].split("+")):
        raise ValueError(
            f"{shown(spec)} looks at gradients or inputs, so it is no compressor, which needs the weights alone and is "
            f"drawn at every step of CrAM; cb.prune.apply_(model, {shown(spec)}, batches=...) prunes with it, and "
            "probes take it"
        )
    raise ValueError(f"unknown compressor {shown(spec)}: write global@0.9, uniform@0.9, 2:4, int8 or global@0.9+int8")


def check_leaves(compressor: Any) -> None:
    """Refuse a compressor, or the specification of a pruner, that leaves no weight: there is nothing to train then.

    >>> check_leaves(Magnitude(1.0))
    Traceback (most recent call last):
    ValueError: sparsity must be in [0, 1), and global@1 leaves no weight
    """
    if compressor.sparsity >= 1:
        raise ValueError(f"sparsity must be in [0, 1), and {compressor} leaves no weight")


def grid(patterns: Sequence[str], sparsities: Sequence[float]) -> list[Compressor]:
    """Return a compressor for every pattern and sparsity; once for n:m, whose sparsity is its own, and for ``int8``.

    Raises:
        ValueError: a list is empty, a pattern unknown or a sparsity outside [0, 1).
        TypeError: something is no list, no text or no number.

    >>> [str(c) for c in grid(["global", "global+int8", "2:4", "int8"], [0.5, 0.9])]
    ['global@0.5', 'global@0.9', 'global@0.5+int8', 'global@0.9+int8', '2:4', 'int8']
    """
    levels = [number("sparsity", level, 0, 1) for level in items("sparsities", sparsities, "numbers in [0, 1)")]
    for pattern in (patterns := items("patterns", patterns, "texts such as 'global' or '2:4'")):
        instance("a pattern", pattern, str, "a text such as 'global' or '2:4'")
    specs: list[str] = []
    for pattern in patterns:
        chooses, plus, bits = pattern.partition("+")
        alone = ":" in chooses or chooses.startswith("int")
        specs += [pattern] if alone else [f"{chooses}@{level!r}{plus}{bits}" for level in levels]
    found = [parse(spec) for spec in specs]
    for compressor in found:
        check_leaves(compressor)
    return found


def apply_(model: nn.Module, compressor: Compressor | str, exclude: Iterable[str] = ()) -> Masks:
    """Compress `model` in place, θ ← C(θ), and return the masks: which weights stayed, and which matrices are dense.

    Raises:
        ValueError: the specification cannot be read, nothing is prunable, or a prunable weight is NaN; the message
            names it, and nothing is changed.

    >>> import torch
    >>> model = nn.Linear(4, 1, bias=False)
    >>> apply_(model, Magnitude(0.75)).zeros
    3
    """
    compressor, weights = parse(compressor), prunable(model, exclude)
    for name, weight in weights.items():
        if bool(weight.isnan().any()):
            raise NaNError(f"cannot compress weights that are NaN, and {name} holds some")
    return compressor.apply_(weights)


def compressed(model: nn.Module, compressor: Compressor | str, exclude: Iterable[str] = ()) -> nn.Module:
    """Return a compressed copy; `model` stays as it is."""
    model = copy.deepcopy(model)
    apply_(model, compressor, exclude)
    return model


@contextmanager
def applied(model: nn.Module, compressor: Compressor | str, exclude: Iterable[str] = ()) -> Iterator[Masks]:
    """Compress `model` for the length of a block; then put it back bit for bit, also after an exception."""
    with preserved(model):
        yield apply_(model, compressor, exclude)


def sparsity(model: nn.Module, exclude: Iterable[str] = ()) -> float:
    """Return the fraction of exact zeros among the prunable weights of `model`, in [0, 1].

    ``prunable(model).dense`` names and counts the matrices that are not among them.
    """
    return Masks.of(prunable(model, exclude)).sparsity
