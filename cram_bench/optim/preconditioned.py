"""Steps with a full-matrix preconditioner made of the last m gradients: M-FAC, GGT, and both compressed (EFCP)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from cram_bench.checks import instance, integer, number, shown
from cram_bench.compress.rank import NaNError
from cram_bench.optim.base import Closure, Wrapper
from cram_bench.optim.bases import Base
from cram_bench.optim.rings import Dense, LowRank, Ring, Rows, TopK
from cram_bench.optim.spectra import Divisor, Inverse, Root, Spectrum
from cram_bench.settings import Count, Fraction, NotNegative, Positive

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LARGE = 10**9  # bytes of a checkpoint that are worth a warning


class Window:
    """The last m gradients, their Gram matrix, and what they make of the newest.

    Each `push` compresses a gradient to c, replaces the oldest row by it, updates one row of the Gram matrix (m×m,
    float64), and returns u, the spectrum applied to c.

    Args:
        ring: how gradients are kept.
        spectrum: what is made of them.
        gradients: m.
        dtype: in which rows are stored: float32, bfloat16 or float64.

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
            "count": self.count,
            "parts": parts,
            "carried": self.rows.carried,
            "gram": gram,
        }

    def load_state_dict(self, state: Mapping[str, Any], shapes: Sequence[torch.Size], device: torch.device) -> None:
        """Restore what `state_dict` returned, of parameters of these shapes.

        Raises:
            ValueError: it is of another ring, or of parameters of other shapes; the window is as before then.
        """
        if state["kept"] != self._kept():
            raise ValueError(f"this state dict is of a ring {state['kept']}, and this optimizer has {self._kept()}")
        other = Window(self.ring, self.spectrum, self.gradients, self.dtype)
        other.count = state["count"]
        if shapes:
            other.extend(shapes, device)
        targets = [*(part[: other.filled] for part in other.rows.parts), *other.rows.carried]
        sources = [*state["parts"], *state["carried"]]
        if [t.shape for t in targets] != [s.shape for s in sources]:
            raise ValueError("this state dict is of parameters of other shapes than the optimizer's")
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        other.gram[: other.filled, : other.filled] = state["gram"]
        self.rows, self.gram, self.count = other.rows, other.gram, other.count
        self.spectrum.forget()

    def _kept(self) -> str:
        return f"{self.ring} of {self.gradients} gradients in {str(self.dtype).removeprefix('torch.')}"


class Preconditioned(Wrapper):
    """Let the base optimizer step with u = P⁻¹c instead of the gradient g, c being what the ring keeps of g.

    P is made of the last m gradients of all the base's parameters together. The gradient is taken as the base would
    see it, finite and unscaled: after a `torch.amp.GradScaler` has unscaled it, and not at a step that the scaler
    skips. Momentum is the base's, over u. Weight decay is in one of three places:

    * ``decay``: g + λθ enters the ring (M-FAC's way); a parameter group may set its own ``decay``;
    * ``decay`` and ``decoupled``: θ ← (1 − λ)θ before the base's step, not times its learning rate (EFCP's way);
    * the base's own ``weight_decay``, which it adds to u, or decouples.

    It steps as a plain optimizer does, ``backward`` and then ``step()``, or ``step(closure)``; so gradients may be
    accumulated, `GradScaler.step` takes it, and `SAM` or `CrAM` may be built over it. The gradient that enters the ring
    is clipped before ``step()``, or by a hook on this optimizer; a hook on `base` clips u.

    Columns are added when a parameter first has a gradient. Where one has none at a step it is zero there, what error
    feedback holds for it waits, and the parameter stays as it is. Over several devices gradients are averages, so that
    all hold the same ring; u is the first device's. A ring lives where the first parameter does.

    Args:
        model: the model being trained, or the `DistributedDataParallel` around it.
        base: any plain torch optimizer over its parameters.
        ring: how gradients are kept.
        spectrum: what is made of them.
        gradients: m, the length of the ring.
        decay: λ ≥ 0.
        decoupled: shrink the weights by λ instead.
        dtype: in which rows are stored; float32, or bfloat16 for a half of the memory, the gradients being rounded.

    Raises:
        ValueError: `gradients` is below 1, or `decay` negative, or 1 or more where `decoupled`.
        TypeError: `ring` is none.
    """

    accumulates = True
    alone = True

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        ring: Ring,
        spectrum: Spectrum,
        gradients: int,
        decay: float = 0.0,
        decoupled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        window = Window(ring, spectrum, gradients, dtype)
        _check_decay(decay, decoupled)
        self.decoupled = decoupled
        super().__init__(model, base, decay=decay)
        self.window = window
        self._columns: list[int] = []  # places of the parameters whose gradients are joined, in that order

    @property
    def nbytes(self) -> int:
        """Bytes of the ring, of the error that is fed back, and of the Gram matrix, once there was a step."""
        return self.window.nbytes

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, scaler: torch.amp.GradScaler | None = None
    ) -> Any:
        """Take one step with the gradients there are, or with those of the closure; return what it returned.

        Raises:
            ValueError: a gradient is not finite; weights and ring are as before then. Or the damping is lost in
                rounding, or the memory does not suffice.
        """
        if closure is not None or scaler is not None:
            return super().step(closure, scaler=scaler)
        if not self._only_prepares():
            for group in self.param_groups:
                if not self.settings.keys() <= group.keys():  # added to the base optimizer, or loaded into it
                    self._adopt(group)
            self._ready()
        return self.base.step()

    def _gradients(self, closure: Closure, scale: float | None) -> Any:
        return closure()

    def _ready(self) -> None:
        for group in self.param_groups:  # whoever changed them
            _check_decay(group["decay"], self.decoupled)
        parameters = [(p, group["decay"]) for group in self.param_groups for p in group["params"]]
        present = [place for place, (p, _) in enumerate(parameters) if p.grad is not None]
        new = [place for place in present if place not in set(self._columns)]
        columns = [*self._columns, *new]
        if not columns:
            return
        wide = torch.float64 if self.window.dtype is torch.float64 else torch.float32
        device = parameters[columns[0]][0].device
        pieces = [self._gradient(*parameters[place], wide).reshape(-1).to(device) for place in columns]
        gradient = torch.cat(pieces)
        if not bool(gradient.isfinite().all()):
            wrong = next(at for at, piece in zip(columns, pieces, strict=True) if not bool(piece.isfinite().all()))
            shape = tuple(parameters[wrong][0].shape)
            raise NaNError(f"the gradient of a parameter of shape {shape} is not finite; it does not enter the ring")
        if new:
            self.window.extend([parameters[place][0].shape for place in new], device)
            self._columns = columns
        absent = [at for at, place in enumerate(columns) if parameters[place][0].grad is None]
        u = self.window.push(gradient, absent)
        if self.parallel is not None:  # sums on a GPU differ from one to the next in their last bits
            torch.distributed.broadcast(u, group_src=0, group=self.parallel.process_group)
        for place, piece in zip(columns, u.split([len(piece) for piece in pieces]), strict=True):
            parameter, decay = parameters[place]
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(piece.view(parameter.shape))
            if self.decoupled and decay:
                parameter.mul_(1 - decay)

    def _gradient(self, parameter: Tensor, decay: float, dtype: torch.dtype) -> Tensor:
        """Return what enters the ring for a parameter: g, or g + λθ."""
        if parameter.grad is None:
            return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        gradient = gradient.to(dtype)
        return gradient.add(parameter.to(dtype), alpha=decay) if decay and not self.decoupled else gradient

    def _adopt(self, group: dict[str, Any]) -> None:
        super()._adopt(group)
        _check_decay(group["decay"], self.decoupled)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base optimizer's state and, as ``preconditioner`` of its first group, the ring.

        Warns:
            UserWarning: a checkpoint of it would hold a gigabyte or more.
        """
        state = super().state_dict()
        own = {"method": type(self).__name__, "columns": list(self._columns), **self.window.state_dict()}
        size = sum(tensor.nbytes for tensor in (*own["parts"], *own["carried"]))
        if size >= LARGE:
            half = "" if self.window.dtype is torch.bfloat16 else "dtype=torch.bfloat16 halves it, "
            warnings.warn(
                f"this state of {type(self).__name__} holds {size / 1e9:.2f} GB of gradients: {half}"
                "fewer gradients or EFCP with ring=TopK(0.01) make it small",
                stacklevel=2,
            )
        first, *rest = state["param_groups"]
        return {**state, "param_groups": [{**first, "preconditioner": own}, *rest]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned.

        Raises:
            ValueError: another optimizer saved it, or it is of another ring, or of other parameters; nothing is changed
                then.
        """
        name = type(self).__name__
        groups = state_dict.get("param_groups", [])
        own = next((group["preconditioner"] for group in groups if "preconditioner" in group), None)
        if own is None:
            raise ValueError(
                f"this state dict was not saved by {name}: it has no entry 'preconditioner'; a plain optimizer's is"
                " loaded by optimizer.base.load_state_dict"
            )
        if own["method"] != name:
            raise ValueError(f"this state dict was saved by {own['method']}, not by {name}")
        parameters = self._parameters()
        if any(place >= len(parameters) for place in own["columns"]):
            count = max(own["columns"]) + 1
            raise ValueError(
                f"this state dict is of {count} parameters or more, and the optimizer has {len(parameters)}"
            )
        before = self.window
        held = [parameters[place] for place in own["columns"]]
        window = Window(before.ring, before.spectrum, before.gradients, before.dtype)
        window.load_state_dict(own, [p.shape for p in held], held[0].device if held else torch.device("cpu"))
        rest = [{key: value for key, value in group.items() if key != "preconditioner"} for group in groups]
        super().load_state_dict({**state_dict, "param_groups": rest})
        self.window, self._columns = window, list(own["columns"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.window.ring}, gradients={self.window.gradients}, base={self.base!r})"


class MFAC(Preconditioned):
    """u = (λI + (1/m) Σ g_i g_iᵀ)⁻¹ g over the last m gradients (M-FAC, arXiv 2107.03356, section 3.2, dynamic).

    Exact in float32 storage by the push-through form (`cram_bench.optim.spectra.Inverse`); 4md bytes for d weights. u
    is about m/|g| long, so a shorter ring wants a learning rate that is larger by as much: 1e-3 for 1024, 0.03 for 32.

    Args:
        model: the model being trained.
        base: how to step with u, such as SGD.
        gradients: m, the length of the ring.
        damping: λ > 0, in units of gradient².
        divisor: ``window`` divides by m also while the ring fills, ``count`` by the gradients there are.
        decay: weight decay that enters the ring, or, if `decoupled`, shrinks the weights (see `Preconditioned`).
        dtype: in which gradients are stored, float32, bfloat16 or float64.

    Raises:
        ValueError: `gradients` is below 1, `damping` not positive, or another is outside what its line allows.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = MFAC(model, torch.optim.SGD(model.parameters(), lr=0.1), gradients=8)
    >>> model(torch.ones(1, 1)).square().sum().backward()
    >>> optimizer.step()
    >>> optimizer.window.count
    1
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        gradients: int = 1024,
        damping: float = 1e-5,
        divisor: Divisor = "window",
        decay: float = 0.0,
        decoupled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, base, Dense(), Inverse(damping, divisor), gradients, decay, decoupled, dtype)


class GGT(Preconditioned):
    """u = (εI + (Σ g_i g_iᵀ)^½)⁻¹ g over the last m gradients (GGT, arXiv 1806.02958, algorithm 1, without decay).

    u is at most 1 long whatever the gradient, so the learning rate is the length of a step.

    Args:
        model: the model being trained.
        base: how to step with u, such as SGD.
        gradients: m, the length of the ring.
        damping: ε > 0, in units of the gradient.
        decay: weight decay that enters the ring, or, if `decoupled`, shrinks the weights (see `Preconditioned`).
        dtype: in which gradients are stored, float32, bfloat16 or float64.

    Raises:
        ValueError: `gradients` is below 1, `damping` not positive, or another is outside what its line allows.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        gradients: int = 100,
        damping: float = 1e-5,
        decay: float = 0.0,
        decoupled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, base, Dense(), Root(damping), gradients, decay, decoupled, dtype)


class EFCP(Preconditioned):
    """M-FAC or GGT over compressed gradients with error feedback (EFCP, arXiv 2306.06098).

    a = e + g; c = C(a); e ← a − c; the ring keeps c, and u = P⁻¹c, where P is made of the c of the last m steps. With
    `TopK` it is S-M-FAC or S-GGT, with `LowRank` the low-rank M-FAC of the paper.

    Args:
        model: the model being trained.
        base: how to step with u, such as SGD; its ``dampening`` may equal its momentum, as the paper has it for low
            rank.
        ring: ``TopK(0.01)`` or ``LowRank(4)``.
        spectrum: ``mfac`` or ``ggt``.
        gradients: m, the length of the ring.
        damping: λ of `MFAC`, or ε of `GGT`.
        divisor: of ``mfac``, as for `MFAC`.
        decay: weight decay that enters the ring, or, if `decoupled`, shrinks the weights (see `Preconditioned`).
        dtype: in which values are stored, float32, bfloat16 or float64; what bfloat16 rounds off is fed back.

    Raises:
        ValueError: `gradients` is below 1, `damping` not positive, or another is outside what its line allows.
        TypeError: `ring` is neither.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        ring: Ring = TopK(0.01),
        spectrum: Literal["mfac", "ggt"] = "mfac",
        gradients: int = 1024,
        damping: float = 1e-4,
        divisor: Divisor = "window",
        decay: float = 0.0,
        decoupled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if spectrum not in ("mfac", "ggt"):
            raise ValueError(f"spectrum must be mfac or ggt, not {spectrum!r}")
        made = Inverse(damping, divisor) if spectrum == "mfac" else Root(damping)
        super().__init__(model, base, ring, made, gradients, decay, decoupled, dtype)


def _check_decay(decay: Any, decoupled: bool) -> None:
    number("decay", decay, 0, math.nextafter(1, 0) if decoupled else math.inf)


Storage = Annotated[Literal["float32", "bfloat16"], Field(description="float32 or bfloat16")]
Dividing = Annotated[Divisor, Field(description="window or count")]
Density = Annotated[float, Field(gt=0, le=1, description="in (0, 1]")]
NotNegativeCount = Annotated[int, Field(ge=0, description="not negative")]


@dataclass(frozen=True)
class PreconditionedBase(Base):
    """SGD that steps with a preconditioned gradient."""

    lr: Positive = 1e-3
    """Peak learning rate, positive."""
    weight_decay: NotNegative = 1e-4
    """On every parameter: inside the ring, or decoupled; not negative."""
    momentum: Fraction = 0.0
    """Of SGD, in [0, 1)."""
    gradients: Count = 1024
    """Length m of the ring of gradients, at least 1."""
    damping: Positive = 1e-4
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""
    decoupled: bool = False
    """Shrink the weights by 1 − weight_decay a step, instead of adding weight_decay times them to the gradient."""
    storage: Storage = "float32"
    """Type of the numbers in the ring: ``float32`` or ``bfloat16``."""

    def _sgd(self, model: nn.Module, dampening: float = 0.0) -> Optimizer:
        return torch.optim.SGD(model.parameters(), self.lr, self.momentum, dampening, fused=True)

    def _common(self) -> dict[str, Any]:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.storage]
        return {
            "gradients": self.gradients,
            "damping": self.damping,
            "decay": self.weight_decay,
            "decoupled": self.decoupled,
            "dtype": dtype,
        }


@dataclass(frozen=True)
class MFACBase(PreconditionedBase):
    """SGD over `MFAC`."""

    kind: ClassVar[str] = "m-fac"

    damping: Positive = 1e-5
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""
    divisor: Dividing = "window"
    """Divide the sum of M-FAC by the length of the ring (``window``) or by the gradients there are (``count``)."""

    def build(self, model: nn.Module) -> Optimizer:
        return MFAC(model, self._sgd(model), divisor=self.divisor, **self._common())


@dataclass(frozen=True)
class SparseMFACBase(MFACBase):
    """SGD over `EFCP` with the largest entries, S-M-FAC."""

    kind: ClassVar[str] = "s-m-fac"

    damping: Positive = 1e-4
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""
    decoupled: bool = True
    """Shrink the weights by 1 − weight_decay a step, instead of adding weight_decay times them to the gradient."""
    density: Density = 0.01
    """Fraction of a gradient's entries that the ring keeps, in (0, 1]."""
    block: NotNegativeCount = 0
    """Weights among which the largest are chosen: 0 for all of them together."""
    feedback: bool = True
    """Whether what compression leaves over is added to the next gradient."""

    def build(self, model: nn.Module) -> Optimizer:
        ring = TopK(self.density, self.block, self.feedback)
        return EFCP(model, self._sgd(model), ring, divisor=self.divisor, **self._common())


@dataclass(frozen=True)
class LowRankMFACBase(MFACBase):
    """SGD over `EFCP` with factors of low rank; momentum is μv + (1 − μ)u, as the paper has it there."""

    kind: ClassVar[str] = "lowrank-m-fac"

    damping: Positive = 1e-4
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""
    decoupled: bool = True
    """Shrink the weights by 1 − weight_decay a step, instead of adding weight_decay times them to the gradient."""
    rank: Count = 4
    """Rank of a gradient's factors, at least 1."""
    feedback: bool = True
    """Whether what compression leaves over is added to the next gradient."""

    def build(self, model: nn.Module) -> Optimizer:
        ring = LowRank(self.rank, self.feedback)
        return EFCP(model, self._sgd(model, self.momentum), ring, divisor=self.divisor, **self._common())


@dataclass(frozen=True)
class GGTBase(PreconditionedBase):
    """SGD over `GGT`."""

    kind: ClassVar[str] = "ggt"

    gradients: Count = 100
    """Length m of the ring of gradients, at least 1."""
    damping: Positive = 1e-5
    """λ of M-FAC, in units of gradient², or ε of GGT, in units of the gradient; positive."""

    def build(self, model: nn.Module) -> Optimizer:
        return GGT(model, self._sgd(model), **self._common())


@dataclass(frozen=True)
class SparseGGTBase(GGTBase):
    """SGD over `EFCP` with the largest entries and GGT's root, S-GGT."""

    kind: ClassVar[str] = "s-ggt"

    decoupled: bool = True
    """Shrink the weights by 1 − weight_decay a step, instead of adding weight_decay times them to the gradient."""
    density: Density = 0.01
    """Fraction of a gradient's entries that the ring keeps, in (0, 1]."""
    block: NotNegativeCount = 0
    """Weights among which the largest are chosen: 0 for all of them together."""
    feedback: bool = True
    """Whether what compression leaves over is added to the next gradient."""

    def build(self, model: nn.Module) -> Optimizer:
        ring = TopK(self.density, self.block, self.feedback)
        return EFCP(model, self._sgd(model), ring, "ggt", **self._common())
