"""Leave a model as it was found: weights, buffers, gradients, modes and gradient flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy `sources` into `targets` in place, many tensors in one kernel where their types allow it."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


@torch.no_grad()
def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a detached copy of every tensor, in its own memory layout."""
    return [tensor.detach().clone() for tensor in tensors]


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Run a block, then put every module's ``training`` flag back, also when the block raises."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Put back the buffers that a block changes, in place or otherwise; yield a function that tells if it did."""
    before = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    tensors = [buffer for _, named in before for buffer in named.values() if buffer is not None]
    versions, values = [t._version for t in tensors], [t.clone() for t in tensors]

    def changed() -> bool:
        moved = any(
            module._buffers.get(name) is not buffer for module, named in before for name, buffer in named.items()
        )
        return moved or any(tensor._version != version for tensor, version in zip(tensors, versions, strict=True))

    try:
        yield changed
    finally:
        for module, named in before:
            module._buffers.update(named)
        with torch.no_grad():
            for tensor, version, value in zip(tensors, versions, values, strict=True):
                if tensor._version != version:
                    tensor.copy_(value)


@contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """Run a block, then put the model back bit for bit, also when the block raises.

    Restored are the values of parameters and buffers, every parameter's ``grad`` and ``requires_grad``, and
    every module's ``training`` flag. Parameters and buffers stay the same objects, so an optimizer keeps pointing at
    them, also where the network's own code puts another tensor in a buffer's place. Tied weights are one parameter.

    >>> model = nn.Linear(2, 2)
    >>> before = model.weight.clone()
    >>> with preserved(model):
    ...     _ = model.eval().weight.data.zero_()
    >>> bool((model.weight == before).all()), model.training
    (True, True)
    """
    parameters = list(model.parameters())
    buffers = list(model.buffers())
    named = [(module, dict(module._buffers)) for module in model.modules()]
    values = clones([*parameters, *buffers])
    gradients = [parameter.grad for parameter in parameters]
    gradient_values = [None if gradient is None else gradient.clone() for gradient in gradients]
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        with modes_kept(model):
            yield model
    finally:
        for module, held in named:
            module._buffers.clear()
            module._buffers.update(held)
        copy_into([*parameters, *buffers], values)
        for parameter, gradient, value, flag in zip(parameters, gradients, gradient_values, flags, strict=True):
            if gradient is not None and value is not None:
                with torch.no_grad():
                    gradient.copy_(value)
            parameter.grad = gradient
            parameter.requires_grad_(flag)
