"""Refuse a wrong value in one line that names it and says what is allowed. Stands beside all rooms and uses none."""

from __future__ import annotations

import difflib
import importlib.util
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what refuses a wrong number or name needs no torch
    from torch import Tensor, nn


def shown(value: Any, most: int = 120) -> str:
    """Return ``repr(value)`` on one line of `most` characters, a long one cut in its middle."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 20]} … {text[-17:]}"


def one_line(error: BaseException) -> str:
    r"""Return what an exception says in one line: the system's words for its error, or the first line, or its type.

    >>> one_line(KeyError()), one_line(ValueError("\n   some tensors\nshare"))
    ('KeyError', 'some tensors')
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def unknown(kind: str, name: Any, known: Sequence[str]) -> str:
    """Say in one line that `name` is unknown, what is meant perhaps, and what is allowed."""
    allowed = f" (allowed: {', '.join(known)})" if len(known) <= 20 else ""
    return f"unknown {kind} {shown(name)}{suggestion(name, known)}{allowed}"


def suggestion(name: Any, known: Sequence[str]) -> str:
    """Return ``; did you mean 'this'?`` where one of `known` is close to `name`, else nothing.

    >>> suggestion("sdg", ["sgd", "sam"])
    "; did you mean 'sgd'?"
    """
    close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) and len(name) < 200 else []
    return f"; did you mean {close[0]!r}?" if close else ""


def needs(what: str, extra: str, *modules: str) -> None:
    """Refuse in one line to do `what` where a module of an optional extra of this package is not installed.

    Raises:
        ModuleNotFoundError: the message says how to install it.

    >>> needs("pictures", "report", "no_such_module")
    Traceback (most recent call last):
    ModuleNotFoundError: pictures need no_such_module, which is not installed: pip install 'cram-bench[report]'
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            how = f"pip install 'cram-bench[{extra}]'"
            raise ModuleNotFoundError(f"{what} need {module}, which is not installed: {how}", name=module)


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return `value`, an integer from `least` to `most`.

    >>> integer("points", 0, 1)
    Traceback (most recent call last):
    ValueError: points must be at least 1, not 0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, not {shown(value)}")
    value = int(value)
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {allowed}, not {value}")
    return value


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """Return `value`, a finite number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {shown(value)}")
    value = float(value)
    if not (math.isfinite(value) and least <= value <= most):
        above = "" if least == -math.inf else f" >= {least:g}"
        allowed = f"a finite number{above}" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be {allowed}, not {value!r}")
    return value


def items(name: str, value: Any, what: str) -> list[Any]:
    """Return `value` as a list that is not empty; a text is not taken for a list of its letters."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of {what}, not {shown(value)}")
    if not (listed := list(value)):
        raise ValueError(f"{name} must be a list of {what}, and is empty")
    return listed


def instance(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Refuse a `value` that is not of `kind`; `what` says in words which kind that is."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, not {shown(value)}")


def columns(table: Any, *names: str, empty: bool = False) -> None:
    """Refuse what is no table, and a table that lacks a column or, unless it may be `empty`, has no rows."""
    if not hasattr(table, "columns"):
        raise TypeError(f"the table must be a DataFrame, not {shown(table)}")
    if missing := [name for name in names if name not in table.columns]:
        have = ", ".join(map(str, table.columns)) or "none"
        failed = (
            ", as where every run failed"
            if set(table.columns) <= {"method", "seed", "epochs", "gradients", "id"}
            else ""
        )
        raise ValueError(f"the table has no column {missing[0]!r}; it has {shown(have)[1:-1]}{failed}")
    if not len(table) and not empty:
        raise ValueError("the table must have rows, and is empty")


def pairs(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches, each (inputs, labels) with a label an input: an integer of any type, or a bool.

    Inputs may be anything that the model takes; the labels must be a tensor, and are given as int64.
    """
    from torch import Tensor

    for batch in batches:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
            single = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], numbers.Integral)
            remedy = "; give a data set of single examples in a torch DataLoader" if single else ""
            raise TypeError(f"a batch must be (inputs, labels), the labels a tensor, not {shown(batch)}{remedy}")
        inputs, labels = batch
        count = len(inputs) if isinstance(inputs, Tensor) and inputs.ndim else labels.numel()
        fraction = labels.is_floating_point() or labels.is_complex()
        if labels.shape != (count,) or fraction:
            kind = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
            remedy = "" if labels.ndim else "; give a data set of single examples in a torch DataLoader"
            if labels.shape == (count,):
                remedy = "; give labels.long()"
            elif labels.shape == (count, 1):
                remedy = f"; give labels.flatten(){'.long()' if fraction else ''}"
            elif labels.ndim == 2 and len(labels) == count:
                remedy = "; give labels.argmax(1) where a row has a number for every class"
            raise ValueError(f"labels must be integers of shape ({count},), one an input, and are {kind}{remedy}")
        yield inputs, labels.long()  # cross-entropy takes no other


def initialised(model: nn.Module) -> None:
    """Refuse a lazy model that has not run yet, and one on the meta device, which has shapes alone."""
    from torch.nn.parameter import is_lazy

    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise ValueError(f"{lazy[0]!r} is not initialised yet: call the model on one batch before this")
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise ValueError(f"{empty[0]!r} is on the meta device and has no values: build the model on a real device")


def labels_within(labels: Tensor, classes: int) -> None:
    """Refuse labels outside [0, classes): on a GPU they would end the process, not the call."""
    if len(labels):
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(f"labels must be from 0 to {classes - 1}, for there are {classes} classes, not {wrong}")
