"""Settings as parts: small frozen values that live beside the code they build, and the flat names that people write.

A `Part` is a choice, its fields are its settings. Types and limits stand in the annotations and are checked by
pydantic, strictly; whatever is wrong is one line that names the setting, what is allowed, and the value.

Outside (settings files, ``-s lr 0.05``, sweep files) names are flat. Those of `ORIGINAL` are written alone, those of
later parts after their role, as in ``optimizer.damping``; where only one part has it, the name alone is understood too.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from cram_bench.checks import shown, suggestion

ORIGINAL: Mapping[str, Any] = {
    "dataset": "digits", "model": "convnet", "method": "sgd", "epochs": 20, "seed": 0, "batch_size": 128, "lr": 0.1,
    "momentum": 0.9, "optimizer": "sgd", "weight_decay": 5e-4, "warmup_epochs": 0.0, "augment": True, "halves": False,
    "precision": "float32", "rho": 0.0, "compressors": [], "sparse_gradients": True, "normalize": False,
    "mask_interval": 1, "plain": 0.0, "ramp": False, "ascent": "momentum", "start": "", "prune": "", "resize": 0,
    "holdout": 0, "crop": 0, "flip": True,
}  # fmt: skip
"""The settings of before there were parts, with the defaults that their ids are hashed against. Frozen for ever."""


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _readable(value: str) -> str:
    if "\0" in value:
        raise ValueError("a text without NUL")  # no path may hold one
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # a name in bytes that were not understood
        raise ValueError("a text that UTF-8 can hold; where the locale is not UTF-8, set PYTHONUTF8=1")
    return value


Text = Annotated[str, BeforeValidator(_as_text), AfterValidator(_readable)]
Texts = Annotated[
    tuple[Text, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    Field(description="a list of strings"),
]  # fmt: skip
Positive = Annotated[float, Field(gt=0, description="positive")]
NotNegative = Annotated[float, Field(ge=0, description="not negative")]
Fraction = Annotated[float, Field(ge=0, lt=1, description="in [0, 1)")]
Count = Annotated[int, Field(ge=1, description="at least 1")]


@dataclass(frozen=True)
class Part:
    """A choice with settings: subclass it as a frozen dataclass, with `role` and `kind`.

    Raises:
        ValueError: a value is outside what its annotation allows.
        TypeError: a value has another type; integers serve as floats, lists as tuples, paths as texts.

    >>> from cram_bench.optim import bases
    >>> bases.SGD(momentum=1.5)
    Traceback (most recent call last):
    ValueError: momentum must be in [0, 1), not 1.5
    """

    role: ClassVar[str] = ""
    """What is chosen: ``optimizer``, ``step``, ``loss``, ``pruning``, ``schedule`` or ``data``."""
    kind: ClassVar[str] = ""
    """The name of this choice, unless there is no other."""

    def __post_init__(self) -> None:
        for name, (adapter, allowed) in _adapters(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, _checked(name, getattr(self, name), adapter, allowed))

    @classmethod
    def flat(cls) -> dict[str, str]:
        """Return field → the name by which it is set from outside."""
        names = _adapters(cls)  # type: ignore[arg-type]
        return {name: name if name in ORIGINAL else f"{cls.role}.{name}" for name in names}

    def settings(self) -> dict[str, Any]:
        """Return flat name → value, ready for JSON."""
        return {outside: plain(getattr(self, name)) for name, outside in self.flat().items()}


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


@functools.cache
def _adapters(kind: Any) -> dict[str, tuple[TypeAdapter[Any], str]]:
    """Return setting → (what checks it, what is allowed in words), of the fields that are no parts themselves."""
    hints = get_type_hints(kind, include_extras=True)
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    found = {}
    for field in fields(kind):
        hint = hints[field.name]
        if not (isinstance(hint, type) and issubclass(hint, Part)):
            notes = hint.__metadata__ if get_origin(hint) is Annotated else ()
            words = next((note.description for note in notes if isinstance(note, FieldInfo) and note.description), "")
            found[field.name] = TypeAdapter(hint, config=strict), words
    return found


_TYPES = {
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "float",
    "string_type": "str",
    "bool_type": "bool",
}


def _checked(name: str, value: Any, adapter: TypeAdapter[Any], allowed: str) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"] or first["type"] == "tuple_type":
            raise TypeError(f"{name} must be {allowed}, not {shown(value)}") from None
        if first["type"] in _TYPES:
            raise TypeError(f"{name} must be of type {_TYPES[first['type']]}, not {shown(value)}") from None
        if first["type"] == "literal_error" and not isinstance(value, str):
            raise TypeError(f"{name} must be of type str, not {shown(value)}") from None
        said = str(first.get("ctx", {}).get("error", "")) or allowed or first["msg"].removeprefix("Input should be ")
        said, _, remedy = said.partition("; ")
        raise ValueError(f"{name} must be {said}, not {shown(value)}{'; ' if remedy else ''}{remedy}") from None


def described(hint: Any) -> str:
    """Name the type of a setting as people write its value."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        return "list of texts"
    return "str" if not isinstance(hint, type) else hint.__name__


def meanings(kind: type) -> dict[str, str]:
    """Return field → the text below it, on one line and without backquotes; those of base classes too.

    >>> from cram_bench.optim import bases
    >>> meanings(bases.SGD)["lr"]
    'Peak learning rate, positive.'
    """
    bases = [base for base in reversed(kind.__mro__) if issubclass(base, Part) and base is not Part]
    return {field: text for base in bases for field, text in _texts(base).items()}  # type: ignore[arg-type]


@functools.cache
def _texts(kind: type) -> dict[str, str]:
    """Return field → the text below it, of the fields that a class adds itself; its source is parsed once."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
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


def rows(kind: type[Part], values: Mapping[str, Any] | None = None) -> Iterator[dict[str, str]]:
    """Yield a row per setting of a part: setting, type, default (of `values`, or the part's own), meaning."""
    hints, texts = get_type_hints(kind, include_extras=True), meanings(kind)
    own = {field.name: plain(field.default) for field in fields(kind)}
    for name, outside in kind.flat().items():
        value = own[name] if values is None else values.get(outside, own[name])
        yield {"setting": outside, "type": described(hints[name]), "default": value, "meaning": texts.get(name, "")}


def unknown_setting(name: Any, known: Iterable[type[Part]], here: str = "") -> str:
    """Say in one line that there is no such setting, and which is meant perhaps, by its name or by its meaning.

    Args:
        name: what was given.
        known: all parts there are.
        here: what it was given to, for a setting of another part.
    """
    known = list(known)
    if owners := [kind for kind in known if name in kind.flat() or name in kind.flat().values()]:
        who = ", ".join(dict.fromkeys(owner.kind for owner in owners if owner.kind))
        return f"{here} has no setting {name!r}: it belongs to the {owners[0].role} {who}"
    hint = suggestion(name, list(dict.fromkeys(n.rpartition(".")[2] for kind in known for n in kind.flat().values())))
    words = str(name).replace("_", " ").strip().lower()
    if not hint and len(words) > 3:
        said = ((outside, meanings(kind).get(field, "")) for kind in known for field, outside in kind.flat().items())
        texts = dict(said)
        hint = next((f"; did you mean {n!r}?" for n, text in texts.items() if words in text.lower()), "")
    return f"unknown setting {shown(name)}{hint or ';'} `cram-bench settings` lists them"
