"""Named data sets, image folders and sentences → labelled examples on a device; batches, augmented there.

    train, test = load("cifar10")
    for x, y in train.batches(128, seed=0, augment=True):
        ...

Decoded images are cached once, in the user's cache folder, with a checksum: a damaged cache is rebuilt. A new
data set of torchvision is one line in `TORCHVISION`; other images fit the image-folder or the Parquet layout. A new
kind of data is a subclass of `Dataset`, which says all that is asked of data: by trainings, probes and panels.
"""

from __future__ import annotations

from cram_bench.data.cache import cache_root
from cram_bench.data.dataset import AT_ONCE, Batches, Dataset, batches_of
from cram_bench.data.decoding import DataError
from cram_bench.data.folders import listed
from cram_bench.data.held import Held, some
from cram_bench.data.images import Images, augmented
from cram_bench.data.named import (
    TORCHVISION,
    Source,
    data_root,
    fingerprint,
    image_shape,
    is_folder,
    load,
    names,
    training_size,
)
from cram_bench.data.part import Data
from cram_bench.data.sentences import SENTENCES, Sentences
from cram_bench.data.streaming import Streamed

__all__ = [
    "AT_ONCE",
    "SENTENCES",
    "TORCHVISION",
    "Batches",
    "Data",
    "DataError",
    "Dataset",
    "Held",
    "Images",
    "Sentences",
    "Source",
    "Streamed",
    "augmented",
    "batches_of",
    "cache_root",
    "data_root",
    "fingerprint",
    "image_shape",
    "is_folder",
    "listed",
    "load",
    "names",
    "some",
    "training_size",
]
