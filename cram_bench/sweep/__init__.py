"""Many trainings over many processes or machines, over one run store.

experiments = sweep.read("sweep.yaml")
table = sweep.run(experiments, executor="slurm", slurm={"partition": "gpu"})

store/.sweeps/NAME/
  results.csv          a row per experiment, in their order
  lock                 held while a command follows the sweep
  jobs.json            jobs on Slurm that may still run
  notes/ID.json        an exception of an experiment, other than that it diverged
  20260101-120000-7/   logs of the jobs of one command
"""

from cram_bench.executors import SweepError
from cram_bench.sweep.reading import LIMIT, experiments, read
from cram_bench.sweep.results import OF_THE_MACHINE, STATES, State, counts, save, table
from cram_bench.sweep.running import name_of, run, safe
from cram_bench.sweep.view import View

__all__ = [
    "LIMIT",
    "OF_THE_MACHINE",
    "STATES",
    "State",
    "SweepError",
    "View",
    "counts",
    "experiments",
    "name_of",
    "read",
    "run",
    "safe",
    "save",
    "table",
]
