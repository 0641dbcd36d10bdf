"""A network under question, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from cram_bench.compress import Compressor, Dense, apply_, tune_batchnorm
from cram_bench.data import AT_ONCE, Dataset
from cram_bench.losses import summed
from cram_bench.models.folding import fold
from cram_bench.preserve import preserved
from cram_bench.probes import layer_blame, loss_along_compression
from cram_bench.prune import Fitted, Pruner, Specification, fitted

FEW = 200
"""Examples for what takes many evaluations: which layer breaks it, and the way there."""


@dataclass(frozen=True)
class Answer:
    """What a compressed network does on the sample: accuracy (a fraction), loss (nats), classes, their probabilities.

    And what was compressed: zeros and weights of what is prunable, and the matrices in which nothing was pruned.
    """

    accuracy: float
    loss: float
    classes: Tensor
    confidence: Tensor
    zeros: int
    weights: int
    dense: dict[str, Dense]


class Subject:
    """A network under question: it answers for any compression, and remembers its answers.

    Args:
        model: any torch classifier.
        sample: what to evaluate on.
        calibration: batches for BatchNorm tuning.
        looked_at: training data for pruners that look.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Dataset,
        calibration: Sequence[tuple[Tensor, Tensor]],
        looked_at: Dataset | None = None,
    ) -> None:
        self.model = model.eval()
        self.calibration, self.looked_at = calibration, looked_at
        self.pruners: dict[Pruner, Fitted] = {}
        self.sample = sample
        self.batches = list(sample.batches(AT_ONCE, channels_last=True))
        self.graph = fold(self.model, self.batches[0][0])
        self.answers: dict[tuple[Compressor | Specification, bool], Answer] = {}
        self.slices: dict[Compressor | Specification, pd.DataFrame] = {}
        self.blames: dict[Compressor | Specification, pd.DataFrame] = {}

    def operator(self, compressor: Compressor | Specification) -> Compressor:
        """Return what compresses this network; a pruner looks at it the first time that it is asked for."""
        (found,) = fitted([compressor], self.model, self.looked_at, known=self.pruners)
        return found

    @torch.no_grad()
    def answer(self, compressor: Compressor | Specification, tuned: bool) -> Answer:
        """Compress, tune if asked, and evaluate on the sample; the network is put back."""
        key = (compressor, tuned)
        if key not in self.answers:
            with preserved(self.model):
                masks = apply_(self.model, self.operator(compressor))
                if tuned:
                    tune_batchnorm(self.model, self.calibration)
                network = self.graph.refolded() if self.graph else self.model
                logits = torch.cat([network(inputs) for inputs, _ in self.batches]).float()
            labels = torch.cat([labels for _, labels in self.batches])
            best = logits.softmax(1).max(1)
            accuracy = float((best.indices == labels).float().mean())
            loss, compressed = float(summed(logits, labels)) / len(labels), (masks.zeros, masks.count, masks.dense)
            self.answers[key] = Answer(accuracy, loss, best.indices, best.values, *compressed)
        return self.answers[key]

    def curve(self, pattern: str, tuned: bool) -> pd.DataFrame:
        """Return what is known of accuracy against sparsity: columns sparsity, accuracy."""
        known = [
            (compressor.sparsity, answer.accuracy)
            for (compressor, was_tuned), answer in self.answers.items()
            if was_tuned == tuned and compressor.pattern == pattern
        ]
        return pd.DataFrame(known, columns=["sparsity", "accuracy"]).drop_duplicates("sparsity").sort_values("sparsity")

    def blame(self, compressor: Compressor | Specification, before: Callable[[], None]) -> pd.DataFrame:
        """Return what the compression of each alone costs, untuned, on `FEW` examples of the sample."""
        if compressor not in self.blames:
            self.blames[compressor] = layer_blame(self.model, self._few, self.operator(compressor), before=before)
        return self.blames[compressor]

    @property
    def _few(self) -> list[tuple[Tensor, Tensor]]:
        return list(self.sample.sample(FEW).batches(100, channels_last=True))

    def slice(self, compressor: Compressor | Specification, before: Callable[[], None]) -> pd.DataFrame:
        """Return the loss on the way to the compressed weights, untuned, on `FEW` examples of the sample."""
        if compressor not in self.slices:
            self.slices[compressor] = loss_along_compression(
                self.model, self._few, self.operator(compressor), points=7, end=1.2, before=before
            )
        return self.slices[compressor]
