"""What a compression operator is."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor

from cram_bench.compress.masks import Masks
from cram_bench.compress.weights import dense_of


class Compressor(abc.ABC):
    """A compression operator C: which weights stay, and with which values.

    Subclasses are frozen dataclasses, so that they compare, hash and print by value. ``str(compressor)`` is a
    short specification that `cram_bench.compress.parse` reads back. A pruner defines `masks`; an operator that
    also changes the values of the weights that stay defines `transform_` too.

    Attributes:
        sparsity: the asked fraction of zeros among the prunable weights, in [0, 1].
    """

    sparsity: float

    @property
    @abc.abstractmethod
    def pattern(self) -> str:
        """Name of the pattern in tables, such as ``global``, ``uniform``, ``2:4`` or ``int8``."""

    @abc.abstractmethod
    def masks(self, weights: Mapping[str, Tensor]) -> Masks:
        """Choose which of `weights` (name → tensor) stay. Pure: the weights are only read.

        The masks name in ``dense`` the tensors that the pattern leaves; `apply_` adds those that are not prunable.
        """

    @torch.no_grad()
    def apply_(self, weights: Mapping[str, Tensor], masks: Masks | None = None) -> Masks:
        """Replace `weights` by C(weights) in place, and return the masks of those that stayed.

        Args:
            weights: name → tensor.
            masks: masks of an earlier call to hold on to; chosen anew if not given.
        """
        if masks is None:
            masks = self.masks(weights)
            masks.dense = dense_of(weights) | masks.dense
        masks.zero_(weights)
        self.transform_(weights)
        return masks

    def transform_(self, weights: Mapping[str, Tensor]) -> None:  # noqa: B027  # a pruner need not define it
        """Change the values of the weights that stay, in place. A pruner changes none."""
