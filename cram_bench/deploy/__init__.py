"""From a pruned network to a faster one.

`shrink` leaves out what is gone as a whole. `swap_` lets those layers compute at their nonzeros only that
are faster so, and `dense_` puts them back.
"""

from cram_bench.deploy.convolution import SparseConv2d
from cram_bench.deploy.kernel import CompilerError
from cram_bench.deploy.latency import latency
from cram_bench.deploy.linear import SparseLinear
from cram_bench.deploy.structure import alive, composed, load, save, shrink, size
from cram_bench.deploy.swapping import dense_, swap_

__all__ = [
    "CompilerError", "SparseConv2d", "SparseLinear", "alive", "composed", "dense_", "latency",
    "load", "save", "shrink", "size", "swap_",
]  # fmt: skip
