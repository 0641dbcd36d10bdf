"""A linear layer that computes at nonzeros only."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cram_bench.deploy.nonzeros import Products, Shape


class SparseLinear(nn.Linear):
    """y = W x + b, and its gradients, from the nonzeros of W: O(nonzeros · batch) instead of O(weights · batch).

    dX = Wᵀ dY as in a dense layer; dW is dY Xᵀ where W is not zero and 0 elsewhere: a pruned weight is not brought
    back, nor is one that training happened to put at exactly 0. Parameters are those of `torch.nn.Linear`, by
    name, shape and values. SparseProp, arXiv 2302.04852.

    >>> import torch
    >>> layer = SparseLinear(3, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 2, 0], [1, 0, 0]]))
    >>> layer(torch.tensor([[1.0, 2, 3]])).sum().backward()
    >>> layer.weight.grad.tolist()
    [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]
    """

    _products: Products | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return outputs of shape (…, outputs) for inputs of shape (…, inputs)."""
        if self._products is None:
            shape = Shape(self.out_features, self.in_features, linear=True)
            self._products = Products(shape, F.linear)
        return self._products(input, self.weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_products"}
