"""Evaluate a network again and again with one parameter changed: only what comes after it is computed anew."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cram_bench.compress import lookup
from cram_bench.data import Batches, batches_of
from cram_bench.models.folding import Folded
from cram_bench.outputs import fitting, logits_of
from cram_bench.preserve import copy_into, preserved
from cram_bench.train import Score, evaluate

Change = tuple[str, Callable[[Tensor], Tensor]]
"""The name of a parameter, and a function from its values to those to try."""

_BYTES = 2**29  # of kept activations
_LEAST = 16  # images at once: below, what is saved is lost again


@torch.no_grad()
def evaluate_changes(
    model: nn.Module,
    data: Batches,
    changes: Sequence[Change],
    before: Callable[[], None] = lambda: None,
    measure: Callable[[], dict[str, float]] | None = None,
    quick: bool = True,
    scores: Callable[[], Score] = Score,
) -> list[dict[str, float]]:
    """Return what `evaluate` gives for every change alone; the model is left as it was found.

    A network that torch.fx can trace is run once for each batch; a change is then computed from its parameter
    onward, with the activations kept from that run. Others are evaluated from the beginning.

    Args:
        model: any classifier.
        data: as `evaluate` takes them.
        changes: each alone.
        before: called before every computation; what it raises ends the whole.
        measure: what to take instead of ``evaluate(model, data)`` where a change is evaluated from the beginning.
        quick: False leaves out the tracing, where what is measured is not the cross-entropy of what the network
            returns.
        scores: makes what sums up a change.
    """
    with preserved(model):
        model.eval()
        if quick and (graph := Folded.of(model)):
            _without_inplace(graph.module)
            try:
                return _onward(model, graph, data, changes, before, scores)
            except _CannotError:
                pass
        measure = measure or (lambda: _scored(model, data, scores()))
        return [_from_the_start(model, measure, change, before) for change in changes]


class _Each(Score):
    """Keep the loss of every example too."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        super().add(logits, labels)
        self.losses.append(F.cross_entropy(logits.float(), labels, reduction="none").double().cpu())


def rises(
    model: nn.Module, data: Batches, changes: Sequence[Change], before: Callable[[], None] = lambda: None
) -> list[tuple[float, float]]:
    """Return what every change alone adds to the cross-entropy: the mean over the examples, and its standard error.

    Each example is compared with itself, so that the error is that of the mean of n differences, s/√n; NaN for one.
    """
    some = next(iter(lookup(model)))
    made: list[_Each] = []

    def score() -> _Each:
        made.append(_Each())
        return made[-1]

    evaluate_changes(model, data, [(some, lambda values: values), *changes], before, scores=score)
    dense, *others = (torch.cat(each.losses) for each in made[-len(changes) - 1 :])  # what was given up is before these
    found = [losses - dense for losses in others]
    return [(float(d.mean()), float(d.std() / len(d) ** 0.5) if len(d) > 1 else float("nan")) for d in found]


class _CannotError(Exception):
    """The traced network computes something else, changes an activation in place, or its activations are too large."""


def _scored(model: nn.Module, data: Batches, score: Score) -> dict[str, float]:
    if type(score) is Score:
        return evaluate(model, data)
    fit = fitting(model)
    for inputs, labels in batches_of(data):
        score.add(logits_of(model(fit(inputs))), labels)
    return score.result()


def _from_the_start(
    model: nn.Module, measure: Callable[[], dict[str, float]], change: Change, before: Callable[[], None]
) -> dict[str, float]:
    before()
    parameter = lookup(model)[change[0]]
    with preserved(model):
        copy_into([parameter], [change[1](parameter.detach().clone())])
        return measure()


def _onward(
    model: nn.Module,
    graph: Folded,
    data: Batches,
    changes: Sequence[Change],
    before: Callable[[], None],
    make: Callable[[], Score],
) -> list[dict[str, float]]:
    parameters = lookup(model)
    users = {name: _users(graph, parameters[name]) for name, _ in changes}
    after = {name: _after(graph.module.graph, nodes) for name, nodes in users.items()}
    scores = [make() for _ in changes]
    for index, (inputs, labels) in enumerate(_pieces(graph.module, batches_of(data))):
        if not index and not graph.agrees(model, inputs):
            raise _CannotError
        kept = _Keeping(graph.module).activations(inputs)
        for (name, change), score in zip(changes, scores, strict=True):
            before()
            start = {node: value for node, value in kept.items() if node not in after[name]}
            with _changed(parameters[name], change, graph, users[name]):
                score.add(fx.Interpreter(graph.module).run(inputs, initial_env=start), labels)
    return [score.result() for score in scores]


@contextlib.contextmanager
def _changed(
    parameter: Tensor, change: Callable[[Tensor], Tensor], graph: Folded, users: Sequence[fx.Node]
) -> Iterator[None]:
    values = parameter.detach().clone()
    try:
        copy_into([parameter], [change(values.clone())])
        _refold(graph, users)
        yield
    finally:
        copy_into([parameter], [values])
        _refold(graph, users)


def _refold(graph: Folded, users: Sequence[fx.Node]) -> None:
    for node in users:
        if node.op == "call_module":
            graph.refold(str(node.target))


class _Keeping(fx.Interpreter):
    """Run a graph and keep what every node returned."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.versions: list[tuple[Tensor, int]] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.versions.append((result, result._version))
        return result

    def activations(self, inputs: Tensor) -> dict[fx.Node, Any]:
        self.run(inputs)
        if any(tensor._version != version for tensor, version in self.versions):
            raise _CannotError
        return self.env


def _pieces(module: fx.GraphModule, batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Split batches so that the activations of a piece fit into `_BYTES`."""
    size = 0
    for inputs, labels in batches:
        if not isinstance(inputs, Tensor):
            raise _CannotError
        if not size:
            some = _Keeping(module).activations(inputs[:2]).values()
            each = sum(value.nbytes for value in some if isinstance(value, Tensor)) / len(inputs[:2])
            size = max(1, int(_BYTES / max(each, 1)))
            if size < min(_LEAST, len(inputs)):
                raise _CannotError
        yield from zip(inputs.split(size), labels.split(size), strict=True)


def _users(graph: Folded, parameter: Tensor) -> list[fx.Node]:
    """Return the nodes that read a parameter."""
    found = []
    for node in graph.module.graph.nodes:
        if node.op == "call_module":
            if any(one is parameter for one in graph.parameters(str(node.target))):
                found.append(node)
        elif node.op == "get_attr" and operator.attrgetter(str(node.target))(graph.module) is parameter:
            found.append(node)
    return found


def _after(graph: fx.Graph, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes, all that depend on them, and the output."""
    found: set[fx.Node] = set()
    waiting = [*nodes, graph.output_node()]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.users)
    return found


def _without_inplace(module: fx.GraphModule) -> None:
    """Let modules and functions return a new tensor where they would change what they were given."""
    for node in module.graph.nodes:
        if node.op == "call_module" and getattr(module.get_submodule(str(node.target)), "inplace", False):
            other = copy.copy(module.get_submodule(str(node.target)))
            other.inplace = False  # type: ignore[assignment]
            node.target = f"not_in_place_{node.name}"
            module.add_submodule(node.target, other)
        elif node.op == "call_function" and node.target is operator.iadd:
            node.target = operator.add
        elif node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
    module.recompile()
