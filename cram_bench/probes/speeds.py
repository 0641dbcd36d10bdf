"""What accuracy is left at a measured speed-up, whatever makes the network faster."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from cram_bench import deploy
from cram_bench.checks import instance, integer, items, number
from cram_bench.compress import Masks, apply_, tune_batchnorm
from cram_bench.data import Batches, batches_of
from cram_bench.deploy.latency import medians
from cram_bench.deploy.onnx import answer, session
from cram_bench.outputs import fitting
from cram_bench.prune import structures, ziplm
from cram_bench.train import Score, evaluate

KINDS = {
    "float32": "dense float32",
    "bfloat16": "dense bfloat16",
    "sparse": "single zeros with sparse kernels",
    "2:4": "2:4 with sparse kernels",
    "ziplm": "ZipLM",
    "uniform": "uniform OBS",
    "onnx": "float32 in onnxruntime",
    "int8": "8 bits in onnxruntime",
}
"""What makes a network faster, as `speeds` names it → in words."""


def speeds(
    model: nn.Module,
    test: Batches,
    train: Batches,
    sparsities: Sequence[float] = (0.8, 0.9, 0.95),
    speedups: Sequence[float] = (1.5, 2.0, 3.0),
    batch_size: int = 32,
    repeats: int = 11,
    calibration: Sequence[Any] | None = None,
    samples: int = 256,
    trials: int = 100,
    exported: bool | None = None,
) -> pd.DataFrame:
    """Time a forward pass of networks made faster in many ways, on as many threads as torch has now.

    All are made of `model`, at once and without training: dense in bfloat16; pruned by magnitude, or to 2:4, with
    those layers at their nonzeros only that are faster so (`cram_bench.deploy.swap_`); without heads, columns and
    channels (`cram_bench.prune.ziplm`, and the same removal with one fraction everywhere), physically smaller; and by
    onnxruntime, with products of matrices in 8 bits and without. All are timed in turns.

    Args:
        model: any torch classifier of one tensor, on the CPU and in float32, left as it was found.
        test: what accuracy is measured on, and whose first batch is timed.
        train: what ZipLM looks at.
        sparsities: fractions of the prunable weights that are zero.
        speedups: that ZipLM is asked for; what cannot be reached is left out, and all where there are no structures.
        batch_size: where `test` is a `Dataset`.
        repeats: runs that count.
        calibration: batches that BatchNorm is tuned on after pruning; None: it is not.
        samples: examples that ZipLM looks at, and as many that it holds out.
        trials: of its search.
        exported: whether onnxruntime runs; None: where it is installed.

    Returns:
        Rows of kind (of `KINDS`), asked (sparsity or speed-up; 0: nothing), predicted (speed-up, by the table of
        latencies), ms (median of a batch), speedup (over dense float32 here), accuracy (a fraction), bytes (of the
        weights' file), batch, length (tokens; 0 for images), threads.

    Raises:
        ValueError: a number is outside what its line allows, or the data are empty.
    """
    instance("model", model, nn.Module, "a torch model")
    integer("repeats", repeats, 1)
    levels = [number("sparsity", level, 0, 1) for level in items("sparsities", sparsities, "fractions")]
    first = next(iter(batches_of(test, batch_size)), None)
    if first is None:
        raise ValueError("the data to time on are empty")
    inputs = fitting(model)(first[0])
    if inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    dense = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    half = copy.deepcopy(dense).to(torch.bfloat16)
    made: list[tuple[str, float, float, nn.Module]] = [
        ("float32", 0.0, 1.0, dense),
        ("bfloat16", 0.0, float("nan"), half),
    ]
    for kind, level, spec in [*(("sparse", s, f"global@{s!r}") for s in levels), ("2:4", 0.5, "2:4")]:
        sparse = _pruned(dense, partial(_by, spec), calibration)
        deploy.swap_(sparse, inputs, backward=False, repeats=max(3, repeats // 2))
        made.append((kind, level, float("nan"), sparse))
    for result in _ziplm(dense, inputs, train, speedups, samples, trials):
        small = deploy.shrink(_pruned(dense, result.apply_, calibration), result.structure)
        made.append((result.method, result.speedup, result.predicted, small))
    rows: list[dict[str, Any]] = []
    works: list[Callable[[], Any]] = []
    for kind, asked, predicted, network in made:
        row = {"kind": kind, "asked": asked, "predicted": predicted, "bytes": deploy.size(network)}
        rows.append(row | {"accuracy": evaluate(network, test, batch_size)["accuracy"]})
        works.append(partial(network, fitting(network)(inputs)))
    with tempfile.TemporaryDirectory() as folder:
        if exported or (exported is None and _installed()):
            for kind in ("onnx", "int8"):
                file = Path(folder) / f"{kind}.onnx"
                try:
                    deploy.write_onnx(dense, inputs, file, int8=kind == "int8")
                except ValueError:  # nothing that 8 bits would do for
                    continue
                runner = session(file)
                score = Score()
                for x, labels in batches_of(test, batch_size):
                    score.add(answer(runner, x), labels)
                row = {"kind": kind, "asked": 0.0, "predicted": float("nan"), "bytes": file.stat().st_size}
                rows.append(row | {"accuracy": score.result()["accuracy"]})
                works.append(partial(answer, runner, inputs))
        with torch.inference_mode():
            times = medians(works, inputs.device, repeats)
    found = pd.DataFrame(rows)
    found["ms"] = [1000 * seconds for seconds in times]
    found["speedup"] = [times[0] / seconds for seconds in times]
    text = inputs.ndim == 2 and not inputs.is_floating_point()
    found = found.assign(batch=len(inputs), length=inputs.shape[1] if text else 0, threads=torch.get_num_threads())
    return found[["kind", "asked", "predicted", "ms", "speedup", "accuracy", "bytes", "batch", "length", "threads"]]


def _pruned(dense: nn.Module, prune: Callable[[nn.Module], Masks], calibration: Sequence[Any] | None) -> nn.Module:
    network = copy.deepcopy(dense)
    prune(network)
    if calibration is not None:
        tune_batchnorm(network, calibration)
    return network


def _by(spec: str, model: nn.Module) -> Masks:
    return apply_(model, spec)


def _ziplm(
    model: nn.Module, inputs: Tensor, train: Batches, speedups: Sequence[float], samples: int, trials: int
) -> list[Any]:
    """Return what ZipLM and uniform removal make of a model; nothing where it has no structures."""
    try:
        found = structures(model)
    except ValueError:
        return []
    table = deploy.latency(model, inputs)
    seconds = table.set_index(["structure", "units"])["seconds"]
    fixed = float(seconds["fixed", 0])
    whole = fixed + sum(float(seconds[name, each.count]) for name, each in found.items())
    reached = [s for s in items("speedups", speedups, "numbers above 1") if fixed < whole / s]
    if not reached:
        return []
    methods = ("ziplm", "uniform")
    return ziplm(model, train, reached, latency=table, methods=methods, samples=samples, held=samples, trials=trials)


def _installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime"))


def speed_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return means over runs: what, asked, predicted and measured (times as fast), ms, accuracy (per cent), MB.

    Args:
        table: of `speeds`.
    """
    keys = ["kind", "asked"]
    means = table.groupby(keys, sort=False)[["predicted", "speedup", "ms", "accuracy", "bytes"]].mean().reset_index()
    return pd.DataFrame(
        {
            "what": means["kind"].map(KINDS),
            "asked": means["asked"],
            "predicted": means["predicted"],
            "measured": means["speedup"],
            "ms": means["ms"],
            "accuracy": 100 * means["accuracy"],
            "MB": means["bytes"] / 1e6,
        }
    )
