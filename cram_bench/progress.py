"""Progress of a training and of other long steps, in a terminal, in a notebook, and in a log."""

from __future__ import annotations

import contextlib
import html
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from cram_bench.train import Callback, Fit
from cram_bench.untrusted import printable


class Progress(Callback):
    """Show loss, accuracy and time left: a bar on a terminal and in a live notebook, plain lines in a log.

    In a notebook one output is updated in place, and its last state is what a saved notebook keeps. In a log, such
    as that of CI, there are at most ten lines a training and no control characters.

    Args:
        label: stands in front.
        stream: where to write, by default standard error, or the notebook's output if there is one.
    """

    def __init__(self, label: str = "train", stream: Any = None) -> None:
        self.label = printable(label)
        self.notebook = stream is None and _in_notebook()
        self.stream = stream or sys.stderr
        self.bar: Any = None  # tqdm's on a terminal, a display handle in a notebook
        self.start = self.shown = 0.0
        self.first = 0

    def on_start(self, fit: Fit) -> None:
        self.start, self.first = time.perf_counter(), fit.epoch
        if self.notebook:
            from IPython.display import HTML, display

            self.bar = display(HTML(html.escape(f"{self.label}: starting")), display_id=True)
        elif self.stream.isatty():
            from tqdm import tqdm

            total, done = fit.epochs * fit.steps_per_epoch, fit.epoch * fit.steps_per_epoch
            self.bar = tqdm(
                total=total, initial=done, desc=self.label, file=self.stream, unit="step", dynamic_ncols=True
            )

    def on_step(self, fit: Fit, step: int, loss: Tensor, correct: Tensor, seen: int) -> None:
        if self.bar is None:
            return
        if not self.notebook:
            self.bar.update()
        if time.perf_counter() - self.shown > 0.5:  # reading the sums waits for the device
            self.shown = time.perf_counter()
            state = f"loss {float(loss) / seen:.3f}, accuracy {float(correct) / seen:.1%}"
            if self.notebook:
                done = fit.epoch + (step + 1) / fit.steps_per_epoch
                self._draw(
                    f"epoch {fit.epoch + 1}/{fit.epochs}, {state}, {self._left(fit, done):.0f} s left",
                    done / fit.epochs,
                )
            else:
                self.bar.set_postfix_str(state, refresh=False)

    def on_epoch(self, fit: Fit) -> None:
        row, last, self.shown = fit.history[-1], fit.epoch == fit.epochs, time.perf_counter()
        test = f", test {row['test_accuracy']:.1%}" if "test_accuracy" in row else ""
        state = (
            f"epoch {fit.epoch}/{fit.epochs}, loss {row['train_loss']:.3f}, accuracy {row['train_accuracy']:.1%}{test}"
        )
        time_note = f"{time.perf_counter() - self.start:.0f} s" if last else f"{self._left(fit, fit.epoch):.0f} s left"
        if self.notebook:
            self._draw(f"{state}, {time_note}", fit.epoch / fit.epochs)
        elif self.bar is not None:  # the last state of the bar is that of the finished epoch
            self.bar.set_postfix_str(f"loss {row['train_loss']:.3f}, accuracy {row['train_accuracy']:.1%}{test}")
        elif last or fit.epoch % -(-fit.epochs // 10) == 0:
            print(f"{self.label}: {state}, {time_note}", file=self.stream, flush=True)

    def on_end(self, fit: Fit) -> None:
        if self.bar is not None and not self.notebook:
            self.bar.close()

    def _left(self, fit: Fit, done: float) -> float:
        return (time.perf_counter() - self.start) / max(done - self.first, 1e-9) * (fit.epochs - done)

    def _draw(self, text: str, fraction: float) -> None:
        from IPython.display import HTML

        bar = f'<progress value="{fraction:.4f}" style="vertical-align: middle"></progress>'
        self.bar.update(HTML(f"<div>{bar} {html.escape(self.label)}: {html.escape(text)}</div>"))


@contextlib.contextmanager
def working(text: str, stream: Any = None) -> Iterator[None]:
    """Show for the length of a block that `text` goes on: with its seconds on a terminal, as one line in a log.

    On a terminal the line is taken away in the end, so that what the block found stands alone.

    Args:
        text: what is done, such as ``curvature``.
        stream: where to write, by default standard error.
    """
    stream, text = stream or sys.stderr, printable(text)
    if not stream.isatty():
        print(f"{text} …", file=stream, flush=True)
        yield
        return
    done, start = threading.Event(), time.perf_counter()

    def tick() -> None:
        while True:
            print(f"\r{text} … {time.perf_counter() - start:.0f} s", end="", file=stream, flush=True)
            if done.wait(1):
                return

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print("\r\x1b[K", end="", file=stream, flush=True)


def _in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs this code (and not merely IPython in a terminal)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
