"""When is a sparse step faster? Times of a training step and of its layers, dense and at nonzeros only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram_bench.checks import instance, integer, items
from cram_bench.compress import Magnitude, apply_
from cram_bench.data import Batches, batches_of
from cram_bench.deploy import swap_
from cram_bench.deploy.swapping import medians
from cram_bench.outputs import fitting, logits_of

NETWORK = "network"
"""In the column layer: the whole of it."""


def step_times(
    model: nn.Module,
    data: Batches,
    sparsities: Sequence[float],
    batch_size: int = 128,
    repeats: int = 5,
) -> pd.DataFrame:
    """Time forward and backward of copies of `model` that are pruned by magnitude, on as many threads as torch has now.

    Sparse is a network in which `cram_bench.deploy.swap_` took the layers that are faster so, and BatchNorm that goes
    channel by channel behind them, which is part of what the network gains; its rivals are the same
    network dense in float32 and dense in bfloat16 (autocast). All are timed in turns, after a step that is not counted.

    Args:
        model: any torch classifier, which is left as it was found.
        data: of which the first batch is taken.
        sparsities: fractions of the prunable weights that are zero.
        batch_size: where `data` is a `Dataset`.
        repeats: steps of each.

    Returns:
        Rows of sparsity and layer, every linear layer and convolution and then ``network``: kind, weights, zeros
        (fraction of its own), dense_ms, bfloat16_ms (of the network alone), sparse_ms (medians in milliseconds, NaN
        where nothing was timed), speedup (dense over sparse), bfloat16_speedup (dense over bfloat16), taken (for the
        network: by any layer) and reason.

    Raises:
        ValueError: a sparsity is outside [0, 1), `repeats` is less than 1, or there are no data.
        TypeError: an argument has another type.
    """
    instance("model", model, nn.Module, "a torch model")
    integer("repeats", repeats, 1)
    levels = [Magnitude(level) for level in items("sparsities", sparsities, "fractions")]
    batch = next(iter(batches_of(data, batch_size)), None)
    if batch is None:
        raise ValueError("the data to time on are empty")
    inputs, labels = fitting(model)(batch[0]), batch[1]
    tables = []
    for level in levels:
        dense = copy.deepcopy(model).train().to(memory_format=torch.channels_last)  # as it is trained
        masks = apply_(dense, level)
        half, sparse = copy.deepcopy(dense), copy.deepcopy(dense)
        table = swap_(sparse, inputs, repeats=repeats).rename(columns={"sparsity": "zeros"})
        norms = table["kind"] == "BatchNorm2d"
        by_channel, table = int(table[norms]["taken"].sum()), table[~norms].reset_index(drop=True)
        works = [_step(dense, inputs, labels), _step(half, inputs, labels, half=True), _step(sparse, inputs, labels)]
        times = [1000 * seconds for seconds in medians(works, repeats)]
        taken = int(table["taken"].sum())
        table["bfloat16_ms"] = table["bfloat16_speedup"] = float("nan")
        table.loc[len(table)] = {
            "layer": NETWORK, "kind": type(model).__name__, "weights": masks.count, "zeros": masks.sparsity,
            "dense_ms": times[0], "bfloat16_ms": times[1], "sparse_ms": times[2], "speedup": times[0] / times[2],
            "bfloat16_speedup": times[0] / times[1], "taken": taken > 0,
            "reason": f"{taken} of {len(table)} layers are sparse"
            + f", {by_channel} of BatchNorm go by channel" * (by_channel > 0),
        }  # fmt: skip
        tables.append(table.assign(sparsity=level.sparsity))
    names = ["sparsity", "layer", "kind", "weights", "zeros", "dense_ms", "bfloat16_ms", "sparse_ms", "speedup"]
    return pd.concat(tables, ignore_index=True)[[*names, "bfloat16_speedup", "taken", "reason"]]


def _step(model: nn.Module, inputs: Any, labels: Tensor, half: bool = False) -> Callable[[], None]:
    """Return a function that goes forward and backward once."""

    def step() -> None:
        model.zero_grad()
        with torch.enable_grad(), torch.autocast(labels.device.type, torch.bfloat16, enabled=half):
            value = F.cross_entropy(logits_of(model(inputs)), labels)
        value.backward()

    return step


def step_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return for every sparsity what the step of the whole network costs, and against which rival it is faster.

    Args:
        table: of `step_times`.

    Returns:
        Columns method and seed, where the table has them, sparsity (per cent), dense, bfloat16 and sparse (ms), over
        dense and over bfloat16 (how many times as fast the sparse step is), layers (how many are sparse).
    """
    own = table[table["layer"] == NETWORK]
    return pd.DataFrame(
        {
            **{name: own[name] for name in ("method", "seed") if name in own},
            "sparsity": 100 * own["sparsity"],
            "dense": own["dense_ms"],
            "bfloat16": own["bfloat16_ms"],
            "sparse": own["sparse_ms"],
            "over dense": own["dense_ms"] / own["sparse_ms"],
            "over bfloat16": own["bfloat16_ms"] / own["sparse_ms"],
            "layers": own["reason"],
        }
    ).reset_index(drop=True)
