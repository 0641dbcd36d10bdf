"""What only the explorer draws: its curve, and images with captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cram_bench.checks import integer
from cram_bench.plots._style import Figure, looks, per_cent, style


def explorer_curve(
    curves: Mapping[str, pd.DataFrame],
    points: Mapping[str, Any],
    methods: Mapping[str, str],
    sparsity: float,
    chance: float,
) -> Figure:
    """Draw what the explorer knows of accuracy against sparsity, and the point it is at.

    Args:
        curves: label → columns sparsity, accuracy.
        points: label → something with an accuracy, or None.
        methods: label → method, which decides the look.
        sparsity: where the points are.
        chance: accuracy of guessing, a fraction, such as `Dataset.majority` of the test images.
    """
    with style():
        figure = Figure(figsize=(5.4, 3.2))
        axis = figure.subplots()
        for label, colour, marker, dashes, curve in looks(curves, methods):
            axis.plot(
                curve["sparsity"], curve["accuracy"], color=colour, label=label, linewidth=1.5, linestyle=dashes,
                marker=marker, markevery=[],
            )  # fmt: skip  # the marker is for the legend
            if points[label] is not None:
                axis.plot(
                    sparsity, points[label].accuracy, color=colour, marker=marker, markersize=9, markeredgecolor="white"
                )
        axis.axvline(sparsity, color="#888888", linewidth=0.8)
        axis.axhline(chance, color="#888888", linestyle=":", linewidth=1.2)
        axis.annotate("guessing", (0, chance), (0, 3), textcoords="offset points", color="#666666", fontsize=8)
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(0, 1.02)
        per_cent(axis.xaxis)
        per_cent(axis.yaxis)
        axis.set_xlabel("sparsity, % of prunable weights that are zero")
        axis.set_ylabel("accuracy on the sample, %")
        axis.set_title("Accuracy against sparsity")
        if curves:
            figure.legend(loc="outside lower center", ncols=1 if len(curves) > 2 else 2, fontsize=8)
    return figure


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
