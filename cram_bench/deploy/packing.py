"""A network as small as it is: weights by what is not zero, in 8 bits where they are rounded, and back to the same."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from cram_bench.checks import instance
from cram_bench.compress import prunable
from cram_bench.compress.quantize import levels
from cram_bench.compress.weights import by_output
from cram_bench.models.weights import storable

PARTS = ("zeros", "values", "levels", "scales")
"""What a packed weight is made of: ``NAME:zeros`` and so on."""


def pack(model: nn.Module, bits: int = 0, exclude: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return what a file needs to hold of a network, on the CPU.

    A prunable weight of n entries, k of them not zero, is its nonzeros in order, and a bit an entry that says where
    they are: n/8 + 4k bytes in float32, where that is less than 4n. With 8 bits nonzeros are whole numbers of a byte
    and a scale per output channel (`cram_bench.compress.quantized`): n/8 + k bytes; what rounds to zero goes too. All
    other parameters and the buffers, embeddings among them, stay as they are.

    Args:
        model: any torch model, pruned or not, and as it was afterwards. A shared prunable weight is packed once.
        bits: 8 to round prunable weights, 0 to keep their values.
        exclude: shell patterns over parameter names that are stored whole.

    Raises:
        ValueError: `bits` is neither, or nothing is prunable.

    >>> layer = nn.Linear(64, 1, bias=False)
    >>> layer.weight.data.copy_(torch.arange(64) < 16).shape
    torch.Size([1, 64])
    >>> {name: value.nbytes for name, value in pack(layer).items()}
    {'weight:zeros': 8, 'weight:values': 64}
    >>> {name: value.nbytes for name, value in pack(layer, bits=8).items()}
    {'weight:zeros': 8, 'weight:levels': 16, 'weight:scales': 4}
    """
    instance("model", model, nn.Module, "a torch model")
    if bits not in (0, 8):
        raise ValueError(f"bits must be 8, or 0 for values as they are, not {bits!r}")
    weights = prunable(model, exclude)
    packed = storable(model)
    for name, weight in weights.items():
        stored = by_output(weights, name, weight.detach())
        values, scales = levels(stored, bits) if bits else (stored, None)
        values = by_output(weights, name, values.to(torch.int8) if bits else values).cpu().flatten()
        there = values != 0
        held = values[there]
        zeros = torch.from_numpy(np.packbits(there.numpy()))
        for key in _keys(model, weight):
            del packed[key]
        if zeros.nbytes + held.nbytes < values.nbytes:
            packed[f"{name}:zeros"] = zeros
        else:
            held = values
        packed[f"{name}:{'levels' if bits else 'values'}"] = held.clone()
        if scales is not None:
            packed[f"{name}:scales"] = scales.cpu().clone()
    return packed


@torch.no_grad()
def unpack_(model: nn.Module, packed: Mapping[str, Tensor], exclude: Iterable[str] = ()) -> None:
    """Give a network the weights of `pack`, in place: those that it had, or with 8 bits what ``+int8`` makes of them.

    Args:
        model: of the same kind as was packed.
        packed: of `pack`.
        exclude: as it was packed with.

    Raises:
        ValueError: a weight's parts are missing, or of another size.
        RuntimeError: other tensors do not fit, as torch says it.
    """
    weights = prunable(model, exclude)
    whole = {name: value for name, value in packed.items() if name.rpartition(":")[2] not in PARTS}
    for name, weight in weights.items():
        zeros, values, rounded, scales = (packed.get(f"{name}:{part}") for part in PARTS)
        held = values if rounded is None or scales is None else rounded.to(scales.dtype)
        if held is None:
            raise ValueError(f"nothing is packed of {name}")
        count = weight.numel()
        if zeros is not None:
            there = torch.from_numpy(np.unpackbits(zeros.cpu().numpy())).bool()[:count]
            if len(there) != count or int(there.sum()) != len(held):
                raise ValueError(f"what is packed of {name} is of another size: it has {count:,} entries here")
            held = torch.zeros(count, dtype=held.dtype).masked_scatter_(there, held.cpu())
        if len(held) != count:
            raise ValueError(f"what is packed of {name} is of another size: it has {count:,} entries here")
        held = held.view(weight.shape)
        if scales is not None:
            held = by_output(weights, name, held)
            held = by_output(weights, name, held.mul(scales.view(-1, *[1] * (held.ndim - 1))))
        whole |= dict.fromkeys(_keys(model, weight), held.to(weight.dtype))
    model.load_state_dict(whole)


def _keys(model: nn.Module, weight: Tensor) -> list[str]:
    """Return the names of a weight in the model's state, several of one that is shared."""
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]


def sizes(packed: Mapping[str, Tensor]) -> dict[str, int]:
    """Return bytes: ``weights``, those of prunable weights alone; ``file``, a safetensors file of all; ``gzip`` of it.

    Args:
        packed: of `pack`.
    """
    from safetensors.torch import save

    content = save(dict(packed))
    weights = sum(value.nbytes for name, value in packed.items() if name.rpartition(":")[2] in PARTS)
    return {"weights": weights, "file": len(content), "gzip": len(gzip.compress(content, 6, mtime=0))}
