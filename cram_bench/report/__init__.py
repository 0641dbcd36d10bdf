"""Reports: notebooks that name themselves (`notebook`) → what is trained (`plan`) → `execute` → `pages`.

`build` is what ``cram-bench report`` runs, and `renew` what ``cram-bench renew`` does; `reproduce` makes a report
again. A notebook uses `check_parameters`, `Output.figure` and `Output.table`. Each part is loaded when it is first
used.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "notebook": (
        "DEFAULT",
        "NOTEBOOKS",
        "Notebook",
        "Parameter",
        "check_parameters",
        "find",
        "notebooks_folder",
        "outputs",
    ),
    "output": ("Output",),
    "building": ("Built", "ReportError", "build", "check_name", "note", "renew"),
}
__all__ = sorted(name for names in _PLACES.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
