"""Where the jobs of a sweep run: processes of this machine, or Slurm; both through submitit.

A job trains a few experiments one after the other, by `work`. What came of them is read from the run store alone:
nothing that a worker pickled is loaded.
"""

from cram_bench.executors.base import Executor, NoAnswerError, SweepError
from cram_bench.executors.local import Local, gpu_of
from cram_bench.executors.slurm import Slurm, slurm_parameters, squeue_states
from cram_bench.executors.worker import work

__all__ = [
    "Executor",
    "Local",
    "NoAnswerError",
    "Slurm",
    "SweepError",
    "gpu_of",
    "slurm_parameters",
    "squeue_states",
    "work",
]
