"""`cram-bench explore`: check what is named, write it down as a notebook, and let Voilà show that as a page."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
PORTS = range(8866, 8966)


def run_explore(arguments: argparse.Namespace) -> int:
    """Open the explorer in a browser; it ends with Ctrl-C."""
    from cram_bench.checks import integer, needs
    from cram_bench.cli.terminal import say
    from cram_bench.data import cache_root
    from cram_bench.files import write
    from cram_bench.progress import working

    needs("explorers", "lab", "voila", "ipywidgets", "anywidget", "altair", "vl_convert")
    integer("--sample", arguments.sample, 1)
    integer("--calibration", arguments.calibration, 2)
    port = free(arguments.port)
    options = named(arguments)
    with working("opening"):
        _check(options)
    folder = cache_root() / "explore"
    folder.mkdir(parents=True, exist_ok=True)
    content = notebook(options)
    path = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.ipynb"
    write(path, content)
    token = secrets.token_urlsafe(24)
    say(f"http://{HOST}:{port}/?token={token} (Ctrl-C ends it)")
    words, settings = command(path, port, arguments.browser, token), environment(os.environ, options["store"])
    if os.name != "posix":
        return subprocess.call(words, env=settings)
    sys.stdout.flush()
    os.execve(words[0], words, settings)  # Ctrl-C is Voilà's
    return 0


def named(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `cram_bench.widgets.opening.opened` is given: paths are whole, for the page stands elsewhere."""
    from cram_bench.cli.commands import _pairs
    from cram_bench.data import is_folder
    from cram_bench.runs import Store

    def whole(text: str) -> str:
        return str(Path(text).expanduser().absolute())

    model, data = arguments.model or "", arguments.data or ""
    if model.startswith("hub:") and Path(model.removeprefix("hub:")).expanduser().is_dir():
        model = f"hub:{whole(model.removeprefix('hub:'))}"
    return {
        "runs": [whole(name) if Path(name).is_dir() else name for name in arguments.run_names],
        "data": whole(data) if data and is_folder(data) and Path(data).expanduser().exists() else data,
        "model": model,
        "weights": whole(arguments.weights) if arguments.weights else "",
        "rename": _pairs("--rename", "OLD=NEW, such as downsample=shortcut", arguments.rename),
        "crop": arguments.crop,
        "sample": arguments.sample,
        "calibration": arguments.calibration,
        "store": str(Store().root),
    }


def _check(options: dict[str, Any]) -> None:
    """Refuse what the page could only refuse later."""
    from cram_bench import data
    from cram_bench.runs import Store
    from cram_bench.widgets import networks, opening

    if options["runs"]:
        if options["model"] or options["weights"]:
            raise ValueError("give runs, or --model with --data, not both")
        networks.of([Store(options["store"]).open(name) for name in options["runs"]], None, 250, options["sample"])
    elif options["model"] or options["weights"]:
        keys = ("model", "data", "weights", "rename", "crop")
        opening.of_model(**{name: options[name] for name in keys})
    elif options["crop"] or options["rename"]:
        raise ValueError("--crop and --rename belong to --model")
    elif data.is_folder(options["data"] or "digits") and not Path(options["data"]).is_dir():
        data.load(options["data"])  # says what is wrong with it


def notebook(options: dict[str, Any]) -> str:
    """Return a notebook of one cell that shows the panel. Texts are written as Python's literals, and run nothing."""
    given = ", ".join(f"{name}={value!r}" for name, value in options.items() if value not in ("", [], {}, 0))
    source = f"from cram_bench.widgets.opening import opened\n\npanel = opened({given})\npanel"
    cell: dict[str, Any] = {
        "cell_type": "code",
        "execution_count": None,
        "id": "panel",
        "metadata": {},
        "outputs": [],
        "source": source,
    }
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": [cell],
        "metadata": {"kernelspec": kernel, "title": "cram-bench explore"},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1)


def command(path: Path, port: int, browser: bool, token: str) -> list[str]:
    """Return the command that serves a notebook as a page, to nobody but who has the token."""
    return [
        sys.executable, "-m", "voila", str(path), f"--port={port}", f"--Voila.ip={HOST}", "--Voila.port_retries=0",
        f"--Voila.token={token}", f"--Voila.open_browser={browser}", "--template=cram-bench",
        "--Voila.log_level=ERROR", "--MappingKernelManager.cull_idle_timeout=120",
        "--MappingKernelManager.cull_interval=30",
    ]  # fmt: skip


def environment(known: Any, store: str) -> dict[str, str]:
    """Return the environment of the server and its kernels, which finds the page's template and the same store."""
    page = str(resources.files("cram_bench.widgets").joinpath("page"))
    paths = [page, *filter(None, [known.get("JUPYTER_PATH")])]
    return {**known, "JUPYTER_PATH": os.pathsep.join(paths), "CRAM_BENCH_RUNS": store}


def free(port: int | None) -> int:
    """Return a port that nobody listens at: this one, or the first of `PORTS`.

    Raises:
        ValueError: it is taken, or is no port.
    """
    from cram_bench.checks import integer

    if port is not None:
        integer("--port", port, 1, 65535)
    for one in PORTS if port is None else (port,):
        with socket.socket() as listener:
            try:
                listener.bind((HOST, one))
            except OSError:
                continue
            return one
    where = f"--port {port} is" if port is not None else f"the ports {PORTS[0]} to {PORTS[-1]} are"
    raise ValueError(f"{where} taken or not allowed: give another with --port")
