"""What all probes share: a model held still, and loss and gradient over all the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from cram_bench._checks import instance, labels_within
from cram_bench._preserve import preserved
from cram_bench.data import AT_ONCE, Batches, Dataset, batches_of


@contextmanager
def probing(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model in eval mode, so that losses are functions of the weights alone; put it back as it was after."""
    instance("model", model, nn.Module, "a torch model")
    with preserved(model):
        yield model.eval()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that ask for a gradient.

    Raises:
        ValueError: there is none.
    """
    instance("model", model, nn.Module, "a torch model")
    if found := [parameter for parameter in model.parameters() if parameter.requires_grad]:
        return found
    raise ValueError(f"no parameter of {type(model).__name__} has requires_grad; at least one is needed")


def loss_and_gradient(model: nn.Module, data: Batches, batch_size: int = AT_ONCE) -> tuple[float, dict[str, Tensor]]:
    """Return the mean cross-entropy in nats over all the data, and its gradient by parameter name.

    Raises:
        ValueError: the data are empty, a label has no output, or no parameter asks for a gradient.
    """
    trainable(model)
    model.zero_grad()
    total, count = 0.0, 0
    for inputs, labels in batches_of(data, batch_size):
        logits = model(inputs).float()
        labels_within(labels, logits.shape[1])
        loss = F.cross_entropy(logits, labels, reduction="sum")
        loss.backward()
        total += float(loss.detach())
        count += len(labels)
    if not count:
        raise ValueError("the data to probe on are empty")
    named = model.named_parameters()
    return total / count, {name: p.grad / count for name, p in named if p.grad is not None}


def tuning_data(calibration: Batches | None) -> Batches | None:
    """Return what to tune BatchNorm on: `Dataset.calibration` of a `Dataset`, anything else as it is."""
    return calibration.calibration() if isinstance(calibration, Dataset) else calibration
