"""What may be set, with the docstrings that stand below the fields of `Experiment` in its source."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from dataclasses import fields
from typing import Any, get_type_hints

from cram_bench._checks import meant, shown

_PLAIN = (int, float, str, bool)


def meanings(kind: type) -> dict[str, str]:
    """Return field → the text below it, on one line and without backquotes; fields without a text are left out.

    >>> from cram_bench.experiment import Experiment
    >>> meanings(Experiment)["lr"]
    'Peak learning rate, positive.'
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = " ".join(text.value.value.replace("`", "").split())
    return found


def settings(method: str = "", dataset: str = "digits") -> list[dict[str, str]]:
    """List what may be set for a method, or at all: a row each of setting, type, default of the recipe, meaning.

    Raises:
        ValueError: the method or the data set is unknown.
    """
    from cram_bench.experiment import Experiment, recipe

    defaults, hints, texts = (
        recipe(dataset, method or "sgd").settings(),
        get_type_hints(Experiment),
        meanings(Experiment),
    )
    return [
        {
            "setting": name,
            "type": getattr(hints[name], "__name__", "") if hints[name] in _PLAIN else "list of texts",
            "default": _shown(defaults[name]),
            "meaning": texts.get(name, ""),
        }
        for name in defaults
        if not method or name not in _unused(method)
    ]


def unknown_setting(name: Any) -> str:
    """Say in one line that there is no such setting, and which is meant perhaps, by its name or by its meaning.

    >>> unknown_setting("learning_rate")
    "unknown setting 'learning_rate'; did you mean 'lr'? `cram-bench settings` lists them"
    """
    from cram_bench.experiment import Experiment

    known = [field.name for field in fields(Experiment)]
    hint = meant(name, known)
    words = str(name).replace("_", " ").strip().lower()
    if not hint and len(words) > 3:
        hint = next((f"; did you mean {n!r}?" for n, text in meanings(Experiment).items() if words in text.lower()), "")
    return f"unknown setting {shown(name)}{hint or ';'} `cram-bench settings` lists them"


def _unused(method: str) -> set[str]:
    """Return the settings that a method does not look at, or refuses."""
    from cram_bench.experiment import METHODS

    how = METHODS[method]
    unused = (
        set() if how.compresses else {"compressors", "sparse_gradients", "normalize", "mask_interval", "plain", "ramp"}
    )
    unused |= set() if "rho" in how.constants else {"rho"}
    unused |= set() if how.passes == 2 else {"halves"}
    unused |= set() if method == "cram-single" else {"ascent"}
    unused |= {"optimizer"} if method in ("sgd", "adamw") else {"prune"}
    return unused | ({"momentum"} if method == "adamw" else set())


def _shown(value: Any) -> str:
    """Return a value as one would write it after ``-s NAME``."""
    return value or "''" if isinstance(value, str) else json.dumps(value)
