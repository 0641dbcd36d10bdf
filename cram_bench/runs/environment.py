"""What runs here: commit, versions, device, platform and command."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe what runs here: commit, versions, device, platform and command."""
    import torchvision

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "device": f"{name}, {os.cpu_count()} cores" if device == "cpu" else name,
        "device_type": device.partition(":")[0],
        "platform": platform.platform(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def commit() -> str:
    """Return the commit of this package's checkout, ``+changes`` when its code differs, or ``unknown``.

    Another project's repository that the package was installed in, or copied into, is not asked.
    """
    folder = Path(__file__).resolve().parents[1]
    try:
        top = _git(folder, "rev-parse", "--show-toplevel").strip()
        if not os.path.samefile(top, folder.parent) or not _is_ours(folder.parent / "pyproject.toml"):
            return "unknown"
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # and not one that git was told to ignore
        head = _git(folder, "rev-parse", "--short=12", "HEAD").strip()
        changed = _git(folder, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed.strip() else "")


def _git(folder: Path, *arguments: str) -> str:
    """Ask git about a folder, whatever repository the environment names: a hook of git sets GIT_DIR."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    call = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        call, capture_output=True, encoding="utf-8", errors="replace", check=True, env=environment
    ).stdout


def _is_ours(project: Path) -> bool:
    with open(project, "rb") as file, contextlib.suppress(tomllib.TOMLDecodeError):
        return tomllib.load(file).get("project", {}).get("name") == "cram-bench"
    return False


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
