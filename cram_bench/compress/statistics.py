"""Statistics correction: after pruning, every layer's outputs have the mean and variance of the dense model's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cram_bench.checks import instance, shown
from cram_bench.compress.batchnorm import _Moments
from cram_bench.compress.weights import is_conv1d
from cram_bench.outputs import fitting, tokens_seen
from cram_bench.preserve import modes_kept

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = _CONVOLUTIONS[3:]
_LEAST = 1e-8  # of the dense variance: what has less is constant, and is not scaled

Run = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Channels:
    """Mean and variance of every channel over examples and positions, float64, and how many values they are of."""

    mean: Tensor
    variance: Tensor
    count: int


@dataclass(frozen=True)
class Statistics:
    """What `layer_statistics` has seen.

    Attributes:
        sites: module name → statistics, in the order of the forward pass: of the input of every BatchNorm with running
            statistics, and of the output of every linear layer and convolution that no such BatchNorm follows.
        uses: how often each ran on a batch.
        untouched: module name → why `correct_statistics` leaves it.
        examples: batches that were seen.
    """

    sites: dict[str, Channels]
    uses: dict[str, int]
    untouched: dict[str, str] = field(default_factory=dict)
    examples: int = 0


@torch.no_grad()
def layer_statistics(model: nn.Module, batches: Iterable[Any], forward: Run | None = None) -> Statistics:
    """Return mean and variance of the channels of every layer of the dense model, in eval mode, and leave it as it was.

    Args:
        model: any torch model.
        batches: inputs, or tuples that begin with them, such as ``Dataset.calibration()`` gives. `correct_statistics`
            needs the same.
        forward: (model, inputs) → anything, to run the model on inputs that it does not take as its only argument.

    Raises:
        ValueError: `batches` are empty, or a layer's outputs are not finite.
        TypeError: `batches` are no batches.

    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).eval()
    >>> _ = model[0].weight.data.fill_(2.0)
    >>> seen = layer_statistics(model, [torch.tensor([[1.0], [3.0]])])
    >>> {name: (site.mean.tolist(), site.variance.tolist()) for name, site in seen.sites.items()}
    {'1': ([4.0], [4.0])}
    """
    held, names = _batches(batches), _sites(model)
    moments: dict[nn.Module, _Moments] = {}
    uses: dict[nn.Module, int] = {}
    last: dict[nn.Module, weakref.ref[Tensor]] = {}
    followed: set[nn.Module] = set()

    def see(module: nn.Module, x: Tensor, output: bool) -> None:
        if isinstance(x, Tensor):
            if not output:
                followed.update(layer for layer, made in last.items() if made() is x)
            uses[module] = uses.get(module, 0) + 1
            moments.setdefault(module, _Moments()).add(_by_channel(module, x, rows))
            if output:
                last[module] = weakref.ref(x)

    with _watched(model, names, see) as (run, rows):
        for inputs in held:
            last.clear()
            run(inputs, forward)
    untouched = {names[module]: "it did not run" for module in names if module not in moments}
    found: dict[str, Channels] = {}
    for module, moment in moments.items():
        if module in followed:
            continue
        name = names[module]
        if reason := _shared(model, module):
            untouched[name] = reason
            continue
        variance = moment.squares / max(1, moment.count)
        if not bool((variance.isfinite() & moment.mean.isfinite()).all()):
            raise ValueError(f"outputs of {name} are not finite on these batches: look at the model and its inputs")
        found[name] = Channels(moment.mean, variance, moment.count)
    each = {names[module]: count // len(held) for module, count in uses.items()}
    return Statistics(found, {name: each[name] for name in found}, untouched, len(held))


@torch.no_grad()
def correct_statistics(
    model: nn.Module, reference: Statistics, batches: Iterable[Any], forward: Run | None = None
) -> dict[str, str]:
    """Give every layer's outputs the mean and variance of the dense model's, in place; zeros of weights stay zeros.

    Layer by layer in the order of the forward pass, each measured with those before it corrected (the statistics
    correction of TACO, arXiv 2303.14409, and of the code of OBC, arXiv 2208.11580). With mean m and variance v of a
    channel now, M and V in the dense model, and r = √(v/V):

    * BatchNorm, of its input: (x − μ)/√(σ² + ε) becomes what it was of (x − m)/r + M, by σ² ← r²(σ² + ε) − ε and
      μ ← m − r (M − μ). Where that variance would be negative, the affine weight takes the factor. Otherwise than
      BatchNorm tuning this keeps what the dense model's outputs are on these very batches, so few examples of few
      classes do no harm.
    * A layer that no BatchNorm follows: the rows of its weight are divided by r, and its bias b ← M − (m − b)/r.
      Without a bias the mean stays what the scale makes it.

    A channel that is constant, now or in the dense model, gets the mean alone. A model that was not changed stays the
    same up to rounding. With one batch it is a single pass; with several, a pass for each layer.

    Args:
        model: the pruned model, of the same modules as the dense one.
        reference: `layer_statistics` of the dense model.
        batches: the same as there.
        forward: as there.

    Returns:
        Module name → why it was left, or in part.

    Raises:
        ValueError: these are other batches or is another model, or outputs are not finite; the model may then be
            corrected in part.
        TypeError: `batches` are no batches.

    >>> model = nn.Linear(2, 1)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> dense = layer_statistics(model, [x])
    >>> model.weight.data[0, 0] = 0.0
    >>> correct_statistics(model, dense, [x])
    {}
    >>> now = layer_statistics(model, [x]).sites[""]
    >>> torch.allclose(now.mean, dense.sites[""].mean), torch.allclose(now.variance, dense.sites[""].variance)
    (True, True)
    """
    instance("reference", reference, Statistics, "what layer_statistics returned for the dense model")
    held, names = _batches(batches), _sites(model)
    modules = {name: module for module, name in names.items()}
    if missing := next((name for name in reference.sites if name not in modules), None):
        raise ValueError(f"the dense model had a layer {missing!r}, and this one has not: give the same model, pruned")
    if len(held) != reference.examples:
        raise ValueError(_other("batches", reference.examples, len(held)))
    left = dict(reference.untouched)
    if len(held) == 1 and all(uses == 1 for uses in reference.uses.values()):
        _pass(model, {modules[name]: name for name in reference.sites}, reference, held, forward, left, at_once=True)
    else:
        for name in reference.sites:
            _pass(model, {modules[name]: name}, reference, held, forward, left)
    return left


class _Enough(Exception):  # no error: a pass that has seen what it looks for
    pass


def _pass(
    model: nn.Module,
    names: dict[nn.Module, str],
    reference: Statistics,
    batches: Sequence[Any],
    forward: Run | None,
    left: dict[str, str],
    *,
    at_once: bool = False,
) -> None:
    """Correct some layers: each as soon as it has seen its batch where `at_once`, else after the pass."""
    moments = {module: _Moments() for module in names}

    def see(module: nn.Module, x: Tensor, output: bool) -> Tensor | None:
        if not isinstance(x, Tensor):
            return None
        moments[module].add(_by_channel(module, x, rows))
        if at_once:
            scale, shift = _correct(module, names[module], reference, moments[module], left)
            if output:
                shape = [-1, *[1] * len(module.kernel_size)] if isinstance(module, _CONVOLUTIONS) else [-1]
                return x * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape)
        elif reference.uses[names[module]] == 1:
            raise _Enough
        return None

    with _watched(model, names, see) as (run, rows):
        for inputs in batches:
            with suppress(_Enough):
                run(inputs, forward)
    if not at_once:
        for module, name in names.items():
            _correct(module, name, reference, moments[module], left)


def _correct(
    module: nn.Module, name: str, reference: Statistics, moment: _Moments, left: dict[str, str]
) -> tuple[Tensor, Tensor]:
    """Correct a layer in place; return what its outputs so far are multiplied by, and what is added then."""
    dense = reference.sites[name]
    if moment.count != dense.count:
        raise ValueError(_other(f"values of every channel of {name}", dense.count, moment.count))
    mean, variance = moment.mean, moment.squares / max(1, moment.count)
    if not bool((variance.isfinite() & mean.isfinite()).all()):
        raise ValueError(f"outputs of {name} are not finite after pruning: look at the pruned weights")
    varies = (dense.variance > 0) & (variance > _LEAST * dense.variance)
    ratio = torch.where(varies, variance / torch.where(varies, dense.variance, 1.0), 1.0).sqrt()
    if isinstance(module, _BatchNorm):
        running, spread = module.running_mean, module.running_var
        assert running is not None
        assert spread is not None
        before = spread.double() + module.eps
        least = (module.eps / before).sqrt()  # below it no variance is small enough: the affine weight takes the factor
        low = ratio < least
        if module.weight is not None:
            module.weight.mul_(torch.where(low, least / ratio, 1.0).to(module.weight.dtype))
        elif bool(low.any()):
            left[name] = (
                f"{int(low.sum())} channels vary too little for its eps, and it has no weight: their mean alone"
            )
            ratio = torch.where(low, least, ratio)
        running.copy_(mean - ratio * (dense.mean - running.double()))
        spread.copy_(torch.where(ratio == 1, spread.double(), (ratio.square() * before - module.eps).clamp(min=0)))
        return ratio, mean
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    scale = 1 / ratio
    along = 1 if isinstance(module, _TRANSPOSED) or is_conv1d(module) else 0
    if isinstance(module, _TRANSPOSED) and module.groups > 1:
        by = scale.view(module.groups, 1, -1).expand(-1, weight.shape[0] // module.groups, -1).flatten(0, 1)
        by = by.view(*by.shape, *[1] * (weight.ndim - 2))
    else:
        by = scale.view(*[1] * along, -1, *[1] * (weight.ndim - along - 1))
    weight.mul_(by.to(weight.dtype))
    if bias is None:
        left[name] = "it has no bias: its scale alone"
        return scale, torch.zeros_like(scale)
    old = bias.double()
    bias.copy_(dense.mean - scale * (mean - old))
    return scale, dense.mean - scale * mean


def _other(what: str, there: int, here: int) -> str:
    return f"the dense model's statistics are of {there:,} {what}, and these are {here:,}: give the same batches"


def _batches(batches: Iterable[Any]) -> list[Any]:
    what = "batches of inputs, such as Dataset.calibration() gives"
    instance("what statistics are of", batches, Iterable, what)  # type: ignore[type-abstract]
    found = [batch[0] if isinstance(batch, (tuple, list)) and batch else batch for batch in batches]
    if not found:
        raise ValueError("statistics need at least one batch of inputs, and there is none")
    return found


def _sites(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers that can be corrected, with their names."""
    instance("model", model, nn.Module, "a torch model")
    return {module: name for name, module in model.named_modules() if _norm(module) or _linear(module)}


def _norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or is_conv1d(module)


def _shared(model: nn.Module, module: nn.Module) -> str | None:
    """Say why a layer's weight and bias cannot be scaled, or None."""
    if _norm(module):
        return None
    own = {id(parameter) for parameter in module._parameters.values() if parameter is not None}
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    for other in model.modules():
        if other is not module and any(id(parameter) in own for parameter in other._parameters.values()):
            return "it shares a parameter with another layer"
    return None


def _by_channel(module: nn.Module, x: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Turn a tensor to one whose dimension 1 is the channel."""
    if isinstance(module, _CONVOLUTIONS):
        return x[None] if x.ndim == len(module.kernel_size) + 1 else x
    return x if _norm(module) else rows(x)


@contextmanager
def _watched(
    model: nn.Module, names: Iterable[nn.Module], see: Callable[[nn.Module, Any, bool], Tensor | None]
) -> Iterator[tuple[Callable[[Any, Run | None], None], Callable[[Tensor], Tensor]]]:
    """Call `see` with the input of every BatchNorm and the output of every other layer, in eval mode."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(module, args[0] if args else kwargs["input"], False)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return see(module, output, True)

    fit = fitting(model)

    def run(inputs: Any, forward: Run | None) -> None:
        if forward is not None:
            forward(model, fit(inputs))
        elif isinstance(inputs, (Tensor, Mapping)):
            model(fit(inputs))
        else:
            raise TypeError(f"a batch must be inputs, or a tuple that begins with them, not {shown(inputs)}")

    hooks = []
    with torch.inference_mode(False), torch.no_grad(), modes_kept(model), tokens_seen(model) as rows:
        model.eval()
        try:
            for module in names:
                if _norm(module):
                    hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                else:
                    hooks.append(module.register_forward_hook(after))
            yield run, rows
        finally:
            for hook in hooks:
                hook.remove()
