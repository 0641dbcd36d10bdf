"""What trainings reached, by epoch, second and byte: read off the runs, no model is evaluated."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer

from cram_bench.checks import columns, instance, items
from cram_bench.experiment import setting
from cram_bench.optim.base import Wrapper
from cram_bench.optim.preconditioned import Preconditioned
from cram_bench.runs import Run


def training_curves(runs: Sequence[Run]) -> pd.DataFrame:
    """Return test accuracy after every epoch in which it was measured, and the seconds until then.

    Args:
        runs: finished or failed runs; a failed one gives a row whose measurements are empty.

    Returns:
        Columns method, seed, epoch, seconds (of training and evaluation, summed), megabytes (what the optimizer holds
        beside weights and gradients), accuracy (a fraction).
    """
    rows: list[dict[str, Any]] = []
    for run in items("runs", runs, "runs"):
        instance("a run", run, Run, "a Run, such as cram_bench.runs.ensure returns")
        named = {"method": run.experiment.method, "seed": run.experiment.seed}
        if run.failure is not None:
            rows.append(named | dict.fromkeys(("epoch", "seconds", "megabytes", "accuracy"), math.nan))
            continue
        named["megabytes"] = _megabytes(run)
        history = run.history
        seconds = history["seconds"].cumsum()
        for epoch, until, accuracy in zip(history["epoch"], seconds, history["test_accuracy"], strict=True):
            if math.isfinite(accuracy):
                rows.append(named | {"epoch": int(epoch), "seconds": float(until), "accuracy": float(accuracy)})
    return pd.DataFrame(rows, columns=["method", "seed", "epoch", "seconds", "megabytes", "accuracy"])


def training_costs(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Return what each kind of training reached and what it took, a row a name.

    Args:
        runs: what is compared → its runs, over seeds; of one kind and network each.

    Returns:
        Columns changed (the name), accuracy (mean of the last epochs' over seeds), std (sample standard deviation; NaN
        for one seed), seeds, seconds (median of all epochs), megabytes (what the optimizer holds beside the weights).
    """
    instance("runs", runs, Mapping, "a mapping of names to lists of runs")
    rows = []
    for name, every in runs.items():
        left = [run for run in every if run.failure is None]
        row: dict[str, Any] = {"changed": name, "seeds": len(left)}
        if left:
            last = pd.Series([run.history["test_accuracy"].iloc[-1] for run in left])
            epochs = pd.concat([run.history["seconds"] for run in left])
            row |= {"accuracy": last.mean(), "std": last.std(ddof=1), "seconds": epochs.median()}
            row["megabytes"] = _megabytes(left[0])
        rows.append(row)
    return pd.DataFrame(rows, columns=["changed", "accuracy", "std", "seeds", "seconds", "megabytes"])


def cost_table(costs: pd.DataFrame) -> pd.DataFrame:
    """Lay out what `training_costs` returns, as texts: accuracy in per cent, seconds an epoch and megabytes."""
    columns(costs, "changed", "accuracy", "std", "seeds", "seconds", "megabytes")
    laid_out = []
    for row in costs.to_dict("records"):
        spread = "" if pd.isna(row["std"]) else f" ± {100 * row['std']:.1f}"
        known = [f"{100 * row['accuracy']:.1f}{spread}", f"{row['seconds']:.2g}", f"{row['megabytes']:.3g}"]
        values = known if row["seeds"] else ["failed", "", ""]
        names = ("accuracy, % ± std", "seconds an epoch", "MB the optimizer holds")
        laid_out.append({"method": row["changed"], "seeds": str(row["seeds"]), **dict(zip(names, values, strict=True))})
    return pd.DataFrame(laid_out)


def _megabytes(run: Run) -> float:
    return optimizer_bytes(run.experiment.build_optimizer(run.load_model())) / 1e6


def density_accuracy(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the last epoch's accuracy of runs with compressed gradients, by how much the ring keeps.

    Returns:
        Columns density (fraction of a gradient's entries), feedback (bool), seed, accuracy; empty for a failed run.
    """
    rows = [
        {
            "density": setting(run.experiment, "optimizer.density"),
            "feedback": setting(run.experiment, "optimizer.feedback"),
            "seed": run.experiment.seed,
            "accuracy": run.history["test_accuracy"].iloc[-1] if run.failure is None else math.nan,
        }
        for run in items("runs", runs, "runs")
    ]
    return pd.DataFrame(rows)


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Return the bytes that an optimizer holds beside weights and gradients from its first step on.

    Momenta are counted on a copy that takes a step, the ring of a preconditioner by its shapes. The optimizer stays as
    it is.

    >>> model = torch.nn.Linear(10, 10, bias=False)
    >>> optimizer_bytes(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    400
    """
    instance("optimizer", optimizer, Optimizer, "a torch optimizer")
    ring, base = 0, optimizer
    while isinstance(base, Wrapper):
        if isinstance(base, Preconditioned):
            trained = [p.shape for group in base.param_groups for p in group["params"] if p.requires_grad]
            ring += base.window.needed(trained)
        base = base.base
    base = copy.deepcopy(base)
    for group in base.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    base.step()
    held = [value for state in base.state.values() for value in state.values() if isinstance(value, Tensor)]
    return ring + sum(value.nbytes for value in held if value.numel() > 1)  # a number is a count of steps
