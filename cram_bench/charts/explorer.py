"""What the explorer shows and one can touch: accuracy against sparsity, the layers, and one layer.

Each chart is a specification with named, empty data, and a function makes the rows of these from tidy tables, so that a
chart on the page stays while its rows change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from cram_bench.charts.look import TEXT, configured, encodings_of
from cram_bench.checks import columns

if TYPE_CHECKING:
    import altair as alt

Rows = dict[str, list[dict[str, Any]]]
"""Name of the data of a chart → its rows."""

_ROW = 17  # pixels a layer
_TICKS = [sign * value for value in (0.03, 0.1, 0.3, 1, 3, 10) for sign in (-1, 1)] + [0]


def curve_rows(curves: Mapping[str, pd.DataFrame], sparsity: float, chance: float) -> Rows:
    """Return the rows of `curve`.

    Args:
        curves: label of a run → columns sparsity, accuracy (fractions), count (of examples).
        sparsity: where the slider stands.
        chance: accuracy of guessing, a fraction.
    """
    rows: list[dict[str, Any]] = []
    for run, table in curves.items():
        columns(table, "sparsity", "accuracy", "count", empty=True)
        for row in table.sort_values("sparsity").to_dict("records"):
            share, count = row["accuracy"], int(row["count"])
            error = 100 * (share * (1 - share) / count) ** 0.5
            rows.append({
                "run": run, "sparsity": 100 * row["sparsity"], "mean": 100 * share,
                "low": max(0.0, 100 * share - error), "high": min(100.0, 100 * share + error),
                "told": f"{100 * share:.1f} ± {error:.1f}", "n": count,
                "here": abs(row["sparsity"] - sparsity) < 1e-9,
            })  # fmt: skip
    return {"curve": rows, "here": [{"sparsity": 100 * sparsity}], "chance": [{"chance": 100 * chance}]}


def curve(methods: Mapping[str, str]) -> alt.LayerChart:
    """Draw accuracy against sparsity, a line a run and a rule where the slider stands.

    The band is ± one standard error of the accuracy on the examples that were looked at. Pointing at a point tells its
    numbers, clicking at a run in the legend leaves it alone.

    Args:
        methods: label of a run → method, which decides the look.
    """
    import altair as alt

    how = encodings_of(methods, "run")
    picked = alt.selection_point("run", fields=["run"], bind="legend")
    faint = alt.when(picked)
    x = alt.X(
        "sparsity:Q",
        title="sparsity, % of prunable weights that are zero",
        scale=alt.Scale(domain=[0, 100], nice=False),
        axis=alt.Axis(values=list(range(0, 101, 10)), labelOverlap=True),
    )
    y = alt.Y("mean:Q", title="accuracy, %", scale=alt.Scale(domain=[0, 100]))
    base = alt.Chart(alt.NamedData("curve"))
    band = base.mark_area().encode(
        x=x, y=alt.Y("low:Q"), y2="high:Q", color=how["color"],
        opacity=faint.then(alt.value(0.18)).otherwise(alt.value(0.03)),
    )  # fmt: skip
    line = base.mark_line(strokeWidth=1.8).encode(
        x=x, y=y, color=how["color"], strokeDash=how["dash"],
        opacity=faint.then(alt.value(1.0)).otherwise(alt.value(0.12)),
    )  # fmt: skip
    dots = base.mark_point(filled=True).encode(
        x=x, y=y, color=how["color"], shape=how["shape"],
        size=alt.when("datum.here").then(alt.value(130)).otherwise(alt.value(40)),
        opacity=faint.then(alt.value(1.0)).otherwise(alt.value(0.12)),
        tooltip=[
            alt.Tooltip("run:N"), alt.Tooltip("sparsity:Q", title="sparsity, %", format=".1f"),
            alt.Tooltip("told:N", title="accuracy, %"), alt.Tooltip("n:Q", title="n, examples"),
        ],
    ).add_params(picked)  # fmt: skip
    rule = alt.Chart(alt.NamedData("here")).mark_rule(color="gray", strokeWidth=1).encode(x=x)
    guess = alt.Chart(alt.NamedData("chance"))
    floor = guess.mark_rule(color="gray", strokeDash=[2, 3]).encode(y="chance:Q")
    word = guess.mark_text(align="left", baseline="bottom", dx=4, dy=-2, text="guessing").encode(
        x=alt.value(0), y="chance:Q"
    )
    chart = alt.layer(rule, floor, word, band, line, dots).properties(
        height=250, title="Accuracy against sparsity", usermeta={"axes": 62, "parts": [1]}
    )
    return configured(chart)


def layer_rows(tables: Mapping[str, pd.DataFrame], count: int) -> Rows:
    """Return the rows of `layers`.

    Args:
        tables: label of a run → columns layer, weights, zeros, sparsity, and where it is known rise (nats) and error
            (its standard error); all of the same layers.
        count: examples that the rise was measured on.

    Raises:
        ValueError: the tables are of different layers.
    """
    rows: list[dict[str, Any]] = []
    layers: list[str] = []
    for run, table in tables.items():
        columns(table, "layer", "weights", "zeros", "sparsity")
        layers = layers or list(table["layer"])
        if list(table["layer"]) != layers:
            raise ValueError(f"the tables must be of the same layers, and that of {run!r} is of others")
        for row in table.to_dict("records"):
            rise = float(row.get("rise", float("nan")))
            known = pd.notna(rise)
            told = {"told": "being measured", "low": None, "high": None}
            rows.append({
                "run": run, "layer": row["layer"], "weights": int(row["weights"]), "zeros": int(row["zeros"]),
                "share": 100 * row["sparsity"], "rise": rise if known else None, "n": count if known else None,
                **(_with_error(rise, row.get("error", float("nan"))) if known else told),
            })  # fmt: skip
    return {"layers": rows, "names": [{"layer": layer} for layer in layers], "zero": [{"rise": 0}]}


def _with_error(rise: float, error: float) -> dict[str, Any]:
    """Return how a rise is told, and the ends of its bar, none where its error is NaN."""
    known = pd.notna(error)
    told = f"{rise:+.3g}{f' ± {error:.2g}' if known else ''}".replace("-", "−")
    return {"told": told, "low": rise - error if known else None, "high": rise + error if known else None}


def layers(methods: Mapping[str, str], names: list[str]) -> alt.HConcatChart:
    """Draw the zeros of every layer, and what the compression of each alone costs; a mark a run, a row a layer.

    Layers are categories: nothing joins them. Pointing tells a layer's numbers; a click at its row picks it, which
    the parameter ``picked`` shows.

    Args:
        methods: label of a run → method, which decides the look.
        names: the layers, in their order.
    """
    import altair as alt

    how = encodings_of(methods, "run")
    picked = alt.param("picked", value="")
    data = alt.Chart(alt.NamedData("layers"))
    strip = alt.Chart(alt.NamedData("names")).mark_rect(color="gray", cursor="pointer").encode(
        opacity=alt.when("datum.layer == picked").then(alt.value(0.25)).otherwise(alt.value(0.0)),
        tooltip=alt.Tooltip("layer:N", title="click to look into"),
    )  # fmt: skip
    tooltip = [
        alt.Tooltip("run:N"), alt.Tooltip("layer:N"), alt.Tooltip("weights:Q", format=","),
        alt.Tooltip("zeros:Q", format=","), alt.Tooltip("share:Q", title="zeros, %", format=".1f"),
        alt.Tooltip("told:N", title="rise alone, nats"), alt.Tooltip("n:Q", title="n, examples"),
    ]  # fmt: skip
    mark: dict[str, Any] = {"filled": True, "size": 70, "opacity": 0.85, "cursor": "pointer"}

    def rows(shown: bool) -> alt.Y:
        axis = alt.Axis(labelExpr="replace(datum.label, '.weight', '')", labelFontSize=10.5, grid=True, labelLimit=150)
        hidden = alt.Axis(labels=False, ticks=False, grid=True)
        return alt.Y("layer:N", sort=names, title=None, axis=axis if shown else hidden, scale=alt.Scale(domain=names))

    share = alt.X(
        "share:Q", title="zeros in the layer, %", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=4)
    )
    zeros = data.mark_point(**mark).encode(
        x=share, y=rows(True), color=how["color"], shape=how["shape"], tooltip=tooltip
    )
    cost = alt.X(
        "rise:Q", title=["rise of the loss, nats", "(log beyond 0.01)"],
        scale=alt.Scale(type="symlog", constant=0.01, nice=False, padding=6),
        axis=alt.Axis(values=_TICKS, labelOverlap=True, format="~g"),
    )  # fmt: skip
    known = data.transform_filter("isValid(datum.rise)")
    rise = known.mark_point(**mark).encode(
        x=cost, y=rows(False), color=how["color"], shape=how["shape"], tooltip=tooltip
    )
    bars = data.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5, opacity=0.6).encode(
        x=alt.X("low:Q"), x2="high:Q", y=rows(False), color=how["color"]
    )  # fmt: skip
    nothing = alt.Chart(alt.NamedData("zero")).mark_rule(color="gray", strokeDash=[2, 3]).encode(x="rise:Q")
    height = alt.Step(_ROW)
    left = alt.layer(strip.encode(y=rows(True)), zeros).properties(height=height, title="Zeros")
    right = alt.layer(strip.encode(y=rows(False)), nothing, bars, rise).properties(height=height, title="Cost alone")
    chart = alt.hconcat(left, right, spacing=14, usermeta={"pick": "layer", "axes": 165, "parts": [0.45, 0.55]})
    return configured(chart.add_params(picked))


def layer_detail_rows(rises: Mapping[str, pd.DataFrame], spreads: Mapping[str, pd.DataFrame], count: int) -> Rows:
    """Return the rows of `layer_detail`.

    Args:
        rises: label of a run → columns sparsity (fraction), rise and error (nats).
        spreads: label of a run → columns state (``dense``, ``compressed``), low, high, share (fraction).
        count: examples that the rise was measured on.
    """
    alone = [
        {"run": run, "sparsity": 100 * row["sparsity"], "rise": float(row["rise"]), "n": count,
         **_with_error(row["rise"], row["error"])}
        for run, table in rises.items() for row in table.to_dict("records")
    ]  # fmt: skip
    spread = [
        {"run": run, "state": row["state"], "middle": (row["low"] + row["high"]) / 2, "share": 100 * row["share"]}
        for run, table in spreads.items() for row in table.to_dict("records")
    ]  # fmt: skip
    return {"alone": alone, "spread": spread}


def layer_detail(methods: Mapping[str, str], layer: str) -> alt.HConcatChart:
    """Draw what pruning one layer alone costs at every sparsity, and how its weights are spread before and after.

    Args:
        methods: label of a run → method, which decides the look.
        layer: its name, for the titles.
    """
    import altair as alt

    how = encodings_of(methods, "run")
    data = alt.Chart(alt.NamedData("alone"))
    x = alt.X("sparsity:Q", title="sparsity of this layer alone, %", scale=alt.Scale(domain=[0, 100]))
    y = alt.Y(
        "rise:Q", title="rise of the loss, nats", scale=alt.Scale(type="symlog", constant=0.01, nice=False, padding=6),
        axis=alt.Axis(values=_TICKS, labelOverlap=True, format="~g"),
    )  # fmt: skip
    line = data.mark_line(strokeWidth=1.8).encode(x=x, y=y, color=how["color"], strokeDash=how["dash"])
    bars = data.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.2, opacity=0.6).encode(
        x=x, y=alt.Y("low:Q"), y2="high:Q", color=how["color"]
    )  # fmt: skip
    dots = data.mark_point(filled=True, size=60, opacity=1).encode(
        x=x, y=y, color=how["color"], shape=how["shape"],
        tooltip=[
            alt.Tooltip("run:N"), alt.Tooltip("sparsity:Q", title="sparsity, %"),
            alt.Tooltip("told:N", title="rise, nats"), alt.Tooltip("n:Q", title="n, examples"),
        ],
    )  # fmt: skip
    spread = alt.Chart(alt.NamedData("spread"))
    value = alt.X(
        "middle:Q", title="value of the weight", scale=alt.Scale(nice=False, padding=4), axis=alt.Axis(tickCount=5)
    )
    share = alt.Y("share:Q", title="share of the layer, %", stack=None)
    tooltip = [
        alt.Tooltip("run:N"), alt.Tooltip("state:N"), alt.Tooltip("middle:Q", title="value", format=".3g"),
        alt.Tooltip("share:Q", title="share, %", format=".2g"),
    ]  # fmt: skip
    dense = spread.transform_filter("datum.state == 'dense'").mark_line(
        interpolate="step", strokeWidth=1.2, color=TEXT
    ).encode(x=value, y=share, color=how["color"], tooltip=tooltip)  # fmt: skip
    kept = spread.transform_filter("datum.state == 'compressed'").mark_area(interpolate="step", opacity=0.35).encode(
        x=value, y=share, color=how["color"], tooltip=tooltip
    )  # fmt: skip
    left = alt.layer(line, bars, dots).properties(height=170, title=[layer, "pruned alone, by magnitude"])
    right = alt.layer(kept, dense).properties(height=170, title=["its weights", "dense (line), what stays (filled)"])
    chart = alt.hconcat(left, right, spacing=24, usermeta={"axes": 130, "parts": [0.5, 0.5], "wrap": True})
    return configured(chart)
