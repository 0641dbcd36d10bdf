"""Sparse layers against dense ones in float32 and bfloat16, and against torch's CSR matrices: forward and backward."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cram_bench as cb
from benchmarks.timing import Ratio, in_turns
from cram_bench.deploy.swapping import SPARSE

BATCH = 128
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 3072→768": (lambda: nn.Linear(3072, 768), (3072,)),
    "3×3 convolution of 64 channels at 32²": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (64, 32, 32)),
    "3×3 convolution of 16 channels at 32²": (lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False), (16, 32, 32)),
    "3×3 convolution of 64 channels at 8²": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (64, 8, 8)),
}
Work = Callable[[], object]


def sparse_layers() -> Iterator[Ratio]:
    """Layers, then steps of ResNet-20, on one thread, in the time that this thread computed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for sparsity in SPARSITIES:
            for name, (build, size) in LAYERS.items():
                ours, peers = of_layer(build(), torch.randn(BATCH, *size), sparsity)
                yield from _against(name, sparsity, ours, peers)
        for sparsity in SPARSITIES:
            yield from _against("ResNet-20 step", sparsity, *of_step(sparsity))
        for sparsity in (0.9, 0.95):
            yield from _against(
                "ResNet-20 step of CrAM+, its second pass sparse,", sparsity, *of_step(sparsity, cram=True)
            )
    finally:
        torch.set_num_threads(before)


def _against(name: str, sparsity: float, ours: Work, peers: dict[str, Work]) -> Iterator[Ratio]:
    for peer, theirs in peers.items():
        line = f"{name} at {100 * sparsity:.0f} % over {peer}"
        yield in_turns(line, ours, theirs, kind="speed", unit="ms", clock=time.thread_time)


def of_layer(layer: nn.Module, x: Tensor, sparsity: float) -> tuple[Work, dict[str, Work]]:
    """Return forward and backward of a layer as sparse as that, and of its peers; all with the same numbers."""
    cb.compress.apply_(layer, cb.compress.Magnitude(sparsity))
    sparse = copy.deepcopy(layer)
    sparse.__class__ = SPARSE[type(layer)]
    dense = {"dense float32": _pass(layer, x)}
    half = copy.deepcopy(layer).bfloat16()
    dense["dense bfloat16"] = _pass(half, x.bfloat16())
    if x.ndim == 4:
        last = torch.channels_last
        dense["dense float32"] = faster(
            dense["dense float32"],
            _pass(copy.deepcopy(layer).to(memory_format=last), x.to(memory_format=last)),
        )
        dense["dense bfloat16"] = faster(
            dense["dense bfloat16"],
            _pass(copy.deepcopy(half).to(memory_format=last), x.bfloat16().to(memory_format=last)),
        )
        return _pass(sparse, x), dense
    csr = layer.weight.detach().to_sparse_csr().requires_grad_()
    turned = x.t().contiguous().requires_grad_()
    bias = layer.bias.detach()[:, None].requires_grad_()

    dy = torch.ones(len(csr), len(x))

    def by_csr() -> object:
        return torch.autograd.grad(csr @ turned + bias, (csr, turned, bias), dy)

    return _pass(sparse, x), {**dense, "torch CSR": by_csr}


def _pass(layer: nn.Module, x: Tensor) -> Work:
    """Return forward and backward of a layer; the gradient of its outputs is there before."""
    x = x.detach().requires_grad_()
    dy = torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)


def faster(one: Work, other: Work) -> Work:
    """Return which of two works takes less time, as the median of three."""
    times: list[list[float]] = [[], []]
    for _ in range(4):
        for work, found in zip((one, other), times, strict=True):
            start = time.thread_time()
            work()
            found.append(time.thread_time() - start)
    return one if statistics.median(times[0][1:]) < statistics.median(times[1][1:]) else other


def of_step(sparsity: float, cram: bool = False) -> tuple[Work, dict[str, Work]]:
    """Return a step on ResNet-20 with the layers that `swap_` takes at this sparsity, and one of its dense peers.

    A step of SGD with held masks, or of CrAM+, whose first pass is dense and whose second needs the gradient at
    nonzeros only.
    """
    torch.manual_seed(0)
    inputs, labels = torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % 10
    whole = cb.models.create("resnet20", 10)
    pruned = copy.deepcopy(whole)
    masks = cb.compress.apply_(pruned, cb.compress.Magnitude(sparsity))
    cb.deploy.swap_(pruned, inputs, repeats=3)
    in_last = inputs.to(memory_format=torch.channels_last)

    def step(model: nn.Module, x: Tensor, half: bool = False) -> Work:
        model.load_state_dict(whole.state_dict())
        base = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=5e-4)
        optimizer = (
            cb.optim.CrAM(model, base, cb.compress.Magnitude(sparsity), rho=0.2)
            if cram
            else cb.optim.HeldMasks(model, base, masks)
        )
        model.train()

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            return loss.detach()

        return lambda: optimizer.step(closure)

    def dense(half: bool) -> Work:
        last = copy.deepcopy(whole).to(memory_format=torch.channels_last)
        return faster(step(copy.deepcopy(whole), inputs, half), step(last, in_last, half))

    ours = step(pruned, inputs)
    if cram:  # whose first pass is dense, and so faster in the other memory format
        ours = step(pruned.to(memory_format=torch.channels_last), in_last)
    return ours, {"dense float32": dense(False), "dense bfloat16": dense(True)}
