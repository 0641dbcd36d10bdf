"""Preconditioned optimizers: a step over SGD's, what the ring alone takes, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import cram_bench as cb
from benchmarks.timing import Ratio, in_turns
from cram_bench.optim import Dense, LowRank, TopK
from cram_bench.optim.rings import Ring
from cram_bench.optim.spectra import Inverse
from cram_bench.optim.window import Window

LENGTHS = (32, 256, 512, 1024)
METHODS: dict[str, dict[str, int]] = {"s-m-fac": {}, "lowrank-m-fac": {}, "m-fac": {}, "s-ggt": {}, "ggt": {}}
"""Methods whose step on ResNet-20 is timed → settings that differ from their recipe's."""
WIDE: dict[str, dict[str, int]] = {"s-m-fac": {}}
"""Likewise on ResNet-18; 1024 whole gradients of it are 46 GB."""
RINGS: dict[str, Ring] = {"dense": Dense(), "s-m-fac": TopK(0.01), "low rank": LowRank(4)}
NETWORKS = {"0.27M": "resnet20", "11M": "torchvision:resnet18"}
LIMIT = 8 << 30  # bytes of a ring that is timed; a larger one is only counted


def preconditioners() -> Iterator[Ratio]:
    """Steps over SGD's on both networks; a push beside copying the weights; memory beside whole gradients."""
    from benchmarks.sections import Trainer, data

    train, _ = data()
    for (size, model), methods in zip(NETWORKS.items(), (METHODS, WIDE), strict=True):
        sgd = Trainer("sgd", train, model=model)
        for method, changes in methods.items():
            ours = Trainer(method, train, model=model, **changes)
            ours()  # the ring is made
            fill(ours.optimizer.window)
            yield in_turns(f"{method} step over sgd, {size}", ours, sgd, kind="cost", unit="s")
            del ours
    for size, model in NETWORKS.items():
        shapes = [p.shape for p in cb.models.create(model, num_classes=10).parameters()]
        gradient = torch.randn(sum(shape.numel() for shape in shapes))
        for length in LENGTHS:
            windows = {name: Window(ring, Inverse(1e-4), length) for name, ring in RINGS.items()}
            needed = {name: window.needed(shapes) for name, window in windows.items()}
            for name, window in windows.items():
                share = needed[name] / needed["dense"]
                sides = (needed[name] / 2**20, needed["dense"] / 2**20)
                yield Ratio(f"memory of {name}, {size}, m {length}, over dense", share, share, share, *sides, "MiB")
                if needed[name] > LIMIT:
                    continue
                window.extend(shapes, gradient.device)
                fill(window)
                yield in_turns(
                    f"push of {name}, {size}, m {length}, over copying the weights",
                    partial(window.push, gradient),
                    gradient.clone,
                    kind="cost",
                    unit="ms",
                )
                del window
                windows[name] = Window(RINGS[name], Inverse(1e-4), 1)  # its memory is given back


def fill(window: Window) -> None:
    """Make the ring full, of random rows: what a push takes does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    for part in window.rows.parts:
        for row in part:
            if part.dtype is torch.int32:
                count = window.rows.columns
                row.copy_(torch.randint(count, row.shape, generator=generator, dtype=torch.int32).sort().values)
            else:
                row.normal_(generator=generator)
    window.gram.zero_().fill_diagonal_(1e3)
    window.count = window.gradients
    window.spectrum.forget()
