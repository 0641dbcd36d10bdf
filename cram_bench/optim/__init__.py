"""Optimizers that look beyond the weights they stand on. Each wraps any torch optimizer.

They know compression operators, and nothing of runs or plots. A new one is a new file, with its part of an experiment
below it, and a line here: in `STEPS` where it is a rule of a step, in `BASES` where it is what a step is taken with, in
`PRUNINGS` where it prunes as a training goes.
"""

from cram_bench.optim.base import TwoPass, Wrapper
from cram_bench.optim.bases import SGD, AdamW, Base
from cram_bench.optim.cram import CrAM, CrAMPlusStep, CrAMSingle, CrAMSingleStep, CrAMStep
from cram_bench.optim.gradual import Gradual, GradualMasks
from cram_bench.optim.held import HeldMasks, OneShot, Pruning
from cram_bench.optim.looking import CrAMLookingStep
from cram_bench.optim.preconditioned import EFCP, GGT, MFAC
from cram_bench.optim.preconditioned_bases import GGTBase, LowRankMFACBase, MFACBase, SparseGGTBase, SparseMFACBase
from cram_bench.optim.rings import Dense, LowRank, TopK
from cram_bench.optim.safe import SAFE, SAFEStep
from cram_bench.optim.sam import SAM, MomentumSAM, MomentumSAMStep, SAMStep
from cram_bench.optim.step import Plain, Step
from cram_bench.optim.structured import Structured

_BASES = (SGD, AdamW, MFACBase, SparseMFACBase, LowRankMFACBase, GGTBase, SparseGGTBase)
BASES: dict[str, type[Base]] = {part.kind: part for part in _BASES}
"""Base optimizers by the name that settings use."""
STEPS: dict[str, type[Step]] = {
    part.kind: part
    for part in (Plain, SAMStep, MomentumSAMStep, CrAMStep, CrAMPlusStep, CrAMSingleStep, CrAMLookingStep, SAFEStep)
}
"""Rules of a step by the name that settings use."""
PRUNINGS: dict[str, type[Pruning]] = {part.kind: part for part in (OneShot, Gradual, Structured)}
"""Ways to prune in training, by the name that settings use."""

__all__ = [
    "BASES",
    "EFCP",
    "GGT",
    "MFAC",
    "PRUNINGS",
    "SAFE",
    "SAM",
    "STEPS",
    "CrAM",
    "CrAMSingle",
    "Dense",
    "Gradual",
    "GradualMasks",
    "HeldMasks",
    "LowRank",
    "MomentumSAM",
    "OneShot",
    "Plain",
    "Pruning",
    "Step",
    "Structured",
    "TopK",
    "TwoPass",
    "Wrapper",
]
