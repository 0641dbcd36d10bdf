"""Jobs as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cram_bench.executors.base import Settings
from cram_bench.executors.worker import log_of, logs, private, python, submitit, tidy, work


class Local:
    """Jobs as processes of this machine, which end with the sweep, however it ends.

    Args:
        folder: of the sweep.
        alive: the file that the sweep keeps locked.
        common: arguments of `work` that all jobs have.
        workers: processes at once.
        gpus: names of GPUs, of which each process gets one; empty to hide none.
        threads: of torch in each process.
    """

    every = 0.2

    def __init__(
        self, folder: Path, alive: Path, common: Settings, workers: int, gpus: Sequence[str] = (), threads: int = 0
    ) -> None:
        self.workers, self.gpus, self.logs = workers, gpus, logs(folder)
        self.common = common | {"alive": str(alive), "threads": threads}
        self.executor = submitit().LocalExecutor(folder=private(self.logs), python=python())
        self.executor.update_parameters(timeout_min=60 * 24 * 365)  # submitit's own limit is two minutes
        self.jobs: dict[str, tuple[Any, int]] = {}

    def attach(self) -> dict[str, list[str]]:
        """Nothing: the processes of an earlier command ended with it."""
        return {}

    def room(self) -> int:
        """Return how many processes may still be started."""
        return self.workers - len(self.jobs)

    def submit(self, jobs: Sequence[Sequence[tuple[str, Settings]]]) -> list[str]:
        """Start a process per job."""
        names = []
        for job in jobs:
            place = min(set(range(self.workers)) - {place for _, place in self.jobs.values()})
            own = {"gpu": gpu_of(place, self.gpus)}
            with _interrupts_held():
                submitted = self.executor.submit(work, [each for _, each in job], **self.common, **own)
            self.jobs[submitted.job_id] = submitted, place
            names.append(submitted.job_id)
        return names

    def poll(self, jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Return ``running`` or ``ended``."""
        return {job: ("ended" if self.jobs[job][0].done() else "running", "") for job in jobs}

    def forget(self, job: str) -> None:
        """Free the place of an ended process, and what submitit pickled: a process number comes again."""
        self.jobs.pop(job)
        tidy(self.logs.parent, job)

    def log(self, job: str) -> Path | None:
        """Return the file of the job's standard error."""
        return log_of(self.logs.parent, job)

    def close(self, settled: bool) -> str:
        """Wait for the processes, which end by themselves when the sweep's lock is free, and kill what stays."""
        limit = time.monotonic() + 10
        while (left := [job for job, _ in self.jobs.values() if not job.done()]) and time.monotonic() < limit:
            time.sleep(0.05)
        for job in left:
            os.kill(int(job.job_id), signal.SIGKILL)
        for job in list(self.jobs):
            self.forget(job)
        with contextlib.suppress(OSError):
            self.logs.rmdir()  # if nothing was to be trained
        return ""


def gpu_of(place: int, gpus: Sequence[str]) -> str:
    """Return the GPU of a process, in turn.

    >>> [gpu_of(place, ["0", "1"]) for place in range(3)], gpu_of(0, [])
    (['0', '1', '0'], '')
    """
    return gpus[place % len(gpus)] if gpus else ""


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes with SIGINT blocked, so that Ctrl-C reaches the sweep alone, which stops them in order."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
