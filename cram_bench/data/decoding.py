"""Image files → uint8 arrays of one shape, upright and without transparency; what is wrong with a file is one line."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from cram_bench import untrusted
from cram_bench.checks import one_line

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".bmp", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Names that torchvision's ``ImageFolder`` reads too, and JFIF, which is JPEG."""
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")
"""What these files may hold, whatever their names; no other decoder of Pillow is tried."""
MOST_PIXELS = 2**26
"""Pixels that an image may have, 8192 × 8192: a small file can stand for any number."""
MOST_BYTES = 2**28
"""Bytes that an image's file may have: those of so many pixels, not compressed, and some more."""
_GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
_ORIENTATION = 0x0112  # of EXIF


class DataError(ValueError):
    """A data set is missing, unreadable or malformed; the message says in one line what and where."""


def any_colour(paths: Sequence[Path]) -> bool:
    """Tell whether one of the images has colours; all are read with three channels then."""
    for path in paths:
        try:
            with untrusted.opened(path, MOST_BYTES) as file, _image(file, str(path)) as image:
                if image.mode not in _GREY:
                    return True
        except DataError:
            raise
        except Exception as error:  # a damaged file raises whatever its bytes lead to
            raise _unreadable(str(path), error) from error
    return False


def contents(path: Path) -> bytes:
    """Read the file of an image."""
    try:
        return untrusted.contents(path, MOST_BYTES)
    except OSError as error:
        raise _unreadable(str(path), error) from error


def stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return size and time of change of a file, which tell whether it is still the same."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise _unreadable(str(path), error) from error
    return stat.st_size, stat.st_mtime_ns


def decode(data: bytes, where: str, colour: bool | None = None) -> np.ndarray:
    """Decode a file's bytes to (channels, height, width) uint8.

    The image is turned as its EXIF orientation says, and laid on white where it is transparent. Of several frames it is
    the first. 16 bits a channel lose the lower eight.

    Args:
        data: content of an image file of one of `FORMATS`.
        where: how messages call it.
        colour: whether to return three channels or one; None for what the image has.

    Raises:
        DataError: it is no such image, or has 32 bits a channel, or more than `MOST_PIXELS`.
    """
    try:
        with _image(io.BytesIO(data), where) as file:
            file.load()
            grey = file.mode in _GREY if colour is None else not colour
            image = _on_white(_eight_bits(file, where))
            if (turn := _turn(file)) is not None:
                image = image.transpose(turn)
            mode = "L" if grey else "RGB"
            array = np.asarray(image if image.mode == mode else image.convert(mode))
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(where, error) from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


@contextlib.contextmanager
def _image(file: BinaryIO, where: str) -> Iterator[Image.Image]:
    """Open an image of at most `MOST_PIXELS`; nothing of it is decoded yet."""
    from PIL import Image

    most = f"and an image may have {MOST_PIXELS:,}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's bound is its own, and this one lower
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise DataError(
                f"{where} is not readable as an image: {one_line(error).partition(')')[0]}), {most}"
            ) from error
    with image:
        if image.width * image.height > MOST_PIXELS:
            pixels = f"{image.width} × {image.height} pixels"
            raise DataError(f"{where} is not readable as an image: it has {pixels}, {most}")
        yield image


def stack(images: list[np.ndarray], names: Sequence[str]) -> Tensor:
    """Make one tensor of images of one shape; `names` says in messages where each comes from."""
    if not images:
        raise DataError(f"{names[0] if names else 'the data set'} holds no images")
    for index, image in enumerate(images):
        alike(image.shape, images[0].shape, names[index] if index < len(names) else f"image {index}")
    return torch.from_numpy(np.stack(images))


def alike(shape: tuple[int, ...], first: tuple[int, ...], where: str, remedy: str = "") -> None:
    """Refuse an image that has not the shape of the first one."""
    if shape != first:
        found = f"{where} is {dimensions(shape)}, and the first image is {dimensions(first)}"
        raise DataError(f"{found}; all must be alike{remedy}")


def dimensions(shape: tuple[int, ...]) -> str:
    """Say a shape (channels, height, width) in words."""
    return f"{shape[2]}×{shape[1]} pixels, {shape[0]} channels"


def _eight_bits(image: Image.Image, where: str) -> Image.Image:
    """Return the image with 8 bits a channel; a 16-bit grey that stands for transparent becomes an alpha channel."""
    from PIL import Image

    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")):
        if image.mode in {"I", "F"}:
            raise DataError(f"{where} has pixels of mode {image.mode}; allowed are 8 or 16 bits a channel")
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))  # Pillow's convert would clip
    if (clear := image.info.get("transparency")) is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def _on_white(image: Image.Image) -> Image.Image:
    """Lay an image that may be transparent on white, as a page would show it: its hidden colours are nobody's."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    if image.mode == "RGB" and max(key := image.info["transparency"]) > 255:  # of 16 bits, beside pixels of 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes the image upright; None where it is, or where its EXIF cannot be read."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        return turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF beside sound pixels
        return None


def _unreadable(where: str, error: BaseException) -> DataError:
    from PIL import UnidentifiedImageError

    reason = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else one_line(error)
    return DataError(f"{where} is not readable as an image: {reason}")
