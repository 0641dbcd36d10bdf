"""What runs here: commit, versions, device, platform and command."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
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

    It is unknown too where the package is installed inside somebody else's repository, whose commits are not its own.
    """
    folder = Path(__file__).parents[1]

    def git(*command: str) -> str:
        options: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "check": True}
        return subprocess.run(["git", "-C", str(folder), *command], **options).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", "__init__.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
