import html
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


HOSTILE = """<img src=x onerror="hit=1">'"`${hit=1}</script><script>hit=1</script><!--<svg onload=hit=1>"""
"""A text that would run a script, wherever it became markup, an attribute or the end of a script."""


@pytest.fixture
def hostile(tmp_path):
    """Return a text, and the folder of a report in which it is every text that can be another's, with its pages."""
    import nbformat
    import pandas as pd

    from cram_bench.report import page, pages

    folder = tmp_path / "reports" / HOSTILE.replace("/", "")
    for part in ("tables", "figures"):
        (folder / part).mkdir(parents=True)
    rows = [(method, pattern, level, flag) for method in (HOSTILE, "sgd") for level in (0.0, 0.9)
            for pattern in ("global", HOSTILE, f"{HOSTILE}+int8") for flag in (False, True)]  # fmt: skip
    curves = pd.DataFrame(rows, columns=["method", "pattern", "sparsity", "calibrated"]).assign(seed=0, accuracy=0.5)
    verdict = {"verdict": HOSTILE, "p": 0.5, "raw_p": 0.5}
    tables = {
        "accuracy_vs_sparsity": curves,
        "accuracy_summary": pd.DataFrame({"accuracy, %": [HOSTILE], HOSTILE: [HOSTILE]}),
        "verdicts_summary": pd.DataFrame({HOSTILE: [HOSTILE]}),
        "verdicts": pd.DataFrame([verdict]),
        "runs": pd.DataFrame({"method": [HOSTILE, "sgd"], "seed": 0, "epochs": 1}),
    }
    for name, table in tables.items():
        table.to_csv(folder / "tables" / f"{name}.csv", index=False)
    title = f"<dc:title>{html.escape(HOSTILE)}</dc:title>"
    picture = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="a" width="9" height="9">{title}</svg>'
    for name in ("accuracy_vs_sparsity", folder.name):
        (folder / "figures" / f"{name}.svg").write_text(picture)
    settings = {"dataset": HOSTILE, "model": HOSTILE, "epochs": 1, "seed": 0, "precision": HOSTILE, "method": HOSTILE}
    run = {
        "settings": settings | {"compressors": [HOSTILE]},
        "device": HOSTILE,
        "commit": HOSTILE,
        "threads": 1,
        "seconds": 1,
    }
    machine = {"command": HOSTILE, "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    facts = pages.facts([run], HOSTILE, machine, HOSTILE) | {HOSTILE: HOSTILE}
    questions = ["accuracy_vs_sparsity", folder.name]
    error = ["\x1b[31m" + HOSTILE, HOSTILE]
    table = pd.DataFrame({HOSTILE: [HOSTILE]}, index=[HOSTILE])
    shown = {"text/html": table.to_html(), "text/plain": HOSTILE}
    cell = nbformat.v4.new_code_cell(
        f"title = {HOSTILE!r}",
        outputs=[
            nbformat.v4.new_output("stream", name="stderr", text=HOSTILE),
            nbformat.v4.new_output("display_data", data=shown),
            nbformat.v4.new_output("display_data", data={"text/plain": HOSTILE}),
            nbformat.v4.new_output("error", ename=HOSTILE, evalue=HOSTILE, traceback=error),
        ],
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / f"{questions[1]}.ipynb")
    page.export(folder / f"{questions[1]}.ipynb")
    pages.index(folder, questions, [run], {HOSTILE: HOSTILE}, facts, HOSTILE, HOSTILE, HOSTILE)
    about = {"title": "accuracy vs sparsity", "question": HOSTILE, "facts": facts}
    (folder / "report.json").write_text(json.dumps(about))
    other = folder.with_name("other")
    (other / "figures").mkdir(parents=True)
    (other / "report.json").write_text(json.dumps({"title": folder.name, "facts": facts}))
    (other / "figures" / f"{folder.name.replace(' ', '_')}.svg").write_text(picture)
    pages.shelf(folder.parent)
    return HOSTILE, folder


@pytest.fixture
def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)).double()


@pytest.fixture
def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (32,), generator=generator)
