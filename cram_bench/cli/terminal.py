"""What a terminal is told: problems and warnings in one line each, and nothing that commands it."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import Any

from cram_bench.untrusted import printable


def say(line: str) -> None:
    """Print a line to the standard error, after the name of the program."""
    print(printable(f"cram-bench: {line}"), file=sys.stderr)


class Printable:
    """Standard output that carries no commands to a terminal, whatever a run, a class or a file is called."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what may be written; return how much was given."""
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def as_can_be(error: UnicodeError) -> tuple[bytes, int]:
    """Write what a terminal has no letters for as Python does, and the bytes of a file's name as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    parts = [bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else ascii(c)[1:-1].encode() for c in wrong]
    return b"".join(parts), error.end


def line_of(error: Exception) -> str:
    """Return what to say of an error: one line, never empty, with the file of a system's error and what helps."""
    from cram_bench.checks import one_line

    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        helps = "; free some space there, and the same command goes on" if full else ""
        return f"{one_line(error)}{helps}" + (f": {error.filename!r}" if error.filename else "")
    if isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError)):
        return one_line(error)
    what = type(error).__name__  # nobody foresaw it, so that its words alone say little
    return f"{what}{f': {one_line(error)}' if str(error).strip() else ''} (cram-bench --debug … shows where)"


@contextlib.contextmanager
def warnings_on_a_line() -> Iterator[None]:
    """Say this package's warnings as its errors are said, without file and line."""
    import warnings

    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
            if category is UserWarning:
                say(str(message).strip().partition(chr(10))[0])
            else:
                usual(message, category, *where, **options)

        warnings.showwarning = show
        yield
