"""Evaluate faster: BatchNorms folded into the convolutions before them, in a copy that is only run."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cram_bench.preserve import buffers_kept

_WORTH = 64 * 3 * 32 * 32  # values in a batch; tracing a network takes some milliseconds
_CLOSE = 1e-4  # of the largest logit; rounding alone stays a hundred times below


@torch.no_grad()
def folded(model: nn.Module, inputs: Tensor, worth: int = _WORTH) -> nn.Module:
    """Return a network with the outputs of `model` in eval mode, in which Conv2d → BatchNorm2d is one convolution.

    w' = w γ/√(σ² + ε) and b' = β + (b − μ) γ/√(σ² + ε), with today's weights and statistics: a change of the model
    later does not reach the copy. `model` itself is returned where `inputs`, a batch of images, hold fewer than `worth`
    values, where it cannot be traced, has hooks or nothing to fold, or where the outputs for a few inputs are not the
    same up to rounding. It is not changed.
    """
    graph = fold(model, inputs, worth)
    return graph.module if graph else model


def fold(model: nn.Module, inputs: Tensor, worth: int = _WORTH) -> Folded | None:
    """Return what `folded` would run, as a `Folded`; None where that would be `model` itself."""
    if inputs.ndim != 4 or inputs.numel() < worth:
        return None
    graph = Folded.of(model)
    return graph if graph and graph.folds and graph.agrees(model, inputs) else None


_TRACING = threading.Lock()


class _Tracer(fx.Tracer):
    """Record what its own thread calls: while it does, torch.fx reroutes the modules of all threads through it."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _traced(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    with _TRACING:  # two at once would put each other's detour back, for good
        held = [(module, dict(vars(module))) for module in model.modules()]
        try:
            graph = tracer.trace(model)
        finally:
            for module, attributes in held:  # a forward that notes something would leave what stands for it there
                for name in [name for name, value in vars(module).items() if value is not attributes.get(name)]:
                    del module.__dict__[name]
                    module.__dict__ |= {name: attributes[name]} if name in attributes else {}
    return fx.GraphModule(tracer.root, graph)


class Folded:
    """A traced network in which every Conv2d → BatchNorm2d in eval mode is one convolution.

    Attributes:
        module: what runs. All but the folded convolutions are the modules of the model itself.
        folds: by the name of a folded convolution, the two modules that it stands for.
    """

    def __init__(self, module: fx.GraphModule, folds: dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]]) -> None:
        self.module, self.folds = module, folds

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Folded | None:
        """Trace and fold; None for a model that has hooks or cannot be traced."""
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            return None
        try:
            with buffers_kept(model) as changed:
                traced = _traced(model)
                if changed():  # by the model's own code, which a graph would not run again
                    return None
        except Exception:  # whatever a model's own code meets when it is traced
            return None
        modules = dict(traced.named_modules())
        uses = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
        folds: dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]] = {}
        for node in list(traced.graph.nodes):
            before = node.args[0] if node.op == "call_module" and node.args else None
            if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
                continue
            norm, convolution = modules.get(str(node.target)), modules.get(str(before.target))
            if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or type(convolution) is not nn.Conv2d:
                continue
            if uses[before.target] > 1 or uses[node.target] > 1:
                continue
            name = f"folded_{len(folds)}"
            folds[name] = (convolution, norm)
            traced.add_submodule(name, fuse_conv_bn_eval(convolution, norm))
            before.target = name
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
        traced.recompile()
        return cls(traced.eval(), folds)

    @torch.no_grad()
    def agrees(self, model: nn.Module, inputs: Tensor) -> bool:
        """Tell whether a few inputs have the outputs of `model`, up to rounding."""
        few = inputs[:4]
        expected, found = model(few), self.module(few)
        if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
            return False
        return bool(found.shape == expected.shape and (found - expected).abs().max() <= _CLOSE * expected.abs().max())

    def parameters(self, name: str) -> Iterable[nn.Parameter]:
        """Return the model's parameters that the module of this name depends on."""
        for module in self.folds.get(name, (self.module.get_submodule(name),)):
            yield from module.parameters()

    def refolded(self) -> fx.GraphModule:
        """Fold everything again, with the weights and statistics that the model has now; return the module."""
        for name in self.folds:
            self.refold(name)
        return self.module

    @torch.no_grad()
    def refold(self, name: str) -> None:
        """Fold again a convolution whose weights have changed; anything else reads its weights when it runs."""
        if name in self.folds:
            self.module.add_submodule(name, fuse_conv_bn_eval(*self.folds[name]))
