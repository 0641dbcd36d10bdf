"""Panels for notebooks: move a slider, see what a compression does to several networks.

cb.widgets.explorer(runs)
cb.widgets.explorer({"mine": model}, data=test, calibration=train)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cram_bench.data import Batches
from cram_bench.runs import Run
from cram_bench.widgets.choices import BITS, PATTERNS
from cram_bench.widgets.panel import Explorer
from cram_bench.widgets.subject import Answer, Subject

__all__ = ["BITS", "PATTERNS", "Answer", "Explorer", "Subject", "explorer"]


def explorer(
    subjects: Sequence[Run] | Mapping[str, nn.Module],
    data: Batches | None = None,
    calibration: Batches | int | None = None,
    **options: Any,
) -> Explorer:
    """Return a panel that shows what compression does to networks; put it last in a cell, or ``display`` it.

    It works in a thread of its own until `Explorer.close` is called; one that is replaced in a notebook is best closed.

    Args:
        subjects: finished runs on the same data, or any torch image classifiers by a label of yours; of these copies
            are worked on.
        data: what models are evaluated on: a `Dataset`, a `DataLoader`, or a list of (inputs, labels). Runs know their
            own.
        calibration: training data of models, for BatchNorm tuning and pruners that look; of runs how many training
            examples BatchNorm is tuned on.
        options: sample and delay of `Explorer`.
    """
    return Explorer(subjects, data, calibration, **options)
