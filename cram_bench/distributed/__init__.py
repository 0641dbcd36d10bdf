"""One training over many devices: the processes that torchrun starts, and what they agree on.

    with joined() as group:  # alone, where torchrun started nothing
        run = runs.ensure(experiment, group=group)

Batch size and learning rate are those of the whole group: every process takes its share of each batch. The first
process keeps the run store; the others follow it.
"""

from cram_bench.distributed.group import Group, Stopped, joined

__all__ = ["Group", "Stopped", "joined"]
