"""Seconds on the device at hand: of a network, and of every width that its layers can have."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn

from cram_bench.checks import integer, unknown
from cram_bench.curvature.samples import Forward
from cram_bench.deploy.structure import shrink
from cram_bench.outputs import fitting, tensors_of
from cram_bench.preserve import modes_kept
from cram_bench.prune.structured import structures

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Call = tuple[tuple[Any, ...], dict[str, Any]]


def latency(
    model: nn.Module,
    inputs: Any,
    precision: Literal["float32", "bfloat16"] = "float32",
    repeats: int = 11,
    forward: Forward | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> pd.DataFrame:
    """Measure what `cram_bench.prune.ziplm` needs to know: seconds of every option of a network's structures.

    A layer or block runs alone, with what the network calls it with on `inputs`: at every width that one of its
    structures can have, the others dropped, and with all dropped. An option's seconds are the difference, so what is
    dropped takes none, and what cannot be removed (norms, shortcuts, embeddings, the head) is in the row ``fixed``,
    the time of the network with all structures dropped. Layers that are alike are measured once. All that is compared
    is run in turns, so that a machine that slows down slows all, and the median is taken after a first run that does
    not count.

    Args:
        model: any torch model with structures, on the device to measure; left as it was found.
        inputs: a batch as the model takes it: how many examples, and how many tokens each, is what is measured.
        precision: ``float32``, or ``bfloat16`` for weights and inputs of that type.
        repeats: runs that count.
        forward: (model, inputs) → anything, to run the network; its call on the inputs by default.
        clock: seconds; called before and after each run.

    Returns:
        A row an option: structure, kind, units (that stay), seconds, and, in all rows alike, batch, length (tokens; 0
        for what is no text), precision, device, threads. The rows of kind ``fixed`` and ``dense`` are the whole
        network without and with all units. Write it with ``to_csv``; `pandas.read_csv` reads it for later calls.

    Raises:
        ValueError: the model has no structures, or precision is unknown.

    >>> from cram_bench import models
    >>> table = latency(models.create("resnet20", 10), torch.zeros(2, 3, 32, 32), repeats=1)
    >>> len(table), table["units"][table["structure"] == "layer1.0.channels"].tolist()
    (83, [16, 14, 12, 10, 8, 6, 4, 2, 0])
    """
    integer("repeats", repeats, 1)
    if precision not in _TYPES:
        raise ValueError(unknown("precision", precision, list(_TYPES)))
    found = structures(model)
    rows: list[dict[str, Any]] = []
    whole = copy.deepcopy(model).eval().to(_TYPES[precision])
    inputs = fitting(whole)(inputs)
    first = next(tensors_of(inputs))
    device, text = first.device, first.ndim == 2 and not first.is_floating_point()
    with torch.inference_mode():
        run = forward or (lambda network, x: network(x))
        calls = _calls(whole, sorted({each.holder for each in found.values()}), lambda: run(whole, inputs))
        both = [partial(run, network, inputs) for network in (whole, shrink(whole, dict.fromkeys(found, ())))]
        dense, fixed = medians(both, device, repeats, clock)
        rows.append({"structure": "dense", "kind": "dense", "units": 0, "seconds": dense})
        rows.append({"structure": "fixed", "kind": "fixed", "units": 0, "seconds": fixed})
        known: dict[Any, dict[str, list[float]]] = {}
        for each in found.values():
            holder, call = whole.get_submodule(each.holder), calls[each.holder]
            alike = _likeness(holder, call)
            if alike not in known:
                known[alike] = _layer(holder, call, device, repeats, clock)
            for units, seconds in zip(each.options, known[alike][each.kind], strict=True):
                rows.append({"structure": each.name, "kind": each.kind, "units": units, "seconds": seconds})
    return pd.DataFrame(rows).assign(
        batch=len(first),
        length=first.shape[1] if text else 0,
        precision=precision,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
    )


def timed(models: Sequence[nn.Module], inputs: Any, repeats: int = 21) -> list[float]:
    """Return the median seconds of networks on a batch, run in turns after a first run that does not count.

    Each gets the batch on its device and in its type, and runs in eval mode without gradients.
    """
    integer("repeats", repeats, 1)
    batches = [fitting(model)(inputs) for model in models]
    device = next(tensors_of(batches[0])).device
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(modes_kept(model))
            model.eval()
        stack.enter_context(torch.inference_mode())
        return medians([partial(each, x) for each, x in zip(models, batches, strict=True)], device, repeats)


def _layer(
    holder: nn.Module, call: Call, device: torch.device, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the seconds of all options of the structures of a layer, by kind."""
    own = structures(holder)
    options = [(name, units) for name, each in own.items() for units in each.options if units]
    variants = [shrink(holder, dict.fromkeys(own, ()))]
    variants += [shrink(holder, dict.fromkeys(own, ()) | {name: range(units)}) for name, units in options]
    least, *others = medians([partial(each, *call[0], **call[1]) for each in variants], device, repeats, clock)
    seconds = {option: max(0.0, other - least) for option, other in zip(options, others, strict=True)}
    return {each.kind: [seconds.get((name, units), 0.0) for units in each.options] for name, each in own.items()}


def medians(
    runs: Sequence[Callable[[], Any]],
    device: torch.device,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the median seconds of each of several runs, made in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, seen in zip(runs, times, strict=True):
            _wait(device)
            start = clock()
            run()
            _wait(device)
            if turn:  # the first one allocates, chooses kernels …
                seen.append(clock() - start)
    return [statistics.median(seen) for seen in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _calls(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> dict[str, Call]:
    """Return what layers are called with. A cache of keys and values, which would grow, is left out."""
    calls: dict[str, Call] = {}

    def seen(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {key: _uncached(value) for key, value in kwargs.items()}
            unnamed = tuple(_uncached(value) for value in args)
            calls.setdefault(name, (unnamed, named))

        return see

    hooks = [model.get_submodule(name).register_forward_pre_hook(seen(name), with_kwargs=True) for name in names]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in names if name not in calls]:
        raise ValueError(f"these inputs do not run {missing[0]}, so that its time is not known")
    return calls


def _uncached(value: Any) -> Any:
    return None if type(value).__name__.endswith("Cache") else value


def _likeness(holder: nn.Module, call: Call) -> Any:
    """Return what is the same for layers that take the same time."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in holder.state_dict().items())
    given = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of([list(call[0]), call[1]]))
    return type(holder), shapes, given
