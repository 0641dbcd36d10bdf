"""The kernels of Optimal Brain Surgeon (Hassibi & Stork 1993) on many blocks at once, in float64.

Within a block the loss is modelled as ½ δᵀ F δ around weights w, F positive definite. Removing the set S means w_S → 0,
the others moving to where the model is least.
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

    q = argmin w_q² / (2 [F⁻¹]_qq); w ← w − F⁻¹_{:,q} w_q / [F⁻¹]_qq; F⁻¹ ← F⁻¹ − F⁻¹_{:,q} F⁻¹_{q,:} / [F⁻¹]_qq
    (arXiv 2210.09223, algorithm 1). What goes first is what is zero already.

    Args:
        inverses: F⁻¹, shape (n, B, B), float64; left as it is.
        weights: w, shape (n, B).
        present: which entries are weights, shape (n, B); the others are never removed.

    Returns:
        The order, shape (n, B): order[b, t] is which weight of block b goes as its t-th, −1 where none is left; and the
        increments of the modelled loss, likewise, infinite where none is left. Their sum to t is the least increase
        for the set of the first t, up to nothing but rounding, for removal one by one ends where the joint solve does.

    Raises:
        NotDefinite: a diagonal entry is no longer positive, so rounding has eaten the matrix.

    >>> order, increments = removal(torch.eye(2)[None], torch.tensor([[3.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    >>> order.tolist(), increments.tolist()
    ([[1, 0]], [[0.5, 4.5]])
    """
    rows, width = weights.shape
    matrices, values, left = inverses.clone(), weights.to(inverses.dtype).clone(), present.clone()
    order = torch.full((rows, width), -1, dtype=torch.long, device=weights.device)
    increments = torch.full((rows, width), torch.inf, dtype=inverses.dtype, device=weights.device)
    every = torch.arange(rows, device=weights.device)
    lost = torch.zeros(rows, dtype=torch.bool, device=weights.device)
    for step in range(int(present.sum(1).max()) if rows else 0):
        scores = singles(matrices, values).masked_fill(~left, torch.inf)
        increment, chosen = scores.min(1)
        there = left[every, chosen]
        order[:, step] = torch.where(there, chosen, -1)
        increments[:, step] = torch.where(there, increment, torch.inf)
        column = matrices[every, :, chosen]  # (n, B), symmetric
        pivot = column[every, chosen]
        lost |= there & ~(pivot > 0)
        column = column * there[:, None]
        values.sub_(column * (values[every, chosen] / pivot)[:, None])
        values[every, chosen] = torch.where(there, 0.0, values[every, chosen])
        matrices.baddbmm_((column / pivot[:, None])[:, :, None], column[:, None, :], alpha=-1)
        # what went is out of all that follows; its diagonal only has to stay positive
        matrices[every, chosen, chosen] = torch.where(there, 1.0, matrices[every, chosen, chosen])
        left[every, chosen] = False
    if bool(lost.any()):
        raise NotDefinite(int(lost.nonzero()[0, 0]))
    return order, increments


def joint(matrices: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """Return the weights of least modelled loss, what is not in `keep` being zero: the exact joint solve.

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

    w ← w − Σ_Q F⁻¹_{:,Q} ([F⁻¹]_QQ)⁻¹ w_Q over the removed groups Q of `size` consecutive weights. This is the update
    of oBERT's published code; it is the joint solve only where the groups do not interact.

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


_PENDING = 32  # steps whose downdates are done together


def removal_of_rows(inverse: Tensor, weights: Tensor, entries: int = 1 << 23) -> tuple[Tensor, Tensor]:
    """Remove the weights of rows one by one as `removal` does; all rows begin with the same H⁻¹ (arXiv 2303.14409).

    Rank-one downdates are held back and done some at a time as one product, and what went is taken out of the matrices,
    so that a row of d weights takes about 2d³/3 operations, nearly all of them in products, and no row has a matrix of
    its own at first.

    Args:
        inverse: H⁻¹, shape (d, d), float64.
        weights: shape (n, d).
        entries: of the matrices of rows that are removed from together; a row alone takes d².

    Returns:
        Order and increments, each (n, d), as `removal`'s.

    >>> order, increments = removal_of_rows(torch.eye(2, dtype=torch.float64), torch.tensor([[3.0, 1.0]]))
    >>> order.tolist(), increments.tolist()
    ([[1, 0]], [[0.5, 4.5]])
    """
    step = max(1, entries // max(1, inverse.numel()))
    found = [_removal(inverse, part.to(inverse.dtype)) for part in weights.split(step)]
    return torch.cat([order for order, _ in found]), torch.cat([increments for _, increments in found])


def _removal(inverse: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = values.shape
    every = torch.arange(rows, device=values.device)
    place = torch.arange(width, device=values.device).expand(rows, -1)
    matrices, values = inverse.expand(rows, -1, -1), values.clone()
    order = torch.empty((rows, width), dtype=torch.long, device=values.device)
    increments = torch.empty_like(values)
    done = 0
    while done < width:
        count = min(_PENDING, width - done)
        diagonal = matrices.diagonal(dim1=-2, dim2=-1).clone()
        pending = values.new_zeros(rows, count, width - done)  # the matrices now are these less pendingᵀ pending
        left = torch.ones_like(values, dtype=torch.bool)
        for i in range(count):
            scores = (values.square() / (2 * diagonal)).masked_fill_(~left, torch.inf)
            increments[:, done + i], chosen = scores.min(1)
            order[:, done + i] = place[every, chosen]
            column = matrices[every, chosen]
            if i:
                at = pending[every, :i, chosen]  # (n, i)
                column = column - torch.bmm(at[:, None], pending[:, :i])[:, 0]
            pivot = column[every, chosen][:, None]
            values.sub_(column * (values[every, chosen][:, None] / pivot))
            pending[:, i] = scaled = column / pivot.sqrt()
            diagonal.sub_(scaled.square())
            left[every, chosen] = False
        done += count
        if done < width:
            rest = left.nonzero()[:, 1].view(rows, -1)  # every row has lost as many
            place, values = place.gather(1, rest), values.gather(1, rest)
            matrices = matrices[every[:, None, None], rest[:, :, None], rest[:, None, :]]
            pending = pending.gather(2, rest[:, None].expand(-1, count, -1))
            matrices.baddbmm_(pending.mT, pending, alpha=-1)
    return order, increments


def joint_of_rows(matrix: Tensor, weights: Tensor, keep: Tensor, entries: int = 1 << 22) -> Tensor:
    """Return what `joint` does, of rows (n, d) that share H (d, d): of every row only what stays is factored.

    Rows of which all stays are the same bit for bit.

    Raises:
        NotDefinite: H_RR is not positive definite in a row.

    >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> joint_of_rows(H, torch.tensor([[3.0, 1.0]]), torch.tensor([[True, False]])).tolist()
    [[3.5, 0.0]]
    """
    values = weights.to(matrix.dtype)
    out = values.masked_fill(~keep, 0.0)
    kept = keep.sum(1)
    rows = ((kept > 0) & (kept < keep.shape[1])).nonzero()[:, 0]
    rows = rows[kept[rows].argsort()]  # rows that keep about as many go together
    at = 0
    while at < len(rows):
        most = int(kept[rows[-1]])
        own = rows[at : at + max(1, entries // most**2)]
        width = int(kept[own].max())
        place = keep[own].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        there = keep[own].gather(1, place)
        inner = matrix[place[:, :, None], place[:, None, :]]
        inner.masked_fill_(~(there[:, :, None] & there[:, None, :]), 0.0)
        inner.diagonal(dim1=-2, dim2=-1).add_((~there).to(inner.dtype))
        right = (values[own].masked_fill(keep[own], 0.0) @ matrix).gather(1, place).masked_fill_(~there, 0.0)
        factor, failed = torch.linalg.cholesky_ex(inner)
        if bool(failed.any()):
            raise NotDefinite(int(own[failed.nonzero()[0, 0]]))
        change = torch.cholesky_solve(right[..., None], factor)[..., 0]
        out[own] = out[own].scatter_add(1, place, change)
        at += len(own)
    return out
