"""Steps with a full-matrix preconditioner made of the last m gradients: M-FAC, GGT, and both compressed (EFCP)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cram_bench.checks import instance, number
from cram_bench.compress.rank import NaNError
from cram_bench.optim.base import Closure, Wrapper
from cram_bench.optim.rings import Dense, Ring, TopK
from cram_bench.optim.spectra import Divisor, Inverse, Root, Spectrum
from cram_bench.optim.window import Window

_KEPT = ("method", "columns", "kept", "count", "parts", "carried", "gram")
LARGE = 10**9  # bytes of a checkpoint that are worth a warning


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
    all hold the same ring; u is the first device's. A ring ``Dense(sharded=True)`` is spread over them instead: each
    holds its share of the columns, products are summed, and each saves and loads the state of its own share. A ring
    lives where the first parameter does.

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
        ValueError: `gradients` is below 1, or `decay` negative, or 1 or more where `decoupled`; or the ring is sharded,
            and the model not parallel.
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
        if isinstance(ring, Dense) and ring.sharded and not _everywhere(model):
            raise ValueError(
                "sharded spreads the ring over all processes of torch.distributed: model must be a"
                f" DistributedDataParallel over all of them, not {type(model).__name__}"
            )
        window = Window(ring, spectrum, gradients, dtype)
        instance("decoupled", decoupled, bool, "True or False")
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
        if self.parallel is not None and not self.window.rows.share:  # else one sum for all
            # sums on a GPU differ from one to the next in their last bits
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
        instance("the state dict", state_dict, Mapping, "what state_dict() returned")
        groups = state_dict.get("param_groups", [])
        own = next((group["preconditioner"] for group in groups if "preconditioner" in group), None)
        if own is None:
            raise ValueError(
                f"this state dict was not saved by {name}: it has no entry 'preconditioner'; a plain optimizer's is"
                " loaded by optimizer.base.load_state_dict"
            )
        if missing := [key for key in _KEPT if key not in own]:
            raise ValueError(f"this state dict is not whole: its entry 'preconditioner' has no {missing[0]!r}")
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
        sharded: spread the ring over all processes of a `DistributedDataParallel` model (see `Preconditioned`).

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
        sharded: bool = False,
    ) -> None:
        super().__init__(model, base, Dense(sharded), Inverse(damping, divisor), gradients, decay, decoupled, dtype)


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
        sharded: spread the ring over all processes of a `DistributedDataParallel` model (see `Preconditioned`).

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
        sharded: bool = False,
    ) -> None:
        super().__init__(model, base, Dense(sharded), Root(damping), gradients, decay, decoupled, dtype)


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


def _everywhere(model: nn.Module) -> bool:
    """Tell whether every process of torch.distributed has a replica of the model."""
    return isinstance(model, DistributedDataParallel) and (
        model.process_group.size() == torch.distributed.get_world_size()
    )


def _check_decay(decay: Any, decoupled: bool) -> None:
    number("decay", decay, 0, math.nextafter(1, 0) if decoupled else math.inf)
