"""Exchange the layers of a network for sparse ones where these are faster, and back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cram_bench.checks import initialised, instance, integer
from cram_bench.compress.names import computed
from cram_bench.deploy.convolution import SparseConv2d
from cram_bench.deploy.linear import SparseLinear
from cram_bench.deploy.memory import memory
from cram_bench.deploy.normalisation import ChannelwiseBatchNorm2d
from cram_bench.preserve import preserved

if TYPE_CHECKING:
    import pandas as pd

SPARSE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
"""Which layer takes the place of which. A subclass of somebody else's may compute anything, and is left."""

NORMS: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm2d: ChannelwiseBatchNorm2d}
"""The same for what stands behind sparse convolutions, whose outputs are contiguous images."""

COLUMNS = ("layer", "kind", "weights", "sparsity", "dense_ms", "sparse_ms", "speedup", "taken", "reason")


def swap_(model: nn.Module, sample: Any, *, backward: bool = True, repeats: int = 5) -> pd.DataFrame:
    """Let every linear layer and convolution of `model` that is faster so compute at its nonzeros only, in place.


    Each is timed on what it gets as input when the model runs on `sample`, dense and sparse in turns, on as many
    threads as torch has now. It is taken if the median of the sparse runs is the smaller. A layer stays the same object
    with the same parameters, hooks and name: optimizers, masks, checkpoints and probes go on. Its outputs differ by
    rounding, and a weight that is zero gets the gradient 0. Weights may change later, also which of them are zero.

    Then `torch.nn.BatchNorm2d` is tried in the same way, where `backward` is wanted and a convolution was taken: sparse
    convolutions give contiguous images, with which torch's is slow and `ChannelwiseBatchNorm2d` is not. Outputs and
    gradients of both lie in memory that is kept from step to step, up to 512 MiB of it unused, until `dense_`.

    Args:
        model: any torch model.
        sample: a batch of inputs, as the model takes it; of the size that is meant for use, for that decides.
        backward: time forward and backward, as in training; else the forward pass alone.
        repeats: runs of each, after one that is not counted.

    Returns:
        A row per linear layer and convolution, then per BatchNorm that was tried: layer (its name), kind, weights,
        sparsity (fraction of zeros), dense_ms and sparse_ms (medians, in milliseconds; NaN where nothing was timed),
        speedup (dense over sparse), taken, and reason.

    Raises:
        TypeError: `model` is no torch model.
        ValueError: `repeats` is less than 1, or a lazy weight has no shape yet.
    """
    import pandas as pd

    instance("model", model, nn.Module, "a torch model")
    initialised(model)
    integer("repeats", repeats, 1)
    rows = _swapped(model, sample, SPARSE, backward, repeats)
    if backward and any(isinstance(module, SparseConv2d) for module in model.modules()):
        rows += _swapped(model, sample, NORMS, backward, repeats)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _swapped(
    model: nn.Module, sample: Any, pairs: dict[type[nn.Module], type[nn.Module]], backward: bool, repeats: int
) -> list[tuple[Any, ...]]:
    """Exchange layers of some kinds where that is faster; return their rows."""
    hidden = {id(tensor.module) for tensor in computed(model)}
    done = tuple(pairs.values())
    layers: dict[str, Any] = {
        name: m for name, m in model.named_modules() if isinstance(m, tuple(pairs)) and not isinstance(m, done)
    }
    refused = {name: _refusal(layer, id(layer) in hidden, pairs) for name, layer in layers.items()}
    inputs = _inputs(model, sample, [layer for name, layer in layers.items() if not refused[name]])
    rows: list[tuple[Any, ...]] = []
    for name, layer in layers.items():
        weight = layer.weight
        zeros = 0.0 if weight is None or not weight.numel() else 1 - float((weight != 0).float().mean())
        row = (name, type(layer).__name__, 0 if weight is None else weight.numel(), zeros)
        if not refused[name] and layer not in inputs:
            refused[name] = "the sample does not run it"
        if refused[name]:
            rows.append((*row, float("nan"), float("nan"), float("nan"), False, refused[name]))
            continue
        dense, sparse = _medians(layer, inputs.pop(layer), pairs[type(layer)], backward, repeats)
        taken = sparse < dense
        if taken:
            layer.__class__ = pairs[type(layer)]
        ratio = dense / sparse
        ours, theirs = ("sparse", "dense") if pairs is SPARSE else ("channel by channel", "torch's")
        reason = f"{ours} is {ratio:.2f} × as fast" if taken else f"{theirs} is {1 / ratio:.2f} × as fast"
        rows.append((*row, 1000 * dense, 1000 * sparse, ratio, taken, reason))
    return rows


def dense_(model: nn.Module) -> list[str]:
    """Let all layers of `model` compute densely again, bit for bit as before `swap_`; return whose turn it was.

    What memory sparse layers kept goes back to the system.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> model[0].__class__ = SparseLinear
    >>> dense_(model), type(model[0]).__name__, dense_(model)
    (['0'], 'Linear', [])
    """
    instance("model", model, nn.Module, "a torch model")
    dense = {other: plain for plain, other in (SPARSE | NORMS).items()}
    found = [(name, module) for name, module in model.named_modules() if type(module) in dense]
    for _, module in found:
        module.__class__ = dense[type(module)]
        module.__dict__.pop("_products", None)
    memory().clear()
    return [name for name, _ in found]


def _refusal(layer: nn.Module, hidden: bool, pairs: dict[type[nn.Module], type[nn.Module]]) -> str:
    """Say why a layer is not tried; nothing where it is."""
    if hidden:
        return "its weight is computed from other parameters"
    if type(layer) not in pairs:
        return f"{type(layer).__name__} may compute otherwise than the layer that it comes from"
    if type(layer) in NORMS and not layer.training:
        return "it does not train"
    weight: Tensor | None = layer.weight  # type: ignore[assignment]
    if weight is None:
        return ""
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}, and the kernel is for the CPU"
    if weight.dtype is not torch.float32:
        return f"its weights are {str(weight.dtype).removeprefix('torch.')}, and the kernel is for float32"
    if type(layer) in SPARSE and bool((weight != 0).all()):
        return "no weight is zero"
    return ""


def _inputs(model: nn.Module, sample: Any, layers: list[nn.Module]) -> dict[nn.Module, Tensor]:
    """Run a model as it is, and return what each layer got first; the model is left as it was found."""
    seen: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            seen.setdefault(layer, given[0].detach().requires_grad_(given[0].requires_grad))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with preserved(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
            model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _medians(layer: nn.Module, x: Tensor, other: type[nn.Module], backward: bool, repeats: int) -> tuple[float, float]:
    """Return seconds of the layer as it is and as the other kind; it is left as it was found."""
    plain = type(layer)

    def run(kind: type[nn.Module]) -> Callable[[], None]:
        def once() -> None:
            layer.__class__ = kind
            with torch.set_grad_enabled(backward):
                y = kind.forward(layer, x)  # type: ignore[arg-type]  # hooks are not part of it
            if backward and asked:
                torch.autograd.grad(y, asked, torch.ones_like(y))

        return once

    asked = [t for t in (x, *layer.parameters(recurse=False)) if t.requires_grad]
    try:
        with preserved(layer):  # torch's BatchNorm changes its statistics and does not say so
            return medians([run(plain), run(other)], repeats)
    finally:
        layer.__class__ = plain
        layer.__dict__.pop("_products", None)


def medians(works: list[Callable[[], None]], repeats: int) -> Any:
    """Return the median seconds of each work, run in turns, after one run of each that is not counted.

    On one thread that is what the thread computed, whatever else the machine does meanwhile.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, found in zip(works, times, strict=True):
            start = clock()
            work()
            found.append(clock() - start)
    return [statistics.median(found) for found in times]
