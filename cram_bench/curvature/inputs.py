"""Second moments of layer inputs: H = (2/N) X Xᵀ, the Hessian of (1/N) ‖WX − ŴX‖² in every row of Ŵ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram_bench.compress.weights import is_conv1d
from cram_bench.curvature.samples import Forward
from cram_bench.outputs import fitting, tokens_seen
from cram_bench.preserve import buffers_kept, modes_kept

_AT_ONCE = 1 << 24  # entries of an unfolded batch


@dataclass(frozen=True)
class Layer:
    """A weight as a matrix (outputs, inputs), and the modules that multiply by it: of one kind, several if shared.

    The inputs of a convolution are those of a position: channel, row and column of the kernel, as its weight lies in
    memory; with groups, those of a group.
    """

    weight: Tensor
    modules: tuple[nn.Module, ...]

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1; every group has inputs of its own."""
        module = self.modules[0]
        return module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1

    @property
    def inputs(self) -> int:
        """How many inputs a row of the matrix has."""
        return self.weight.shape[0] if self._transposed else self.weight[0].numel()

    @property
    def bytes(self) -> int:
        """What its moments take."""
        return 8 * self.groups * self.inputs**2

    @property
    def _transposed(self) -> bool:
        return is_conv1d(self.modules[0])

    def rows(self, tensor: Tensor) -> Tensor:
        """Turn a tensor of the weight's shape to (groups, outputs of a group, inputs)."""
        matrix = tensor.T if self._transposed else tensor.flatten(1)
        return matrix.reshape(self.groups, -1, self.inputs)

    def back(self, rows: Tensor) -> Tensor:
        """Turn what `rows` returned to the weight's shape."""
        matrix = rows.reshape(-1, self.inputs)
        return matrix.T.contiguous() if self._transposed else matrix.reshape(self.weight.shape)


def supported(module: nn.Module) -> bool:
    """Tell if `moments` knows the inputs of a module: linear layers, Conv1d, Conv2d and transformers' ``Conv1D``."""
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or is_conv1d(module)


def layers(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the layers of `weights`, and, for those whose inputs cannot be seen, why.

    >>> known, others = layers(model := nn.Sequential(nn.Linear(3, 2), nn.GRU(2, 2)), dict(model.named_parameters()))
    >>> list(known), others["1.weight_ih_l0"]
    (['0.weight'], 'the inputs of a GRU are not seen')
    """
    names = {id(weight): name for name, weight in weights.items() if weight.ndim > 1}
    holders: dict[str, list[nn.Module]] = {}
    others: dict[str, str] = {}
    for module in model.modules():
        for local, parameter in module._parameters.items():
            name = names.get(id(parameter))
            if name is None:
                continue
            if local == "weight" and supported(module):
                holders.setdefault(name, []).append(module)
            else:
                others[name] = f"the inputs of a {type(module).__name__} are not seen"
    unseen = {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    for name, modules in holders.items():
        if any(module in unseen for module in modules):  # torch multiplies by its weight without calling it
            others[name] = "the inputs of a MultiheadAttention are not seen"
        if name not in others and len({(type(m), getattr(m, "groups", 1)) for m in modules}) > 1:
            others[name] = "layers of different kinds share it"
    known = {name: Layer(weights[name], tuple(holders[name])) for name in weights if name in holders}
    return {name: layer for name, layer in known.items() if name not in others}, others


def groups(known: Mapping[str, Layer], memory: int) -> list[list[str]]:
    """Split layers so that each part's moments fit `memory` bytes: a pass over the examples each; no layer is split."""
    parts: list[list[str]] = []
    room = 0
    for name, layer in known.items():
        if not parts or layer.bytes > room:
            parts.append([])
            room = memory
        parts[-1].append(name)
        room -= layer.bytes
    return parts


@dataclass(frozen=True)
class Moments:
    """What a pass over examples has seen.

    Attributes:
        matrices: name → H = (2/N) X Xᵀ, shape (groups, inputs, inputs), float64; of layers that ran.
        counts: name → N, the columns of X: positions of a convolution, rows of a linear layer, over all examples and
            uses.
        order: every parameter of more than one dimension of a layer that ran, by identity, in the order of its first
            use: embeddings and layers that were not asked for too. What holds other modules is no layer, attention
            excepted: its own parameters, such as the positions of a transformer, are not counted.
    """

    matrices: dict[str, Tensor]
    counts: dict[str, int]
    order: list[int]


def moments(
    model: nn.Module,
    known: Mapping[str, Layer],
    batches: Iterable[tuple[Any, Any]],
    forward: Forward | None = None,
) -> Moments:
    """Collect H of layers in one pass, in eval mode; the model is left as it was.

    Convolutions are unfolded with their stride, padding (of any mode) and dilation; grouped ones have an H a group.
    Linear layers take inputs of any leading dimensions; tokens of padding are left out where the model says which they
    are (`cram_bench.outputs.tokens_seen`). A layer that is used several times, or a weight that several layers share,
    sees the inputs of all. Products are in the type of the inputs, at least float32, and summed over batches in
    float64.

    Args:
        model: any torch model.
        known: as `layers` returns them.
        batches: (inputs, labels).
        forward: (model, inputs) → anything, to run the model.

    Raises:
        ValueError: an input of a layer is not finite.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> known, _ = layers(model, {"weight": model.weight})
    >>> moments(model, known, [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), None)]).matrices["weight"].tolist()
    [[[10.0, 2.0], [2.0, 4.0]]]
    """
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    order: dict[int, None] = {}
    fit = fitting(model)
    hooks = []
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        modes_kept(model),
        buffers_kept(model),
        tokens_seen(model) as rows,
    ):
        model.eval()

        def add(name: str, module: nn.Module, x: Tensor) -> None:
            total = found.get(name)
            if total is None:
                layer = known[name]
                shape = (layer.groups, layer.inputs, layer.inputs)
                total = found[name] = torch.zeros(shape, dtype=torch.float64, device=x.device)
                counts[name] = 0
            for part in _columns(module, x, rows):
                part = part.to(torch.promote_types(part.dtype, torch.float32))
                total.add_(part @ part.mT)
                counts[name] += part.shape[-1]

        def hook(name: str | None, keys: Sequence[int]) -> Any:
            def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                order.update(dict.fromkeys(keys))
                if name is not None:
                    add(name, module, args[0] if args else kwargs["input"])

            return see

        holders = {module: name for name, layer in known.items() for module in layer.modules}
        try:
            for module in model.modules():
                keys = [id(p) for p in module._parameters.values() if p is not None and p.ndim > 1]
                layer = isinstance(module, nn.MultiheadAttention) or not any(module.children())
                if keys and layer:
                    see = hook(holders.get(module), keys)
                    hooks.append(module.register_forward_pre_hook(see, with_kwargs=True))
            for inputs, _ in batches:
                model(fit(inputs)) if forward is None else forward(model, fit(inputs))
        finally:
            for handle in hooks:
                handle.remove()
    for name, total in found.items():
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"an input of the layer of {name} is not finite: look at the examples and the model's outputs there"
            )
        if counts[name]:
            total.mul_(2 / counts[name])
    return Moments({name: total for name, total in found.items() if counts[name]}, counts, list(order))


def _columns(module: nn.Module, x: Tensor, rows: Any) -> Iterable[Tensor]:
    """Yield the inputs of a layer as columns (groups, inputs, n), some examples at a time."""
    x = x.detach()
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        yield rows(x).T[None]
        return
    spatial = len(module.kernel_size)
    x = x[None] if x.ndim == spatial + 1 else x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes = [module.kernel_size, module.dilation, module.stride]
    if spatial == 1:
        x, sizes = x[:, :, None], [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    each = x[0].numel() * kernel[0] * kernel[1] // (stride[0] * stride[1])
    for part in x.split(max(1, _AT_ONCE // max(1, each))):
        unfolded = F.unfold(part, kernel, dilation, 0, stride)  # (n, channels · kernel, positions)
        split = unfolded.unflatten(1, (module.groups, -1))
        yield split.permute(1, 2, 0, 3).flatten(2)
