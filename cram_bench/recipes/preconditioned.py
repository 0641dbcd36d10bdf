"""M-FAC (Frantar et al., arXiv 2107.03356), GGT (Agarwal et al., arXiv 1806.02958), and both compressed: EFCP
(Modoranu et al., arXiv 2306.06098).

Constants of the authors' ResNet-20 on CIFAR-10: learning rate 1e-3, no momentum, 1024 gradients, of which EFCP keeps
1 % or rank 4; weight decay 1e-4, inside the ring for M-FAC and as θ ← (1 − 1e-4)θ, not times the learning rate, for
EFCP. Their training takes 164 epochs with steps of the learning rate at 50 and 75 %; ours follows the usual schedule.
The learning rate is that of M-FAC; GGT's steps are at most as long as it, and those of a short training want it larger
(0.1 to 0.5 on the digits). Those on sentences are of BERT; decay is left out there. What M-FAC takes from EFCP's rows
(m, decay), and GGT all of its (the ε and m of S-GGT), they do not give themselves.
"""

from __future__ import annotations

from cram_bench.recipes.method import Method

_IMAGENET = {"damping": 1e-7, "weight_decay": 1e-5}

METHODS = {
    "m-fac": Method(
        "M-FAC",
        {"optimizer": "m-fac", "lr": 1e-3, "weight_decay": 1e-4, "gradients": 1024, "damping": 1e-5},
        sentences={"lr": 1e-4, "weight_decay": 0.0, "damping": 1e-6},
    ),
    "s-m-fac": Method(
        "S-M-FAC",
        {"optimizer": "s-m-fac", "lr": 1e-3, "weight_decay": 1e-4, "gradients": 1024, "damping": 1e-4, "density": 0.01},
        sentences={"lr": 2e-5, "weight_decay": 0.0, "damping": 5e-5},
        imagenet=_IMAGENET,
    ),
    "lowrank-m-fac": Method(
        "Low-rank M-FAC",
        {"optimizer": "lowrank-m-fac", "lr": 1e-3, "weight_decay": 1e-4, "gradients": 1024, "damping": 1e-4, "rank": 4},
        sentences={"lr": 2e-5, "weight_decay": 0.0, "damping": 5e-5},
        imagenet=_IMAGENET,
    ),
    "ggt": Method(
        "GGT",
        {"optimizer": "ggt", "lr": 1e-3, "weight_decay": 1e-4, "gradients": 100, "damping": 1e-5},
        sentences={"lr": 2e-5, "weight_decay": 0.0},
    ),
    "s-ggt": Method(
        "S-GGT",
        {"optimizer": "s-ggt", "lr": 1e-3, "weight_decay": 1e-4, "gradients": 100, "damping": 1e-5, "density": 0.01},
        sentences={"lr": 2e-5, "weight_decay": 0.0},
    ),
}
