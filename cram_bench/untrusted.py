"""Other people's files are data: opened where they are files, of a size that was meant. Uses no other room."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

HEADER = 2**22
"""Bytes that a header of safetensors may have: about 40,000 names."""
NOTE = 2**22
"""Bytes of JSON that a run may say of itself: read, they take some twenty times as many."""
_TABLE, _NAMES = 2**24, 2**16
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], most: int | None = None) -> Iterator[io.BufferedReader]:
    """Open a file to read its bytes; links are followed.

    Args:
        path: of the file.
        most: bytes that it may have; None for any number.

    Raises:
        OSError: it is missing, larger than that, or no file: a pipe would be waited for, and a device has no end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that nobody writes to would block here
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, and may have {most:,}", str(path))
        file = os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise
    with file:
        yield file


def contents(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """Read a file of at most so many bytes, as `opened` opens it."""
    with opened(path, most) as file:
        return file.read()


def table(path: str | os.PathLike[str], most: int = _TABLE) -> io.BytesIO:
    """Read a table of CSV to be parsed, as `contents` does; its first line may have 65,536 bytes.

    Raises:
        OSError: as `opened`, or it names more columns than that.
    """
    content = contents(path, most)
    if (length := content.find(b"\n")) > _NAMES or (length < 0 and len(content) > _NAMES):
        length = len(content) if length < 0 else length
        raise OSError(errno.EFBIG, f"its first line has {length:,} bytes, and may have {_NAMES:,}", str(path))
    return io.BytesIO(content)


def tensors(path: str | os.PathLike[str]) -> None:
    """Refuse a file of safetensors whose header is so long that reading its names would fill the memory.

    Raises:
        OSError: as `opened`.
        ValueError: it is.
    """
    with opened(path) as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if length > HEADER:
        raise ValueError(
            f"{path} is not readable as safetensors: its header has {length:,} bytes, and may have {HEADER:,}"
        )


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``, which must lie in `folder` once links are followed.

    Raises:
        ValueError: it leads out of the folder.

    >>> inside(Path("report"), "../elsewhere.csv")
    Traceback (most recent call last):
    ValueError: '../elsewhere.csv' leads out of report
    """
    path = folder / name
    if "\0" in name or os.path.isabs(name) or ".." in Path(name).parts or not _within(path, folder):
        raise ValueError(f"{name!r} leads out of {folder}")
    return path


def _within(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def printable(text: str) -> str:
    r"""Return a text without the characters that command a terminal: they are written as Python writes them.

    Newlines and tabs stay.

    >>> printable("cat\x1b[2J\n")
    'cat\\x1b[2J\n'
    """
    return "".join(c if c in "\n\t" or not _commands(c) else ascii(c)[1:-1] for c in text) if _any(text) else text


def _commands(character: str) -> bool:
    """Say whether it is a control character of ASCII or Latin-1, or one that turns the direction of writing."""
    code = ord(character)
    return code < 32 or 127 <= code < 160 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def _any(text: str) -> bool:
    return not text.isprintable() and any(c not in "\n\t" and _commands(c) for c in text)
