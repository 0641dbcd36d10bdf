"""Where the jobs of a sweep run: processes of this machine, or Slurm; both through submitit.

A job trains a few experiments one after the other, by `work`. What came of them is read from the run store alone:
nothing that a worker pickled is loaded. Loads torch only in the worker.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from cram_bench.files import holder, write
from cram_bench.untrusted import printable

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


def work(
    settings: Sequence[Settings],
    store: str,
    notes: str,
    options: Settings,
    command: Sequence[str] = (),
    alive: str = "",
    gpu: str = "",
    threads: int = 0,
) -> None:
    """Train experiments one after the other into the store: the function of every job.

    One that diverges is noted in the store. Any other exception is noted in `notes`/ID.json; those that another try may
    not meet (memory, files, a time limit, whatever torch or CUDA stumbles over) end the worker, for a process may be
    broken then; the others only that experiment.

    Args:
        settings: of the experiments.
        store: folder of the run store.
        notes: folder for exceptions.
        options: of `runs.ensure`.
        command: what the user called, for the run's description.
        alive: a file that the sweep keeps locked; the worker ends soon after the lock is free. Empty: it lives by
        itself.
        gpu: the only GPU to use, as ``CUDA_VISIBLE_DEVICES`` names it; empty for those that are visible.
        threads: of torch, where neither `options` nor ``OMP_NUM_THREADS`` says; 0 for what Slurm grants, if it does.
    """
    if alive:
        threading.Thread(target=_end_with, args=(Path(alive), os.getppid()), daemon=True).start()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if command:
        sys.argv = list(command)

    import torch
    from submitit.core.utils import UncompletedJobError

    from cram_bench import runs
    from cram_bench.experiment import Experiment
    from cram_bench.train import DivergedError

    granted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or "0"
    threads = threads or (int(granted) if granted.isdigit() else 0)
    if threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    for each in settings:
        experiment = Experiment.of(each)
        try:
            runs.ensure(experiment, runs.Store(store), **options)
        except Exception as error:
            again = isinstance(error, (MemoryError, OSError, RuntimeError)) and not isinstance(error, DivergedError)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, UncompletedJobError):  # submitit raises it when Slurm is about to end the job
                reason = "its job came to its time limit, the Slurm parameter timeout"
            Path(notes).mkdir(parents=True, exist_ok=True)
            write(Path(notes) / f"{experiment.id}.json", json.dumps({"reason": reason, "again": again}))
            if again:
                raise
            print(printable(f"{experiment.id}: {reason}"), file=sys.stderr, flush=True)


def _end_with(path: Path, parent: int) -> None:
    """End this process when the lock on `path` is free or the parent gone, whatever it does; the store survives it."""
    while os.getppid() == parent and holder(path) is not None:
        time.sleep(0.5)
    os._exit(1)


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
        self.workers, self.gpus, self.logs = workers, gpus, _logs(folder)
        self.common = common | {"alive": str(alive), "threads": threads}
        self.executor = _submitit().LocalExecutor(folder=_private(self.logs), python=_python())
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
        _tidy(self.logs.parent, job)

    def log(self, job: str) -> Path | None:
        """Return the file of the job's standard error."""
        return _log(self.logs.parent, job)

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
            _logs(folder),
            folder / "jobs.json",
        )
        try:
            self.executor = _submitit().SlurmExecutor(folder=self.logs, python=_python())
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
        _private(self.logs)
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
        _tidy(self.logs.parent, job)

    def log(self, job: str) -> Path | None:
        """Return the file of the job's standard error."""
        return _log(self.logs.parent, job)

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
    known = [name for name in _submitit().SlurmExecutor._valid_parameters() if name not in own]
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


def gpu_of(place: int, gpus: Sequence[str]) -> str:
    """Return the GPU of a process, in turn.

    >>> [gpu_of(place, ["0", "1"]) for place in range(3)], gpu_of(0, [])
    (['0', '1', '0'], '')
    """
    return gpus[place % len(gpus)] if gpus else ""


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise SweepError("sweeps need the extra: pip install 'cram-bench[sweep]'") from None
    return submitit


def _logs(folder: Path) -> Path:
    """Return a folder for one command: numbers of processes and jobs recur, and their files would be taken for new."""
    return folder / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def _private(folder: Path) -> Path:
    """Make a folder that only its owner can enter: who can change a pickle runs anything as its owner.

    Raises:
        SweepError: somebody else made it, or the file system knows no owners.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_own(folder)
    return folder


def _python() -> str:
    """Return the command of a worker, to which submitit appends ``-u -m submitit.core._submit FOLDER``."""
    return f"{shlex.quote(sys.executable)} -u -m cram_bench.executors"


def _work_in(folder: Path) -> None:
    """Do what was pickled in a folder, as submitit does, if nobody else can have written it."""
    from submitit.core import job_environment, submission

    os.environ["SUBMITIT_FOLDER"] = str(folder)
    pickled = job_environment.JobEnvironment().paths.submitted_pickle
    limit = time.monotonic() + 60  # it gets this name when the number of its job is known
    while not os.path.lexists(pickled) and time.monotonic() < limit:
        time.sleep(0.05)
    _check_own(folder)
    _check_own(pickled)
    submission.process_job(folder)


def _check_own(path: Path) -> None:
    """Refuse a pickle, or a folder of pickles, that another user wrote or can change.

    Raises:
        SweepError: so it is; the message says why.
    """
    found = os.stat(path, follow_symlinks=False)
    if stat.S_ISLNK(found.st_mode):
        why = "is a link"
    elif found.st_uid != os.geteuid():
        why = f"belongs to another user, number {found.st_uid}"
    elif stat.S_ISDIR(found.st_mode) and found.st_mode & 0o077:
        why = f"can be entered by others than its owner (mode {found.st_mode & 0o777:o})"
    else:
        return
    raise SweepError(f"{path} {why}, and pickles in it may run anything: put the store on a disk of your own")


def _log(folder: Path, job: str) -> Path | None:
    return max(folder.glob(f"*/{job}_0_log.err"), default=None)


def _tidy(folder: Path, job: str) -> None:
    for name in (f"{job}_submitted.pkl", f"{job}_0_result.pkl"):
        for path in folder.glob(f"*/{name}"):
            path.unlink(missing_ok=True)


def _said(text: str) -> str:
    r"""Return in one line what a command of Slurm complained about, without its name.

    >>> _said("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed\n")
    'invalid partition specified: x; Batch job submission failed'
    """
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or "it does not say why"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes with SIGINT blocked, so that Ctrl-C reaches the sweep alone, which stops them in order."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


if __name__ == "__main__":
    _work_in(Path(sys.argv[-1]))
