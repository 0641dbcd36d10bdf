"""Open JupyterLab on copies of the notebooks, in ``lab/``, which git ignores.

Running, changing and saving a copy leaves the notebook in git as it was. A copy is made anew when its notebook has
changed; one whose cells you have changed stays, and a line says so. Arguments go on to JupyterLab: ``make lab
FLAGS="--no-browser"``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def refresh(notebooks: Path, copies: Path) -> list[str]:
    """Copy the notebooks that are new or have changed, unless their reader changed the copy; return the names of these.

    What a copy was made from is remembered beside the copies, by the text of its cells: outputs are no change.
    """
    copies.mkdir(exist_ok=True)
    memory = copies / ".copied.json"
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    kept = []
    for notebook in sorted(notebooks.glob("*.ipynb")):
        copy, name, now = copies / notebook.name, notebook.name, cells(notebook)
        found = cells(copy) if copy.exists() else None
        if found not in (None, now, known.get(name)):
            if now != known.get(name):
                kept.append(name)
            continue
        if found != now:
            shutil.copyfile(notebook, copy)
        known[name] = now
    part = memory.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1), encoding="utf-8")
    part.replace(memory)
    return kept


def cells(notebook: Path) -> str:
    """Return a hash of the cells' kinds and text; of the whole file where it is no notebook."""
    content = notebook.read_bytes()
    try:
        found = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(content)["cells"]]
    except (ValueError, KeyError, TypeError):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def command(copies: Path, root: bool, flags: list[str]) -> list[str]:
    """Return the command that opens JupyterLab: it refuses to run as `root` unless it is told to."""
    return [sys.executable, "-m", "jupyterlab", str(copies), *(["--allow-root"] if root else []), *flags]


def quiet(copies: Path) -> str:
    """Turn off JupyterLab's question about news and its look for them; return what precedes its settings' folders."""
    settings = copies / ".jupyter" / "labconfig" / "page_config.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(
        json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}), encoding="utf-8"
    )
    return str(settings.parent.parent)


def main() -> None:
    """Make the copies and become JupyterLab."""
    copies = ROOT / "lab"
    for name in refresh(ROOT / "notebooks", copies):
        sys.stderr.write(
            f"lab/{name} has changes of yours and stays; notebooks/{name} is newer: delete the copy to get it\n"
        )
    arguments = command(copies, os.geteuid() == 0, sys.argv[1:])
    path = [quiet(copies), *filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])]
    os.execve(arguments[0], arguments, os.environ | {"JUPYTER_CONFIG_PATH": os.pathsep.join(path)})


if __name__ == "__main__":
    main()
