"""Train a sparse model and keep it sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from cram_bench.callbacks import Callback
from cram_bench.checks import instance
from cram_bench.compress import Masks, check_leaves
from cram_bench.data import Batches, Dataset
from cram_bench.optim.base import Closure, Wrapper, mask_gradients
from cram_bench.prune import Specification, apply_, parse
from cram_bench.settings import Part, Text


class HeldMasks(Wrapper):
    """Step with masked gradients, so that a pruned weight stays an exact zero.

    g ← M ⊙ g before the base optimizer's step, and θ ← M ⊙ θ after it: momentum that was gathered before, and weight
    decay, cannot revive a weight either. Masked weights are zeroed at once, on construction.

    Args:
        model: the model being trained, or the `DistributedDataParallel` around it.
        base: any torch optimizer over its parameters.
        masks: which weights stay, as `cram_bench.compress.apply_` returns them.

    Raises:
        ValueError: a mask's name or shape does not fit the model.
        TypeError: `masks` are no `Masks`.

    >>> import torch
    >>> model = nn.Linear(2, 1, bias=False)
    >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> optimizer = HeldMasks(model, base, Masks({"weight": torch.tensor([[True, False]])}))
    >>> model.weight[0, 1].item()
    0.0
    """

    accumulates = True

    def __init__(self, model: nn.Module, base: Optimizer, masks: Masks) -> None:
        instance("masks", masks, Masks, "Masks, such as cram_bench.compress.apply_ returns")
        super().__init__(model, base)
        self.masked = masks.weights_of(self.model)
        self.masks = Masks({name: mask.to(self.masked[name].device) for name, mask in masks.items()}, masks.dense)
        self.masks.zero_(self.masked)

    def _gradients(self, closure: Closure, scale: float | None) -> Any:
        loss = closure()
        mask_gradients(self.masked, self.masks)
        return loss

    def _stepped(self) -> None:
        self.masks.zero_(self.masked)


@dataclass(frozen=True)
class Pruning(Part):
    """When and how a training prunes; what is pruned stays an exact zero."""

    role: ClassVar[str] = "pruning"

    @property
    def sparsity(self) -> float:
        """What is pruned at the end, of the prunable weights; 0 where nothing is."""
        raise NotImplementedError

    def apply_(self, model: nn.Module, batches: Callable[[], Batches] = lambda: ()) -> Masks | None:
        """Prune what a training starts from, in place; return the masks to hold, or None where nothing is pruned yet.

        Args:
            model: any torch model.
            batches: returns what a pruner looks at, training data; called where one does.
        """
        return None

    def shrink_(self, model: nn.Module, batches: Callable[[], Batches]) -> dict[str, list[int]]:
        """Prune units of what a training starts from, in place; return which stay of each structure, none: all do.

        Args:
            model, batches: as `apply_` takes them.
        """
        return {}

    def callbacks(self, train: Dataset) -> Sequence[Callback]:
        """Return what has to be called as training on these data goes."""
        return ()


@dataclass(frozen=True)
class OneShot(Pruning):
    """Prune the weights that a training starts from, before its first step, and hold the mask: `HeldMasks`."""

    kind: ClassVar[str] = "one-shot"

    prune: Text = ""
    """Specification of a compressor or pruner of `start` before the first step; the pruned weights then stay zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune:
            check_leaves(parse(self.prune))

    @property
    def sparsity(self) -> float:
        return parse(self.prune).sparsity if self.prune else 0.0

    def apply_(self, model: nn.Module, batches: Callable[[], Batches] = lambda: ()) -> Masks | None:
        if not self.prune:
            return None
        spec = parse(self.prune)
        return apply_(model, spec, batches() if isinstance(spec, Specification) else None)
