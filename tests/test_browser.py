"""What a reader does, in a headless Chromium: the explorer in JupyterLab and in Voilà, the report with no network.

Skipped by name where there is no Chromium or no playwright; CI installs both.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest

import cram_bench as cb
from cram_bench.data import AT_ONCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
METHODS = ["sgd", "cram+-multi"]

if not CHROMIUM:
    pytest.skip("no Chromium is installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture
def page(tmp_path):
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1400, "height": 1300}
        )
        yield context.new_page()
        context.close()


@pytest.fixture
def notebook(tmp_path):
    """explore.ipynb with parameters that train in a moment."""
    cells = json.loads((ROOT / "notebooks" / "explore.ipynb").read_text())
    for cell in cells["cells"]:
        source = "".join(cell["source"])
        source = re.sub(r"^epochs = 0", "epochs = 2", source, flags=re.MULTILINE)
        cell["source"] = re.sub(r"^methods = .*", f"methods = {METHODS!r}", source, flags=re.MULTILINE)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "explore.ipynb").write_text(json.dumps(cells))
    return folder / "explore.ipynb"


@contextlib.contextmanager
def server(command, port, tmp_path):
    """Run a server until the block ends, and then all that it started."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "HOME": str(tmp_path),
    }
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/?token=T", timeout=5):
                break
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        log.close()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def move_and_compare(page):
    """Press an arrow key on the slider; the number on the screen is the one computed here."""
    page.get_by_text("● ready").wait_for(timeout=120_000)
    assert page.get_by_text("global@0.8,").count()
    handle = page.locator(".noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    page.get_by_text("global@0.81,").wait_for(timeout=20_000)
    runs = cb.runs.ensure_all(cb.experiment.grid("digits", METHODS, 1, epochs=2), progress=False)
    shown = []
    for _ in range(200):  # a row a run appears as it is computed: the table is whole when each run has its own
        shown = [float(text) for text in page.locator("b.accuracy").all_inner_texts()]
        if len(shown) == len(runs):
            break
        page.wait_for_timeout(100)
    train, test = runs[0].experiment.load_data()
    for run, value in zip(runs, shown, strict=True):
        curve = cb.probes.sparsity_curve(
            run.load_model(), test.sample(1000), ["global@0.81"], train.calibration(250, batch_size=AT_ONCE)
        )
        assert value == pytest.approx(100 * curve.iloc[-1]["accuracy"], abs=0.051)


def test_browser_jupyterlab_explorer(page, notebook, tmp_path):
    port = free_port()
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--IdentityProvider.token=T", f"--ServerApp.root_dir={notebook.parent}", "--LabApp.news_url=",
    ]  # fmt: skip
    with server(command, port, tmp_path) as address:
        page.goto(f"{address}/lab/tree/explore.ipynb?token=T&reset")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=60_000)
        page.get_by_text("| Idle").wait_for(timeout=60_000)  # cells that run before the kernel is there are passed over
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator("li[data-command='runmenu:run-all']").click()
        move_and_compare(page)


def test_browser_voila_explorer(page, notebook, tmp_path):
    pytest.importorskip("voila")
    port = free_port()
    command = [
        sys.executable, "-m", "voila", str(notebook), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1",
        "--MappingKernelManager.cull_idle_timeout=20", "--MappingKernelManager.cull_interval=5",
    ]  # fmt: skip
    with server(command, port, tmp_path) as address:
        page.goto(address, timeout=120_000)
        move_and_compare(page)


def test_browser_report_without_network(page, tmp_path):
    small = {"epochs": 2, "methods": METHODS, "sparsities": [0.5, 0.9]}
    built = cb.report.build(
        "digits", "quick", 1, small, questions=["accuracy_vs_sparsity"], reports=tmp_path / "reports"
    )
    page.context.set_offline(True)
    page.goto((built.folder / "index.html").as_uri())
    table = pd.read_csv(built.folder / "tables" / "accuracy_vs_sparsity.csv")
    slider = page.locator("#where")
    slider.focus()
    for level in (0.5, 0.9):
        slider.press("ArrowRight")
        for tuned in (True, False):
            page.locator("#tuned").set_checked(tuned)
            slider.focus()
            rows = table[(table["sparsity"] == level) & (table["calibrated"] == tuned)].set_index("method")["accuracy"]
            for method in METHODS:
                shown = page.locator(f"td[data-method='{method}']").inner_text()
                assert float(shown) == pytest.approx(100 * rows[method], abs=0.051)
    assert page.locator("#level").inner_text() == "90 %"
