"""Which examples change: the predictions that a compression flips; and how much data BatchNorm tuning needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from cram_bench._checks import instance, integer, items
from cram_bench._preserve import preserved
from cram_bench.compress import Compressor, apply_, parse, tune_batchnorm
from cram_bench.data import AT_ONCE, Batches, Dataset, batches_of
from cram_bench.probes.common import probing, tuning_data
from cram_bench.train import evaluate


@torch.no_grad()
def predictions(model: nn.Module, data: Batches, batch_size: int = AT_ONCE) -> tuple[Tensor, Tensor, Tensor]:
    """Return (labels, predicted classes, probabilities of these), one entry an example, on the CPU; in eval mode."""
    labels, classes, confidences = [], [], []
    with probing(model):
        for inputs, batch_labels in batches_of(data, batch_size):
            best = model(inputs).float().softmax(1).max(1)
            labels.append(batch_labels.cpu())
            classes.append(best.indices.cpu())
            confidences.append(best.values.cpu())
    if not labels:
        raise ValueError("the data to predict are empty")
    return torch.cat(labels), torch.cat(classes), torch.cat(confidences)


def flips(
    model: nn.Module,
    data: Batches,
    compressor: Compressor | str,
    calibration: Batches | None = None,
    exclude: Iterable[str] = (),
) -> pd.DataFrame:
    """List the examples whose predicted class a compression changes.

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample, in a fixed order.
        compressor: an operator or its specification.
        calibration: data for BatchNorm tuning after it; none if not given.
        exclude: shell patterns over parameter names that stay dense.

    Returns:
        A row per flip, the one of highest confidence before first: index (position in the data), label, before and
        after (classes), confidence_before and confidence_after (probabilities of these), kind: ``broken``
        (right before), ``mended`` (right after) or ``moved`` (wrong both times).
    """
    compressor = parse(compressor)
    calibration = tuning_data(calibration)
    labels, before, confidence = predictions(model, data)
    with preserved(model):
        apply_(model, compressor, exclude)
        if calibration is not None:
            tune_batchnorm(model, batches_of(calibration))
        _, after, confidence_after = predictions(model, data)
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
    compressor: Compressor | str,
    sizes: Sequence[int] = (50, 100, 200, 500, 1000, 2000),
    draws: int = 3,
    exclude: Iterable[str] = (),
    augment: bool = True,
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

    Returns:
        A row per size and draw: size, draw, accuracy (a fraction), loss (nats). Size 0, once, is without tuning.

    Raises:
        ValueError: a size is not positive, or larger than `calibration`.
    """
    compressor = parse(compressor)
    instance("calibration", calibration, Dataset, "a Dataset")
    sizes = [integer("a size", size, 1, len(calibration)) for size in items("sizes", sizes, "numbers of images")]
    integer("draws", draws, 1)
    with probing(model):
        apply_(model, compressor, exclude)
        result = evaluate(model, data)
        rows = [(0, 0, result["accuracy"], result["loss"])]
        for size in sizes:
            for draw in range(draws):
                with preserved(model):
                    tune_batchnorm(model, calibration.calibration(size, augment, seed=draw))
                    result = evaluate(model, data)
                rows.append((size, draw, result["accuracy"], result["loss"]))
    return pd.DataFrame(rows, columns=["size", "draw", "accuracy", "loss"])
