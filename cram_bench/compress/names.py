"""The parameters of a model by identity: where each one stands, and under which names it is known.

A wrapper (`torch.compile`, `DataParallel`, `DistributedDataParallel`, `AveragedModel`, a checkpointed block) adds a
part to the name of every parameter inside, such as ``_orig_mod.`` or ``module.``. Here names go without it, so what is
said of a model holds for the wrapped one too, wherever in it the wrapper stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

_T = TypeVar("_T")

_ADDED = ("_orig_mod", "_checkpoint_wrapped_module")  # names that torch.compile and checkpointing give what they wrap
_AS_MODULE = (DataParallel, DistributedDataParallel, AveragedModel)


class Scope(NamedTuple):
    """A module that says with a method ``prunable()`` which of its weights may be zeroed; it decides for all in it."""

    module: nn.Module
    name: str
    full: str


class Place(NamedTuple):
    """Where a parameter stands. A shared parameter has several places."""

    name: str
    """Its name, wrappers left out."""
    full: str
    """Its name as ``model.named_parameters()`` has it."""
    local: str
    module: nn.Module
    parameter: nn.Parameter
    scope: Scope | None


class Computed(NamedTuple):
    """A tensor that its module computes from parameters at every use, so that zeroing a parameter does not zero it."""

    name: str
    full: str
    local: str
    module: nn.Module
    parts: tuple[nn.Parameter, ...]
    scope: Scope | None
    remedy: str


def places(model: nn.Module) -> list[Place]:
    """Return the places of all parameters in the order of ``named_parameters()``, shared ones again and again."""
    return [
        Place(_joined(name, local), _joined(full, local), local, module, parameter, scope)
        for name, full, module, scope in _modules(model)
        for local, parameter in module._parameters.items()
        if parameter is not None
    ]


def lookup(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name → parameter for every name that a parameter has, with and without the names of wrappers.

    >>> from torch.optim.swa_utils import AveragedModel
    >>> sorted(lookup(AveragedModel(nn.Linear(2, 1, bias=False))))
    ['module.weight', 'weight']
    """
    listed = places(model)
    return {place.full: place.parameter for place in listed} | {place.name: place.parameter for place in listed}


def found(known: Mapping[str, _T], name: str) -> _T | None:
    """Return what is called `name` in a `lookup`, the name perhaps being that inside of some wrapper."""
    if name in known:
        return known[name]
    parts = [part for part in name.split(".") if part not in (*_ADDED, "module")]
    return known.get(".".join(parts))


def computed(model: nn.Module) -> list[Computed]:
    """Return the tensors that parametrizations, ``torch.nn.utils.prune`` and older hooks of its kind compute."""
    return [
        Computed(_joined(name, local), _joined(full, local), local, module, parts, scope, remedy)
        for name, full, module, scope in _modules(model)
        for local, parts, remedy in _computed(module)
    ]


def refusal(tensor: Computed) -> str:
    """Say in one line why a computed tensor cannot be pruned, and what to do."""
    where = tensor.full.rpartition(".")[0]
    module = f"module = model.get_submodule({where!r})" if where else "module being the model"
    return (
        f"{tensor.name} is computed from other parameters at every use, so zeroing those does not zero it: "
        f"call {tensor.remedy} first, {module}, or leave it dense with exclude=[{tensor.name!r}]"
    )


def _computed(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Parameter, ...], str]]:
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            parts = tuple(module.parametrizations[name].parameters(recurse=False))  # type: ignore[index, union-attr]
            yield name, parts, f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
    for key, parameter in own.items():
        name, _, kind = key.rpartition("_")
        if kind == "orig" and f"{name}_mask" in module._buffers:
            yield name, (parameter,), f"torch.nn.utils.prune.remove(module, {name!r})"
        elif kind == "orig" and f"{name}_u" in module._buffers:
            yield name, (parameter,), f"torch.nn.utils.remove_spectral_norm(module, {name!r})"
        elif kind == "v" and f"{name}_g" in own:
            yield name, (parameter, own[f"{name}_g"]), f"torch.nn.utils.remove_weight_norm(module, {name!r})"


def _modules(
    module: nn.Module, name: str = "", full: str = "", scope: Scope | None = None
) -> Iterator[tuple[str, str, nn.Module, Scope | None]]:
    """Yield name without wrappers, full name, module, scope, in the order of ``named_modules()``, shared again."""
    inner = _inside(module)
    # Looked up on the class, for a wrapper of somebody else's may pass on what it does not know to the model inside.
    if (
        scope is None
        and inner is None
        and callable(vars(module).get("prunable", getattr(type(module), "prunable", None)))
    ):
        scope = Scope(module, name, full)
    yield name, full, module, scope
    for key, child in module._modules.items():
        if child is not None:
            yield from _modules(child, name if key == inner else _joined(name, key), _joined(full, key), scope)


def _inside(module: nn.Module) -> str | None:
    """Return under which name a wrapper holds the model inside, or None where `module` is no wrapper."""
    if isinstance(module, _AS_MODULE):
        return "module"
    return next((name for name in _ADDED if name in module._modules), None)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
