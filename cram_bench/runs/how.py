"""How a training runs. Nothing of it is in an experiment's id; what was used stands in the run's environment.json."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from cram_bench.checks import instance, integer
from cram_bench.data import Dataset
from cram_bench.distributed import Group
from cram_bench.experiment import Experiment


def has_bfloat16() -> bool:
    """Return whether this CPU multiplies matrices of bfloat16 itself; where it cannot, torch does it value by value."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class Machine:
    """Where to train and with what, where not the usual.

    Args:
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.
        threads: of torch on the CPU; by default one for tiny images, where more only wait for each other.
        compile: use torch.compile; by default where the training is long enough to repay the minute it takes.
        workers: processes that decode streamed images, by default a CPU each, and eight at most.
        sparse: where a training holds masks, and in CrAM's pass at compressed weights, whose gradient is needed at
            nonzeros only, let the layers compute at those that are faster so (`cram_bench.deploy.swap_`), on the CPU,
            in float32, in one process. Which these are, is timed when it starts or goes on.

    Raises:
        ValueError: the device is not here, there is no thread, or the workers are fewer than none.
        TypeError: a number is no integer, or `compile` or `sparse` no bool.

    >>> Machine(device="gpu")
    Traceback (most recent call last):
    ValueError: device must be cpu, which are here, not 'gpu'
    """

    device: str | None = None
    threads: int | None = None
    compile: bool | None = None
    workers: int | None = None
    sparse: bool = False

    def __post_init__(self) -> None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        allowed = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
        if self.device is not None and self.device not in allowed:
            raise ValueError(f"device must be {' or '.join(allowed)}, which are here, not {self.device!r}")
        object.__setattr__(self, "device", self.device or allowed[min(1, gpus)])
        if self.threads is not None:
            integer("threads", self.threads, 1)
        if self.workers is not None:
            integer("workers", self.workers, 0)
        instance("compile", self.compile, (bool, type(None)), "True, False or None")
        instance("sparse", self.sparse, bool, "True or False")
        if self.sparse and self.compile:
            raise ValueError("sparse and compile exclude each other: what torch compiles is dense; leave one out")

    @property
    def place(self) -> str:
        """The device, asked for or found."""
        return str(self.device)

    def joined(self, group: Group) -> Machine:
        """Return what the processes of a group use: each its own device, and none compiles."""
        if group.world == 1:
            return self
        if self.compile:
            raise ValueError(f"compile is for one process, not for {group.world}; leave it out")
        if self.sparse:
            raise ValueError(f"sparse is for one process, not for {group.world}; leave it out")
        return replace(self, device=group.device or self.device, compile=False)

    def suited(self, experiment: Experiment, train: Dataset) -> Machine:
        """Return what is used where nothing was asked, for a training on these data."""
        long = train.steady and experiment.epochs * len(train) >= 200_000 and not self.sparse
        return replace(
            self,
            compile=long if self.compile is None else self.compile,
            threads=1 if self.threads is None and train.tiny else self.threads,
        )

    def warn_of(self, experiment: Experiment) -> None:
        """Warn where the precision asked for is one that this processor has no instructions for."""
        if experiment.precision == "bfloat16" and self.place == "cpu" and not has_bfloat16():
            warnings.warn(
                "this processor has no instructions for bfloat16, and takes some ten times as long as in float32: "
                "train on another machine, or in float32, which is another run: -s precision float32, of a report -p",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def limits(self) -> Iterator[int]:
        """Set torch's threads for a block, and yield how many there are."""
        before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            yield torch.get_num_threads()
        finally:
            torch.set_num_threads(before)
