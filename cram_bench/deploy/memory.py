"""Memory that sparse layers write into, kept from step to step: fresh pages cost as much as what is computed."""

from __future__ import annotations

import functools
import math
import mmap
import weakref

import torch
from torch import Tensor

_LEAST = 1 << 20
"""Bytes from which on memory is kept; malloc gives back less than that only now and then."""


class Memory:
    """Float32 tensors in memory that was used before.

    A tensor is an ordinary one, whoever holds it. When the last that looks at its memory is gone, the next of that size
    gets it. malloc gives large blocks back to the system at once, which clears every page that is asked for again:
    half the time of a sparse convolution.

    Args:
        most: bytes that are kept unused; what comes back beyond is given back to the system.
    """

    def __init__(self, most: int = 1 << 29) -> None:
        self.most = most
        self._free: dict[int, list[mmap.mmap]] = {}

    @property
    def unused(self) -> int:
        """Bytes that are kept and that no tensor uses."""
        return _bytes(self._free)

    def empty(self, *size: int) -> Tensor:
        """Return a contiguous float32 tensor on the CPU, of whatever was there before."""
        wanted = 4 * math.prod(size)
        if wanted < _LEAST:
            return torch.empty(size, dtype=torch.float32, device="cpu")
        pages = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            block = self._free[pages].pop()
        except (KeyError, IndexError):
            if self.unused + pages > self.most:  # of sizes that are no longer asked for, say
                self.clear()
            block = mmap.mmap(-1, pages, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        lent = memoryview(block)  # a tensor holds it as long as any view of it lives
        weakref.finalize(lent, _give_back, self._free, self.most, block).atexit = False
        return torch.frombuffer(lent, dtype=torch.float32, count=wanted // 4).view(size)

    def clear(self) -> None:
        """Give back to the system what is unused, and later what is lent now."""
        self._free = {}


def _bytes(free: dict[int, list[mmap.mmap]]) -> int:
    return sum(pages * len(blocks) for pages, blocks in list(free.items()))


def _give_back(free: dict[int, list[mmap.mmap]], most: int, block: mmap.mmap) -> None:
    if _bytes(free) + len(block) <= most:
        free.setdefault(len(block), []).append(block)


@functools.cache
def memory() -> Memory:
    """Return the memory of this process's sparse layers; `cram_bench.deploy.dense_` gives it back."""
    return Memory()
