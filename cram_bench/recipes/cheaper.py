"""CrAM at a lower price: methods of this project, that nobody has published.

What CrAM-Single and CrAM+-Ramp add to the list of CrAM+-Multi, 95 %, and that their plain steps give way to compressed
ones, was chosen on 5,000 held-out training images of CIFAR-10 (5 epochs, one seed), never on the test set.
"""

from __future__ import annotations

from cram_bench.recipes.cram import IMAGENET, MULTI, UPPER
from cram_bench.recipes.method import Method

_WIDE = (*MULTI, "global@0.95")
_SENTENCES = {"rho": 1e-3, "compressors": UPPER}

METHODS = {
    "cram-single": Method("CrAM-Single", {"rho": 0.02, "compressors": _WIDE, "ramp": True}, _SENTENCES),
    "cram-half": Method(
        "CrAM-Half",
        {"rho": 0.2, "compressors": MULTI, "halves": True},
        _SENTENCES,
        imagenet={"rho": 0.05, "compressors": IMAGENET},
        fixed=("halves",),
    ),
    "cram+-ramp": Method(
        "CrAM+-Ramp", {"rho": 0.2, "compressors": _WIDE, "ramp": True}, _SENTENCES, imagenet={"rho": 0.05}
    ),
}
