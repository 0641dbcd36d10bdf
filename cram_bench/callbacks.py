"""What may be called as a training goes; state of its own travels in the checkpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cram_bench.checks import needs

if TYPE_CHECKING:
    from cram_bench.train import Fit


class Callback:
    """Called as training goes; inherit, and override what is needed."""

    def on_start(self, fit: Fit) -> None:
        """Before the first step; may load a state."""

    def on_step(self, fit: Fit, step: int, loss: Tensor, correct: Tensor, seen: int) -> None:
        """After every step: running sums of the epoch, still on the device."""

    def on_epoch(self, fit: Fit) -> None:
        """After every epoch; the last row of ``fit.history`` describes it."""

    def on_end(self, fit: Fit) -> None:
        """After the last epoch, or after an exception."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next epoch depends on; a checkpoint holds it under the class's name, a second as name 2."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""


class Ramp(Callback):
    """Lower the probability of a plain step of `CrAM` or `CrAMSingle` linearly, from 1 at first to its setting.

    p(t) = 1 − (1 − p) t/T: what compresses is learnt when the loss is already low.
    """

    def on_start(self, fit: Fit) -> None:
        """Remember the setting, and start plain, or where a checkpoint left."""
        self.final: float = fit.optimizer.plain  # type: ignore[attr-defined]
        self._set(fit, 0)

    def on_step(self, fit: Fit, step: int, loss: Tensor, correct: Tensor, seen: int) -> None:
        """Set the probability of the next step."""
        self._set(fit, step + 1)

    def on_end(self, fit: Fit) -> None:
        """Put the setting back."""
        fit.optimizer.plain = self.final  # type: ignore[attr-defined]

    def _set(self, fit: Fit, step: int) -> None:
        done = (fit.epoch * fit.steps_per_epoch + step) / (fit.epochs * fit.steps_per_epoch)
        fit.optimizer.plain = 1 - (1 - self.final) * done  # type: ignore[attr-defined]


class TensorBoard(Callback):
    """Write the numbers of every epoch for TensorBoard, which ``pip install 'cram-bench[tensorboard]'`` brings.

    ``train_loss`` of `cram_bench.train.fit`'s rows becomes the scalar ``loss/train``, ``test_accuracy``
    ``accuracy/test``, and so on; ``lr`` and ``seconds`` keep their names. Steps are epochs. A training that goes on
    from a checkpoint goes on in the same curves. Of several processes one has it.

    Args:
        folder: where; what ``tensorboard --logdir`` is given, or a folder in it.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        needs("curves of TensorBoard", "tensorboard", "tensorboard")
        self.folder = os.fspath(folder)

    def on_start(self, fit: Fit) -> None:
        """Open the folder; what it holds of epochs that are trained again is not shown."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder, purge_step=fit.epoch + 1)  # type: ignore[no-untyped-call]

    def on_epoch(self, fit: Fit) -> None:
        """Write the last row of the history."""
        row = fit.history[-1]
        for name in row.keys() - {"epoch"}:
            part, _, quantity = name.partition("_")
            tag = f"{quantity}/{part}" if quantity else name
            self.writer.add_scalar(tag, row[name], int(row["epoch"]))  # type: ignore[no-untyped-call]

    def on_end(self, fit: Fit) -> None:
        """Write what is not written yet."""
        self.writer.close()  # type: ignore[no-untyped-call]
