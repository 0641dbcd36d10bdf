"""Reports: notebooks that name themselves (`notebook`) → what is trained (`plan`) → executed (`execute`) → pages (`pages`).

`build` is what ``cram-bench report`` runs, and `renew` what ``cram-bench renew`` does; `reproduce` makes a report again. A
notebook uses `check_parameters`, `Output.figure` and `Output.table`. Each part is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cram_bench.report.building import Built, ReportError, build, check_name, note, renew
    from cram_bench.report.notebook import Notebook, Parameter, check_parameters, find, outputs
    from cram_bench.report.notebook import folder as notebooks_folder
    from cram_bench.report.output import Output

    NOTEBOOKS: dict[str, Any]
    DEFAULT: tuple[str, ...]

_IN = {
    "building": ("Built", "ReportError", "build", "check_name", "note", "renew"),
    "notebook": ("Notebook", "Parameter", "check_parameters", "find", "outputs"),
    "output": ("Output",),
}
_PLACES = {name: (module, name) for module, names in _IN.items() for name in names} | {
    "notebooks_folder": ("notebook", "folder")
}
__all__ = [
    "DEFAULT", "NOTEBOOKS", "Built", "Notebook", "Output", "Parameter", "ReportError", "build", "check_name",
    "check_parameters", "find", "note", "notebooks_folder", "outputs", "renew",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load what is asked for; `NOTEBOOKS` is notebook → the function that returns its experiments, `DEFAULT` the usual ones."""
    if name in _PLACES:
        module, own = _PLACES[name]
        return getattr(importlib.import_module(f"{__name__}.{module}"), own)
    if name in ("NOTEBOOKS", "DEFAULT"):
        from cram_bench.report.notebook import find

        known = find()
        if name == "DEFAULT":
            return tuple(each for each, notebook in known.items() if notebook.usual)
        return {each: notebook.planner for each, notebook in known.items()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
