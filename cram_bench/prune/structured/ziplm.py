"""One look at a network, then a structure for every speed-up (ZipLM, arXiv 2302.04089)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cram_bench.checks import columns, integer, items, labels_within, number, unknown
from cram_bench.compress import Masks, dense_of, prunable
from cram_bench.compress.weights import is_conv1d
from cram_bench.curvature.inputs import Layer, groups, layers, moments
from cram_bench.curvature.obs import NotDefinite
from cram_bench.curvature.samples import Forward, Loss, chunks
from cram_bench.data import Batches
from cram_bench.losses import CrossEntropy
from cram_bench.outputs import classes_of, fitting, logits_of
from cram_bench.preserve import preserved
from cram_bench.prune.structured.programme import Choice, search, total, uniform
from cram_bench.prune.structured.removal import Path, ordered, remove
from cram_bench.prune.structured.structures import Structure, structures

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("ziplm", "uniform", "magnitude")
"""ZipLM's search; the same removal with one fraction in all layers; likewise by magnitude, uncorrected."""

_BATCH = 32  # examples that run together, at most
_SETTING = ("batch", "length", "precision", "device", "threads")  # what a latency table is measured for


@dataclass(frozen=True)
class Shrinkable:
    """What a model can be pruned to for a speed-up: which units stay, and the weights corrected for what goes.

    Attributes:
        method: one of `METHODS`, or ``counts`` of `to_counts`.
        speedup: that was asked for.
        predicted: speed-up that the latency table predicts, at least `speedup`.
        structure: name of a structure → the units of it that stay, as `cram_bench.deploy.shrink` takes it.
        weights: name of a parameter → its value, zero where units went.
        masks: which weights stay, of the prunable ones: those that units are made of are zero. Biases that only lead
            to what went stay; they change nothing.
        calibration_loss: on the examples that were looked at.
        loss: on examples that were held out.
    """

    method: str
    speedup: float
    predicted: float
    structure: dict[str, tuple[int, ...]]
    weights: dict[str, Tensor]
    masks: Masks
    calibration_loss: float
    loss: float

    @property
    def counts(self) -> list[int]:
        """How many units stay, in the order of `structures`."""
        return [len(units) for units in self.structure.values()]

    def __repr__(self) -> str:
        kept = f"{self.masks.count - self.masks.zeros:,} of {self.masks.count:,} weights"
        return f"Shrinkable({self.method}, {self.predicted:.2f}× for {self.speedup:g}×, {kept}, loss {self.loss:.4f})"

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> Masks:
        """Prune the model that was looked at, in place; return the masks. `cram_bench.deploy.shrink` makes it smaller.

        Raises:
            ValueError: a parameter is not there, or of another shape; nothing is changed then.
        """
        self.masks.weights_of(model)
        own = dict(model.named_parameters())
        for name, value in self.weights.items():
            if name not in own or own[name].shape != value.shape:
                raise ValueError(f"{type(model).__name__} has no parameter {name!r} of shape {tuple(value.shape)}")
        for name, value in self.weights.items():
            own[name].copy_(value)
        self.masks.apply_(model)
        return self.masks


def ziplm(
    model: nn.Module,
    batches: Batches,
    speedups: Sequence[float] = (1.5, 2.0, 3.0),
    *,
    latency: pd.DataFrame,
    methods: Sequence[str] = ("ziplm",),
    samples: int = 256,
    held: int = 256,
    damping: float = 0.01,
    trials: int = 100,
    memory: float = 2.0,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> list[Shrinkable]:
    """Remove heads, feed-forward columns and channels for measured speed-ups: one look, any number of them.

    Of every layer units are removed one by one (`remove`), which gives its weights at some counts of units and their
    prior ‖ŴX − WX‖ / ‖WX‖. For a speed-up s the layers may take T/s − T_fixed seconds, T being T_fixed and what all
    take whole; `search` finds the options, from those that keep one fraction everywhere, by the loss of the stitched
    network on the examples that were looked at. Inputs X are those of the dense network.

    Args:
        model: any torch model with `structures`; left as it was found.
        batches: training data: a `Dataset`, of which ``samples + held`` examples are drawn, or anything that yields
            (inputs, labels). Padding tokens do not enter X, where the model says which they are.
        speedups: how many times as fast, each above 1.
        latency: seconds of every option, as `cram_bench.deploy.latency` measures them.
        methods: of `METHODS`.
        samples: examples that are looked at.
        held: further ones, for the loss that is reported.
        damping: λ over the mean diagonal of H of each layer, positive.
        trials: of the search, each a pass over the samples where it comes to a new choice.
        memory: GiB that the H of layers may take at a time; what does not fit is collected in several passes.
        seed: of the draw of examples and of the search.
        forward, loss: as the probes take them.

    Returns:
        A `Shrinkable` for every method and speed-up.

    Raises:
        ValueError: the model has no known structures, a speed-up cannot be reached, the table lacks an option, there
            are too few examples, or a layer's inputs do not allow it; each says what to do.
        TypeError: an argument is of another type.
    """
    found = structures(model)
    wanted = [number("a speed-up", value, 1.0) for value in items("speedups", speedups, "numbers above 1")]
    if slow := [value for value in wanted if value == 1.0]:
        raise ValueError(f"a speed-up must be above 1, not {slow[0]:g}: the dense network has that")
    for method in items("methods", methods, "texts"):
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
    integer("samples", samples, 1)
    integer("held", held, 1)
    integer("trials", trials, 0)
    number("memory", memory, 0.0)
    if number("damping", damping, 0.0) == 0.0:
        raise ValueError("damping must be above 0, not 0.0: columns that depend on each other cannot be told apart")
    fixed, times = latencies(latency, found)
    budgets = {speedup: _budget(speedup, fixed, times) for speedup in wanted}
    size = next(size for size in range(_BATCH, 0, -1) if samples % size == held % size == 0)
    both = chunks(batches, (samples + held) // size, size, seed, ("samples + held", 1))
    seen, unseen = both[: samples // size], both[samples // size :]
    results = []
    with torch.inference_mode(False), torch.no_grad(), preserved(model):
        stitched = _Stitched(model.eval(), found)
        scored: dict[int, _Scored] = {}
        if set(methods) - {"magnitude"}:
            paths = _removed(stitched, seen, damping, int(memory * 2**30), forward)
            scored[0] = _Scored(stitched, paths, seen, unseen, forward, loss)
        if "magnitude" in methods:
            paths = {name: stitched.by_magnitude(name) for name in found}
            scored[1] = _Scored(stitched, paths, seen, unseen, forward, loss)
        fractions = [[count / each.count for count in each.options] for each in found.values()]
        for method in methods:
            own = scored[int(method == "magnitude")]
            for speedup in wanted:
                choice = uniform(fractions, times, budgets[speedup])
                if method == "ziplm":
                    costs = [
                        [own.paths[name].priors[count] ** 2 for count in each.options] for name, each in found.items()
                    ]
                    choice, _ = search(costs, times, budgets[speedup], choice, own.calibration, trials, seed)
                whole = fixed + total(times, (0,) * len(times))
                predicted = whole / (fixed + total(times, choice))
                results.append(own.result(method, speedup, predicted, own.counts(choice)))
    return results


def to_counts(
    model: nn.Module,
    batches: Batches,
    counts: Sequence[int],
    *,
    samples: int = 256,
    damping: float = 0.01,
    memory: float = 2.0,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Shrinkable:
    """Remove units, as `ziplm` does, until so many stay in each structure; no clock is asked, so any machine does the
    same.

    Args:
        model: any torch model with `structures`; left as it was found.
        batches: training data, as `ziplm` takes them.
        counts: how many units stay, in the order of `structures`; `Shrinkable.counts` of what a clock has chosen.
        samples: examples that are looked at; none is held out.
        damping, memory, seed, forward, loss: as `ziplm` takes them.

    Returns:
        A `Shrinkable` of the method ``counts``; its speed-ups are unknown, NaN, and `loss` is `calibration_loss`.

    Raises:
        ValueError: there are more or fewer counts than structures, or more units are to stay than there are.
    """
    found = structures(model)
    if len(counts) != len(found):
        raise ValueError(f"counts must be one for each of the {len(found)} structures, not {len(counts)}")
    wanted = {
        name: integer(f"the units of {name!r} that stay", count, 0, each.count)
        for (name, each), count in zip(found.items(), counts, strict=True)
    }
    integer("samples", samples, 1)
    size = next(size for size in range(_BATCH, 0, -1) if samples % size == 0)
    seen = chunks(batches, samples // size, size, seed, ("samples", 1))
    with torch.inference_mode(False), torch.no_grad(), preserved(model):
        stitched = _Stitched(model.eval(), found)
        paths = _removed(stitched, seen, damping, int(memory * 2**30), forward, wanted)
        return _Scored(stitched, paths, seen, seen, forward, loss).result("counts", math.nan, math.nan, wanted)


def latencies(table: pd.DataFrame, found: Mapping[str, Structure]) -> tuple[float, list[list[float]]]:
    """Read a latency table: the seconds of what cannot be removed, and those of every structure's options.

    Raises:
        ValueError: it lacks a row, holds rows of several settings, or a time that is negative or no number.
    """
    columns(table, "structure", "kind", "units", "seconds")
    setting = [name for name in _SETTING if name in table.columns]
    if setting and len(several := table[setting].drop_duplicates()) > 1:
        varied = [name for name in setting if several[name].nunique(dropna=False) > 1]
        raise ValueError(
            f"the latency table holds {len(several)} settings of {', '.join(varied)}: choose one, such as "
            f"table[table.{varied[0]} == {several[varied[0]].tolist()[0]!r}]"
        )
    rows = {
        (str(name), int(units)): float(seconds)
        for name, units, seconds in zip(table["structure"], table["units"], table["seconds"], strict=True)
    }
    for (name, units), seconds in rows.items():
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"the latency table says {seconds!r} seconds for {name!r} with {units} units")
    remedy = "measure it for this model, cb.deploy.latency(model, inputs)"
    if ("fixed", 0) not in rows:
        raise ValueError(f"the latency table has no row of kind 'fixed': {remedy}")
    for name, each in found.items():
        for units in each.options:
            if (name, units) not in rows:
                raise ValueError(f"the latency table has no row for {name!r} with {units} units: {remedy}")
    return rows["fixed", 0], [[rows[name, units] for units in each.options] for name, each in found.items()]


def table(results: Iterable[Shrinkable]) -> pd.DataFrame:
    """List results of `ziplm`: method, speedup, predicted, kept (fraction of weights), calibration_loss, loss."""
    import pandas as pd

    return pd.DataFrame(
        {
            "method": each.method,
            "speedup": each.speedup,
            "predicted": each.predicted,
            "kept": 1.0 - each.masks.sparsity,
            "calibration_loss": each.calibration_loss,
            "loss": each.loss,
        }
        for each in results
    )


def _budget(speedup: float, fixed: float, times: Sequence[Sequence[float]]) -> float:
    """Return the seconds that are left for all structures together."""
    whole, least = fixed + sum(options[0] for options in times), fixed + sum(min(options) for options in times)
    if least > whole / speedup:
        raise ValueError(
            f"a speed-up of {speedup:g} cannot be reached: {1e3 * least:.3g} of {1e3 * whole:.3g} ms cannot be "
            f"removed, which is {int(100 * whole / least) / 100:g} at most"
        )
    return whole / speedup - fixed


class _Stitched:
    """A model whose layers are put together from those at several counts of units."""

    def __init__(self, model: nn.Module, found: Mapping[str, Structure]) -> None:
        self.model, self.found = model, found
        self.modules = {name: model.get_submodule(each.output) for name, each in found.items()}
        self.own = {name: module.get_parameter("weight") for name, module in self.modules.items()}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.parameters = {name: names[id(weight)] for name, weight in self.own.items()}
        known, others = layers(model, {self.parameters[name]: weight for name, weight in self.own.items()})
        if others:
            name, why = next(iter(others.items()))
            raise ValueError(f"the inputs of {name} cannot be seen: {why}")
        self.layers: dict[str, Layer] = {name: known[self.parameters[name]] for name in found}
        self.dense = {name: weight.detach().clone() for name, weight in self.own.items()}

    def weight(self, name: str, path: Path, count: int) -> Tensor:
        """Return the whole weight of a layer with zeros where units went."""
        layer, each = self.layers[name], self.found[name]
        rows = layer.rows(torch.zeros_like(self.dense[name]))[0]
        per = rows.shape[1] // each.count
        kept = torch.tensor(path.kept(count), dtype=torch.long, device=rows.device)
        rows[:, (kept[:, None] * per + torch.arange(per, device=rows.device)).flatten()] = path.weights[count]
        return layer.back(rows)

    def by_magnitude(self, name: str) -> Path:
        """Return the path by the norm of all weights of a unit, in `output` and `inputs` together."""
        each = self.found[name]
        rows = self.layers[name].rows(self.dense[name])[0]
        squares = rows.double().square().sum(0).view(each.count, -1).sum(1)
        for module in map(self.model.get_submodule, each.inputs):
            weight = module.get_parameter("weight")
            if weight.ndim > 1:
                own = (weight.T if is_conv1d(module) else weight).double().flatten(1)
                squares += own.square().sum(1).view(each.packed, each.count, each.size).sum((0, 2))
        return ordered(rows, squares, each.options)

    def masks(self, kept: Mapping[str, Sequence[int]]) -> Masks:
        """Return which weights stay where units of the structures do."""
        weights = prunable(self.model)
        found = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        names = {id(parameter): name for name, parameter in weights.items()}
        for name, units in kept.items():
            each = self.found[name]
            gone = [unit for unit in range(each.count) if unit not in set(units)]
            module = self.modules[name]
            if (own := names.get(id(module.get_parameter("weight")))) is not None:
                inputs = torch.tensor(each.features(gone), dtype=torch.long)
                (found[own] if is_conv1d(module) else found[own].transpose(0, 1))[inputs] = False
            for module in map(self.model.get_submodule, each.inputs):
                if (own := names.get(id(module.get_parameter("weight")))) is not None:
                    outputs = torch.tensor(each.features(gone, each.packed), dtype=torch.long)
                    (found[own].transpose(0, 1) if is_conv1d(module) else found[own])[outputs] = False
        return Masks(found, dense_of(weights))


def _removed(
    stitched: _Stitched,
    batches: list[tuple[Any, Tensor]],
    damping: float,
    memory: int,
    forward: Forward | None,
    counts: Mapping[str, int] | None = None,
) -> dict[str, Path]:
    """Return the paths of all layers, with weights at every option, or at one count alone."""
    paths: dict[str, Path] = {}
    for part in groups(stitched.layers, memory):
        seen = moments(stitched.model, {name: stitched.layers[name] for name in part}, batches, forward)
        for name in part:
            each, layer = stitched.found[name], stitched.layers[name]
            if name not in seen.matrices:
                raise ValueError(
                    f"no pass of these examples ran {each.output}: give forward=, or leave it out of the model"
                )
            (matrix,) = seen.matrices[name]
            if not bool((matrix.diagonal() > 0).any()):
                raise ValueError(
                    f"all inputs of {each.output} are zero on these {len(batches)} batches: give other examples"
                )
            (rows,) = layer.rows(stitched.dense[name])
            try:
                options = each.options if counts is None else [counts[name]]
                paths[name] = remove(matrix, rows, each.count, options, damping)
            except NotDefinite:
                raise ValueError(
                    f"the inputs' second moments at {each.output} are not positive definite with damping {damping:g}: "
                    f"give more, such as damping={max(1e-3, 10 * damping):g}"
                ) from None
    return paths


class _Scored:
    """Losses of a model stitched together of layers on their paths."""

    def __init__(
        self,
        stitched: _Stitched,
        paths: Mapping[str, Path],
        seen: list[tuple[Any, Tensor]],
        unseen: list[tuple[Any, Tensor]],
        forward: Forward | None,
        loss: Loss | None,
    ) -> None:
        self.stitched, self.paths, self.seen, self.unseen = stitched, paths, seen, unseen
        self.forward, self.criterion = forward, loss

    def counts(self, choice: Choice) -> dict[str, int]:
        return {
            name: each.options[option] for (name, each), option in zip(self.stitched.found.items(), choice, strict=True)
        }

    def calibration(self, choice: Choice) -> float:
        return self.loss(self.counts(choice), self.seen)

    def loss(self, counts: Mapping[str, int], batches: list[tuple[Any, Tensor]]) -> float:
        stitched = self.stitched
        for name, count in counts.items():
            stitched.own[name].copy_(stitched.weight(name, self.paths[name], count))
        return mean_loss(stitched.model, batches, self.forward, self.criterion)

    def result(self, method: str, speedup: float, predicted: float, counts: Mapping[str, int]) -> Shrinkable:
        stitched = self.stitched
        kept = {name: self.paths[name].kept(count) for name, count in counts.items()}
        losses = [self.loss(counts, batches) for batches in (self.seen, self.unseen)]
        weights = {
            stitched.parameters[name]: stitched.weight(name, self.paths[name], count) for name, count in counts.items()
        }
        return Shrinkable(method, speedup, predicted, kept, weights, stitched.masks(kept), *losses)


def mean_loss(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]], forward: Forward | None = None, loss: Loss | None = None
) -> float:
    """Return the mean loss over examples, by default the cross-entropy; the model's mode is the caller's."""
    fit: Callable[[Any], Any] = fitting(model)
    summed, count = 0.0, 0
    for inputs, labels in batches:
        outputs = logits_of(model(fit(inputs))) if forward is None else forward(model, fit(inputs))
        labels = labels.to(outputs.device) if isinstance(outputs, Tensor) else labels
        if loss is None:
            labels_within(labels, classes_of(outputs).shape[1])
        value = CrossEntropy()(outputs, labels, inputs) if loss is None else loss(outputs, labels)
        summed += float(value) * len(labels)
        count += len(labels)
    return summed / count
