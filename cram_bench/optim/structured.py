"""Train what is left of a network when heads, columns and channels went as a whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cram_bench.data import Batches
from cram_bench.optim.held import Pruning
from cram_bench.prune.structured import to_counts
from cram_bench.settings import Count, Text


@dataclass(frozen=True)
class Structured(Pruning):
    """Remove units of what a training starts from, before its first step, and train the smaller network that is left.

    A step of the gradual form of ZipLM (arXiv 2302.04089, section 3.2): prune, distil (`cram_bench.losses.Distil`, with
    the dense network as its teacher), and start the next training from this one. Which counts make a network as fast as
    is wanted, a table of latencies says (`cram_bench.prune.ziplm`, `Shrinkable.counts`); here are the counts
    themselves, so that a training is the same on machines of any speed. The run holds the smaller network, and
    ``structure.json`` beside it.

    Raises:
        ValueError: `units` are no counts.
    """

    kind: ClassVar[str] = "structured"

    units: Text = ""
    """How many units stay in each structure of `start`, in the order of `cram_bench.prune.structures`: ``6 768 …``."""
    looked_at: Count = 256
    """Training examples whose inputs decide which units go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[0-9]{1,6}( [0-9]{1,6})*", self.units):
            raise ValueError(f"units must be counts with a space between, such as '6 768 6 768', not {self.units!r}")

    @property
    def counts(self) -> list[int]:
        """The counts that `units` writes."""
        return [int(count) for count in self.units.split()]

    @property
    def sparsity(self) -> float:
        return 0.0  # of what is left, which is another network

    def shrink_(self, model: nn.Module, batches: Callable[[], Batches]) -> dict[str, list[int]]:
        found = to_counts(model, batches(), self.counts, samples=self.looked_at)
        found.apply_(model)
        return {name: list(units) for name, units in found.structure.items()}
