"""Image folders decoded as they are used: `cram_bench.data.streaming`, by its first name."""

from cram_bench.data.streaming import MEAN, STD, Streamed, default_workers, load

__all__ = ["MEAN", "STD", "Streamed", "default_workers", "load"]
