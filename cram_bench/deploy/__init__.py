"""From a pruned network to a faster one, and out of here.

`shrink` leaves out what is gone as a whole. `swap_` lets those layers compute at their nonzeros only that
are faster so, and `dense_` puts them back. `pack` stores what is not zero.
`write_onnx` and `write_hub` hand a network to other programs and people.
"""

from cram_bench.deploy.convolution import SparseConv2d
from cram_bench.deploy.hub import from_hub, write_hub
from cram_bench.deploy.kernel import CompilerError
from cram_bench.deploy.latency import latency, timed
from cram_bench.deploy.linear import SparseLinear
from cram_bench.deploy.normalisation import ChannelwiseBatchNorm2d
from cram_bench.deploy.onnx import compared, write_onnx
from cram_bench.deploy.packing import pack, sizes, unpack_
from cram_bench.deploy.structure import alive, composed, load, save, shrink, size
from cram_bench.deploy.swapping import dense_, swap_

__all__ = [
    "ChannelwiseBatchNorm2d", "CompilerError", "SparseConv2d", "SparseLinear", "alive", "compared", "composed",
    "dense_", "from_hub", "latency", "load", "pack", "save", "shrink", "size", "sizes", "swap_", "timed", "unpack_",
    "write_hub", "write_onnx",
]  # fmt: skip
