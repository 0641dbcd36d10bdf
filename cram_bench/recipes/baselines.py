"""What the others are compared with."""

from __future__ import annotations

from cram_bench.recipes.method import Method

METHODS = {
    "sgd": Method("SGD", sentences={"optimizer": "sgd", "lr": 0.01}),
    "adamw": Method("AdamW", {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}),
}
