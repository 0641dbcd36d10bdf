"""What loss and layers look like around a point: gradients, Fisher blocks, kernels of Optimal Brain Surgeon.

Pure functions of models, examples and tensors. Pruners (`cram_bench.prune`) and preconditioned optimizers stand on
them.
"""

from __future__ import annotations

from cram_bench.curvature.fisher import Fisher
from cram_bench.curvature.gram import Gram
from cram_bench.curvature.layout import Layout
from cram_bench.curvature.obs import joint, removal, singles
from cram_bench.curvature.samples import chunks, gradients

__all__ = ["Fisher", "Gram", "Layout", "chunks", "gradients", "joint", "removal", "singles"]
