"""The one style of all figures: colours, markers, axes, legends. A method keeps its look in every figure."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from cram_bench.experiment import METHODS
from cram_bench.probes.over_runs import seeds_left

# Okabe and Ito's palette, its yellow replaced, and a wine of Paul Tol's: distinguishable with colour-blind vision, of
# different lightness.
_PALETTE = (
    "#000000",
    "#0072B2",
    "#56B4E9",
    "#E69F00",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#A6761D",
    "#888888",
    "#882255",
)
_STATES = {"model": 0, "dense": 1, "pruned": 4, "untuned": 8, "tuned": 5}  # places in the palette
_MARKERS = ("o", "s", "v", "^", "D", "P", "X", "*", "<", "p")

STYLE: dict[str, Any] = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.hashsalt": "cram_bench",  # the same table gives the same SVG
}

_STYLING = threading.RLock()  # matplotlib's settings are global, and the explorer draws in a thread of its own


@contextmanager
def style() -> Iterator[None]:
    """Use the house style for a block; matplotlib's own settings come back after it. One thread at a time."""
    with _STYLING, mpl.rc_context(STYLE):  # type: ignore[arg-type]
        yield


def look(method: str) -> tuple[str, str, str]:
    """Return (label, colour, marker) of a method: fixed by its place in `METHODS`; or of a state of one network."""
    names = list(METHODS)
    index = names.index(method) if method in names else _STATES.get(method, sum(map(ord, method)))
    label = METHODS[method].label if method in METHODS else method
    return label, _PALETTE[index % len(_PALETTE)], _MARKERS[index % len(_MARKERS)]


def looks(
    tables: Mapping[str, pd.DataFrame], methods: Mapping[str, str] | None
) -> Iterator[tuple[str, str, str, str, pd.DataFrame]]:
    """Yield (label, colour, marker, line style, table): a method's second run is dashed, its third dotted."""
    seen: dict[str, int] = {}
    for label, table in tables.items():
        method = methods[label] if methods else label
        name, colour, marker = look(method)
        number = seen[method] = seen.get(method, -1) + 1
        yield (label if methods else name), colour, marker, ("-", "--", ":", "-.")[number % 4], table


def in_order(table: pd.DataFrame) -> list[str]:
    """Return the methods of a table in the order of `METHODS`, unknown ones last."""
    present = list(dict.fromkeys(table["method"]))
    known = [method for method in METHODS if method in present]
    return known + [method for method in present if method not in known]


def at_even_steps(axis: Axes, table: pd.DataFrame) -> pd.DataFrame:
    """Give every sparsity a place at equal steps: the interesting ones crowd near 1 on a linear axis."""
    levels = sorted(table["sparsity"].dropna().unique())
    axis.set_xticks(range(len(levels)), ["dense" if s == 0 else f"{100 * s:g}" for s in levels])
    return table.assign(step=table["sparsity"].map({level: index for index, level in enumerate(levels)}))


def log_axis(axis: Axes, linear: float = 0.0) -> None:
    """Make the y axis of what was drawn logarithmic, linear up to `linear`, with plain numbers at its ticks."""
    if linear:
        axis.set_yscale("symlog", linthresh=linear)
        axis.autoscale(axis="y")  # margins of the new scale; those of a linear one leave the highest point on the frame
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
    else:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        locator = LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,))
        inside = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
        axis.yaxis.set_major_locator(locator if len(inside) > 1 else MaxNLocator(5))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(plain))


def log_axis_of(axis: Axes, values: pd.Series) -> str:
    """Make the y axis logarithmic, linear near zero where `values` are not all positive; return what to say of it."""
    linear = 0.0 if values.min() > 0 else 0.01 * float(values.abs().max())
    log_axis(axis, linear)
    return f"(linear to {linear:.1g}, then log)" if linear else "(log scale)"


def radius_axis(axis: Axes, radii: pd.Series) -> None:
    """Make the x axis that of radii, logarithmic, with a tick at each."""
    axis.set_xscale("log")
    ticks = sorted(radii.dropna().unique())
    axis.set_xticks(ticks, [f"{radius:g}" for radius in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("radius ρ, Euclidean distance in weights (log scale)")


def plain(value: float, _: int | None = None) -> str:
    """Write a number as people do, not as a power of ten."""
    return f"{value:g}".replace("-", "−")


def mean_lines(axis: Axes, table: pd.DataFrame, x: str, y: str, band: str = "range") -> None:
    """Draw a line per method: the mean, and a band of ± one standard deviation (std) or from lowest to highest (range)."""
    for method in in_order(table):
        _mean_line(axis, table[table["method"] == method], x, y, method, band)


def _mean_line(axis: Axes, table: pd.DataFrame, x: str, y: str, method: str, band: str) -> None:
    label, colour, marker = look(method)
    grouped = table.dropna(subset=[x, y]).groupby(x)[y]
    mean, deviation, count = grouped.mean(), grouped.std(ddof=1), grouped.count()
    axis.plot(
        mean.index,
        mean.to_numpy(),
        color=colour,
        marker=marker,
        label=label,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )
    if (count > 1).any():
        low, high = (mean - deviation, mean + deviation) if band == "std" else (grouped.min(), grouped.max())
        axis.fill_between(mean.index, low.to_numpy(), high.to_numpy(), color=colour, alpha=0.22, linewidth=0)


def _label_lines(axis: Axes) -> None:
    """Write every line's label at its right end, in its colour, pushed apart where ends lie close."""
    lines = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
    ends = []
    for line in lines:
        points = np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float)
        points = points[np.isfinite(points).all(axis=1)]
        if axis.get_yscale() == "log":
            points = points[points[:, 1] >= axis.get_ylim()[0]]  # from where the line is last seen
        if len(points):
            height = float(axis.transAxes.inverted().transform(axis.transData.transform(points[-1]))[1])
            ends.append((min(max(height, 0.0), 1.0), points[-1], line))
    ends.sort(key=lambda end: end[0])
    gap, places = 0.075, [end[0] for end in ends]
    for index in range(1, len(places)):  # upwards, then down again from the top edge
        places[index] = max(places[index], places[index - 1] + gap)
    for index in reversed(range(len(places))):
        places[index] = min(places[index], 1.0 - gap * (len(places) - 1 - index))
    for place, (_, point, line) in zip(places, ends, strict=True):
        axis.annotate(
            str(line.get_label()), xy=(float(point[0]), float(point[1])), xytext=(1.03, place), textcoords="axes fraction",
            color=line.get_color(), va="center", fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "shrinkB": 3, "shrinkA": 0},
        )  # fmt: skip


def of_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with method and seed: one that comes straight from a probe is that of a single model."""
    if not isinstance(table, pd.DataFrame) or "method" in table or "seed" in table:
        return table
    return table.assign(method="model", seed=0)


def legend(figure: Figure, axis: Axes, table: pd.DataFrame, value: str, band: str) -> None:
    """Label the lines where they end, and say below what the band is, and which seeds have no `value`: they failed."""
    figure.draw_without_rendering()  # the layout decides where the ends are
    _label_lines(axis)
    handles: list[Any] = []
    for method, (left, every) in seeds_left(table, value).items():
        if left < every:
            label, colour, _ = look(method)
            count = f": {every - left} of {every} seeds failed" if left else ": failed"
            handles.append(Line2D([], [], color=colour, label=label + count))
    seeds = table["seed"].nunique()
    directions = table["direction"].nunique() if "direction" in table else 1
    if seeds > 1 or directions > 1:
        count = f"{seeds} seed{'s' if seeds > 1 else ''}" + (f" × {directions} directions" if directions > 1 else "")
        handles.append(Line2D([], [], color="#888888", alpha=0.35, linewidth=7, label=f"{band}, {count}"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def contours(axis: Axes, losses: pd.DataFrame, levels: np.ndarray) -> Any:
    """Fill and draw the contours of a grid of losses; the levels are logarithms to base 10."""
    where = (losses.columns, losses.index, np.log10(losses.to_numpy()), levels)
    axis.contour(*where, colors="white", linewidths=0.4, linestyles="solid", zorder=1.5)
    return axis.contourf(*where, cmap="cividis", extend="both")


def loss_bar(bar: Any, levels: np.ndarray, name: str) -> None:
    """Write losses, not their logarithms, beside the colours of `contours`."""
    ticks = np.linspace(levels[0], levels[-1], 5)
    bar.set_ticks(list(ticks), labels=[plain(float(f"{10**tick:.2g}")) for tick in ticks])
    bar.set_label(f"{name}, nats (log scale)")


def outlined(width: float = 2.0) -> list[Any]:
    """Return the path effect that keeps white text and lines readable on bright colours."""
    return [withStroke(linewidth=width, foreground="black")]
