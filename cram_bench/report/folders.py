"""Image folders in a report: where they are is their owner's business, so that a report has their names alone."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cram_bench.data import is_folder


def named(datasets: Sequence[str]) -> dict[str, str]:
    """Return the path of each image folder among some data sets → its name; each has another one.

    >>> named(["digits", "/data/birds", "/mine/birds", "/data/cifar10"])
    {'/data/birds': 'birds', '/mine/birds': 'birds-2', '/data/cifar10': 'folder-cifar10'}
    """
    found: dict[str, str] = {}
    for path in dict.fromkeys(datasets):
        if is_folder(path):
            name = Path(path).name or "folder"
            name = name if is_folder(name) else f"folder-{name}"  # no data set of this package
            alike = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found.values())
            found[path] = f"{name}-{alike + 1}" if alike else name
    return found


def without(text: str, names: Mapping[str, str]) -> str:
    """Return a text with names in the place of paths, also where they are written as in HTML or in a Python string.

    >>> without("/data/birds/train and /data/birds2", {"/data/birds": "birds"})
    'birds/train and /data/birds2'
    """
    for path in sorted(names, key=len, reverse=True):
        written = path.encode("unicode_escape").decode().replace('"', r"\"")
        for form in dict.fromkeys((path, html.escape(path), html.escape(path, quote=False), repr(path)[1:-1], written)):
            text = re.sub(rf"{re.escape(form)}(?![\w-])", names[path].replace("\\", r"\\"), text)
    return text


def in_command(command: str, names: Mapping[str, str]) -> str:
    """Return a command with names in the place of image folders, and the last name of each other absolute path alone.

    >>> in_command("cram-bench report --dataset /data/birds --reports=/mine/out", {"/data/birds": "birds"})
    'cram-bench report --dataset birds --reports=out'
    >>> in_command("cram-bench report --dataset cifar10 -p epochs 15 --reports /mine/out", {})
    'cram-bench report --dataset cifar10 -p epochs 15 --reports out'

    One that was given with ``--paths`` stays as it is.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # no command of a shell
        return without(command, names)
    if "--paths" in words:
        return command
    parts = [re.fullmatch(r"(-[\w-]+=)?(.*)", without(word, names), re.DOTALL) for word in words]
    pairs = [(part[1] or "", part[2]) for part in parts if part]
    return shlex.join(start + (Path(rest).name if Path(rest).is_absolute() else rest) for start, rest in pairs)


def everywhere(value: Any, names: Mapping[str, str]) -> Any:
    """Return mappings, lists and texts with names in the place of paths."""
    if isinstance(value, str):
        return names.get(value) or without(value, names)
    if isinstance(value, Mapping):
        return {key: everywhere(each, names) for key, each in value.items()}
    return [everywhere(each, names) for each in value] if isinstance(value, (list, tuple)) else value
