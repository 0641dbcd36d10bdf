"""What a network can lose as a whole: attention heads, feed-forward columns, channels inside residual blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from cram_bench.checks import instance
from cram_bench.compress.weights import is_conv1d
from cram_bench.models.resnet import Block
from cram_bench.models.vit import Layer

Kind = Literal["heads", "columns", "channels"]

_STEP = 16  # widths in multiples of it, for which matrix products are fastest


@dataclass(frozen=True)
class Structure:
    """Units that go as a whole, and the modules that shrink with them; names are those of modules.

    A unit is an attention head, a column of the second matrix of a feed-forward network, or a channel between two
    convolutions. Where a unit goes, so do its inputs of the module `output`, whose weight is corrected, and its
    outputs of all modules in `inputs`. With no unit left the whole module goes; the bias of `output` stays.
    """

    kind: Kind
    holder: str
    """The layer or block that it is part of, which is what is timed."""
    output: str
    """Whose inputs go: the projection of attention's output, the second feed-forward matrix, the second convolution."""
    inputs: tuple[str, ...]
    """Whose outputs go: query, key and value, the first matrix, or the first convolution and its BatchNorm."""
    count: int
    """Units."""
    size: int = 1
    """Features of a unit: those of a head, otherwise 1."""
    packed: int = 1
    """How often a unit stands among the outputs of `inputs`: 3 where query, key and value are one matrix."""
    mixer: str = ""
    """The attention that runs between, where it cannot run with no head."""

    @property
    def name(self) -> str:
        """Of the structure: its holder and kind."""
        return _join(self.holder, self.kind)

    @property
    def options(self) -> list[int]:
        """How many units may stay, from all to none: every count of heads, and `widths`."""
        return list(range(self.count, -1, -1)) if self.kind == "heads" else widths(self.count)

    def features(self, units: Iterable[int], packed: int = 1) -> list[int]:
        """Return which features belong to some units, among the outputs of `inputs` where `packed` is the structure's.

        >>> Structure("heads", "", "proj", ("qkv",), count=3, size=2, packed=3).features([0, 2], packed=3)
        [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17]
        """
        listed, whole = list(units), self.count * self.size
        return [
            part * whole + unit * self.size + at
            for part in range(packed) for unit in listed for at in range(self.size)
        ]  # fmt: skip


def widths(count: int) -> list[int]:
    """Return ⌈0.9ⁱ · count⌉, rounded up to multiples of 16 (of fewer where there are fewer than 128), and 0.

    Products of matrices are not faster for a few columns less; arXiv 2302.04089 has widths of 0.9ⁱ.

    >>> widths(192), widths(16)
    ([192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0], [16, 14, 12, 10, 8, 6, 4, 2, 0])
    """
    step = max(1, min(_STEP, count // 8))
    found = {count, 0}
    width = float(count)
    while width > 1:
        width *= 0.9
        found.add(min(count, step * math.ceil(math.ceil(width) / step)))
    return sorted(found, reverse=True)


def structures(model: nn.Module) -> dict[str, Structure]:
    """Return what of a model can go as a whole, by name, in the order in which its modules are listed.

    Known are the layers of encoders as transformers' BERT has them (`cram_bench.models.encoder.Encoder`), its GPT-2
    blocks, the layers of ``vit_tiny``, and the residual blocks of two convolutions of this package and of
    torchvision. What an earlier `cram_bench.deploy.shrink` has taken whole is no structure any more.

    Raises:
        ValueError: the model has none of these.

    >>> from cram_bench import models
    >>> found = structures(models.create("resnet20", num_classes=10))
    >>> len(found), found["layer1.0.channels"].inputs, found["layer3.2.channels"].count
    (9, ('layer1.0.conv1', 'layer1.0.bn1'), 64)
    """
    instance("model", model, nn.Module, "a torch model")
    found: dict[str, Structure] = {}
    for holder, module in model.named_modules():
        for read in (_bert, _gpt2, _vit, _residual):
            for own in read(module):
                inputs = tuple(_join(holder, name) for name in own.inputs)
                mixer = _join(holder, own.mixer) if own.mixer else ""
                structure = Structure(
                    own.kind, holder, _join(holder, own.output), inputs, own.count, own.size, own.packed, mixer
                )
                found[structure.name] = structure
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no structures that are known: heads and feed-forward columns of BERT's, "
            "GPT-2's and vit_tiny's layers, channels inside residual blocks of two convolutions"
        )
    return found


def _bert(module: nn.Module) -> list[Structure]:
    found = []
    mixer = _at(module, "attention.self")
    heads = ("attention.self.query", "attention.self.key", "attention.self.value")
    if mixer is not None and _all(module, (*heads, "attention.output.dense"), _linear):
        count, size = getattr(mixer, "num_attention_heads", None), getattr(mixer, "attention_head_size", None)
        if count and size and {_features(_at(module, name)) for name in heads} == {count * size}:
            found.append(Structure("heads", "", "attention.output.dense", heads, count, size, mixer="attention.self"))
    if mixer is not None and _all(module, ("intermediate.dense", "output.dense"), _linear):
        count = _features(_at(module, "intermediate.dense"))
        found.append(Structure("columns", "", "output.dense", ("intermediate.dense",), count))
    return found


def _gpt2(module: nn.Module) -> list[Structure]:
    found = []
    attention = _at(module, "attn")
    if attention is not None and _all(module, ("attn.c_attn", "attn.c_proj"), is_conv1d):
        count, size = getattr(attention, "num_heads", None), getattr(attention, "head_dim", None)
        if count and size and _features(_at(module, "attn.c_attn")) == 3 * count * size:
            found.append(Structure("heads", "", "attn.c_proj", ("attn.c_attn",), count, size, 3, "attn"))
    if attention is not None and _all(module, ("mlp.c_fc", "mlp.c_proj"), is_conv1d):
        count = _features(_at(module, "mlp.c_fc"))
        found.append(Structure("columns", "", "mlp.c_proj", ("mlp.c_fc",), count))
    return found


def _vit(module: nn.Module) -> list[Structure]:
    if not isinstance(module, Layer):
        return []
    found = []
    if module.heads and _linear(module.qkv):
        size = _features(module.qkv) // (3 * module.heads)
        found.append(Structure("heads", "", "proj", ("qkv",), module.heads, size, 3))
    if _linear(module.up) and _linear(module.down):
        found.append(Structure("columns", "", "down", ("up",), _features(module.up)))
    return found


def _residual(module: nn.Module) -> list[Structure]:
    kind = type(module)
    if not isinstance(module, Block) and (kind.__module__, kind.__name__) != (
        "torchvision.models.resnet",
        "BasicBlock",
    ):
        return []
    if not _all(module, ("conv1", "conv2"), lambda part: isinstance(part, nn.Conv2d) and part.groups == 1):
        return []
    if not isinstance(_at(module, "bn1"), nn.BatchNorm2d):
        return []
    return [Structure("channels", "", "conv2", ("conv1", "bn1"), _features(_at(module, "conv1")))]


def _linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear)


def _features(module: nn.Module | None) -> int:
    """Return how many outputs a layer has."""
    assert module is not None
    weight = module.get_parameter("weight")
    return int(weight.shape[1] if is_conv1d(module) else weight.shape[0])


def _at(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        inner = module._modules.get(part)
        if inner is None:
            return None
        module = inner
    return module


def _all(module: nn.Module, names: Sequence[str], test: Callable[[nn.Module], bool]) -> bool:
    parts = [_at(module, name) for name in names]
    return all(part is not None and test(part) for part in parts)


def _join(holder: str, name: str) -> str:
    return f"{holder}.{name}" if holder else name
