"""A set of masks: which weights stay, by parameter name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cram_bench._checks import instance
from cram_bench._files import write_tensors


class Masks(Mapping[str, Tensor]):
    """Parameter name → boolean tensor of the parameter's shape, true where the weight stays.

    Args:
        masks: boolean tensors, or tensors that hold nothing but 0 and 1.

    Raises:
        ValueError: a tensor holds anything but 0 and 1.

    >>> masks = Masks({"weight": torch.tensor([[True, False], [False, False]])})
    >>> masks.zeros, masks.count, masks.sparsity
    (3, 4, 0.75)
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = {name: _boolean(name, mask) for name, mask in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} tensors, {self.zeros:,} of {self.count:,} weights zero, sparsity {self.sparsity:.4f})"
        )

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

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Zero the masked weights of `model` in place; kept weights and parameter names are untouched.

        Raises:
            ValueError: a mask's name or shape does not fit the model; nothing is changed then.
        """
        parameters = dict(model.named_parameters())
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(f"mask {name!r} fits no parameter of {type(model).__name__}")
            if parameters[name].shape != mask.shape:
                shapes = f"{tuple(mask.shape)}, the parameter {tuple(parameters[name].shape)}"
                raise ValueError(f"mask {name!r} has shape {shapes}")
        self.zero_(parameters)

    @torch.no_grad()
    def zero_(self, weights: Mapping[str, Tensor]) -> None:
        """Zero the masked entries of named tensors in place; `weights` may hold more names than the masks."""
        for name, mask in self.items():  # select, not multiply: -1 * 0 is -0.0, and inf * 0 is NaN
            weights[name].masked_fill_(mask.to(weights[name].device).logical_not(), 0.0)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Masks:
        """Read the masks off weights that are already sparse: an exact zero is masked."""
        return cls({name: weight.detach() != 0 for name, weight in weights.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        write_tensors(Path(path), {name: mask.contiguous() for name, mask in self.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote.

        Raises:
            ValueError: it is no such file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cls(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not readable as safetensors: {error}") from error


def _boolean(name: str, mask: Tensor) -> Tensor:
    instance(f"mask {name!r}", mask, Tensor, "a tensor")
    if mask.dtype is torch.bool:
        return mask
    kept = mask == 1
    if not bool((kept | (mask == 0)).all()):
        raise ValueError(f"mask {name!r} holds {mask[~(kept | (mask == 0))][0].item()!r}; a mask is 0 or 1")
    return kept
