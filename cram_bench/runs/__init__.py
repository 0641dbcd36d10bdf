"""The run store: a run is a folder named by the hash of its settings.

    store/
      1f0c…/               a finished run: settings.json, history.csv, model.safetensors, environment.json
                           and, of a network that was shrunk, structure.json
      .training/1f0c…/     one that trains, was interrupted or failed: settings.json, checkpoint.pt or failed.json
      .locks/1f0c….lock    held by the process that trains it, which it names; free when that process dies
      .index/              what the folders hold, for quick answers; may be deleted (index.py)

A folder gets its final name by one rename when everything in it is written, so what has the name is whole. Its
environment.json holds the SHA-256 of all files, itself included, and every reading compares.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cram_bench.runs.environment import commit, machine
    from cram_bench.runs.how import Machine
    from cram_bench.runs.publishing import copy, write_shrunk
    from cram_bench.runs.store import Run, RunError, Store, describe, summary
    from cram_bench.runs.training import Checkpoint, ensure, ensure_all

__all__ = [
    "Checkpoint",
    "Machine",
    "Run",
    "RunError",
    "Store",
    "commit",
    "copy",
    "describe",
    "ensure",
    "ensure_all",
    "machine",
    "summary",
    "write_shrunk",
]

# Loaded when first used: a store of many runs is listed without torch, which takes longer than the list.
_WHERE = {
    "environment": ("commit", "machine"),
    "how": ("Machine",),
    "index": (),
    "publishing": ("copy", "write_shrunk"),
    "store": ("Run", "RunError", "Store", "describe", "summary"),
    "training": ("Checkpoint", "ensure", "ensure_all"),
}


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name == module:
            return importlib.import_module(f"{__name__}.{module}")
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_WHERE])
