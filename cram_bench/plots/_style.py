"""The one style of all figures: colours, markers, axes, legends. A method keeps its look in every figure."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import matplotlib as mpl
import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from cram_bench import recipes
from cram_bench.checks import unknown
from cram_bench.probes.over_runs import apart, seeds_left
from cram_bench.recipes import METHODS

# Okabe and Ito's palette, its yellow replaced, and a wine and an indigo of Paul Tol's: distinguishable with
# colour-blind vision, of different lightness.
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
    "#332288",
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
    "text.parse_math": False,  # a class may be called $x^2$
    "svg.hashsalt": "cram_bench",  # the same table gives the same SVG
}

_HOUSE: ContextVar[dict[str, Any] | None] = ContextVar("settings inside a block of style", default=None)


class _Settings(mpl.RcParams):
    """matplotlib's settings while a block of `style` is open: inside it the house's, in every other thread the user's.

    Artists read settings when they are made and when they are drawn, hundreds of them. To change them for everybody and
    back again, as ``rc_context`` does, shows in what other threads draw and ask meanwhile.
    """

    lock: ClassVar[threading.Lock] = threading.Lock()
    blocks: ClassVar[int] = 0  # that are open, in all threads

    def _house(self) -> dict[str, Any]:
        return (_HOUSE.get() or {}) if self is mpl.rcParams else {}  # a copy is a plain one

    def _get(self, key: Any) -> Any:
        house = self._house()
        return house[key] if key in house else super()._get(key)

    def _set(self, key: Any, value: Any) -> None:
        house = self._house()
        if key in house:
            house[key] = value
        else:
            super()._set(key, value)

    def _update_raw(self, other_params: Any) -> None:  # how an rc_context inside the block puts back what it found
        for key, value in dict.items(other_params):
            self._set(key, value)


@contextmanager
def style() -> Iterator[None]:
    """Use the house style for a block: `STYLE` over matplotlib's defaults, whatever a matplotlibrc says.

    It holds in this thread alone; others go on with their own settings. What the block sets itself ends with it.
    """
    settings: dict[Any, Any] = dict(dict.items(mpl.rcParamsDefault)) | dict(dict.items(mpl.RcParams(STYLE)))
    for name in ("backend", "backend_fallback", "interactive"):  # no matter of style
        settings.pop(name, None)
    with _Settings.lock:
        _Settings.blocks += 1
        mpl.rcParams.__class__ = _Settings
    token = _HOUSE.set(settings)
    try:
        yield
    finally:
        _HOUSE.reset(token)
        with _Settings.lock:
            _Settings.blocks -= 1
            if not _Settings.blocks:
                mpl.rcParams.__class__ = mpl.RcParams


class Figure(matplotlib.figure.Figure):
    """A figure that keeps the house style when it is drawn and saved, which may be long after it was made."""

    def draw(self, renderer: Any) -> None:
        """Draw in the house style."""
        with style():
            super().draw(renderer)

    def draw_without_rendering(self) -> None:
        """Lay out in the house style."""
        with style():
            super().draw_without_rendering()

    def savefig(self, *arguments: Any, **options: Any) -> None:
        """Save in the house style; `options` go before it."""
        with style():
            super().savefig(*arguments, **options)


def look(method: str) -> tuple[str, str, str]:
    """Return (label, colour, marker) of a method: fixed by its place in `METHODS`; or of a state of one network."""
    place = _place(method)
    rounds = place // len(_PALETTE)
    # A round later by one: what preconditions or prunes gradually is compared with SGD, AdamW and CrAM.
    colour = _PALETTE[(place + rounds) % len(_PALETTE)]
    return recipes.label(method), colour, _MARKERS[(place + 3 * rounds) % len(_MARKERS)]


def dashes(method: str, number: int = 0) -> str:
    """Return the line style of a method's run of that number: where colours begin again, markers and lines do not."""
    return ("-", "--", ":", "-.")[(_place(method) // len(_PALETTE) + number) % 4]


def _place(method: str) -> int:
    names = list(METHODS)
    if (plain := method.partition(", ")[0]) in names:  # "gmp*, distilled" looks as GMP* does
        return names.index(plain)
    return _STATES[method] if method in _STATES else len(names) + sum(map(ord, method)) % 97


def looks(
    tables: Mapping[str, pd.DataFrame], methods: Mapping[str, str] | None
) -> Iterator[tuple[str, str, str, str, pd.DataFrame]]:
    """Yield (label, colour, marker, line style, table): a method's second run is dashed, its third dotted."""
    seen: dict[str, int] = {}
    for label, table in tables.items():
        method = methods[label] if methods else label
        name, colour, marker = look(method)
        number = seen[method] = seen.get(method, -1) + 1
        yield visible(label if methods else name), colour, marker, dashes(method, number), table


def visible(label: str) -> str:
    """Return a label that matplotlib shows: it takes a leading underscore for a wish to hide."""
    return f"\u200b{label}" if label.startswith("_") else label


def in_order(table: pd.DataFrame) -> list[str]:
    """Return the methods of a table in the order of `METHODS`, unknown ones last."""
    present = list(dict.fromkeys(table["method"]))
    known = [method for method in METHODS if method in present]
    return known + [method for method in present if method not in known]


def at_even_steps(table: pd.DataFrame, pattern: str | None = None) -> tuple[pd.DataFrame, list[str], str, list[str]]:
    """Give every sparsity of a pattern a place at equal steps, then each pattern that is apart one of its own.

    The interesting sparsities crowd near 1 on a linear axis.

    Args:
        table: columns sparsity and, perhaps, pattern.
        pattern: the one on the curve; by default ``global`` where there is one pruned so, else the first.

    Returns:
        The table with columns step (NaN for rows that failed) and apart; the labels of the steps; the pattern on the
        curve; and what is not drawn, in words.
    """
    patterns = table["pattern"] if "pattern" in table else pd.Series("global", index=table.index)
    measured = table["sparsity"].notna() & patterns.notna()
    own = measured & apart(table.assign(pattern=patterns))
    pruned = patterns[measured & ~own & (table["sparsity"] > 0)].unique()
    known = list(patterns[measured].unique())
    if pattern is not None and known and pattern not in known:
        raise ValueError(unknown("pattern", pattern, known))
    drawn = pattern or ("global" if "global" in pruned or not len(pruned) else str(pruned[0]))
    curve = measured & ~own & ((patterns == drawn) | (table["sparsity"] == 0))
    levels = sorted(table.loc[curve, "sparsity"].unique())
    places = {level: place for place, level in enumerate(levels)}
    alone = {name: place for place, name in enumerate(patterns[own].unique(), len(levels))}
    step = table["sparsity"].where(curve).map(places).astype(float)
    step = step.where(~own, patterns.where(own).map(alone).astype(float))
    left = patterns[measured & ~own & ~curve].value_counts(sort=False)
    notes = [f"not drawn: {name} ({count} row{'s' if count > 1 else ''})" for name, count in left.items()]
    labels = ["dense" if level == 0 else f"{100 * level:g}" for level in levels] + [str(name) for name in alone]
    return table.assign(step=step, apart=own), labels, drawn, notes


def step_axis(axis: Axes, table: pd.DataFrame, labels: list[str]) -> None:
    """Write the labels of `at_even_steps`, and part the patterns of their own from the curve."""
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.3, len(labels) - 0.7)
    if (alone := table.loc[table["apart"], "step"]).notna().any() and alone.min() > 0:
        axis.axvline(alone.min() - 0.5, color="#bbbbbb", linewidth=0.8)


def per_cent(axis: Any) -> None:
    """Write fractions at an axis's ticks as per cent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(float(f"{100 * value:.6g}"))))


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
    """Write a number as people do.

    >>> plain(-0.25), plain(1e-7), plain(2.5e-9)
    ('−0.25', '10⁻⁷', '2.5·10⁻⁹')
    """
    text = f"{value:g}"
    if "e" in text:
        factor, power = text.split("e")
        raised = _power(int(power))
        text = raised if factor == "1" else f"-{raised}" if factor == "-1" else f"{factor}·{raised}"
    return text.replace("-", "−")


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def signed(value: float, digits: int = 1) -> str:
    """Write a difference with its sign; what rounds to nothing has none.

    >>> signed(0.26), signed(-1.55), signed(-0.04)
    ('+0.3', '−1.6', '0.0')
    """
    value = round(value, digits)
    return (f"{value:+.{digits}f}" if value else f"{0:.{digits}f}").replace("-", "−")


def mean_lines(axis: Axes, table: pd.DataFrame, x: str, y: str, band: str = "range") -> None:
    """Draw a line per method: the mean, and a band of ± one standard deviation (std) or from lowest to highest (range).

    Rows that are ``apart`` (`at_even_steps`) are points with a bar, side by side.
    """
    methods = in_order(table)
    for number, method in enumerate(methods):
        part = table[table["method"] == method].dropna(subset=[x, y])
        apart = part["apart"].astype(bool) if "apart" in part else pd.Series(False, index=part.index)
        label, colour, marker = look(method)
        how: dict[str, Any] = {"color": colour, "marker": marker, "markeredgecolor": "white", "markeredgewidth": 0.6}
        mean, low, high, several = _over_seeds(part[~apart], x, y, band)
        if len(mean) or not apart.any():
            marked = max(1, len(mean) // 12)  # more markers than that hide the line, and each other
            axis.plot(
                mean.index, mean.to_numpy(), linestyle=dashes(method), label=visible(label), markevery=marked, **how
            )
        if several:
            axis.fill_between(mean.index, low.to_numpy(), high.to_numpy(), color=colour, alpha=0.22, linewidth=0)
        if apart.any():
            named = "_apart" if len(mean) else visible(label)
            mean, low, high, several = _over_seeds(part[apart], x, y, band)
            places = mean.index + 0.5 * ((number + 0.5) / len(methods) - 0.5)
            if several:
                axis.vlines(places, low, high, color=colour, linewidth=1.2, alpha=0.6)
            axis.plot(places, mean.to_numpy(), linestyle="", label=named, **how)


def _over_seeds(table: pd.DataFrame, x: str, y: str, band: str) -> tuple[pd.Series, pd.Series, pd.Series, bool]:
    """Return mean, low and high end of the band over rows of the same x, and whether there is a band at all."""
    grouped = table.groupby(x)[y]
    mean, deviation = grouped.mean(), grouped.std(ddof=1)
    low, high = (mean - deviation, mean + deviation) if band == "std" else (grouped.min(), grouped.max())
    return mean, low, high, bool((grouped.count() > 1).any())


def strip(axis: Axes, table: pd.DataFrame, value: str) -> None:
    """Draw a point a seed and a bar at their mean, a place a method. Rows that repeat a seed's value count once."""
    methods = in_order(table)
    for place, method in enumerate(methods):
        values = table[table["method"] == method].dropna(subset=[value]).drop_duplicates(["seed", value])[value]
        _, colour, marker = look(method)
        axis.plot([place] * len(values), values, linestyle="", color=colour, marker=marker, alpha=0.75,
                  markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
        if len(values) > 1:
            axis.hlines(values.mean(), place - 0.35, place + 0.35, color=colour)
    axis.set_xticks(range(len(methods)), [look(method)[0] for method in methods], rotation=90, fontsize=8)
    axis.set_xlim(-0.6, len(methods) - 0.4)
    axis.grid(False, axis="x")
    axis.set_xlabel("method")


def losses(axis: Axes, table: pd.DataFrame) -> None:
    """Draw the loss itself, which stands beside every number of flatness: a network that fits nothing is flat."""
    strip(axis, table, "loss")
    if (highest := table["loss"].max()) > 0:
        axis.set_ylim(0, 1.07 * highest)  # the margin of what is drawn is not that of an axis from zero
    axis.set_ylabel("L(θ), nats")
    axis.set_title("Loss")


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
            str(line.get_label()), xy=(float(point[0]), float(point[1])), xytext=(1.03, place),
            textcoords="axes fraction", color=line.get_color(), va="center", fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "shrinkB": 3, "shrinkA": 0},
        )  # fmt: skip


def of_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with method and seed: one that comes straight from a probe is that of a single model."""
    if not isinstance(table, pd.DataFrame) or "method" in table or "seed" in table:
        return table
    return table.assign(method="model", seed=0)


def legend(figure: Figure, axis: Axes, table: pd.DataFrame, value: str, band: str, notes: Sequence[str] = ()) -> None:
    """Label the lines where they end, and say below what the band is, and which seeds have no `value` to draw."""
    figure.draw_without_rendering()  # the layout decides where the ends are
    _label_lines(axis)
    handles: list[Any] = []
    for method, (left, every) in seeds_left(table, value).items():
        label, colour, _ = look(method)
        if left < every:
            count = f": {every - left} of {every} seeds failed" if left else ": failed"
            handles.append(Line2D([], [], color=colour, label=visible(label + count)))
        own = table[table["method"] == method]
        if lost := int(own.loc[own["seed"].isin(own.dropna(subset=[value])["seed"]), value].isna().sum()):
            missing = f": {lost} value{'s' if lost > 1 else ''} missing"
            handles.append(Line2D([], [], color=colour, label=visible(label + missing)))
    measured = table.dropna(subset=[value])
    seeds = sorted(measured.groupby("method")["seed"].nunique())
    directions = measured["direction"].nunique() if "direction" in measured else 1
    if len(measured) and (seeds[-1] > 1 or directions > 1):
        count = f"{seeds[0]} to {seeds[-1]} seeds" if seeds[0] < seeds[-1] else _counted(seeds[-1], "seed")
        count += f" × {directions} directions" if directions > 1 else ""
        handles.append(Line2D([], [], color="#888888", alpha=0.35, linewidth=7, label=f"{band}, {count}"))
    below(figure, handles, notes)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def below(figure: Figure, handles: list[Any], notes: Sequence[str] = ()) -> None:
    """Write a legend under the axes, in as many columns as the figure is wide enough for."""
    handles = [*handles, *(Line2D([], [], linestyle="", label=visible(note)) for note in notes)]
    if handles:
        widest = max(len(str(handle.get_label())) for handle in handles)
        columns = int(figure.get_figwidth() / (0.075 * widest + 0.6))  # inches: letters of this size, and the sample
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(len(handles), columns)))


def one_each(table: pd.DataFrame, index: str, columns: str, values: str) -> pd.DataFrame:
    """Lay out a table as a grid in the order of its rows. A mean over equal places would be drawn in silence.

    Raises:
        ValueError: two rows have the same place.
    """
    if table.duplicated([index, columns]).any():
        several = [name for name in ("method", "seed", "direction") if name in table and table[name].nunique() > 1]
        several_of = f": it holds several {several[0]}s, and one can be drawn" if several else ""
        raise ValueError(f"the table must have one {values} for each {index} and {columns}{several_of}")
    rows, places = table[index].drop_duplicates(), table[columns].drop_duplicates()
    return table.set_index([index, columns])[values].unstack().reindex(index=rows, columns=places)  # noqa: PD010


def contours(axis: Axes, losses: pd.DataFrame, levels: np.ndarray) -> Any:
    """Fill and draw the contours of a grid of losses; the levels are logarithms to base 10."""
    heights = np.log10(losses.clip(lower=1e-12).to_numpy(dtype=float))
    where = (losses.columns, losses.index, np.ma.masked_invalid(heights), levels)
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
