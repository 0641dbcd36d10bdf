"""What a compression operator is."""

from __future__ import annotations

import abc
from collections.abc import Mapping

from torch import Tensor

from cram_bench.compress.masks import Masks


class Compressor(abc.ABC):
    """A compression operator C: weights → the masks of those that stay.

    Subclasses are frozen dataclasses, so that they compare, hash and print by value. ``str(compressor)`` is a
    short specification that `cram_bench.compress.parse` reads back.

    Attributes:
        sparsity: the asked fraction of zeros among the prunable weights, in [0, 1].
    """

    sparsity: float

    @property
    @abc.abstractmethod
    def pattern(self) -> str:
        """Name of the sparsity pattern in tables, such as ``global``, ``uniform`` or ``2:4``."""

    @abc.abstractmethod
    def masks(self, weights: Mapping[str, Tensor]) -> Masks:
        """Choose which of `weights` (name → tensor) stay. Pure: the weights are only read."""
