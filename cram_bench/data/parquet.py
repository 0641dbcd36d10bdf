"""Parquet shards in the layout of the public hub export: img.bytes (PNG) and label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cram_bench import untrusted
from cram_bench.checks import one_line
from cram_bench.data.decoding import DataError, alike, decode, stack
from cram_bench.data.folders import memory_left

MOST_TIMES = 100
"""Times its file that what is read of a shard may be. PNG is compressed already: honest shards stay near 1."""


def shards(folder: Path) -> dict[str, list[Path]] | None:
    """Return the files of both splits, or None where one has none; a missing shard is an error."""
    found = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in ("train", "test")}
    for split, paths in found.items():
        for path in paths:  # a lost shard must not become a smaller data set
            if match := re.search(r"-of-(\d+)\.parquet$", path.name):
                names = {f"{split}-{index:05}-of-{match[1]}.parquet" for index in range(int(match[1]))}
                if missing := sorted(names - {path.name for path in paths}):
                    raise DataError(
                        f"{folder / missing[0]} is missing; {split} has {len(paths)} of {int(match[1])} shards"
                    )
    return found if all(found.values()) else None


def read_parquet(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Return the images and the labels of a split's shards.

    Raises:
        DataError: a shard is no such file, or stands for more than `MOST_TIMES` its bytes or than the memory that is
            left.
    """
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for path in paths:
        encoded, label = _read(path)
        for row, content in enumerate(encoded):
            image = decode(content, where := f"{path}, row {row}")
            alike(image.shape, (images or [image])[0].shape, where)
            if not row and (need := 2 * (len(images) + len(encoded)) * image.nbytes) > (left := memory_left()):
                sizes = f"{need / 2**30:.1f} GiB of memory once decoded, and {left / 2**30:.1f} GiB are left"
                raise DataError(f"{path} holds {len(encoded):,} images, which need {sizes}")
            images.append(image)
        labels.append(label)
    return stack(images, [str(paths[0])]), torch.from_numpy(np.concatenate(labels).astype(np.int64))


def _read(path: Path) -> tuple[list[bytes], np.ndarray]:
    """Return the encoded images and the labels of a shard; images that are the same are one object."""
    import pyarrow.parquet as pq

    try:
        with untrusted.opened(path) as file:
            size = file.seek(0, 2)
        shard = pq.ParquetFile(path)
        column, label = _names(path, shard.schema_arrow)
        names = [f"{column}.bytes", label]
        about = [shard.metadata.row_group(group) for group in range(shard.metadata.num_row_groups)]
        chunks = [group.column(place) for group in about for place in range(group.num_columns)]
        if (rows := shard.metadata.num_rows) > size:  # no image is smaller than a byte
            raise DataError(f"{path} is not readable as Parquet: it says that its {size:,} bytes are {rows:,} images")
        _bounded(path, size, sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in names))
        # As a dictionary: an image that a few bytes say stands in a million rows is not copied a million times.
        shard = pq.ParquetFile(path, read_dictionary=names[:1])
        images: list[bytes] = []
        labels: list[np.ndarray] = []
        for group in range(len(about)):
            table = shard.read_row_group(group, columns=names)
            if table.column(label).null_count:
                raise _other_columns(path, shard.schema_arrow)
            labels.append(table.column(label).to_numpy())
            for chunk in table.column(column).chunks:
                found = chunk.flatten()[0]
                known = [value or b"" for value in found.dictionary.to_pylist()]
                images += [b"" if place is None else known[place] for place in found.indices.to_pylist()]
        _bounded(path, size, sum(map(len, images)))
    except DataError:
        raise
    except (OSError, ValueError, NotImplementedError, MemoryError) as error:
        raise DataError(f"{path} is not readable as Parquet: {one_line(error)}") from error
    return images, np.concatenate(labels) if labels else np.empty(0, np.int64)


def _names(path: Path, schema: Any) -> tuple[str, str]:
    """Return the names of the columns that hold images and labels."""
    import pyarrow as pa

    column = next((c for c in ("img", "image") if c in schema.names), None)
    label = next((c for c in ("label", "fine_label") if c in schema.names), None)
    if column is not None and label is not None:
        kind = schema.field(column).type
        typed = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if typed and pa.types.is_integer(schema.field(label).type):
            return column, label
    raise _other_columns(path, schema)


def _other_columns(path: Path, schema: Any) -> DataError:
    have = ", ".join(f"{field.name} ({field.type})" for field in schema)
    return DataError(f"{path} has columns {have}; expected img.bytes (PNG) and label, an integer in every row")


def _bounded(path: Path, size: int, expanded: int) -> None:
    if expanded > MOST_TIMES * size:
        found = f"its {size:,} bytes stand for {expanded:,}, {expanded // size:,} times as many"
        raise DataError(f"{path} is not readable as Parquet: {found}; allowed are {MOST_TIMES} times")
