"""Named data sets and image folders → uint8 tensors on a device; batches, normalised and augmented there.

    train, test = load("cifar10")
    for x, y in train.batches(128, seed=0, augment=True):
        ...

Decoded images are cached once, in the user's cache folder, with a checksum: a damaged cache is rebuilt. A new
data set of torchvision is one line in `TORCHVISION`; anything else fits the image-folder or the Parquet layout.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cram_bench._checks import instance, integer, meant, pairs, shown
from cram_bench._files import write_tensors


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
SENTENCES: dict[str, tuple[str, ...]] = {"sst2": ("negative", "positive")}
"""Sets of sentences, read by `cram_bench.text`: name → class names in label order."""
AT_ONCE = 125
"""Images in a batch of an evaluation: few enough for the activations of a small network to stay in the processor's cache."""
_SUFFIXES = {".png", ".jpg", ".jpeg"}
_FORMAT = 2  # of the cache; raise it when its content changes


class DataError(ValueError):
    """A data set is missing, unreadable or malformed; the message says in one line what and where."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels as tensors on one device.

    Attributes:
        name: how tables call it.
        images: uint8, shape (n, channels, height, width).
        labels: int64, shape (n,), values in [0, len(classes)).
        classes: class names in label order.
        mean: per channel, of the *training* images scaled to [0, 1]; shape (channels,).
        std: likewise.
        flip: whether augmentation may mirror an image.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    flip: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[1:]))
        return f"Dataset({self.name!r}, {len(self):,} images of {shape}, {len(self.classes)} classes)"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Image channels, 1 or 3."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height of the images in pixels."""
        return self.images.shape[2]

    @property
    def at_once(self) -> int | None:
        """Images that a batch should have at most where nobody learns from it; None for any number."""
        return None

    def to(self, device: torch.device | str) -> Dataset:
        """Return the data set with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "mean", "std")}
        return replace(self, **moved)

    def take(self, indices: Sequence[int] | Tensor) -> Dataset:
        """Return the images at `indices`, in that order."""
        indices = torch.as_tensor(indices, device=self.labels.device)
        if not len(indices):
            indices = indices.long()  # an empty list has no type
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def sample(self, count: int, seed: int = 0) -> Dataset:
        """Return `count` images drawn without replacement; all, in order, when there are no more than that."""
        integer("images of a sample", count, 1)
        if count >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count].sort().values)

    def calibration(
        self, count: int = 2000, augment: bool = True, seed: int = 0, batch_size: int = 500
    ) -> list[tuple[Tensor, Tensor]]:
        """Return batches for BatchNorm tuning: about `count` random images in equal batches, augmented as in training.

        Augmented, because BatchNorm's statistics were those of augmented images while the weights were trained: on
        a dense network such batches give back the statistics of the training, and plain images others.
        """
        sample = self.sample(count, seed)
        integer("batch_size", batch_size, 1)
        size = len(sample) // math.ceil(len(sample) / batch_size)  # equal batches leave out the fewest
        return list(sample.batches(size, seed=seed, augment=augment, drop_last=True, channels_last=True))

    def resized(self, size: int) -> Dataset:
        """Return the images scaled to `size` × `size` pixels (bilinear, antialiased) and three channels.

        For a network that was trained on images of another size. Mean and standard deviation stay.
        """
        integer("size", size, 1)
        if self.images.shape[1:] == (3, size, size):
            return self
        options = {"size": (size, size), "mode": "bilinear", "antialias": True, "align_corners": False}
        scaled = torch.cat([F.interpolate(part.float(), **options) for part in self.images.split(1000)])  # type: ignore[arg-type]
        images = scaled.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
        mean, std = (value.expand(3).clone() for value in (self.mean, self.std))
        return replace(self, images=images, mean=mean, std=std)

    def split(self, count: int, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Split off `count` random images: (the rest, those). For validation; the test set is for the final word."""
        if integer("held out images", count, 1) >= len(self):
            raise ValueError(f"cannot hold out {count} of {len(self)} images")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[count:].sort().values), self.take(order[:count].sort().values)

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 images to zero mean and unit variance per channel: (x/255 − mean)/std, float32."""
        scale = 1 / (255 * self.std)
        return torch.addcmul((-self.mean / self.std).view(-1, 1, 1), images.float(), scale.view(-1, 1, 1))

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
        """Yield (inputs, labels) once over the data.

        Args:
            batch_size: images per batch; the last one may be smaller.
            seed: shuffles, and drives augmentation; None keeps the order of the data.
            augment: random crop after padding by an eighth of the side with black, and a mirror where `flip` allows.
            drop_last: leave out a last batch that is smaller.
            channels_last: lay the inputs out channel-innermost.
            share: (r, n) yields of every batch the images r, r + n, r + 2n …, drawn and augmented as in the whole batch;
                nothing where that is none.

        Yields:
            Normalised float32 inputs (b, channels, height, width) and int64 labels (b,).

        Raises:
            ValueError: the batch size is not positive, larger than the data while `drop_last`, or augmentation
                has no seed.
        """
        self._check(batch_size, seed, augment, drop_last)
        rank, world = share
        generator = torch.Generator().manual_seed(seed or 0)
        order = torch.arange(len(self)) if seed is None else torch.randperm(len(self), generator=generator)
        end = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, end, batch_size):
            whole = order[start : min(start + batch_size, end)].to(self.labels.device)
            index = whole[rank::world]
            images = self.images[index]
            if augment:
                images = augmented(images, generator, self.flip, share=(rank, world, len(whole)))
            if not len(index):
                continue
            inputs = self.normalise(images)
            if channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield inputs, self.labels[index]

    def _check(self, batch_size: int, seed: int | None, augment: bool, drop_last: bool) -> None:
        integer("batch_size", batch_size, 1)
        if drop_last and batch_size > len(self):
            raise ValueError(f"batch_size {batch_size} is larger than the data, {len(self)} images")
        if augment and seed is None:
            raise ValueError("augmentation is random and needs a seed")


Batches = Dataset | Iterable[Any]
"""A `Dataset`, or anything that yields (inputs, labels) every time it is iterated, such as a `DataLoader`."""


def batches_of(
    data: Batches, batch_size: int = AT_ONCE, share: tuple[int, int] = (0, 1)
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) of any kind of data in a fixed order; of a `Dataset`, a share as `Dataset.batches` takes it.

    Raises:
        TypeError: `data` is an iterator, which could be read only once, or yields something else.
        ValueError: labels are no integers, or not as many as inputs.
    """
    if isinstance(data, Dataset):
        return data.batches(min(batch_size, data.at_once or batch_size), channels_last=True, share=share)
    if isinstance(data, Iterator):
        raise TypeError("the data are read more than once: give a list or a DataLoader, not an iterator")
    instance("data", data, Iterable, "a Dataset or a list of (inputs, labels)")  # type: ignore[type-abstract]
    return pairs(data)


def augmented(
    images: Tensor, generator: torch.Generator, flip: bool = True, share: tuple[int, int, int] | None = None
) -> Tensor:
    """Crop every image at random after padding by an eighth of its side (4 pixels of 32), and mirror half of them.

    Args:
        images: shape (b, channels, height, width), any dtype; padding is zero.
        generator: a CPU generator, so that every device draws the same.
        flip: whether to mirror.
        share: (r, n, whole): `images` are those at r, r + n, r + 2n … of a batch of `whole` images, and get what they would
            get there.

    Returns:
        A tensor of the same shape and dtype, on the same device.
    """
    count, _, height, width = images.shape
    rank, world, whole = share or (0, 1, count)
    pad = max(1, height // 8)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(2 * pad + 1, (2, whole), generator=generator)[:, rank::world]
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        mirror = torch.rand(whole, generator=generator)[rank::world] < 0.5
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    # Advanced indices around a slice move the channels to the back; gather there and bring them forward again.
    picked = padded[torch.arange(count, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the data folder: `root`, else ``CRAM_BENCH_DATA``, else the user's cache folder."""
    path = Path(root or os.environ.get("CRAM_BENCH_DATA") or cache_root() / "data")
    if path.exists() and not path.is_dir():
        raise DataError(f"the data folder must be a folder, and {path} is none; CRAM_BENCH_DATA names it")
    return path


def cache_root() -> Path:
    """Return ``$XDG_CACHE_HOME/cram_bench``, by default ``~/.cache/cram_bench``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cram_bench"


def is_folder(name: str) -> bool:
    """Tell whether `name` means an image folder rather than a named data set."""
    return name not in {"digits", *SENTENCES, *TORCHVISION}


def training_size(name: str) -> int:
    """Return how many training images a data set has, without decoding any; 0 for a folder that is not there, and for sentences."""
    if name in TORCHVISION:
        return TORCHVISION[name].training
    if not is_folder(name):
        return 1297 if name == "digits" else 0
    return sum(path.suffix.lower() in _SUFFIXES for path in Path(name).expanduser().glob("train/*/*"))


def image_shape(name: str) -> tuple[int, int, int]:
    """Return channels, height and width of the images of a data set, reading one image at most.

    Raises:
        DataError: the folder holds no image.
    """
    if name == "digits":
        return (1, 8, 8)
    if name in TORCHVISION:
        return TORCHVISION[name].shape
    files = (path for path in sorted(Path(name).expanduser().glob("train/*/*")) if path.suffix.lower() in _SUFFIXES)
    if (first := next(files, None)) is None:
        raise DataError(f"{name} holds no image in train/<class>/")
    channels, height, width = _decode(_contents(first), str(first)).shape
    return channels, height, width


def fingerprint(name: str) -> str | None:
    """Hash names, sizes and times of an image folder's files, to notice when they change; None for anything else."""
    if not is_folder(name) or not (folder := Path(name).expanduser()).is_dir():
        return None
    files = sorted(path for split in ("train", "test", "val") for path in folder.glob(f"{split}/*/*"))
    stats = [(path.relative_to(folder).as_posix(), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def load(name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> tuple[Dataset, Dataset]:
    """Load the training and the test images of a data set.

    Args:
        name: ``digits`` (scikit-learn's, embedded), ``cifar10``, ``cifar100``, ``mnist`` or ``fashion_mnist``, or the
            path of an image folder with ``train/<class>/*`` and ``test/<class>/*`` (or ``val``) of PNG or JPEG images
            of one size; `cram_bench.streaming.load` reads those of many sizes.
        root: where named sets lie, by default ``CRAM_BENCH_DATA``, else the user's cache folder. There
            ``root/<name>/{train,test}-*.parquet`` in the layout of the public hub export is used if present;
            otherwise torchvision's own files, downloaded where the network allows.

    Returns:
        (train, test), both normalised by the training images.

    Raises:
        DataError: the set is unknown or missing (the message says how to get it), or its content is malformed.
    """
    instance("data set", name, (str, os.PathLike), "a name or the path of an image folder")
    name = os.fspath(name)
    if name == "digits":
        return _digits()
    if name in TORCHVISION:
        folder = data_root(root) / name
        if parquet := _parquet_files(folder):
            sources = [path for paths in parquet.values() for path in paths]
            return _cached(name, sources, lambda: {s: _read_parquet(p) for s, p in parquet.items()}, _named(name))
        return _through_torchvision(name, data_root(root))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        known = ["digits", *TORCHVISION, *SENTENCES]
        hint = meant(folder.name, known)
        raise DataError(f"unknown data set {shown(name)}: it is neither a folder nor one of {', '.join(known)}{hint}")
    return _from_folder(folder)


# ---------------------------------------------------------------- sources


def _digits() -> tuple[Dataset, Dataset]:
    package = importlib.util.find_spec("sklearn")  # found, and not imported: that takes longer than all else
    sources = [Path(package.origin)] if package is not None and package.origin else []
    classes = tuple(map(str, range(10)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "decoded images could not be cached", UserWarning)  # they are quickly decoded
        return _cached("digits", sources, _read_digits, {"classes": classes, "flip": False})


def _read_digits() -> dict[str, tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, kept = order[:500].sort().values, order[500:].sort().values  # a fixed test set of 500
    return {"train": (images[kept], labels[kept]), "test": (images[held], labels[held])}


def _parquet_files(folder: Path) -> dict[str, list[Path]] | None:
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


def _read_parquet(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for path in paths:
        try:
            table = pq.read_table(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not readable as Parquet: {_first_line(error)}") from error
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
            images.append(_decode((item or {}).get("bytes") or b"", f"{path}, row {row}"))
        labels.append(table.column(label).to_numpy())
    return _stack(images, [str(paths[0])]), torch.from_numpy(np.concatenate(labels).astype(np.int64))


def _through_torchvision(name: str, root: Path) -> tuple[Dataset, Dataset]:
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, TORCHVISION[name].torchvision)
    folder = root / "torchvision"
    how = f"put train-*.parquet and test-*.parquet into {root / name}, or set CRAM_BENCH_DATA to the folder that has {name}/"
    try:
        splits = {split: dataset(folder, train=split == "train", download=True) for split in ("train", "test")}
    except Exception as error:  # torchvision raises whatever its download meets
        with contextlib.suppress(OSError):
            (
                folder / TORCHVISION[name].torchvision / "raw"
            ).rmdir()  # what it made and left empty; a folder with content stays
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise DataError(f"{name} is not in {root} and could not be downloaded ({_first_line(error)}): {how}") from None
    arrays = {}
    for split, source in splits.items():
        images = torch.as_tensor(np.asarray(source.data))
        images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
        arrays[split] = (images.contiguous(), torch.as_tensor(source.targets, dtype=torch.int64))
    return _build(name, arrays, **_named(name))


def listed(folder: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[Path, int]]]]:
    """Return the class names of an image folder and, for ``train`` and ``test``, its files with their labels.

    Raises:
        DataError: the folder is not laid out as `load` says.
    """
    splits = {split: folder / split for split in ("train", "test")}
    if not splits["test"].is_dir() and (folder / "val").is_dir():
        splits["test"] = folder / "val"
    for path in splits.values():
        if not path.is_dir():
            raise DataError(
                f"{folder} has no folder {path.name}/; an image folder holds train/<class>/* and test/<class>/*"
            )
    classes = tuple(sorted(path.name for path in splits["train"].iterdir() if path.is_dir()))
    if len(classes) < 2:
        raise DataError(f"{splits['train']} holds {len(classes)} class folders; at least 2 are needed")
    extra = sorted(path.name for path in splits["test"].iterdir() if path.is_dir() and path.name not in classes)
    if extra:
        raise DataError(f"{splits['test'] / extra[0]} is a class without training images in {splits['train']}")
    files: dict[str, list[tuple[Path, int]]] = {}
    for split, path in splits.items():
        files[split] = []
        for label, name in enumerate(classes):
            found = sorted(p for p in (path / name).glob("*") if p.suffix.lower() in _SUFFIXES)
            if not found:
                raise DataError(f"{path / name} holds no PNG or JPEG image")
            files[split] += [(file, label) for file in found]
    return classes, files


def _from_folder(folder: Path) -> tuple[Dataset, Dataset]:
    classes, files = listed(folder)
    sources = [file for listed in files.values() for file, _ in listed]

    def read() -> dict[str, tuple[Tensor, Tensor]]:
        colour = _any_colour(sources)
        decoded = {split: [_decode(_contents(p), str(p), colour) for p, _ in listed] for split, listed in files.items()}
        names = [str(path) for path in sources]
        stacked = _stack([image for images in decoded.values() for image in images], names)
        images = dict(zip(files, stacked.split([len(listed) for listed in files.values()]), strict=True))
        return {split: (images[split], torch.tensor([label for _, label in files[split]])) for split in files}

    return _cached(folder.resolve().name, sources, read, {"classes": classes, "flip": True})


def _any_colour(paths: Sequence[Path]) -> bool:
    from PIL import Image, UnidentifiedImageError

    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode not in {"1", "L", "I", "I;16", "F"}:
                    return True
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} is not readable as an image: {_first_line(error)}") from error
    return False


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} is not readable as an image: {error.strerror}") from error


def _decode(data: bytes, where: str, colour: bool | None = None) -> np.ndarray:
    """Decode PNG or JPEG bytes to (channels, height, width) uint8."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as file:
            image: Image.Image = file
            grey = image.mode in {"1", "L", "I", "I;16", "F"} if colour is None else not colour
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert would clip
            elif image.mode in {"I", "F"}:
                raise DataError(f"{where} has pixels of mode {image.mode}; allowed are 8 or 16 bits a channel")
            array = np.asarray(image.convert("L" if grey else "RGB"))
    except DataError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where} is not readable as an image: {_first_line(error)}") from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _stack(images: list[np.ndarray], names: Sequence[str]) -> Tensor:
    if not images:
        raise DataError(f"{names[0] if names else 'the data set'} holds no images")
    expected = images[0].shape
    for index, image in enumerate(images):
        if image.shape != expected:
            where = names[index] if index < len(names) else f"image {index}"
            raise DataError(
                f"{where} is {_size(image.shape)}, and the first image is {_size(expected)}; all must be alike"
            )
    return torch.from_numpy(np.stack(images))


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}×{shape[1]} pixels, {shape[0]} channels"


def _named(name: str) -> dict[str, Any]:
    source = TORCHVISION[name]
    return {"classes": source.names or tuple(map(str, range(source.classes))), "flip": source.flip}


def _build(
    name: str, arrays: dict[str, tuple[Tensor, Tensor]], classes: tuple[str, ...], flip: bool
) -> tuple[Dataset, Dataset]:
    for split, (images, labels) in arrays.items():
        if len(images) != len(labels):
            raise DataError(f"{name} {split} has {len(images)} images and {len(labels)} labels")
        if wrong := labels[(labels < 0) | (labels >= len(classes))].tolist():
            raise DataError(f"{name} {split} has the label {wrong[0]}; labels run from 0 to {len(classes) - 1}")
    if arrays["train"][0].shape[1:] != arrays["test"][0].shape[1:]:
        shapes = [_size(tuple(images.shape[1:])) for images, _ in arrays.values()]
        raise DataError(f"{name}: training images are {shapes[0]}, test images {shapes[1]}; all must be alike")
    mean, std = _moments(arrays["train"][0])
    train, test = (Dataset(name, *arrays[split], classes, mean, std, flip) for split in ("train", "test"))
    return train, test


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and standard deviation per channel of uint8 images scaled to [0, 1], from their histograms."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].reshape(-1), minlength=256).double()
        mean = (counts * values).sum() / counts.sum()
        means.append(mean)
        stds.append(((counts * (values - mean).square()).sum() / counts.sum()).sqrt())
    std = torch.stack(stds)
    return torch.stack(means).float(), torch.where(std > 0, std, torch.ones_like(std)).float()


# ---------------------------------------------------------------- cache of decoded images


@dataclass
class _Cache:
    path: Path

    def read(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        from safetensors import safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                written = (file.metadata() or {}).get("sha256")
        except Exception as error:  # the library raises its own type for a truncated file
            warnings.warn(f"{self.path} is damaged and is rebuilt: {_first_line(error)}", stacklevel=4)
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
            warnings.warn(
                f"decoded images could not be cached in {self.path.parent}: {_first_line(error)}", stacklevel=4
            )


def _cached(
    name: str,
    sources: Sequence[Path],
    read: Callable[[], dict[str, tuple[Tensor, Tensor]]],
    build: dict[str, Any],
) -> tuple[Dataset, Dataset]:
    """Decode with `read`, or take the cache, which is named by the sources' paths, sizes and times."""
    stats = [(str(p.resolve()), (s := p.stat()).st_size, s.st_mtime_ns) for p in sources]
    key = hashlib.sha256(json.dumps([_FORMAT, stats, len(build["classes"])]).encode()).hexdigest()[:16]
    cache = _Cache(cache_root() / "decoded" / f"{name}-{key}.safetensors")
    arrays = cache.read()
    if arrays is None:
        arrays = read()
        datasets = _build(name, arrays, **build)  # checked before it is kept
        cache.write(arrays)
        return datasets
    return _build(name, arrays, **build)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
