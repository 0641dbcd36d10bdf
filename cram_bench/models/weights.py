"""Weights between models and files: which can be saved, and how those of somebody else's file are read and named."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cram_bench import untrusted
from cram_bench.checks import instance, one_line, shown

FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""How the names of files of weights end."""

_INNER = ("state_dict", "model_state_dict", "model", "net", "weights")  # where checkpoints keep the weights
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and averaged models, and of torch.compile


def storable(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state as safetensors takes it: contiguous, on the CPU, no two tensors in one memory.

    Tied weights come under each of their names, so that `load_state_dict` ties them again. Buffers that are not
    persistent are left out, as from every state of torch.

    Raises:
        ValueError: the state holds what such a file cannot; the message names it.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> state = storable(model)
    >>> first, second = state["0.weight"], state["1.weight"]
    >>> bool((first == second).all()), first.data_ptr() == second.data_ptr()
    (True, False)
    """
    from safetensors import SafetensorError
    from safetensors.torch import save

    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(_unsaved(model, name, f"no tensor, but {shown(tensor)}"))
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(_unsaved(model, name, "without values; call the model once on a batch, on a real device"))
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(
                _unsaved(model, name, f"{tensor.layout} of {tensor.dtype}; make it dense and not quantized")
            )
        try:
            save({name: torch.empty(0, dtype=tensor.dtype)})
        except (KeyError, ValueError, SafetensorError):
            raise ValueError(_unsaved(model, name, f"{tensor.dtype}, which safetensors does not hold")) from None
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        weights[name] = tensor.clone(memory_format=torch.contiguous_format) if place in seen else tensor
        seen.add(place)
    return weights


def _unsaved(model: nn.Module, name: str, what: str) -> str:
    return f"{type(model).__name__} could not be saved after its training: {name!r} of its state is {what}"


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a file of torch (.pth, .pt …) of which only tensors are loaded.

    A file of torch may hold the state itself, or a checkpoint with the state under ``state_dict``,
    ``model_state_dict``, ``model``, ``net`` or ``weights``. Code in the file is not run. The prefixes ``module.`` and
    ``_orig_mod.`` of wrapped models are taken off.

    Raises:
        ValueError: the file is damaged, holds a whole module, or holds no weights; the message says what to do.
        OSError: it is missing or may not be read.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            untrusted.tensors(path)
            return _unwrapped(load(path.read_bytes()))
        except SafetensorError as error:
            raise ValueError(f"{path} is not readable as safetensors: {one_line(error)}") from error
    with untrusted.opened(path):  # a missing file, or what is no file, is an OSError that names it
        pass
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a pickle that is none, or a damaged archive, leads to
        refused = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if refused:
            made = "torch.save(model.state_dict(), FILE) where it was made"
            how = f"{made}, or torch.load(FILE, weights_only=False) if you trust it"
            raise ValueError(
                f"{path} holds more than weights ({refused[1]}), and only weights are loaded; save those alone: {how}"
            ) from error
        raise ValueError(f"{path} is damaged, or no file of torch") from error
    found = _state(content)
    if found is None:
        held = (
            f"a mapping of {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else shown(content)
        )
        raise ValueError(
            f"{path} holds no weights by name, nor under {', '.join(_INNER)}: it holds {held or 'nothing'}"
        )
    return _unwrapped(found)


def load_(
    model: nn.Module, path: str | os.PathLike[str], rename: Mapping[str, str] | None = None, kind: str = ""
) -> None:
    """Load the weights of a file into `model`, all of them or none.

    Args:
        model: changed in place.
        path: as `read` takes it.
        rename: parts of names in the file → what the model calls them, such as ``{"downsample": "shortcut"}``. A part
            is one or more whole words between dots.
        kind: how messages call the model; its class by default.

    Raises:
        ValueError: as `read`; or names or shapes do not fit: the message says how many, and the first of each; or what
            the file holds are no weights, as `check_values` says.
    """
    instance("model", model, nn.Module, "a torch model")
    kind, found, own = kind or type(model).__name__, renamed(read(path), rename or {}), model.state_dict()
    # BatchNorm's count of batches is missing in old files, and torch starts it at 0
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in own]
    if missing or unexpected:
        parts = [f"{len(names)} name{'s' if len(names) > 1 else ''} {what}, first {names[0]!r}"
                 for what, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise ValueError(f"{path} does not fit {kind}: {'; '.join(parts)}")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, and {kind} needs {tuple(own[name].shape)}"
            raise ValueError(f"{path} does not fit {kind}: {name!r} has shape {shapes}")
    try:
        check_values(model, found)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {kind}: {error}") from None
    model.load_state_dict(found, strict=False)


def check_values(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that torch would load into `model` and that would make its numbers meaningless.

    Floating-point numbers of any width serve where the model has such, integers where it has integers. Where the
    model's own values are finite, so must these be, once they have its type.

    Args:
        model: as it was built.
        weights: by name; those of other shapes are left to `torch.nn.Module.load_state_dict`.

    Raises:
        ValueError: some are not; the message names the first.
    """
    for name, own in model.state_dict().items():
        given = weights.get(name)
        if given is None or not isinstance(own, Tensor) or is_lazy(own) or given.shape != own.shape:
            continue
        if given.layout is not torch.strided or _kind(given) != _kind(own):
            found = str(given.dtype if given.layout is torch.strided else given.layout).removeprefix("torch.")
            raise ValueError(f"{name!r} holds {found}, and must hold {_kind(own)}")
        wrong = int((~given.to(own.dtype).isfinite()).sum())
        if wrong and not own.is_meta and bool(own.isfinite().all()):
            raise ValueError(f"{wrong:,} of {given.numel():,} values of {name!r} are infinite or no numbers")


def _kind(tensor: Tensor) -> str:
    if tensor.is_quantized:
        return "quantized numbers"
    if tensor.is_floating_point():
        return "floating-point numbers"
    if tensor.is_complex():
        return "complex numbers"
    return "truth values" if tensor.dtype is torch.bool else "integers"


def renamed(weights: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    """Return `weights` with parts of their names changed, whole words between dots.

    Raises:
        ValueError: a part is in no name, or two names become one.

    >>> list(renamed({"layer1.downsample.0.weight": 0, "fc.weight": 0}, {"downsample": "shortcut", "fc": "linear"}))
    ['layer1.shortcut.0.weight', 'linear.weight']
    """
    names = {name: name for name in weights}
    for old, new in rename.items():
        pattern = re.compile(rf"(?<![^.]){re.escape(old)}(?![^.])")
        changed = {name: pattern.sub(new.replace("\\", r"\\"), now).strip(".") for name, now in names.items()}
        if changed == names:
            raise ValueError(f"rename: {old!r} is no part of a name, such as {next(iter(weights), '')!r}")
        names = changed
    if len(set(names.values())) < len(names):
        twice = next(now for now in names.values() if list(names.values()).count(now) > 1)
        raise ValueError(f"rename: two names become {twice!r}")
    return {names[name]: tensor for name, tensor in weights.items()}


def _state(content: Any) -> dict[str, Tensor] | None:
    """Return the state in what a file holds: itself, or what is under a usual name."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return dict(content)
    return next((state for name in _INNER if (state := _state(content.get(name))) is not None), None)


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that all names have, and the counter of an averaged model, which stands beside them."""
    for _ in range(len(_WRAPPERS) * 2):
        inner = {name: tensor for name, tensor in weights.items() if name != "n_averaged"}
        for prefix in _WRAPPERS:
            if inner and all(name.startswith(prefix) for name in inner):
                weights = {name.removeprefix(prefix): tensor for name, tensor in inner.items()}
    return weights
