"""What `make lab` opens: copies of the notebooks, fresh where nobody has changed them."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def lab():
    spec = importlib.util.spec_from_file_location("lab", ROOT / "scripts" / "lab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "notebooks").mkdir()
    write(tmp_path / "notebooks" / "a.ipynb", "1 + 1")
    write(tmp_path / "notebooks" / "b.ipynb", "2 + 2")
    return tmp_path / "notebooks", tmp_path / "lab"


def write(path, source, outputs=()):
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [source], "outputs": list(outputs)}]}))


def text(path):
    return "".join(json.loads(path.read_text())["cells"][0]["source"])


def test_a_run_copy_is_kept_with_its_outputs_until_its_notebook_changes(lab, folders):
    notebooks, copies = folders
    assert lab.refresh(notebooks, copies) == []
    assert (copies / "a.ipynb").read_bytes() == (notebooks / "a.ipynb").read_bytes()
    write(copies / "a.ipynb", "1 + 1", ["2"])
    assert lab.refresh(notebooks, copies) == []
    assert '"outputs": ["2"]' in (copies / "a.ipynb").read_text()
    write(notebooks / "a.ipynb", "1 + 2")
    assert lab.refresh(notebooks, copies) == []
    assert text(copies / "a.ipynb") == "1 + 2"


def test_what_its_reader_changed_stays_and_is_named(lab, folders):
    notebooks, copies = folders
    lab.refresh(notebooks, copies)
    write(copies / "a.ipynb", "my own")
    assert lab.refresh(notebooks, copies) == []  # there is nothing newer
    write(notebooks / "a.ipynb", "1 + 3")
    write(notebooks / "b.ipynb", "2 + 3")
    assert lab.refresh(notebooks, copies) == lab.refresh(notebooks, copies) == ["a.ipynb"]
    assert text(copies / "a.ipynb") == "my own"
    assert text(copies / "b.ipynb") == "2 + 3"
    (copies / "a.ipynb").unlink()
    assert lab.refresh(notebooks, copies) == []
    assert text(copies / "a.ipynb") == "1 + 3"


@pytest.mark.parametrize("content", [b"", b"half {", b"[]", b'{"cells": [1]}', b"\xff\xfe"])
def test_a_copy_that_is_no_notebook_or_of_unknown_origin_stays(lab, folders, content):
    notebooks, copies = folders
    copies.mkdir()
    (copies / "a.ipynb").write_bytes(content)
    assert lab.refresh(notebooks, copies) == ["a.ipynb"]
    assert (copies / "a.ipynb").read_bytes() == content


def test_nothing_in_git_is_written_and_jupyter_is_allowed_to_run_as_root(lab, folders):
    _, copies = folders
    assert "--allow-root" in lab.command(copies, True, [])
    assert "--allow-root" not in lab.command(copies, False, [])
    assert lab.command(copies, True, ["--port=1"])[-1] == "--port=1"
    assert str(copies) in lab.command(copies, True, [])
    assert re.search(r"^/lab/$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    assert re.search(r"^lab: install\n\t\S+ scripts/lab.py \$\(FLAGS\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert os.path.exists(ROOT / "notebooks" / "explore.ipynb")
