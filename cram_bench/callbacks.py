"""What may be called as a training goes; state of its own travels in the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

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
