"""The one training loop, on one screen. Everything else is a callback.

`fit` knows a model, an optimizer and data; it knows nothing of experiments or folders. Every optimizer, plain or
two-pass, is driven by ``optimizer.step(closure)``.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cram_bench.callbacks import Callback
from cram_bench.checks import initialised, instance, integer, shown
from cram_bench.compress.rank import NaNError
from cram_bench.data import AT_ONCE, Batches, Dataset, batches_of
from cram_bench.distributed import Group
from cram_bench.losses import CrossEntropy, Loss, summed
from cram_bench.models.folding import folded
from cram_bench.outputs import classes_of, fitting, logits_of, tensors_of
from cram_bench.preserve import modes_kept, preserved
from cram_bench.schedules import Cosine, Schedule

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(inputs, labels) → (mean loss, logits)."""


class DivergedError(RuntimeError):
    """The training loss is no longer finite."""


@dataclass
class Fit:
    """One training as it goes: what the callbacks see, and what a checkpoint must hold."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    epochs: int
    steps_per_epoch: int
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    callbacks: Sequence[Callback] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "callbacks": {name: state for name, c in self._named() if (state := c.state_dict())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.history = state["epoch"], list(state["history"])
        theirs = state.get("callbacks", {})
        for name, callback in self._named():
            if name in theirs:
                callback.load_state_dict(theirs[name])

    def _named(self) -> Iterator[tuple[str, Callback]]:
        kinds = [type(callback).__name__ for callback in self.callbacks]
        for place, (kind, callback) in enumerate(zip(kinds, self.callbacks, strict=True)):
            before = kinds[:place].count(kind)
            yield f"{kind} {before + 1}" if before else kind, callback


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    train: Dataset,
    test: Dataset | None = None,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    loss: Loss = CrossEntropy(),
    schedule: Schedule = Cosine(),
    augment: bool = True,
    halves: bool = False,
    test_every: int = 1,
    precision: str = "float32",
    compile: bool = False,
    callbacks: Sequence[Callback] = (),
    group: Group | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place and return one row per epoch.

    Args:
        model: on the device of the data; of several processes, what `Group.parallel` returned. It may return logits in
            the ways that `cram_bench.probes` reads them, and have weights of any floating-point type.
        optimizer: any torch optimizer; those of `cram_bench.optim` too.
        train: training data; order and augmentation of epoch e follow from (seed, e) alone, so that a resumed
            training repeats an uninterrupted one. A last smaller batch is left out.
        test: evaluated after every `test_every` epochs and after the last, if given; it decides nothing.
        epochs: passes over the data; the learning rate follows the schedule over all of them.
        batch_size: images per step, of all processes together.
        seed: of order, augmentation and dropout; torch's default device and type change none of them.
        loss: what is minimised, as those of `cram_bench.losses`.
        schedule: of the learning rate, as those of `cram_bench.schedules`.
        augment: crop and flip.
        halves: give the two gradients of a two-pass optimizer a half of the batch each: a step then costs what a plain
            one does.
        test_every: epochs between evaluations.
        precision: ``float32`` or ``bfloat16`` (autocast; weights stay float32).
        compile: use `torch.compile`; falls back with one warning where no compiler works.
        callbacks: called as the training goes; ``on_step`` sees the sums of its own process.
        group: the processes that train together. Order, augmentation, and BatchNorm are then those of one process with
            the whole batch; dropout is drawn anew in each.

    Returns:
        Rows of epoch, lr, train_loss, train_accuracy, seconds and, with `test`, where it was evaluated, test_loss and
        test_accuracy.
        Accuracies are fractions; training figures are those of each step's first evaluation, averaged over the epoch:
        the one at the true weights, except for methods that take one gradient a step elsewhere.

    Raises:
        DivergedError: the epoch's loss is not finite.
        ValueError: a number is outside what its line above allows, the data are empty, a label has no output, or the
            processes cannot share the batch evenly.
        TypeError: an argument has another type.
    """
    _check(model, optimizer, train, test, epochs, batch_size, seed, loss, schedule, test_every, precision)
    group = group or Group()
    group.check(min(batch_size, len(train)), halves)
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    steps = max(1, len(train) // batch_size)
    scheduler = LambdaLR(optimizer, schedule.factor(epochs, steps))
    state = Fit(inner, optimizer, scheduler, epochs, steps, callbacks=callbacks)
    objective = _objective(model, train, batch_size // 2 if halves else batch_size, precision, compile, loss)
    model.to(memory_format=torch.channels_last)
    for callback in callbacks:
        callback.on_start(state)
    if group.sums(state.epoch) != [group.world * state.epoch]:
        raise RuntimeError("the processes would start at different epochs: all have to see the same run store")
    try:
        while state.epoch < epochs:
            start, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
            epoch_seed = seed * 1_000_003 + state.epoch
            with _seeded(_seed_of(epoch_seed, group.rank)):
                size = min(batch_size, len(train))
                batches = train.batches(
                    size, seed=epoch_seed, augment=augment, drop_last=True, channels_last=True, share=group.share
                )
                try:
                    mean, accuracy = _epoch(state, objective, batches, halves, callbacks, group)
                except NaNError:  # CrAM ranks the weights before the loss of the epoch is read
                    raise DivergedError(
                        f"the weights are NaN in epoch {state.epoch + 1}; try a lower lr or rho"
                    ) from None
            row = {"epoch": state.epoch + 1, "lr": lr, "train_loss": mean, "train_accuracy": accuracy}
            if not math.isfinite(mean):
                raise DivergedError(f"the training loss is {mean} in epoch {state.epoch + 1}; try a lower lr or rho")
            last = state.epoch + 1 == epochs
            if test is not None and (last or (state.epoch + 1) % test_every == 0):
                row |= {f"test_{name}": value for name, value in evaluate(inner, test, group=group).items()}
            state.history.append(row | {"seconds": time.perf_counter() - start})
            state.epoch += 1
            for callback in callbacks:
                callback.on_epoch(state)
    finally:
        for callback in callbacks:
            callback.on_end(state)
    return state.history


def _check(
    model: Any, optimizer: Any, train: Any, test: Any, epochs: Any, batch_size: Any, seed: Any,
    loss: Any, schedule: Any, test_every: Any, precision: Any,
) -> None:  # fmt: skip
    """Refuse what `fit` cannot train with, before anything is touched."""
    check_trainable(model)
    instance("optimizer", optimizer, Optimizer, "a torch optimizer")
    if isinstance(optimizer, torch.optim.LBFGS) and any(p.ndim >= 4 for p in model.parameters()):
        raise TypeError(
            "LBFGS does not take the channels-last kernels that are trained here: take torch.optim.SGD or AdamW"
        )
    instance("train", train, Dataset, "a Dataset, such as cram_bench.data.load returns")
    if isinstance(test, Iterator):
        batches_of(test)  # says why not
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("test_every", test_every, 1)):
        integer(name, value, least)
    integer("seed", seed, 0)
    instance("loss", loss, Loss, "a loss, such as cram_bench.losses.CrossEntropy()")
    loss.check()
    instance("schedule", schedule, Schedule, "a schedule, such as cram_bench.schedules.Cosine(warmup_epochs=5.0)")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be float32 or bfloat16, not {shown(precision)}")
    train.check()


def check_trainable(model: nn.Module) -> None:
    """Refuse a model with nothing to train, or with weights that are made at its first batch.

    Raises:
        ValueError: no parameter has requires_grad, or a module is lazy.
        TypeError: it is no torch model.
    """
    instance("model", model, nn.Module, "a torch model")
    initialised(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"no parameter of {type(model).__name__} has requires_grad; at least one is needed")


def _epoch(
    state: Fit,
    objective: Objective,
    batches: Iterator[tuple[Tensor, Tensor]],
    halves: bool,
    callbacks: Sequence[Callback],
    group: Group,
) -> tuple[float, float]:
    """Take a step per batch; return mean loss and accuracy at the weights before each step, of all processes."""
    state.model.train()
    loss_sum = correct = torch.zeros((), device="cpu", dtype=torch.float32)
    seen = 0
    for step, (inputs, labels) in enumerate(batches):
        parts = list(zip(inputs.chunk(2), labels.chunk(2), strict=True)) if halves else [(inputs, labels)]
        labels = parts[0][1]
        loss, logits = _step(state.optimizer, objective, parts)
        loss_sum = loss_sum.to(loss.device) + loss * len(labels)  # stays on the device: reading it would wait
        correct = correct.to(loss.device) + (logits.argmax(1) == labels).sum()
        seen += len(labels)
        state.scheduler.step()
        for callback in callbacks:
            callback.on_step(state, step, loss_sum, correct, seen)
    total, right, count = group.sums(loss_sum, correct, seen)
    return total / count, right / count


def _step(optimizer: Optimizer, objective: Objective, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Let the optimizer step, its evaluations going through `parts`; return loss and logits of the first of them."""
    evaluations: list[tuple[Tensor, Tensor]] = []

    def closure() -> Any:
        optimizer.zero_grad()
        loss, logits = objective(*parts[len(evaluations) % len(parts)])
        loss.backward()
        evaluations.append((loss.detach(), logits.detach()))
        return loss.detach()

    optimizer.step(closure)
    return evaluations[0]


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Batches, batch_size: int = AT_ONCE, group: Group | None = None
) -> dict[str, float]:
    """Return the mean cross-entropy in nats and the accuracy in [0, 1], in float32, in eval mode; modes are restored.

    Args:
        model: any classifier, of any floating-point type, that returns logits in the ways that `cram_bench.probes`
            reads.
        data: a `Dataset`, or anything that yields (inputs, labels).
        batch_size: where `data` is a `Dataset`.
        group: processes that share a `Dataset` out; every one of them gets the result for all of it.

    Raises:
        ValueError: the data are empty, or a label is no integer or has no output.
        TypeError: the data are no batches of (inputs, labels), or can be read only once.
    """
    instance("model", model, nn.Module, "a torch model")
    group = group or Group()
    score = Score()
    with modes_kept(model):
        model.eval()
        run = model
        fit_in = fitting(model)
        for index, (inputs, labels) in enumerate(batches_of(data, batch_size, group.share)):
            inputs = fit_in(inputs)
            labels = labels.to(next((x.device for x in tensors_of(inputs)), labels.device))
            run = run if index else folded(model, inputs)
            score.add(classes_of(logits_of(run(inputs))), labels)
    return score.result(group)


class Score:
    """Cross-entropy and accuracy, summed up batch by batch."""

    def __init__(self) -> None:
        self.loss, self.correct, self.count = 0.0, 0, 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take a batch in."""
        self.loss += float(summed(logits, labels))
        self.correct += int((logits.argmax(1) == labels).sum())
        self.count += len(labels)

    def result(self, group: Group | None = None) -> dict[str, float]:
        """Return the means over all batches, of all processes: loss and accuracy, as `evaluate` does."""
        loss, correct, count = (group or Group()).sums(self.loss, self.correct, self.count)
        if not count:
            raise ValueError("the data to evaluate on are empty")
        return {"loss": loss / count, "accuracy": correct / count}


def _objective(
    model: nn.Module, train: Dataset, batch_size: int, precision: str, compile: bool, loss: Loss = CrossEntropy()
) -> Objective:
    """Build the loss of the model in the asked precision, compiled if asked and possible."""
    kind = train.labels.device.type
    weight_type = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def objective(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if inputs.is_floating_point():
            inputs = inputs.to(weight_type)  # of a model in float64, say; what `fitting` does would break the graph
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = classes_of(logits_of(model(inputs)))
        logits = logits if logits.dtype is torch.float64 else logits.float()
        if logits.shape[1] < train.num_classes:  # a shape: nothing waits for it
            raise ValueError(f"the model must have an output a class, {train.num_classes}, and has {logits.shape[1]}")
        return loss(logits, labels, inputs), logits

    if not compile:
        return objective
    compiled = torch.compile(objective, dynamic=False)
    model.to(memory_format=torch.channels_last).train()
    size = min(batch_size, len(train))
    inputs, labels = next(train.take(range(size)).batches(size, channels_last=True))
    try:
        with preserved(model):
            compiled(inputs, labels)[0].backward()
    except Exception as error:  # whatever the compiler meets: none installed, an unsupported operator …
        why = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"torch.compile does not work here, training goes on without it: {why}", stacklevel=3)
        return objective
    return compiled


def _seed_of(seed: int, rank: int) -> int:
    """Return a process's own seed, the first's `seed` itself; they differ in the 32 bits that torch reads on a CPU."""
    return seed if rank == 0 else int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generators for a block (dropout draws from them), then put their state back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
