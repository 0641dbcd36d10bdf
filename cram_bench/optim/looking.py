"""CrAM with the masks of a pruner that looks: C keeps what the pruner would keep, which is asked anew now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from cram_bench.callbacks import Callback
from cram_bench.compress import Masks
from cram_bench.data import Dataset
from cram_bench.optim.cram import CrAMPlusStep
from cram_bench.prune import Pruner, is_name, parse
from cram_bench.settings import Count, Text

if TYPE_CHECKING:
    from cram_bench.train import Fit


@dataclass(frozen=True)
class CrAMLookingStep(CrAMPlusStep):
    """A step of CrAM+ whose compressors keep what a pruner that looks would keep; of this project, nothing published
    describes it.

    Each compressor's sparsity k stays; its masks are the pruner's at k, chosen at the dense weights after every `every`
    epochs, on other training images each time, and held until the next time. Until the first time they are the
    compressor's own. Values are not corrected in training: the pruner's masks alone are what the weights are prepared
    for.
    """

    kind: ClassVar[str] = "cram+-looking"

    pruner: Text = "greedy(gradients=128)"
    """Who chooses the masks: a pruner without a sparsity, such as ``greedy`` or ``obs(block=32)``."""
    every: Count = 1
    """Epochs from one look to the next."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_name(self.pruner):
            raise ValueError(f"pruner must be a pruner without a sparsity, such as greedy, not {self.pruner!r}")
        self.chooser  # noqa: B018  # refuses settings that are none
        if self.mask_interval != 1:
            raise ValueError(
                f"mask_interval must be 1, for the pruner decides how long masks hold, not {self.mask_interval}"
            )

    @property
    def chooser(self) -> Pruner:
        """The pruner."""
        return parse(f"{self.pruner}@0").pruner  # type: ignore[union-attr]

    def callbacks(self, train: Dataset) -> Sequence[Callback]:
        return [*super().callbacks(train), Look(self.chooser, self.every, train)]


class Look(Callback):
    """Let a pruner look at the model every so many epochs, and give its masks to the draw of a `CrAM`."""

    def __init__(self, pruner: Pruner, every: int, train: Dataset) -> None:
        self.pruner, self.every, self.train = pruner, every, train
        self.held: dict[int, Masks] = {}

    def on_start(self, fit: Fit) -> None:
        """Go on with the masks of a checkpoint, which was written before the look of its epoch."""
        fit.optimizer.draw.held.update(self.held)  # type: ignore[attr-defined]
        self.on_epoch(fit)

    def on_epoch(self, fit: Fit) -> None:
        """Look, where it is time."""
        if fit.epoch % self.every or fit.epoch in (0, fit.epochs):
            return
        draw = fit.optimizer.draw  # type: ignore[attr-defined]
        fitted = replace(self.pruner, seed=fit.epoch).fit(fit.model, self.train)
        self.held = {place: fitted.masks(choice.sparsity) for place, choice in enumerate(draw.compressors)}
        draw.held.update(self.held)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks that are held, by the compressor's place."""
        return {"held": {place: dict(masks) for place, masks in self.held.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; `on_start` puts it to use."""
        self.held = {place: Masks(masks) for place, masks in state["held"].items()}
