"""What goes into a model, and how logits are read off what comes out. Stands beside all rooms and uses none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def logits_of(output: Any) -> Tensor:
    """Read the logits off what a model returned, as `cram_bench.probes.common` says.

    Raises:
        TypeError: there are none where they are looked for.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping):
        for name in ("logits", "out"):
            if isinstance(output.get(name), Tensor):
                return output[name]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    keys = f" of {', '.join(map(str, list(output)[:5]))}" if isinstance(output, Mapping) else ""
    raise TypeError(
        f"the model returns {type(output).__name__}{keys}, in which no logits are found: give forward=, "
        "a function (model, inputs) → logits"
    )


def classes_of(logits: Any) -> Tensor:
    """Return `logits`, which must have the shape (n, classes)."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        raise ValueError(
            f"outputs must be logits of shape (n, classes), and have {what}: give forward= or loss= for another task"
        )
    return logits


def normal(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may keep; one made in ``inference_mode`` must be copied for that."""
    return tensor.clone() if tensor.is_inference() else tensor


def fitting(model: nn.Module) -> Callable[[Any], Any]:
    """Return a function that puts inputs on the model's device and floating-point ones into its type."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)

    def fit(x: Any) -> Any:
        if isinstance(x, Tensor):
            x = normal(x)
            if like is None:
                return x
            return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
        fitted = {key: fit(value) for key, value in x.items()} if isinstance(x, Mapping) else x
        if isinstance(x, (tuple, list)) and type(x) in (tuple, list):
            fitted = type(x)(fit(value) for value in x)
        same = all(a is b for a, b in zip(tensors_of(x), tensors_of(fitted), strict=True))
        return x if same else fitted

    return fit


def tensors_of(x: Any) -> Iterator[Tensor]:
    """Yield the tensors in a batch of inputs: itself, or those in a mapping or tuple."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (Mapping, tuple, list)):
        for value in x.values() if isinstance(x, Mapping) else x:
            yield from tensors_of(value)


def rows_of(inputs: Any, index: slice) -> Any:
    """Return some examples of a batch of inputs: a tensor, or a mapping or tuple of tensors."""
    if isinstance(inputs, Mapping):
        return {key: rows_of(value, index) for key, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(rows_of(value, index) for value in inputs)
    return inputs[index]


_PRESENT = ("attention_mask",)  # 1 where a token is
_ABSENT = ("key_padding_mask", "src_key_padding_mask")  # true where there is none


@contextmanager
def tokens_seen(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """For the length of a block, read which tokens are padding off what the modules of `model` are called with.

    A module says so by an argument named ``attention_mask`` (transformers: 1 where a token is), or ``key_padding_mask``
    or ``src_key_padding_mask`` (torch: true where there is none), of shape (b, length); as `Encoder` calls its body.

    Yields:
        A function from features (…, f) to rows (n, f), without those of padding where the leading dimensions are (b,
        length).
    """
    present: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is model:
            present.clear()
        for named in (kwargs, *(value for value in args if isinstance(value, Mapping))):
            for name in (*_PRESENT, *_ABSENT):
                mask = named.get(name)
                if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
                    present[:] = [mask != 0 if name in _PRESENT else mask == 0]

    def rows(x: Tensor) -> Tensor:
        if present and x.ndim == 3 and x.shape[:2] == present[0].shape:
            return x[present[0].to(x.device)]
        return x.reshape(-1, x.shape[-1])

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in model.modules()]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
