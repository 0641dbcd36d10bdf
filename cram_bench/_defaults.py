"""torch's own defaults for a block: what the same settings and seed give must not follow from the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Make new tensors on the CPU and in float32, whatever `torch.set_default_device` and `set_default_dtype` said.

    >>> torch.set_default_dtype(torch.float64)
    >>> with usual_defaults():
    ...     torch.zeros(1).dtype
    torch.float32
    >>> torch.zeros(1).dtype
    torch.float64
    >>> torch.set_default_dtype(torch.float32)
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    # every call of torch goes through such a device, so there is one only where it changes something
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        with torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)
