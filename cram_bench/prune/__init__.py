"""Pruners that look at gradients or inputs once, and then serve every sparsity.

    masks = cb.prune.apply_(model, "greedy@0.9", batches=train)          # prunes and corrects in place
    fitted = cb.prune.Greedy(block=32).fit(model, train)                 # looks once
    fitted.apply_(model, 0.8)

A new pruner is a new file with a subclass of `Pruner`, and its class in `PRUNERS`. Operators that look at the weights
alone, which CrAM draws at every step, are in `cram_bench.compress`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from cram_bench.checks import instance, items, number
from cram_bench.compress import Compressor, Masks, check_leaves, prunable
from cram_bench.curvature.samples import Forward, Loss
from cram_bench.data import Batches
from cram_bench.prune import specification
from cram_bench.prune.base import Fitted, Fixed, Pruner
from cram_bench.prune.fitting import fitted
from cram_bench.prune.greedy import CAP, Greedy
from cram_bench.prune.layerwise import ExactOBS, SparseGPT
from cram_bench.prune.mfac import MFACPruner
from cram_bench.prune.obd import OBD
from cram_bench.prune.obs import OBERT, OBS
from cram_bench.prune.specification import Specification
from cram_bench.prune.structured import Shrinkable, structures, ziplm

PRUNERS: dict[str, type[Pruner]] = {
    **{pruner.kind: pruner for pruner in (OBD, MFACPruner, OBERT, OBS, CAP, Greedy, ExactOBS, SparseGPT)},
    "layerwise": ExactOBS,
}
"""Pruners by the name that specifications use; ``layerwise`` is another for ``exactobs``."""

__all__ = [
    "CAP",
    "OBD",
    "OBERT",
    "OBS",
    "PRUNERS",
    "ExactOBS",
    "Fitted",
    "Fixed",
    "Greedy",
    "MFACPruner",
    "Pruner",
    "Shrinkable",
    "SparseGPT",
    "Specification",
    "apply_",
    "fitted",
    "grid",
    "is_name",
    "parse",
    "structures",
    "ziplm",
]


def parse(spec: str | Compressor | Specification) -> Compressor | Specification:
    """Read a specification of a pruner that looks, or of a compressor; `cram_bench.prune.specification` has the
    grammar.

    Raises:
        ValueError: it is neither, or a setting is not allowed.
        TypeError: it is no text.

    >>> str(parse("greedy(block=32)@0.9+int8")), str(parse("2:4+obs")), str(parse("global@0.9"))
    ('greedy(block=32)@0.9+int8', '2:4+obs', 'global@0.9')
    """
    return specification.parse(spec, PRUNERS)


def grid(patterns: Sequence[str], sparsities: Sequence[float]) -> list[Compressor | Specification]:
    """Return a specification for every pattern and sparsity, as `cram_bench.compress.grid` does, pruners that look
    among them.

    ``greedy`` becomes ``greedy@0.9``, ``global+obs`` becomes ``global@0.9+obs``; what decides its sparsity itself, such
    as ``2:4``, comes once.

    Raises:
        ValueError: a list is empty, a pattern unknown or a sparsity outside [0, 1).
        TypeError: something is no list, no text or no number.

    >>> [str(spec) for spec in grid(["global", "greedyx4", "global+obs", "2:4+obs"], [0.9])]
    ['global@0.9', 'greedyx4@0.9', 'global@0.9+obs', '2:4+obs']
    """
    levels = [number("sparsity", level, 0, 1) for level in items("sparsities", sparsities, "numbers in [0, 1)")]
    found: dict[str, Compressor | Specification] = {}
    for pattern in items("patterns", patterns, "texts such as 'global' or 'greedy'"):
        instance("a pattern", pattern, str, "a text such as 'global' or 'greedy'")
        first, plus, rest = pattern.partition("+")
        for level in levels:
            text = (
                pattern
                if re.fullmatch("[0-9]+:[0-9]+(-reference)?|int[0-9]+", first)
                else f"{first}@{level!r}{plus}{rest}"
            )
            spec = parse(text)
            check_leaves(spec)
            found[text] = spec
    return list(found.values())


def is_name(text: str) -> bool:
    """Tell whether a text is a pruner without a sparsity, with settings or not.

    >>> is_name("greedy(block=32)x4"), is_name("greedy@0.9"), is_name("2:4+obs")
    (True, False, False)
    """
    return specification.is_name(text, PRUNERS)


def apply_(
    model: nn.Module,
    spec: str | Compressor | Specification,
    batches: Batches | None = None,
    exclude: Iterable[str] = (),
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Masks:
    """Prune `model` in place, and return the masks: which weights stayed, and which matrices are dense.

    Args:
        model: any torch model.
        spec: such as ``greedy@0.9``, ``obertx16@0.9``, ``2:4+obs`` or ``global@0.9``.
        batches: training data that the pruner looks at.
        exclude: shell patterns over parameter names that stay dense.
        forward, loss: as the probes take them.

    Raises:
        ValueError: as `Pruner.fit`; the model is then as it was.
    """
    exclude = list(exclude) if not isinstance(exclude, str) else exclude
    (compressor,) = fitted([parse(spec)], model, batches, exclude, forward, loss)
    return compressor.apply_(prunable(model, exclude))
