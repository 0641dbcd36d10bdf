"""How much the loss rises where SAM and CrAM look."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import nn

from cram_bench.checks import integer, items, number
from cram_bench.compress import Compressor, Masks, apply_
from cram_bench.data import Batches
from cram_bench.preserve import preserved
from cram_bench.probes.common import Forward, Loss, Problem, looked, probing, trainable, tuning_data
from cram_bench.probes.sparsity import reported
from cram_bench.prune import Specification, parse


def sam_sharpness(
    model: nn.Module,
    data: Batches,
    rho: float | Sequence[float] = 0.05,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Measure the rise of the loss at one normalised ascent step: L(θ + ρ g/‖g‖₂) − L(θ) (arXiv 2010.01412, eq. 2).

    Args:
        model: any torch classifier; left as it was found. BatchNorm normalises by its running statistics.
        data: a fixed sample; g is the gradient over all of it.
        rho: radius or radii ρ in Euclidean distance between weights. Frozen parameters stand still.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.

    Returns:
        Columns rho, loss (at θ, nats), sharpness (rise of the loss, nats).
    """
    several = [rho] if isinstance(rho, (int, float)) else items("rho", rho, "numbers >= 0")
    radii = [number("rho", radius, 0) for radius in several]
    rows = []
    with probing(model):
        problem = Problem(model, data, forward, loss)
        here, gradient = problem.gradient()
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient.values()]))
        parameters = dict(model.named_parameters())
        start = {name: parameters[name].detach().clone() for name in gradient}
        with torch.no_grad():
            for radius in radii:
                for name, g in gradient.items():
                    parameters[name].copy_(start[name]).add_(g * (radius / norm.clamp_min(1e-12)))
                rows.append((radius, here, problem.evaluate()["loss"] - here))
    return pd.DataFrame(rows, columns=["rho", "loss", "sharpness"])


def sharpness_over_radii(
    model: nn.Module,
    data: Batches,
    radii: Sequence[float],
    directions: int = 5,
    steps: int = 5,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Measure the rise of the loss on spheres around the weights: on average, and at worst.

    Average: L(θ + ρ u) − L(θ) for random u, uniform on the unit sphere over all parameters that are not frozen. Worst:
    the highest loss found by projected gradient ascent inside ‖δ‖₂ ≤ ρ, δ ← Π(δ + (2ρ/steps) ∇L(θ + δ)/‖∇L(θ + δ)‖), a
    lower bound of the maximum; one step and no more is `sam_sharpness` for a step of length ρ.

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample; gradients are over all of it.
        radii: ρ, in Euclidean distance between weights.
        directions: random directions for the average.
        steps: ascent steps for the worst case.
        seed: of the directions.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.

    Returns:
        Columns kind (``average`` or ``worst``), rho, direction (0 for the worst), loss (at θ, nats), rise (nats).
    """
    radii = [number("a radius", radius, 0) for radius in items("radii", radii, "numbers >= 0")]
    integer("directions", directions, 0)
    integer("steps", steps, 1)
    rows = []
    with probing(model):
        trainable(model)
        problem = Problem(model, data, forward, loss)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in parameters.items()}
        here = problem.evaluate()["loss"]

        @torch.no_grad()
        def move(offset: dict[str, torch.Tensor]) -> None:
            for name, value in offset.items():
                parameters[name].copy_(start[name]).add_(value)

        generator = torch.Generator("cpu").manual_seed(seed)
        for direction in range(directions):
            draw = {
                name: torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p)
                for name, p in start.items()
            }
            length = _length(draw)
            for radius in radii:
                move({name: value * (radius / length) for name, value in draw.items()})
                rows.append(("average", float(radius), direction, here, problem.evaluate()["loss"] - here))
        for radius in radii:
            offset = {name: torch.zeros_like(p) for name, p in start.items()}
            highest = here
            for _ in range(steps):
                move(offset)
                found, gradient = problem.gradient()
                highest = max(highest, found)
                stride = 2 * radius / steps / max(_length(gradient), 1e-12)
                offset = {n: v + stride * gradient[n] if n in gradient else v for n, v in offset.items()}
                shrink = min(1.0, radius / max(_length(offset), 1e-12))
                offset = {name: value * shrink for name, value in offset.items()}
            move(offset)
            highest = max(highest, problem.evaluate()["loss"])
            rows.append(("worst", float(radius), 0, here, highest - here))
    return pd.DataFrame(rows, columns=["kind", "rho", "direction", "loss", "rise"])


def _length(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([value.double().norm() for value in tensors.values()]).norm())


def cram_gap(
    model: nn.Module,
    data: Batches,
    compressors: Sequence[Compressor | Specification | str],
    rho: float = 0.2,
    calibration: Batches | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Measure the CrAM gap L(C_k(θ + ρ g)) − L(θ).

    Its first term is what CrAM minimises (arXiv 2207.14200, eq. 2 and algorithm 1); taking L(θ) off makes models of
    different loss comparable.

    The ascent ρ g is not normalised and moves every parameter that is not frozen, as in training. Its two parts alone
    stand beside it: with ρ = 0 the gap is the price of one-shot pruning; with nothing pruned it is what the ascent
    costs.

    Args:
        model: any torch classifier; left as it was found. BatchNorm normalises by its running statistics.
        data: a fixed sample; g is the gradient over all of it.
        compressors: operators or their specifications. A pruner that looks does so at the very weights that it prunes,
            twice a row: at θ + ρ g and at θ.
        rho: ascent radius ρ, in units of weight per unit of gradient.
        calibration: data for BatchNorm tuning at C_k(θ + ρ g); none if not given. Untuned, a gap is to a large part
            that of BatchNorm's statistics, which are those of θ.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.
        batches: what a pruner looks at (`cram_bench.prune`), training data; `calibration` if not given.

    Returns:
        A row per compressor: pattern, sparsity (reached, a fraction), rho, loss (at θ, nats), gap (nats), pruning_gap:
        the same at ρ = 0, L(C_k(θ)) − L(θ), and ascent_gap: the same with nothing pruned, L(θ + ρ g) − L(θ); all by the
        same sample, and tuned alike.
    """
    chosen = [parse(c) for c in items("compressors", compressors, "compressors such as 'global@0.9'")]
    number("rho", rho, 0)
    batches = calibration if batches is None else batches
    calibration = tuning_data(calibration)
    rows = []
    with probing(model):
        problem = Problem(model, data, forward, loss)
        here, gradient = problem.gradient()

        def rise(radius: float, compressor: Compressor | Specification | None) -> tuple[float, Masks]:
            with preserved(model):
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if name in gradient:
                            parameter.add_(gradient[name], alpha=radius)
                masks = Masks({})
                if compressor is not None:
                    masks = apply_(model, looked(model, [compressor], batches, (), forward, loss)[0])
                if calibration is not None:
                    problem.tune(calibration)
                return problem.evaluate()["loss"] - here, masks

        ascent, _ = rise(rho, None)
        for compressor in chosen:
            (gap, masks), (pruning, _) = rise(rho, compressor), rise(0.0, compressor)
            rows.append((compressor.pattern, reported(compressor, masks), rho, here, gap, pruning, ascent))
    return pd.DataFrame(rows, columns=["pattern", "sparsity", "rho", "loss", "gap", "pruning_gap", "ascent_gap"])
