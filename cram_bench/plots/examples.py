"""Images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cram_bench.checks import integer
from cram_bench.plots._style import Figure, style


def examples(images: Any, captions: Sequence[str], title: str, columns: int = 6) -> Figure:
    """Draw images with a caption each.

    Args:
        images: uint8 tensor, shape (n, channels, height, width); none leaves a line of text.
        captions: one for each.
        title: over all.
        columns: images a row.
    """
    integer("columns", columns, 1)
    if len(images) != len(captions):
        raise ValueError(f"there must be a caption an image, {len(images)}, not {len(captions)}")
    rows = max(1, -(-len(captions) // columns))
    images = images.permute(0, 2, 3, 1).cpu().numpy() if len(captions) else []
    with style():
        figure = Figure(figsize=(1.25 * columns, 1.5 * rows + 0.5))
        figure.suptitle(title, fontsize=10, fontweight="bold", x=0.02, ha="left")
        for axis, index in zip(figure.subplots(rows, columns, squeeze=False).flat, range(rows * columns), strict=True):
            axis.set_axis_off()
            if index < len(captions):
                image = images[index]
                axis.imshow(
                    image if image.shape[2] == 3 else image[:, :, 0],
                    cmap="gray_r",
                    vmin=0,
                    vmax=255,
                    interpolation="nearest",
                )
                axis.set_title(captions[index], fontsize=7, loc="center", fontweight="normal")
    return figure
