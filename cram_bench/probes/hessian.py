"""Second order: eigenvalues, trace and spectral density of the Hessian or the Gauss–Newton matrix of the loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel  # only this one has second derivatives

from cram_bench.checks import integer, labels_within
from cram_bench.data import AT_ONCE, Batches
from cram_bench.outputs import rows_of
from cram_bench.probes.common import (
    NO_GRADIENT,
    Forward,
    Loss,
    Problem,
    classes_of,
    held,
    probing,
    tensors_of,
    trainable,
)

Kind = Literal["hessian", "gauss-newton"]
_TOLERANCE = 1e-4  # relative, of Lanczos; looser ones were seen to skip an eigenvalue
_WEIGHTS = 2**25  # of all vectors in one product
_KAPPA, _MARGIN = 3.0, 0.05  # of the density: width of the kernels, room beyond the ends (Papyan, appendix D.2)
_TAILS = 5.0  # standard deviations of a kernel that have room at least: one in a million is beyond


def curvature(
    model: nn.Module,
    data: Batches,
    top: int = 1,
    kind: Kind = "hessian",
    vectors: int = 10,
    parts: int = 4,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Estimate the largest eigenvalues and the trace of the loss's curvature over all parameters that are not frozen.

    H = ∇²L(θ) of the mean cross-entropy, or the Gauss–Newton matrix G = mean Jᵀ (diag p − p pᵀ) J, which leaves out
    the curvature of the network itself and is positive semi-definite. Eigenvalues by Lanczos iteration (SciPy's
    ``eigsh``, relative tolerance 1e-4) on products with all the data; the trace by Hutchinson's estimate, the mean
    of vᵀHv over random signs v. Hessian-vector products are by double backpropagation, those with G by curvlinops.

    Args:
        model: any torch classifier, in eval mode while it is probed, and left as it was found.
        data: a fixed sample.
        top: how many of the algebraically largest eigenvalues.
        kind: ``hessian`` or ``gauss-newton``.
        vectors: random sign vectors for the trace, for each part.
        parts: equal parts of the data that the error comes from, at least 2: example i is in part i mod `parts`, so
            that data in the order of their classes are spread over them.
        seed: of the random vectors.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.

    Returns:
        Rows of quantity (``eigenvalue`` or ``trace``), rank (1 for the largest eigenvalue), value, error. The value of
        an eigenvalue is that of all the data, λ = vᵀHv; its error is the standard error of vᵀHv over the parts at the
        same eigenvector v, whose mean is λ up to the samples that the equal parts leave over. The trace is the mean
        over parts, each with vectors of its own.

    Raises:
        ValueError: `kind` is unknown, `parts` or `top` too small, there are fewer samples than parts, or no parameter
            asks for a gradient.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {kind!r}")
    for name, value, least in (("top", top, 1), ("vectors", vectors, 1), ("parts", parts, 2)):
        integer(name, value, least)
    integer("top", top, 1, sum(p.numel() for p in trainable(model)))
    with _quiet(), probing(model), sdpa_kernel(SDPBackend.MATH):
        problem = Problem(model, data, forward, loss)
        whole = _batches(problem)
        pieces = _split(whole, parts)
        operators = [_operator(problem, piece, kind) for piece in pieces]
        values, directions = _eigenpairs(_operator(problem, whole, kind), top, seed)
        of_parts = np.array([(directions * (o.to_scipy() @ directions)).sum(0) for o in operators])
        # Many vectors in one product are faster; with G it keeps activations for every pair of vector and image.
        most = max(len(labels) for piece in pieces for _, labels in piece)
        pairs = 2 * AT_ONCE // most if kind == "gauss-newton" else vectors
        columns = max(1, min(pairs, _WEIGHTS // operators[0].shape[1]))
        traces = np.array([_trace(operator, vectors, seed + i, columns) for i, operator in enumerate(operators)])
    errors = of_parts.std(0, ddof=1) / np.sqrt(parts)
    rows = [("eigenvalue", i + 1, float(values[i]), float(errors[i])) for i in range(top)]
    rows.append(("trace", 0, float(traces.mean()), float(traces.std(ddof=1) / np.sqrt(parts))))
    return pd.DataFrame(rows, columns=["quantity", "rank", "value", "error"])


def spectral_density(
    model: nn.Module,
    data: Batches,
    kind: Kind = "hessian",
    points: int = 256,
    lanczos: int = 48,
    repeats: int = 3,
    parts: int = 4,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Estimate the density of the curvature's eigenvalues by stochastic Lanczos quadrature (Papyan, JMLR 21:165, 2020).

    Args:
        model: any torch classifier; left as it was found.
        data: a fixed sample.
        kind: ``hessian`` or ``gauss-newton``.
        points: where the density is given.
        lanczos: Lanczos vectors a repeat.
        repeats: starting vectors that are averaged over.
        parts: equal parts of the data that the error comes from, as in `curvature`; at least 2.
        seed: of the starting vectors.
        forward, loss: how outputs are read, and what is measured in place of the cross-entropy:
            `cram_bench.probes.common`.

    Returns:
        Columns eigenvalue, the middles of equal intervals; density, the mean over an interval, so that their sum times
        the step is 1; and error, the standard error of the density over the parts, each with starting vectors of its
        own. A part has fewer samples than all the data, and so a wider spectrum; what of it lies beyond is not shown.
        The range goes a twentieth beyond the outermost Ritz values of all the data, or five standard deviations of the
        kernel, σ = (λ_max − λ_min)/(m − 1)/√(8 ln 3) for m Lanczos vectors, if that is more. Eigenvalues within σ of
        zero, which most are, lie on both sides of it: for their signs take more Lanczos vectors.

    Raises:
        ValueError: as `curvature`; or there is one parameter to train, or no curvature at all.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {kind!r}")
    for name, value, least in (
        ("points", points, 1),
        ("lanczos", lanczos, 2),
        ("repeats", repeats, 1),
        ("parts", parts, 2),
    ):
        integer(name, value, least)
    data = held(data)  # before the seed: a loader's order must not come from it
    with _quiet(), probing(model), sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng():
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        torch.manual_seed(seed)
        size = sum(p.numel() for p in trainable(model))
        if size < 2:
            raise ValueError(f"a density needs at least 2 parameters to train, and {type(model).__name__} has {size}")
        problem = Problem(model, data, forward, loss)
        whole = _batches(problem)
        runs = []
        with suppress(torch.linalg.LinAlgError):  # where there are NaNs; at some sizes torch passes them on
            for piece in (whole, *_split(whole, parts)):  # an operator at a time: it may hold a graph
                operator = _operator(problem, piece, kind)
                runs.append([fast_lanczos(operator, min(lanczos, size)) for _ in range(repeats)])
    found = [[(values.cpu().double(), vectors[0].cpu().double() ** 2) for values, vectors in run] for run in runs]
    if len(runs) <= parts or not all(nodes.isfinite().all() for run in found for nodes, _ in run):
        raise ValueError(
            f"the {kind} of the loss is zero or not finite on the data or a part of them: it has no density"
        )
    # Lanczos finds the ends of a spectrum first. Those of all the data decide on grid and kernel, for the parts too.
    ends = [float(nodes[which]) for which in (0, -1) for nodes, _ in found[0]]
    low, high = min(ends), max(ends)
    width = (
        max((high - low) / (min(lanczos, size) - 1), 1e-9 * max(abs(low), abs(high))) / (8 * math.log(_KAPPA)) ** 0.5
    )
    room = max(_MARGIN * (high - low), _TAILS * width)
    edges = torch.linspace(low - room, high + room, points + 1, dtype=torch.float64, device="cpu")
    density, *of_parts = (torch.stack([_smoothed(*each, width, edges) for each in run]).mean(0) for run in found)
    error = torch.stack(of_parts).std(0) / parts**0.5
    return pd.DataFrame({"eigenvalue": (edges[1:] + edges[:-1]) / 2, "density": density, "error": error})


def _smoothed(nodes: Tensor, weights: Tensor, width: float, edges: Tensor) -> Tensor:
    """Return the mean density between edges of weights at nodes, under Gaussian kernels of deviation `width`."""
    below = torch.special.ndtr((edges[:, None] - nodes) / width) @ weights
    return below.diff() / edges.diff()


class _Outputs(nn.Module):
    """The model as curvlinops takes it: a module that returns what the loss is computed from."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model, self.problem = problem.model, problem

    def forward(self, inputs: Any) -> Any:
        return self.problem.outputs(inputs)


class _Mean(nn.Module):
    """The mean loss of a batch; curvlinops reads `reduction`."""

    reduction = "mean"

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, outputs: Any, targets: Tensor) -> Tensor:
        return self.problem.mean_of(outputs, targets)


def _operator(problem: Problem, data: list[tuple[Any, Tensor]], kind: Kind) -> Any:
    from curvlinops import GGNLinearOperator

    from cram_bench.probes.double_backward import DoubleBackwardHessian

    parameters = trainable(problem.model)
    for what, found in (("type", {p.dtype for p in parameters}), ("device", {p.device for p in parameters})):
        if len(found) > 1:
            several = " and ".join(sorted(str(each).removeprefix("torch.") for each in found))
            raise ValueError(
                f"curvature needs weights of one {what}, and these are {several}: probe a copy, or freeze some"
            )
    build = DoubleBackwardHessian if kind == "hessian" else GGNLinearOperator
    return build(
        _Outputs(problem),
        _Mean(problem),
        parameters,
        data,
        check_deterministic=False,
        batch_size_fn=lambda inputs: len(next(tensors_of(inputs))),
    )


def _eigenpairs(operator: Any, top: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `top` algebraically largest eigenvalues, largest first, and their vectors."""
    from scipy.sparse.linalg import eigsh

    matrix = operator.to_scipy()
    if matrix.shape[0] <= max(20, 2 * top + 1):  # written out: Lanczos needs room
        values, vectors = np.linalg.eigh(matrix @ np.eye(matrix.shape[0], dtype=matrix.dtype))
        values, vectors = values[-top:], vectors[:, -top:]
    else:
        start = np.random.default_rng(seed).standard_normal(matrix.shape[0]).astype(matrix.dtype)
        values, vectors = eigsh(matrix, k=top, which="LA", tol=_TOLERANCE, v0=start)
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order]


def _trace(operator: Any, vectors: int, seed: int, columns: int) -> float:
    """Return the mean of vᵀHv over random sign vectors v (Hutchinson, 1990), `columns` of them in one product."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size = operator.shape[1]
    total = 0.0
    for start in range(0, vectors, columns):
        signs = torch.empty(size, min(columns, vectors - start), dtype=operator.dtype, device="cpu")
        for column in signs.unbind(1):
            column.copy_(torch.randint(2, (size,), generator=generator, device="cpu")).mul_(2).sub_(1)
        signs = signs.to(operator.device)
        total += float((signs * (operator @ signs)).sum())
    return total / vectors


def _batches(problem: Problem) -> list[tuple[Any, Tensor]]:
    batches = list(problem)
    if not batches:
        raise ValueError("the data to probe on are empty")
    with torch.enable_grad():
        inputs, targets = batches[0]
        outputs = problem.outputs(rows_of(inputs, slice(1)))
        if problem.loss is None:
            for _, labels in batches:
                labels_within(labels, classes_of(outputs).shape[1])
        if not problem.mean_of(outputs, targets[:1]).requires_grad:
            raise ValueError(NO_GRADIENT)
    return batches


def _split(batches: list[tuple[Any, Tensor]], parts: int) -> list[list[tuple[Any, Tensor]]]:
    """Deal the data out to equal parts, one example after the other; what is left over at the end is in none."""
    count = sum(len(labels) for _, labels in batches)
    if count < parts:
        raise ValueError(f"{count} samples do not make {parts} parts")
    size = count // parts
    pieces: list[list[tuple[Any, Tensor]]] = [[] for _ in range(parts)]
    start = 0
    for inputs, labels in batches:
        end = min(len(labels), size * parts - start)
        for index, piece in enumerate(pieces):
            dealt = slice((index - start) % parts, max(0, end), parts)
            if len(labels[dealt]):
                piece.append((rows_of(inputs, dealt), labels[dealt]))
        start += len(labels)
    return pieces


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what a user can do nothing about: torch.jit.script is deprecated, an operator has no batching rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "There is a performance drop because", UserWarning)
        try:
            yield
        except RuntimeError as error:  # torch.func, which only the Gauss–Newton products use
            if "mutate a captured Tensor" not in str(error):
                raise
            raise ValueError(
                "gauss-newton needs a network whose forward changes no buffer in place: take kind='hessian'"
            ) from error
