"""BatchNorm that goes through a batch channel by channel, for what stands behind sparse convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram_bench.deploy import nonzeros
from cram_bench.deploy.kernel import Kernel, compiled
from cram_bench.deploy.memory import memory


class ChannelwiseBatchNorm2d(nn.BatchNorm2d):
    """y = (x − μ)/√(σ² + ε) · γ + β, mean μ and variance σ² of each channel over a batch of contiguous images.

    A channel is read from memory once and then from the cache, where torch reads it for μ, σ² and y. Parameters and
    buffers are those of `torch.nn.BatchNorm2d`, which computes all else: evaluation, other types, other memory formats,
    second derivatives. Ioffe & Szegedy, arXiv 1502.03167.

    >>> x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    >>> ChannelwiseBatchNorm2d(1, eps=0.0)(x).flatten().tolist()
    [-1.0, 1.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return outputs of the shape of the inputs, (batch, channels, height, width)."""
        kernel = compiled() if self._fits(input) else None
        if kernel is None:
            return super().forward(input)
        y, mean, variance = _Normalised.apply(input, self.weight, self.bias, self.eps, kernel)
        if self.training and self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                self._track(mean, variance, input.numel() // input.shape[1])
        return y

    def _fits(self, x: Tensor) -> bool:
        return (
            self.training
            and nonzeros.plain(x, self.weight, self.bias, self.running_mean, self.running_var)
            and x.ndim == 4
            and x.is_contiguous()
            and x.shape[1] == self.num_features
            and x.numel() > x.shape[1]
        )

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if factor is None else factor
        self.running_mean.lerp_(mean, factor or 0.0)
        self.running_var.lerp_(variance * (count / (count - 1)), factor or 0.0)


class _Normalised(torch.autograd.Function):
    """y, μ and σ² of a batch; a second derivative goes through torch's own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kernel: Kernel
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.eps, ctx.kernel = eps, kernel
        ctx.sizes = len(x), x.shape[1], x.shape[2] * x.shape[3]
        ctx.threads = max(1, min(torch.get_num_threads(), x.numel() // nonzeros.WORK))
        mean, variance, scale = (x.new_empty(x.shape[1]) for _ in range(3))
        y = memory().empty(*x.shape)
        kernel.normalise(*ctx.sizes, eps, ctx.threads, *nonzeros.addresses(weight, bias, x, mean, variance, scale, y))
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            asked = [t for t, want in zip((x, weight, bias), wanted, strict=True) if want]
            y = F.batch_norm(x, None, None, weight, bias, training=True, eps=ctx.eps)
            found = iter(torch.autograd.grad(y, asked, dy, create_graph=True))
            return (*(next(found) if want else None for want in wanted), None, None)
        dy = dy.contiguous()
        dx = memory().empty(*x.shape) if wanted[0] else None
        dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
        ctx.kernel.differentiate(
            *ctx.sizes, ctx.threads, *nonzeros.addresses(weight, mean, scale, x, dy, dx, dweight, dbias)
        )
        return dx, dweight if wanted[1] else None, dbias if wanted[2] else None, None, None
