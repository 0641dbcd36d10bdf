"""Sets in the files of MNIST, which Fashion-MNIST has too: IDX, packed with gzip.

The format is that of Y. LeCun's page on MNIST: two zero bytes, the type of the values, the number of axes, their
lengths in big-endian 32 bits, and the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cram_bench import untrusted
from cram_bench.checks import one_line
from cram_bench.data.decoding import DataError

SPLITS = {"train": "train", "test": "t10k"}
"""Split → how the names of its files begin."""
MOST = 100_000
"""Images of a file, at most; the largest known has 60,000."""


def idx_files(folder: Path) -> dict[str, tuple[Path, Path]] | None:
    """Return split → (images, labels), or None where none of the four files is; a missing one is an error."""
    found = {
        split: (folder / f"{name}-images-idx3-ubyte.gz", folder / f"{name}-labels-idx1-ubyte.gz")
        for split, name in SPLITS.items()
    }
    files = [path for pair in found.values() for path in pair]
    missing = [path for path in files if not path.exists()]
    if len(missing) == len(files):
        return None
    if missing:
        raise DataError(f"{missing[0]} is missing, of four files")
    return found


def read_idx(images: Path, labels: Path, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return images, uint8 (n, 1, height, width), and labels, int64 (n,), of a split.

    Raises:
        DataError: a file is no such file, ends early or late, holds images of another shape, or the two do not agree in
            number.
    """
    pixels, known = _values(images, shape), _values(labels, ())
    if len(pixels) != len(known):
        raise DataError(f"{images} holds {len(pixels):,} images, and {labels.name} {len(known):,} labels")
    return torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(known.astype(np.int64))


def _values(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of a file, uint8 (n, *shape); no more is unpacked than its header says."""
    axes = 1 + len(shape)
    try:
        with untrusted.opened(path) as file, gzip.open(file) as unpacked:
            head = unpacked.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
                raise DataError(f"{path} is not readable as IDX: it does not begin as bytes of {axes} axes")
            count, *rest = struct.unpack(f">{axes}I", head[4:])
            if tuple(rest) != shape:
                raise DataError(f"{path} must hold images of {shape[0]} × {shape[1]}, not {rest[0]} × {rest[1]}")
            if not 0 < count <= MOST:
                raise DataError(f"{path} must hold from 1 to {MOST:,} examples, not {count:,}")
            size = count * math.prod(shape)
            content = unpacked.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not readable as IDX: {one_line(error)}") from error
    if len(content) != size:
        kind = "fewer" if len(content) < size else "more"
        raise DataError(f"{path} is not readable as IDX: it has {kind} values than the {size:,} that it says")
    return np.frombuffer(content, np.uint8).reshape(count, *shape).copy()
