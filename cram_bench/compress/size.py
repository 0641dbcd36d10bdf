"""How many bytes the weights of a compressed network take."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from cram_bench.checks import integer
from cram_bench.compress.weights import prunable


def stored_bytes(model: nn.Module, bits: int | None = None, exclude: Iterable[str] = ()) -> int:
    """Return the bytes of a network's parameters and buffers where zeros are not written out.

    A prunable tensor of n weights, k of them not zero, takes the smaller of b·n bits and b·k + n bits: its values, or
    those that are not zero and a bit a weight that says which they are. All else takes what it does in memory. Scales
    of quantized weights, one a channel, are left out.

    Args:
        model: any torch model, compressed.
        bits: b, of a prunable weight; None: those of its type.
        exclude: shell patterns over parameter names that count as not prunable.

    >>> layer = nn.Linear(8, 4, bias=False).requires_grad_(False)
    >>> _ = layer.weight.fill_(1)[:, :6].zero_()
    >>> stored_bytes(layer), stored_bytes(layer, bits=8)  # 8 values in 32 or 8 bits, and 32 bits of places
    (36, 12)
    """
    if bits is not None:
        integer("bits", bits, 1)
    weights = prunable(model, exclude)
    own = {id(weight) for weight in weights.values()}
    total = 8 * sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own)
    for weight in weights.values():
        each, count = bits or 8 * weight.element_size(), weight.numel()
        total += min(each * count, each * int((weight != 0).sum()) + count)
    return math.ceil(total / 8)
