"""A set of masks: which weights stay, by parameter name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cram_bench import untrusted
from cram_bench.checks import instance
from cram_bench.compress.names import computed, found, lookup, refusal
from cram_bench.files import write_tensors


class Dense(NamedTuple):
    """A matrix in which nothing was pruned: how many weights it has, and the reason."""

    weights: int
    reason: str


def listing(dense: Mapping[str, Dense], most: int = 3) -> str:
    """Name dense matrices in one line, at most so many of them.

    >>> listing({"embedding.weight": Dense(1000, "embedding"), "head": Dense(20, "excluded")}, most=1)
    'embedding.weight 1,000 (embedding) and 1 more with 20 weights'
    """
    named = [f"{name} {count:,} ({reason})" for name, (count, reason) in dense.items()]
    rest = sum(matrix.weights for matrix in list(dense.values())[most:])
    more = f" and {len(named) - most} more with {rest:,} weights" if len(named) > most else ""
    return ", ".join(named[:most]) + more


class Masks(Mapping[str, Tensor]):
    """Parameter name → boolean tensor of the parameter's shape, true where the weight stays.

    Names are those of the model itself, without the ``module.`` or ``_orig_mod.`` of a wrapper (`DataParallel`,
    `torch.compile` …), and fit the wrapped model as well as the plain one.

    Args:
        masks: boolean tensors, or tensors that hold nothing but 0 and 1.
        dense: the matrices of the model in which nothing was pruned.

    Attributes:
        dense: name → `Dense`, of the matrices that are not prunable and of those that the pattern left as they are. The
            latter are among the masks too, all true, and so count in `sparsity`.

    Raises:
        ValueError: a tensor holds anything but 0 and 1.

    >>> masks = Masks({"weight": torch.tensor([[True, False], [False, False]])})
    >>> masks.zeros, masks.count, masks.sparsity
    (3, 4, 0.75)
    """

    def __init__(self, masks: Mapping[str, Tensor], dense: Mapping[str, Dense] | None = None) -> None:
        self._masks = {name: _boolean(name, mask) for name, mask in masks.items()}
        self.dense = dict(dense or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        zero = f"{self.zeros:,} of {self.count:,} weights zero, sparsity {self.sparsity:.4f}"
        dense = f"; {self.dense_weights:,} dense: {listing(self.dense)}" if self.dense else ""
        return f"Masks({len(self)} tensors, {zero}{dense})"

    @property
    def count(self) -> int:
        """How many weights the masks cover."""
        return sum(mask.numel() for mask in self.values())

    @property
    def zeros(self) -> int:
        """How many of them are held at zero."""
        return self.count - sum(int(mask.sum()) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the covered weights, in [0, 1]."""
        return self.zeros / self.count if self.count else 0.0

    @property
    def dense_weights(self) -> int:
        """How many weights stand in the matrices in which nothing was pruned."""
        return sum(matrix.weights for matrix in self.dense.values())

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Zero the masked weights of `model` in place; kept weights and parameter names are untouched.

        Raises:
            ValueError: a mask's name or shape does not fit the model, or it is for a tensor that is computed from other
                parameters; nothing is changed then.
        """
        self.zero_(self.weights_of(model))

    def weights_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return for every mask, by its name, the parameter of `model` that it is for. Raises what `apply_` raises."""
        known = lookup(model)
        weights = {}
        for name, mask in self.items():
            if (parameter := found(known, name)) is None:
                if (tensor := found({tensor.name: tensor for tensor in computed(model)}, name)) is not None:
                    raise ValueError(refusal(tensor))
                raise ValueError(f"mask {name!r} fits no parameter of {type(model).__name__}")
            if parameter.shape != mask.shape:
                shapes = f"{tuple(mask.shape)}, the parameter {tuple(parameter.shape)}"
                raise ValueError(f"mask {name!r} has shape {shapes}")
            weights[name] = parameter
        return weights

    @torch.no_grad()
    def zero_(self, weights: Mapping[str, Tensor]) -> None:
        """Zero the masked entries of named tensors in place; `weights` may hold more names than the masks."""
        for name, mask in self.items():  # select, not multiply: -1 * 0 is -0.0, and inf * 0 is NaN
            weights[name].masked_fill_(mask.to(weights[name].device).logical_not(), 0.0)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Masks:
        """Read the masks off weights that are already sparse: an exact zero is masked."""
        return cls({name: weight.detach() != 0 for name, weight in weights.items()}, getattr(weights, "dense", None))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        dense = {"dense": json.dumps(self.dense)} if self.dense else None
        write_tensors(Path(path), {name: mask.contiguous() for name, mask in self.items()}, dense)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote.

        Raises:
            ValueError: it is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            untrusted.tensors(path)
            with safe_open(path, "pt") as file:
                masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not readable as safetensors: {error}") from error
        try:
            known = json.loads(metadata.get("dense", "{}"))
            return cls(masks, {str(name): Dense(int(count), str(why)) for name, (count, why) in known.items()})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold masks: {error}") from error


def _boolean(name: str, mask: Tensor) -> Tensor:
    instance(f"mask {name!r}", mask, Tensor, "a tensor")
    if mask.dtype is torch.bool:
        return mask
    kept = mask == 1
    if not bool((kept | (mask == 0)).all()):
        raise ValueError(f"mask {name!r} holds {mask[~(kept | (mask == 0))][0].item()!r}; a mask is 0 or 1")
    return kept
