"""PNG and JPEG files → uint8 arrays of one shape; what is wrong with a file is said in one line."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cram_bench._checks import said

SUFFIXES = {".png", ".jpg", ".jpeg"}


class DataError(ValueError):
    """A data set is missing, unreadable or malformed; the message says in one line what and where."""


def any_colour(paths: Sequence[Path]) -> bool:
    """Tell whether one of the images has colours; all are read with three channels then."""
    from PIL import Image, UnidentifiedImageError

    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode not in {"1", "L", "I", "I;16", "F"}:
                    return True
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} is not readable as an image: {said(error)}") from error
    return False


def contents(path: Path) -> bytes:
    """Read a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} is not readable as an image: {error.strerror}") from error


def decode(data: bytes, where: str, colour: bool | None = None) -> np.ndarray:
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
        raise DataError(f"{where} is not readable as an image: {said(error)}") from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def stack(images: list[np.ndarray], names: Sequence[str]) -> Tensor:
    """Make one tensor of images of one shape; `names` says in messages where each comes from."""
    if not images:
        raise DataError(f"{names[0] if names else 'the data set'} holds no images")
    expected = images[0].shape
    for index, image in enumerate(images):
        if image.shape != expected:
            where = names[index] if index < len(names) else f"image {index}"
            raise DataError(
                f"{where} is {dimensions(image.shape)}, and the first image is {dimensions(expected)}; all must be alike"
            )
    return torch.from_numpy(np.stack(images))


def dimensions(shape: tuple[int, ...]) -> str:
    """Say a shape (channels, height, width) in words."""
    return f"{shape[2]}×{shape[1]} pixels, {shape[0]} channels"
