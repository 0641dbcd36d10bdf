"""The explorer: controls, the work that they ask for, and what it shows.

What is slow runs in one background thread, in small pieces, the newest question first; every answer is kept.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd

from cram_bench import plots
from cram_bench.checks import instance, integer, needs, number
from cram_bench.compress import Compressor, Magnitude
from cram_bench.data import AT_ONCE
from cram_bench.probes import layer_profile
from cram_bench.prune import Specification, grid
from cram_bench.runs import Run
from cram_bench.widgets import texts
from cram_bench.widgets.subject import FEW, Subject

_CURVE = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
PATTERNS = ("global", "uniform", "2:4", "4:8")
PRUNERS = ("greedy", "obs", "cap", "obd", "global+obs", "2:4+obs")
"""Pruners that look at `_GRADIENTS` gradients of eight training examples each, or at fewer where there are fewer."""
_GRADIENTS = 128
BITS = {"float32": "", "8 bits": "+int8", "4 bits": "+int4"}
_HINT = "hold Ctrl or Shift to choose several runs"
_ALT = {
    "curve": "accuracy against sparsity, a line a run",
    "slice": "loss on the way from the dense to the compressed weights",
    "layers": "zeros of every layer, and what the compression of each alone costs",
    "flips": "examples whose predicted class the compression changes",
}


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
        data = {(d.dataset, d.resize, d.holdout) for d in (run.experiment.data for run in finished)}
        if len(data) > 1:
            raise ValueError(
                f"the explorer compares runs on one data set, not on (name, resize, holdout) {sorted(data)}"
            )
        train, test = finished[0].experiment.load_data()
        self.sample = test.sample(sample)
        self._calibration = {
            augment: train.calibration(calibration, augment=augment, batch_size=AT_ONCE)
            for augment in {run.experiment.data.augment for run in finished}
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
            options=labels, value=tuple(dict.fromkeys((labels[0], labels[-1]))), rows=min(6, len(labels)),
            description="runs", style=style, layout=wide,
        )  # fmt: skip
        self.sparsity = ipw.FloatSlider(
            value=0.8, min=0.0, max=0.99, step=0.01, description="sparsity", readout_format=".0%", style=style,
            continuous_update=True, layout=wide,
        )  # fmt: skip
        fits = ipw.Layout(max_width="100%")
        self._looked_at, gradients = train, max(1, min(_GRADIENTS, len(train) // 8))
        pruners = [(name, f"{name}(gradients={gradients})") for name in PRUNERS]
        options = [*((name, name) for name in PATTERNS), *pruners]
        self.pattern = ipw.Dropdown(options=options, description="pattern", style=style, layout=fits)
        self.bits = ipw.Dropdown(options=list(BITS), description="weights", style=style, layout=fits)
        self.tune = ipw.Checkbox(value=True, description="tune BatchNorm after pruning", indent=False, layout=fits)
        hint = ipw.HTML(
            texts.on_lines([_HINT]), layout=ipw.Layout(margin="0 0 0 calc(9em + 6px)")
        )  # a tooltip of a list never reaches the page
        self.status = ipw.HTML()
        self.numbers = ipw.HTML()
        self.blamed = ipw.HTML()
        self.failed = ipw.HTML("<br>".join(html.escape(f"{r.label}: failed: {r.failure}") for r in runs if r.failure))
        self._what = f"{'held-out training' if finished[0].experiment.data.holdout else 'test'} examples"
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
    def compressor(self) -> Compressor | Specification:
        """What the controls ask for."""
        return grid([self.pattern.value + BITS[self.bits.value]], [round(self.sparsity.value, 2)])[0]

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until everything asked for is shown; tell whether that was in time."""
        return self._done.wait(timeout)

    def _changed(self, change: Any = None) -> None:
        """Note that the question has changed, and start on it when the controls have rested."""
        with self._lock:
            self._wanted += 1
            self._done.clear()
            self.sparsity.disabled = ":" in self.pattern.value
            self.status.value = texts.status("working …", "#c06000")
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
                self.status.value = texts.status(problem, "#e0364c") if problem else texts.status("ready", "#2e8b3d")
                self._done.set()

    def _subject(self, label: str) -> Subject:
        if label not in self._subjects:
            run = self._runs[label]
            self._subjects[label] = Subject(
                run.load_model(), self.sample, self._calibration[run.experiment.data.augment], self._looked_at
            )
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
            zeros[label] = texts.zeros(found)
            where = f"{compressor}, {self._tuning if tuned else 'untuned'}; {len(self.sample)} {self._what}"
            self.numbers.value = texts.table(rows, where, len(self.sample)) + texts.by_run(
                zeros
            )  # a row as soon as it is known
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
        self.curve.value = texts.picture(figure, _ALT["curve"])

    def _show_flips(self) -> None:
        if not self.runs.value:
            self.flips.value = ""
            return
        label = self.runs.value[0]
        subject = self._subjects[label]
        dense, found = subject.answer(Magnitude(0.0), False), subject.answer(self.compressor, self.tune.value)
        changed = (dense.classes != found.classes).nonzero().flatten()
        order = changed[dense.confidence[changed].argsort(descending=True)][:12]
        pictures = self.sample.pictures(order)
        if pictures is None:  # of sentences
            return
        names = self.sample.classes
        captions = [
            f"{names[dense.classes[i]]} → {names[found.classes[i]]}\n({names[self.sample.labels[i]]})"
            for i in order.tolist()
        ]
        title = f"{label}: {len(changed)} of {len(self.sample)} predictions change"
        self.flips.value = texts.picture(plots.examples(pictures, captions, title), _ALT["flips"])

    def _show_layers(self, current: Callable[[], bool]) -> bool:
        tables = {label: self._profile(label) for label in self.runs.value}
        self._draw_layers(tables)
        self.blamed.value = ""
        return current()

    def _profile(self, label: str) -> pd.DataFrame:
        subject = self._subjects[label]
        return layer_profile(subject.model, subject.operator(self.compressor))

    def _show_blame(self, current: Callable[[], bool]) -> bool:
        tables = {}
        for label in self.runs.value:
            tables[label] = self._subjects[label].blame(self.compressor, _only(current))
        self._draw_layers(tables)
        self.blamed.value = texts.blamed(tables, min(FEW, len(self.sample)))
        return current()

    def _draw_layers(self, tables: dict[str, pd.DataFrame]) -> None:
        networks = len({tuple(table["layer"]) for table in tables.values()})
        if networks == 1:
            self.layers.value = texts.picture(plots.layer_profile(tables, self._methods), _ALT["layers"])
        else:
            self.layers.value = "no picture of the layers: the networks differ in theirs" if networks else ""

    def _show_slice(self, current: Callable[[], bool]) -> bool:
        tables = {}
        for label in self.runs.value:
            tables[label] = self._subjects[label].slice(self.compressor, _only(current))
        self.slice.value = texts.picture(plots.loss_slice(tables, self._methods), _ALT["slice"]) if tables else ""
        return current()

    def _fill_curve(self, current: Callable[[], bool]) -> bool:
        """Work out the rest of the curve, a point at a time, so that a move of the slider does not wait long."""
        pattern, tuned, suffix = self.pattern.value, self.tune.value, BITS[self.bits.value]
        levels = [] if ":" in pattern else grid([pattern + suffix], _CURVE)
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
