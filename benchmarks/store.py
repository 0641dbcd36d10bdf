"""A run store of any size: one finished run, copied under other seeds."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from cram_bench.files import sealed
from cram_bench.recipes import recipe
from cram_bench.runs import Run, Store, ensure


def fabricate(root: str | os.PathLike[str], count: int) -> Store:
    """Return a store of `count` finished runs of one epoch on the digits, of seeds 0 … n − 1; all but the first are
    copies.

    What is there already is left. The copies share the files of the weights and of the history with the first.
    """
    store = Store(root)
    source = ensure(recipe("digits", epochs=1), store, progress=False)
    for seed in range(1, count):
        copy(source, store, seed)
    return store


def copy(source: Run, store: Store, seed: int) -> Path:
    """Copy a finished run under another seed, with everything that vouches for it."""
    experiment = source.experiment.but(seed=seed)
    folder = store.root / experiment.id
    if folder.exists():
        return folder
    folder.mkdir()
    for name in ("model.safetensors", "history.csv"):
        os.link(source.path / name, folder / name)
    settings = json.dumps(experiment.settings(), indent=2)
    (folder / "settings.json").write_text(settings, encoding="utf-8")
    environment = source.environment
    environment["sha256"]["settings.json"] = hashlib.sha256(settings.encode()).hexdigest()
    (folder / "environment.json").write_text(sealed(environment, "environment.json"), encoding="utf-8")
    return folder
