"""Sentences as token ids, in the shape of the image data sets: what trains and probes one does the other.

A sentence set is a folder with ``train.tsv`` and ``test.tsv``, a sentence TAB a label a line. A new named set is a
line in `cram_bench.data.SENTENCES`.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cram_bench import untrusted
from cram_bench._defaults import usual_defaults
from cram_bench.checks import integer, one_line, unknown
from cram_bench.data import SENTENCES, DataError, Dataset, data_root
from cram_bench.data.dataset import shuffled
from cram_bench.models.encoder import tokenizer

MOST = 100_000
"""Bytes that a line may have: a tokenizer reads all of a sentence before it cuts it."""


@dataclass(frozen=True)
class Sentences(Dataset):
    """Token ids and labels. ``images`` holds the ids: int64, shape (n, length), padded at the end with `pad`.

    Batches are cut to their longest sentence, and shuffled ones group sentences of similar length, eight batches
    at a time, because a batch costs what its longest sentence does. Nothing is augmented.
    """

    pad: int = 0

    def __repr__(self) -> str:
        return f"Sentences({self.name!r}, {len(self):,} sentences, {len(self.classes)} classes)"

    @property
    def channels(self) -> int:
        """1, so that the shape of the data can be written like that of images."""
        return 1

    @property
    def image_size(self) -> int:
        """Tokens of the longest sentence."""
        return self.images.shape[1]

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        drop_last: bool = False,
        channels_last: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids, labels) once over the data, as `Dataset.batches` does; `augment` and `channels_last` do nothing."""
        integer("batch_size", batch_size, 1)
        if drop_last and batch_size > len(self):
            raise ValueError(f"batch_size {batch_size} is larger than the data, {len(self)} sentences")
        end = len(self) - len(self) % batch_size if drop_last else len(self)
        lengths = (self.images != self.pad).sum(1).cpu()
        if seed is None:
            parts = list(torch.arange(end, device="cpu").split(batch_size))
        else:
            generator = torch.Generator().manual_seed(seed)
            order = shuffled(len(self), generator)[:end]
            chunks = [chunk[lengths[chunk].argsort(stable=True)] for chunk in order.split(8 * batch_size)]
            sorted_parts = [part for chunk in chunks for part in chunk.split(batch_size)]
            # Shuffled again, among the batches and within each: a half of a batch must not be the shorter half.
            parts = [
                sorted_parts[index][shuffled(len(sorted_parts[index]), generator)]
                for index in shuffled(len(sorted_parts), generator)
            ]
        rank, world = share
        for part in parts:
            index = part[rank::world].to(self.labels.device)
            if not len(index):
                continue
            yield self.images[index, : int(lengths[part].max())], self.labels[index]


def load(
    name: str, model: str, root: str | os.PathLike[str] | None = None, longest: int = 128
) -> tuple[Dataset, Dataset]:
    """Load the training and the test sentences, as the ids of a model's own tokenizer.

    Args:
        name: one of `cram_bench.data.SENTENCES`; ``root/name/{train,test}.tsv`` is read.
        model: name of a model as `cram_bench.models.create` knows it, ``minilm`` or ``hub:NAME``.
        root: by default ``CRAM_BENCH_DATA``, else the user's cache folder.
        longest: tokens a sentence is cut to.

    Raises:
        DataError: a file is missing, or a line is not a sentence TAB a label, or longer than `MOST` bytes.
        ValueError: the set is unknown, the model has no tokenizer, or `longest` is not positive.
    """
    if name not in SENTENCES:
        raise DataError(unknown("set of sentences", name, list(SENTENCES)))
    integer("longest", longest, 1)
    folder = data_root(root) / name
    read = {split: _read(folder / f"{split}.tsv", len(SENTENCES[name])) for split in ("train", "test")}
    encode = tokenizer(model)
    encode.padding_side = "right"  # batches are cut there
    none = torch.zeros(1, device="cpu", dtype=torch.float32)
    parts = []
    for sentences, labels in read.values():
        with usual_defaults():
            ids = encode(sentences, padding=True, truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
        parts.append(
            Sentences(
                name,
                ids,
                torch.tensor(labels, device="cpu"),
                SENTENCES[name],
                none,
                none + 1,
                False,
                encode.pad_token_id,
            )
        )
    return parts[0], parts[1]


def _read(path: Path, classes: int) -> tuple[list[str], list[int]]:
    """Return the sentences and the labels of a file. A line ends at a newline, not at what Unicode calls a separator."""
    sentences, labels = [], []
    try:
        with untrusted.opened(path) as file:
            number = 0
            while content := file.readline(MOST + 1):
                number += 1
                if len(content) > MOST:
                    raise DataError(
                        f"{path}, line {number}: it is longer than {MOST:,} bytes, which a sentence may have"
                    )
                if number == 1:
                    content = content.removeprefix(codecs.BOM_UTF8)
                line = content.decode("utf-8").removesuffix("\n").removesuffix("\r")
                sentence, _, label = line.rpartition("\t")
                if not sentence or not label.isdecimal() or len(label) > 9 or int(label) >= classes:
                    allowed = f"expected a sentence, a TAB and a label from 0 to {classes - 1}"
                    raise DataError(f"{path}, line {number}: {allowed}")
                sentences.append(sentence)
                labels.append(int(label))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: put it there, or set CRAM_BENCH_DATA to the folder above") from None
    except OSError as error:
        raise DataError(f"{path} is not readable: {one_line(error)}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: it must be text in UTF-8: {error}") from None
    if not sentences:
        raise DataError(f"{path} holds no sentences")
    return sentences, labels
