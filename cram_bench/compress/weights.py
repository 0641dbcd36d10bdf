"""Which weights of a model are prunable: the model says so, or the rule of the paper does. All others are named."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from cram_bench.checks import instance, shown
from cram_bench.compress.masks import Dense, listing
from cram_bench.compress.names import Computed, Place, computed, places, refusal

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear, nn.Bilinear)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Weights(dict[str, nn.Parameter]):
    """The prunable weights of a model, name → parameter, and what else there is.

    Attributes:
        dense: every other matrix (parameter of two dimensions or more) by name, with its count of weights and the
            reason why it stays dense. The names of both together are all matrices of the model, each once.
        stored: how a weight lies in memory where that is not (outputs, inputs, …): for (inputs, outputs/groups, …),
            as transposed convolutions have it, the number of groups; None where nobody can know.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        dense: Mapping[str, Dense],
        stored: Mapping[str, int | None],
    ) -> None:
        super().__init__(weights)
        self.dense = dict(dense)
        self.stored = dict(stored)


def dense_of(weights: Mapping[str, Tensor]) -> dict[str, Dense]:
    """Return the matrices that stay dense beside `weights`, where these came from `prunable`."""
    return dict(weights.dense) if isinstance(weights, Weights) else {}


def by_output(weights: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """Turn a tensor of the shape of a weight to (outputs, inputs of a group, …); applied twice it is as before."""
    groups = weights.stored.get(name) if isinstance(weights, Weights) else None
    return tensor if groups is None else tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def knows_inputs(weights: Mapping[str, Tensor], name: str) -> bool:
    """Tell whether it is known which dimension of a weight counts the inputs."""
    return not isinstance(weights, Weights) or weights.stored.get(name, 1) is not None


def prunable(model: nn.Module, exclude: Iterable[str] = ()) -> Weights:
    """Name the weights that compression may zero, in the order of ``named_parameters()``, and all that it may not.

    A model that has a method ``prunable()`` returning parameter names decides for itself, also where it is a part of
    another model. For every other it is the rule of CrAM (arXiv 2207.14200, authors' code): the weight matrices and
    kernels (ndim > 1) of the layers that multiply by weights, first convolution and classifier included. These are
    torch's convolutions and transposed convolutions, linear and bilinear layers, attention's input projections (packed
    or not), recurrent layers and cells, and the ``Conv1D`` of transformers. Biases, normalisations, embeddings, tokens
    and parameters that a module of another kind holds itself (positions, experts stacked in three dimensions, a
    `ParameterList`) stay dense; a ``prunable()`` of the model can name such parameters.

    Parameters are told apart by identity. A shared weight counts once, under its first name; ``prunable()``, `exclude`
    and masks may use any of its names. One that is an embedding too, such as a tied head, stays dense: its zeros would
    be zeros of the embedding, and the network that writes ``F.linear(x, embedding.weight)`` has no other weight there.
    Wrappers (`torch.compile`, `DataParallel`, `DistributedDataParallel`, `AveragedModel`, also one inside another)
    change nothing: names are those of the model inside.

    What a layer computes from its weight in ``forward``, as weight standardisation does, cannot be seen.

    Args:
        model: any torch model.
        exclude: shell patterns over parameter names, such as ``"conv1.*"`` or ``"*.shortcut.*"``, to leave dense.

    Returns:
        Parameter name → parameter; its attribute ``dense`` names and counts every other matrix, with the reason.

    Raises:
        TypeError: `model` is no torch model, or `exclude` or what the model's ``prunable()`` returns is no list.
        ValueError: the model names a weight it does not have, a pattern matches nothing, nothing is left, a lazy weight
            has no shape yet, a weight is sharded over devices, or a weight is computed from other parameters
            (``torch.nn.utils.parametrizations``, ``torch.nn.utils.prune``), so that zeroing these would not zero it;
            the message names the remedy.

    >>> weights = prunable(nn.Sequential(nn.Embedding(5, 8), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    >>> list(weights), weights.dense
    (['1.weight', '3.weight'], {'0.weight': Dense(weights=40, reason='embedding')})
    """
    instance("model", model, nn.Module, "a torch model")
    patterns = _patterns(exclude)
    standing: dict[int, list[Place]] = {}
    for place in places(model):
        if is_lazy(place.parameter):
            raise ValueError(f"{place.name} has no shape yet: run a batch through the model first")
        if _is_sharded(place.parameter):
            raise ValueError(f"{place.name} is sharded over devices: compress the model before fully_shard")
        standing.setdefault(id(place.parameter), []).append(place)
    tensors = computed(model)
    declared = _declared(standing, tensors)
    excluded = _excluded(patterns, standing, tensors)
    for tensor in tensors:
        if tensor.name not in excluded and _wanted(tensor, declared):
            raise ValueError(refusal(tensor))
    part_of = {id(part): tensor.name for tensor in tensors for part in tensor.parts}
    weights: dict[str, nn.Parameter] = {}
    dense: dict[str, Dense] = {}
    stored: dict[str, int | None] = {}
    for key, alike in standing.items():
        name, parameter = alike[0].name, alike[0].parameter
        reason = f"{part_of[key]} is computed from it" if key in part_of else _reason(alike, declared)
        if reason is None and key in excluded:
            reason = "excluded"
        if reason is None:
            weights[name] = parameter
            stored |= _stored(name, alike)
        elif parameter.ndim > 1:
            dense[name] = Dense(parameter.numel(), reason)
    if not weights:
        left = f"; dense: {listing(dense)}" if dense else ""
        raise ValueError(f"{type(model).__name__} has no prunable weight: no convolution or linear layer is left{left}")
    return Weights(weights, dense, stored)


def _patterns(exclude: Iterable[str]) -> list[str]:
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list of patterns, not {exclude!r}")
    instance("exclude", exclude, Iterable, "a list of patterns")  # type: ignore[type-abstract]
    if isinstance(exclude, Iterator):  # empty from the second row of a table on
        raise TypeError(f"exclude is read more than once, so it must be a list of patterns, not {shown(exclude)}")
    patterns = list(exclude)
    for pattern in patterns:
        instance("a pattern of exclude", pattern, str, "a text such as 'conv1.*'")
    return patterns


_Standing = Mapping[int, list[Place]]
"""The places of every parameter, by its identity."""

_Declared = Mapping[int, set[int | str]]
"""What every module that decides itself has named, by its identity: parameters by theirs, computed tensors by name."""


def _declared(standing: _Standing, tensors: Sequence[Computed]) -> _Declared:
    modules: dict[int, nn.Module] = {}
    names: dict[int, dict[str, int | str]] = {}
    everything: list[tuple[Place | Computed, int | str]] = [(tensor, tensor.name) for tensor in tensors]
    everything += [(place, key) for key, alike in standing.items() for place in alike]
    for place, key in everything:
        if (scope := place.scope) is not None:
            modules[id(scope.module)] = scope.module
            known = names.setdefault(id(scope.module), {})
            known[_within(place.full, scope.full)] = known[_within(place.name, scope.name)] = key
    found = {}
    for owner, module in modules.items():
        kind, answer = type(module).__name__, module.prunable()  # type: ignore[operator]
        if isinstance(answer, str) or not isinstance(answer, Iterable):
            raise TypeError(f"{kind}.prunable() must return a list of parameter names, not {shown(answer)}")
        said = set(answer)
        if missing := sorted(map(str, said - names[owner].keys())):
            raise ValueError(f"{kind}.prunable() names {missing[0]!r}, which is not a parameter of it")
        found[owner] = {names[owner][name] for name in said}
    return found


def _within(name: str, prefix: str) -> str:
    return name[len(prefix) + 1 :] if prefix else name


def _excluded(patterns: Sequence[str], standing: _Standing, tensors: Sequence[Computed]) -> set[int | str]:
    """Return what a pattern matches under any of its names: parameters by identity, computed tensors by name."""
    names: dict[int | str, set[str]] = {
        key: {name for place in alike for name in (place.name, place.full)} for key, alike in standing.items()
    }
    names |= {tensor.name: {tensor.name, tensor.full} for tensor in tensors}
    excluded: set[int | str] = set()
    for pattern in patterns:
        matched = {key for key, known in names.items() if any(fnmatch.fnmatchcase(name, pattern) for name in known)}
        if not matched:
            like = next((alike[0].name for alike in standing.values()), "")
            raise ValueError(f"exclude pattern {pattern!r} matches no parameter; names look like {like!r}")
        excluded |= matched
    return excluded


def _wanted(tensor: Computed, declared: _Declared) -> bool:
    """Tell whether a computed tensor would be prunable, were it a parameter."""
    if tensor.scope is not None:
        named = declared[id(tensor.scope.module)]
        return tensor.name in named or any(id(part) in named for part in tensor.parts)
    return tensor.local in _multiplied(tensor.module)


def _reason(alike: Sequence[Place], declared: _Declared) -> str | None:
    """Say why a parameter stays dense, or None: it is prunable.

    Of its places one that says it must stay dense decides, then one that says it is prunable, whatever comes first.
    """
    parameter = alike[0].parameter
    if parameter.dtype not in _TYPES:
        return f"of type {str(parameter.dtype).removeprefix('torch.')}"
    asked = [place for place in alike if place.scope is not None]
    for place in asked:
        assert place.scope is not None
        if id(parameter) not in declared[id(place.scope.module)]:
            return f"not named by {type(place.scope.module).__name__}.prunable()"
    own = [place for place in alike if place.scope is None]
    if any(isinstance(place.module, _EMBEDDINGS) for place in own):
        return "embedding" if len(alike) == 1 else "shared with an embedding"
    if asked or (parameter.ndim > 1 and any(place.local in _multiplied(place.module) for place in own)):
        return None
    module = own[0].module
    return "normalisation" if isinstance(module, _NORMS) else f"own parameter of {type(module).__name__}"


def _multiplied(module: nn.Module) -> Sequence[str]:
    """Name the parameters of a layer that its inputs are multiplied by."""
    if isinstance(module, _LAYERS) or is_conv1d(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    return ("weight_ih", "weight_hh") if isinstance(module, nn.RNNCellBase) else ()


def _is_sharded(parameter: Tensor) -> bool:
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(parameter, library.DTensor)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is the ``Conv1D`` of transformers: a linear layer whose weight is (inputs, outputs)."""
    library = sys.modules.get("transformers.pytorch_utils")  # of a model that has one it is imported
    return library is not None and isinstance(module, library.Conv1D)


def _stored(name: str, alike: Sequence[Place]) -> dict[str, int | None]:
    """Return how a weight lies in memory, where that is not (outputs, inputs, …); see `Weights`."""
    for place in alike:
        if place.local == "weight" and isinstance(place.module, _TRANSPOSED):
            return {name: place.module.groups}
        if place.local == "weight" and is_conv1d(place.module):
            return {name: 1}
    known = any(place.local in _multiplied(place.module) for place in alike)
    return {} if known or alike[0].parameter.ndim != 3 else {name: None}
