"""Jobs as arrays on Slurm: its parameters, and what squeue and sbatch say."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cram_bench.executors.base import NoAnswerError, Settings, SweepError
from cram_bench.executors.worker import log_of, logs, private, python, submitit, tidy, work
from cram_bench.files import write


class Slurm:
    """Jobs as arrays on Slurm, which go on without the sweep; a later command finds them by their noted numbers.

    Args:
        folder: of the sweep; must be visible on all nodes, as the store.
        name: of the jobs on Slurm.
        common: arguments of `work` that all jobs have.
        parameters: as `slurm_parameters` returns them.
        workers: jobs of an array that run at once, 0 for as many as Slurm lets.
    """

    every = 5.0
    array = 1000  # jobs; Slurm's own default limit is 1001
    grace = 10.0  # seconds in which a job whose experiments are done may end

    def __init__(self, folder: Path, name: str, common: Settings, parameters: Settings, workers: int = 0) -> None:
        if "%" in str(folder):  # submitit and sbatch would put numbers there
            raise SweepError(f"on Slurm the path of the store must be free of %, not {str(folder)!r}")
        self.name, self.common, self.logs, self.notes = (
            f"cram-bench-{name}",
            common,
            logs(folder),
            folder / "jobs.json",
        )
        try:
            self.executor = submitit().SlurmExecutor(folder=self.logs, python=python())
        except RuntimeError:
            raise SweepError("there is no Slurm here: no srun; --executor local trains on this machine") from None
        self.executor.update_parameters(job_name=self.name, **parameters)
        self.at_once = parameters.get("array_parallelism", workers)
        self.jobs: dict[str, list[str]] = {}

    def attach(self) -> dict[str, list[str]]:
        """Return the noted jobs that Slurm still has by this name, or all while it is silent; forget the others."""
        try:
            noted = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        self.jobs = dict(noted)
        with contextlib.suppress(NoAnswerError):
            self._forget_ended()
        return dict(self.jobs)

    def room(self) -> int:
        """As many as there are: Slurm has a queue of its own."""
        return sys.maxsize

    def submit(self, jobs: Sequence[Sequence[tuple[str, Settings]]]) -> list[str]:
        """Submit job arrays and note their numbers, up to the first that sbatch refuses.

        Raises:
            SweepError: sbatch refuses the first.
        """
        names: list[str] = []
        private(self.logs)
        for start in range(0, len(jobs), self.array):
            part = jobs[start : start + self.array]
            calls = [functools.partial(work, [each for _, each in job], **self.common) for job in part]
            self.executor.update_parameters(array_parallelism=self.at_once or len(part))  # submitit's own limit is 256
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it then raises
                    submitted = self.executor.submit_array(calls)
            except RuntimeError as error:
                for path in (*self.logs.glob("[0-9a-f]*.pkl"), *self.logs.glob(".submission_file_*.sh")):
                    if "_submitted" not in path.name and "_result" not in path.name:  # of no job
                        path.unlink(missing_ok=True)
                if names:
                    break
                raise SweepError(f"Slurm refuses the jobs: {_said(str(error))}") from error
            for job, sent in zip(part, submitted, strict=True):
                self.jobs[sent.job_id] = [name for name, _ in job]
                names.append(sent.job_id)
            write(self.notes, json.dumps(self.jobs, indent=1))
        return names

    def poll(self, jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Return what squeue says of the jobs.

        Raises:
            NoAnswerError: squeue fails.
        """
        call = ["squeue", "--noheader", "--array", "--states=all", f"--name={self.name}", "--format=%i|%T|%r"]
        try:
            said = subprocess.run(
                call, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=True
            ).stdout
        except subprocess.CalledProcessError as error:
            raise NoAnswerError(f"squeue says: {_said(error.stderr)}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoAnswerError("squeue does not answer") from error
        states = squeue_states(said)
        return {job: states.get(job) or states.get(job.partition("_")[0]) or ("ended", "") for job in jobs}

    def forget(self, job: str) -> None:
        """Strike an ended job off the note."""
        self.jobs.pop(job, None)
        write(self.notes, json.dumps(self.jobs, indent=1))
        tidy(self.logs.parent, job)

    def log(self, job: str) -> Path | None:
        """Return the file of the job's standard error."""
        return log_of(self.logs.parent, job)

    def close(self, settled: bool) -> str:
        """Leave the jobs to Slurm; forget those that ended, which some do a moment after their last experiment."""
        limit = time.monotonic() + self.grace
        with contextlib.suppress(NoAnswerError):
            while settled and self.jobs and "running" in self._forget_ended() and time.monotonic() < limit:
                time.sleep(0.5)
        if not self.jobs:
            return ""
        kept = f"{len(self.jobs)} jobs stay on Slurm, and the same command looks again"
        return f"{kept}; scancel --name={self.name} stops them"

    def _forget_ended(self) -> set[str]:
        """Forget the jobs that ended; return the states of the others, ``running`` for unknown ones."""
        found = self.poll(list(self.jobs)) if self.jobs else {}
        for job, (state, _) in found.items():
            if state == "ended":
                self.forget(job)
        return {"running" if state == "unknown" else state for state, _ in found.values()} - {"ended"}


_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
          "REVOKED", "TIMEOUT"}  # fmt: skip
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_GOING = {"RUNNING", "SUSPENDED", "RESIZING", "STOPPED", "SIGNALING", "STAGE_OUT"}


def squeue_states(said: str) -> dict[str, tuple[str, str]]:
    r"""Read lines of job|STATE|reason; what ended is called so, what only completes or is in a new state, unknown.

    >>> squeue_states("7_0|RUNNING|None\n7_1|PENDING|Priority\n6|OUT_OF_MEMORY|OutOfMemory\n")
    {'7_0': ('running', ''), '7_1': ('waiting', 'Priority'), '6': ('ended', 'OUT_OF_MEMORY')}
    """
    found = {}
    for line in said.splitlines():
        job, state, reason = [*line.strip().split("|", 2), "", ""][:3]
        job = job.partition("_[")[0]  # what of an array never became a job of its own
        if state in _ENDED:
            found[job] = "ended", state
        elif state in _WAITING:
            found[job] = "waiting", "" if reason == "None" else reason
        elif state in _GOING:
            found[job] = "running", "" if state == "RUNNING" else state
        else:
            found[job] = "unknown", state
    return found


def slurm_parameters(given: Mapping[str, Any]) -> Settings:
    """Return parameters for submitit's Slurm executor: those of sbatch, with _ for -.

    ``timeout`` is the limit of a job in minutes, by default 60, after which it is resubmitted; ``cpus`` are those of a
    job.

    Raises:
        SweepError: a parameter is unknown (with a suggestion), the sweep's own, or of no use.

    >>> slurm_parameters({"partition": "gpu", "cpus": 4, "mem": "8GB"})
    {'time': 60, 'partition': 'gpu', 'cpus_per_task': 4, 'mem': '8GB'}
    """
    from cram_bench.models import unknown

    short = {"timeout": "time", "cpus": "cpus_per_task"}
    own = ("job_name", "nodes", "ntasks_per_node", "num_gpus")
    known = [name for name in submitit().SlurmExecutor._valid_parameters() if name not in own]
    parameters: Settings = {"time": 60}
    named: dict[str, str] = {}
    for name, value in given.items():
        if name in own:
            raise SweepError(
                f"{name} is not free in a sweep: a job is one process on one node, and called as the sweep"
            )
        target = short.get(name, name)
        if target not in known:
            raise SweepError(unknown("Slurm parameter", name, sorted([*known, *short])))
        if target in named:
            raise SweepError(f"{named[target]} and {name} are the same Slurm parameter")
        named[target] = name
        counts = ("time", "cpus_per_task", "cpus_per_gpu", "gpus_per_node", "gpus_per_task", "array_parallelism")
        if target in counts and (type(value) is not int or value < 1):
            minutes = " of minutes" if target == "time" else ""
            raise SweepError(f"the Slurm parameter {name} must be a whole number{minutes}, at least 1, not {value!r}")
        if target.startswith("mem") and not re.fullmatch(r"\d+(K|M|G|T)B?", str(value)):
            raise SweepError(f"the Slurm parameter {name} must have a unit, such as 8GB, not {value!r}")
        if target in ("setup", "teardown", "srun_args") and isinstance(value, str):
            value = shlex.split(value) if target == "srun_args" else [value]
        parameters[target] = value
    limit = 60 * parameters["time"]  # submitit wants to hear 90 s before, and shorter jobs would hear at once
    warned = parameters.get("signal_delay_s", 90)
    if "signal_delay_s" not in named and warned > limit // 4:
        parameters["signal_delay_s"] = limit // 4
    elif type(warned) is not int or not 1 <= warned < limit:
        raise SweepError(
            "the Slurm parameter signal_delay_s must be a whole number of seconds, "
            f"below the {limit} of a job, not {warned!r}"
        )
    return parameters


def _said(text: str) -> str:
    r"""Return in one line what a command of Slurm complained about, without its name.

    >>> _said("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed\n")
    'invalid partition specified: x; Batch job submission failed'
    """
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or "it does not say why"
