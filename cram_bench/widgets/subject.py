"""A network under question, and what it answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cram_bench import deploy
from cram_bench.compress import Compressor, Dense, Magnitude, applied, apply_, prunable, stored_bytes, tune_batchnorm
from cram_bench.data import AT_ONCE, Dataset
from cram_bench.losses import summed
from cram_bench.models.folding import fold
from cram_bench.outputs import classes_of, fitting, logits_of
from cram_bench.preserve import preserved
from cram_bench.probes import layer_profile, loss_along_compression, weight_histogram
from cram_bench.probes.incremental import rises
from cram_bench.prune import Fitted, Pruner, Specification, fitted

FIRST = 100
"""Examples of a first look, whose numbers are there at once."""
FEW = 100
"""Examples for what takes many evaluations: which layer breaks it, and the way there."""
LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Fractions of one layer's weights that are pruned to see what that costs."""
BATCH = 32
"""Examples in a batch that is timed."""

DENSE = Magnitude(0.0)
Question = Compressor | Specification


@dataclass(frozen=True)
class Answer:
    """What a compressed network does on the sample: accuracy (a fraction), loss (nats), classes, their probabilities.

    And what was compressed: zeros and weights of what is prunable, the matrices in which nothing was pruned, and the
    bytes of all (`cram_bench.compress.stored_bytes`). `count` examples were looked at; `tuned_on` is how many BatchNorm
    was tuned on, 0 for none.
    """

    accuracy: float
    loss: float
    classes: Tensor
    confidence: Tensor
    zeros: int
    weights: int
    dense: dict[str, Dense]
    bytes: int = 0
    count: int = 0
    tuned_on: int = 0


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share of `count` examples, √(p(1 − p)/n).

    >>> standard_error(0.5, 100)
    0.05
    """
    return float((share * (1 - share) / count) ** 0.5) if count else float("nan")


class Subject:
    """A network under question: it answers for any compression, and remembers its answers.

    Args:
        model: any torch classifier; put in eval mode.
        sample: what to evaluate on.
        calibration: batches for BatchNorm tuning; none: nothing is tuned.
        looked_at: training data for pruners that look.

    Raises:
        ValueError: the model gives no logits, or fewer than there are classes.
        TypeError: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Dataset,
        calibration: Sequence[tuple[Tensor, Tensor]],
        looked_at: Dataset | None = None,
    ) -> None:
        self.model = model.eval()
        self.fit = fitting(model)
        norms = any(isinstance(module, _BatchNorm) for module in model.modules())
        self.calibration = [(self.fit(x), labels) for x, labels in calibration] if norms else []
        self.looked_at = looked_at
        self.pruners: dict[Pruner, Fitted] = {}
        self.sample = sample
        self.batches = self._fitted(sample)
        self.first = self._fitted(sample.sample(FIRST))
        self._few = self._fitted(sample.sample(FEW))
        with torch.no_grad():
            logits = classes_of(logits_of(self.model(self.batches[0][0][:2])))
        highest = max(int(labels.max()) for _, labels in self.batches)
        if highest >= logits.shape[1]:
            raise ValueError(f"the model gives {logits.shape[1]} logits, and the data have a label {highest}")
        self.graph = fold(self.model, self.batches[0][0])
        self.answers: dict[tuple[Question, bool], Answer] = {}
        self.looks: dict[tuple[Question, bool], Answer] = {}
        self.slices: dict[Question, pd.DataFrame] = {}
        self.blames: dict[Question, pd.DataFrame] = {}
        self.details: dict[tuple[Question, str], tuple[pd.DataFrame, pd.DataFrame]] = {}
        self.seconds: dict[Question, tuple[float, float]] = {}

    def _fitted(self, data: Dataset) -> list[tuple[Tensor, Tensor]]:
        batches = ((self.fit(x), labels) for x, labels in data.batches(AT_ONCE, channels_last=True))
        return [(x, labels.to(x.device)) for x, labels in batches]

    def operator(self, question: Question, before: Callable[[], None] = lambda: None) -> Compressor:
        """Return what compresses this network; a pruner looks at it the first time that it is asked for.

        `before` is called before every pass of a look; what it raises ends the look.
        """

        def forward(model: nn.Module, inputs: Any) -> Tensor:
            before()
            return logits_of(model(inputs))

        (found,) = fitted([question], self.model, self.looked_at, forward=forward, known=self.pruners)
        return found

    def looks_first(self, question: Question) -> bool:
        """Tell whether a pruner must look before it can answer."""
        return isinstance(question, Specification) and question.pruner not in self.pruners

    def look(self, question: Question, tuned: bool) -> Answer:
        """Answer on `FIRST` examples, BatchNorm tuned on one batch: rough, and at once."""
        key = (question, tuned)
        if key not in self.looks:
            self.looks[key] = self._answer(question, self.calibration[:1] if tuned else [], self.first, lambda: None)
        return self.looks[key]

    def answer(self, question: Question, tuned: bool, before: Callable[[], None] = lambda: None) -> Answer:
        """Answer on the sample, BatchNorm tuned on all batches if asked; the network is put back.

        `before` is called before every batch; what it raises ends the whole.
        """
        key = (question, tuned)
        if key not in self.answers:
            self.answers[key] = self._answer(question, self.calibration if tuned else [], self.batches, before)
        return self.answers[key]

    def known(self, question: Question, tuned: bool) -> Answer | None:
        """Return the best answer that was given so far."""
        return self.answers.get((question, tuned)) or self.looks.get((question, tuned))

    @torch.no_grad()
    def _answer(
        self,
        question: Question,
        calibration: Sequence[tuple[Tensor, Tensor]],
        batches: Sequence[tuple[Tensor, Tensor]],
        before: Callable[[], None],
    ) -> Answer:
        found = []
        with preserved(self.model):
            masks = apply_(self.model, self.operator(question))
            size = stored_bytes(self.model, bits_of(question))
            if calibration:
                before()
                tune_batchnorm(self.model, calibration)
            network = self.graph.refolded() if self.graph else self.model
            for inputs, _ in batches:
                before()
                found.append(logits_of(network(inputs)).float())
        logits, labels = torch.cat(found).cpu(), torch.cat([labels for _, labels in batches]).cpu()
        best = logits.softmax(1).max(1)
        return Answer(
            accuracy=float((best.indices == labels).float().mean()),
            loss=float(summed(logits, labels)) / len(labels),
            classes=best.indices,
            confidence=best.values,
            zeros=masks.zeros,
            weights=masks.count,
            dense=masks.dense,
            bytes=size,
            count=len(labels),
            tuned_on=sum(len(labels) for _, labels in calibration),
        )

    def curve(self, pattern: str, tuned: bool) -> pd.DataFrame:
        """Return what is known of accuracy against sparsity: columns sparsity, accuracy, count (of examples)."""
        known = [
            (question.sparsity, answer.accuracy, answer.count)
            for (question, was_tuned), answer in {**self.looks, **self.answers}.items()
            if was_tuned == tuned and question.pattern == pattern
        ]
        table = pd.DataFrame(known, columns=["sparsity", "accuracy", "count"])
        return table.drop_duplicates("sparsity").sort_values("sparsity")

    def blame(self, question: Question, before: Callable[[], None]) -> pd.DataFrame:
        """Return what the compression of each layer alone costs, untuned, on `FEW` examples of the sample.

        As `cram_bench.probes.layer_blame`, and error: the standard error of the rise.
        """
        if question not in self.blames:
            operator = self.operator(question)
            with applied(self.model, operator):
                weights = {name: weight.detach().clone() for name, weight in prunable(self.model).items()}
            changes: list[Any] = [(name, lambda _, values=values: values) for name, values in weights.items()]
            found = rises(self.model, self._few, changes, before)
            table = layer_profile(self.model, operator)
            self.blames[question] = table.assign(rise=[r for r, _ in found], error=[e for _, e in found])
        return self.blames[question]

    def slice(self, question: Question, before: Callable[[], None]) -> pd.DataFrame:
        """Return the loss on the way to the compressed weights, untuned, on `FEW` examples of the sample."""
        if question not in self.slices:
            self.slices[question] = loss_along_compression(
                self.model, self._few, self.operator(question), points=7, end=1.2, before=before
            )
        return self.slices[question]

    def detail(self, question: Question, layer: str, before: Callable[[], None]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Tell of one layer what pruning it alone does, and how its weights are spread.

        Returns:
            Columns sparsity, rise (of the loss over the dense network's, nats; untuned, on `FEW` examples), error, of
            magnitude pruning of this layer alone; and columns state (``dense``, ``compressed``), low, high, share (of
            the layer's weights; zeros of the compressed ones are left out).
        """
        key = (question, layer)
        if key not in self.details:
            levels = (0.0, *LEVELS)
            prune: list[Any] = [(layer, partial(_pruned, Magnitude(level), layer)) for level in levels]
            found = rises(self.model, self._few, prune, before)
            alone = pd.DataFrame({"sparsity": levels, "rise": [r for r, _ in found], "error": [e for _, e in found]})
            others = [name for name in prunable(self.model) if name != layer]
            with preserved(self.model):
                before()
                dense = weight_histogram(self.model, 41, others)
                weights, limit = prunable(self.model)[layer], float(dense["high"].max())
                apply_(self.model, self.operator(question))
                values = weights.detach().float().cpu().flatten()
                kept = values[values != 0].clamp(-limit, limit)
                counts = torch.histc(kept, 41, -limit, limit)
                total = weights.numel()
            spread = pd.concat([
                dense.assign(state="dense", share=dense["count"] / total),
                dense.assign(state="compressed", share=counts.tolist()).assign(share=lambda t: t["share"] / total),
            ])  # fmt: skip
            self.details[key] = alone, spread[["state", "low", "high", "share"]].reset_index(drop=True)
        return self.details[key]

    def latency(self, question: Question, repeats: int = 11) -> tuple[float, float]:
        """Return the median seconds of a forward pass of `BATCH` examples, of the dense and the compressed network.

        In turns, on the device that the network is on, in its type. Those layers compute at their nonzeros only that
        are faster so (`cram_bench.deploy.swap_`); quantized weights are multiplied as they are, which saves nothing.
        """
        if question not in self.seconds:
            inputs = self.batches[0][0][:BATCH]
            dense, sparse = copy.deepcopy(self.model), copy.deepcopy(self.model)
            with preserved(self.model):
                apply_(self.model, self.operator(question))
                sparse.load_state_dict(self.model.state_dict())
            deploy.swap_(sparse, inputs, backward=False, repeats=3)
            first, second = deploy.timed([dense, sparse], inputs, repeats)
            self.seconds[question] = first, second
        return self.seconds[question]


def bits_of(question: Question) -> int | None:
    """Return the bits of a weight after a compression; None where it rounds nothing."""
    quantize = getattr(question, "quantize", None) or question
    bits = getattr(quantize, "bits", None)
    return bits if isinstance(bits, int) else None


def _pruned(compressor: Compressor, name: str, values: Tensor) -> Tensor:
    compressor.apply_({name: values})
    return values
