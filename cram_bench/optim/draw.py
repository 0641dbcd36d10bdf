"""The compression of a training step: which operator is drawn, and how long its masks are held."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cram_bench.checks import integer, shown
from cram_bench.compress import Compressor, Masks, PruneThenQuantize, check_leaves
from cram_bench.prune import Fixed, Specification


class Draw:
    """Compress weights with an operator drawn uniformly at every use, from a generator that can be saved.

    With an `interval` of n, an operator's masks are chosen at its first use and held for n uses of it in all, then
    chosen anew ("infrequent mask updates" of arXiv 2207.14200): the selection is paid once in n steps.

    Args:
        weights: name → parameter, compressed in place.
        compressors: one operator, or several to draw from.
        interval: uses of an operator per choice of its masks, at least 1.
        seed: seeds the draw.

    Raises:
        ValueError: no compressor is given, one leaves no weight, or `interval` is not an integer ≥ 1.
        TypeError: something among `compressors` is not a `Compressor`.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], compressors: Sequence[Compressor] | Compressor, interval: int, seed: int
    ) -> None:
        self.weights = weights
        one = isinstance(compressors, (Compressor, str)) or not isinstance(compressors, Iterable)
        self.compressors: tuple[Any, ...] = (compressors,) if one else tuple(compressors)  # type: ignore[arg-type]
        if not self.compressors:
            raise ValueError("CrAM needs at least one compressor, such as cb.compress.Magnitude(0.5)")
        for choice in self.compressors:
            looking = choice.prune if isinstance(choice, PruneThenQuantize) else choice
            if isinstance(looking, (Fixed, Specification)):
                raise TypeError(
                    f"CrAM draws compressors that need the weights alone, such as cb.compress.Magnitude(0.5), and "
                    f"{choice} looks at gradients or inputs: prune with it after the training, by cb.prune.apply_"
                )
            if not isinstance(choice, Compressor):
                raise TypeError(
                    f"compressors must be compressors such as cb.compress.Magnitude(0.5), not {shown(choice)}"
                )
            check_leaves(choice)
        if type(interval) is not int or interval < 1:
            raise ValueError(f"mask_interval, uses of a compressor per choice of masks, must be >= 1, not {interval!r}")
        self.interval = interval
        self.generator = torch.Generator().manual_seed(integer("seed", seed, 0))
        self.held: dict[int, Masks] = {}
        self.uses = [0] * len(self.compressors)

    def snapshot(self) -> Callable[[], None]:
        """Return a function that puts the draw back to where it is now."""
        generator, held, uses = self.generator.get_state(), dict(self.held), list(self.uses)

        def back() -> None:
            self.generator.set_state(generator)
            self.held, self.uses = held, uses

        return back

    def apply_(self) -> Masks:
        """Draw an operator, compress the weights with it, and return its masks."""
        index = int(torch.randint(len(self.compressors), (), generator=self.generator, device="cpu"))
        masks = self.compressors[index].apply_(self.weights, self.held.get(index))
        if self.interval > 1:
            self.uses[index] += 1
            if self.uses[index] % self.interval:
                self.held[index] = masks
            else:
                self.held.pop(index, None)
        return masks

    def tossed(self, probability: float) -> bool:
        """Tell whether an event of this probability happens now; the same under any default device and type."""
        return float(torch.rand((), generator=self.generator, device="cpu", dtype=torch.float32)) < probability

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state and, where masks are held, those and the count of uses."""
        state: dict[str, Any] = {"generator": self.generator.get_state(), **self._identity()}
        if self.interval > 1:
            state |= {"uses": list(self.uses), "held": sorted(self.held), "masks": self._packed()}
        return state

    def _identity(self) -> dict[str, Any]:
        return {"compressors": [str(choice) for choice in self.compressors], "mask_interval": self.interval}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is of other compressors or another mask interval.
        """
        for name, ours in self._identity().items():
            if state.get(name, ours) != ours:
                raise ValueError(f"the state was saved with {name} {state[name]}, not {ours}")
        held = self._unpacked(state["masks"].cpu(), state["held"]) if self.interval > 1 else {}
        self.generator.set_state(state["generator"].cpu())  # a checkpoint may have been loaded onto another device
        if self.interval > 1:
            self.uses, self.held = list(state["uses"]), held

    def _packed(self) -> Tensor:
        """All held masks as compressed bytes, one bit a weight and mask.

        Masks of several sparsities are nearly nested, so the bits of a weight take few of the 2^K patterns;
        coded weight by weight they take about the entropy of its rank, some 3 bits for seven sparsities.
        """
        columns = [torch.cat([mask.flatten() for mask in self.held[index].values()]) for index in sorted(self.held)]
        if not columns:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        patterns = np.packbits(torch.stack(columns).cpu().numpy(), axis=0)
        coder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)  # the order carries nothing, and matches cost room
        return torch.from_numpy(np.frombuffer(coder.compress(patterns.tobytes()) + coder.flush(), np.uint8).copy())

    def _unpacked(self, packed: Tensor, held: Sequence[int]) -> dict[int, Masks]:
        if not held:
            return {}
        count = sum(weight.numel() for weight in self.weights.values())
        data = np.frombuffer(zlib.decompress(packed.numpy().tobytes()), np.uint8)
        if data.size != -(-len(held) // 8) * count:
            theirs = data.size // -(-len(held) // 8)
            raise ValueError(f"the held masks in this state are of {theirs:,} weights, and this model has {count:,}")
        bits = np.unpackbits(data.reshape(-1, count), axis=0, count=len(held)).astype(bool)
        sizes = [weight.numel() for weight in self.weights.values()]
        return {
            index: Masks(
                {
                    name: piece.view(weight.shape).to(weight.device)
                    for (name, weight), piece in zip(
                        self.weights.items(), torch.from_numpy(row).split(sizes), strict=True
                    )
                }
            )
            for index, row in zip(held, bits, strict=True)
        }
