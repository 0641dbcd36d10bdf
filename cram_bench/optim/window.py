"""The window of gradients that a preconditioned step is made of: a ring, its Gram matrix, and what becomes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cram_bench.checks import instance, integer, shown
from cram_bench.optim.rings import Dense, LowRank, Ring, Rows, TopK
from cram_bench.optim.spectra import Spectrum

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Window:
    """The last m gradients, their Gram matrix, and what they make of the newest.

    Each `push` compresses a gradient to c, replaces the oldest row by it, updates one row of the Gram matrix (m×m,
    float64), and returns u, the spectrum applied to c.

    Args:
        ring: how gradients are kept.
        spectrum: what is made of them.
        gradients: m.
        dtype: in which rows are stored: float32, bfloat16 or float64.

    >>> from cram_bench.optim.spectra import Inverse
    >>> window = Window(Dense(), Inverse(1.75), 4)
    >>> window.extend([torch.Size([2])], torch.device("cpu"))
    >>> window.push(torch.tensor([3.0, 4.0])).float().tolist()  # g·4/(4·1.75 + 25): a lone gradient, divided by m = 4
    [0.375, 0.5]
    """

    def __init__(self, ring: Ring, spectrum: Spectrum, gradients: int, dtype: torch.dtype = torch.float32) -> None:
        instance("ring", ring, (Dense, TopK, LowRank), "Dense(), TopK(0.01) or LowRank(4)")
        self.gradients = integer("gradients, the length of the ring,", gradients, 1)
        if dtype not in DTYPES:
            allowed = ", ".join(map(str, DTYPES))
            raise ValueError(f"dtype, in which gradients are stored, must be one of {allowed}, not {shown(dtype)}")
        self.ring, self.spectrum, self.dtype = ring, spectrum, dtype
        self.count = 0
        """Gradients that were pushed, of which the last m are here."""
        self._start([], torch.device("cpu"))

    def _start(self, shapes: Sequence[torch.Size], device: torch.device) -> None:
        self.rows: Rows = self.ring.build(shapes, self.gradients, self.dtype, device)
        size = self.gradients if shapes else 0  # no memory before it is known to suffice
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)

    @property
    def filled(self) -> int:
        """Rows there are: min(count, m)."""
        return min(self.count, self.gradients)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, of the error that is fed back, and of the Gram matrix."""
        return self.rows.nbytes + self.gram.nbytes

    def needed(self, shapes: Sequence[torch.Size]) -> int:
        """Return what `nbytes` will be for parameters of these shapes."""
        rows = self.ring.build(shapes, self.gradients, self.dtype, torch.device("meta"))
        return rows.nbytes + 8 * self.gradients**2

    def extend(self, shapes: Sequence[torch.Size], device: torch.device) -> None:
        """Make room for parameters of these shapes, beside those there are.

        Raises:
            ValueError: the machine has not that much memory.
        """
        if device.type == "cpu":
            needed = self.needed([*self.rows.shapes, *shapes])
            if needed > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
                raise ValueError(
                    f"{self.gradients} gradients in a ring {self.ring} need {needed / 1e9:.1f} GB, and this machine has"
                    f" {there / 1e9:.1f} GB: take fewer gradients, or EFCP with ring=TopK(0.01)"
                )
        if self.rows.shapes:
            self.rows.extend(shapes)
        else:
            self._start(shapes, device)

    def push(self, gradient: Tensor, absent: Sequence[int] = ()) -> Tensor:
        """Take a gradient in; return u, float64, of its shape.

        Args:
            gradient: shape (d,), finite, float32 or float64 as `rows.wide` says.
            absent: places of parameters without a gradient, where it is zero.

        Raises:
            ValueError: the damping is lost in rounding; the window is as before then.
        """
        place, filled = self.count % self.gradients, min(self.count + 1, self.gradients)
        row, carried = self.rows.compress(gradient, absent)
        before = self.rows.replace(place, row)
        known = self.gram[place].clone()
        products = self.rows.products(place, filled)
        self.gram[place, :filled] = self.gram[:filled, place] = products
        try:
            coefficients = self.spectrum.coefficients(self.gram[:filled, :filled], place, self.gradients)
        except BaseException:
            self.rows.replace(place, before)
            self.gram[place] = self.gram[:, place] = known
            self.spectrum.forget()
            raise
        self.rows.carried = carried
        self.count += 1
        return self.rows.combine(coefficients)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next gradient depends on; of a window that is not full yet, the rows there are."""
        parts, gram = self.rows.parts, self.gram
        if self.filled < self.gradients:  # a copy, for a view would be saved with all that it is a view of
            parts = [part[: self.filled].clone() for part in parts]
            gram = gram[: self.filled, : self.filled].clone()
        return {
            "kept": self._kept(),
            "spectrum": self.spectrum.name,
            "count": self.count,
            "parts": parts,
            "carried": self.rows.carried,
            "gram": gram,
        }

    def load_state_dict(self, state: Mapping[str, Any], shapes: Sequence[torch.Size], device: torch.device) -> None:
        """Restore what `state_dict` returned, of parameters of these shapes.

        Raises:
            ValueError: it is of another ring or spectrum, or of parameters of other shapes; the window is as before
                then.
        """
        theirs, ours = state.get("spectrum", self.spectrum.name), self.spectrum.name
        if theirs != ours:
            raise ValueError(f"this state dict is of spectrum {theirs!r}, and this optimizer has {ours!r}")
        if state["kept"] != self._kept():
            raise ValueError(f"this state dict is of a ring {state['kept']}, and this optimizer has {self._kept()}")
        other = Window(self.ring, self.spectrum, self.gradients, self.dtype)
        other.count = state["count"]
        if shapes:
            other.extend(shapes, device)
        gram = other.gram[: other.filled, : other.filled]
        targets = [*(part[: other.filled] for part in other.rows.parts), *other.rows.carried, gram]
        sources = [*state["parts"], *state["carried"], state["gram"]]
        if [t.shape for t in targets] != [s.shape for s in sources]:
            raise ValueError("this state dict is of parameters of other shapes than the optimizer's")
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        self.rows, self.gram, self.count = other.rows, other.gram, other.count
        self.spectrum.forget()

    def _kept(self) -> str:
        return f"{self.ring} of {self.gradients} gradients in {str(self.dtype).removeprefix('torch.')}{self.rows.share}"
