"""The states of a sweep, shown while it goes."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cram_bench.experiment import Experiment, differing, setting
from cram_bench.runs import describe
from cram_bench.sweep.results import State, counts
from cram_bench.untrusted import printable


class View:
    """Show the states of a sweep: a table that is updated in place on a terminal, a few plain lines in a log.

    In a log there is a line for each tenth that is settled, and one for each experiment that failed or whose worker
    died.

    Args:
        experiments: in the order of the table.
        stream: where to, by default standard error.
    """

    def __init__(self, experiments: Sequence[Experiment], stream: Any = None) -> None:
        self.stream = stream or sys.stderr
        varying = differing(experiments, besides=("method", "seed", "warmup_epochs"))
        self.labels = {}
        for each in experiments:
            values = [(name, setting(each, name)) for name in varying]
            shown = [f"{name} {' '.join(v) if isinstance(v, list) else v}" for name, v in values if v not in ([], "")]
            self.labels[each.id] = printable(", ".join([describe(each), *shown]))
        self.tenth, self.shown = -1, dict[str, State]()
        self.live: Any = None

    def __enter__(self) -> View:
        if self.stream.isatty():
            with contextlib.suppress(ImportError):  # plain lines, then
                from rich.console import Console
                from rich.live import Live

                self.live = Live(console=Console(file=self.stream), auto_refresh=False, vertical_overflow="ellipsis")
                self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, states: Mapping[str, State]) -> None:
        """Show how things stand."""
        if self.live is not None:
            if states != self.shown:  # no flicker
                self.shown = dict(states)
                self.live.update(self._table(states), refresh=True)
            return
        for key, state in states.items():
            lost = state.name in ("failed", "died", "damaged") or re.match(r"try \d+: ", state.note)
            if lost and self.shown.get(key) != state:
                self.shown[key] = state
                self.say(f"{self.labels[key]}: {state.name}, {state.note}")
        settled = sum(state.name not in ("waiting", "running") for state in states.values())
        tenth = 10 * settled // max(1, len(states))
        if tenth > self.tenth:
            self.tenth = tenth
            self.say(counts(states))

    def say(self, line: str) -> None:
        """Print a line, above the table if there is one."""
        line = printable(line)
        if line and self.live is not None:
            self.live.console.print(line, markup=False, highlight=False)
        elif line:
            print(line, file=self.stream, flush=True)

    def _table(self, states: Mapping[str, State]) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        colours = {"running": "cyan", "finished": "green", "cached": "green", "failed": "red"}
        colours |= {"died": "red", "damaged": "red"}
        shown = Table(box=None, pad_edge=False)
        for column in ("run", "experiment", "state", ""):
            shown.add_column(column, overflow="ellipsis", no_wrap=True)
        few = len(states) <= self.live.console.height - 4
        for key, state in states.items():
            if few or state.name in ("running", "failed", "died", "damaged"):
                cells = (
                    key,
                    self.labels[key],
                    Text(state.name, colours.get(state.name, "")),
                    Text(printable(state.note)),
                )
                shown.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
        return Group(Text(counts(states)), shown)
