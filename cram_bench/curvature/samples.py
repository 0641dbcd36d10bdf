"""The examples that a pruner looks at, cut into batches of one size; and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cram_bench.checks import instance, integer, labels_within, shown
from cram_bench.data import Batches, Dataset, batches_of
from cram_bench.losses import CrossEntropy
from cram_bench.outputs import classes_of, fitting, logits_of, normal, rows_of
from cram_bench.preserve import buffers_kept, modes_kept

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Tensor], Tensor]


def chunks(
    batches: Batches, count: int, size: int, seed: int = 0, setting: tuple[str, int] | None = None
) -> list[tuple[Any, Tensor]]:
    """Return `count` batches of exactly `size` examples each.

    Args:
        batches: a `Dataset`, of which ``count · size`` examples are drawn without replacement, not augmented; or
            anything that yields (inputs, labels), whose first examples are cut anew.
        count: how many batches.
        size: examples in each.
        seed: of the draw from a `Dataset`.
        setting: what a reader of the error sets, and how many examples one of it takes; ``gradients`` of `size` if not
            given.

    Raises:
        ValueError: there are fewer examples than that.
        TypeError: `batches` are no batches.

    >>> data = [(torch.arange(6.0)[:, None], torch.zeros(6, dtype=torch.long))]
    >>> [inputs.flatten().tolist() for inputs, _ in chunks(data, count=3, size=2)]
    [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """
    wanted = integer("count", count, 1) * integer("size", size, 1)
    name, each = setting or ("gradients", size)
    if isinstance(batches, Dataset):
        if len(batches) < wanted:
            raise ValueError(_too_few(wanted, len(batches), name, each))
        order = torch.randperm(wanted, generator=torch.Generator().manual_seed(seed + 1), device="cpu")
        return list(batches.sample(wanted, seed).take(order).batches(size))
    instance("batches", batches, Iterable, "a Dataset or a list of (inputs, labels)")  # type: ignore[type-abstract]
    found: list[tuple[Any, Tensor]] = []
    rest: tuple[Any, Tensor] | None = None
    seen = 0
    for inputs, labels in batches_of(batches):
        seen += len(labels)
        if rest is not None:
            inputs, labels = _joined(rest[0], inputs), torch.cat([rest[1], labels])
        whole = len(labels) // size
        parts = [slice(i * size, (i + 1) * size) for i in range(min(whole, count - len(found)))]
        found += [(rows_of(inputs, part), labels[part]) for part in parts]
        if len(found) == count:
            return found
        rest = (rows_of(inputs, slice(whole * size, None)), labels[whole * size :])
    raise ValueError(_too_few(wanted, seen, name, each))


def _too_few(wanted: int, there: int, setting: str, each: int) -> str:
    text = f"{setting}={wanted // each}" + (f", of {each} examples each," if each > 1 else "")
    fewer = f", or ask for fewer: {setting}={there // each}" if there >= each else ""
    return f"{text} needs {wanted:,} examples, and there are {there:,}: give more{fewer}"


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, Mapping):
        return {key: _joined(value, second[key]) for key, value in first.items()}
    if type(first) in (tuple, list):
        return type(first)(_joined(a, b) for a, b in zip(first, second, strict=True))
    return torch.cat([first, second])


def gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Any, Tensor]],
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield for every batch the gradient of its mean loss with respect to `weights`, by name, in eval mode.

    With batches of one example these are per-sample gradients; the gradient of a larger batch is their mean, and
    the empirical Fisher of such gradients smaller by about its size. Modes, buffers and stored gradients stay as they
    are; what is frozen gets a gradient all the same.

    Args:
        model: any torch model.
        weights: name → parameter of it, as `cram_bench.compress.prunable` returns them.
        batches: (inputs, labels), as `chunks` returns them.
        forward, loss: as the probes take them: how outputs are read, and what is minimised in place of the
            cross-entropy.

    Raises:
        ValueError: a gradient is not finite, the loss has none or is no single number, or a label has no output.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # its forward would wait for the other processes, which look at other batches
    fit, flags = fitting(model), {name: weight.requires_grad for name, weight in weights.items()}
    try:
        with modes_kept(model), buffers_kept(model):
            model.eval()
            for weight in weights.values():
                weight.requires_grad_(True)
            for number, (inputs, labels) in enumerate(batches, 1):
                # no mode of autograd lasts over a yield: it would be that of whoever takes the gradients
                with torch.inference_mode(False), torch.enable_grad():
                    value = _mean_loss(model, fit(inputs), normal(labels), forward, loss)
                    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                named = {
                    name: torch.zeros_like(weight) if gradient is None else gradient.detach()
                    for (name, weight), gradient in zip(weights.items(), found, strict=True)
                }
                for name, gradient in named.items():
                    if not bool(gradient.isfinite().all()):
                        raise ValueError(
                            f"the gradient of {name} at batch {number} is not finite: look at the model's loss there, "
                            f"{float(value.detach()):g}, and at its inputs"
                        )
                yield named
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])


def _mean_loss(model: nn.Module, inputs: Any, targets: Tensor, forward: Forward | None, loss: Loss | None) -> Tensor:
    outputs = logits_of(model(inputs)) if forward is None else forward(model, inputs)
    targets = targets.to(outputs.device) if isinstance(outputs, Tensor) else targets
    if loss is None:
        labels_within(targets, classes_of(outputs).shape[1])
        value = CrossEntropy()(outputs, targets, inputs)
    else:
        value = loss(outputs, targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise ValueError(f"loss must return one number, the mean over the examples as a tensor, not {what}")
    if not value.requires_grad:
        raise ValueError("the loss has no gradient: does the model, forward or loss run under no_grad, or detach?")
    return value.reshape(())
