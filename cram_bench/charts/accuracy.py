"""Accuracy after pruning, at a sparsity that one chooses."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from cram_bench.charts.look import configured, encodings
from cram_bench.checks import columns, needs
from cram_bench.plots._style import at_even_steps, in_order, look, of_runs
from cram_bench.probes.over_runs import apart, mean_and_std, partly, seeds_left

if TYPE_CHECKING:
    import altair as alt


def points(table: pd.DataFrame) -> pd.DataFrame:
    """Reduce curves to what is drawn: a row per pattern, method, tuning and step.

    The dense model is untuned, in both. A method of which every seed failed has rows without a mean.

    Args:
        table: columns method, seed, pattern, sparsity, calibrated, accuracy.

    Returns:
        Columns pattern (whose curve it is; n:m patterns belong to each), method (its label), place (0, 1 …), last (the
        highest place of the pattern), level (``dense``, ``90 %``, ``2:4``), apart, tuned, and in per cent mean, std,
        low, high (NaN where there is none), seeds, told (``84.3 ± 0.2``, or ``failed``).
    """
    table = of_runs(table)
    columns(table, "method", "seed", "pattern", "sparsity", "calibrated", "accuracy")
    known = table.dropna(subset=["accuracy", "sparsity"])
    curves = known[~apart(known) & (known["sparsity"] > 0)]
    patterns = list(dict.fromkeys(curves["pattern"])) or [None]
    rows = [row for pattern in patterns for row in _rows(table, pattern)]
    names = [
        "pattern",
        "method",
        "place",
        "last",
        "level",
        "apart",
        "tuned",
        "mean",
        "std",
        "low",
        "high",
        "seeds",
        "told",
    ]
    return pd.DataFrame(rows, columns=names).astype({"apart": bool})


def _rows(table: pd.DataFrame, pattern: str | None) -> Iterator[dict[str, Any]]:
    shown, labels, drawn, _ = at_even_steps(table, pattern)
    levels = [f"{label} %" if label.replace(".", "").isdigit() else label for label in labels]
    left, named = seeds_left(table, "accuracy"), _named(table)
    known = shown.dropna(subset=["accuracy", "step"])
    compressed = known["apart"] | (known["sparsity"] > 0)
    flags = sorted({bool(flag) for flag in known.loc[compressed, "calibrated"]}) or [False]
    for row in mean_and_std(known, "accuracy", ["method", "step", "calibrated", "apart", "sparsity"]).to_dict(
        "records"
    ):
        dense, place = row["sparsity"] == 0 and not row["apart"], int(row["step"])
        if dense and row["calibrated"]:
            continue  # the dense model is untuned here, as in the table below
        mean, std, several = 100 * row["mean"], 100 * row["std"], row["seeds"] > 1
        for flag in flags if dense else [bool(row["calibrated"])]:
            yield {
                "pattern": drawn, "method": named[row["method"]], "place": place, "last": len(levels) - 1,
                "level": levels[place], "apart": bool(row["apart"]), "tuned": flag,
                "mean": mean, "std": std if several else None,
                "low": max(0.0, mean - std) if several else None, "high": min(100.0, mean + std) if several else None,
                "seeds": int(row["seeds"]), "told": f"{mean:.1f} ± {std:.1f}" if several else f"{mean:.1f}",
            }  # fmt: skip
    for method in (method for method, (some, _) in left.items() if not some):
        for (place, level), flag in itertools.product(enumerate(levels), flags):
            yield {
                "pattern": drawn, "method": named[method], "place": place, "last": len(levels) - 1, "level": level,
                "apart": False, "tuned": flag, "seeds": 0, "told": "failed",
            }  # fmt: skip


def _union(orders: Iterable[Sequence[str]]) -> list[str]:
    """Return all levels in an order: dense, per cents, then the names of patterns.

    >>> _union([["dense", "50 %", "2:4"], ["dense", "50 %", "9.5 %", "int8"]])
    ['dense', '9.5 %', '50 %', '2:4', 'int8']
    """
    known = list(dict.fromkeys(itertools.chain.from_iterable(orders)))
    shares = [level for level in known if level.endswith(" %")]
    first = [level for level in known if level == "dense"]
    return [
        *first,
        *sorted(shares, key=lambda level: float(level[:-2])),
        *(x for x in known if x not in {*first, *shares}),
    ]


def _named(table: pd.DataFrame) -> dict[str, str]:
    left = seeds_left(table, "accuracy")
    return {method: look(method)[0] + partly(*left[method]) for method in in_order(table)}


def widest(drawn: pd.DataFrame) -> int:
    """Return the place where methods differ most on the first pattern's curve, tuned if they were; 0 if nowhere.

    Args:
        drawn: of `points`.
    """
    rows = drawn[~drawn["apart"]].dropna(subset=["mean"])
    rows = rows[(rows["pattern"] == rows["pattern"].iloc[0]) & (rows["tuned"] == rows["tuned"].max())]
    by = rows.astype({"mean": float}).groupby("place")["mean"]
    return int((by.max() - by.min()).idxmax())


def accuracy_vs_sparsity(table: pd.DataFrame) -> alt.VConcatChart:
    """Draw accuracy against sparsity, with a slider over the measured sparsities, and what every method has there.

    It starts where methods differ most. Nothing is interpolated: the lines join means over seeds; the band and the bars
    are ± one standard deviation. Patterns n:m are points after the curve. Pointing at a point tells its numbers;
    clicking at a method in the legend leaves it alone; the wheel zooms the axis of accuracy.

    Args:
        table: columns method, seed, pattern, sparsity, calibrated, accuracy; without method and seed, it is that of one
            model.

    Raises:
        ValueError: no accuracy was measured.
    """
    needs("charts", "report", "altair")
    import altair as alt

    table = of_runs(table)
    drawn = points(table)
    if not drawn["mean"].notna().any():
        raise ValueError("the table must have an accuracy, and every run of it failed")
    levels = {
        str(pattern): rows.drop_duplicates("place").sort_values("place")["level"].tolist()
        for pattern, rows in drawn.groupby("pattern", sort=False)
    }
    order = _union(levels.values())
    named = _named(table)
    labels, how = list(named.values()), encodings(named)

    last = int(drawn["last"].max())
    at = alt.param("at", value=widest(drawn), bind=alt.binding_range(min=0, max=last, step=1, name="sparsity"))
    which = alt.param(
        "pattern", value=next(iter(levels)), bind=alt.binding_select(options=list(levels), name="pattern")
    )
    tuned = alt.param("tuned", value=True, bind=alt.binding_checkbox(name="BatchNorm tuned after pruning"))
    picked = alt.selection_point("method", fields=["method"], bind="legend")
    zoom = alt.selection_interval("zoom", encodings=["y"], bind="scales")
    several, both = len(levels) > 1, drawn["tuned"].nunique() > 1
    bound = [at, *([which] if several else []), *([tuned] if both else [])]

    base = alt.Chart(drawn)
    if several:
        base = base.transform_filter("datum.pattern == pattern")
    if both:
        base = base.transform_filter("datum.tuned == tuned")
    x = alt.X(
        "level:O",
        sort=order,
        title="sparsity, % of prunable weights that are zero",
        axis=alt.Axis(labelAngle=0, labelExpr="replace(datum.label, ' %', '')"),
    )
    y = alt.Y("mean:Q", title="test accuracy, %", scale=alt.Scale(zero=False, nice=True))
    faint = alt.when(picked)
    tooltip = [
        alt.Tooltip("method:N"), alt.Tooltip("level:N", title="sparsity"),
        alt.Tooltip("told:N", title="accuracy, %"), alt.Tooltip("seeds:Q", title="n"),
    ]  # fmt: skip
    curve = base.transform_filter("!datum.apart && isValid(datum.mean)")
    band = curve.mark_area(opacity=0.2).encode(
        x=x,
        y=alt.Y("low:Q"),
        y2="high:Q",
        color=how["color"],
        opacity=faint.then(alt.value(0.2)).otherwise(alt.value(0.03)),
    )
    line = curve.mark_line(strokeWidth=2).encode(
        x=x, y=y, color=how["color"], strokeDash=how["dash"],
        opacity=faint.then(alt.value(1.0)).otherwise(alt.value(0.12)),
    )  # fmt: skip
    bars = base.transform_filter("datum.apart && isValid(datum.low)").mark_rule(strokeWidth=1.5).encode(
        x=x, y="low:Q", y2="high:Q", color=how["color"],
    )  # fmt: skip
    dots = base.transform_filter("isValid(datum.mean)").mark_point(filled=True, opacity=1).encode(
        x=x, y=y, color=how["color"], shape=how["shape"], tooltip=tooltip,
        size=alt.when("datum.place == min(at, datum.last)").then(alt.value(110)).otherwise(alt.value(45)),
        opacity=faint.then(alt.value(1.0)).otherwise(alt.value(0.12)),
    ).add_params(picked, zoom)  # fmt: skip
    here = base.transform_filter("datum.place == min(at, datum.last)")
    rule = here.mark_rule(color="gray", strokeWidth=1).encode(x=x)
    top = alt.layer(rule, band, line, bars, dots).properties(height=260, width=620)

    row = alt.Y("method:N", sort=labels, title=None, axis=alt.Axis(labelLimit=220))
    share = alt.X(
        "mean:Q", title="test accuracy there, %", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5)
    )
    bar = here.mark_bar(height=14).encode(x=share, y=row, color=how["color"], tooltip=tooltip)
    spread = (
        here.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=2, color="gray")
        .encode(x="low:Q", x2="high:Q", y=row)
    )
    told = (
        here.transform_calculate(end="isValid(datum.high) ? datum.high : isValid(datum.mean) ? datum.mean : 0")
        .mark_text(align="left", dx=5)
        .encode(x="end:Q", y=row, text="told:N")
    )
    where = (
        here.transform_aggregate(level="min(level)")
        .mark_text(align="left", fontWeight="bold", fontSize=13)
        .encode(x=alt.value(0), y=alt.value(-10), text="level:N")
    )
    bottom = alt.layer(bar, spread, told, where).properties(width=620, height=alt.Step(22))
    chart = alt.vconcat(top, bottom, usermeta={"levels": levels}).add_params(*bound)
    return configured(chart)
