"""Files that are whole or not there: written beside their place, synchronised to the disk, renamed in one step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_STALE = 3600.0  # seconds after which a temporary file belongs to a process that died


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`, otherwise it is removed.

    A reader finds the old file or the new one, also after ``kill -9`` or a loss of power in the middle. What a killed
    process left beside `path` is removed by a later write.

    Raises:
        OSError: the disk is full, the folder read-only …; the message names `path`, which is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        _remove_stale(path)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise type(error)(error.errno, f"{reason}; nothing was changed", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def check_writable(folder: str | os.PathLike[str], name: str) -> Path:
    """Return `folder`, which may be missing, or refuse it before any work if nothing could be written there.

    Raises:
        ValueError: it, or what it would be made in, is no folder.
        OSError: it may not be written.
    """
    path = Path(folder).expanduser()
    there = path.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{name} must be a folder, and {there if there != path.absolute() else folder} is none")
    if not os.access(there, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(code, f"{name} cannot be written: {os.strerror(code)}", str(there))
    return path


def write(path: Path, content: str | bytes) -> None:
    """Write a text (UTF-8) or bytes to `path`, whole or not at all; see `whole`."""
    with whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; readable by whom new files are readable."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(path) as part:
        part.touch()
        mode = part.stat().st_mode  # the library makes files that only their owner can read
        try:
            save_file(dict(tensors), part, metadata)
        except SafetensorError as error:
            raise OSError(None, str(error).splitlines()[0]) from error
        part.chmod(mode)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(content: Mapping[str, Any], name: str) -> str:
    """Return JSON that carries under ``sha256`` → `name` the checksum of all else in it.

    >>> unsealed(sealed({"sha256": {"other": "00"}, "epochs": 3}, "me"), "me")["epochs"]
    3
    >>> unsealed(sealed({"epochs": 3}, "me").replace(": 3", ": 4"), "me")
    Traceback (most recent call last):
    ValueError: its checksum does not match
    """
    sums = dict(content.get("sha256", {}))
    sums.pop(name, None)
    inner = {**content, "sha256": sums}
    return json.dumps({**inner, "sha256": {**sums, name: _canonical(inner)}}, indent=2)


def unsealed(text: str, name: str) -> dict[str, Any]:
    """Read what `sealed` wrote.

    Raises:
        ValueError: it is not a JSON object, or its checksum does not match. With neither a checksum nor a ``format`` it
            is taken as it is: so older versions wrote it.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(sums := content.get("sha256", {}), dict):
        raise ValueError("it is no JSON object with checksums")
    if name in sums or "format" in content:
        others = {key: value for key, value in sums.items() if key != name}
        if _canonical({**content, "sha256": others}) != sums.get(name):
            raise ValueError("its checksum does not match")
    return content


def _canonical(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove_stale(path: Path) -> None:
    for part in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(OSError):  # another process may be quicker
            if time.time() - part.stat().st_mtime > _STALE:
                part.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename survive a loss of power; some systems cannot open a folder, and then do without."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
