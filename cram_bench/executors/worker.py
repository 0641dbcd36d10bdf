"""What a job does, and the folders of pickles through which submitit starts it, which nobody else may write.

Loads torch only in the worker.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cram_bench.executors.base import Settings, SweepError
from cram_bench.files import holder, write
from cram_bench.untrusted import printable


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


def submitit() -> Any:
    """Import submitit.

    Raises:
        SweepError: it is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise SweepError("sweeps need the extra: pip install 'cram-bench[sweep]'") from None
    return submitit


def logs(folder: Path) -> Path:
    """Return a folder for one command: numbers of processes and jobs recur, and their files would be taken for new."""
    return folder / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def private(folder: Path) -> Path:
    """Make a folder that only its owner can enter: who can change a pickle runs anything as its owner.

    Raises:
        SweepError: somebody else made it, or the file system knows no owners.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_own(folder)
    return folder


def python() -> str:
    """Return the command of a worker, to which submitit appends ``-u -m submitit.core._submit FOLDER``."""
    return f"{shlex.quote(sys.executable)} -u -m cram_bench.executors"


def work_in(folder: Path) -> None:
    """Do what was pickled in a folder, as submitit does, if nobody else can have written it."""
    from submitit.core import job_environment, submission

    os.environ["SUBMITIT_FOLDER"] = str(folder)
    pickled = job_environment.JobEnvironment().paths.submitted_pickle
    limit = time.monotonic() + 60  # it gets this name when the number of its job is known
    while not os.path.lexists(pickled) and time.monotonic() < limit:
        time.sleep(0.05)
    check_own(folder)
    check_own(pickled)
    submission.process_job(folder)


def check_own(path: Path) -> None:
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


def log_of(folder: Path, job: str) -> Path | None:
    """Return the file of a job's standard error, the newest of its number."""
    return max(folder.glob(f"*/{job}_0_log.err"), default=None)


def tidy(folder: Path, job: str) -> None:
    """Remove what submitit pickled for a job."""
    for name in (f"{job}_submitted.pkl", f"{job}_0_result.pkl"):
        for path in folder.glob(f"*/{name}"):
            path.unlink(missing_ok=True)
