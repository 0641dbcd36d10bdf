"""Named data sets and image folders → uint8 tensors on a device; batches, normalised and augmented there.

    train, test = load("cifar10")
    for x, y in train.batches(128, seed=0, augment=True):
        ...

Decoded images are cached once, in the user's cache folder, with a checksum: a damaged cache is rebuilt. A new
data set of torchvision is one line in `TORCHVISION`; anything else fits the image-folder or the Parquet layout.
"""

from __future__ import annotations

from cram_bench.data.cache import cache_root
from cram_bench.data.dataset import AT_ONCE, Batches, Dataset, augmented, batches_of
from cram_bench.data.decoding import DataError
from cram_bench.data.folders import listed
from cram_bench.data.named import (
    SENTENCES,
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

__all__ = [
    "AT_ONCE",
    "SENTENCES",
    "TORCHVISION",
    "Batches",
    "Data",
    "DataError",
    "Dataset",
    "Source",
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
    "training_size",
]
