"""What all probes share: batches of any kind of data, and loss and gradient over all of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram_bench._preserve import preserved
from cram_bench.data import Dataset

Batches = Dataset | Iterable[Any]
"""A `Dataset`, or anything that yields (inputs, labels) every time it is iterated, such as a `DataLoader`."""


def batches(data: Batches, batch_size: int = 500) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) in a fixed order.

    Raises:
        TypeError: `data` is an iterator, which could be read only once.
    """
    if isinstance(data, Dataset):
        return data.batches(batch_size, channels_last=True)
    if isinstance(data, Iterator):
        raise TypeError("a probe reads the data more than once: give a list or a DataLoader, not an iterator")
    return data


@contextmanager
def probing(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model in eval mode, so that losses are functions of the weights alone; put it back as it was after."""
    with preserved(model):
        yield model.eval()


@torch.no_grad()
def accuracy_and_loss(model: nn.Module, data: Batches, batch_size: int = 500) -> tuple[float, float]:
    """Return accuracy in [0, 1] and mean cross-entropy in nats, with the model in the mode it is in."""
    loss, correct, count = 0.0, 0, 0
    for inputs, labels in batches(data, batch_size):
        logits = model(inputs).float()
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    if not count:
        raise ValueError("the data to probe on is empty")
    return correct / count, loss / count


def loss_and_gradient(model: nn.Module, data: Batches, batch_size: int = 500) -> tuple[float, dict[str, Tensor]]:
    """Return the mean cross-entropy in nats over all the data, and its gradient by parameter name."""
    model.zero_grad()
    total, count = 0.0, 0
    for inputs, labels in batches(data, batch_size):
        loss = F.cross_entropy(model(inputs).float(), labels, reduction="sum")
        loss.backward()
        total += float(loss.detach())
        count += len(labels)
    if not count:
        raise ValueError("the data to probe on is empty")
    named = model.named_parameters()
    return total / count, {name: p.grad / count for name, p in named if p.grad is not None}
