"""Optimal Brain Surgeon on groups of columns, scored anew after every removal (ZipLM, arXiv 2302.04089)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cram_bench.curvature.obs import NotDefinite, inverse


@dataclass(frozen=True)
class Path:
    """In which order the units of a layer went, and what the layer was at some counts of them.

    Attributes:
        order: units, the first to go first.
        increments: of the modelled loss ½ tr(Δ(H + λI)Δᵀ) when each went, float64; their sum is that of all removals
            so far.
        weights: count of units that stay → what stays of W in the order of its columns, (outputs, columns).
        priors: likewise, → ‖ŴX − WX‖ / ‖WX‖ in the Frobenius norm, without damping.
    """

    order: tuple[int, ...]
    increments: Tensor
    weights: dict[int, Tensor]
    priors: dict[int, float]

    def kept(self, count: int) -> tuple[int, ...]:
        """Return which units stay where so many do, ascending."""
        return tuple(sorted(self.order[len(self.order) - count :]))


def damped(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """Return H + λI, which inputs are always zero, and λ: `damping` times the mean of H's diagonal without these.

    An input that is always zero gets H_jj = 1, so that its column, which has to count as zero, goes at no cost.

    >>> damped(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), 0.25)[0].tolist()
    [[5.0, 0.0], [0.0, 1.0]]
    """
    matrix = matrix.clone()
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    shift = damping * float(diagonal.sum()) / max(1, int((~dead).sum()))
    diagonal += torch.where(dead, 1.0, shift)
    return matrix, dead, shift


def remove(matrix: Tensor, weight: Tensor, units: int, counts: Iterable[int], damping: float = 0.01) -> Path:
    """Remove all units of a layer one by one, each time the one whose removal costs least, the others corrected.

    With P = (H + λI)⁻¹ and S the columns of a unit, K = ([P]_SS)⁻¹: the unit of least ½ Σᵢ W_{i,S} K W_{i,S}ᵀ goes,
    which is the true increase of the damped loss; W ← W − W_{:,S} K [P]_{S,:}; P ← P − [P]_{:,S} K [P]_{S,:}. Then
    all are scored anew. W is at every count where the joint solve for what is gone ends
    (`cram_bench.curvature.joint`).

    Args:
        matrix: H = (2/N) XXᵀ, (columns, columns), float64.
        weight: W, (outputs, columns); a unit is consecutive columns.
        units: how many there are.
        counts: of which the weights are kept.
        damping: λ over the mean of H's diagonal.

    Raises:
        NotDefinite: H + λI cannot be factored, or rounding has eaten P.

    >>> eye = torch.eye(4, dtype=torch.float64)
    >>> path = remove(eye, torch.tensor([[1.0, 2.0, 3.0, 0.0]]), 2, [1], damping=0.0)
    >>> path.order, path.increments.tolist(), round(path.priors[1] ** 2 * 14, 9)
    ((0, 1), [2.5, 4.5], 5.0)
    """
    matrix, wanted = matrix.double(), set(counts)
    full, dead, shift = damped(matrix, damping)
    whole, size = weight.double(), weight.shape[1] // units
    start = whole.masked_fill(dead, 0.0)
    energy = float(((start @ matrix) * start).sum())
    inverses, values = inverse(full[None])[0], start.clone()
    place = torch.arange(units, device=matrix.device)  # which unit each group of columns here is
    left = torch.ones(units, dtype=torch.bool, device=matrix.device)
    order: list[int] = []
    increments: list[float] = []
    weights: dict[int, Tensor] = {}
    priors: dict[int, float] = {}
    offsets = torch.arange(size, device=matrix.device)

    def note() -> None:
        if (count := units - len(order)) not in wanted:
            return
        stay = place[left]
        columns = (stay[:, None] * size + offsets).flatten()
        here = (left.nonzero() * size + offsets).flatten()
        # what multiplies nothing but zeros and stays keeps its value
        weights[count] = torch.where(dead[columns], whole[:, columns], values[:, here]).to(weight.dtype)
        # ½ tr(Δ(H + λI)Δᵀ) is the sum of the increments, whose damped part was never there
        change = start.clone()
        change[:, columns] -= values[:, here]
        error = 2 * sum(increments) - shift * float(change.square().sum())
        priors[count] = (max(0.0, error) / energy) ** 0.5 if energy else 0.0

    note()
    for _ in range(units):
        groups = len(place)
        own = inverses.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (groups, size, size)
        split = values.view(-1, groups, size).movedim(1, 0)  # (groups, outputs, size)
        if size == 1:
            scores = split.square().sum((1, 2)) / (2 * own[:, 0, 0])
        else:
            scores = torch.linalg.solve(own, split.mT @ split).diagonal(dim1=1, dim2=2).sum(1) / 2
        scores = scores.masked_fill(~left, torch.inf)
        unit = int(scores.argmin())
        columns = slice(unit * size, (unit + 1) * size)
        factor, failed = torch.linalg.cholesky_ex(own[unit])
        if bool(failed):
            raise NotDefinite(0)
        column = inverses[:, columns].clone()
        asked = torch.cholesky_solve(column.mT, factor)  # K [P]_{S,:}
        values.addmm_(values[:, columns].clone(), asked, alpha=-1)
        inverses.addmm_(column, asked, alpha=-1)
        values[:, columns] = 0.0
        inverses[columns, columns] = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        left[unit] = False
        order.append(int(place[unit]))
        increments.append(float(scores[unit]))
        note()
        if 5 * int(left.sum()) < 4 * groups and bool(left.any()):  # what is gone takes no more time
            here = (left.nonzero() * size + offsets).flatten()
            inverses, values = inverses[here[:, None], here].contiguous(), values[:, here].contiguous()
            place, left = place[left], left[left]
    return Path(tuple(order), torch.tensor(increments, dtype=torch.float64), weights, priors)


def ordered(weight: Tensor, sizes: Tensor, counts: Iterable[int]) -> Path:
    """Return the path of units that go by their size alone, the smallest first, nothing being corrected.

    Args:
        weight: W, (outputs, columns).
        sizes: of every unit.
        counts: of which the weights are kept.
    """
    order = tuple(sizes.argsort(stable=True).tolist())
    units, size = len(order), weight.shape[1] // len(order)
    none = torch.full((units,), torch.nan, dtype=torch.float64)
    path, weights = Path(order, none, {}, {}), {}
    for count in counts:
        kept = torch.tensor(path.kept(count), dtype=torch.long, device=weight.device)
        columns = (kept[:, None] * size + torch.arange(size, device=weight.device)).flatten()
        weights[count] = weight[:, columns].clone()
    return Path(order, none, weights, {})
