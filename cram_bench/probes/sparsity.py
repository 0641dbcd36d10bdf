"""Accuracy and loss of one-shot compressed copies of a model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import pandas as pd
from torch import nn

from cram_bench.compress import Compressor, Magnitude, Masks, apply_
from cram_bench.data import AT_ONCE, Batches
from cram_bench.preserve import preserved
from cram_bench.probes.common import Forward, Loss, Problem, cost_of, looked, probing, tuning_data
from cram_bench.prune import Specification

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95)


def sparsity_curve(
    model: nn.Module,
    data: Batches,
    compressors: Sequence[Compressor | Specification | str] = tuple(map(Magnitude, LEVELS)),
    calibration: Batches | None = None,
    exclude: Iterable[str] = (),
    batch_size: int = AT_ONCE,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Prune in one shot with each compressor and evaluate, before and after BatchNorm tuning.

    The dense model comes first, as ``global`` at sparsity 0. The model is left as it was found.

    Args:
        model: any torch classifier.
        data: what to evaluate on.
        compressors: operators, or their specifications such as ``global@0.9`` or ``2:4``; or of pruners that look, such
            as ``greedy@0.9`` or ``2:4+obs``: each looks once for all its sparsities.
        calibration: training data for BatchNorm tuning (`cram_bench.compress.tune_batchnorm`). Of a `Dataset`,
            `Dataset.calibration` takes 2,000 images, augmented; batches are used as they are; None leaves tuning out.
        exclude: shell patterns over parameter names that stay dense.
        batch_size: of evaluation, where `data` is a `Dataset`.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.
        batches: what a pruner looks at (`cram_bench.prune`), training data; `calibration` if not given.

    Returns:
        A row per compressor and calibration, with columns

        * pattern: ``global``, ``uniform``, ``2:4`` …
        * sparsity: zeros among all prunable weights, a fraction: as asked where whole weights allow it, else (layers
          that an N:M pattern leaves dense) as reached;
        * calibrated: whether BatchNorm was tuned after pruning;
        * accuracy: a fraction in [0, 1]; loss: mean cross-entropy in nats;
        * dense_weights: weights of the matrices in which nothing was pruned, which are the ones that are not prunable
          (``prunable(model).dense`` names them) and the ones that the pattern leaves; only the latter count in
          sparsity.

        and, where a pruner looks, seconds: what looking, shared by the sparsities of a pruner, and this pruning took;
        and gradients: examples that were looked at.

    Raises:
        ValueError: a specification cannot be read, the data are empty, or as `cram_bench.prune.Pruner.fit`.
    """
    batches = calibration if batches is None else batches
    rows = []
    with probing(model):
        chosen = looked(model, compressors, batches, exclude, forward, loss)
        calibration = tuning_data(calibration)
        problem = Problem(model, data, forward, loss, batch_size)
        for compressor in (Magnitude(0.0), *(c for c in chosen if c != Magnitude(0.0))):
            with preserved(model):
                start = time.perf_counter()
                masks = apply_(model, compressor, exclude)
                took = time.perf_counter() - start
                looking, gradients = cost_of(compressor)
                cost = round(took + looking, 3), gradients
                for calibrated in (False, True) if calibration is not None else (False,):
                    if calibrated and calibration is not None:
                        problem.tune(calibration)
                    result = problem.evaluate()
                    where = (compressor.pattern, reported(compressor, masks), calibrated)
                    rows.append((*where, result["accuracy"], result["loss"], masks.dense_weights, *cost))
    names = ["pattern", "sparsity", "calibrated", "accuracy", "loss", "dense_weights", "seconds", "gradients"]
    table = pd.DataFrame(rows, columns=names)
    return table if table["gradients"].any() else table.drop(columns=["seconds", "gradients"])


def reported(compressor: Compressor | Specification, masks: Masks) -> float:
    """Return the asked sparsity if the masks reach it to within one weight a tensor, else what they reach."""
    off = abs(masks.sparsity - compressor.sparsity) * masks.count
    return compressor.sparsity if off <= len(masks) else round(masks.sparsity, 4)
