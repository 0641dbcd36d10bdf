"""Where the nonzeros of a weight are, and the products with them: what linear layers and convolutions share."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_int64
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cram_bench.deploy.kernel import Geometry, Kernel, compiled
from cram_bench.deploy.memory import memory

_CACHE = 300 * 1024
"""Bytes of a block of images; with the outputs of as many it stays in a core's second cache."""
_MOST = 0.4
"""Of so many weights that are not zero the dense layer is faster, whatever the layer."""
WORK = 2_000_000
"""Multiplications that repay a thread, which takes some microseconds to start."""


@dataclass(frozen=True)
class Shape:
    """What a layer does with its inputs, apart from its weights. A linear layer is a kernel of one tap.

    Args:
        rows: outputs.
        inputs: inputs of a group.
        groups: of a convolution.
        kernel, stride, dilation: each (vertical, horizontal).
        padding: zeros above, below, on the left, on the right.
        linear: samples, not pixels, are what stands in a row.
    """

    rows: int
    inputs: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    linear: bool = False

    @property
    def channels(self) -> int:
        """Inputs of all groups."""
        return self.inputs * self.groups

    def reach(self, axis: int) -> int:
        """How many pixels a kernel spans along an axis, less one."""
        return self.dilation[axis] * (self.kernel[axis] - 1)

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of what comes of an image; below 1 where it is smaller than the kernel."""
        top, bottom, left, right = self.padding
        free = height + top + bottom - self.reach(0), width + left + right - self.reach(1)
        return (free[0] - 1) // self.stride[0] + 1, (free[1] - 1) // self.stride[1] + 1

    def phases(self) -> list[tuple[int, int]]:
        """Return which pixels of every stride × stride a nonzero can meet: (vertical, horizontal), in order."""
        return sorted(
            {
                (y * self.dilation[0] % self.stride[0], x * self.dilation[1] % self.stride[1])
                for y in range(self.kernel[0])
                for x in range(self.kernel[1])
            }
        )


class Plan:
    """How the planes of a shape lie in memory for inputs of one size; see `kernel.c`."""

    def __init__(self, shape: Shape, batch: int, height: int, width: int, threads: int, lanes: int) -> None:
        phases = shape.phases()
        self.phases = len(phases)
        out_height, out_width = shape.outputs(height, width)
        (sy, sx), (top, bottom, left, right) = shape.stride, shape.padding
        down, across = shape.reach(0) // sy, shape.reach(1) // sx  # shifts of the last tap
        lines = height + top + bottom - min(top, bottom, down) if sy == 1 else ceil((height + top + bottom) / sy)
        line = width + left + right - min(left, right, across) if sx == 1 else ceil((width + left + right) / sx)
        shift = down * line + across
        planes, rows = shape.channels * len(phases), shape.rows

        def block(channels: int) -> int:
            """Return how many images (or samples) are computed at once: blocks are as equal as can be."""
            if shape.linear:
                most = max(lanes, min(128, 2 * _CACHE // (4 * channels) // lanes * lanes))
                return _up(ceil(batch / ceil(batch / most)), lanes)
            most = max(1, min(batch, _CACHE // (4 * channels * lines * line)))
            return ceil(batch / ceil(batch / most))

        def floats(images: int, rows: int) -> int:
            return images if shape.linear else ((images - 1) * lines + rows) * line

        images, back_images = block(planes), block(rows)
        vectors = ceil(floats(images, out_height) / lanes)
        back_vectors = ceil(floats(back_images, lines) / lanes)
        lead = _up(shift, lanes)
        reach = max(back_vectors, ceil(floats(back_images, out_height) / lanes)) * lanes
        self.geometry = Geometry(
            linear=shape.linear, batch=batch, rows=rows, planes=planes, height=height, width=width,
            out_height=out_height, out_width=out_width, stride_y=sy, stride_x=sx, top=top, left=left, line=line,
            lines=lines, phases=len(phases), images=images,
            plane=_apart(_up(max(vectors * lanes + shift, floats(images, lines)), lanes), lanes),
            vectors=vectors, back_images=back_images, lead=lead, back_plane=_apart(lead + reach, lanes),
            back_vectors=back_vectors,
            bundle=16 if shape.linear else rows, back_bundle=16 if shape.linear else planes, threads=threads,
        )  # fmt: skip
        self.fits = max(planes * self.geometry.plane, rows * self.geometry.back_plane) < 2**31  # offsets are int32
        self.phase_y = torch.tensor([phase[0] for phase in phases], dtype=torch.int32)
        self.phase_x = torch.tensor([phase[1] for phase in phases], dtype=torch.int32)
        taps = [
            (y * shape.dilation[0], x * shape.dilation[1])
            for y in range(shape.kernel[0])
            for x in range(shape.kernel[1])
        ]
        self.tap_phase = torch.tensor([phases.index((y % sy, x % sx)) for y, x in taps], dtype=torch.int32)
        self.tap_shift = torch.tensor([y // sy * line + x // sx for y, x in taps], dtype=torch.int32)
        self.unread = len(phases) < sy * sx  # pixels that no tap meets


def _up(count: int, step: int) -> int:
    return ceil(count / step) * step


def _apart(floats: int, lanes: int) -> int:
    """Keep planes off multiples of 4 KiB, which would all fall on the same lines of the first cache."""
    return floats + (lanes if floats % 1024 < lanes else 0)


class Nonzeros:
    """Where the nonzeros of one weight are, for inputs of one size."""

    def __init__(self, kernel: Kernel, shape: Shape, plan: Plan, weight: Tensor, count: int) -> None:
        self.kernel, self.plan, self.count = kernel, plan, count
        self.row_pointers, self.column_pointers = (
            _indices(count + 1) for count in (plan.geometry.rows, plan.geometry.planes)
        )
        self.places, self.row_offsets, self.column_offsets, self.turned = (_indices(self.count) for _ in range(4))
        kernel.find_nonzeros(
            byref(plan.geometry), weight.data_ptr(), shape.inputs, shape.groups, len(plan.tap_phase),
            *addresses(plan.tap_phase, plan.tap_shift, self.row_pointers, self.places, self.row_offsets,
                 self.column_pointers, self.column_offsets, self.turned),
        )  # fmt: skip

    def values(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the nonzeros by rows and by columns, or None where they are no longer those that were found."""
        by_rows, by_columns, zeros = _floats(self.count), _floats(self.count), c_int64()
        elsewhere = self.kernel.read_values(
            weight.data_ptr(), weight.numel(), len(weight),
            *addresses(self.row_pointers, self.places, self.turned, by_rows, by_columns), byref(zeros),
        )  # fmt: skip
        return None if elsewhere or zeros.value else (by_rows, by_columns)

    def forward(self, by_rows: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return Y for inputs of the size of the plan."""
        g = self.plan.geometry
        size = (g.batch, g.rows) if g.linear else (g.batch, g.rows, g.out_height, g.out_width)
        y = memory().empty(*size)
        _done(
            self.kernel.forward(
                byref(g), *addresses(self.plan.phase_y, self.plan.phase_x, self.row_pointers, self.row_offsets, by_rows,
                               bias, x, y)
            )
        )  # fmt: skip
        return y

    def backward(
        self, by_columns: Tensor, x: Tensor, dy: Tensor, weight: Tensor, want: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return dX and dW, zero where the weight is; each where it is wanted."""
        dx = memory().empty(*x.shape) if want[0] else None
        if dx is not None and self.plan.unread:
            dx.zero_()
        dv = torch.zeros(self.count, dtype=torch.float32, device="cpu") if want[1] else None
        if any(want):
            _done(
                self.kernel.backward(
                    byref(self.plan.geometry),
                    *addresses(self.plan.phase_y, self.plan.phase_x, self.column_pointers, self.column_offsets,
                               by_columns, x, dy, dx, dv),
                )
            )  # fmt: skip
        if dv is None:
            return dx, None
        dw = memory().empty(*weight.shape)
        self.kernel.write_gradient(
            dw.data_ptr(), dw.numel(), len(dw), *addresses(self.row_pointers, self.places, self.turned, dv)
        )
        return dx, dw


def _indices(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device="cpu")


def _floats(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device="cpu")


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Return where tensors lie in memory, for a call of the kernel."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("a sparse layer found no memory for its planes")


Dense = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, weight, bias) → what the dense layer computes."""
_Found = tuple[Nonzeros, Tensor, Tensor]
"""Nonzeros, and their values by rows and by columns."""


class Products:
    """What a layer computes with its nonzeros. Where they are is found anew whenever it changed.

    Args:
        shape: of the layer.
        dense: the same computation with all weights, by functions of torch, differentiable as often as one likes.
    """

    _KEPT = 4  # sizes of inputs: a batch, the last one of an epoch, and as much for evaluation

    def __init__(self, shape: Shape, dense: Dense) -> None:
        self.shape, self.dense = shape, dense
        self._known: dict[tuple[int, ...], Nonzeros] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's outputs. Their gradient is that of the dense layer, with zeros where a weight is zero.

        In float32 on the CPU the kernel computes, under autocast too; without a compiler a linear layer does with
        ``torch.nn.functional.embedding_bag``. All else, what torch compiles or transforms, and weights of which fewer
        than 60 % are zero, the dense layer computes.
        """
        if torch.is_autocast_enabled("cpu") and x.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return self(x.float(), weight, bias)
        if not plain(x, weight, bias) or not x.numel() or not weight.numel() or not self._fits(x):
            return self._masked(x, weight, bias)
        flat = x.reshape(-1, self.shape.channels) if self.shape.linear else x if x.ndim == 4 else x[None]
        kernel = compiled()
        found = None if kernel is None else self._found_in(weight.detach().contiguous(), flat, kernel)
        bag = kernel is None and self.shape.linear and int(weight.count_nonzero()) <= _MOST * weight.numel()
        if found is None and not bag:
            return self._masked(x, weight, bias)
        y = _Product.apply(flat.contiguous(), weight, bias, self, found)
        return y.view(*x.shape[:-1], -1) if self.shape.linear else y if x.ndim == 4 else y[0]

    def _masked(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.dense(x, weight * (weight != 0), bias)

    def _fits(self, x: Tensor) -> bool:
        """Tell whether the dense layer takes inputs of this shape; what it does not, it refuses in its words."""
        if self.shape.linear:
            return x.ndim >= 1 and x.shape[-1] == self.shape.channels
        return x.ndim in (3, 4) and x.shape[-3] == self.shape.channels and min(self.shape.outputs(*x.shape[-2:])) >= 1

    def _found_in(self, weight: Tensor, x: Tensor, kernel: Kernel) -> _Found | None:
        """Return a weight's nonzeros for such inputs, and their values; None where the dense layer computes."""
        height, width = (1, 1) if self.shape.linear else x.shape[-2:]
        available = torch.get_num_threads()
        key = (len(x), height, width, available)
        known = self._known.get(key)
        values = None if known is None else known.values(weight)
        if known is None or values is None:
            count = kernel.count_nonzeros(weight.data_ptr(), weight.numel())
            if count > _MOST * weight.numel():  # in CrAM's first pass, say: what was found for its second is kept
                return None
            rows, columns = self.shape.outputs(height, width)
            threads = max(1, min(available, count * len(x) * rows * columns // WORK))
            plan = Plan(self.shape, len(x), height, width, threads, kernel.lanes)
            if not plan.fits:
                return None
            known = Nonzeros(kernel, self.shape, plan, weight, count)
            values = known.values(weight)
            if values is None:  # another thread changes the weight meanwhile
                return None
        self._known.pop(key, None)
        while len(self._known) >= self._KEPT:
            self._known.pop(next(iter(self._known)))
        self._known[key] = known
        return known, *values


def plain(*tensors: Tensor | None) -> bool:
    """Tell whether all are float32 in this process's memory, as they stand there."""
    if torch.compiler.is_compiling():
        return False
    return all(
        t is None
        or (
            t.dtype is torch.float32
            and t.device.type == "cpu"
            and t.layout is torch.strided
            and type(t) in (Tensor, torch.nn.Parameter)
            and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        )
        for t in tensors
    )


class _Product(torch.autograd.Function):
    """y of a layer, and its gradients at nonzeros; a second derivative goes through the dense layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, products: Products, found: _Found | None
    ) -> Tensor:
        ctx.products = products
        ctx.save_for_backward(x, weight, bias)
        if found is None:
            ctx.back, y = _bag(x, weight.detach().contiguous(), ctx.needs_input_grad[:2])
            return y if bias is None else y + bias
        nonzeros, by_rows, by_columns = found
        wanted = ctx.needs_input_grad[:2]
        ctx.back = lambda dy: nonzeros.backward(by_columns, x, dy, weight, wanted)
        return nonzeros.forward(by_rows, x, None if bias is None else bias.contiguous())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            asked = [t for t, want in zip((x, weight, bias), wanted, strict=True) if want]
            y = ctx.products._masked(x, weight, bias)
            found = iter(torch.autograd.grad(y, asked, dy, create_graph=True))
            return (*(next(found) if want else None for want in wanted), None, None)
        dy = dy.contiguous()
        db = dy.sum(0 if dy.ndim == 2 else (0, 2, 3)) if wanted[2] else None
        return *ctx.back(dy), db, None, None


def _bag(x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Callable[[Tensor], Any], Tensor]:
    """Return a function of dY that gives dX and dW, and Y: a bag of inputs, summed with weights, for every output."""
    mask = weight != 0
    rows, columns = mask.nonzero(as_tuple=True)
    starts = F.pad(mask.sum(1).cumsum(0), (1, 0))[:-1]
    with torch.enable_grad():
        turned = x.t().contiguous().requires_grad_(wanted[0])
        values = weight[rows, columns].requires_grad_(wanted[1])
        y = F.embedding_bag(columns, turned, starts, mode="sum", per_sample_weights=values)

    def back(dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        asked = [t for t, want in zip((turned, values), wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, asked, dy.t(), retain_graph=True) if asked else ())
        dx = next(found).t() if wanted[0] else None
        dw = torch.zeros_like(weight).index_put_((rows, columns), next(found)) if wanted[1] else None
        return dx, dw

    return back, y.detach().t()
