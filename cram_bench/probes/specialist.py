"""A specialist: a network pruned for some of its classes, from a few of their examples (TACO, arXiv 2303.14409)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import nn

from cram_bench.checks import columns, instance, integer, items, unknown
from cram_bench.compress import apply_, correct_statistics, layer_statistics, tune_batchnorm
from cram_bench.data import AT_ONCE, Dataset
from cram_bench.preserve import preserved
from cram_bench.probes.common import Problem, classes_of, cost_of, looked, probing
from cram_bench.probes.over_runs import half_width
from cram_bench.probes.pruners import CORRECTIONS

FROM = ("task", "random")


def specialist(
    model: nn.Module,
    train: Dataset,
    test: Dataset,
    classes: Sequence[str],
    compressors: Sequence[str],
    samples: int = 128,
    draws: int = 5,
    corrections: Sequence[str] = ("statistics",),
    exclude: Iterable[str] = (),
    batch_size: int = AT_ONCE,
) -> pd.DataFrame:
    """Prune for some classes: what pruners look at, and what corrects after, each drawn from these classes or from all.

    Task-awareness is that both come from a few examples of the target classes; the control is as many examples of all
    classes. Every draw takes other examples. The model is left as it was found.

    Args:
        model: any torch classifier of all classes.
        train: where the samples are drawn from.
        test: evaluated are its examples of the target classes alone.
        classes: names of the target classes, as `Dataset.of_classes` takes them.
        compressors: operators and pruners, or their specifications. Of one that looks at the weights alone only the
            correction differs.
        samples: how many examples pruners look at, and as many the correction.
        draws: how often.
        corrections: ``none``, ``batchnorm`` or ``statistics``, as in `cram_bench.probes.pruners`.
        exclude: shell patterns over parameter names that stay dense.
        batch_size: of evaluation.

    Returns:
        A row per compressor, draw, looked (``task`` or ``random``; empty where nothing looks), corrected (likewise) and
        correction: pattern, sparsity, draw, looked, corrected, correction, accuracy (of all classes' outputs, a
        fraction), task_accuracy (the largest among the outputs of the target classes), loss (nats). First the dense
        model, as ``dense``.

    Raises:
        ValueError: there are fewer examples than that, or a pruner wants more.
    """
    instance("train", train, Dataset, "a Dataset")
    integer("samples", samples, 2)
    integer("draws", draws, 1)
    for name in (corrections := items("corrections", corrections, "names of corrections")):
        if name not in CORRECTIONS:
            raise ValueError(unknown("correction", name, list(CORRECTIONS)))
    task, own = train.of_classes(classes), test.of_classes(classes)
    outputs = sorted(train.classes.index(name) for name in classes)
    rows: list[tuple[object, ...]] = []
    with probing(model):
        problem = Problem(model, own, batch_size=batch_size)
        rows.append(("dense", 0.0, 0, "", "", "none", *_accuracies(problem, outputs)))
        for draw in range(draws):
            drawn = {"task": task.sample(samples, seed=draw), "random": train.sample(samples, seed=draw)}
            held = {name: problem.fitted(found.batches(samples)) for name, found in drawn.items()}
            references = {
                name: layer_statistics(model, found) if "statistics" in corrections else None
                for name, found in held.items()
            }
            for source in FROM:
                for compressor in looked(model, compressors, drawn[source], exclude):
                    looks = source if cost_of(compressor)[1] else ""
                    if not looks and source != FROM[0]:
                        continue
                    with preserved(model):
                        apply_(model, compressor, exclude)
                        for correction in corrections:
                            for other in FROM if correction != "none" else ("",):
                                with preserved(model):
                                    if correction == "batchnorm":
                                        tune_batchnorm(model, held[other])
                                    elif (reference := references.get(other)) is not None:
                                        correct_statistics(model, reference, held[other])
                                    found = _accuracies(problem, outputs)
                                where = (compressor.pattern, compressor.sparsity, draw, looks, other, correction)
                                rows.append((*where, *found))
    names = ["pattern", "sparsity", "draw", "looked", "corrected", "correction", "accuracy", "task_accuracy", "loss"]
    return pd.DataFrame(rows, columns=names)


@torch.no_grad()
def _accuracies(problem: Problem, outputs: Sequence[int]) -> tuple[float, float, float]:
    """Return accuracy among all outputs, among those of the task, and the mean loss."""
    every, among, loss, count = 0, 0, 0.0, 0
    chosen = torch.tensor(list(outputs))
    for inputs, targets in problem:
        logits = classes_of(problem.outputs(inputs))
        every += int((logits.argmax(1) == targets).sum())
        among += int((chosen.to(targets.device)[logits[:, chosen].argmax(1)] == targets).sum())
        loss += float(problem.sum_of(logits, targets))
        count += len(targets)
    return every / count, among / count, loss / count


def specialist_table(table: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """Lay out a measurement in per cent with its 95 % confidence interval over draws (Student's t), a row per pruner
    and crossing.

    Args:
        table: of `specialist`, perhaps stacked over runs.
        value: ``accuracy`` or ``task_accuracy``.
    """
    columns(table, "pattern", "sparsity", "looked", "corrected", "correction", value)
    by = ["pattern", "looked", "corrected", "correction"]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for key, own in table[table["sparsity"] > 0].groupby([*by, "sparsity"], sort=False)[value]:
        *where, level = key
        mean, half = 100 * own.mean(), half_width(100 * own)
        text = f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"
        cells.setdefault(tuple(map(str, where)), {})[f"{100 * float(str(level)):g} %"] = text
    laid_out = pd.DataFrame.from_dict(cells, orient="index")
    if len(laid_out):
        laid_out.index = pd.MultiIndex.from_tuples(
            list(cells), names=["pruner", "looked at", "corrected on", "correction"]
        )
    return laid_out.fillna("").reset_index()
