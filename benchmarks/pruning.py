"""Pruners that look: their kernels against the published forms, and what they cost beside a training."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import cram_bench as cb
from benchmarks.timing import Ratio, in_turns
from cram_bench.curvature import obs
from cram_bench.prune import ExactOBS, Greedy, Pruner, SparseGPT
from cram_bench.recipes import recipe

ROWS, GRADIENTS, BLOCK = 400, 512, 64  # a tenth of ResNet-20
DAMPING = 0.03
LIMIT = 8 << 30


def pruning() -> Iterator[Ratio]:
    """Block inverses, ResNet-20 pruned against an epoch of SGD, and the memory of a ResNet-50."""
    from benchmarks.sections import Trainer, data

    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(GRADIENTS, ROWS, BLOCK, generator=generator)
    ours, theirs = (work(gradients) for work in (batched, rank_one))
    if float((ours - theirs).norm() / ours.norm()) > 1e-3:
        raise RuntimeError("the inverses differ")
    sides = (partial(work, gradients) for work in (batched, rank_one))
    yield in_turns("block Fisher inverse over rank-one updates", *sides, kind="speed", unit="ms", repeats=5)

    train, _ = data()
    epoch = Trainer("sgd", train)
    model = recipe("cifar10").build_model(train).eval()
    steps = 50_000 / (128 * 8)  # calls of an epoch
    for name, pruner in (
        ("greedy in blocks of 64", Greedy(block=64)),
        ("greedy in blocks of 192", Greedy()),
        ("exactobs", ExactOBS()),
    ):
        line = in_turns(
            f"{name}, ResNet-20, over an eightieth of an epoch",
            lambda pruner=pruner: pruner.fit(model, train).apply_(copy.deepcopy(model), 0.9),
            epoch,
            kind="cost",
            repeats=3,
        )
        over = [value / steps for value in (line.ratio, line.low, line.high)]
        yield Ratio(f"{name}, ResNet-20, over an epoch of sgd", *over, line.ours, line.peer * steps, "s")
    yield from one_linear()
    peak = _peak_of_a_resnet50()
    share = peak / LIMIT
    yield Ratio(
        "peak memory of greedy on ResNet-50 over 8 GiB", share, share, share, peak / 2**20, LIMIT / 2**20, "MiB"
    )


def batched(gradients: Tensor) -> Tensor:
    """Return (λI + (1/m) Σ g gᵀ)⁻¹ of every block from products of many gradients at once, inverted in float64."""
    count, rows, width = gradients.shape
    found = torch.zeros(rows, width, width)
    for part in gradients.split(64):
        together = part.transpose(0, 1)
        found.baddbmm_(together.mT, together)
    matrices = found.double() / count
    matrices.diagonal(dim1=-2, dim2=-1).add_(DAMPING)
    return obs.inverse(matrices)


def rank_one(gradients: Tensor) -> Tensor:
    """Return the same by a Sherman-Morrison update a gradient, as oBERT has it (arXiv 2203.07259, equation 10)."""
    count, rows, width = gradients.shape
    found = torch.eye(width).expand(rows, width, width) / DAMPING
    for gradient in gradients:
        moved = torch.bmm(found, gradient[..., None])
        found = found - moved @ moved.mT / (count + (gradient[:, None] @ moved))
    return found.double()


def one_linear() -> Iterator[Ratio]:
    """One Linear of 768 to 768 at 90 %, 4,096 inputs of falling variance, beside llm-compressor's SparseGPT.

    The squared error of its outputs, and the time with collecting the inputs; where it is installed (tried: 0.14).
    """
    theirs = _llm_compressor()
    if theirs is None:
        sys.stderr.write("llm-compressor is not installed: its rows are left out\n")
        return
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(768, 768, generator=generator) * torch.linspace(1, 0.02, 768)[:, None]
    inputs = torch.randn(4096, 768, generator=generator) @ mixing
    layer = torch.nn.Linear(768, 768)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(768, 768, generator=generator) / 28)

    def public() -> Tensor:
        hessian = theirs.make_empty_hessian(layer)
        hessian, _ = theirs.accumulate_hessian(inputs, layer, hessian, 0)
        return theirs.sparsify_weight(layer, {layer: hessian}, 0.9, 0, 0, 128, 0.01, False)[1]

    def own(pruner: Pruner) -> Tensor:
        pruned = copy.deepcopy(layer)
        pruner.fit(pruned, [(inputs, torch.zeros(len(inputs), dtype=torch.long))]).apply_(pruned, 0.9)
        return pruned.weight.detach()

    def error(weight: Tensor) -> float:
        outputs = inputs @ (weight - layer.weight.detach()).mT
        return float(outputs.square().sum() / (inputs @ layer.weight.detach().mT).square().sum())

    with torch.no_grad():
        reference = error(public())
    for pruner in (SparseGPT(samples=4096, ends="pruned"), ExactOBS(samples=4096, ends="pruned")):
        ratio = error(own(pruner)) / reference
        name = f"{pruner.kind}, a Linear of 768 to 768 at 90 %, over llm-compressor's SparseGPT"
        yield Ratio(f"squared error of outputs, {name}", ratio, ratio, ratio, ratio * reference, reference, "")
        yield in_turns(name, partial(own, pruner), torch.no_grad()(public), kind="cost", repeats=3)


def _llm_compressor() -> ModuleType | None:
    """Return the file that holds its SparseGPT; the package imports much that a comparison does not need."""
    package = find_spec("llmcompressor")
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent / "modifiers/pruning/sparsegpt/sgpt_sparsify.py"
    spec = spec_from_file_location("sgpt_sparsify", file)
    if spec is None or spec.loader is None or not file.is_file():
        return None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _peak_of_a_resnet50() -> int:
    """Return the peak resident memory of a process that prunes a ResNet-50 of 25 million weights, in bytes."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _prune_a_resnet50() -> None:
    torch.manual_seed(0)
    model = cb.models.create("torchvision:resnet50", 1000, 3, 64)
    examples = [(torch.randn(8, 3, 64, 64), torch.randint(1000, (8,)))] * 4
    masks = cb.prune.apply_(model, "greedy(gradients=16,batch=2,block=64)@0.9", examples)
    assert abs(masks.sparsity - 0.9) < 1e-6
    sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    _prune_a_resnet50()
