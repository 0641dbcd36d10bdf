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

from torch import nn

from cram_bench._preserve import preserved
from cram_bench.compress.base import Compressor
from cram_bench.compress.batchnorm import tune_batchnorm
from cram_bench.compress.magnitude import Magnitude
from cram_bench.compress.masks import Masks
from cram_bench.compress.n_of_m import NM
from cram_bench.compress.quantize import PruneThenQuantize, Quantize, quantized
from cram_bench.compress.select import keep_largest, keep_n_of_m, zeros_for
from cram_bench.compress.weights import prunable

__all__ = [
    "NM",
    "Compressor",
    "Magnitude",
    "Masks",
    "PruneThenQuantize",
    "Quantize",
    "applied",
    "apply_",
    "compressed",
    "grid",
    "keep_largest",
    "keep_n_of_m",
    "parse",
    "prunable",
    "quantized",
    "sparsity",
    "tune_batchnorm",
    "zeros_for",
]


def parse(spec: str) -> Compressor:
    """Read a compressor's specification: ``global@0.9``, ``uniform@0.5``, ``2:4``, ``int8``, ``global@0.9+int8``.

    ``global-reference@0.9`` and ``uniform-reference@0.9`` follow the authors' rule (`Magnitude`).

    Raises:
        ValueError: it is none of these.

    >>> parse("uniform@0.5")
    Magnitude(sparsity=0.5, scope='uniform', reference=False)
    >>> str(parse("2:4"))
    '2:4'
    """
    if match := re.fullmatch(r"(\d+):(\d+)", spec):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(global|uniform)(-reference)?@(\d*\.?\d+(?:e-?\d+)?)", spec):
        return Magnitude(float(match[3]), "uniform" if match[1] == "uniform" else "global", bool(match[2]))
    if match := re.fullmatch(r"int(\d+)", spec):
        return Quantize(int(match[1]))
    if "+" in spec:
        prune, quantize = (parse(part) for part in spec.split("+", 1))
        if isinstance(quantize, Quantize) and not isinstance(prune, Quantize):
            return PruneThenQuantize(prune, quantize)
    raise ValueError(f"unknown compressor {spec!r}: write global@0.9, uniform@0.9, 2:4, int8 or global@0.9+int8")


def grid(patterns: Sequence[str], sparsities: Sequence[float]) -> list[Compressor]:
    """Return a compressor for every pattern and sparsity; an n:m pattern has one sparsity and comes once.

    >>> [str(c) for c in grid(["global", "2:4"], [0.5, 0.9])]
    ['global@0.5', 'global@0.9', '2:4']
    """
    specs = [[p] if ":" in p else [f"{p}@{float(sparsity)!r}" for sparsity in sparsities] for p in patterns]
    return [parse(spec) for listed in specs for spec in listed]


def apply_(model: nn.Module, compressor: Compressor, exclude: Iterable[str] = ()) -> Masks:
    """Compress `model` in place, θ ← C(θ), and return the masks that say which weights stayed.

    >>> import torch
    >>> model = nn.Linear(4, 1, bias=False)
    >>> apply_(model, Magnitude(0.75)).zeros
    3
    """
    return compressor.apply_(prunable(model, exclude))


def compressed(model: nn.Module, compressor: Compressor, exclude: Iterable[str] = ()) -> nn.Module:
    """Return a compressed copy; `model` stays as it is."""
    model = copy.deepcopy(model)
    apply_(model, compressor, exclude)
    return model


@contextmanager
def applied(model: nn.Module, compressor: Compressor, exclude: Iterable[str] = ()) -> Iterator[Masks]:
    """Compress `model` for the length of a block; then put it back bit for bit, also after an exception."""
    with preserved(model):
        yield apply_(model, compressor, exclude)


def sparsity(model: nn.Module, exclude: Iterable[str] = ()) -> float:
    """Return the fraction of exact zeros among the prunable weights of `model`, in [0, 1]."""
    return Masks.of(prunable(model, exclude)).sparsity
