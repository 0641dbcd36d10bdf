"""The explorer: controls, the work that they ask for, and what it shows.

What is slow runs in one background thread, in small pieces, the newest question first; every answer is kept.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
from torch import nn

from cram_bench import plots
from cram_bench.checks import needs, number
from cram_bench.compress import Compressor
from cram_bench.data import Batches
from cram_bench.probes import layer_profile
from cram_bench.prune import Specification, grid
from cram_bench.runs import Run
from cram_bench.widgets import networks, texts
from cram_bench.widgets.choices import BITS, CURVE, decides, options
from cram_bench.widgets.subject import BATCH, DENSE, FEW, Answer, Subject

_ALT = {
    "curve": "accuracy against sparsity, a line a run",
    "slice": "loss on the way from the dense to the compressed weights",
    "layers": "zeros of every layer, and what the compression of each alone costs",
    "detail": "one layer: what pruning it alone costs, and how its weights are spread",
    "flips": "examples whose predicted class the compression changes",
}


class Explorer:
    """Sliders over sparsity, pattern, bits and BatchNorm tuning; accuracy, layers, loss and flipped examples below.

    Args:
        subjects: finished runs on the same data, or any torch classifiers by their label.
        data: of models: what they are evaluated on, a `Dataset` or batches of (inputs, labels). Runs know their own.
        calibration: training data of models, for BatchNorm tuning and for pruners that look; of runs how many training
            examples BatchNorm is tuned on, by default 250.
        sample: examples to evaluate on.
        delay: seconds a slider must rest before the work starts.

    Raises:
        ValueError: there is no finished run and no model, or the runs are of several data sets, or data do not fit.
        TypeError: something is of another kind.
    """

    def __init__(
        self,
        subjects: Sequence[Run] | Mapping[str, nn.Module],
        data: Batches | None = None,
        calibration: Batches | int | None = None,
        sample: int = 1000,
        delay: float = 0.05,
    ) -> None:
        needs("explorers", "lab", "ipywidgets", "anywidget", "altair", "vl_convert")
        import ipywidgets as ipw

        from cram_bench.widgets.chart import Chart

        number("delay", delay, 0)
        self._networks = networks.of(subjects, data, calibration, sample)
        self.sample = self._networks.sample
        self._subjects: dict[str, Subject] = {}
        self._delay = delay
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._wanted = 0
        self._timing = False
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(1, "explorer")

        labels = list(self._networks.subjects)
        fits = ipw.Layout(max_width="calc(100% - 4px)")  # a margin of 2 on each side
        style = {"description_width": "9em"}
        self.runs = ipw.SelectMultiple(
            options=labels, value=tuple(dict.fromkeys((labels[0], labels[-1]))), rows=min(6, len(labels)),
            description="networks", style=style,
            layout=ipw.Layout(width="auto", display=None if len(labels) > 1 else "none"),
        )  # fmt: skip
        self.sparsity = ipw.FloatSlider(
            value=0.8, min=0.0, max=0.99, step=0.01, description="sparsity", readout_format=".0%", style=style,
            continuous_update=True, layout=ipw.Layout(width="auto"), tooltip=texts.MEANING["sparsity"],
        )  # fmt: skip
        self.pattern = ipw.Dropdown(
            options=options(self._networks.looked_at), description="pattern", style=style, layout=fits,
            tooltip=texts.MEANING["pattern"],
        )  # fmt: skip
        self.bits = ipw.Dropdown(
            options=list(BITS), description="weights", style=style, layout=fits, tooltip=texts.MEANING["weights"]
        )
        tunes = self._networks.tuned_on > 0
        self.tune = ipw.Checkbox(
            value=tunes, disabled=not tunes, description="tune BatchNorm after pruning", indent=False, layout=fits,
            tooltip=texts.MEANING["tuning"],
        )  # fmt: skip
        self.layer = ipw.Dropdown(
            options=[texts.COSTLIEST], description="layer", style=style, layout=fits, tooltip=texts.MEANING["layer"]
        )
        self.time = ipw.Button(
            description="measure latency", tooltip=texts.MEANING["latency"], layout=ipw.Layout(width="auto")
        )
        hint = ipw.HTML(
            texts.on_lines([texts.HINT] if len(labels) > 1 else []), layout=ipw.Layout(margin="0 0 0 calc(9em + 6px)")
        )  # a tooltip of a list never reaches the page
        self.status, self.numbers, self.costs, self.blamed = (ipw.HTML(layout=fits) for _ in range(4))
        self.failed = ipw.HTML("<br>".join(map(html.escape, self._networks.failed)))
        room = ipw.Layout(flex="1 1 440px", min_width="0", max_width="100%")
        self.curve, self.layers = (Chart(layout=room, alt=_ALT[name]) for name in ("curve", "layers"))
        self.detail = Chart(layout=ipw.Layout(width="auto"), alt=_ALT["detail"])
        # An ipywidgets.Image has no alternative text, and one with a tooltip cannot be shown at all.
        self.slice, self.flips = (ipw.HTML(layout=fits) for _ in range(2))
        self._controls = (self.runs, self.sparsity, self.pattern, self.bits, self.tune)
        for control in (*self._controls, self.layer):
            control.observe(self._changed, "value")
        self.layers.observe(self._picked, "picked")
        self.time.on_click(self._time)
        wraps = ipw.Layout(flex_flow="row wrap", width="100%")
        choices = ipw.HBox([self.pattern, self.bits, self.tune, self.time], layout=wraps)
        controls = [self.runs, hint, self.failed, self.sparsity, choices, self.status, self.numbers, self.costs]
        layer = ipw.VBox([self.layer, self.detail], layout=room)
        pictures = [
            ipw.HBox([self.curve, self.slice], layout=wraps),
            self.blamed,
            ipw.HBox([self.layers, layer], layout=wraps),
            self.flips,
        ]
        self.widget = ipw.VBox([*controls, *pictures])
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
            for control in (*self._controls, self.layer):
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
            self._timing = False
            alone = decides(self.pattern.value)  # a slider that says nothing shows nothing
            self.sparsity.disabled, self.sparsity.layout.display = alone, "none" if alone else None
            self.status.value = texts.status("working …", "#c06000")
            self._soon(self._delay if change is not None else 0.0)

    def _soon(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(delay, self._start, [self._wanted])
        self._timer.daemon = True
        self._timer.start()

    def _time(self, button: Any) -> None:
        """Measure the latency of what the controls ask for, after all else."""
        with self._lock:
            self._wanted += 1
            self._done.clear()
            self._timing = True
            self.status.value = texts.status("measuring latency …", "#c06000")
            self._soon(0.0)

    def _picked(self, change: Any) -> None:
        """Show the layer that was clicked at."""
        if change["new"] in self.layer.options and change["new"] != self._layer():
            self.layer.value = change["new"]

    def _layer(self) -> str:
        """Return the layer that is looked into: the chosen one, else the costliest; empty where none is known yet."""
        if self.layer.value != texts.COSTLIEST:
            return str(self.layer.value)
        tables = [self._subjects[label].blames.get(self.compressor) for label in self.runs.value[:1]]
        return texts.costliest(tables[0])["layer"] if tables and tables[0] is not None else ""

    def _start(self, wanted: int) -> None:
        with self._lock:
            if wanted == self._wanted:
                self._pool.submit(self._answer, wanted)

    def _answer(self, wanted: int) -> None:
        """Answer the question of number `wanted`, the quick parts first; stop when there is a newer one."""

        def check() -> None:
            if self._wanted != wanted:
                raise _Stale

        stages = (
            self._look, self._show_layers, self._look_along, self._show_blame, self._show_detail, self._show_numbers,
            self._show_slice, self._fill_curve, self._show_latency,
        )  # fmt: skip
        try:
            for stage in stages:
                check()
                stage(check)
            check()
            self._finish(wanted, "" if self.runs.value else "choose a network")
        except _Stale:
            return
        except Exception as error:
            self._finish(wanted, f"{type(error).__name__}: {error}")

    def _finish(self, wanted: int, problem: str) -> None:
        with self._lock:
            if self._wanted == wanted:
                # Voilà builds the page while the first answers come in, and misses what is sent just then.
                for shown in (self.numbers, self.costs, self.blamed, self.slice, self.flips):
                    shown.send_state("value")
                for chart in (self.curve, self.layers, self.detail):
                    chart.send_state(["spec", "rows", "picked"])
                self.status.value = texts.status(problem, "#e0364c") if problem else texts.status("ready", "#2e8b3d")
                self._done.set()

    def _subject(self, label: str) -> Subject:
        if label not in self._subjects:
            self._subjects[label] = self._networks.subjects[label]()
        return self._subjects[label]

    def _methods(self) -> dict[str, str]:
        return {label: self._networks.methods[label] for label in self.runs.value}

    def _look(self, check: Callable[[], None]) -> None:
        """Say what is known at once, a row as soon as it is."""
        question, tuned = self.compressor, self.tune.value
        known: dict[str, tuple[Answer, Answer]] = {}
        for label in self.runs.value:
            subject = self._subject(label)
            if subject.looks_first(question):
                name = self.pattern.label
                self.status.value = texts.status(f"{name} looks at training examples of {label} …", "#c06000")
                subject.operator(question, check)
                self.status.value = texts.status("working …", "#c06000")
            check()
            best = subject.answers.get((question, tuned))
            known[label] = (subject.answer(DENSE, False), best) if best else (
                subject.look(DENSE, False), subject.look(question, tuned)
            )  # fmt: skip
            check()
            self._tell(known)
        if not known:
            self.numbers.value = self.costs.value = ""
        self._show_curve()

    def _tell(self, known: Mapping[str, tuple[Answer, Answer]]) -> None:
        question = self.compressor
        self.numbers.value = texts.numbers(known, str(question), self._networks.what)
        seconds = {label: self._subjects[label].seconds.get(question) for label in known}
        self.costs.value = texts.costs(known, seconds, BATCH)

    def _show_numbers(self, check: Callable[[], None]) -> None:
        known = {}
        for label in self.runs.value:
            subject = self._subject(label)
            dense = subject.answer(DENSE, False, check)
            known[label] = dense, subject.answer(self.compressor, self.tune.value, check)
            shown = {name: known.get(name) or self._rough(name) for name in self.runs.value}
            check()
            self._tell(shown)
        self._show_curve()
        self._show_flips()

    def _rough(self, label: str) -> tuple[Answer, Answer]:
        subject = self._subjects[label]
        found = subject.answers.get((self.compressor, self.tune.value))
        if found:
            return subject.answer(DENSE, False), found
        return subject.look(DENSE, False), subject.look(self.compressor, self.tune.value)

    def _show_curve(self) -> None:
        if not self.runs.value:
            self.curve.clear()
            return
        pattern, tuned = self.pattern.value + BITS[self.bits.value], self.tune.value
        from cram_bench.charts import explorer as charts

        curves = {label: self._subjects[label].curve(pattern, tuned) for label in self.runs.value}
        rows = charts.curve_rows(curves, self.compressor.sparsity, self.sample.majority)
        self.curve.draw(charts.curve(self._methods()).to_dict(), rows)

    def _show_flips(self) -> None:
        if not self.runs.value:
            self.flips.value = ""
            return
        label = self.runs.value[0]
        subject = self._subjects[label]
        dense, found = subject.answer(DENSE, False), subject.answer(self.compressor, self.tune.value)
        changed = (dense.classes != found.classes).nonzero().flatten()
        order = changed[dense.confidence[changed].argsort(descending=True)][:12]
        pictures = self.sample.pictures(order)
        if pictures is None:  # of sentences
            return
        names = texts.Names(self.sample.classes)
        captions = [
            f"{names[int(dense.classes[i])]} → {names[int(found.classes[i])]}\n({names[int(self.sample.labels[i])]})"
            for i in order.tolist()
        ]
        title = f"{label}: {len(changed)} of {len(self.sample)} predictions change"
        self.flips.value = texts.picture(plots.examples(pictures, captions, title), _ALT["flips"])

    def _show_layers(self, check: Callable[[], None]) -> None:
        tables = {}
        for label in self.runs.value:
            subject = self._subjects[label]
            tables[label] = layer_profile(subject.model, subject.operator(self.compressor))
            check()
        self._draw_layers(tables)

    def _show_blame(self, check: Callable[[], None]) -> None:
        tables = {label: self._subjects[label].blame(self.compressor, check) for label in self.runs.value}
        self._draw_layers(tables)
        self.blamed.value = texts.blamed(tables, min(FEW, len(self.sample))) + self.blamed.value

    def _draw_layers(self, tables: dict[str, pd.DataFrame]) -> None:
        from cram_bench.charts import explorer as charts

        alike = {tuple(table["layer"]) for table in tables.values()}
        names = list(next(iter(alike))) if len(alike) == 1 else []
        wanted = (texts.COSTLIEST, *names)
        if tuple(self.layer.options) != wanted:
            with self._lock:
                self.layer.unobserve(self._changed, "value")
                kept = self.layer.value if self.layer.value in wanted else texts.COSTLIEST
                self.layer.options, self.layer.value = wanted, kept
                self.layer.observe(self._changed, "value")
        self.blamed.value = texts.on_lines([texts.DIFFER]) if len(alike) > 1 else ""
        if not names:
            self.layers.clear()
            self.detail.clear()
            return
        rows = charts.layer_rows(tables, min(FEW, len(self.sample)))
        self.layers.draw(charts.layers(self._methods(), names).to_dict(), rows)

    def _show_detail(self, check: Callable[[], None]) -> None:
        from cram_bench.charts import explorer as charts

        layer = self._layer() if len(self.layer.options) > 1 else ""
        if not layer:
            self.detail.clear()
            return
        found = {label: self._subjects[label].detail(self.compressor, layer, check) for label in self.runs.value}
        rows = charts.layer_detail_rows(
            {label: rises for label, (rises, _) in found.items()},
            {label: spread for label, (_, spread) in found.items()},
            min(FEW, len(self.sample)),
        )
        self.detail.alt = f"{_ALT['detail']}: {layer}"
        self.detail.draw(charts.layer_detail(self._methods(), layer).to_dict(), rows)
        self.layers.picked = layer

    def _show_slice(self, check: Callable[[], None]) -> None:
        tables = {label: self._subjects[label].slice(self.compressor, check) for label in self.runs.value}
        self.slice.value = texts.picture(plots.loss_slice(tables, self._methods()), _ALT["slice"]) if tables else ""

    def _along(self) -> list[Compressor | Specification]:
        pattern = self.pattern.value
        return [] if decides(pattern) else grid([pattern + BITS[self.bits.value]], CURVE)

    def _look_along(self, check: Callable[[], None]) -> None:
        """Look at the whole curve roughly."""
        missing = [
            (self._subjects[label], question)
            for question in self._along()
            for label in self.runs.value
            if self._subjects[label].known(question, self.tune.value) is None
        ]
        for place, (subject, question) in enumerate(missing, 1):
            subject.look(question, self.tune.value)
            check()
            if place % 4 == 0 or place == len(missing):
                self._show_curve()

    def _fill_curve(self, check: Callable[[], None]) -> None:
        """Work out the curve on the whole sample, a point at a time: a move of the slider does not wait long."""
        for question in self._along():
            for label in self.runs.value:
                self._subjects[label].answer(question, self.tune.value, check)
                check()
            self._show_curve()

    def _show_latency(self, check: Callable[[], None]) -> None:
        if not self._timing:
            return
        for label in self.runs.value:
            self._subjects[label].latency(self.compressor)
            check()
        self._tell({label: self._rough(label) for label in self.runs.value})


class _Stale(Exception):
    """There is a newer question."""
