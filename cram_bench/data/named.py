"""Data sets by name; a new one of torchvision is one line in `TORCHVISION`, anything else fits a folder or Parquet."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cram_bench.checks import instance, integer, one_line, shown, suggestion
from cram_bench.data import sentences, streaming
from cram_bench.data.cache import cache_root, cached
from cram_bench.data.dataset import Dataset, shuffled
from cram_bench.data.decoding import DataError, any_colour, contents, decode, stamp
from cram_bench.data.folders import TEST, images_of, load_folder
from cram_bench.data.idx import idx_files, read_idx
from cram_bench.data.images import Images, built
from cram_bench.data.parquet import read_parquet, shards
from cram_bench.data.sentences import SENTENCES


@dataclass(frozen=True)
class Source:
    """A named data set: its class in torchvision, its numbers of classes and of training images."""

    torchvision: str
    classes: int
    training: int
    shape: tuple[int, int, int] = (3, 32, 32)
    """Channels, height and width."""
    flip: bool = True
    """Whether a mirrored image keeps its label: not so for written digits."""
    names: tuple[str, ...] = ()
    """Class names in label order; numbers where there are none."""


TORCHVISION = {
    "cifar10": Source(
        "CIFAR10",
        10,
        50_000,
        names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Source("CIFAR100", 100, 50_000),
    "mnist": Source("MNIST", 10, 60_000, (1, 28, 28), flip=False),
    "fashion_mnist": Source(
        "FashionMNIST",
        10,
        60_000,
        (1, 28, 28),
        names=("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    ),
}


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the data folder: `root`, else ``CRAM_BENCH_DATA``, else the user's cache folder."""
    path = Path(root or os.environ.get("CRAM_BENCH_DATA") or cache_root() / "data")
    if path.exists() and not path.is_dir():
        raise DataError(f"the data folder must be a folder, and {path} is none; CRAM_BENCH_DATA names it")
    return path


def is_folder(name: str) -> bool:
    """Tell whether `name` means an image folder rather than a named data set."""
    return name not in {"digits", *SENTENCES, *TORCHVISION}


def training_size(name: str) -> int:
    """Return how many training images a data set has, decoding none; 0 for a folder that is not there and sentences."""
    if name in TORCHVISION:
        return TORCHVISION[name].training
    if not is_folder(name):
        return 1297 if name == "digits" else 0
    return len(images_of(Path(name).expanduser()))


def image_shape(name: str) -> tuple[int, int, int]:
    """Return channels, height and width of the images of a data set, decoding one image at most.

    Raises:
        DataError: the folder holds no image.
    """
    if name == "digits":
        return (1, 8, 8)
    if name in TORCHVISION:
        return TORCHVISION[name].shape
    files = images_of(Path(name).expanduser(), ("train", *TEST))
    if not files:
        raise DataError(f"{name} holds no image in train/<class>/")
    channels, height, width = decode(contents(files[0]), str(files[0]), any_colour(files)).shape
    return channels, height, width


def fingerprint(name: str) -> str | None:
    """Hash names, sizes and times of an image folder's images, to notice when they change; None for anything else.

    A copy that keeps the times, on whatever machine, has the same. So has a folder in which somebody replaced an image
    by another of its size and put its time back: the cache of decoded images tells these apart, what a run noted does
    not. Nothing is remembered between two calls, for a file that is written in place changes no folder: all are looked
    at each time, some 15 µs a file. One call of `cram_bench.runs.ensure_all` looks once.
    """
    if not is_folder(name) or not (folder := Path(name).expanduser().absolute()).is_dir():
        return None
    root = os.path.join(folder, "")
    files = [os.fspath(path)[len(root) :] for path in images_of(folder, ("train", *TEST))]
    stats = [(file, *stamp(root + file)) for file in sorted(files, key=lambda file: file.split("/"))]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def load(
    name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    *,
    crop: int = 0,
    workers: int | None = None,
    flip: bool = True,
    model: str = "",
) -> tuple[Dataset, Dataset]:
    """Load the training and the test examples of a data set.

    Args:
        name: ``digits`` (scikit-learn's, embedded), ``cifar10``, ``cifar100``, ``mnist`` or ``fashion_mnist``, or the
            path of an image folder with ``train/<class>/*`` and ``test/<class>/*`` (or ``val``, ``valid``,
            ``validation``) of PNG, JPEG, PPM, BMP, TIFF or WebP images, all of one size unless there is a `crop`.
            Images are turned upright by their EXIF, and laid on white where they are transparent.
        root: where named sets lie, by default ``CRAM_BENCH_DATA``, else the user's cache folder. There
            ``root/<name>/{train,test}-*.parquet`` in the layout of the public hub export is used if present,
            or of grey images the four ``root/<name>/*-ubyte.gz``, IDX as their makers wrote them; otherwise
            torchvision's own files, downloaded where the network allows. Of sentences, ``sst2``,
            ``root/<name>/{train,test}.tsv`` is read, a sentence TAB a label a line.
        crop: pixels a side of the crops of an image folder that is streamed, which may be larger than memory and hold
            images of any size; see `Streamed`. 0 decodes all of it into memory.
        workers: processes that decode what is streamed; by default one a CPU, eight at most.
        flip: whether augmentation may mirror images; ``digits`` and ``mnist`` never are.
        model: of sentences, the network that reads them, ``minilm`` or ``hub:NAME``: its own tokenizer makes their ids.

    Returns:
        (train, test): `Images`, both normalised by the training images; `Streamed`, by ImageNet's; or `Sentences`.

    Raises:
        DataError: the set is unknown or missing (the message says how to get it), its content is malformed, or it does
            not fit into memory.
        ValueError: `crop` is given for a named set, or sentences are to be read by what has no tokenizer.
    """
    instance("data set", name, (str, os.PathLike), "a name or the path of an image folder")
    instance("flip", flip, bool, "True or False")
    name = os.fspath(name)
    if integer("crop", crop, 0):
        if not is_folder(name):
            raise ValueError(f"crop is for an image folder, and {name!r} is a named data set")
        return streaming.load(name, crop, workers, flip)
    if is_folder(name):
        return load_folder(_existing(name), flip)
    if name in SENTENCES:
        if not model:
            raise DataError(f"{name} is a set of sentences, read by the tokenizer of a model: give model='minilm'")
        return sentences.load(name, model, data_root(root) / name)
    train, test = _digits() if name == "digits" else _images(name, data_root(root))
    return (train, test) if flip else (replace(train, flip=False), replace(test, flip=False))


def names() -> list[str]:
    """Return the data sets that have a name."""
    return ["digits", *TORCHVISION, *SENTENCES]


def _existing(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        hint = suggestion(folder.name, names())
        raise DataError(f"unknown data set {shown(name)}: it is neither a folder nor one of {', '.join(names())}{hint}")
    return folder


def _images(name: str, root: Path) -> tuple[Images, Images]:
    if parquet := shards(root / name):
        sources = [path for paths in parquet.values() for path in paths]
        return cached(name, sources, lambda: {s: read_parquet(p) for s, p in parquet.items()}, _named(name))
    channels, *shape = TORCHVISION[name].shape
    if channels == 1 and (files := idx_files(root / name)):
        height, width = shape
        arrays = {split: read_idx(*pair, (height, width)) for split, pair in files.items()}
        return built(name, arrays, **_named(name))
    return _through_torchvision(name, root)


def _digits() -> tuple[Images, Images]:
    package = importlib.util.find_spec("sklearn")  # found, and not imported: that takes longer than all else
    sources = [Path(package.origin)] if package is not None and package.origin else []
    classes = tuple(map(str, range(10)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "decoded images could not be cached", UserWarning)  # they are quickly decoded
        return cached("digits", sources, _read_digits, {"classes": classes, "flip": False})


def _read_digits() -> dict[str, tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = shuffled(len(labels), torch.Generator().manual_seed(0))
    held, kept = order[:500].sort().values, order[500:].sort().values  # a fixed test set of 500
    return {"train": (images[kept], labels[kept]), "test": (images[held], labels[held])}


def _through_torchvision(name: str, root: Path) -> tuple[Images, Images]:
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, TORCHVISION[name].torchvision)
    folder = root / "torchvision"
    files = "train-*.parquet and test-*.parquet"
    files += " or the four *-ubyte.gz" if TORCHVISION[name].shape[0] == 1 else ""
    how = f"put {files} into {root / name}, or set CRAM_BENCH_DATA to what has {name}/"
    try:
        splits = {split: dataset(folder, train=split == "train", download=True) for split in ("train", "test")}
    except Exception as error:  # torchvision raises whatever its download meets
        made = folder / TORCHVISION[name].torchvision / "raw"
        for each in (made, made.parent, folder):  # what it made and left empty; a folder with content stays
            with contextlib.suppress(OSError):
                each.rmdir()
        raise DataError(f"{name} is not in {root} and could not be downloaded ({one_line(error)}): {how}") from None
    arrays = {}
    for split, source in splits.items():
        images = torch.as_tensor(np.asarray(source.data), device="cpu")
        images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
        arrays[split] = (images.contiguous(), torch.as_tensor(source.targets, dtype=torch.int64, device="cpu"))
    return built(name, arrays, **_named(name))


def _named(name: str) -> dict[str, Any]:
    source = TORCHVISION[name]
    return {"classes": source.names or tuple(map(str, range(source.classes))), "flip": source.flip}
