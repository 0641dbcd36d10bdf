"""Optimizers that look beyond the weights they stand on. Each wraps any torch optimizer.

They know compression operators, and nothing of runs or plots. A new one is a new file and a line here; a method
that people name on the command line is one more line in `cram_bench.experiment.METHODS`.
"""

from cram_bench.optim.base import TwoPass, Wrapper
from cram_bench.optim.cram import CrAM, CrAMSingle
from cram_bench.optim.held import HeldMasks
from cram_bench.optim.sam import SAM, MomentumSAM

__all__ = ["SAM", "CrAM", "CrAMSingle", "HeldMasks", "MomentumSAM", "TwoPass", "Wrapper"]
