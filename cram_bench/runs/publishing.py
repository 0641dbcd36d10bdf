"""How a finished run gets its name, and how it is copied: whole or not at all, whoever else is at it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from cram_bench.deploy.structure import described
from cram_bench.files import Lock, check_writable, sealed, sha256, sync_folder, write, write_tensors
from cram_bench.models import storable
from cram_bench.runs.store import CONTENT, FILES, STRUCTURE, Run, RunError, finished


def staging(work: Path) -> Path:
    """Make a folder of this process alone in `work`, to write a run into before it gets its name."""
    folder = work / f"finished-{os.getpid()}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder


def publish(staged: Path, final: Path, lock: Lock) -> None:
    """Give the run in `staged`, a folder of `staging`, its name, and remove what its training needed.

    Whoever removes a lock lets two processes train one run. The first to finish publishes it, and what the other
    finishes then is left out, with a warning: one name holds one run. Neither removes what the other still uses.
    """
    alone = lock.held()
    if not alone:
        what = f"{lock.path} was removed while this process trained, so that another one may train the same run"
        warnings.warn(what, stacklevel=4)
    if final.exists() and not finished(final):  # without weights, or it would have been found
        os.rename(final, staged.with_name(f"{staged.name}-without-weights"))
    try:
        os.rename(staged, final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(staged, ignore_errors=True)
        warnings.warn(
            f"another process finished {final} first; its run is kept, and this one's is left out", stacklevel=4
        )
    sync_folder(final.parent)
    if alone:
        shutil.rmtree(staged.parent, ignore_errors=True)


def copy(run: Run, folder: Path) -> Path | None:
    """Copy the files of a finished run to `folder`/ID, whole or not at all; return where, or None with a warning.

    Only files are copied: a link may lead anywhere. A run that lacks one of its own then is left out.

    Raises:
        OSError: `folder` cannot be written.
    """
    target = folder / run.id
    if os.path.realpath(run.path) == os.path.realpath(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{run.id}.{os.getpid()}-{secrets.token_hex(3)}.part"
    part.mkdir()
    try:
        for name in (*CONTENT, STRUCTURE):
            if name != STRUCTURE or name in run.environment["sha256"]:
                write(part / name, _content(run.path / name))
        if os.path.lexists(target):
            shutil.rmtree(target)
        os.rename(part, target)
    except RunError as error:
        warnings.warn(f"not copied: {error}", stacklevel=2)
        return None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(folder)
    return target


def write_shrunk(
    run: Run, small: nn.Module, structure: Mapping[str, Iterable[int]], folder: str | os.PathLike[str]
) -> Run:
    """Write a run as `run` is, but with a physically smaller network: its weights and ``structure.json``.

    Settings and history stay those of the training. The folder is not one of a store, where a name stands for what its
    settings train; `Run.open` and commands that take a run's folder read it.

    Args:
        run: whose network was pruned.
        small: what `cram_bench.deploy.shrink` returned.
        structure: name of a structure of the whole network → the units of it that stay; of a run that was shrunk
            already, the `cram_bench.deploy.composed` structure.
        folder: to write to, whole or not at all; must not be there.

    Raises:
        ValueError: the network has not these units, or the folder is there.
        OSError: it cannot be written.
    """
    text, target = described(small, structure), check_writable(folder, "folder")
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(3)}.part"
    part.mkdir()
    try:
        for name in ("settings.json", "history.csv"):
            write(part / name, _content(run.path / name))
        write(part / STRUCTURE, text)
        write_tensors(part / "model.safetensors", storable(small))
        sums = {name: sha256(part / name) for name in (*FILES, STRUCTURE)}
        write(part / "environment.json", sealed(run.environment | {"sha256": sums}, "environment.json"))
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(target.parent)
    return Run.open(target)


def _content(path: Path) -> bytes:
    """Return the content of a file that is no link."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise RunError(f"{path} {what}") from error
    with open(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise RunError(f"{path} is no file")
        return opened.read()
