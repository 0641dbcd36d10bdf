"""The loss around a model: along a line, and in a ball of random filter-normalised directions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cram_bench.checks import integer, items, number
from cram_bench.compress import Compressor, applied
from cram_bench.data import Batches
from cram_bench.probes.common import Forward, Loss, Problem, held, looked, probing, ready
from cram_bench.prune import Specification


def random_direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Draw a direction with filter normalisation (Li et al., arXiv 1712.09913, section 4).

    d_i ← d_i / ‖d_i‖ · ‖θ_i‖ for every filter i, that is every slice along dimension 0 of a parameter with more
    than one dimension; biases, normalisation weights and buffers do not move. So the step 1 along it changes
    every filter by its own norm, whatever its scale.

    Args:
        model: its weights give the shapes and norms.
        seed: of the Gaussian draw, on the CPU in float32, so that every device gets the same.

    Returns:
        Parameter name → tensor of the parameter's shape; parameters that do not move are absent.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    direction = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu").to(parameter)
            dims = list(range(1, parameter.ndim))
            length = torch.linalg.vector_norm(draw, dim=dims, keepdim=True)
            norm = torch.linalg.vector_norm(parameter.detach(), dim=dims, keepdim=True)
            direction[name] = draw * (norm / length)
    return direction


def loss_on_grid(
    model: nn.Module,
    data: Batches,
    directions: Sequence[Mapping[str, Tensor]],
    steps: Sequence[float] | np.ndarray,
    before: Callable[[], None] = lambda: None,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Evaluate L(θ + Σ aᵢ dᵢ) for every combination of `steps` along each direction.

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample.
        directions: parameter name → tensor, each.
        steps: values of every aᵢ.
        before: called before every evaluation; what it raises ends the probe.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.

    Returns:
        A row per point: one column per direction, ``a``, ``b`` …, then loss (nats) and accuracy (fraction).

    Raises:
        ValueError: a direction names a parameter that the model does not have, or has another shape; or a step is not
            finite.
    """
    rows = []
    steps = [number("a step", step) for step in items("steps", steps, "numbers")]
    with probing(model):
        problem = Problem(model, data, forward, loss)
        parameters = dict(model.named_parameters())
        for direction in directions:
            if unknown := sorted(direction.keys() - parameters.keys()):
                raise ValueError(f"the direction moves {unknown[0]!r}, which is not a parameter of the model")
            for name, move in direction.items():
                if move.shape != parameters[name].shape:
                    shapes = f"{tuple(move.shape)}, and the parameter {tuple(parameters[name].shape)}"
                    raise ValueError(f"the direction of {name!r} has shape {shapes}")
        start = {name: p.detach().clone() for name, p in parameters.items()}
        for point in itertools.product(steps, repeat=len(directions)):
            before()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(start[name])  # from the start every time: errors do not add up
                    for step, direction in zip(point, directions, strict=True):
                        if name in direction:
                            parameter.add_(direction[name], alpha=step)
            result = problem.evaluate()
            rows.append((*point, result["loss"], result["accuracy"]))
    axes = [chr(ord("a") + index) for index in range(len(directions))]
    return pd.DataFrame(rows, columns=[*axes, "loss", "accuracy"])


def loss_along_compression(
    model: nn.Module,
    data: Batches,
    compressor: Compressor | Specification | str,
    points: int = 11,
    end: float = 1.0,
    before: Callable[[], None] = lambda: None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Evaluate the loss on the straight line from the dense to the compressed weights, θ + t (C(θ) − θ).

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample.
        compressor: an operator or its specification.
        points: how many values of t, from 0 to `end`.
        end: 1 ends at C(θ); a little more looks beyond.
        before: called before every evaluation; what it raises ends the probe.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.
        batches: what a pruner looks at (`cram_bench.prune`), training data.

    Returns:
        Columns t, loss (nats), accuracy (fraction). BatchNorm statistics are those of the dense model.
    """
    integer("points", points, 1)
    number("end", end)
    ready(model)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    with applied(model, looked(model, [compressor], batches, (), forward, loss)[0]):
        change = {name: p.detach() - dense[name] for name, p in model.named_parameters()}
    change = {name: tensor for name, tensor in change.items() if bool(tensor.any())}
    return loss_on_grid(model, data, [change], np.linspace(0, end, points), before, forward, loss).rename(
        columns={"a": "t"}
    )


def loss_along_compressions(
    model: nn.Module,
    data: Batches,
    compressors: Sequence[Compressor | Specification | str],
    points: int = 11,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Stack `loss_along_compression` for several compressors, with the specification in column compressor."""
    data = held(data)
    tables = [
        loss_along_compression(model, data, c, points, forward=forward, loss=loss).assign(compressor=str(c))
        for c in looked(model, compressors, batches, (), forward, loss)
    ]
    return pd.concat(tables, ignore_index=True)


def loss_in_ball(
    model: nn.Module,
    data: Batches,
    radius: float = 0.5,
    points: int = 11,
    directions: int = 3,
    seed: int = 0,
    compressor: Compressor | Specification | str | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Evaluate the loss along several random filter-normalised directions, a slice each.

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample.
        radius: the slice runs from −radius to radius, in units of each filter's norm.
        points: per slice; odd includes the model itself.
        directions: how many; they are the sample that the spread in figures comes from.
        seed: direction i is drawn from seed + i.
        compressor: look around C(θ) instead of θ; the directions are normalised by its filters.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.
        batches: what a pruner looks at (`cram_bench.prune`), training data.

    Returns:
        Columns direction, a (signed distance in filter norms), loss (nats), accuracy (fraction).
    """
    steps = np.linspace(-number("radius", radius, 0), radius, integer("points", points, 1))
    integer("directions", directions, 1)
    ready(model)
    slices, data = [], held(data)
    with _at(model, compressor, batches, forward, loss):
        for index in range(directions):
            table = loss_on_grid(
                model, data, [random_direction(model, seed + index)], steps, forward=forward, loss=loss
            )
            slices.append(table.assign(direction=index))
    return pd.concat(slices, ignore_index=True)[["direction", "a", "loss", "accuracy"]]


def loss_in_plane(
    model: nn.Module,
    data: Batches,
    radius: float = 0.5,
    points: int = 9,
    seed: int = 0,
    compressor: Compressor | Specification | str | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Evaluate the loss on a square grid spanned by two random filter-normalised directions.

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample.
        radius: the square runs from −radius to radius on either axis, in units of each filter's norm.
        points: per axis.
        seed: of the first direction; the second is drawn from seed + 1.
        compressor: look around C(θ) instead of θ.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.
        batches: what a pruner looks at (`cram_bench.prune`), training data.

    Returns:
        Columns a, b (signed distances in filter norms), loss (nats), accuracy (fraction); points² rows.
    """
    steps = np.linspace(-number("radius", radius, 0), radius, integer("points", points, 1))
    ready(model)
    with _at(model, compressor, batches, forward, loss):
        pair = [random_direction(model, seed), random_direction(model, seed + 1)]
        return loss_on_grid(model, data, pair, steps, forward=forward, loss=loss)


def _at(
    model: nn.Module,
    compressor: Compressor | Specification | str | None,
    batches: Batches | None,
    forward: Forward | None,
    loss: Loss | None,
) -> AbstractContextManager[object]:
    if compressor is None:
        return nullcontext()
    return applied(model, looked(model, [compressor], batches, (), forward, loss)[0])
