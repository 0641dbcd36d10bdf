"""Panels for notebooks: move a slider, see what a compression does to the networks of several runs.

cb.widgets.explorer(runs)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cram_bench.runs import Run
from cram_bench.widgets.panel import BITS, PATTERNS, Explorer
from cram_bench.widgets.subject import Answer, Subject

__all__ = ["BITS", "PATTERNS", "Answer", "Explorer", "Subject", "explorer"]


def explorer(runs: Sequence[Run], **options: Any) -> Explorer:
    """Return a panel that shows what compression does to `runs`; put it last in a cell, or ``display`` it.

    It works in a thread of its own until `Explorer.close` is called; one that is replaced in a notebook is best closed.

    Args:
        runs: finished runs on the same data.
        options: sample, calibration and delay of `Explorer`.
    """
    return Explorer(runs, **options)
