"""What a sweep asks of the place where its jobs run, and what goes wrong there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

Settings = dict[str, Any]
"""What `Experiment.settings` returns: plain values, ready for JSON."""


class SweepError(ValueError):
    """A sweep cannot be read, started or followed; the message says in one line why."""


class NoAnswerError(SweepError):
    """For now nothing can be learned of any job; the message says why."""


class Executor(Protocol):
    """Runs jobs, each a list of experiments' settings, and says what became of them."""

    every: float
    """Seconds between two looks."""

    def attach(self) -> dict[str, list[str]]:
        """Return the jobs of an earlier command that may still run: job → ids of experiments."""

    def room(self) -> int:
        """Return how many more jobs may be submitted now."""

    def submit(self, jobs: Sequence[Sequence[tuple[str, Settings]]]) -> list[str]:
        """Submit jobs, each a list of (id, settings); return their names, fewer where the last ones did not go through.

        Raises:
            SweepError: none went through.
        """

    def poll(self, jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Return for each job ``waiting``, ``running``, ``ended`` or ``unknown``, and a reason, if one is known.

        Raises:
            NoAnswerError: who knows does not answer.
        """

    def forget(self, job: str) -> None:
        """Give back what an ended job held."""

    def log(self, job: str) -> Path | None:
        """Return the file that holds what the job wrote to standard error."""

    def close(self, settled: bool) -> str:
        """Stop what must not outlive the command; unless all is settled, return a line about what goes on."""
