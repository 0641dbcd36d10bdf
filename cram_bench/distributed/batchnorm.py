"""BatchNorm over the joined batch of several processes, on the CPU too, where torch's `SyncBatchNorm` does not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronised(model: nn.Module, device: str) -> nn.Module:
    """Return `model` with each BatchNorm replaced by one of all processes; parameters and buffers stay the same.

    On GPUs that is torch's own `SyncBatchNorm`. The names in the state dict do not change.
    """
    if device.startswith("cuda"):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if isinstance(model, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return _joint(model)
    for name, child in model.named_children():
        setattr(model, name, synchronised(child, device))
    return model


def _joint(norm: _BatchNorm) -> JointBatchNorm:
    joint = JointBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    joint._parameters, joint._buffers = norm._parameters, norm._buffers
    return joint.train(norm.training)


class JointBatchNorm(_BatchNorm):
    """In training, mean and variance over the batches of all processes; otherwise as `nn.BatchNorm2d`.

    Computed in float32 at least, in two passes: the mean of all first, then the squares around it.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm takes at least 2 dimensions, not {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; every process has to call it alike."""
        if not self.training or not distributed.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        dims, shape = [0, *range(2, values.ndim)], [1, -1, *[1] * (values.ndim - 2)]
        count = _Sum.apply(values.new_tensor(values.numel() / values.shape[1]))
        mean = _Sum.apply(values.sum(dims)) / count
        centred = values - mean.view(shape)
        var = _Sum.apply(centred.square().sum(dims)) / count
        if self.running_mean is not None:
            self._track(mean.detach(), var.detach() * count / (count - 1))
        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        result = centred * scale.view(shape)
        return (result + self.bias.view(shape) if self.affine else result).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, now in ((self.running_mean, mean), (self.running_var, var)):
            assert running is not None
            running.lerp_(now.to(running.dtype), weight)


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient of the summed losses is likewise a sum over all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Sum.forward(ctx, gradient)
