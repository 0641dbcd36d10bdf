"""Gradual pruning (GMP*, Kurtic & Alistarh, arXiv 2210.06384; oBERT, Kurtic et al., arXiv 2203.07259), and SAFE (arXiv
2506.06866): a training for every sparsity.

On sentences the schedules are those of oBERT's 30 epochs, as shares of a training: dense for 2, then in steps to epoch
26, oBERT's 7 of them 4 epochs apart; the rate falls to a tenth in each of these, from 8e-5. Its 1024 gradients are of
batches of 8. What distils says ``loss`` and ``teacher``; T = 2 and h = 1 are the papers' and the defaults. On images
the papers prune nothing gradually: there SGD's rate, many small steps, and one rewind, before pruning ends; where, was
chosen on 300 held-out training images of digits (40 epochs, two seeds, 95 and 98 %). SAFE's K is that of 200 epochs of
CIFAR-10, and its λ pulls as much in all as there.
"""

from __future__ import annotations

from cram_bench.recipes.method import Method

_GRADUAL = {
    "pruning": "gradual", "pruning.initial": 0.5, "pruning.begin": 0.1, "pruning.end": 0.5, "pruning.times": 50,
    "schedule": "cycles", "schedule.rewind": 0.3,
}  # fmt: skip
_SENTENCES = {
    "pruning.initial": 0.7, "pruning.begin": 0.0667, "pruning.end": 0.8667, "lr": 8e-5, "schedule.rewind": 0.0667,
    "schedule.cycles": 7, "schedule.floor": 0.1,
}  # fmt: skip

METHODS = {
    "gmp*": Method("GMP*", {**_GRADUAL, "pruning.pruner": "global"}, _SENTENCES),
    "obert": Method(
        "oBERT, gradual",
        {**_GRADUAL, "pruning.pruner": "obert(gradients=128)", "pruning.times": 7},
        {**_SENTENCES, "pruning.pruner": "obert(gradients=1024)"},
    ),
    "safe": Method("SAFE", {"step": "safe", "rho": 0.1, "weight_decay": 1e-4}, {"weight_decay": 0.01}),
}
