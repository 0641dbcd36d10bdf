"""Layer by layer: where the zeros are, which layer breaks the network, how the weights are spread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import pandas as pd
from torch import Tensor, nn

from cram_bench.checks import instance, integer, items, number, shown
from cram_bench.compress import Compressor, Magnitude, applied, prunable
from cram_bench.data import Batches
from cram_bench.preserve import preserved
from cram_bench.probes.common import Forward, Loss, Problem, looked, probing, ready, tuning_data
from cram_bench.probes.incremental import evaluate_changes
from cram_bench.probes.sparsity import LEVELS
from cram_bench.prune import Specification


def layer_sensitivity(
    model: nn.Module,
    data: Batches,
    sparsities: Sequence[float] = LEVELS,
    calibration: Batches | None = None,
    exclude: Iterable[str] = (),
    forward: Forward | None = None,
    loss: Loss | None = None,
    pruner: str = "",
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Prune one layer at a time, by magnitude or by a pruner that looks, all others dense, and evaluate.

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample.
        sparsities: fractions of the layer's weights that are zeroed.
        calibration: data for BatchNorm tuning after the pruning; none if not given.
        exclude: shell patterns over parameter names to leave out.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.
        pruner: empty for magnitude, or one that looks, such as ``greedy``; it looks once.
        batches: what it looks at; `calibration` if not given.

    Returns:
        A row per layer and sparsity: layer (parameter name), weights (how many), sparsity, accuracy (a fraction), loss
        (nats), rise (of the loss over the dense model's, nats).
    """
    batches = calibration if batches is None else batches
    calibration = tuning_data(calibration)
    instance("pruner", pruner, str, "a text such as 'greedy'")
    if "@" in pruner:
        raise ValueError(
            f"pruner must be without a sparsity, such as 'greedy', for sparsities= says them, not {shown(pruner)}"
        )
    sparsities = [number("sparsity", level, 0, 1) for level in items("sparsities", sparsities, "numbers in [0, 1]")]
    with probing(model):
        problem = Problem(model, data, forward, loss)
        dense = problem.evaluate()["loss"]
        weights = prunable(model, exclude)
        tried = [(name, sparsity) for name in weights for sparsity in sparsities]
        specs = [f"{pruner}@{sparsity!r}" for sparsity in sparsities] if pruner else [*map(Magnitude, sparsities)]
        by = dict(zip(sparsities, looked(model, specs, batches, exclude, forward, loss), strict=True))
        if calibration is None:
            changes = [(name, partial(_pruned, by[sparsity], name)) for name, sparsity in tried]
            results = evaluate_changes(model, problem, changes, measure=problem.evaluate, quick=problem.plain)
        else:  # tuning changes the layers before the pruned one too
            results = []
            for name, sparsity in tried:
                with preserved(model):
                    by[sparsity].apply_({name: weights[name]})
                    problem.tune(calibration)
                    results.append(problem.evaluate())
    table = pd.DataFrame(tried, columns=["layer", "sparsity"])
    table.insert(1, "weights", [weights[name].numel() for name, _ in tried])
    found = pd.DataFrame(results, columns=["accuracy", "loss"])
    return table.join(found).assign(rise=found["loss"] - dense)


def _pruned(compressor: Compressor, name: str, values: Tensor) -> Tensor:
    compressor.apply_({name: values})
    return values


def layer_profile(
    model: nn.Module,
    compressor: Compressor | Specification | str,
    exclude: Iterable[str] = (),
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Tell how a compressor spreads its zeros over the layers.

    Args:
        model: any torch model; left as it was found.
        compressor: an operator, a pruner that looks, or their specification.
        exclude: shell patterns over parameter names that stay dense.
        batches: what a pruner looks at (`cram_bench.prune`), training data.

    Returns:
        A row per prunable layer: layer, weights, zeros (exact ones, those that quantization makes included), sparsity
        (zeros/weights).
    """
    (operator,) = looked(model, [compressor], batches, exclude)
    with applied(model, operator, exclude):
        rows = [(name, w.numel(), int((w == 0).sum())) for name, w in prunable(model, exclude).items()]
    table = pd.DataFrame(rows, columns=["layer", "weights", "zeros"])
    return table.assign(sparsity=table["zeros"] / table["weights"])


def layer_blame(
    model: nn.Module,
    data: Batches,
    compressor: Compressor | Specification | str,
    exclude: Iterable[str] = (),
    before: Callable[[], None] = lambda: None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Ask which layer breaks a compressed model: give every layer its part of the compression alone, and evaluate.

    The masks are those of the whole model, so a global threshold takes from each layer what it takes there.

    Args:
        model: any torch classifier; left as it was found. BatchNorm is not tuned.
        data: a fixed sample.
        compressor: an operator or its specification.
        exclude: shell patterns over parameter names that stay dense.
        before: called before every evaluation; what it raises ends the probe.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.
        batches: what a pruner looks at (`cram_bench.prune`), training data.

    Returns:
        `layer_profile`, and rise: of the loss over the dense model's when this layer alone is compressed, nats.
    """
    ready(model)
    weights = prunable(model, exclude)
    with probing(model):
        (operator,) = looked(model, [compressor], batches, exclude, forward, loss)
        problem = Problem(model, data, forward, loss)
        dense = problem.evaluate()["loss"]
        with applied(model, operator, exclude):
            compressed = {name: weight.detach().clone() for name, weight in weights.items()}
        changes = [(name, lambda _, values=values: values) for name, values in compressed.items()]
        results = evaluate_changes(model, problem, changes, before, problem.evaluate, problem.plain)
        rises = [result["loss"] - dense for result in results]
    return layer_profile(model, operator, exclude).assign(rise=rises)


def weight_histogram(model: nn.Module, bins: int = 61, exclude: Iterable[str] = ()) -> pd.DataFrame:
    """Count the weights of every prunable layer by value, in bins that all layers share.

    Args:
        model: any torch model.
        bins: equal bins from −m to m, m being the largest magnitude of all.
        exclude: shell patterns over parameter names to leave out.

    Returns:
        Columns layer, low, high (edges of the bin, the last one closed), count. Counts add up to the layer's weights.
    """
    integer("bins", bins, 1)
    weights = {name: w.detach().float().cpu().numpy().ravel() for name, w in prunable(model, exclude).items()}
    for name, values in weights.items():
        if not np.isfinite(values).all():
            raise ValueError(f"weights must be finite to be counted, and {name} holds NaN or infinity")
    limit = max(float(np.abs(values).max()) for values in weights.values()) or 1.0
    edges = np.linspace(-limit, limit, bins + 1)
    tables = [
        pd.DataFrame({"layer": name, "low": edges[:-1], "high": edges[1:], "count": np.histogram(values, edges)[0]})
        for name, values in weights.items()
    ]
    return pd.concat(tables, ignore_index=True)
