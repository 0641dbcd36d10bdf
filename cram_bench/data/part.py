"""Which data are trained on and how they are read, as a part of an experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from cram_bench.data.dataset import Dataset
from cram_bench.data.named import SENTENCES, is_folder, load
from cram_bench.settings import Part, Text


def _side(value: int) -> int:
    if value and not 8 <= value <= 4096:
        raise ValueError("0, or from 8 to 4096 pixels")
    return value


def _crop(value: int) -> int:
    if value and value < 8:
        raise ValueError("0, or at least 8 pixels")
    return value


@dataclass(frozen=True)
class Data(Part):
    """A data set and what is done to its images."""

    role: ClassVar[str] = "data"

    dataset: Text = "digits"
    """A name that `cram_bench.data.load` knows, or the path of an image folder."""
    augment: bool = True
    """Random crop, and `flip`."""
    resize: Annotated[int, AfterValidator(_side)] = 0
    """Pixels a side that images are scaled to, with three channels; 0 leaves them as they are."""
    holdout: Annotated[int, Field(ge=0, description="not negative")] = 0
    """Training images held out for validation: tests then use those, and the test set is not touched."""
    crop: Annotated[int, AfterValidator(_crop)] = 0
    """Pixels a side of the random crops of an image folder that is streamed from disk; 0 decodes all into memory."""
    flip: bool = True
    """Whether augmentation mirrors images at random; ``digits`` and ``mnist`` it never does."""
    sample: Annotated[int, Field(ge=0, description="not negative")] = 0
    """Training images that are used, drawn from what `holdout` leaves, the same for every seed; 0 uses all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop and (self.resize or not is_folder(self.dataset)):
            given = f"dataset {self.dataset!r} and resize {self.resize}"
            raise ValueError(f"crop needs an image folder as dataset, and no resize; it was given {given}")

    @property
    def of_sentences(self) -> bool:
        """Whether the inputs are sentences, and not images."""
        return self.dataset in SENTENCES

    def load(self, model: str, workers: int | None = None) -> tuple[Dataset, Dataset]:
        """Return (train, test); with `holdout`, training images stand in for the test set.

        Args:
            model: its name, for the tokenizer that sentences need.
            workers: how many processes decode images that are streamed.

        Raises:
            ValueError: `sample` is more than there are, or there are not more than `holdout`.
        """
        train, test = load(self.dataset, crop=self.crop, workers=workers, flip=self.flip, model=model)
        if self.resize:
            train, test = train.resized(self.resize), test.resized(self.resize)
        if self.holdout:
            train, test = train.split(self.holdout, seed=0)
        if self.sample > len(train):
            raise ValueError(f"sample must be at most the {len(train)} training {train.noun}, not {self.sample}")
        return (train.sample(self.sample, seed=0) if self.sample else train), test
