"""CrAM (Peste et al., arXiv 2207.14200).

ρ and the sparsities of CrAM+-Multi are those of the authors' ResNet-20 runs; CrAM and CrAM+ take the middle of that
range. On sentences ρ is, of 1e-3 and 1e-2, the better at 70 % on 800 held-out sentences of sst2.
"""

from __future__ import annotations

from cram_bench.recipes.method import Method

MULTI = tuple(f"global@{tenths / 10:g}" for tenths in range(3, 10))
"""Sparsities of CrAM+-Multi on CIFAR-10."""
UPPER = MULTI[2:]
"""Those on sentences."""
IMAGENET = ("global@0.5", "global@0.7", "global@0.9")
HIGH = tuple(f"global@{sparsity:g}" for sparsity in (0.5, 0.7, 0.8, 0.9, 0.95))
"""The authors' list for high sparsities, with ρ = 0.15."""

_ONE = {"rho": 0.2, "compressors": ("global@0.7",)}

METHODS = {
    "cram": Method("CrAM", _ONE, {"rho": 1e-3}, {"rho": 0.05}),
    "cram+": Method("CrAM+", _ONE, {"rho": 1e-3}, {"rho": 0.05}),
    "cram+-multi": Method(
        "CrAM+-Multi",
        {"rho": 0.2, "compressors": MULTI},
        sentences={"rho": 1e-3, "compressors": UPPER},
        imagenet={"rho": 0.05, "compressors": IMAGENET},
    ),
}
