"""What all probes share: a model held still, examples that stay the same, and loss and gradient over all of them.

A model need not return logits as a tensor. Without `forward`, outputs are read so: a tensor as it is; ``.logits``
(transformers); ``["logits"]`` or ``["out"]`` (torchvision's segmentation); of a tuple the first. What ``forward(model,
inputs)`` returns is taken as it is. The loss is the cross-entropy of logits (n, classes) with integer labels (n,), or
with ``loss(outputs, targets)`` what that returns: one number, the mean over the examples of a batch; targets are then
any tensor with an entry an example. Accuracy is NaN where outputs and targets are not logits and labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cram_bench.checks import initialised, instance, items, shown
from cram_bench.compress import Compressor, PruneThenQuantize, tune_batchnorm
from cram_bench.data import AT_ONCE, Batches, Dataset, batches_of
from cram_bench.losses import CrossEntropy, summed
from cram_bench.models.folding import folded
from cram_bench.outputs import classes_of, fitting, logits_of, normal, tensors_of
from cram_bench.preserve import buffers_kept, modes_kept, preserved
from cram_bench.prune import Fixed, Specification, fitted, parse
from cram_bench.train import Score

Forward = Callable[[nn.Module, Any], Any]
"""(model, inputs) → outputs."""
Loss = Callable[[Any, Tensor], Tensor]
"""(outputs, targets) → their mean loss, one number."""

NO_GRADIENT = "the loss has no gradient: does the model, forward or loss run under no_grad, or detach?"
_MOST = 2**33  # bytes of batches that are held


@contextmanager
def probing(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model in eval mode, so that losses are functions of the weights alone; put it back as it was after.

    Gradients can be taken inside, also where the caller is in ``no_grad`` or ``inference_mode``; those of sparse
    embeddings are dense there.

    Raises:
        ValueError: as `ready`.
    """
    ready(model)
    sparse = [module for module in model.modules() if getattr(module, "sparse", None) is True]
    with torch.inference_mode(False), preserved(model):
        try:
            for module in sparse:
                module.sparse = False  # type: ignore[assignment]
            yield model.eval()
        finally:
            for module in sparse:
                module.sparse = True  # type: ignore[assignment]


def ready(model: nn.Module) -> None:
    """Refuse what cannot be probed.

    Raises:
        TypeError: it is no torch model.
        ValueError: the model is lazy and has not run yet, or its weights were made in ``inference_mode``.
    """
    instance("model", model, nn.Module, "a torch model")
    initialised(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(f"{name} of the model was made in inference_mode, and cannot be probed: make it outside")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that ask for a gradient: what is frozen stands still in every probe that needs one.

    Raises:
        ValueError: there is none, or one is of half precision, in which small steps and gradients are lost.
    """
    ready(model)
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ValueError(f"no parameter of {type(model).__name__} has requires_grad; at least one is needed")
    for name, parameter in found.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"gradients need weights in float32 or float64, and {name} is {kind}: "
                "probe a copy, copy.deepcopy(model).float()"
            )
    return list(found.values())


def held(data: Batches | Problem) -> Any:
    """Return data that are the same whenever read: batches of anything but a `Dataset` or a list are read once.

    So a `DataLoader` that shuffles, or a data set that augments, gives every evaluation of a probe the same examples.
    The batches stay in memory for as long as the probe takes.

    Raises:
        TypeError: `data` are an iterator, which could be read only once, or nothing to iterate over.
        ValueError: the batches hold more than 8 GiB.
    """
    if isinstance(data, (Dataset, list, tuple, Problem)):
        return data
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        return batches_of(data)  # says why not
    found, size = [], 0
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws from it
        for batch in data:
            size += max(1024, _bytes(batch))
            if size > _MOST:
                raise ValueError(
                    f"a probe holds its batches in memory, and these take more than {_MOST / 2**30:g} GiB: give fewer, "
                    "such as a torch.utils.data.Subset, or a cram_bench Dataset, which is read anew"
                )
            found.append(batch)
    return found


def tuning_data(calibration: Batches | None) -> list[Any] | None:
    """Return what to tune BatchNorm on: `Dataset.calibration` of a `Dataset`, anything else as `held` does."""
    if calibration is None:
        return None
    return calibration.calibration() if isinstance(calibration, Dataset) else list(held(calibration))


def looked(
    model: nn.Module,
    compressors: Sequence[Compressor | Specification | str],
    batches: Batches | None = None,
    exclude: Iterable[str] = (),
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> list[Compressor]:
    """Return operators for specifications: a pruner that looks (`cram_bench.prune`) looks at `batches` now, once for
    all sparsities.

    Raises:
        ValueError: a specification cannot be read, or a pruner has nothing to look at.
    """
    what = "compressors or pruners such as 'global@0.9' or 'greedy@0.9'"
    return fitted([parse(c) for c in items("compressors", compressors, what)], model, batches, exclude, forward, loss)


def cost_of(compressor: Compressor | None) -> tuple[float, int]:
    """Return what looking took, in seconds, and how many examples were looked at; zeros where nothing looks.

    Where what stays is quantized, it is the pruner that looked.
    """
    inner = compressor.prune if isinstance(compressor, PruneThenQuantize) else compressor
    return (inner.seconds, inner.gradients) if isinstance(inner, Fixed) else (0.0, 0)


class Problem:
    """A model and the examples that a probe looks at: the same at every evaluation, on the model's device, in its type.

    Iterating gives (inputs, targets). Inputs that are floating-point tensors get the type of the model's first weight.

    Args:
        model: any torch model, in eval mode.
        data: a `Dataset`, or anything that yields (inputs, targets); see `held`.
        forward: (model, inputs) → outputs, where they are not read as this module says.
        loss: (outputs, targets) → mean loss, instead of the cross-entropy.
        batch_size: of a `Dataset`.

    Raises:
        TypeError: `forward` or `loss` cannot be called, or the data are no batches.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batches | Problem,
        forward: Forward | None = None,
        loss: Loss | None = None,
        batch_size: int = AT_ONCE,
    ) -> None:
        instance("model", model, nn.Module, "a torch model")
        for name, value, what in (
            ("forward", forward, "(model, inputs) → outputs"),
            ("loss", loss, "(outputs, targets) → number"),
        ):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function {what}, not {shown(value)}")
        self.model, self.forward, self.loss, self.batch_size = model, forward, loss, batch_size
        self.data: Batches = data.data if isinstance(data, Problem) else held(data)

    @property
    def plain(self) -> bool:
        """Whether the loss is the cross-entropy of what the model returns, read as it is by default."""
        return self.forward is None and self.loss is None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        fit = fitting(self.model)
        for inputs, targets in self._read():
            inputs = fit(inputs)
            device = next((x.device for x in tensors_of(inputs)), targets.device)
            yield inputs, normal(targets).to(device)

    def _read(self) -> Iterable[tuple[Any, Tensor]]:
        if self.loss is None or isinstance(self.data, Dataset):
            return batches_of(self.data, self.batch_size)
        return _targeted(self.data)

    def outputs(self, inputs: Any, run: nn.Module | None = None) -> Any:
        """Run the model, or `run` in its place, and read its outputs."""
        if self.forward is None:
            return logits_of((run or self.model)(inputs))
        return self.forward(self.model, inputs)

    def sum_of(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss summed over the examples of a batch, with its graph."""
        if self.loss is None:
            return summed(classes_of(outputs), targets)
        return self.mean_of(outputs, targets) * len(targets)

    def mean_of(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, with its graph, in the type of the outputs."""
        if self.loss is None:
            return CrossEntropy()(classes_of(outputs), targets, outputs)
        found = self.loss(outputs, targets)
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else shown(found)
            raise ValueError(f"loss must return one number, the mean over the examples as a tensor, not {what}")
        return found.reshape(())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return mean loss and accuracy, as `cram_bench.train.evaluate` does; accuracy NaN where there is none.

        Buffers that the network's own forward changes are put back, so that one evaluation does not change the next.

        Raises:
            ValueError: the data are empty, or outputs and labels do not go together.
        """
        total, count, correct = 0.0, 0, 0.0
        score, run = Score(), None
        with modes_kept(self.model), buffers_kept(self.model):
            self.model.eval()
            for inputs, targets in self:
                if run is None:
                    plain = self.forward is None and isinstance(inputs, Tensor)
                    run = folded(self.model, inputs) if plain else self.model
                outputs = self.outputs(inputs, run)
                if self.loss is None:
                    score.add(classes_of(outputs), targets)
                    continue
                total += float(self.mean_of(outputs, targets)) * len(targets)
                correct += _correct(outputs, targets)
                count += len(targets)
        if self.loss is None or not count:
            return score.result()
        return {"loss": total / count, "accuracy": correct / count}

    def gradient(self) -> tuple[float, dict[str, Tensor]]:
        """Return the mean loss over all the data, and its gradient by parameter name.

        Raises:
            ValueError: the data are empty, a label has no output, no parameter asks for a gradient, or the loss has
                none.
        """
        trainable(self.model)
        self.model.zero_grad()
        total, count = 0.0, 0
        with torch.enable_grad(), buffers_kept(self.model):
            for inputs, targets in self:
                loss = self.sum_of(self.outputs(inputs), targets)
                if not loss.requires_grad:
                    raise ValueError(NO_GRADIENT)
                loss.backward()
                total += float(loss.detach())
                count += len(targets)
        if not count:
            raise ValueError("the data to probe on are empty")
        named = self.model.named_parameters()
        return total / count, {name: p.grad.to_dense() / count for name, p in named if p.grad is not None}

    def tune(self, calibration: Iterable[Any]) -> None:
        """Tune the model's BatchNorms on what `tuning_data` returned."""
        tune_batchnorm(self.model, self.fitted(calibration), self.forward)

    def fitted(self, calibration: Iterable[Any]) -> list[Any]:
        """Return batches on the model's device and in its type."""
        fit = fitting(self.model)
        return [(fit(b[0]), *b[1:]) if isinstance(b, (tuple, list)) and b else fit(b) for b in calibration]


def _correct(outputs: Any, targets: Tensor) -> float:
    """Count the right classes; NaN where outputs and targets are not logits (n, classes) and integer labels (n,)."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        return float("nan")
    if targets.shape != outputs.shape[:1] or targets.is_floating_point() or targets.is_complex():
        return float("nan")
    return float((outputs.argmax(1) == targets).sum())


def _targeted(batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    for batch in batches:
        if not (
            isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor) and batch[1].ndim
        ):
            raise TypeError(
                f"a batch must be (inputs, targets), the targets a tensor with an entry an example, not {shown(batch)}"
            )
        yield batch[0], batch[1]


def _bytes(batch: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(batch))
