"""Reports made again: `cram_bench.report.reproduce`, by its first name."""

from cram_bench.report.reproduce import ReportError, reproduce

__all__ = ["ReportError", "reproduce"]
