"""What a compressed network takes on disk, and what it is still worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from torch import nn

from cram_bench.compress import Compressor, PruneThenQuantize, Quantize, apply_
from cram_bench.data import AT_ONCE, Batches
from cram_bench.deploy.packing import pack, sizes
from cram_bench.preserve import preserved
from cram_bench.probes.common import Forward, Loss, Problem, looked, probing, tuning_data
from cram_bench.probes.sparsity import reported
from cram_bench.prune import Specification

COMPOUND = ("global@0", "int8", "global@0.8", "global@0.8+int8")


def stored(
    model: nn.Module,
    data: Batches,
    compressors: Sequence[Compressor | Specification | str] = COMPOUND,
    calibration: Batches | None = None,
    exclude: Iterable[str] = (),
    batch_size: int = AT_ONCE,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batches: Batches | None = None,
) -> pd.DataFrame:
    """Compress in one shot with each compressor, evaluate, and count the bytes of a file that holds what came of it.

    The file is of `cram_bench.deploy.pack`: nonzeros and where they are, in 8 bits after ``int8``. Compounding is
    oBERT's (arXiv 2203.07259, section 4.3): pruned, then rounded. The model is left as it was found.

    Args:
        model: any torch classifier.
        data: what to evaluate on.
        compressors: operators, their specifications or those of pruners, such as ``greedy@0.8+int8``; ``global@0`` is
            the network as it is. Of bits, 8 alone.
        calibration, exclude, batch_size, forward, loss, batches: as `sparsity_curve` takes them; BatchNorm is tuned
            where there is `calibration`, but not of the network as it is.

    Returns:
        A row per compressor, with columns pattern, sparsity, accuracy (a fraction), loss, and in bytes weights (the
        prunable ones), file (all, as safetensors), gzip (the file compressed), share (gzip ÷ that of the first row).

    Raises:
        ValueError: other bits than 8, a specification cannot be read, or as `cram_bench.prune.Pruner.fit`.
    """
    exclude = list(exclude) if not isinstance(exclude, str) else exclude
    batches = calibration if batches is None else batches
    rows = []
    with probing(model):
        chosen = looked(model, compressors, batches, exclude, forward, loss)
        calibration = tuning_data(calibration)
        problem = Problem(model, data, forward, loss, batch_size)
        for compressor in chosen:
            quantize = getattr(compressor, "quantize", compressor)
            bits = quantize.bits if isinstance(quantize, Quantize) else 0
            first = compressor.prune if isinstance(compressor, PruneThenQuantize) else compressor
            with preserved(model):
                masks = first.masks({}) if isinstance(first, Quantize) else apply_(model, first, exclude)
                sizes_of = sizes(pack(model, bits, exclude))
                if bits:
                    apply_(model, Quantize(bits), exclude)
                if calibration is not None and str(compressor) != "global@0":
                    problem.tune(calibration)
                result = problem.evaluate()
            sparsity = 0.0 if isinstance(first, Quantize) else reported(first, masks)
            rows.append((compressor.pattern, sparsity, result["accuracy"], result["loss"], *sizes_of.values()))
    table = pd.DataFrame(rows, columns=["pattern", "sparsity", "accuracy", "loss", "weights", "file", "gzip"])
    return table.assign(share=table["gzip"] / table["gzip"].iloc[0])
