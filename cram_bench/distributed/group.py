"""Who the processes of a training are, and what they tell each other."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cram_bench.checks import one_line
from cram_bench.distributed.batchnorm import synchronised

T = TypeVar("T")

_GRACE = 2.0  # seconds that the first process is given to say what failed, before another says it
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Stopped(RuntimeError):
    """Another process of the same training failed and has said why; the one that this is raised in ends too."""


@dataclass(frozen=True)
class Group:
    """The processes of one training, seen from one of them. ``Group()`` is a process alone.

    Attributes:
        rank: the number of this process, from 0.
        world: how many there are.
        backend: ``gloo`` or ``nccl``; empty when alone.
        device: what this process computes on; None leaves the choice to the run.
    """

    rank: int = 0
    world: int = 1
    backend: str = ""
    device: str | None = None
    _store: Any = field(default=None, repr=False)
    _calls: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this process keeps the run store and speaks to the user."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """(rank, world), as `cram_bench.data.Dataset.batches` takes it."""
        return self.rank, self.world

    def check(self, batch_size: int, halves: bool = False) -> None:
        """Refuse a batch that the processes cannot share evenly.

        >>> Group(rank=0, world=3).check(128)
        Traceback (most recent call last):
            ...
        ValueError: batch_size must be a multiple of 3, for 3 processes share every batch evenly, not 128
        """
        parts = self.world * (2 if halves and self.world > 1 else 1)
        if batch_size % parts:
            what = "the halves of every batch" if halves else "every batch"
            raise ValueError(
                f"batch_size must be a multiple of {parts}, for {self.world} processes share {what} evenly, "
                f"not {batch_size}"
            )

    def parallel(self, model: nn.Module, unused: bool = False) -> nn.Module:
        """Return `model` ready to be trained by all processes alike, with the weights of the first; alone, as it is.

        Its BatchNorms see the joined batch. Call it when the model is on its device and in its memory layout.

        Args:
            model: what to train; changed in place.
            unused: whether some parameters take no part in the loss.
        """
        if self.world == 1:
            return model
        device = str(next(model.parameters()).device)
        model = synchronised(model, device)
        ids = [torch.device(device)] if device.startswith("cuda") else None
        return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=unused)

    def sums(self, *values: Tensor | float) -> list[float]:
        """Return each value summed over all processes, in float64; waits for the devices."""
        numbers = [float(value) for value in values]
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.tolist()

    def broadcast(self, function: Callable[[], T]) -> T:
        """Call `function` in the first process alone and return its result in all; it must be ready for JSON.

        The others wait as long as it takes: the first may wait for a lock, or decode a data set.

        Raises:
            Stopped: in the others, when it raises in the first.
        """
        if self.world == 1:
            return function()
        key = f"broadcast/{next(self._calls)}"
        if self.first:
            try:
                value = function()
            except BaseException as error:
                self._store.set(key, json.dumps({"failed": one_line(error)}))
                raise
            self._store.set(key, json.dumps({"value": value}))
            return value
        while not self._store.check([key]):
            if self._store.check(["failed"]):
                raise Stopped("another process failed")
            time.sleep(0.02)
        answer = json.loads(self._store.get(key))
        if "failed" in answer:
            raise Stopped(answer["failed"])
        return answer["value"]

    def wait(self) -> None:
        """Wait until the first process comes here too, however long that takes."""
        self.broadcast(lambda: None)

    def in_order(self, function: Callable[[], T]) -> T:
        """Call `function` in the first process, then in the others, which find what it left in a cache."""
        found: list[T] = []
        self.broadcast(lambda: found.append(function()))
        return found[0] if found else function()

    def describe(self) -> dict[str, Any]:
        """Return what a run notes about its processes."""
        return {"processes": self.world, "backend": self.backend}

    def _speaks(self) -> bool:
        """Tell whether this process says what failed. The first goes first, for most errors are everyone's."""
        try:
            end = time.monotonic() + _GRACE
            while self.rank and time.monotonic() < end and not self._store.check(["failed"]):
                time.sleep(0.05)
            return self._store.compare_set("failed", "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # the store went down with the process that kept it
            return True


def launched() -> bool:
    """Tell whether torchrun, or anything that sets the same variables, started this process as one of several."""
    return all(os.environ.get(name) for name in _VARIABLES) and _number("WORLD_SIZE") > 1


@contextlib.contextmanager
def joined(device: str | None = None, timeout: float = 600.0) -> Iterator[Group]:
    """Join the processes that torchrun started, for a block; alone, where it started none. Once in a process.

    Where one of them fails, all leave the block with an exception: one with the reason, the others with `Stopped`.

    Args:
        device: ``cuda`` (NCCL; torchrun's LOCAL_RANK picks the GPU) or ``cpu`` (gloo); by default GPUs if there are
            any.
        timeout: seconds that a process waits in a step for the others before it takes them for dead.

    Raises:
        ValueError: torchrun's variables or the device make no sense, or there are fewer GPUs than processes here.
        Stopped: another process failed.
        RuntimeError: another process died or hangs.
    """
    if not launched():
        yield Group(device=device)
        return
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda where torchrun shares the devices out, not {device!r}")
    if kind == "cuda":
        local = _number("LOCAL_RANK")
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        kind = f"cuda:{local}"
    backend = "gloo" if kind == "cpu" else "nccl"
    limit = timedelta(seconds=timeout)
    store, rank, world = next(distributed.rendezvous("env://", timeout=limit))
    group = Group(rank, world, backend, kind, store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    try:
        with warnings.catch_warnings():
            if not group.first:
                warnings.simplefilter("ignore")  # the first process warns
            yield group
    except BaseException as error:
        if not group._speaks():
            raise Stopped(f"process {rank} of {world} stopped because another one failed") from error
        if _lost(error):
            raise RuntimeError(
                f"process {rank} of {world} lost another one, which died or hung for {timeout:g} s; "
                "the same command goes on from the last finished epoch"
            ) from error
        if rank and isinstance(error, Exception):
            raise RuntimeError(f"process {rank} of {world} failed: {one_line(error)}") from error
        raise
    else:
        distributed.barrier()  # the first process may keep the store that the others still ask
        distributed.destroy_process_group()
    finally:
        if distributed.is_initialized() and backend == "gloo":  # NCCL would wait for the others
            distributed.destroy_process_group()


def _lost(error: BaseException) -> bool:
    """Tell whether a collective failed, because a process died or did not come."""
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "onnection"))
    )


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}, which torchrun sets, must be a whole number, not {value!r}")
    return int(value)
