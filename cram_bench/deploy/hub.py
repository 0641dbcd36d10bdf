"""Folders as hubs of models take them: weights, what builds their network, a card, and the table that it is of."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from cram_bench import __version__, models, untrusted
from cram_bench._defaults import usual_defaults
from cram_bench.checks import columns, instance, integer, one_line
from cram_bench.data import Dataset, is_folder
from cram_bench.deploy.structure import FILE, described, parsed, shrink
from cram_bench.files import check_writable, sync_folder, write, write_tensors

_SIZES = {"num_classes": 100_000, "channels": 64, "image_size": 1024}  # at most: a network is built of them unseen
_STATES = {"accuracy": "{:.2%}", "ms": "{:.2f}", "bytes": "{:,.0f}"}


def write_hub(
    model: nn.Module,
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    data: Dataset,
    table: pd.DataFrame,
    structure: Mapping[str, Iterable[int]] | None = None,
) -> Path:
    """Write ``model.safetensors``, ``config.json``, ``results.csv``, ``README.md``, and ``structure.json`` of a shrunk
    network.

    All numbers in the card, README.md, are those of `table` or of the settings; who wants others changes
    these. An image folder is called by its name alone.

    Args:
        model: a trained network.
        folder: to write, whole or not at all; must not be there.
        settings: of the experiment that trained it, as `cram_bench.experiment.Experiment.settings` returns them.
        data: what it was trained or tested on: classes and the form of an input.
        table: a row per state of the network, such as dense and pruned: ``state``, ``accuracy`` (a fraction) and what
            else is known, such as bytes, ms, batch and threads.
        structure: of a network that `shrink` returned, what it was given.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is there, the table has no state, or the network has not these units.
        OSError: it cannot be written.
    """
    columns(table, "state", "accuracy")
    instance("settings", settings, Mapping, "the settings of an experiment")
    target = check_writable(folder, "folder")
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: name a new folder")
    settings = dict(settings)
    if is_folder(settings["dataset"]):
        settings["dataset"] = Path(settings["dataset"]).name
    config = {
        "library": "cram_bench",
        "version": __version__,
        "model": settings["model"],
        "num_classes": data.num_classes,
        "channels": data.channels,
        "image_size": data.image_size,
        "classes": list(data.classes),
        "settings": settings,
    }
    text = None if structure is None else described(model, structure)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(3)}.part"
    part.mkdir()
    try:
        if text is not None:
            write(part / FILE, text)
        write_tensors(part / "model.safetensors", models.storable(model), {"format": "pt"})
        write(part / "config.json", json.dumps(config, indent=2) + "\n")
        write(part / "results.csv", table.to_csv(index=False))
        write(part / "README.md", card(config, table, shrunk=structure is not None))
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(target.parent)
    return target


def card(config: Mapping[str, Any], table: pd.DataFrame, shrunk: bool = False) -> str:
    """Return a model card: what the network is, how it was trained, what was measured, how it is loaded.

    Args:
        config: as `write_hub` writes it.
        table: likewise.
        shrunk: whether the network is smaller than its name says.
    """
    settings = config["settings"]
    dataset, model = _plain(settings["dataset"]), _plain(config["model"])
    text = "sentences" if models.is_encoder(config["model"]) else "images"
    head = [
        "---",
        f"library_name: {config['library']}",
        f"pipeline_tag: {'text-classification' if text == 'sentences' else 'image-classification'}",
        "tags: [pruning, sparsity]",
        "---",
    ]
    rows = table.copy().astype(object)
    for name, form in _STATES.items():
        if name in rows:
            rows[name] = [form.format(value) if pd.notna(value) else "" for value in table[name]]
    names = [_plain(name) for name in rows.columns]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_plain(_number(value)) for value in row)} |" for row in rows.itertuples(index=False)]
    small = "\nIt is physically smaller than a network of that name: `structure.json` says which units are left.\n"
    return "\n".join(
        [
            *head,
            f"# {model}, {_plain(settings['method'])}, {dataset}",
            "",
            f"A classifier of {text} with {config['num_classes']} classes "
            f"({', '.join(_plain(name) for name in config['classes'][:20])}"
            f"{', …' if len(config['classes']) > 20 else ''}), trained on {dataset} for {settings['epochs']} epochs, "
            f"seed {settings['seed']}. All settings are in `config.json`.",
            small if shrunk else "",
            "Measured on the test set; `results.csv` has the same numbers.",
            "",
            *lines,
            "",
            "```python",
            "import cram_bench as cb",
            "",
            'model = cb.deploy.from_hub("FOLDER")',
            "```",
            "",
        ]
    )


def from_hub(folder: str | os.PathLike[str]) -> nn.Module:
    """Return the network of a folder of `write_hub`, in eval mode; its structure is read before its weights.

    Raises:
        ValueError: a file is damaged or does not fit the others; the message names it.
        OSError: one is missing, or larger than was meant.
    """
    folder = Path(folder)
    file = folder / "config.json"
    content = untrusted.contents(file, untrusted.NOTE)
    try:
        config = json.loads(content)
        name, sizes = config["model"], [integer(key, config[key], 1, most) for key, most in _SIZES.items()]
        with torch.random.fork_rng(), usual_defaults():
            model = models.create(name, *sizes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{file} describes no network: {reason}") from error
    if os.path.lexists(folder / FILE):
        content = untrusted.contents(folder / FILE, untrusted.NOTE)
        try:
            model = shrink(model, parsed(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / FILE} does not fit {name}: {one_line(error)}") from error
    models.load_(model, folder / "model.safetensors", kind=name)
    return model.to(memory_format=torch.channels_last).eval()


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _plain(value: Any) -> str:
    """Return a text that Markdown and HTML show as it is, on one line."""
    text = untrusted.printable(" ".join(str(value).split()))
    return re.sub(r"([\\`*_{}\[\]<>()#|!~&])", r"\\\1", text)
