"""Between models: the straight line from one to another, and the plane through three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cram_bench.checks import integer, items, number
from cram_bench.data import Batches
from cram_bench.preserve import preserved
from cram_bench.probes.common import Forward, Loss, Problem, probing, ready, tuning_data


def loss_along_path(
    start: nn.Module,
    end: nn.Module,
    data: Batches,
    points: int = 11,
    calibration: Batches | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Evaluate the loss on the straight line between two models, (1 − t) θ₀ + t θ₁.

    Two minima are linearly connected if the loss stays low on the way (Frankle et al., arXiv 1912.05671). BatchNorm's
    running statistics are interpolated too, and do not fit in between; tuning them there tells whether the
    weights are to blame.

    Args:
        start: any torch classifier; both are left as they were found.
        end: one of the same architecture.
        data: a fixed sample.
        points: values of t from 0 to 1, both included.
        calibration: data for BatchNorm tuning at every point; none if not given.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.

    Returns:
        Columns t, loss (nats), accuracy (a fraction).

    Raises:
        ValueError: the models differ in names or shapes.
    """
    integer("points", points, 1)
    shares = [(1 - t, t) for t in np.linspace(0, 1, points)]
    table = loss_at(start, [start, end], data, shares, calibration, forward, loss)
    return table.rename(columns={"w1": "t"})[["t", "loss", "accuracy"]]


def loss_on_plane(
    origin: nn.Module,
    first: nn.Module,
    second: nn.Module,
    data: Batches,
    points: int = 9,
    margin: float = 0.3,
    calibration: Batches | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluate the loss on the plane through three models, such as the dense, the pruned and the fine-tuned one.

    The plane has an orthonormal basis: e₁ along θ₁ − θ₀, e₂ along the part of θ₂ − θ₀ that is orthogonal to it. A
    point is θ₀ + a e₁ + b e₂, with a and b in Euclidean distance between weights.

    Args:
        origin: θ₀; all three are left as they were found.
        first: θ₁.
        second: θ₂.
        data: a fixed sample.
        points: per axis.
        margin: how far the rectangle reaches beyond the three, as a fraction of what they span along each axis.
        calibration: data for BatchNorm tuning at every point; none if not given.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.

    Returns:
        (grid, models): columns a, b, loss (nats), accuracy (a fraction); and for the three models a and b.

    Raises:
        ValueError: the models differ in names or shapes, or lie on one line.
    """
    integer("points", points, 1)
    number("margin", margin)
    weights = [_parameters(model) for model in (origin, first, second)]
    _alike(weights)
    flat = [torch.cat([value.double().flatten() for value in w.values()]) for w in weights]
    one, two = flat[1] - flat[0], flat[2] - flat[0]
    length = one.norm()
    along = float(two @ one / length) if length else 0.0
    across = float((two - along * one / length).norm()) if length else 0.0
    if not length or across <= 1e-9 * float(length):
        raise ValueError("the three models lie on one line; a plane needs three that do not")
    corners = pd.DataFrame(
        {"model": ["origin", "first", "second"], "a": [0.0, float(length), along], "b": [0, 0, across]}
    )
    low, high = corners[["a", "b"]].min(), corners[["a", "b"]].max()
    span = margin * (high - low)
    axes = [np.linspace(low[x] - span[x], high[x] + span[x], points) for x in ("a", "b")]
    where = [(float(a), float(b)) for a in axes[0] for b in axes[1]]
    # a e₁ + b e₂ in terms of the three models: b fixes the share of the second, what is left of a that of the first.
    shares = [((a - b / across * along) / float(length), b / across) for a, b in where]
    grid = loss_at(
        origin, [origin, first, second], data, [(1 - u - v, u, v) for u, v in shares], calibration, forward, loss
    )
    grid = pd.DataFrame(where, columns=["a", "b"]).join(grid[["loss", "accuracy"]])
    return grid, corners


def loss_at(
    model: nn.Module,
    corners: Sequence[nn.Module],
    data: Batches,
    shares: Sequence[Sequence[float]],
    calibration: Batches | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Evaluate affine combinations of models, Σ wᵢ θᵢ, floating-point buffers included; others are those of `model`.

    `forward` and `loss` are as `cram_bench.probes.common` says.

    Returns:
        Columns w0, w1 …, loss (nats), accuracy (a fraction).
    """
    for share in (shares := items("shares", shares, "weights, one a corner")):
        if len(share) != len(corners):
            raise ValueError(f"a share must be {len(corners)} numbers, one a corner, not {tuple(share)}")
    states = [_parameters(corner) | _buffers(corner) for corner in corners]
    _alike(states)
    calibration = tuning_data(calibration)
    rows = []
    with probing(model):
        problem = Problem(model, data, forward, loss)
        targets = dict(model.named_parameters()) | dict(model.named_buffers())
        for share in shares:
            with preserved(model):
                with torch.no_grad():
                    for name in states[0]:
                        value = reduce(torch.add, (w * state[name] for w, state in zip(share, states, strict=True)))
                        # Beyond the corners a variance would come out negative.
                        targets[name].copy_(value.clamp(min=0) if name.endswith("running_var") else value)
                if calibration is not None:
                    problem.tune(calibration)
                result = problem.evaluate()
            rows.append((*map(float, share), result["loss"], result["accuracy"]))
    return pd.DataFrame(rows, columns=[*(f"w{index}" for index in range(len(corners))), "loss", "accuracy"])


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    if any(map(is_lazy, model.parameters())):
        ready(model)  # says why not
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_buffers() if value.is_floating_point()}


def _alike(states: Sequence[Mapping[str, Tensor]]) -> None:
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in states]
    for other in shapes[1:]:
        if wrong := [name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name)]:
            name = sorted(wrong)[0]
            raise ValueError(
                f"the models differ in {name}: {shapes[0].get(name, 'missing')} and {other.get(name, 'missing')}"
            )
