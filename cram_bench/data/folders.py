"""Image folders: train/<class>/** and test/<class>/** (or val, valid, validation)."""

from __future__ import annotations

import contextlib
import math
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cram_bench.data.cache import cached
from cram_bench.data.decoding import SUFFIXES, DataError, alike, any_colour, contents, decode
from cram_bench.data.images import Images

TEST = ("test", "val", "valid", "validation")
"""Names of the folder of test images; the first that is there is read."""
_SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
_LAYOUT = "an image folder holds train/<class>/* and test/<class>/* (or val, valid, validation)"
_REMEDY = "stream crops of one size instead: data.load(folder, crop=64), or -s crop 64 on the command line"


def listed(folder: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[Path, int]]]]:
    """Return the class names of an image folder and, for ``train`` and ``test``, its files with their labels.

    Files lie in a class's folder or below it, in the order of their paths. Two spellings of one name in Unicode,
    composed and decomposed, are one class. Hidden files, what operating systems leave behind and what is no image by
    its name are skipped, and a warning counts and names them.

    Raises:
        DataError: the folder is not laid out as `load` says.
    """
    train, test = folder / "train", next((folder / name for name in TEST if (folder / name).is_dir()), folder / "test")
    for path in (train, test):
        if not path.is_dir():
            raise DataError(f"{folder} has no folder {path.name}/; {_LAYOUT}")
    skipped: dict[str, list[str]] = {}
    found = {split: _classes(path, folder, skipped) for split, path in (("train", train), ("test", test))}
    classes = tuple(sorted(found["train"]))
    if len(classes) < 2:
        raise DataError(f"{train} holds {len(classes)} class folders; at least 2 are needed")
    if extra := sorted(found["test"].keys() - set(classes)):
        raise DataError(f"{test / extra[0]} is a class without training images in {train}")
    for split, path in (("train", train), ("test", test)):
        for name in classes:
            if not found[split].get(name):
                raise DataError(f"{path / name} holds no image ({', '.join(sorted(SUFFIXES))})")
    unused = [f"{name}/" for name in TEST if (folder / name).is_dir() and folder / name != test]
    if unused:
        skipped[f"not used beside {test.name}/"] = unused
    if skipped:
        count = sum(map(len, skipped.values()))
        kinds = "; ".join(f"{len(names)} {kind} ({_some(sorted(names))})" for kind, names in skipped.items())
        warnings.warn(f"{folder}: {count} files or folders are skipped: {kinds}", stacklevel=3)
    files = {
        split: [(file, label) for label, name in enumerate(classes) for file in by_class[name]]
        for split, by_class in found.items()
    }
    return classes, files


def images_of(folder: Path, splits: Iterable[str] = ("train",)) -> list[Path]:
    """Return the images that lie in these parts of a folder, class by class; none where a part is not there."""
    found = [_classes(folder / split, folder, {}) for split in splits if (folder / split).is_dir()]
    return [file for by_class in found for name in sorted(by_class) for file in by_class[name]]


def load_folder(folder: Path, flip: bool = True) -> tuple[Images, Images]:
    """Return the training and the test images of a folder laid out so, all of one size.

    Raises:
        DataError: images differ in size, or would not fit into the memory that is left.
    """
    classes, files = listed(folder)
    sources = [file for pairs in files.values() for file, _ in pairs]

    def read() -> dict[str, tuple[Tensor, Tensor]]:
        colour = any_colour(sources)
        first = decode(contents(sources[0]), str(sources[0]), colour)
        _fits(folder, len(sources), first.nbytes)
        images = np.empty((len(sources), *first.shape), np.uint8)
        for place, path in enumerate(sources):
            image = decode(contents(path), str(path), colour)
            alike(image.shape, first.shape, str(path), f", or {_REMEDY}")
            images[place] = image
        parts = torch.from_numpy(images).split([len(pairs) for pairs in files.values()])
        return {
            split: (part, torch.tensor([label for _, label in files[split]], device="cpu"))
            for split, part in zip(files, parts, strict=True)
        }

    return cached(folder.resolve().name, sources, read, {"classes": classes, "flip": flip})


def memory_left() -> float:
    """Return the bytes of memory that this process may use: what the machine has left, or its control group allows."""
    left = math.inf
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not every system knows these names
        left = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        left = min(left, int(lines["MemAvailable"].split()[0]) * 1024)
    for limit in _limits():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
            left = min(left, int(limit.read_text(encoding="utf-8")))
    return left


def _limits() -> Iterator[Path]:
    """Yield the files that may limit the memory of this process's control groups, of both versions of Linux's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kind, name = line.split(":", 2)
            if kind in ("", "memory"):
                root = Path("/sys/fs/cgroup", kind)
                for group in (inner := root / name.lstrip("/"), *inner.parents):
                    yield group / ("memory.limit_in_bytes" if kind else "memory.max")
                    if group == root:
                        break


def _fits(folder: Path, count: int, each: int) -> None:
    need, left = 2 * count * each, memory_left()  # once for the images, once while they are written to the cache
    if need > left:
        sizes = f"{need / 2**30:.1f} GiB of memory once decoded, and {left / 2**30:.1f} GiB are left"
        raise DataError(f"{folder} holds {count:,} images, which need {sizes}; {_REMEDY}")


def _classes(split: Path, root: Path, skipped: dict[str, list[str]]) -> dict[str, list[Path]]:
    """Return the images of each class below a folder, and add what is passed over to `skipped`, by kind."""
    found: dict[str, list[Path]] = {}
    for path in sorted(split.iterdir()):
        if _hidden(path.name):
            _skip(skipped, "hidden or made by a system", path, root)
        elif path.is_dir():
            found.setdefault(unicodedata.normalize("NFC", path.name), []).extend(_below(path, root, skipped))
        else:
            _skip(skipped, "in no class folder", path, root)
    return {name: sorted(files, key=lambda file: file.parts) for name, files in found.items()}


def _below(top: Path, root: Path, skipped: dict[str, list[str]]) -> Iterator[Path]:
    seen: set[str] = set()
    for parent, folders, files in os.walk(top, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        for name in [*folders, *files]:
            if _hidden(name):
                _skip(skipped, "hidden or made by a system", Path(parent, name), root)
        folders[:] = [name for name in folders if not _hidden(name)]
        for name in files:
            if _hidden(name):
                continue
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(parent, name)
            else:
                _skip(skipped, "no image by its name", Path(parent, name), root)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SYSTEM


def _skip(skipped: dict[str, list[str]], kind: str, path: Path, root: Path) -> None:
    skipped.setdefault(kind, []).append(path.relative_to(root).as_posix())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
