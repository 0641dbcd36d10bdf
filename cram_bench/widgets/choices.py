"""What the explorer offers: patterns, pruners, bits, and the sparsities of its curve."""

from __future__ import annotations

import re

from cram_bench.data import Dataset
from cram_bench.prune import PRUNERS

CURVE = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Sparsities of the curve, fractions."""
PATTERNS = ("global", "uniform", "2:4", "4:8", "1:4")
"""What looks at the weights alone."""
CORRECTED = ("global+obs", "global+exactobs", "2:4+obs", "2:4+exactobs", "4:8+obs")
"""Masks by magnitude, of which a pruner corrects the weights that stay."""
BITS = {"float32": "", "8 bits": "+int8", "4 bits": "+int4"}

_GRADIENTS = 128
_SAMPLES = 256
_EIGHT = 8  # examples a gradient, where the pruner takes means of a batch


def options(looked_at: Dataset | None) -> list[tuple[str, str]]:
    """Return name → specification of all that can be chosen; pruners that look only where there is what to look at.

    They look at `_GRADIENTS` gradients of eight training examples each, or at the inputs of `_SAMPLES`, or at fewer
    where there are fewer.
    """
    plain = [(name, name) for name in PATTERNS]
    if looked_at is None:
        return plain
    kinds = [kind for kind in PRUNERS if kind != "layerwise"]  # another name for exactobs
    return [*plain, *((name, _sized(name, len(looked_at))) for name in (*kinds, *CORRECTED))]


def _sized(name: str, examples: int) -> str:
    """Return a specification that asks for no more examples than there are.

    >>> _sized("2:4+obs", 80), _sized("exactobs", 10**6)
    ('2:4+obs(gradients=10)', 'exactobs(samples=256)')
    """
    kind = name.rpartition("+")[2]
    if hasattr(PRUNERS[kind], "gradients"):
        return f"{name}(gradients={max(1, min(_GRADIENTS, examples // _EIGHT))})"
    return f"{name}(samples={max(1, min(_SAMPLES, examples))})"


def decides(pattern: str) -> bool:
    """Tell whether a pattern decides its sparsity itself.

    >>> decides("2:4+obs(gradients=10)"), decides("global")
    (True, False)
    """
    return re.match("[0-9]+:[0-9]+", pattern) is not None
