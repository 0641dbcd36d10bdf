"""Which examples change: the predictions that a compression flips; and how much data BatchNorm tuning needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from cram_bench.checks import instance, integer, items
from cram_bench.compress import Compressor, apply_
from cram_bench.data import AT_ONCE, Batches, Dataset
from cram_bench.preserve import preserved
from cram_bench.probes.common import Forward, Loss, Problem, classes_of, looked, probing, tuning_data
from cram_bench.prune import Specification


def predictions(
    model: nn.Module, data: Batches | Problem, batch_size: int = AT_ONCE, forward: Forward | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (labels, predicted classes, probabilities of these), one entry an example, on the CPU; in eval mode."""
    labels, classes, confidences = [], [], []
    with probing(model), torch.no_grad():
        problem = Problem(model, data, forward, batch_size=batch_size)
        for inputs, batch_labels in problem:
            best = classes_of(problem.outputs(inputs)).float().softmax(1).max(1)
            labels.append(batch_labels.cpu())
            classes.append(best.indices.cpu())
            confidences.append(best.values.cpu())
    if not labels:
        raise ValueError("the data to predict are empty")
    return torch.cat(labels), torch.cat(classes), torch.cat(confidences)


def flips(
    model: nn.Module,
    data: Batches,
    compressor: Compressor | Specification | str,
    calibration: Batches | None = None,
    exclude: Iterable[str] = (),
    forward: Forward | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """List the examples whose predicted class a compression changes.

    Args:
        model: any torch classifier; left as it was found.
        data: a sample. A `DataLoader` is read once, so that both predictions are of the same examples; where it
            shuffles, index is the place in that one reading, and a warning says so.
        compressor: an operator or its specification.
        calibration: data for BatchNorm tuning after it; none if not given.
        exclude: shell patterns over parameter names that stay dense.
        forward: (model, inputs) → logits, where they are not read as `cram_bench.probes.common` says.
        batches: what a pruner looks at (`cram_bench.prune`), training data; `calibration` if not given.

    Returns:
        A row per flip, the one of highest confidence before first: index (position in the data), label, before and
        after (classes), confidence_before and confidence_after (probabilities of these), kind: ``broken``
        (right before), ``mended`` (right after) or ``moved`` (wrong both times).
    """
    batches = calibration if batches is None else batches
    calibration = tuning_data(calibration)
    if isinstance(getattr(data, "sampler", None), RandomSampler):
        warnings.warn(
            "the DataLoader shuffles: index is the place in one reading, not in the data set; give shuffle=False",
            stacklevel=2,
        )
    with probing(model):
        problem = Problem(model, data, forward)
        labels, before, confidence = predictions(model, problem, forward=forward)
        apply_(model, looked(model, [compressor], batches, exclude, forward)[0], exclude)
        if calibration is not None:
            problem.tune(calibration)
        _, after, confidence_after = predictions(model, problem, forward=forward)
    table = pd.DataFrame(
        {
            "index": range(len(labels)),
            "label": labels,
            "before": before,
            "after": after,
            "confidence_before": confidence,
            "confidence_after": confidence_after,
        }
    )
    table = table[table["before"] != table["after"]]
    kinds = ["broken" if b == y else "mended" if a == y else "moved" for y, b, a in
             zip(table["label"], table["before"], table["after"], strict=True)]  # fmt: skip
    return table.assign(kind=kinds).sort_values("confidence_before", ascending=False, ignore_index=True)


def calibration_curve(
    model: nn.Module,
    data: Batches,
    calibration: Dataset,
    compressor: Compressor | Specification | str,
    sizes: Sequence[int] = (50, 100, 200, 500, 1000, 2000),
    draws: int = 3,
    exclude: Iterable[str] = (),
    augment: bool = True,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Measure how accuracy after BatchNorm tuning depends on how many images it sees.

    Args:
        model: any torch classifier; left as it was found.
        data: what to evaluate on.
        calibration: training images to draw from.
        compressor: an operator or its specification.
        sizes: how many images.
        draws: random draws of each size; the spread comes from them.
        exclude: shell patterns over parameter names that stay dense.
        augment: augment the images, as in a training that does.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.

    Returns:
        A row per size and draw: size, draw, accuracy (a fraction), loss (nats). Size 0, once, is without tuning.

    Raises:
        ValueError: a size is not positive, or larger than `calibration`.
    """
    instance("calibration", calibration, Dataset, "a Dataset")
    sizes = [integer("a size", size, 1, len(calibration)) for size in items("sizes", sizes, "numbers of images")]
    integer("draws", draws, 1)
    with probing(model):
        problem = Problem(model, data, forward, loss)
        apply_(model, looked(model, [compressor], calibration, exclude, forward, loss)[0], exclude)
        result = problem.evaluate()
        rows = [(0, 0, result["accuracy"], result["loss"])]
        for size in sizes:
            for draw in range(draws):
                with preserved(model):
                    problem.tune(calibration.calibration(size, augment, seed=draw))
                    result = problem.evaluate()
                rows.append((size, draw, result["accuracy"], result["loss"]))
    return pd.DataFrame(rows, columns=["size", "draw", "accuracy", "loss"])
