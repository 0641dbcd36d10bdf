"""What the folders of a store hold, remembered. The folders are the truth: the index may be deleted at any time.

    store/.index/names-1f0c….json    the folders that are runs, and those whose settings have another id than their name
    store/.index/rows-1f0c….jsonl    a line for each run: the state of its files, and what tables say of it

Both are named by the settings' defaults, on which ids depend: versions of this package side by side keep an index each.
A line and a file carry a checksum; what does not match it, such as the last line of a writer that was killed, is read
from the folders again. A store that cannot be written is indexed in memory.

The settings' defaults stand beside the code that trains, which needs torch. Which they are is therefore noted, too:

    store/.index/versions.json       checksum of this package's source → the name of its defaults

so that a list of runs that are all known is made without torch.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cram_bench import untrusted
from cram_bench.files import parsed, write

_SOURCES = 20  # states of this package's source whose version is noted
_FORMAT = 1  # raise it when a line means something else
_FEW = 32  # runs; fewer are read as quickly as an index of them
# ns between the last change of a folder and a look at it, after which no change can have been missed
_QUIET = 2 * 10**9
_ID = re.compile("[0-9a-f]{12}")

_FILES = ("model.safetensors", "settings.json", "history.csv", "environment.json")

Row = dict[str, Any]


def is_id(name: str) -> bool:
    """Tell whether a folder is named as a run is."""
    return _ID.fullmatch(name) is not None


@functools.cache
def version() -> str:
    """Return a name for what ids depend on: the settings and their defaults."""
    from cram_bench.experiment import KINDS, Experiment
    from cram_bench.settings import ORIGINAL, Part

    parts: list[type[Part]] = [*(part for kinds in KINDS.values() for part in kinds.values()), Experiment]
    defaults = [{name: str(getattr(part, name)) for name in part.flat()} for part in parts]
    text = json.dumps([_FORMAT, ORIGINAL, defaults], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def source() -> str:
    """Return a checksum of this package's source and the version of Python, which decide `version`."""
    digest, root = hashlib.sha256(sys.version.encode()), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()[:12]


@dataclass
class _Names:
    """Folder → its run's id, as they were when the store's folder had been changed at `at`."""

    at: int = -1
    ids: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    """Id → folder, where a default that changed since gives the same settings another name."""
    pending: list[str] = field(default_factory=list)
    """Folders that are named as runs and cannot be read, perhaps not yet."""
    ordered: list[str] = field(default_factory=list)
    """All of these folders, sorted, as soon as somebody asks."""
    sure: bool = False
    """Whether nothing can have changed unnoticed in the same tick of the file system's clock."""


_known: dict[Path, _Names] = {}
_rows: dict[Path, dict[str, tuple[list[int], Row]]] = {}


class Index:
    """The index of one folder of runs.

    Args:
        root: the folder; nothing is in it where it is missing.
        keep: whether to write the index beside the runs, which fails in silence where that is not allowed.
    """

    def __init__(self, root: Path, keep: bool = True) -> None:
        self.root, self.keep = root, keep

    def folders(self) -> list[str]:
        """Return the names of the folders that are called as runs are; what is in them nobody looked at."""
        try:
            with os.scandir(self.root) as entries:
                return sorted(entry.name for entry in entries if is_id(entry.name))
        except OSError:
            return []

    def beginning(self, text: str) -> list[str]:
        """Return those of `folders` that begin so."""
        known = self._names()
        if not known.ordered:
            known.ordered = sorted([*known.ids, *known.pending])
        start = bisect.bisect_left(known.ordered, text)
        return list(
            itertools.takewhile(lambda name: name.startswith(text), itertools.islice(known.ordered, start, None))
        )

    def elsewhere(self, id: str) -> str | None:
        """Return the folder of a run whose settings have this id now, and had another when it was named."""
        return self._names().others.get(id)

    def others(self) -> dict[str, str]:
        """Return all such: id → folder."""
        return self._names().others

    def rows(
        self, names: Iterable[str], read: Callable[[Path], Row], needs: str = "model.safetensors"
    ) -> dict[str, Row | Exception]:
        """Return a row for each folder that holds a file: the remembered one while its files are the same, else what
        `read` returns.

        In place of a row stands the ValueError of `read`, if it raises one.
        """
        if self.root not in _rows:
            _rows[self.root] = self._load_rows()
        known, fresh, root, place = _rows[self.root], [], str(self.root), 3 * _FILES.index(needs)
        found: dict[str, Row | Exception] = {}
        for name in names:
            stamp = _stamp(f"{root}/{name}")
            if not stamp[place]:
                continue
            there = known.get(name)
            if there is not None and there[0] == stamp:
                found[name] = there[1]
                continue
            try:
                row = read(self.root / name)
            except ValueError as error:
                found[name] = error
                continue
            found[name] = row
            if time.time_ns() - max(stamp[2::3]) < _QUIET:
                continue  # a change in the same tick of the clock would go unnoticed
            known[name] = stamp, row
            fresh.append(_line(json.dumps([name, stamp, row])))
        if fresh and self.keep and len(known) >= _FEW:
            self._append(fresh)
        return found

    def _names(self) -> _Names:
        try:
            at = os.stat(self.root).st_mtime_ns
        except OSError:
            return _Names()
        known = _known.get(self.root)
        if known is None or not known.sure or known.at != at:
            known = self._load_names() if known is None else known
            if not known.sure or known.at != at:
                known = self._look(known, at)
            _known[self.root] = known
        if known.pending:
            self._resolve(known)
        return known

    def _look(self, known: _Names, at: int) -> _Names:
        """Compare with the folder, and read what is new."""
        try:
            with os.scandir(self.root) as entries:
                there = {entry.name for entry in entries}
        except OSError:  # not to be listed
            return _Names()
        ids = {name: id for name, id in known.ids.items() if name in there}
        found = _Names(at, ids, pending=[name for name in there - ids.keys() if is_id(name)])
        found.others = {id: name for name, id in ids.items() if id != name}
        self._resolve(found)
        found.sure = self._save_names(found)
        return found

    def _resolve(self, known: _Names) -> None:
        from cram_bench.experiment import Experiment

        left = []
        for name in known.pending:
            try:
                content = parsed(untrusted.contents(self.root / name / "settings.json", untrusted.NOTE))
                if not os.path.isfile(self.root / name / "model.safetensors"):
                    raise ValueError("not finished")
                known.ids[name] = id = Experiment.of(content).id
            except (OSError, ValueError, TypeError):
                left.append(name)
                continue
            if id != name:
                known.others[id] = name
        known.pending = left

    def _load_names(self) -> _Names:
        path = self._path("names", "json")
        try:
            with open(path, encoding="utf-8") as file:
                content = _unlined(file.read())
                written = os.fstat(file.fileno()).st_mtime_ns
            at, joined, others, pending = content
            names = [joined[start : start + 12] for start in range(0, len(joined), 12)]
            ids = dict(zip(names, names, strict=True)) | {name: id for id, name in others.items()}
            return _Names(at, ids, others, pending, sure=written - at > _QUIET)
        except (OSError, ValueError, TypeError, AttributeError):
            return _Names()

    def _save_names(self, known: _Names) -> bool:
        """Write the names; return whether they can be relied on while the folder has not changed."""
        if not self.keep or len(known.ids) < _FEW:
            return False
        path = self._path("names", "json")
        content = [known.at, "".join(known.ids), known.others, known.pending]
        try:
            path.parent.mkdir(exist_ok=True)
            write(path, _line(json.dumps(content)), sync=False)
            return os.stat(path).st_mtime_ns - known.at > _QUIET  # one clock made both, whatever it shows
        except OSError:
            return False

    def _load_rows(self) -> dict[str, tuple[list[int], Row]]:
        found: dict[str, tuple[list[int], Row]] = {}
        path, count = self._path("rows", "jsonl"), 0
        if self.keep:
            self._note()
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError):
                    name, stamp, row = _unlined(line)
                    found[name] = stamp, row
                    count += 1
        if self.keep and count > 2 * len(found) + 100:  # most lines are outlived by others
            with contextlib.suppress(OSError):
                lines = (_line(json.dumps([name, stamp, row])) for name, (stamp, row) in found.items())
                write(path, "\n".join(lines) + "\n", sync=False)
        return found

    def _append(self, lines: list[str]) -> None:
        with contextlib.suppress(OSError):
            path = self._path("rows", "jsonl")
            path.parent.mkdir(exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            try:  # in one call, so that writers do not mix; after a line that a killed one left open
                os.write(file, ("\n" + "\n".join(lines) + "\n").encode())
            finally:
                os.close(file)
            self._note()

    def _path(self, kind: str, suffix: str) -> Path:
        return self.root / ".index" / f"{kind}-{self._version()}.{suffix}"

    def _version(self) -> str:
        """Return `version`, as it was noted for this source where finding out would load torch."""
        if "cram_bench.experiment" not in sys.modules and is_id(str(noted := self._versions().get(source()))):
            return str(noted)
        return version()

    def _versions(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return dict(_unlined((self.root / ".index" / "versions.json").read_text(encoding="utf-8")))
        return {}

    def _note(self) -> None:
        """Note `version` for this source, where this process found it out and keeps an index."""
        path = self.root / ".index" / "versions.json"
        if "cram_bench.experiment" not in sys.modules or not _only_ours() or not path.parent.is_dir():
            return
        if (noted := self._versions()).get(source()) != version():
            latest = [*noted.items(), (source(), version())][-_SOURCES:]
            with contextlib.suppress(OSError):
                write(path, _line(json.dumps(dict(latest))), sync=False)


def _only_ours() -> bool:
    """Tell whether all parts are of this package: a process that added one of its own says nothing of the others."""
    from cram_bench.experiment import KINDS

    return all(part.__module__.startswith("cram_bench.") for kinds in KINDS.values() for part in kinds.values())


def _stamp(folder: str) -> list[int]:
    """Return inode, size and time of change of each file of a run, which tell whether they are still the same."""
    stamp = []
    for name in _FILES:
        try:
            stat = os.stat(f"{folder}/{name}")
        except OSError:
            stamp += [0, 0, 0]
        else:
            stamp += [stat.st_ino, stat.st_size, stat.st_mtime_ns]
    return stamp


def _line(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x} {text}"


def _unlined(line: str) -> Any:
    """Read what `_line` wrote.

    Raises:
        ValueError: it is not whole.
    """
    sum, _, text = line.rstrip("\n").partition(" ")
    if f"{zlib.crc32(text.encode()):08x}" != sum:
        raise ValueError("its checksum does not match")
    return json.loads(text)
