"""What a training minimises, as a part of an experiment. A new loss is a class here, and in `LOSSES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from cram_bench.checks import labels_within
from cram_bench.settings import Part


@dataclass(frozen=True)
class Loss(Part):
    """A mean over a batch, to be minimised."""

    role: ClassVar[str] = "loss"

    def __call__(self, logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """Return the scalar loss of logits (n, classes), labels (n,) and the inputs that the logits are of."""
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """−log softmax(z)_y in nats, averaged over the batch."""

    kind: ClassVar[str] = "cross-entropy"

    def __call__(self, logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over a batch, in nats and float32, with its graph.

    Raises:
        ValueError: a label has no output.
    """
    labels_within(labels, logits.shape[1])
    return F.cross_entropy(logits.float(), labels, reduction="sum")


LOSSES: dict[str, type[Loss]] = {part.kind: part for part in (CrossEntropy,)}
"""Losses by the name that settings use."""
