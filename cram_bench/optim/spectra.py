"""What a window of gradients G is turned into: M-FAC's inverse Fisher, or GGT's inverse root, times its newest row.

Both are combinations of the rows, u = Gᵀx, with x from the Gram matrix GGᵀ alone, in float64. The newest gradient lies
in the span of G, and there Woodbury's formula, (1/λ)(g − Gᵀ(λnI + GGᵀ)⁻¹Gg), cancels: in float32, with |g| = 15 and
λ = 1e-5, nothing is left of it. The push-through forms below do not; their error is about 1e-15 |g|²/λ.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from cram_bench.checks import number

Divisor = Literal["count", "window"]

BLOCK = 32
"""Rows that are eliminated last, so that a new one among them leaves the factor of the others as it was."""


class Inverse:
    """u = (λI + (1/n) GᵀG)⁻¹ g_j = n Gᵀ(λnI + GGᵀ)⁻¹ e_j (M-FAC, arXiv 2107.03356, in push-through form).

    While rows are replaced one after the other, those outside the newest's block of 32 stay; their Cholesky factor is
    kept, and the block is eliminated after them. That is the Cholesky factorization itself, of reordered rows: nothing
    is approximated, and a step takes O(m²) but for one in 32.

    Args:
        damping: λ > 0, in units of the Fisher's entries, gradient².
        divisor: n is m even while fewer rows are there (``window``, as the authors have it: a lone gradient gives
            |u| ≈ m/|g|), or the number of rows that are (``count``).

    Raises:
        ValueError: `damping` is not positive, or `divisor` neither.

    >>> G = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    >>> u = G.T @ Inverse(0.5).coefficients(G @ G.T, 1, 2)
    >>> F = 0.5 * torch.eye(2) + G.T @ G / 2
    >>> torch.allclose(u, torch.linalg.solve(F, G[1]))
    True
    """

    name: ClassVar[str] = "mfac"

    def __init__(self, damping: float, divisor: Divisor = "window") -> None:
        self.damping = check_damping(damping)
        if divisor not in ("count", "window"):
            raise ValueError(f"divisor must be count or window, not {divisor!r}")
        self.divisor = divisor
        self._kept: tuple[tuple[int, int, float], Tensor] | None = None

    def coefficients(self, gram: Tensor, newest: int, rows: int) -> Tensor:
        """Return x with u = Gᵀx, shape (n,), float64.

        Args:
            gram: GGᵀ of the rows there are, shape (n, n), float64.
            newest: j, the row that u is of. The others outside its block are as in the call before.
            rows: m.

        Raises:
            ValueError: λ is so small beside the rows that nothing of it is left in float64.
        """
        n = len(gram)
        divisor = n if self.divisor == "count" else rows
        shift = self.damping * divisor
        start = newest // BLOCK * BLOCK
        last = torch.arange(start, min(start + BLOCK, n), device=gram.device)
        every = torch.arange(n, device=gram.device)
        first = torch.cat([every[:start], every[start + len(last) :]])
        key = (start, n, shift)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._factor(gram[first][:, first], shift)
        lower = self._kept[1]
        reduced = torch.linalg.solve_triangular(lower, gram[first][:, last], upper=False)
        schur = self._factor(gram[last][:, last] - reduced.T @ reduced, shift)
        unit = torch.zeros(len(last), 1, dtype=gram.dtype, device=gram.device)
        unit[newest - start] = divisor
        solution = torch.cholesky_solve(unit, schur)
        out = torch.empty(n, dtype=gram.dtype, device=gram.device)
        out[last] = solution[:, 0]
        out[first] = -torch.linalg.solve_triangular(lower.T, reduced @ solution, upper=True)[:, 0]
        return out

    def forget(self) -> None:
        """Drop what is kept from call to call, for rows that were loaded."""
        self._kept = None

    def _factor(self, gram: Tensor, shift: float) -> Tensor:
        shifted = gram.clone()
        shifted.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if bool(failed) or not bool(factor.diagonal().isfinite().all()):
            raise ValueError(
                f"damping {self.damping:g} is lost in rounding beside gradients of norm {_norm(gram):.1e}; raise it"
            )
        return factor


class Root:
    """u = (εI + (GᵀG)^½)⁻¹ g_j = Gᵀ V(Σ + εI)⁻¹Vᵀ e_j with GGᵀ = VΣ²Vᵀ (GGT, arXiv 1806.02958, algorithm 1).

    Nothing is added under the root: the gradient lies in the span of G, where the formula is exact as it stands. An
    eigendecomposition a step, O(m³).

    Args:
        damping: ε > 0, in units of the gradient.

    Raises:
        ValueError: `damping` is not positive.

    >>> G = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    >>> (G.T @ Root(1.0).coefficients(G @ G.T, 0, 1)).tolist()  # the root is 5 along g: g/(5 + 1)
    [0.5, 0.6666666666666666]
    """

    name: ClassVar[str] = "ggt"

    def __init__(self, damping: float) -> None:
        self.damping = check_damping(damping)

    def coefficients(self, gram: Tensor, newest: int, rows: int) -> Tensor:
        """Return x with u = Gᵀx, shape (n,), float64; arguments as of `Inverse.coefficients`."""
        squares, vectors = torch.linalg.eigh(gram)
        return vectors @ (vectors[newest] / (squares.clamp(min=0).sqrt() + self.damping))

    def forget(self) -> None:
        """Nothing is kept."""


Spectrum = Inverse | Root
"""What the gradients' second moments are turned into."""


def check_damping(value: float) -> float:
    """Return the damping, which has to be positive."""
    if number("damping", value) <= 0:
        raise ValueError(f"damping must be positive, not {value!r}")
    return float(value)


def _norm(gram: Tensor) -> float:
    return float(gram.diagonal().max()) ** 0.5 if len(gram) else 0.0
