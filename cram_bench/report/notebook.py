"""Notebooks name themselves: what each asks and trains is in its metadata and parameters cell. Light to import."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

_PLAIN = (str, int, float, bool)
KINDS: dict[str, Any] = {
    **{kind.__name__: kind for kind in _PLAIN},
    **{f"list[{kind.__name__}]": list[kind] for kind in _PLAIN},  # type: ignore[valid-type]
}
"""The types that a parameter may be annotated with, as they are written."""
RESERVED = ("dataset", "output", "seeds", "store", "tables")
"""Parameters that a report sets itself."""


# ---------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameter:
    """A parameter as a notebook annotates it, such as ``sample: int = 300  # training images``; None is no default."""

    name: str
    kind: str | None
    default: Any = None
    meaning: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            found = f"not {self.kind}" if self.kind else "and is not"
            raise TypeError(f"parameter {self.name} must be annotated as one of {', '.join(KINDS)}, {found}")

    def check_type(self, value: Any) -> None:
        """Refuse a value of another type, and an empty list where the default is not; an integer serves as a float.

        Raises:
            TypeError: it is.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            TypeAdapter(KINDS[str(self.kind)]).validate_python(value, strict=True)
            right = value != [] or not self.default
        except ValidationError:
            right = False
        if not right:
            like = "" if self.default is None else f" like its default {self.default!r}"
            raise TypeError(f"parameter {self.name} must be {self.kind}{like}, not {_checks().shown(value)}")

    def check_range(self, value: Any) -> None:
        """Refuse numbers that no notebook can use: negative, NaN, infinite, and 0 where the default counts something.

        Raises:
            ValueError: it is one. An integer whose default is 0 may be 0, which stands for the usual number.
        """
        if self.kind == "int" and self.default:
            _checks().integer(f"parameter {self.name}", value, 1)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, (int, float)) and not isinstance(each, bool):
                _checks().number(f"parameter {self.name}", each, 0)


def _checks() -> Any:
    """Return the module of checks, which loads torch: only where a value is checked."""
    return importlib.import_module("cram_bench.checks")


def check_parameters(namespace: Mapping[str, Any], **types_by_name: Any) -> None:
    """Refuse a misspelt or ill-typed notebook parameter. Call it with ``globals()`` right after the imports.

    Args:
        namespace: the notebook's global names: its parameters, and those that papermill put in.
        types_by_name: every parameter and its type, one of `KINDS`; by default those that the parameters cell
            annotates.

    Raises:
        NameError: a name is no parameter, with a suggestion, or a parameter is missing.
        TypeError: a value has another type.
        ValueError: a number is negative or not finite, or too small.

    >>> check_parameters({"epochs": 3, "epcohs": 5}, epochs=int)
    Traceback (most recent call last):
    NameError: unknown parameter 'epcohs'; did you mean 'epochs'? (allowed: epochs)
    """
    if not types_by_name and "In" not in namespace:  # a notebook that was made a script
        types_by_name = dict(getattr(sys.modules.get(namespace.get("__name__", "")), "__annotations__", {}))
    assigned = [each for cell in namespace.get("In", ()) for each in _literals(cell)]
    given = {name for name, *_ in assigned} if "In" in namespace else set(namespace)
    written = {kind: text for text, kind in KINDS.items()}
    known = {name: Parameter(name, written.get(kind, str(kind))) for name, kind in types_by_name.items()}
    known = known or {name: Parameter(name, *rest) for name, *rest in assigned if rest[0] is not None}
    for name, value in namespace.items():
        if name in known:
            known[name].check_type(value)
            known[name].check_range(value)
        elif name in given and not name.startswith("_") and not isinstance(value, types.ModuleType):
            raise NameError(_checks().unknown("parameter", name, list(known)))
    if missing := [name for name in known if name not in namespace]:
        raise NameError(f"parameter {missing[0]!r} is missing")


def _literals(source: str) -> list[tuple[str, str | None, Any]]:
    """Return (name, annotation, value) of each assignment in a cell that assigns literals and does nothing else.

    Such are parameters, and what papermill injects, which writes NaN as a call. Other names in a running notebook are
    its own results; they are there when its cells are run again.
    """
    found = []
    try:
        body: list[Any] = ast.parse(source).body
        for node in body:
            annotated = hasattr(node, "annotation")
            number = getattr(getattr(node.value, "func", None), "id", "") == "float"
            value = ast.literal_eval(node.value.args[0] if number else node.value)
            for target in [node.target] if annotated else node.targets:
                found.append(
                    (target.id, ast.unparse(node.annotation) if annotated else None, float(value) if number else value)
                )
    except (SyntaxError, AttributeError, ValueError, IndexError, TypeError):
        return []
    return found


# ---------------------------------------------------------------- notebooks


@dataclass(frozen=True)
class Notebook:
    """A notebook and its plan: what its metadata say under ``cram_bench``. A new one is a file; nothing lists it."""

    path: Path
    question: str = ""
    """What it asks, in a line."""
    experiments: str = ""
    """The function of its own parameters that returns what is to be trained, such as ``recipes.transfer``. One
    without it is for the reader, not for a report."""
    order: int = 100
    """Its place in the list of notebooks."""
    usual: bool = False
    """Whether it is in a report that names no notebook; the first of these leads."""
    profile: str = "quick"
    """The profile of a report that it leads, where none is asked for."""

    @classmethod
    def open(cls, path: Path) -> Notebook | None:
        """Read a notebook's plan; None where it has none.

        Raises:
            ValueError: the file is no notebook, or its plan has an unknown key.
            TypeError: what the plan says has another type.
        """
        plan = _content(path)["metadata"].get("cram_bench")
        if plan is None:
            return None
        known = {
            field.name: Parameter(f"metadata.cram_bench.{field.name}", str(field.type)) for field in fields(cls)[1:]
        }
        with _named(path):
            for name, value in plan.items():
                if name not in known:
                    raise ValueError(_checks().unknown("key of metadata.cram_bench", name, list(known)))
                known[name].check_type(value)
        return cls(path, **plan)

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters by name, in order, as papermill reads them off the parameters cell: a line each.

        Raises:
            ValueError: there is not one such cell, or it holds more than assignments of literals, or a line that
                papermill does not understand.
            TypeError: one is not annotated with a type of `KINDS`.
        """
        from papermill import inspect_notebook

        tagged = [cell for cell in _content(self.path)["cells"] if "parameters" in cell["metadata"].get("tags", [])]
        with _named(self.path):
            if len(tagged) != 1:
                raise ValueError(f"it needs exactly one cell tagged 'parameters', and has {len(tagged)}")
            source, read = "".join(tagged[0]["source"]), inspect_notebook(self.path)
            assigned = _literals(source)
            if source.strip() and not assigned:
                raise ValueError("the parameters cell may only assign literals to names")
            if hidden := [name for name, *_ in assigned if name not in read]:
                raise ValueError(f"papermill does not read {hidden[0]}; an '=' in its comment or value hides it")
            return {name: Parameter(name, kind, value, read[name]["help"]) for name, kind, value in assigned}

    @property
    def planner(self) -> Callable[..., Any]:
        """The function that returns the experiments."""
        module, _, name = self.experiments.rpartition(".")
        try:
            return getattr(importlib.import_module(f"cram_bench.{module}"), name)  # type: ignore[no-any-return]
        except (ImportError, AttributeError):
            raise ValueError(f"{self.path.name}: cram_bench has no function {self.experiments!r}") from None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors begin with the name of the notebook."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path.name}: {_checks().one_line(error)}") from error


def notebooks_folder() -> Path:
    """Return the folder of the notebooks: the one that was installed with the package, or the checkout's."""
    here = Path(__file__).resolve().parents[1]
    for found in (here / "_notebooks", here.parent / "notebooks"):
        if found.is_dir():
            return found
    raise FileNotFoundError(
        "the notebooks of cram_bench are not beside the package; give their folder with --notebooks"
    )


def find(where: str | os.PathLike[str] | None = None) -> dict[str, Notebook]:
    """Return name → notebook for those of a folder that a report can have, in their order; by default this package's.

    Raises:
        ValueError: there is none, or what one says of itself is wrong.
        OSError: the folder cannot be read.
    """
    there = Path(where or notebooks_folder())
    opened = [Notebook.open(there / name) for name in sorted(os.listdir(there)) if name.endswith(".ipynb")]
    found = [notebook for notebook in opened if notebook is not None and notebook.experiments]
    if not found:
        raise ValueError(f"{there} has no notebook for a report: one whose metadata.cram_bench name its experiments")
    return {notebook.name: notebook for notebook in sorted(found, key=lambda notebook: notebook.order)}


def outputs(path: Path) -> list[str]:
    """List the files, relative to the report, that calls of ``out.figure``, ``out.table``, ``out.measured`` write.

    Raises:
        ValueError: a name of one is no file's, so that it would be written, and removed, outside of the report; or the
            code is no Python.
    """
    source = "\n".join("".join(cell["source"]) for cell in _content(path)["cells"] if cell["cell_type"] == "code")
    kinds = {  # method → where the name stands among its arguments, and the files
        "figure": (1, ("figures/{}.svg", "figures/{}.png")),
        "table": (1, ("tables/{}.csv",)),
        "measured": (0, ("tables/{}.csv",)),
    }
    found = []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:  # a magic of IPython, too: whoever reads must find the calls
        raise ValueError(f"{path} is not Python: {_checks().one_line(error)}") from error
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in kinds:
            place, files = kinds[call.func.attr]
            if len(call.args) > 1 and isinstance(name := call.args[place], ast.Constant):
                if not isinstance(name.value, str) or not re.fullmatch(r"[^./\\][^/\\]*", name.value):
                    rule = "that of one file, without / or \\ and not beginning with a dot"
                    raise ValueError(
                        f"{path}: the name of a figure or table must be {rule}, not {_checks().shown(name.value)}"
                    )
                found += [file.format(name.value) for file in files]
    return list(dict.fromkeys(found))


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["cells"], content["metadata"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not readable as a notebook: {error!r}") from error
    return content  # type: ignore[no-any-return]


def __getattr__(name: str) -> Any:
    """Return `NOTEBOOKS`, name → the function of its experiments, or `DEFAULT`, the usual names."""
    if name == "NOTEBOOKS":
        return {each: notebook.planner for each, notebook in find().items()}
    if name == "DEFAULT":
        return tuple(each for each, notebook in find().items() if notebook.usual)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
