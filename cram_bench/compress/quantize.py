"""Quantization of weights, alone or after pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cram_bench.compress.base import Compressor
from cram_bench.compress.masks import Masks
from cram_bench.compress.weights import by_output, dense_of


def quantized(weight: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2^bits − 1 levels, symmetric about zero, a scale per output channel.

    s_i = max_j |w_ij| / (2^(bits−1) − 1) and Q(w)_ij = s_i · round(w_ij / s_i), halves to even. The result has the
    dtype of the weight ("fake" quantization): it holds the values that an integer kernel would use. Zeros stay
    zeros, and a channel of zeros stays as it is. Of half-precision weights scale and levels are computed in float64 and
    the result is rounded once: in half precision the scale of tiny weights would be zero.

    Args:
        weight: shape (out, …); the first dimension is the channel.
        bits: 2 to 16.

    >>> quantized(torch.tensor([[0.1, -0.7, 0.36], [0.0, 0.0, 0.0]]), bits=4)  # scale 0.1
    tensor([[ 0.1000, -0.7000,  0.4000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    rounded, scale = levels(weight, bits)
    return rounded.mul_(scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)


def levels(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return round(w_ij / s_i), whole numbers in the shape of the weight, and s_i, of shape (out,): see `quantized`.

    Both are of the dtype in which they were computed.
    """
    top = 2 ** (bits - 1) - 1
    values = weight.detach()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.double()
    peak = (values if values.ndim > 1 else values[:, None]).abs().flatten(1).amax(1)
    scale = peak / top
    # Below the smallest number a scale is zero; every value is then a multiple of that number, and stays what it is.
    least = torch.full_like(scale, torch.finfo(scale.dtype).smallest_normal * torch.finfo(scale.dtype).eps)
    scale = torch.where(scale > 0, scale, torch.where(peak > 0, least, torch.ones_like(scale)))
    return (values / scale.view(-1, *[1] * (weight.ndim - 1))).round_(), scale


@dataclass(frozen=True)
class Quantize(Compressor):
    """Round every prunable weight to `bits` bits, symmetric and per output channel (`quantized`).

    Of weights that `prunable` found it is the output channel wherever the layer stores it; of a stack of matrices that
    only the model itself can tell apart (experts), every matrix has one scale.

    As a compressor of CrAM the gradient at the rounded weights is applied to θ unchanged, which is the
    straight-through estimator. No weight counts as zeroed: the masks are all true.

    Raises:
        ValueError: `bits` is not an integer from 2 to 16.
    """

    bits: int = 8
    sparsity = 0.0

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be an integer from 2 to 16, not {self.bits!r}")

    @property
    def pattern(self) -> str:
        return f"int{self.bits}"

    def __str__(self) -> str:
        return self.pattern

    def masks(self, weights: Mapping[str, Tensor]) -> Masks:
        ones = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        return Masks(ones, dense_of(weights))

    @torch.no_grad()
    def transform_(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            weight.copy_(by_output(weights, name, quantized(by_output(weights, name, weight), self.bits)))


@dataclass(frozen=True)
class PruneThenQuantize(Compressor):
    """Prune with one operator, then quantize what stays: C = Q ∘ P. Zeros stay exact zeros.

    >>> from cram_bench.compress import NM
    >>> str(PruneThenQuantize(NM(2, 4), Quantize(8)))
    '2:4+int8'
    """

    prune: Compressor
    quantize: Quantize

    @property
    def sparsity(self) -> float:  # type: ignore[override]
        return self.prune.sparsity

    @property
    def pattern(self) -> str:
        return f"{self.prune.pattern}+{self.quantize.pattern}"

    def __str__(self) -> str:
        return f"{self.prune}+{self.quantize}"

    def masks(self, weights: Mapping[str, Tensor]) -> Masks:
        return self.prune.masks(weights)

    @torch.no_grad()
    def apply_(self, weights: Mapping[str, Tensor], masks: Masks | None = None) -> Masks:
        masks = self.prune.apply_(weights, masks)
        self.quantize.transform_(weights)
        return masks
