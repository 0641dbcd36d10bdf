"""Image folders that do not fit in memory, or whose images differ in size, decoded by processes as they are used.

Order, crops and mirrors follow from the seed and an image's place in the folder alone, whatever the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cram_bench import untrusted
from cram_bench._defaults import usual_defaults
from cram_bench.checks import integer, one_line, shown
from cram_bench.data.dataset import Dataset
from cram_bench.data.decoding import MOST_BYTES, DataError, decode
from cram_bench.data.folders import listed
from cram_bench.data.images import Images, normalised, scale_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images per channel, as everybody uses them."""

PATIENCE = 600.0
"""Seconds for which worker processes may decode a batch: on a file system that is silent they would hang for ever."""


@dataclass(frozen=True, repr=False)
class Streamed(Dataset):
    """Files of images and their labels.

    In training an image is cut at random, 8 to 100 % of its area, scaled to the crop and, where `flip` allows, mirrored
    by a coin (`torchvision.transforms.v2.RandomResizedCrop` with its defaults). Otherwise its shorter side is scaled to
    8/7 of the crop (256 of 224 pixels) and the middle is taken. Colours always, three channels.

    Attributes:
        name: how tables call it.
        places: each image's place in `files`, int64, shape (n,).
        labels: shape (n,), values in [0, len(classes)).
        classes: class names in label order.
        mean: per channel, what the images are normalised by; shape (3,).
        std: likewise.
        flip: whether augmentation may mirror an image.
        folder: where the files are.
        files: paths in it, as bytes in one array, which worker processes share.
        crop: pixels a side of what the network sees.
        workers: processes that decode; 0 decodes in this one.
        patience: seconds that a batch may take them, after which they are ended.
    """

    per_example: ClassVar[str] = "places"
    calibrates: ClassVar[tuple[int, int]] = 1000, 125

    name: str
    places: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    flip: bool
    folder: str
    files: np.ndarray
    crop: int
    workers: int
    patience: float = PATIENCE

    @property
    def form(self) -> str:
        """Crops of 3 × height × width."""
        return f"images in crops of 3 × {self.crop} × {self.crop}"

    @property
    def preparation(self) -> str:
        """By which mean and deviation they are normalised."""
        return scale_of(self.mean, self.std)

    @property
    def trial(self) -> Tensor:
        """Zeros: nothing is decoded for this."""
        return torch.zeros(2, 3, self.crop, self.crop, device=self.labels.device)

    @property
    def channels(self) -> int:
        """3."""
        return 3

    @property
    def image_size(self) -> int:
        """Pixels a side of the crops."""
        return self.crop

    @property
    def at_once(self) -> int:
        """As many images as make 64 MiB: activations of large images are large."""
        return max(1, 2**24 // (3 * self.crop**2))

    def sample(self, count: int, seed: int = 0) -> Images:
        """Return `count` images drawn without replacement, or all, decoded into memory as they are tested."""
        drawn = self._drawn(count, seed)
        pixels = torch.cat(list(self._pixels(drawn.places.cpu().split(self.at_once)))).to(self.labels.device)
        return Images(self.name, pixels, drawn.labels, self.classes, self.mean, self.std, self.flip)

    def _inputs(
        self, parts: Sequence[Tensor], share: tuple[int, int], generator: torch.Generator, seed: int | None
    ) -> Iterator[Tensor]:
        """Decode the parts.

        Raises:
            DataError: a file is not readable as an image, or the processes that decode gave no batch for `patience` s.
        """
        rank, world = share
        places, device = self.places.cpu(), self.labels.device
        for pixels in self._pixels([places[part[rank::world]] for part in parts if len(part) > rank], seed):
            yield normalised(pixels.to(device, non_blocking=True), self.mean, self.std)

    def _pixels(self, wanted: Sequence[Tensor], seed: int | None = None) -> Iterator[Tensor]:
        """Yield a uint8 tensor (b, 3, crop, crop) for each of several tensors of places; without seed, the middles."""
        from torch.utils.data import DataLoader

        workers = min(self.workers, len(wanted))
        asked = ([(place, seed) for place in places.tolist()] for places in wanted)
        with usual_defaults():
            loader: DataLoader[Any] = DataLoader(
                _Images(self.folder, self.files, self.crop, self.flip),
                batch_sampler=asked,  # type: ignore[arg-type]
                num_workers=workers,
                timeout=self.patience if workers else 0,
                collate_fn=_together,
                pin_memory=self.labels.device.type == "cuda",
                generator=torch.Generator(),  # torch's own would be advanced, and dropout draws from that
            )
            batches = iter(loader)
        for places in wanted:
            try:
                batch = next(batches)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                raise DataError(self._ended(batches, places)) from None
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch

    def _ended(self, batches: Any, places: Tensor) -> str:
        """End the worker processes, also one that is stopped or deaf to SIGTERM; say which, and what they were at."""
        from torch.utils.data._utils import signal_handling

        processes = batches._workers
        signal_handling._remove_worker_pids(id(batches))  # or torch raises wherever this process is when they die
        batches._worker_pids_set = False
        for process in processes:
            process.kill()
        for process in processes:
            process.join(1.0)  # one that waits for a device dies when that answers
        first = Path(self.folder, os.fsdecode(self.files[int(places[0])]))
        numbers = ", ".join(str(process.pid) for process in processes)
        return (
            f"the processes that decode images ({numbers}) gave no batch for {self.patience:g} s and were ended; its "
            f"first image is {shown(str(first))}: see whether it can be read, or give patience= more seconds"
        )


class _Images(torch.utils.data.Dataset[Any]):
    """(place, seed) → the image cut to the crop, or what is wrong with it: an exception would arrive as a traceback."""

    def __init__(self, folder: str, files: np.ndarray, crop: int, flip: bool) -> None:
        from torchvision.transforms import v2

        self.folder, self.files = folder, files
        mirror = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
        self.random = v2.Compose([v2.RandomResizedCrop(crop, antialias=True), mirror])
        self.middle = v2.Compose([v2.Resize(round(crop * 8 / 7), antialias=True), v2.CenterCrop(crop)])

    def __getitem__(self, wanted: tuple[int, int | None]) -> Tensor | str:
        place, seed = wanted
        path = Path(self.folder, os.fsdecode(self.files[place]))
        try:
            image = torch.from_numpy(
                np.ascontiguousarray(decode(untrusted.contents(path, MOST_BYTES), str(path), colour=True))
            )
        except (OSError, DataError) as error:
            return f"{path} is not readable: {one_line(error)}" if isinstance(error, OSError) else str(error)
        if seed is None:
            return self.middle(image)
        with torch.random.fork_rng(devices=[]), usual_defaults():
            torch.default_generator.manual_seed(
                int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0] >> 1)
            )
            return self.random(image)


def _together(images: list[Tensor | str]) -> Tensor | str:
    wrong = [image for image in images if isinstance(image, str)]
    return wrong[0] if wrong else torch.stack([image for image in images if isinstance(image, Tensor)])


def load(
    folder: str | os.PathLike[str], crop: int, workers: int | None = None, flip: bool = True
) -> tuple[Streamed, Streamed]:
    """List the training and the test images of an image folder; none is read yet.

    Args:
        folder: laid out as `cram_bench.data.load` says, of images of any size.
        crop: pixels a side of what the network sees.
        workers: processes that decode; by default one a CPU that this process may use, eight at most.
        flip: whether training images may be mirrored.

    Raises:
        DataError: the folder is not there, or not laid out so.
        ValueError: `crop` is not positive, or `workers` is negative.
    """
    integer("crop", crop, 1)
    if workers is None:
        workers = default_workers()
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, not {workers}")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images")
    classes, files = listed(folder)
    parts = []
    for pairs in files.values():
        paths = np.array([os.fsencode(path.relative_to(folder)) for path, _ in pairs])
        labels = torch.tensor([label for _, label in pairs], device="cpu")
        places = torch.arange(len(pairs), device="cpu")
        name = folder.resolve().name
        mean, std = (torch.tensor(values, device="cpu", dtype=torch.float32) for values in (MEAN, STD))
        parts.append(Streamed(name, places, labels, classes, mean, std, flip, str(folder), paths, crop, workers))
    return parts[0], parts[1]


def default_workers() -> int:
    """Return how many CPUs this process may use, shared with the others that torchrun started here; at most 8."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))
