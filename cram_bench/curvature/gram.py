"""M-FAC's inverse without the matrix: (λI + (1/m) GᵀG)⁻¹ from the m gradients G and their m×m Gram matrix.

With A = (λm I + GGᵀ)⁻¹ it is F⁻¹x = (1/λ)(x − Gᵀ A G x) (Woodbury; arXiv 2107.03356 builds the same by a recursion).
The Gram matrix is factored in float64. For x in the span of G the difference cancels; there `push` is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cram_bench.curvature.obs import NotDefinite


@dataclass(frozen=True)
class Gram:
    """Blocks of gradients and what is needed to multiply by the inverse Fisher of each.

    Args:
        gradients: G, shape (n, m, B): m gradients of n blocks of B weights.
        damping: λ > 0, in the units of (1/m) GᵀG.

    >>> G = torch.tensor([[[1.0, 2.0]]])
    >>> gram, F = Gram(G, 0.5), 0.5 * torch.eye(2) + G[0].T @ G[0]
    >>> torch.allclose(gram.diagonal()[0], F.inverse().diagonal().double())
    True
    """

    gradients: Tensor
    damping: float

    def factor(self, keep: Tensor | None = None) -> Tensor:
        """Return the Cholesky factor of λm I + G_R G_Rᵀ, R being `keep` (n, B) or everything: (n, m, m), float64.

        Raises:
            NotDefinite: there is none.
        """
        rows = self.gradients if keep is None else self.gradients * keep[:, None]
        inner = torch.stack([_gram(block) for block in rows])
        inner.diagonal(dim1=-2, dim2=-1).add_(self.damping * rows.shape[1])
        factor, failed = torch.linalg.cholesky_ex(inner)
        if bool(failed.any()):
            raise NotDefinite(int(failed.nonzero()[0, 0]))
        return factor

    def diagonal(self) -> Tensor:
        """Return the diagonal of F⁻¹, (1/λ)(1 − Σ_i V_i²) with V = L⁻¹G, shape (n, B), float64."""
        factor = self.factor()
        out = []
        for block, lower in zip(self.gradients, factor, strict=True):
            parts = [
                torch.linalg.solve_triangular(lower, part.double(), upper=False).square().sum(0)
                for part in block.split(1 << 16, dim=1)
            ]
            out.append((1 - torch.cat(parts)) / self.damping)
        return torch.stack(out)

    def solve(self, x: Tensor) -> Tensor:
        """Return F⁻¹x for x of shape (n, B), not in the span of G, in float64."""
        inner = self._times(x)
        return (x.double() - self._span(torch.cholesky_solve(inner[..., None], self.factor())[..., 0])) / self.damping

    def joint(self, weights: Tensor, keep: Tensor) -> Tensor:
        """Return the weights with which ½ δᵀFδ is least, what is not in `keep` being zero, as `obs.joint` does.

        w_R + F_RR⁻¹ F_RS w_S, where F_RS w_S = (1/m) G_Rᵀ(G_S w_S) lies in the span of G_R, so that by the push-through
        form it is w_R + G_Rᵀ (λm I + G_R G_Rᵀ)⁻¹ G_S w_S.
        """
        values = weights.double()
        inner = self._times(values.masked_fill(keep, 0.0))
        change = self._span(torch.cholesky_solve(inner[..., None], self.factor(keep))[..., 0])
        return (values + change).masked_fill_(~keep, 0.0)

    def _times(self, x: Tensor) -> Tensor:
        """Return G x, shape (n, m), summed in float64."""
        parts = zip(self.gradients.split(1 << 16, dim=2), x.split(1 << 16, dim=1), strict=True)
        return torch.stack([torch.bmm(g.double(), v.double()[..., None])[..., 0] for g, v in parts]).sum(0)

    def _span(self, coefficients: Tensor) -> Tensor:
        """Return Gᵀ c, shape (n, B), in float64."""
        parts = self.gradients.split(1 << 16, dim=2)
        return torch.cat([torch.bmm(g.double().mT, coefficients[..., None])[..., 0] for g in parts], 1)


def _gram(rows: Tensor) -> Tensor:
    """Return G Gᵀ in float64, a piece of the columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(1 << 16, dim=1):
        part = part.double()
        total.addmm_(part, part.T)
    return total
