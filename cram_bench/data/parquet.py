"""Parquet shards in the layout of the public hub export: img.bytes (PNG) and label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cram_bench._checks import said
from cram_bench.data.decoding import DataError, decode, stack


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
    """Return the images and the labels of a split's shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for path in paths:
        try:
            table = pq.read_table(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not readable as Parquet: {said(error)}") from error
        column = next((c for c in ("img", "image") if c in table.column_names), None)
        label = next((c for c in ("label", "fine_label") if c in table.column_names), None)
        typed = column is not None and label is not None
        if typed:
            kind = table.schema.field(column).type
            typed = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            typed = typed and pa.types.is_integer(table.schema.field(label).type) and not table.column(label).null_count
        if not typed:
            have = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
            raise DataError(f"{path} has columns {have}; expected img.bytes (PNG) and label, an integer in every row")
        for row, item in enumerate(table.column(column).to_pylist()):
            images.append(decode((item or {}).get("bytes") or b"", f"{path}, row {row}"))
        labels.append(table.column(label).to_numpy())
    return stack(images, [str(paths[0])]), torch.from_numpy(np.concatenate(labels).astype(np.int64))
