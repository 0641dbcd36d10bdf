"""Image folders: train/<class>/* and test/<class>/* (or val)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cram_bench.data.cache import cached
from cram_bench.data.dataset import Dataset
from cram_bench.data.decoding import SUFFIXES, DataError, any_colour, contents, decode, stack


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
            found = sorted(p for p in (path / name).glob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"{path / name} holds no PNG or JPEG image")
            files[split] += [(file, label) for file in found]
    return classes, files


def load_folder(folder: Path) -> tuple[Dataset, Dataset]:
    """Return the training and the test images of a folder laid out so, all of one size."""
    classes, files = listed(folder)
    sources = [file for listed in files.values() for file, _ in listed]

    def read() -> dict[str, tuple[Tensor, Tensor]]:
        colour = any_colour(sources)
        decoded = {split: [decode(contents(p), str(p), colour) for p, _ in listed] for split, listed in files.items()}
        names = [str(path) for path in sources]
        stacked = stack([image for images in decoded.values() for image in images], names)
        images = dict(zip(files, stacked.split([len(listed) for listed in files.values()]), strict=True))
        return {split: (images[split], torch.tensor([label for _, label in files[split]])) for split in files}

    return cached(folder.resolve().name, sources, read, {"classes": classes, "flip": True})
