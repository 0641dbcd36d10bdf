"""The kernels of Optimal Brain Surgeon (Hassibi & Stork 1993) on many blocks at once, in float64.

Within a block the loss is modelled as ½ δᵀ F δ around weights w, F positive definite. Removing the set S means w_S → 0, the
others moving to where the model is least.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NotDefinite(ValueError):
    """A matrix that has to be inverted is not positive definite.

    Attributes:
        row: which block.
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"block {row} is not positive definite")
        self.row = row


def inverse(matrices: Tensor) -> Tensor:
    """Return the inverses of positive definite matrices (n, B, B).

    Raises:
        NotDefinite: one is not.
    """
    return torch.cholesky_inverse(_cholesky(matrices))


def _cholesky(matrices: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):
        raise NotDefinite(int(failed.nonzero()[0, 0]))
    return factor


def singles(inverses: Tensor, weights: Tensor) -> Tensor:
    """Return the increase of the modelled loss where one weight goes alone, w_q² / (2 [F⁻¹]_qq): shape (n, B).

    arXiv 2203.07259, equation 5, at one weight; the true least increase, for the others are corrected.

    >>> singles(torch.eye(2)[None], torch.tensor([[3.0, 1.0]])).tolist()
    [[4.5, 0.5]]
    """
    return weights.square() / (2 * inverses.diagonal(dim1=-2, dim2=-1))


def group_saliency(inverses: Tensor, weights: Tensor, size: int) -> Tensor:
    """Return the increase where `size` consecutive weights go together, ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q: shape (n, B / size).

    arXiv 2203.07259, equation 5.
    """
    count = weights.shape[-1] // size
    split = inverses.unflatten(-1, (count, size)).unflatten(-3, (count, size))  # (n, count, size, count, size)
    own = split.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (n, count, size, size)
    parts = weights.unflatten(-1, (count, size))
    return (parts * torch.linalg.solve(own, parts[..., None])[..., 0]).sum(-1) / 2


def removal(inverses: Tensor, weights: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Remove the weights of every block one by one, each time the one whose removal costs least; all blocks at once.

    q = argmin w_q² / (2 [F⁻¹]_qq); w ← w − F⁻¹_{:,q} w_q / [F⁻¹]_qq; F⁻¹ ← F⁻¹ − F⁻¹_{:,q} F⁻¹_{q,:} / [F⁻¹]_qq (arXiv 2210.09223,
    algorithm 1). What goes first is what is zero already.

    Args:
        inverses: F⁻¹, shape (n, B, B), float64; left as it is.
        weights: w, shape (n, B).
        present: which entries are weights, shape (n, B); the others are never removed.

    Returns:
        The order, shape (n, B): order[b, t] is which weight of block b goes as its t-th, −1 where none is left; and the
        increments of the modelled loss, likewise, infinite where none is left. Their sum to t is the least increase
        for the set of the first t, up to nothing but rounding, for removal one by one ends where the joint solve does.

    >>> order, increments = removal(torch.eye(2)[None], torch.tensor([[3.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    >>> order.tolist(), increments.tolist()
    ([[1, 0]], [[0.5, 4.5]])
    """
    rows, width = weights.shape
    matrices, values, left = inverses.clone(), weights.to(inverses.dtype).clone(), present.clone()
    order = torch.full((rows, width), -1, dtype=torch.long, device=weights.device)
    increments = torch.full((rows, width), torch.inf, dtype=inverses.dtype, device=weights.device)
    every = torch.arange(rows, device=weights.device)
    for step in range(int(present.sum(1).max()) if rows else 0):
        scores = singles(matrices, values).masked_fill(~left, torch.inf)
        increment, chosen = scores.min(1)
        there = left[every, chosen]
        order[:, step] = torch.where(there, chosen, -1)
        increments[:, step] = torch.where(there, increment, torch.inf)
        column = matrices[every, :, chosen]  # (n, B), symmetric
        pivot = column[every, chosen]
        column = column * there[:, None]
        values.sub_(column * (values[every, chosen] / pivot)[:, None])
        values[every, chosen] = torch.where(there, 0.0, values[every, chosen])
        matrices.baddbmm_((column / pivot[:, None])[:, :, None], column[:, None, :], alpha=-1)
        # what went is out of all that follows; its diagonal only has to stay positive
        matrices[every, chosen, chosen] = torch.where(there, 1.0, matrices[every, chosen, chosen])
        left[every, chosen] = False
    return order, increments


def joint(matrices: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """Return the weights with which the modelled loss is least, what is not in `keep` being zero: the exact joint solve.

    With R what stays and S what goes, w_R ← w_R + F_RR⁻¹ F_RS w_S, which is w − F⁻¹_{:,S} ([F⁻¹]_SS)⁻¹ w_S
    (arXiv 2203.07259, equation 4) without inverting twice. Where F_RS = 0, weights that stay are the same bit for bit.

    Args:
        matrices: F, shape (n, B, B), float64.
        weights: w, shape (n, B).
        keep: R, shape (n, B), boolean.

    Raises:
        NotDefinite: F_RR is not positive definite.

    >>> F = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64)
    >>> joint(F, torch.tensor([[3.0, 1.0]]), torch.tensor([[True, False]])).tolist()
    [[3.5, 0.0]]
    """
    values = weights.to(matrices.dtype)
    gone = values.masked_fill(keep, 0.0)
    right = torch.bmm(matrices, gone[..., None]).masked_fill_(~keep[..., None], 0.0)
    inner = matrices.masked_fill(~(keep[..., None] & keep[..., None, :]), 0.0)
    inner.diagonal(dim1=-2, dim2=-1).add_((~keep).to(inner.dtype))
    change = torch.cholesky_solve(right, _cholesky(inner))[..., 0]
    return (values + change).masked_fill_(~keep, 0.0)


def sum_of_singles(inverses: Tensor, weights: Tensor, keep: Tensor, size: int = 1) -> Tensor:
    """Return the weights moved by the sum of what each removed group asks alone, then zeroed where not in `keep`.

    w ← w − Σ_Q F⁻¹_{:,Q} ([F⁻¹]_QQ)⁻¹ w_Q over the removed groups Q of `size` consecutive weights. This is the update of
    oBERT's published code; it is the joint solve only where the groups do not interact.

    >>> F = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64)
    >>> sum_of_singles(inverse(F), torch.tensor([[3.0, 1.0]]), torch.tensor([[True, False]])).tolist()
    [[3.5, 0.0]]
    """
    count = weights.shape[-1] // size
    values = weights.to(inverses.dtype)
    gone = (~keep).unflatten(-1, (count, size))
    parts = values.unflatten(-1, (count, size)) * gone
    if size == 1:
        asked = values * ~keep / inverses.diagonal(dim1=-2, dim2=-1)
    else:
        split = inverses.unflatten(-1, (count, size)).unflatten(-3, (count, size))
        own = split.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        asked = torch.linalg.solve(own, parts[..., None])[..., 0].flatten(-2)
    return (values - torch.bmm(inverses, asked[..., None])[..., 0]).masked_fill_(~keep, 0.0)
