import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn


def pytest_configure() -> None:
    """Listen to Ctrl-C again: a shell starts what runs in its background deaf to it, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Give every test a run store and a cache of its own; ``CRAM_BENCH_DATA`` stays, it is only read."""
    monkeypatch.setenv("CRAM_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def counted():
    """Note how often something was tried, in the file that ``CRAM_BENCH_COUNTS`` names: ``make counts`` sets it."""

    def note(name: str, number: int) -> None:
        if file := os.environ.get("CRAM_BENCH_COUNTS"):
            path = Path(file)
            known = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**known, name: number}, indent=1, sort_keys=True) + "\n")

    return note


@pytest.fixture
def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)).double()


@pytest.fixture
def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (32,), generator=generator)
