"""What the panel says, as HTML: its table, its lines, its pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cram_bench.compress import listing
from cram_bench.widgets.subject import Answer, standard_error

HINT = "hold Ctrl or Shift to choose several"
COSTLIEST = "the costliest"
DIFFER = "no picture of the layers: the networks differ in theirs"
MEANING = {
    "sparsity": "the share of the prunable weights that are zero",
    "pattern": "which weights go: by magnitude in the whole network (global) or in every layer (uniform), n of every m "
    "inputs, or by a pruner that looks at gradients or inputs of training examples and corrects what stays",
    "weights": "32-bit numbers, or rounded to 8 or 4 bits, a scale a channel",
    "tuning": "measure BatchNorm's mean and variance anew on training examples: no weight changes",
    "layer": "the layer that is looked into below; a click at a row of the chart chooses it too",
    "accuracy": "share of these examples that are classified rightly, and the standard error of that share",
    "change": "accuracy less that of the dense network on the same examples",
    "loss": "mean cross-entropy of these examples",
    "changed": "examples whose predicted class is not that of the dense network",
    "size": "values that are not zero and a bit a weight that says where they are, or all values where that is less",
    "latency": "median seconds of a forward pass, timed in turns with the dense network's; layers compute at their "
    "nonzeros only where that is faster here",
}
"""What is meant, where one points."""


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


def costliest(table: pd.DataFrame) -> Any:
    """Return the row of the layer whose part of the compression alone costs most."""
    return table.sort_values("rise").iloc[-1]


def blamed(tables: dict[str, pd.DataFrame], count: int) -> str:
    """Say in words which layer breaks each network, for those who do not see the picture."""
    lines = []
    for label, table in tables.items():
        worst = costliest(table)
        error = worst.get("error")
        spread = f" ± {error:.2f}" if error is not None and pd.notna(error) else ""
        rise = f"{worst['rise']:+.2f}{spread}".replace("-", "−")
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


def numbers(known: Mapping[str, tuple[Answer, Answer]], question: str, what: str) -> str:
    """Return the table of accuracies and losses, and below it what is zero.

    Args:
        known: label → what the dense network answers, and the compressed one, on the same examples.
        question: the specification.
        what: what the examples are called.
    """
    names = (
        ("accuracy, % ± standard error", MEANING["accuracy"]), ("to dense, points", MEANING["change"]),
        ("loss, nats", MEANING["loss"]), ("classes changed", MEANING["changed"]),
    )  # fmt: skip
    rows, abouts = [], set()
    for label, (dense, found) in known.items():
        accuracy, change = 100 * found.accuracy, 100 * (found.accuracy - dense.accuracy)
        error = 100 * standard_error(found.accuracy, found.count)
        first = f"<b class='accuracy'>{accuracy:.1f}</b> ± {error:.1f}"
        changed = int((found.classes != dense.classes).sum())
        rows.append((label, [first, f"{change:+.1f}".replace("-", "−"), f"{found.loss:.3f}", str(changed)]))
        tuning = f"BatchNorm tuned on {found.tuned_on} training examples" if found.tuned_on else "untuned"
        abouts.add(f"{tuning}; {found.count} {what}")
    where = f"{question}, {'; or '.join(sorted(abouts))}"
    return _table(names, rows, where) + by_run({label: zeros(found) for label, (_, found) in known.items()})


def costs(
    known: Mapping[str, tuple[Answer, Answer]], seconds: Mapping[str, tuple[float, float] | None], batch: int
) -> str:
    """Return the table of sizes, and of latencies where they were measured.

    Args:
        known: as `numbers` takes it.
        seconds: label → medians of the dense and the compressed network; None: not measured.
        batch: examples that are timed together.
    """
    names = [("MB", MEANING["size"]), ("× smaller", MEANING["size"])]
    measured = any(seconds.values())
    if measured:
        names += [(f"ms for {batch}", MEANING["latency"]), ("× as fast", MEANING["latency"])]
    rows = []
    for label, (dense, found) in known.items():
        cells = [f"{found.bytes / 1e6:.3g}", f"{dense.bytes / found.bytes:.1f}"]
        if measured:
            pair = seconds.get(label)
            cells += [f"{1000 * pair[1]:.3g}", f"{pair[0] / pair[1]:.2f}"] if pair else ["–", "–"]
        rows.append((label, cells))
    return _table(names, rows, "size as stored" + (", median latency" if measured else ""))


def _table(names: Sequence[tuple[str, str]], rows: Sequence[tuple[str, Sequence[str]]], caption: str) -> str:
    cell = "text-align:right;padding:.1em 0 .1em clamp(.3em,1vw,1em)"  # narrow on a telephone
    head = "".join(f"<th style='{cell}' title='{html.escape(what)}'>{name}</th>" for name, what in names)
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>" + "".join(f"<td style='{cell}'>{text}</td>" for text in cells) + "</tr>"
        for label, cells in rows
    )
    told = f"<caption style='text-align:left'>{html.escape(caption)}</caption>"
    style = "line-height:1.3;font-size:.92em;border-collapse:collapse"
    return f"<table style='{style}'>{told}<tr><th style='text-align:left'>network</th>{head}</tr>{body}</table>"


class Names:
    """Names of classes, and the number where a network knows more classes than the data name."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes

    def __getitem__(self, number: int) -> str:
        return self._classes[number] if number < len(self._classes) else str(number)
