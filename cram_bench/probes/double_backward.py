"""Hessian-vector products by double backpropagation (reverse over reverse)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from curvlinops import HessianLinearOperator
from torch import Tensor

Product = Callable[[list[Tensor]], tuple[Tensor, ...]]
_FEW = 2  # batches; a graph holds the activations of both passes


class DoubleBackwardHessian(HessianLinearOperator):
    """The Hessian of the mean loss, whose products are gradients of a gradient: H v = ∇(∇L(θ) · v).

    curvlinops' own operator differentiates the gradient forwards, from the data on for every vector. Here the graph of
    ∇L is recorded once for all columns of a matrix; where there are one or two batches, theirs are kept for the next
    product, which then is one more backward pass. They are recorded anew where weights or buffers changed in place, but
    by ``.data``.
    """

    SUPPORTS_BLOCKS = False

    @cached_property
    def _graphs(self) -> list[tuple[tuple[Any, ...], Product]]:
        return []

    def _matmat_batch(self, X: Tensor, y: Tensor, M: list[Tensor]) -> list[Tensor]:
        held = (*self._params, *getattr(self._model_func, "buffers", tuple)())
        key = (X, y, [tensor._version for tensor in held])
        found = [product for known, product in self._graphs if _same(known, key)]
        multiply = found[0] if found else self._product(X, y)
        if not found and len(self._data) <= _FEW:
            self._graphs[:] = [*self._graphs, (key, multiply)][-_FEW:]
        columns = [multiply([m[..., column] for m in M]) for column in range(M[0].shape[-1])]
        return [torch.stack(each, -1) for each in zip(*columns, strict=True)]

    def _product(self, X: Tensor, y: Tensor) -> Product:
        """Return the function v → H v of one batch, v and H v a tensor per parameter."""
        parameters = self._params  # not through self: a graph goes with its operator, without a cycle to be collected
        with torch.enable_grad():
            loss = self._loss_func(self._model_func(X), y)
            gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        bent = [index for index, slope in enumerate(gradient) if slope.requires_grad]  # the others are constant
        slopes = [gradient[index] for index in bent]

        def multiply(v: list[Tensor]) -> tuple[Tensor, ...]:
            if not slopes:
                return tuple(torch.zeros_like(p) for p in parameters)
            along = [v[index] for index in bent]
            return torch.autograd.grad(slopes, parameters, along, retain_graph=True, materialize_grads=True)

        return multiply


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[0] is other[0] and one[1] is other[1] and one[2] == other[2]
