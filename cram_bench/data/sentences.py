"""Sentences as token ids: what trains and probes images does them.

A set of sentences is a folder with ``train.tsv`` and ``test.tsv``, a sentence TAB a label a line. A new named set is a
line in `SENTENCES`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from cram_bench import untrusted
from cram_bench._defaults import usual_defaults
from cram_bench.checks import one_line
from cram_bench.data.dataset import Dataset, shuffled
from cram_bench.data.decoding import DataError
from cram_bench.models.encoder import tokenizer

SENTENCES: dict[str, tuple[str, ...]] = {"sst2": ("negative", "positive")}
"""Sets of sentences: name → class names in label order."""
MOST = 100_000
"""Bytes that a line may have: a tokenizer reads all of a sentence before it cuts it."""
LONGEST = 128
"""Tokens that a sentence is cut to."""


@dataclass(frozen=True, repr=False)
class Sentences(Dataset):
    """Token ids and labels.

    Batches are cut to their longest sentence, and shuffled ones group sentences of similar length, eight batches
    at a time, because a batch costs what its longest sentence does. Nothing is augmented.

    Attributes:
        name: how tables call it.
        ids: int64, shape (n, length), padded at the end with `pad`.
        labels: shape (n,), values in [0, len(classes)).
        classes: class names in label order.
        pad: the id that stands for no token.
    """

    per_example: ClassVar[str] = "ids"
    noun: ClassVar[str] = "sentences"

    name: str
    ids: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    pad: int = 0

    @property
    def form(self) -> str:
        """Sentences, and how long they may be."""
        return f"sentences of up to {self.image_size} tokens"

    @property
    def preparation(self) -> str:
        """How they are padded."""
        return f"sentences as ids of the model's tokenizer, padded with {self.pad}"

    @property
    def trial(self) -> Tensor:
        """The ids of the first two."""
        return self.ids[:2]

    @property
    def image_size(self) -> int:
        """Tokens of the longest sentence."""
        return self.ids.shape[1]

    def _parts(self, order: Tensor, batch_size: int, generator: torch.Generator | None) -> list[Tensor]:
        if generator is None:
            return super()._parts(order, batch_size, generator)
        lengths = (self.ids != self.pad).sum(1).cpu()
        chunks = [chunk[lengths[chunk].argsort(stable=True)] for chunk in order.split(8 * batch_size)]
        parts = [part for chunk in chunks for part in chunk.split(batch_size)]
        # Shuffled again, among the batches and within each: a half of a batch must not be the shorter half.
        return [parts[index][shuffled(len(parts[index]), generator)] for index in shuffled(len(parts), generator)]

    def _inputs(
        self, parts: Sequence[Tensor], share: tuple[int, int], generator: torch.Generator, seed: int | None
    ) -> Iterator[Tensor]:
        rank, world = share
        lengths = (self.ids != self.pad).sum(1).cpu()
        for part in parts:
            if len(part) > rank:
                yield self.ids[part[rank::world].to(self.ids.device), : int(lengths[part].max())]


def load(name: str, model: str, folder: Path) -> tuple[Sentences, Sentences]:
    """Load the training and the test sentences, as the ids of a model's own tokenizer.

    Args:
        name: one of `SENTENCES`.
        model: name of a model as `cram_bench.models.create` knows it, ``minilm`` or ``hub:NAME``.
        folder: has ``train.tsv`` and ``test.tsv``.

    Raises:
        DataError: a file is missing, or a line is not a sentence TAB a label, or longer than `MOST` bytes.
        ValueError: the model has no tokenizer.
    """
    read = [_read(folder / f"{split}.tsv", len(SENTENCES[name])) for split in ("train", "test")]
    encode = tokenizer(model)
    encode.padding_side = "right"  # batches are cut there
    options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    parts = []
    for sentences, labels in read:
        with usual_defaults():
            ids = encode(sentences, **options)["input_ids"]
        known = torch.tensor(labels, device="cpu")
        parts.append(Sentences(name, ids, known, SENTENCES[name], encode.pad_token_id))
    return parts[0], parts[1]


def _read(path: Path, classes: int) -> tuple[list[str], list[int]]:
    """Return sentences and labels of a file. A line ends at a newline, not at what Unicode calls a separator."""
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
