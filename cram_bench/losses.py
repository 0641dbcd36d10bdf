"""What a training minimises, as a part of an experiment. A new loss is a class here, and in `LOSSES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cram_bench.checks import instance, labels_within
from cram_bench.outputs import classes_of, logits_of
from cram_bench.settings import Part, Positive, Text


@dataclass(frozen=True)
class Loss(Part):
    """A mean over a batch, to be minimised."""

    role: ClassVar[str] = "loss"

    def __call__(self, logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """Return the scalar loss of logits (n, classes), labels (n,) and the inputs that the logits are of."""
        raise NotImplementedError

    @property
    def passes(self) -> int:
        """Forward passes of another network that every evaluation makes."""
        return 0

    def check(self) -> None:
        """Refuse to be called where something is missing yet."""


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """−log softmax(z)_y in nats, averaged over the batch."""

    kind: ClassVar[str] = "cross-entropy"

    def __call__(self, logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Distil(Loss):
    """(1 − h) · cross-entropy + h · T² · KL(teacher ‖ student), averaged over the batch: `distillation`.

    Hinton, Vinyals & Dean (arXiv 1503.02531); with h = 1 and T = 2 the loss of the recipes of oBERT (arXiv 2203.07259)
    and GMP* (arXiv 2210.06384). The teacher runs in eval mode on the very inputs of the student, augmented as they are,
    once at every evaluation of the gradient; with h = 0 it does not run at all.

    Raises:
        ValueError: there is no teacher, and `hardness` is not 0.
    """

    kind: ClassVar[str] = "distil"

    teacher: Text = ""
    """Who teaches: the id of a run in the same store, or its beginning; ``hub:NAME``, a classifier of sentences; or
    ``NAME=FILE``, a network of `cram_bench.models` and a file of its weights."""
    temperature: Positive = 2.0
    """T, by which both sides' logits are divided, positive."""
    hardness: Annotated[float, Field(ge=0, le=1, description="in [0, 1]")] = 1.0
    """h, share of the teacher in the loss, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hardness and not self.teacher:
            raise ValueError("loss 'distil' needs a teacher: the id of a run, hub:NAME or NAME=FILE; it was given ''")

    @property
    def passes(self) -> int:
        return int(self.hardness > 0)

    def taught(self, teacher: nn.Module, precision: str = "float32") -> Taught:
        """Return the loss with its teacher, for `cram_bench.train.fit`.

        Args:
            teacher: any classifier of the same classes, on the device of the data; it is put in eval mode and frozen.
            precision: in which it runs, ``float32`` or ``bfloat16`` (autocast), as the student's.
        """
        instance("teacher", teacher, nn.Module, "a torch model")
        kept_in = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), torch.float32)
        return Taught(self, teacher, precision, kept_in)

    def check(self) -> None:
        if self.passes:
            raise ValueError("loss 'distil' has no teacher at hand: give fit loss.taught(model)")

    def __call__(self, logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        self.check()
        return F.cross_entropy(logits, labels)


@dataclass(frozen=True, eq=False)
class Taught(Loss):
    """`Distil` with the teacher itself; what `Distil.taught` returns."""

    kind: ClassVar[str] = "distil"

    distil: Distil
    network: nn.Module
    precision: str = "float32"
    kept_in: torch.dtype = torch.float32

    def __post_init__(self) -> None:  # no settings: a network is none
        self.network.eval().requires_grad_(False)

    @property
    def passes(self) -> int:
        return self.distil.passes

    def __call__(self, logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        if not self.passes:
            return F.cross_entropy(logits, labels)
        if inputs.is_floating_point():
            inputs = inputs.to(self.kept_in)
        half = torch.autocast(logits.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
        with torch.no_grad(), half:
            theirs = classes_of(logits_of(self.network(inputs)))
        return distillation(logits, theirs.to(logits.dtype), labels, self.distil.temperature, self.distil.hardness)


def distillation(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float, hardness: float) -> Tensor:
    """Return (1 − h) · CE(z, y) + h · T² · Σ_c p_c (log p_c − log q_c), p = softmax(t/T), q = softmax(z/T).

    Both terms are means over the items, in nats. T² keeps the size of the gradient whatever T is.

    Args:
        logits: z, the student's, shape (n, classes).
        teacher: t, of the same shape.
        labels: y, int64 of shape (n,).
        temperature: T > 0.
        hardness: h in [0, 1].

    Raises:
        ValueError: the shapes differ.

    >>> z = torch.tensor([[1.0, 0.0]])
    >>> round(float(distillation(z, torch.tensor([[0.0, 0.0]]), torch.tensor([0]), 1.0, 1.0)), 4)
    0.1201
    """
    if logits.shape != teacher.shape:
        raise ValueError(
            f"the teacher must have as many classes as the student, {logits.shape[1]}, not {teacher.shape[-1]}"
        )
    q, p = F.log_softmax(logits / temperature, 1), F.log_softmax(teacher / temperature, 1)
    soft = F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2
    return soft if hardness == 1 else (1 - hardness) * F.cross_entropy(logits, labels) + hardness * soft


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over a batch, in nats and float32, with its graph.

    Raises:
        ValueError: a label has no output.
    """
    labels_within(labels, logits.shape[1])
    return F.cross_entropy(logits.float(), labels, reduction="sum")


LOSSES: dict[str, type[Loss]] = {part.kind: part for part in (CrossEntropy, Distil)}
"""Losses by the name that settings use."""
