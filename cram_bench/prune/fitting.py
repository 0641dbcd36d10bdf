"""From specifications to compressors: look at a model once for all that need the same, then prune to every sparsity."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cram_bench.compress import Compressor, Masks, PruneThenQuantize, prunable
from cram_bench.curvature.samples import Forward, Loss
from cram_bench.data import Batches
from cram_bench.preserve import preserved
from cram_bench.prune.base import Fitted, Fixed, Pruner
from cram_bench.prune.specification import Specification


def fitted(
    specs: Sequence[Compressor | Specification],
    model: nn.Module,
    batches: Batches | None,
    exclude: Iterable[str] = (),
    forward: Forward | None = None,
    loss: Loss | None = None,
    known: dict[Pruner, Fitted] | None = None,
) -> list[Compressor]:
    """Return compressors of this model for specifications; compressors that look at nothing come back as they are.

    A pruner looks once, whatever the number of sparsities. In steps, every sparsity has a path of its own: after each
    step the pruner looks anew, at the same examples, at the pruned model, in which what is gone stays gone.

    Args:
        specs: as `cram_bench.prune.parse` returns them.
        model: any torch model; left as it was found.
        batches: what pruners look at; needed where there is one.
        exclude: shell patterns over parameter names that stay dense.
        forward, loss: as the probes take them.
        known: pruners that have looked at this model before; those that look now are added.

    Raises:
        ValueError: a pruner has nothing to look at, or as `Pruner.fit`.
    """
    exclude = list(exclude) if not isinstance(exclude, str) else exclude
    known = {} if known is None else known
    found: list[Compressor] = []
    for spec in specs:
        if isinstance(spec, Compressor):
            found.append(spec)
            continue
        if batches is None:
            raise ValueError(f"{spec} looks at examples: give batches=, training data such as a Dataset")
        options: dict[str, Any] = {"forward": forward, "loss": loss}
        if spec.steps > 1:
            path = _stepwise(spec, model, batches, exclude, options)
            compressor: Compressor = Fixed(path, spec.sparsity, name=replace(spec, quantize=None).pattern)
        else:
            if spec.pruner not in known:
                known[spec.pruner] = spec.pruner.fit(model, batches, exclude, **options)
            name = f"{spec.masks.pattern}+{spec.pruner}" if spec.masks is not None else ""
            compressor = Fixed(known[spec.pruner], spec.sparsity, spec.masks, name)
        found.append(compressor if spec.quantize is None else PruneThenQuantize(compressor, spec.quantize))
    _prepare(found, model, exclude)
    return found


def _prepare(found: Sequence[Compressor], model: nn.Module, exclude: Sequence[str]) -> None:
    """Tell pruners that would look anew for every sparsity which masks they will be asked to solve."""
    plain = [own.prune if isinstance(own, PruneThenQuantize) else own for own in found]
    of: dict[int, list[Fixed]] = {}
    for own in plain:
        if isinstance(own, Fixed) and own.fitted.collects:
            of.setdefault(id(own.fitted), []).append(own)
    for those in of.values():
        if len(those) > 1:
            weights = prunable(model, exclude)
            those[0].fitted.prepare([own.masks(weights) for own in those])


class _Path(Fitted):
    """Where a path of several steps ended: its masks at one sparsity, and its weights."""

    def __init__(self, name: str, first: Fitted, masks: Masks, ends: Mapping[str, Tensor]) -> None:
        super().__init__(first.pruner, first.weights, {name: mask.double() for name, mask in masks.items()})
        self.dense, self.ends, self.name = first.dense, dict(ends), name

    def masks(self, sparsity: float, names: Iterable[str] | None = None) -> Masks:
        """Return the masks at the end of the path, which was made for one sparsity over all tensors."""
        chosen = list(self.keys if names is None else names)
        if len(chosen) != len(self.keys):
            raise ValueError(f"{self.name} prunes all tensors together: in steps none can be pruned alone")
        return Masks({name: self.keys[name] > 0 for name in chosen}, self.dense)

    def solve(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.ends[name].masked_fill(~mask, 0.0) for name, mask in masks.items()}


def _stepwise(
    spec: Specification, model: nn.Module, batches: Batches, exclude: Sequence[str], options: Mapping[str, Any]
) -> Fitted:
    start = time.perf_counter()
    seen = 0
    with torch.inference_mode(False), preserved(model):
        weights = prunable(model, exclude)
        first: Fitted | None = None
        masks: Masks | None = None
        for level in spec.levels():
            gone = {} if masks is None else {name: ~mask for name, mask in masks.items()}
            now = spec.pruner.fit(model, batches, exclude, gone=gone, **options)
            first = first or now
            masks = now.at(level).apply_(weights)
            seen += now.gradients
        assert first is not None
        assert masks is not None
        ends = {name: weights[name].detach().clone() for name in now.weights}
    path = _Path(str(spec), first, masks, ends)
    path.seconds, path.gradients = time.perf_counter() - start, seen
    return path
