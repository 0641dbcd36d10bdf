"""A convolution that computes at nonzeros only."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cram_bench.deploy.nonzeros import Products, Shape


class SparseConv2d(nn.Conv2d):
    """A two-dimensional convolution and its gradients from the nonzeros of its kernels.

    Kernels, strides, paddings, dilations and groups are those of `torch.nn.Conv2d`, as are the parameters, by name,
    shape and values. The gradient of a weight that is zero is 0; see `cram_bench.deploy.SparseLinear`. Outputs are
    contiguous images (batch, channels, height, width), whatever the inputs' memory format.
    """

    _products: Products | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return outputs of shape (batch, outputs, height, width), or the same without a batch."""
        if self._products is None:
            self._products = Products(self._shape(), self._dense)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
        return self._products(input, self.weight, self.bias)

    def _shape(self) -> Shape:
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return Shape(
            self.out_channels, self.in_channels // self.groups, self.groups, _two(self.kernel_size), _two(self.stride),
            _two(self.dilation), (top, bottom, left, right) if self.padding_mode == "zeros" else (0, 0, 0, 0),
        )  # fmt: skip

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding if self.padding_mode == "zeros" else 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_products"}


def _two(pair: tuple[int, ...]) -> tuple[int, int]:
    return pair[0], pair[1]
