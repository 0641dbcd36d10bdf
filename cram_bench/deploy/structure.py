"""Physically smaller networks: units that are gone take neither time nor memory; and their folders.

A folder of `save` holds ``structure.json``, which units stay, and ``model.safetensors``; `load` reads them in this
order.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cram_bench import untrusted
from cram_bench.checks import instance, integer, one_line, shown, unknown
from cram_bench.compress.weights import is_conv1d
from cram_bench.files import check_writable, sealed, unsealed, write, write_tensors
from cram_bench.models.weights import load_, storable
from cram_bench.prune.structured import Structure, structures

FORMAT = 1  # of structure.json; raise it when an older version could misread a new one
FILE = "structure.json"


class Bias(nn.Module):
    """What is left of a linear layer without inputs: its bias for every row of features (…, 0), or zeros."""

    bias: nn.Parameter | None

    def __init__(self, outputs: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.outputs = outputs
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.outputs)
        return x.new_zeros(shape) if self.bias is None else self.bias.to(x.dtype).expand(shape)


class BiasMap(nn.Module):
    """What is left of a convolution without inputs or outputs: maps of its bias, or zero, of the size that it had."""

    bias: nn.Parameter | None

    def __init__(self, convolution: nn.Conv2d, outputs: int) -> None:
        super().__init__()
        self.outputs, self.stride, self.padding = outputs, convolution.stride, convolution.padding
        self.reach = [d * (k - 1) for k, d in zip(convolution.kernel_size, convolution.dilation, strict=True)]
        self.register_parameter("bias", convolution._parameters["bias"] if outputs else None)

    def forward(self, x: Tensor) -> Tensor:
        same = isinstance(self.padding, str)
        around = [reach if self.padding == "same" else 0 for reach in self.reach]
        if not same:
            around = [2 * int(each) for each in self.padding]
        size = [
            (side + pad - reach - 1) // stride + 1
            for side, pad, reach, stride in zip(x.shape[-2:], around, self.reach, self.stride, strict=True)
        ]
        zeros = x.new_zeros(x.shape[0], self.outputs, *size)
        return zeros if self.bias is None else zeros + self.bias[:, None, None]


class NoHeads(nn.Module):
    """Attention without heads: no features for what follows, or, where it is part of attention, the bias of that."""

    def __init__(self, projection: tuple[str, Bias] | None = None) -> None:
        super().__init__()
        self.last = projection[0] if projection else ""
        if projection:
            self.add_module(*projection)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        features = hidden[..., :0]
        return (self._modules[self.last](features) if self.last else features), None  # type: ignore[misc]


def shrink(model: nn.Module, structure: Mapping[str, Iterable[int]]) -> nn.Module:
    """Return a copy of `model` without the units that do not stay, smaller in memory and faster.

    Its outputs are those of the model with the weights of these units at zero, up to rounding: rows of query, key and
    value, of first matrices and convolutions and their BatchNorm go, and columns of what follows. Where no unit
    stays, all that is left is the bias of what followed. A network whose layers have other widths than its
    configuration says cannot be built anew from that: `save` writes its structure beside its weights.

    Args:
        model: any torch model with `cram_bench.prune.structures`; left as it is. What is zero in it stays zero: apply
            a `Shrinkable` first, whose weights are corrected for what goes.
        structure: name of a structure → the units of it that stay. What is not named stays whole.

    Raises:
        ValueError: a structure is unknown, or has no such unit.
        TypeError: `structure` is no such mapping.

    >>> from cram_bench import models
    >>> model = models.create("resnet20", num_classes=10)
    >>> small = shrink(model, {"layer3.2.channels": range(32), "layer1.0.channels": []})
    >>> small.layer3[2].conv1.weight.shape, small(torch.zeros(1, 3, 32, 32)).shape
    (torch.Size([32, 64, 3, 3]), torch.Size([1, 10]))
    """
    kept = checked(structures(model), structure)
    small = copy.deepcopy(model)
    _cut(small, structures(small), kept)
    return small


def checked(found: Mapping[str, Structure], structure: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...]]:
    """Return units that stay, ascending, of known structures alone; refuse others as `shrink` does."""
    instance("structure", structure, Mapping, "a mapping from names of structures to the units that stay")
    kept = {}
    for name, units in structure.items():
        if name not in found:
            raise ValueError(unknown("structure", name, list(found)))
        instance(f"the units of {name!r}", units, Iterable, "a list of units")  # type: ignore[type-abstract]
        listed = [integer(f"a unit of {name!r}", unit, 0, found[name].count - 1) for unit in units]
        if len(set(listed)) < len(listed):
            raise ValueError(f"the units of {name!r} must differ, and are {shown(listed)}")
        kept[name] = tuple(sorted(listed))
    return kept


@torch.no_grad()
def _cut(model: nn.Module, found: Mapping[str, Structure], kept: Mapping[str, tuple[int, ...]]) -> None:
    for name, units in kept.items():
        each = found[name]
        if len(units) == each.count:
            continue
        if not units:
            _drop(model, each)
            continue
        for module in map(model.get_submodule, each.inputs):
            _keep(module, each.features(units, each.packed), outputs=True)
        _keep(model.get_submodule(each.output), each.features(units), outputs=False)
        _tell(model, each, len(units))


def _keep(module: nn.Module, features: list[int], outputs: bool) -> None:
    """Keep some outputs, or inputs, of a layer."""
    transposed = is_conv1d(module)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None or not tensor.ndim or not (outputs or name == "weight"):
                continue
            dim = int(transposed == outputs) if tensor.ndim > 1 else 0
            index = torch.tensor(features, dtype=torch.long, device=tensor.device)
            part = tensor.index_select(dim, index)
            if isinstance(tensor, nn.Parameter):
                part = nn.Parameter(part, tensor.requires_grad)
            tensors[name] = part  # type: ignore[assignment]
    count = len(features)
    if isinstance(module, nn.Linear):
        setattr(module, "out_features" if outputs else "in_features", count)
    elif isinstance(module, nn.Conv2d):
        setattr(module, "out_channels" if outputs else "in_channels", count)
    elif isinstance(module, _BatchNorm):
        module.num_features = count
    elif transposed:
        setattr(module, "nf" if outputs else "nx", count)


def _tell(model: nn.Module, each: Structure, count: int) -> None:
    """Tell attention how many heads it has, by the names that its class has for it."""
    if each.kind != "heads":
        return
    mixer = model.get_submodule(each.mixer or each.holder)
    told = {"num_attention_heads": count, "num_heads": count, "heads": count}
    told |= {"all_head_size": count * each.size, "split_size": count * each.size}
    for name, value in told.items():
        if hasattr(mixer, name):
            setattr(mixer, name, value)


def _drop(model: nn.Module, each: Structure) -> None:
    """Remove a whole module; the bias of its output stays under its name."""
    output = model.get_submodule(each.output)
    if isinstance(output, nn.Conv2d):
        first, *norms = each.inputs
        convolution = model.get_submodule(first)
        assert isinstance(convolution, nn.Conv2d)
        model.set_submodule(first, BiasMap(convolution, 0))
        for name in norms:
            model.set_submodule(name, nn.Identity())
        model.set_submodule(each.output, BiasMap(output, output.out_channels))
        return
    weight = output.weight
    assert isinstance(weight, Tensor)
    bias = Bias(weight.shape[1] if is_conv1d(output) else weight.shape[0], output._parameters.get("bias"))
    inner = each.output.removeprefix(f"{each.mixer}.") if each.mixer else each.output
    if inner != each.output:  # the projection is part of the attention
        model.set_submodule(each.mixer, NoHeads((inner, bias)))
        return
    if each.mixer:
        model.set_submodule(each.mixer, NoHeads())
    else:
        for name in each.inputs:
            model.set_submodule(name, Bias(0, None))
    model.set_submodule(each.output, bias)
    _tell(model, each, 0)


def alive(model: nn.Module) -> dict[str, list[int]]:
    """Return which units stay if those go whose part of the weight that follows them is zero: nothing is lost.

    A mask of single weights seldom leaves a unit that is zero as a whole; a `Shrinkable`'s does. What has no structures
    has none that stay.

    >>> from cram_bench import models
    >>> model = models.create("resnet20", num_classes=10)
    >>> _ = model.layer1[0].conv2.weight.data[:, 3:].zero_()
    >>> alive(model)["layer1.0.channels"], len(alive(model)["layer1.1.channels"])
    ([0, 1, 2], 16)
    """
    kept = {}
    for name, each in _found(model).items():
        module = model.get_submodule(each.output)
        weight = module.get_parameter("weight")
        rows = (weight if is_conv1d(module) else weight.transpose(0, 1)).detach().flatten(1)
        used = (rows != 0).any(1).view(each.count, -1).any(1)
        kept[name] = used.nonzero().flatten().tolist()
    return kept


def save(small: nn.Module, structure: Mapping[str, Iterable[int]], folder: str | os.PathLike[str]) -> None:
    """Write ``structure.json``, which units stay, and ``model.safetensors``, each whole or not at all.

    Args:
        small: what `shrink` returned.
        structure: what it was given.
        folder: made where it is not there.

    Raises:
        ValueError: the network has not these units.
        OSError: the folder cannot be written.
    """
    text = described(small, structure)
    path = check_writable(folder, "folder")
    path.mkdir(parents=True, exist_ok=True)
    # the structure first: weights without it would be read as those of a whole network
    write(path / FILE, text)
    write_tensors(path / "model.safetensors", storable(small))


def described(small: nn.Module, structure: Mapping[str, Iterable[int]]) -> str:
    """Return what `save` writes into ``structure.json``; `parsed` reads it.

    Raises:
        ValueError: the network has not these units.
    """
    instance("structure", structure, Mapping, "a mapping from names of structures to the units that stay")
    found = _found(small)
    kept = {name: sorted(int(unit) for unit in units) for name, units in structure.items()}
    for name, units in kept.items():
        there = found[name].count if name in found else 0
        if there != len(units):
            raise ValueError(
                f"{name!r} of this network has {there} units, and structure says {len(units)}: shrink it first"
            )
    return sealed({"format": FORMAT, "kept": kept}, FILE)


def composed(first: Mapping[str, Iterable[int]], second: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """Return the structure of a network that was shrunk twice: `second` counts units of what `first` left.

    >>> composed({"a": [1, 3, 5], "b": []}, {"a": [0, 2], "c": [4]})
    {'a': [1, 5], 'b': [], 'c': [4]}
    """
    kept = {name: sorted(units) for name, units in first.items()}
    for name, units in second.items():
        kept[name] = [kept[name][unit] for unit in sorted(units)] if name in kept else sorted(units)
    return kept


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Return the shrunk network that `save` wrote; its structure is read before its weights.

    Args:
        model: the whole network, freshly built; left as it is.
        folder: that of `save`.

    Raises:
        ValueError: a file is damaged, of a newer version, or of another network; the message names it.
        OSError: one is missing or may not be read.
    """
    file = Path(folder) / FILE
    try:
        small = shrink(model, read(file))
    except (ValueError, TypeError) as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file} does not fit {type(model).__name__}: {one_line(error)}") from error
    load_(small, Path(folder) / "model.safetensors", kind=f"{type(model).__name__} of that structure")
    return small


def read(file: str | os.PathLike[str]) -> dict[str, list[int]]:
    """Read a ``structure.json``: name of a structure → the units that stay.

    Raises:
        ValueError: it is damaged or of a newer version.
        OSError: it is missing or may not be read.
    """
    content = untrusted.contents(file, untrusted.NOTE)
    try:
        return parsed(content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged or no structure: {one_line(error)}") from error


def parsed(content: bytes) -> dict[str, list[int]]:
    """Read the content of a ``structure.json``.

    Raises:
        ValueError: it is damaged or of a newer version.
    """
    inner = unsealed(content.decode(), FILE)
    if inner.get("format") != FORMAT:
        raise ValueError(f"it has format {shown(inner.get('format'))}, and this version reads {FORMAT}")
    if "kept" not in inner:
        raise ValueError("it has no 'kept'")
    kept = inner["kept"]
    if not isinstance(kept, dict) or not all(isinstance(units, list) for units in kept.values()):
        raise ValueError("'kept' is no mapping to lists of units")
    return kept


def size(model: nn.Module) -> int:
    """Return how many bytes ``model.safetensors`` of a network has.

    >>> size(nn.Linear(10, 10)) - 4 * 110 < 200
    True
    """
    from safetensors.torch import save as serialized

    return len(serialized(storable(model)))


def _found(model: nn.Module) -> dict[str, Structure]:
    try:
        return structures(model)
    except ValueError:  # all were dropped
        return {}
