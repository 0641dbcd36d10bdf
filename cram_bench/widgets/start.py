"""Where `cram-bench explore` begins when nothing is named: choose runs, train what is missing, or name a network."""

from __future__ import annotations

import threading
from typing import Any

from cram_bench import data as datasets
from cram_bench import recipes
from cram_bench.checks import needs, one_line
from cram_bench.experiment import Experiment
from cram_bench.runs import Run, Store, ensure
from cram_bench.widgets import texts
from cram_bench.widgets.networks import labelled
from cram_bench.widgets.panel import Explorer

RUNS, TRAIN, FILE, NAMED = "runs of the store", "train and compare", "weights of a file", "a pretrained network"


class Start:
    """Data, what of it, and a button; the explorer appears below.

    Args:
        data: the data set that is chosen first; empty: that of most runs, else the digits.
        store: folder of the runs; empty for the usual one.
        sample: examples to evaluate on.
        calibration: training examples that BatchNorm is tuned on.
    """

    def __init__(self, data: str = "", store: str = "", sample: int = 1000, calibration: int | None = None) -> None:
        needs("explorers", "lab", "ipywidgets", "anywidget", "altair", "vl_convert")
        import ipywidgets as ipw

        self.store = Store(store or None)
        self._options: dict[str, Any] = {"sample": sample, "calibration": calibration}
        self._known: dict[str, list[Run]] = {}
        for run in self.store.runs():
            if not run.experiment.data.of_sentences:
                self._known.setdefault(run.experiment.data.dataset, []).append(run)
        most = max(self._known, key=lambda name: len(self._known[name]), default="digits")
        self.explorer: Explorer | None = None
        style = {"description_width": "9em"}

        def fits() -> Any:  # a layout of its own: each is shown and hidden alone
            return ipw.Layout(max_width="calc(100% - 4px)", width="36em")

        names = list(dict.fromkeys([*self._known, *(n for n in datasets.names() if n not in datasets.SENTENCES)]))
        self.data = ipw.Combobox(
            value=data or most, options=names, description="data", style=style, layout=fits(), continuous_update=False,
            placeholder="a data set, or the path of an image folder",
        )  # fmt: skip
        self.what = ipw.Dropdown(options=[RUNS, TRAIN, FILE, NAMED], description="what", style=style, layout=fits())
        self.runs = ipw.SelectMultiple(rows=6, description="runs", style=style, layout=fits())
        methods = [(recipes.label(name), name) for name in recipes.METHODS]
        self.methods = ipw.SelectMultiple(
            options=methods, value=("sgd", "cram+-multi"), rows=6, description="methods", style=style, layout=fits()
        )
        self.epochs = ipw.BoundedIntText(value=0, min=0, max=10000, description="epochs", style=style, layout=fits())
        self.file = ipw.Text(
            description="file", placeholder=".safetensors, .pth or .pt on the computer of the kernel", style=style,
            layout=fits(),
        )  # fmt: skip
        self.model = ipw.Text(description="network", placeholder="such as resnet20", style=style, layout=fits())
        self.button = ipw.Button(
            description="open", button_style="primary", layout=ipw.Layout(margin="2px 0 2px 9.6em")
        )
        self.progress = ipw.IntProgress(description="training", style=style, layout=fits())
        self.status, self.below = ipw.HTML(), ipw.VBox()
        self.button.on_click(self._open)
        for control in (self.data, self.what):
            control.observe(self._choose, "value")
        self.controls = ipw.VBox([
            self.data, self.what, self.runs, self.methods, self.epochs, self.file, self.model, self.button,
            self.progress, self.status,
        ])  # fmt: skip
        self.widget = ipw.VBox([self.controls, self.below])
        self.widget.add_class("cram-bench-start")
        if not self._known.get(self.data.value):
            self.what.value = TRAIN
        self._choose()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)  # type: ignore[no-untyped-call]

    def _choose(self, change: Any = None) -> None:
        """Show the controls of what is chosen."""
        what = self.what.value
        shown = {
            self.runs: what == RUNS, self.methods: what == TRAIN, self.epochs: what == TRAIN, self.file: what == FILE,
            self.model: what in (FILE, NAMED), self.progress: False,
        }  # fmt: skip
        for control, wanted in shown.items():
            control.layout.display = None if wanted else "none"
        self.model.placeholder = "such as resnet20" if what == FILE else "torchvision:NAME, timm:NAME or hub:NAME"
        if what == RUNS:
            found = labelled(self._known.get(self.data.value, []))
            self.runs.options = list(found.items())
            self.runs.index = tuple(range(min(2, len(found))))
        self.status.value = texts.status("epochs 0: as many as suit the data", "#2e8b3d") if what == TRAIN else ""

    def _open(self, button: Any) -> None:
        self.button.disabled = True
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        """Make the explorer; say in one line why not."""
        try:
            self.status.value = texts.status("opening …", "#c06000")
            explorer = self._explorer()
            if self.explorer is not None:
                self.explorer.close()
            self.explorer = explorer
            self.below.children = (explorer.widget,)
            self.status.value = ""
        except Exception as error:
            self.status.value = texts.status(one_line(error), "#e0364c")
        finally:
            self.progress.layout.display = "none"
            self.button.disabled = False

    def _explorer(self) -> Explorer:
        from cram_bench.widgets.opening import of_model

        what = self.what.value
        if what in (FILE, NAMED):
            file = self.file.value.strip() if what == FILE else ""
            if what == FILE and not file:
                raise ValueError("name a file of weights")
            train, test, network = of_model(self.model.value.strip(), self.data.value, file)
            return Explorer({self.model.value.strip(): network}, test, train, self._options["sample"])
        runs = list(self.runs.value) if what == RUNS else self._trained()
        if not runs:
            raise ValueError(f"choose a run on {self.data.value}, or train one")
        return Explorer(runs, **self._options)

    def _trained(self) -> list[Run]:
        experiments = recipes.grid(self.data.value, list(self.methods.value), 1, "", self.epochs.value)
        runs = []
        for place, experiment in enumerate(experiments, 1):
            if self.store.find(experiment) is None:
                self.progress.layout.display, self.progress.value = None, 0
                self.progress.max = experiment.epochs
                self.status.value = texts.status(
                    f"training {recipes.label(experiment.method)}, {place} of {len(experiments)}", "#c06000"
                )
            done = threading.Event()
            follower = threading.Thread(target=self._follow, args=(experiment, done), daemon=True)
            follower.start()
            try:
                runs.append(ensure(experiment, self.store, progress=False))
            finally:
                done.set()
                follower.join()
        self._known.setdefault(self.data.value, [])
        self._known[self.data.value] += [run for run in runs if run not in self._known[self.data.value]]
        return runs

    def _follow(self, experiment: Experiment, done: threading.Event) -> None:
        """Let the bar show the last finished epoch, as the store knows it."""
        while not done.wait(0.5):
            table = self.store.table()
            own = table.loc[table["run"] == experiment.id, "epoch"].dropna()  # before the first there is none
            if len(own):
                self.progress.value = int(own.iloc[0])

    def close(self) -> None:
        """Stop the explorer, if there is one."""
        if self.explorer is not None:
            self.explorer.close()
        self.widget.close()
