"""cram_bench: a workbench for networks that survive one-shot compression.

    import cram_bench as cb

Rooms, in the order in which they may use each other: `compress`, `distributed`, `models`, `data`, `curvature`, `prune`,
`deploy`, `losses`, `schedules`, `optim`, `train`, `experiment`, `recipes`, `runs`, `sweep`, `probes`, `plots`,
`charts`, `widgets`, `report`, `cli`. Each is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"
_ROOMS = (
    "compress",
    "distributed",
    "models",
    "data",
    "curvature",
    "prune",
    "deploy",
    "callbacks",
    "losses",
    "schedules",
    "optim",
    "train",
    "progress",
    "experiment",
    "recipes",
    "runs",
    "executors",
    "sweep",
    "probes",
    "plots",
    "charts",
    "widgets",
    "report",
    "cli",
)
__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
