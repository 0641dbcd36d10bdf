"""From a pruned network to a faster one."""

from cram_bench.deploy.latency import latency
from cram_bench.deploy.structure import load, save, shrink, size

__all__ = ["latency", "load", "save", "shrink", "size"]
