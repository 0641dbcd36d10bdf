"""Files that are whole or not there: written beside their place, synchronised, renamed in one step; and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cram_bench.untrusted import opened, printable

if TYPE_CHECKING:
    from torch import Tensor

_STALE = 86400.0  # seconds: no write takes a day, and clocks that differ by hours delete no living process's file


@contextlib.contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`, otherwise it is removed.

    A reader finds the old file or the new one, also after ``kill -9`` or a loss of power in the middle. What a killed
    process left beside `path` is removed by a later write. Without `sync`, a loss of power may leave an empty file.

    Raises:
        OSError: the disk is full, the folder read-only …; the message names `path`, which is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        _remove_stale(path)
        yield part
        if sync:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
        if sync:
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


def cache_root() -> Path:
    """Return ``$XDG_CACHE_HOME/cram_bench``, by default ``~/.cache/cram_bench``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cram_bench"


def write(path: Path, content: str | bytes, sync: bool = True) -> None:
    """Write a text (UTF-8) or bytes to `path`, whole or not at all; see `whole`."""
    with whole(path, sync) as part:
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
    with opened(path) as file:
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
    content = parsed(text)
    if not isinstance(content, dict) or not isinstance(sums := content.get("sha256", {}), dict):
        raise ValueError("it is no JSON object with checksums")
    if name in sums or "format" in content:
        others = {key: value for key, value in sums.items() if key != name}
        if _canonical({**content, "sha256": others}) != sums.get(name):
            raise ValueError("its checksum does not match")
    return content


def parsed(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none, or nested more deeply than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _canonical(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove_stale(path: Path) -> None:
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        left = [e for e in entries if e.name.startswith(f".{path.name}.") and e.name.endswith(".part")]
        for part in left:
            with contextlib.suppress(OSError):  # another process may be quicker
                if time.time() - part.stat(follow_symlinks=False).st_mtime > _STALE:
                    os.unlink(part.path)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a loss of power; some systems cannot open a folder, and then do without."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as it noted itself; all is empty where nothing can be read."""

    pid: int = 0
    host: str = ""
    since: str = ""

    @property
    def stopped(self) -> bool:
        """Whether it is a process here that was stopped, by Ctrl-Z or SIGSTOP: it holds the lock and does nothing."""
        if not self.pid or self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # gone, or a system without /proc
            return False
        return state.rpartition(")")[2].split()[:1] in (["T"], ["t"])

    def __str__(self) -> str:
        if not self.pid:
            return "a process that left no note"
        on = printable(f"process {self.pid} on {self.host}, since {self.since}")
        return f"{on}, which is stopped: kill -CONT {self.pid} lets it go on" if self.stopped else on


class HeldError(OSError):
    """Another process holds a lock for longer than was to be waited."""

    def __init__(self, path: Path, holder: Holder) -> None:
        super().__init__(errno.EWOULDBLOCK, f"held by {holder}", str(path))
        self.holder = holder


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds."""

    path: Path
    file: int

    def held(self) -> bool:
        """Tell whether the lock still keeps others out: not after its file was removed, for they lock a new one."""
        return _is(self.file, self.path)


@contextlib.contextmanager
def locked(path: Path, wait: float | None = None, waiting: Callable[[Holder], None] | None = None) -> Iterator[Lock]:
    """Hold the lock on `path` for a block; its file says who holds it. The system frees it with the process.

    Args:
        path: the file, in a folder that is there.
        wait: seconds to wait for another process; by default without a limit.
        waiting: called with who holds the lock when there is something to wait for, and again when that changes.

    Raises:
        HeldError: another process holds it for longer than `wait`.
        OSError: it cannot be made, is a link, or lies where files cannot be locked.
    """
    limit = None if wait is None else time.monotonic() + wait
    said, pause = "", 0.02
    while (file := _taken(path)) is None:
        holder = _noted(path)
        left = float("inf") if limit is None else limit - time.monotonic()
        if left <= 0:
            raise HeldError(path, holder)
        if waiting and pause > 0.1 and str(holder) != said:  # a look of another process takes a moment
            said = str(holder)
            waiting(holder)
        time.sleep(min(pause, left))
        pause = min(1.5 * pause, 1.0)
    note = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
    _held.add(file)
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds without it
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(note).encode(), 0)
        yield Lock(path, file)
    finally:
        if file in _held:  # not in a forked child that unwinds
            _held.discard(file)
            os.close(file)


def holder(path: Path) -> Holder | None:
    """Return who holds the lock on `path`, or None where nobody does; never waits, and makes no file.

    Raises:
        OSError: it is a link, cannot be read, or lies where files cannot be locked.
    """
    try:
        file = _taken(path, os.O_RDONLY, fcntl.LOCK_SH)
    except FileNotFoundError:
        return None
    if file is None:
        return _noted(path)
    os.close(file)
    return None


_held: set[int] = set()  # lock files of this process


def _close_held() -> None:
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # a forked worker that outlives a killed training would go on holding its lock
    os.register_at_fork(after_in_child=_close_held)


def _taken(path: Path, mode: int = os.O_RDWR | os.O_CREAT, kind: int = fcntl.LOCK_EX) -> int | None:
    """Lock a file without waiting; return it open, or None where another process holds the lock."""
    while True:
        try:
            file = os.open(path, mode | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "it is a link, and a lock must be a file: delete it", str(path)) from None
            raise
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if isinstance(error, BlockingIOError):
                return None
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                what = f"its file system has no locks ({os.strerror(error.errno)}): choose a folder on a local disk"
                raise OSError(error.errno, what, str(path)) from error
            raise
        if _is(file, path):
            return file
        os.close(file)  # it was removed in between: the lock would keep nobody out


def _is(file: int, path: Path) -> bool:
    """Tell whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _noted(path: Path) -> Holder:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            note = parsed(os.read(file, 4096))
        finally:
            os.close(file)
        return Holder(int(note["pid"]), str(note["host"]), str(note["since"]))
    except (OSError, ValueError, TypeError, KeyError):  # it has just been made
        return Holder()
