"""All methods, in the order of figures. A new one is a file with `METHODS`, and its name at the end of `_FILES`."""

from __future__ import annotations

from cram_bench.checks import unknown
from cram_bench.optim import BASES, STEPS
from cram_bench.recipes import baselines, cheaper, cram, gradual, looking, preconditioned, sam
from cram_bench.recipes.method import Method

_FILES = (baselines, sam, cram, cheaper, looking, preconditioned, gradual)
_FIRST = (
    "sgd",
    "sam",
    "cram",
    "cram+",
    "cram+-multi",
    "cram-single",
    "momentum-sam",
    "cram-half",
    "adamw",
    "cram+-ramp",
)
_ALL = {name: method for file in _FILES for name, method in file.METHODS.items()}

_BARE = {kind: Method(kind, {"step": kind}) for kind in STEPS if kind != "plain"}
_BARE |= {kind: Method(kind, {"optimizer": kind}) for kind in BASES}

METHODS: dict[str, Method] = {name: (_BARE | _ALL)[name] for name in dict.fromkeys((*_FIRST, *_ALL, *_BARE))}
"""Methods by the name that the command line and the tables use; the place of one gives its colour.

A step or an optimizer that no file names is a method by its own name, with its own defaults.
"""


def known(method: str) -> Method:
    """Return the method of this name.

    Raises:
        ValueError: there is none, with a suggestion.
        TypeError: the name is no text.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be of type str, not {method!r}")
    if method not in METHODS:
        raise ValueError(unknown("method", method, list(METHODS)))
    return METHODS[method]


def label(method: str) -> str:
    """Return how figures call a method, also one that is not known here, and what tables put after its name.

    >>> label("cram+"), label("gmp*, distilled"), label("mine")
    ('CrAM+', 'GMP*, distilled', 'mine')
    """
    name, comma, more = method.partition(", ")
    return f"{METHODS[name].label}{comma}{more}" if name in METHODS else method
