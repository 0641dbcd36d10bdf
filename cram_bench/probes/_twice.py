"""Products with the Hessian, by differentiating twice backwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from curvlinops import HessianLinearOperator
from torch import Tensor

Product = Callable[[list[Tensor]], tuple[Tensor, ...]]
_FEW = 2  # batches; a graph holds about three times what a training step holds


class TwiceBackwards(HessianLinearOperator):
    """The Hessian of the mean loss, whose products are gradients of a gradient: H v = ∇(∇L(θ) · v).

    curvlinops' own operator starts from the data for every vector. Here the graph of ∇L is drawn once for all columns of a
    matrix; where there are one or two batches, theirs are kept for the next product, which then is one more way back.
    The weights must stay as they are in between (torch refuses otherwise).
    """

    @cached_property
    def _graphs(self) -> list[tuple[Tensor, Tensor, Product]]:
        return []

    def _matmat_batch(self, X: Tensor, y: Tensor, M: list[Tensor]) -> list[Tensor]:
        known = [product for inputs, labels, product in self._graphs if inputs is X and labels is y]
        multiply = known[0] if known else self._product(X, y)
        if not known and len(self._data) <= _FEW:
            self._graphs[:] = [*self._graphs, (X, y, multiply)][-_FEW:]
        columns = [multiply([m[..., column] for m in M]) for column in range(M[0].shape[-1])]
        return [torch.stack(each, -1) for each in zip(*columns, strict=True)]

    def _product(self, X: Tensor, y: Tensor) -> Product:
        """Return the function v → H v of one batch, v and H v a tensor per parameter."""
        with torch.enable_grad():
            loss = self._loss_func(self._model_func(X), y)
            gradient = torch.autograd.grad(loss, self._params, create_graph=True, materialize_grads=True)
        bent = [index for index, slope in enumerate(gradient) if slope.requires_grad]  # the others are constant
        slopes = [gradient[index] for index in bent]

        def multiply(v: list[Tensor]) -> tuple[Tensor, ...]:
            if not slopes:
                return tuple(torch.zeros_like(p) for p in self._params)
            along = [v[index] for index in bent]
            return torch.autograd.grad(slopes, self._params, along, retain_graph=True, materialize_grads=True)

        return multiply
