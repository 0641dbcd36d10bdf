"""What waits in a sweep, which jobs hold what, and what became of it."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cram_bench.executors import Executor, NoAnswerError, SweepError
from cram_bench.experiment import Experiment
from cram_bench.runs import RunError, Store
from cram_bench.sweep.results import State, found_in


class Follow:
    """The state of a sweep as it goes: what waits, which jobs hold what, what became of it."""

    def __init__(
        self,
        wanted: Sequence[Experiment],
        store: Store,
        backend: Executor,
        notes: Path,
        per_job: int,
        retries: int,
        patience: float,
    ) -> None:
        self.store, self.backend, self.notes = store, backend, notes
        self.per_job, self.retries, self.patience = per_job, retries, patience
        self.wanted = {each.id: each for each in wanted}
        found = found_in(wanted, store)
        self.states = {
            key: there if isinstance(there := found.get(key), State) else State("cached" if there else "waiting")
            for key in self.wanted
        }
        self.jobs = {job: [key for key in held if key in self.wanted] for job, held in backend.attach().items()}
        held = {key for keys in self.jobs.values() for key in keys}
        for key in self.open():
            if key not in held:  # what an earlier command met is tried again
                (notes / f"{key}.json").unlink(missing_ok=True)
        self.queue = [key for key in self.open() if key not in held]
        self.alone: list[str] = []  # whose worker died: they share their next one with nobody
        self.deaths: Counter[str] = Counter()
        self.silent: dict[str, float] = {}
        self.since: dict[str, float] = {}  # when squeue, and when sbatch, began to fail
        self.submitted = False
        self.saved = {key: self._saved(key) for key in held}  # the last epoch's time when the job was submitted

    def open(self) -> list[str]:
        return [key for key, state in self.states.items() if state.name in ("waiting", "running")]

    def look(self) -> bool:
        """Look once at jobs and store, submit what can be; return whether all is settled."""
        found = self._poll()  # before the store: what a job finished before it ended is there then
        if any(state == "ended" for state, _ in found.values()):
            os.listdir(self.store.root)  # a network file system looks again
        self._update()
        for job, (state, reason) in found.items():
            left = [key for key in self.jobs[job] if key in self.open()]
            if state == "ended":
                self._ended(job, left, reason)
            else:
                for key in left:
                    tries = f"try {self.deaths[key] + 1}" if self.deaths[key] else ""
                    running = state == "running" and key == left[0]
                    self.states[key] = State(
                        "running" if running else "waiting", "; ".join(filter(None, (reason, tries)))
                    )
        if self.open():
            self._submit()
        return not self.open()

    def _poll(self) -> dict[str, tuple[str, str]]:
        now = time.monotonic()
        try:
            found = self.backend.poll(list(self.jobs)) if self.jobs else {}
        except NoAnswerError as error:  # says nothing of the jobs, which go on
            self._bear("squeue", error)
            for key in (key for held in self.jobs.values() for key in held if key in self.open()):
                self.states[key] = State(self.states[key].name, str(error))
            return {}
        self.since.pop("squeue", None)
        for job, (state, reason) in found.items():
            if state != "unknown":
                self.silent.pop(job, None)
            elif now - self.silent.setdefault(job, now) > self.patience:
                found[job] = "ended", f"no word of it for {self.patience:g} s, {reason}"
        return found

    def _bear(self, command: str, error: SweepError) -> None:
        """Bear with a command of Slurm that fails, for so long as there is patience."""
        now = time.monotonic()
        if now - self.since.setdefault(command, now) > self.patience:
            raise SweepError(f"{command} fails for {self.patience:g} s: {error}") from error

    def _saved(self, key: str) -> int | None:
        """Return when the last epoch of a training was saved."""
        try:
            return (self.store.root / ".training" / key / "checkpoint.pt").stat().st_mtime_ns
        except OSError:
            return None

    def _update(self) -> None:
        for key in self.open():
            if (self.store.root / key / "model.safetensors").is_file():  # find() would read all runs, at every look
                self.states[key] = State("finished")
                continue
            try:
                reason = self.store.failure(self.wanted[key])
            except RunError as error:
                self.states[key] = State("damaged", str(error))
                continue
            if reason:
                self.states[key] = State("failed", reason)
            elif (note := self._note(key)) and not note["again"]:
                self.states[key] = State("failed", note["reason"])
        waits = set(self.open())
        self.queue = [key for key in self.queue if key in waits]
        self.alone = [key for key in self.alone if key in waits]

    def _note(self, key: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.notes / f"{key}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _ended(self, job: str, left: list[str], reason: str) -> None:
        """Queue again what an ended job left; the first of it is what its worker died of."""
        log = self.backend.log(job)
        self.backend.forget(job)
        del self.jobs[job]
        self.silent.pop(job, None)
        if not left:
            return
        first = left[0]
        if (saved := self._saved(first)) is not None and saved != self.saved.get(first):
            self.deaths[first] = 0  # it gets on: a long training may meet many time limits
        self.deaths[first] += 1
        note = self._note(first)
        why = (note or {}).get("reason") or f"its worker ended without a result{f' ({reason})' if reason else ''}"
        if log:
            why += f"; see {log}"
        if reason == "CANCELLED":  # by somebody, who does not want it back
            for key in left:
                self.states[key] = State("died", "cancelled on Slurm")
        elif self.deaths[first] > self.retries:
            self.states[first] = State("died", why)
            self.queue = left[1:] + self.queue
        else:
            (self.notes / f"{first}.json").unlink(missing_ok=True)
            self.states[first] = State("waiting", f"try {self.deaths[first] + 1}: {why}")
            self.alone.append(first)
            self.queue = left[1:] + self.queue

    def _submit(self) -> None:
        waits = set(self.open())
        ready = [key for key in self.queue if waits.isdisjoint(self.wanted[key].needs)]
        groups = [[key] for key in self.alone]
        groups += [ready[start : start + self.per_job] for start in range(0, len(ready), self.per_job)]
        groups = groups[: self.backend.room()]
        if not groups:
            return
        saved = {key: self._saved(key) for group in groups for key in group}
        try:
            jobs = self.backend.submit([[(key, self.wanted[key].settings()) for key in group] for group in groups])
        except SweepError as error:
            if not self.submitted:  # what is wrong from the start stays wrong
                raise
            self._bear("sbatch", error)
            return
        self.since.pop("sbatch", None)
        self.submitted = True
        self.saved |= saved
        groups = groups[: len(jobs)]
        self.jobs |= zip(jobs, groups, strict=True)
        sent = {key for group in groups for key in group}
        self.queue = [key for key in self.queue if key not in sent]
        self.alone = [key for key in self.alone if key not in sent]
