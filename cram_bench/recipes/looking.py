"""CrAM with a pruner's masks: of this project, nothing published describes it."""

from __future__ import annotations

from cram_bench.recipes.cram import MULTI, UPPER
from cram_bench.recipes.method import Method

METHODS = {
    "cram+-looking": Method(
        "CrAM+-Looking",
        {"step": "cram+-looking", "rho": 0.2, "compressors": (*MULTI, "global@0.95")},
        sentences={"rho": 1e-3, "compressors": UPPER},
        imagenet={"rho": 0.05},
    ),
}
