"""What the panel says, as HTML: its table, its lines, its pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cram_bench.compress import listing
from cram_bench.widgets.subject import Answer


def picture(figure: Any, alt: str) -> str:
    """Return the HTML of a figure, no wider than the window; `alt` is read out, and shown over the picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    png, (wide, high) = buffer.getvalue(), (round(100 * size) for size in figure.get_size_inches())
    return (
        f"<img alt='{html.escape(alt)}' title='{html.escape(alt)}' width='{wide}' height='{high}' "
        f"style='max-width:100%;height:auto' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
    )


def status(text: str, colour: str) -> str:
    """Return a line of state: its dot is coloured, its text has the theme's colour, to be read on light and dark."""
    line = html.escape(text.splitlines()[0])
    return f"<span role='status'><span class='dot' style='color:{colour}'>●</span> {line}</span>"


def blamed(tables: dict[str, pd.DataFrame], count: int) -> str:
    """Say in words which layer breaks each network, for those who do not see the picture."""
    lines = []
    for label, table in tables.items():
        worst = table.sort_values("rise").iloc[-1]
        rise = f"{worst['rise']:+.2f}".replace("-", "−")
        layer = f"<b class='layer'>{html.escape(str(worst['layer']))}</b> ({100 * worst['sparsity']:.0f} % zeros)"
        lines.append(f"{html.escape(label)}: compressed alone, {layer} costs most, {rise} nats")
    about = f"layers and the way there: untuned, on {count} of these examples"
    return on_lines([*lines, about]) if lines else ""


def zeros(found: Answer) -> str:
    """Say how much of a network is zero, and name and count what nothing was pruned in."""
    share = 100 * found.zeros / found.weights
    text = f"{share:.1f} % of {found.weights:,} prunable weights are zero"
    if not found.dense:
        return f"{text}; no matrix is left dense"
    left = sum(matrix.weights for matrix in found.dense.values())
    return f"{text}; left dense, {left:,} weights: {listing(found.dense)}"


def by_run(texts: Mapping[str, str]) -> str:
    """Return a line a text, after the runs that it is true of."""
    runs: dict[str, list[str]] = {}
    for label, text in texts.items():
        runs.setdefault(text, []).append(label)
    one = len(runs) == 1
    return on_lines([html.escape(text if one else f"{'; '.join(labels)}: {text}") for text, labels in runs.items()])


def on_lines(lines: Sequence[str]) -> str:
    return f"<div style='line-height:1.4'>{'<br>'.join(lines)}</div>"


def table(rows: Sequence[tuple[str, float, float, float, int]], where: str, count: int) -> str:
    cell = "text-align:right;padding:.1em 0 .1em clamp(.3em,1vw,1em)"  # narrow on a telephone
    names = ("accuracy, % ± standard error", "to dense, points", "loss, nats", "classes changed")
    head = "".join(f"<th style='{cell}'>{name}</th>" for name in names)
    body = ""
    for label, accuracy, change, loss, changed in rows:
        error = (accuracy * (100 - accuracy) / count) ** 0.5
        first, second = f"<b class='accuracy'>{accuracy:.1f}</b> ± {error:.1f}", f"{change:+.1f}".replace("-", "−")
        cells = "".join(f"<td style='{cell}'>{text}</td>" for text in (first, second, f"{loss:.3f}", changed))
        body += f"<tr><td>{html.escape(label)}</td>{cells}</tr>"
    caption = f"<caption style='text-align:left'>{html.escape(where)}</caption>"
    style = "line-height:1.3;font-size:.92em;border-collapse:collapse"
    return f"<table style='{style}'>{caption}<tr><th style='text-align:left'>run</th>{head}</tr>{body}</table>"
