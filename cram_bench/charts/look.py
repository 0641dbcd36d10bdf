"""The one look of all charts: that of the figures, on any background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cram_bench.plots._style import dashes, look

_CROSS = "M-.7,-1L0,-.3L.7,-1L1,-.7L.3,0L1,.7L.7,1L0,.3L-.7,1L-1,.7L-.3,0L-1,-.7Z"
_SHAPES = {
    "o": "circle", "s": "square", "v": "triangle-down", "^": "triangle-up", "D": "diamond", "P": "cross",
    "X": _CROSS, "*": "wedge", "<": "triangle-left", "p": "triangle-right",
}  # fmt: skip
_DASHES = {"-": [1, 0], "--": [7, 3], ":": [2, 3], "-.": [9, 3, 2, 3]}
TEXT = "currentColor"
"""Letters and axes are of the colour of the page's text, so that a dark page shows them."""


def encodings(named: Mapping[str, str], field: str = "method") -> dict[str, Any]:
    """Return the channels by which methods are told apart: colour, mark and line style, as in the figures.

    Args:
        named: method → its label, in the order of the legend.
        field: the column of the labels.
    """
    return encodings_of({label: method for method, label in named.items()}, field)


def encodings_of(methods: Mapping[str, str], field: str) -> dict[str, Any]:
    """Return the same for several runs: label → method; a method's second run has another line style.

    Args:
        methods: label → its method, in the order of the legend.
        field: the column of the labels.
    """
    import altair as alt

    labels, looks = list(methods), [look(method) for method in methods.values()]
    earlier = [list(methods.values())[:place].count(method) for place, method in enumerate(methods.values())]
    lines = [dashes(method, number) for method, number in zip(methods.values(), earlier, strict=True)]

    def scale(values: Sequence[Any]) -> alt.Scale:
        return alt.Scale(domain=labels, range=list(values))

    return {
        "color": alt.Color(
            f"{field}:N", scale=scale([TEXT if colour == "#000000" else colour for _, colour, _ in looks]), title=None
        ),
        "shape": alt.Shape(f"{field}:N", scale=scale([_SHAPES[marker] for *_, marker in looks]), title=None),
        "dash": alt.StrokeDash(f"{field}:N", scale=scale([_DASHES[line] for line in lines]), title=None),
    }


def configured(chart: Any) -> Any:
    """Return a chart in the house's look."""
    return (
        chart.configure(background="transparent", font="system-ui, sans-serif")
        .configure_axis(
            labelColor=TEXT,
            titleColor=TEXT,
            domainColor=TEXT,
            tickColor=TEXT,
            gridColor="#88888844",
            titleFontWeight="normal",
            labelFontSize=12,
            titleFontSize=12,
            labelLimit=220,
        )
        .configure_legend(
            symbolOpacity=1, labelColor=TEXT, titleColor=TEXT, orient="top", columns=4, labelLimit=240, labelFontSize=12
        )
        .configure_title(color=TEXT, anchor="start")
        .configure_text(color=TEXT, fontSize=12)
        .configure_view(stroke=None)
    )
