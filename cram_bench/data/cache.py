"""Decoded images, cached once in the user's cache folder with a checksum: a damaged cache is rebuilt."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cram_bench import untrusted
from cram_bench.checks import one_line
from cram_bench.data.decoding import stamp
from cram_bench.data.images import Images, built
from cram_bench.files import cache_root, write_tensors

_FORMAT = 3  # of the cache; raise it when its content changes


@dataclass
class _Cache:
    path: Path

    def read(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        from safetensors import safe_open

        if not self.path.exists():
            return None
        try:
            untrusted.tensors(self.path)
            with safe_open(self.path, framework="pt") as file:
                # Not mapped: what is compared with the checksum is what is used, whatever becomes of the file.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                written = (file.metadata() or {}).get("sha256")
        except Exception as error:  # the library raises its own type for a truncated file
            warnings.warn(f"{self.path} is damaged and is rebuilt: {one_line(error)}", stacklevel=4)
            return None
        if written != _digest(tensors):
            warnings.warn(f"{self.path} is damaged and is rebuilt: its checksum does not match", stacklevel=4)
            return None
        return {split: (tensors[f"{split}.images"], tensors[f"{split}.labels"]) for split in ("train", "test")}

    def write(self, arrays: dict[str, tuple[Tensor, Tensor]]) -> None:
        tensors = {
            f"{s}.{n}": t.contiguous()
            for s, pair in arrays.items()
            for n, t in zip(("images", "labels"), pair, strict=True)
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self.path, tensors, {"sha256": _digest(tensors)})
        except OSError as error:
            warnings.warn(f"decoded images could not be cached in {self.path.parent}: {one_line(error)}", stacklevel=4)


def cached(
    name: str,
    sources: Sequence[Path],
    read: Callable[[], dict[str, tuple[Tensor, Tensor]]],
    build: dict[str, Any],
) -> tuple[Images, Images]:
    """Decode with `read`, or take the cache, which is named by the sources' paths, sizes and times.

    Among the times is that of the change of the inode, which nobody can set: an image that was replaced by another of
    its size and put back to its time of change is decoded anew.
    """
    stats = [(str(path.resolve()), *stamp(path), path.stat().st_ctime_ns) for path in sources]
    key = hashlib.sha256(json.dumps([_FORMAT, stats, len(build["classes"])]).encode()).hexdigest()[:16]
    cache = _Cache(cache_root() / "decoded" / f"{name}-{key}.safetensors")
    arrays = cache.read()
    if arrays is None:
        arrays = read()
        datasets = built(name, arrays, **build)  # checked before it is kept
        cache.write(arrays)
        return datasets
    return built(name, arrays, **build)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()
