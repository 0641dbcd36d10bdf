"""BatchNorm tuning: re-estimate running statistics after the weights have changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cram_bench.checks import instance, shown
from cram_bench.preserve import modes_kept


class _Moments:
    """Pooled mean and variance of a BatchNorm's input, merged over batches in float64 (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64, device="cpu")
        self.squares = torch.zeros((), dtype=torch.float64, device="cpu")  # summed squared deviations from the mean

    def add(self, x: Tensor) -> None:
        count = x.numel() // x.shape[1]
        if not count:
            return
        var, mean = _var_mean(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + var * count + delta.square() * (self.count * count / total)
        self.count = total


def _var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean of every channel, in float64."""
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        return var.double(), mean.double()
    # Images, pixels, channels: sums over an image are matrix products, which take a quarter of the time of var_mean.
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    ones = pixels.new_ones(1, 1, pixels.shape[1]).expand(len(pixels), 1, -1)
    count = pixels.shape[0] * pixels.shape[1]
    mean = torch.bmm(ones, pixels).double().sum((0, 1)) / count
    deviations = pixels - mean.to(pixels.dtype)
    return torch.bmm(ones, deviations.square_()).double().sum((0, 1)) / count, mean


@torch.no_grad()
def tune_batchnorm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Set every BatchNorm's running mean and variance to those of its input over `batches`, in place.

    The statistics are the exact mean and unbiased variance pooled over all samples given, computed while each
    BatchNorm normalises by its batch, as in training. The authors of CrAM reset the statistics and take a moving
    average over about 100 passes of 1,000 training samples (arXiv 2207.14200, BNT); a moving average weighs the
    last batches most, the pooled average weighs all samples alike. Dropout is off, weights and modes stay as they
    are, and a model without BatchNorm is left untouched.

    A BatchNorm that the network does not run in eval mode, such as that of an auxiliary head, keeps its statistics; one
    warning names and counts those.

    Args:
        model: any torch model.
        batches: tensors of inputs, or tuples that begin with one, such as a `DataLoader` gives. Large batches
            (a few hundred) come closest to the statistics that evaluation will use.
        forward: (model, inputs) → anything, to run the model on inputs that it does not take as its only argument.

    Raises:
        ValueError: `batches` is empty although the model has BatchNorm layers, or none of these runs; they are left as
            they were.
        TypeError: `batches` are no batches.

    >>> model = nn.BatchNorm1d(1)
    >>> tune_batchnorm(model, [torch.tensor([[1.0], [3.0]])])
    >>> model.running_mean.tolist(), model.running_var.tolist()
    ([2.0], [2.0])
    """
    what = "batches of inputs, such as Dataset.calibration() gives"
    instance("what BatchNorm is tuned on", batches, Iterable, what)  # type: ignore[type-abstract]
    norms = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return
    moments = {norm: _Moments() for norm in norms}
    buffers = list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]

    def see(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments[norm].add(args[0] if args else kwargs["input"])  # type: ignore[index]

    hooks = [norm.register_forward_pre_hook(see, with_kwargs=True) for norm in norms]
    count = 0
    try:
        with modes_kept(model):
            model.eval()
            for norm in norms:
                norm.training = True
            for count, batch in enumerate(batches, 1):  # noqa: B007
                inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if forward is not None:
                    forward(model, inputs)
                elif isinstance(inputs, (Tensor, Mapping)):
                    model(inputs)
                else:
                    raise TypeError(f"a batch must be inputs, or a tuple that begins with them, not {shown(batch)}")
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
    ran = {norm: moment for norm, moment in moments.items() if moment.count}
    if count and not ran:
        raise ValueError(f"no BatchNorm of {type(model).__name__} ran on these batches, so that none can be tuned")
    for moment in ran.values() if ran else moments.values():
        if moment.count < 2:
            raise ValueError(f"BatchNorm tuning needs at least two values per channel, and was given {moment.count}")
    for norm, moment in ran.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(moment.mean)
        norm.running_var.copy_(moment.squares / (moment.count - 1))
    if idle := [name or type(norm).__name__ for norm, name in norms.items() if norm not in ran]:
        others = f", {', '.join(idle[:3])}{' …' if len(idle) > 3 else ''}"
        warnings.warn(
            f"{len(idle)} of {len(norms)} BatchNorms did not run and keep their statistics{others}", stacklevel=2
        )
