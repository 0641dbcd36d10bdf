"""Panels for notebooks: move a slider, see what a compression does to the networks of several runs.

    cb.widgets.explorer(runs)

What is slow runs in one background thread, in small pieces, the newest question first; every answer is kept.
"""

from __future__ import annotations

import base64
import html
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram_bench import plots
from cram_bench._checks import instance, integer, needs, number
from cram_bench._fold import fold
from cram_bench._preserve import preserved
from cram_bench.compress import Compressor, Dense, Magnitude, apply_, listing, parse, tune_batchnorm
from cram_bench.data import AT_ONCE, Dataset
from cram_bench.probes import layer_blame, layer_profile, loss_along_compression
from cram_bench.runs import Run

_CURVE = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
PATTERNS = ("global", "uniform", "2:4", "4:8")
_FEW = 200  # examples for what takes many evaluations: which layer breaks it, and the way there
BITS = {"float32": "", "8 bits": "+int8", "4 bits": "+int4"}
_HINT = "hold Ctrl or Shift to choose several runs"
_ALT = {
    "curve": "accuracy against sparsity, a line a run",
    "slice": "loss on the way from the dense to the compressed weights",
    "layers": "zeros of every layer, and what the compression of each alone costs",
    "flips": "examples whose predicted class the compression changes",
}


@dataclass(frozen=True)
class Answer:
    """What a compressed network does on the sample: accuracy (a fraction), loss (nats), predicted classes, their probabilities.

    And what was compressed: zeros and weights of what is prunable, and the matrices in which nothing was pruned.
    """

    accuracy: float
    loss: float
    classes: Tensor
    confidence: Tensor
    zeros: int
    weights: int
    dense: dict[str, Dense]


class Subject:
    """A network under question: it answers for any compression, and remembers its answers.

    Args:
        model: any torch classifier.
        sample: what to evaluate on.
        calibration: batches for BatchNorm tuning.
    """

    def __init__(self, model: nn.Module, sample: Dataset, calibration: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.model = model.eval()
        self.calibration = calibration
        self.sample = sample
        self.batches = list(sample.batches(AT_ONCE, channels_last=True))
        self.graph = fold(self.model, self.batches[0][0])
        self.answers: dict[tuple[Compressor, bool], Answer] = {}
        self.slices: dict[Compressor, pd.DataFrame] = {}
        self.blames: dict[Compressor, pd.DataFrame] = {}

    @torch.no_grad()
    def answer(self, compressor: Compressor, tuned: bool) -> Answer:
        """Compress, tune if asked, and evaluate on the sample; the network is put back."""
        key = (compressor, tuned)
        if key not in self.answers:
            with preserved(self.model):
                masks = apply_(self.model, compressor)
                if tuned:
                    tune_batchnorm(self.model, self.calibration)
                network = self.graph.refolded() if self.graph else self.model
                logits = torch.cat([network(inputs) for inputs, _ in self.batches]).float()
            labels = torch.cat([labels for _, labels in self.batches])
            best = logits.softmax(1).max(1)
            accuracy = float((best.indices == labels).float().mean())
            loss, compressed = float(F.cross_entropy(logits, labels)), (masks.zeros, masks.count, masks.dense)
            self.answers[key] = Answer(accuracy, loss, best.indices, best.values, *compressed)
        return self.answers[key]

    def curve(self, pattern: str, tuned: bool) -> pd.DataFrame:
        """Return what is known of accuracy against sparsity: columns sparsity, accuracy."""
        known = [
            (compressor.sparsity, answer.accuracy)
            for (compressor, was_tuned), answer in self.answers.items()
            if was_tuned == tuned and compressor.pattern == pattern
        ]
        return pd.DataFrame(known, columns=["sparsity", "accuracy"]).drop_duplicates("sparsity").sort_values("sparsity")

    def blame(self, compressor: Compressor, before: Callable[[], None]) -> pd.DataFrame:
        """Return what the compression of each alone costs, untuned, on `_FEW` examples of the sample."""
        if compressor not in self.blames:
            self.blames[compressor] = layer_blame(self.model, self._few, compressor, before=before)
        return self.blames[compressor]

    @property
    def _few(self) -> list[tuple[Tensor, Tensor]]:
        return list(self.sample.sample(_FEW).batches(100, channels_last=True))

    def slice(self, compressor: Compressor, before: Callable[[], None]) -> pd.DataFrame:
        """Return the loss on the way to the compressed weights, untuned, on `_FEW` examples of the sample."""
        if compressor not in self.slices:
            self.slices[compressor] = loss_along_compression(
                self.model, self._few, compressor, points=7, end=1.2, before=before
            )
        return self.slices[compressor]


class Explorer:
    """Sliders over sparsity, pattern, bits and BatchNorm tuning; accuracy, layers, loss and flipped examples below.

    Args:
        runs: finished runs on the same data.
        sample: test images to evaluate on.
        calibration: training images for BatchNorm tuning.
        delay: seconds a slider must rest before the work starts.

    Raises:
        ValueError: there is no finished run, or the runs are of several data sets.
    """

    def __init__(self, runs: Sequence[Run], sample: int = 1000, calibration: int = 250, delay: float = 0.12) -> None:
        needs("explorers", "lab", "ipywidgets")
        import ipywidgets as ipw

        instance("runs", runs, (list, tuple), "a list of runs")
        for run in runs:
            instance("a run", run, Run, "a Run, such as cram_bench.runs.ensure returns")
        integer("sample", sample, 1)
        integer("calibration", calibration, 2)
        number("delay", delay, 0)
        finished = [run for run in runs if run.failure is None]
        if not finished:
            raise ValueError("the explorer needs at least one finished run")
        data = {tuple(getattr(run.experiment, name) for name in ("dataset", "resize", "holdout")) for run in finished}
        if len(data) > 1:
            raise ValueError(
                f"the explorer compares runs on one data set, not on (name, resize, holdout) {sorted(data)}"
            )
        train, test = finished[0].experiment.load_data()
        self.sample = test.sample(sample)
        self._calibration = {
            augment: train.calibration(calibration, augment=augment, batch_size=AT_ONCE)
            for augment in {run.experiment.augment for run in finished}
        }
        self._runs = _labelled(finished)
        self._methods = {label: run.experiment.method for label, run in self._runs.items()}
        self._subjects: dict[str, Subject] = {}
        self._delay = delay
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._wanted = 0
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(1, "explorer")

        labels = list(self._runs)
        wide = ipw.Layout(width="auto")
        style = {"description_width": "9em"}
        self.runs = ipw.SelectMultiple(
            options=labels, value=tuple(dict.fromkeys((labels[0], labels[-1]))), rows=min(6, len(labels)), description="runs", style=style, layout=wide,
        )  # fmt: skip
        self.sparsity = ipw.FloatSlider(
            value=0.8, min=0.0, max=0.99, step=0.01, description="sparsity", readout_format=".0%", style=style,
            continuous_update=True, layout=wide,
        )  # fmt: skip
        fits = ipw.Layout(max_width="100%")
        self.pattern = ipw.Dropdown(options=PATTERNS, description="pattern", style=style, layout=fits)
        self.bits = ipw.Dropdown(options=list(BITS), description="weights", style=style, layout=fits)
        self.tune = ipw.Checkbox(value=True, description="tune BatchNorm after pruning", indent=False, layout=fits)
        hint = ipw.HTML(
            _lines([_HINT]), layout=ipw.Layout(margin="0 0 0 calc(9em + 6px)")
        )  # a tooltip of a list never reaches the page
        self.status = ipw.HTML()
        self.numbers = ipw.HTML()
        self.blamed = ipw.HTML()
        self.failed = ipw.HTML("<br>".join(html.escape(f"{r.label}: failed: {r.failure}") for r in runs if r.failure))
        self._what = f"{'held-out training' if finished[0].experiment.holdout else 'test'} examples"
        self._tuning = f"BatchNorm tuned on {calibration} training examples"
        # An ipywidgets.Image has no alternative text, and one with a tooltip cannot be shown at all.
        self.curve, self.slice, self.layers, self.flips = (ipw.HTML(layout=fits) for _ in _ALT)
        for control in (self.runs, self.sparsity, self.pattern, self.bits, self.tune):
            control.observe(self._changed, "value")
        wraps = ipw.Layout(flex_flow="row wrap")
        choices = ipw.HBox([self.pattern, self.bits, self.tune], layout=wraps)
        controls = [self.runs, hint, self.failed, self.sparsity, choices, self.status, self.numbers, self.blamed]
        pictures = ipw.HBox([self.curve, self.slice, self.layers, self.flips], layout=wraps)
        self.widget = ipw.VBox([*controls, pictures])
        self.widget.add_class("cram-bench-explorer")
        self._changed()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Stop what is being worked out and let go of the models; the panel no longer answers."""
        with self._lock:
            self._wanted += 1
            if self._timer is not None:
                self._timer.cancel()
            for control in (self.runs, self.sparsity, self.pattern, self.bits, self.tune):
                control.unobserve_all("value")
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._subjects.clear()
        self.widget.close()

    @property
    def compressor(self) -> Compressor:
        """What the controls ask for."""
        pattern = self.pattern.value
        spec = pattern if ":" in pattern else f"{pattern}@{round(self.sparsity.value, 2)!r}"
        return parse(spec + BITS[self.bits.value])

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until everything asked for is shown; tell whether that was in time."""
        return self._done.wait(timeout)

    def _changed(self, change: Any = None) -> None:
        """Note that the question has changed, and start on it when the controls have rested."""
        with self._lock:
            self._wanted += 1
            self._done.clear()
            self.sparsity.disabled = ":" in self.pattern.value
            self.status.value = _status("working …", "#c06000")
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(self._delay if change is not None else 0.0, self._start, [self._wanted])
            self._timer.daemon = True
            self._timer.start()

    def _start(self, wanted: int) -> None:
        with self._lock:
            if wanted == self._wanted:
                self._pool.submit(self._answer, wanted)

    def _answer(self, wanted: int) -> None:
        """Answer the question of number `wanted`, the quick parts first; stop when there is a newer one."""
        try:
            for stage in (self._show_numbers, self._show_layers, self._show_blame, self._show_slice, self._fill_curve):
                if not stage(lambda: self._wanted == wanted):
                    return
            self._finish(wanted, "" if self.runs.value else "choose a run")
        except _Stale:
            return
        except Exception as error:
            self._finish(wanted, f"{type(error).__name__}: {error}")

    def _finish(self, wanted: int, problem: str) -> None:
        with self._lock:
            if self._wanted == wanted:
                # Voilà builds the page while the first answers come in, and misses what is sent just then.
                for shown in (self.numbers, self.blamed, self.curve, self.slice, self.layers, self.flips):
                    shown.send_state("value")
                self.status.value = _status(problem, "#e0364c") if problem else _status("ready", "#2e8b3d")
                self._done.set()

    def _subject(self, label: str) -> Subject:
        if label not in self._subjects:
            run = self._runs[label]
            self._subjects[label] = Subject(run.load_model(), self.sample, self._calibration[run.experiment.augment])
        return self._subjects[label]

    def _show_numbers(self, current: Callable[[], bool]) -> bool:
        compressor, tuned = self.compressor, self.tune.value
        rows, zeros = [], {}
        for label in self.runs.value:
            subject = self._subject(label)
            dense = subject.answer(Magnitude(0.0), tuned=False)
            if not current():
                return False
            found = subject.answer(compressor, tuned)
            if not current():
                return False
            changed = int((found.classes != dense.classes).sum())
            rows.append((label, 100 * found.accuracy, 100 * (found.accuracy - dense.accuracy), found.loss, changed))
            zeros[label] = _zeros(found)
            where = f"{compressor}, {self._tuning if tuned else 'untuned'}; {len(self.sample)} {self._what}"
            self.numbers.value = _table(rows, where, len(self.sample)) + _by_run(zeros)  # a row as soon as it is known
        if not rows:
            self.numbers.value = ""
        self._show_curve()
        self._show_flips()
        return current()

    def _show_curve(self) -> None:
        pattern, tuned = self.pattern.value, self.tune.value
        curves = {
            label: self._subjects[label].curve(pattern + BITS[self.bits.value], tuned) for label in self.runs.value
        }
        points = {label: self._subjects[label].answers.get((self.compressor, tuned)) for label in self.runs.value}
        figure = plots.explorer_curve(curves, points, self._methods, self.compressor.sparsity, self.sample.majority)
        self.curve.value = _picture(figure, _ALT["curve"])

    def _show_flips(self) -> None:
        if not self.runs.value or self.sample.images.ndim != 4:
            self.flips.value = ""
            return
        label = self.runs.value[0]
        subject = self._subjects[label]
        dense, found = subject.answer(Magnitude(0.0), False), subject.answer(self.compressor, self.tune.value)
        changed = (dense.classes != found.classes).nonzero().flatten()
        order = changed[dense.confidence[changed].argsort(descending=True)][:12]
        names = self.sample.classes
        captions = [
            f"{names[dense.classes[i]]} → {names[found.classes[i]]}\n({names[self.sample.labels[i]]})"
            for i in order.tolist()
        ]
        title = f"{label}: {len(changed)} of {len(self.sample)} predictions change"
        self.flips.value = _picture(plots.examples(self.sample.images[order], captions, title), _ALT["flips"])

    def _show_layers(self, current: Callable[[], bool]) -> bool:
        tables = {label: layer_profile(self._subjects[label].model, self.compressor) for label in self.runs.value}
        self._draw_layers(tables)
        self.blamed.value = ""
        return current()

    def _show_blame(self, current: Callable[[], bool]) -> bool:
        tables = {}
        for label in self.runs.value:
            tables[label] = self._subjects[label].blame(self.compressor, _only(current))
        self._draw_layers(tables)
        self.blamed.value = _blamed(tables, min(_FEW, len(self.sample)))
        return current()

    def _draw_layers(self, tables: dict[str, pd.DataFrame]) -> None:
        networks = len({tuple(table["layer"]) for table in tables.values()})
        if networks == 1:
            self.layers.value = _picture(plots.layer_profile(tables, self._methods), _ALT["layers"])
        else:
            self.layers.value = "no picture of the layers: the networks differ in theirs" if networks else ""

    def _show_slice(self, current: Callable[[], bool]) -> bool:
        tables = {}
        for label in self.runs.value:
            tables[label] = self._subjects[label].slice(self.compressor, _only(current))
        self.slice.value = _picture(plots.loss_slice(tables, self._methods), _ALT["slice"]) if tables else ""
        return current()

    def _fill_curve(self, current: Callable[[], bool]) -> bool:
        """Work out the rest of the curve, a point at a time, so that a move of the slider does not wait long."""
        pattern, tuned, suffix = self.pattern.value, self.tune.value, BITS[self.bits.value]
        levels = [] if ":" in pattern else [parse(f"{pattern}@{level!r}{suffix}") for level in _CURVE]
        for compressor in levels:
            for label in self.runs.value:
                self._subjects[label].answer(compressor, tuned)
                if not current():
                    return False
        if levels:
            self._show_curve()
        return current()


class _Stale(Exception):
    """There is a newer question."""


def _only(current: Callable[[], bool]) -> Callable[[], None]:
    def check() -> None:
        if not current():
            raise _Stale

    return check


def _labelled(runs: Sequence[Run]) -> dict[str, Run]:
    """Give every run a label of its own: method, seed and epochs, and where that is not enough model and id."""
    plain = [f"{run.label}, {run.experiment.epochs} epochs" for run in runs]
    return {
        label if plain.count(label) == 1 else f"{label}, {run.experiment.model}, {run.id}": run
        for label, run in zip(plain, runs, strict=True)
    }


def explorer(runs: Sequence[Run], **options: Any) -> Explorer:
    """Return a panel that shows what compression does to `runs`; put it last in a cell, or ``display`` it.

    It works in a thread of its own until `Explorer.close` is called; one that is replaced in a notebook is best closed.

    Args:
        runs: finished runs on the same data.
        options: sample, calibration and delay of `Explorer`.
    """
    return Explorer(runs, **options)


def _picture(figure: Any, alt: str) -> str:
    """Return the HTML of a figure: as wide as it is, or as the window; `alt` is read out, and shown over the picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    png, (wide, high) = buffer.getvalue(), (round(100 * size) for size in figure.get_size_inches())
    return (
        f"<img alt='{html.escape(alt)}' title='{html.escape(alt)}' width='{wide}' height='{high}' "
        f"style='max-width:100%;height:auto' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
    )


def _status(text: str, colour: str) -> str:
    """Return a line of state: its dot is coloured, its text is what the theme makes it, to be read on light and dark."""
    return f"<span role='status'><span class='dot' style='color:{colour}'>●</span> {html.escape(text.splitlines()[0])}</span>"


def _blamed(tables: dict[str, pd.DataFrame], count: int) -> str:
    """Say in words which layer breaks each network, for those who do not see the picture."""
    lines = []
    for label, table in tables.items():
        worst = table.sort_values("rise").iloc[-1]
        rise = f"{worst['rise']:+.2f}".replace("-", "−")
        layer = f"<b class='layer'>{html.escape(str(worst['layer']))}</b> ({100 * worst['sparsity']:.0f} % zeros)"
        lines.append(f"{html.escape(label)}: compressed alone, {layer} costs most, {rise} nats")
    about = f"layers and the way there: untuned, on {count} of these examples"
    return _lines([*lines, about]) if lines else ""


def _zeros(found: Answer) -> str:
    """Say how much of a network is zero, and name and count what nothing was pruned in."""
    share = 100 * found.zeros / found.weights
    text = f"{share:.1f} % of {found.weights:,} prunable weights are zero"
    if not found.dense:
        return f"{text}; no matrix is left dense"
    left = sum(matrix.weights for matrix in found.dense.values())
    return f"{text}; left dense, {left:,} weights: {listing(found.dense)}"


def _by_run(texts: Mapping[str, str]) -> str:
    """Return a line a text, after the runs that it is true of."""
    runs: dict[str, list[str]] = {}
    for label, text in texts.items():
        runs.setdefault(text, []).append(label)
    one = len(runs) == 1
    return _lines([html.escape(text if one else f"{'; '.join(labels)}: {text}") for text, labels in runs.items()])


def _lines(lines: Sequence[str]) -> str:
    return f"<div style='line-height:1.4'>{'<br>'.join(lines)}</div>"


def _table(rows: Sequence[tuple[str, float, float, float, int]], where: str, count: int) -> str:
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
    return f"<table style='line-height:1.3;font-size:.92em;border-collapse:collapse'>{caption}<tr><th style='text-align:left'>run</th>{head}</tr>{body}</table>"
