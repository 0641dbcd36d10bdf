"""What a reader does and sees in a headless Chromium: the explorer in JupyterLab and Voilà, the report with no network.

Skipped by name where there is no Chromium or no playwright; CI installs both. A server is started once for all that is
looked at on it. Set ``CRAM_BENCH_SCREENSHOTS`` to a folder to look for yourself.
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
import urllib.error
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
COMMITTED = ROOT / "reports" / "cifar10-resnet20" / "runs"
PICTURES = ("loss on the way", "predicted class")
CHARTS = ("accuracy against sparsity", "zeros of every layer", "one layer: ")
WAIT = 240_000  # milliseconds, for a busy machine

if not CHROMIUM:
    pytest.skip("no Chromium is installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")

# What a person sees of the panel: pictures, what sticks out, and how well text stands out from what is behind it.
SEEN = """() => {
  const root = [...document.querySelectorAll('.cram-bench-explorer')].filter(e => e.getClientRects().length).at(-1);
  const shown = e => { const b = e.getBoundingClientRect(); return b.width > 0 && b.height > 0; };
  const name = e => e.tagName + '.' + e.className + ': ' + (e.alt || e.value || e.textContent || '').slice(0, 60);
  const all = [...root.querySelectorAll('*')].filter(shown);
  const wide = document.documentElement.clientWidth;
  const outside = all.filter(e => {
    const b = e.getBoundingClientRect(); return b.left < -0.5 || b.right > wide + 0.5;
  }).map(name);
  const scrolled = [];
  const around = [];
  // Lab's own menus may be cut
  for (let e = root; e && !e.matches('.jp-NotebookPanel'); e = e.parentElement) around.push(e);
  for (const e of new Set([...around, ...all])) {
    const hides = e === document.documentElement || getComputedStyle(e).overflowX !== 'visible';
    const wider = e.scrollWidth > e.clientWidth + 1 && e.clientWidth;
    if (hides && !['SELECT', 'OPTION'].includes(e.tagName) && wider) scrolled.push(name(e));
  }
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) {
      layers.push(rgba(getComputedStyle(e).backgroundColor)); if (layers.at(-1)[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = c => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const says = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  const faint = all.filter(e => e.tagName === 'SELECT' || says(e)).map(e => {
    let opacity = 1;
    for (let p = e; p; p = p.parentElement) opacity *= Number(getComputedStyle(p).opacity);
    const below = behind(e), colour = rgba(getComputedStyle(e).color);
    const pair = [light(over([...colour.slice(0, 3), colour[3] * opacity], below)), light(below)].sort((a, b) => b - a);
    return [name(e), (pair[0] + 0.05) / (pair[1] + 0.05), e.closest('.dot') !== null, opacity];
  }).filter(([, ratio, dot, opacity]) => opacity && ratio < (dot ? 3 : 4.5))
    .map(([n, ratio]) => n + ' ' + ratio.toFixed(1));
  const pictures = [...root.querySelectorAll('img')].map(e => ({
    alt: e.alt, title: e.title, natural: e.naturalWidth,
    width: e.getBoundingClientRect().width, high: e.getBoundingClientRect().height
  }));
  const charts = [...root.querySelectorAll('svg.marks')].map(e => ({
    alt: e.getAttribute('aria-label'), role: e.getAttribute('role'), width: e.getBoundingClientRect().width,
    letters: [...e.querySelectorAll('text')].map(t => t.textContent),
    colours: [...e.querySelectorAll('text')].map(t => light(rgba(getComputedStyle(t).fill))),
    cut: [...e.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t.textContent]).filter(([b, t]) => {
      const own = e.getBoundingClientRect(); return t && (b.left < own.left - 1 || b.right > own.right + 1);
    }).map(([, t]) => t)
  }));
  const boxes = [...root.querySelectorAll('svg.marks, img, table, select')].filter(shown).map(
    e => [name(e), e.getBoundingClientRect()]);
  const overlapping = [];
  boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
    const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
    const high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
    if (wide > 2 && high > 2) overlapping.push(a + ' over ' + b);
  }));
  const torn = [];
  for (const e of root.querySelectorAll('th, td')) for (const node of [...e.childNodes].filter(n => n.nodeType === 3)) {
    for (const word of node.data.matchAll(/[\\w.]+/g)) {
      const range = document.createRange();
      range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
      if (range.getClientRects().length > 1) torn.push(word[0]);
    }
  }
  const text = root.innerText, back = light(behind(root));
  return {torn, charts, overlapping, pictures, outside, scrolled, faint, text, back};
}"""


class Viewer:
    """A page, and whatever its console complained about."""

    def __init__(self, page):
        self.page, self.complaints = page, []
        page.on("console", lambda message: self._note(message) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(f"error on the page: {error}"))

    def _note(self, message):
        self.complaints.append(f"{message.text} ({message.location.get('url')})")

    def sees_the_panel(self, name, width, dark):
        """Assert that all of the panel is there, and can be read."""
        self.page.set_viewport_size({"width": width, "height": 1300})
        self.page.wait_for_timeout(400)  # the page lays itself out anew
        seen = self.page.evaluate(SEEN)
        if folder := os.environ.get("CRAM_BENCH_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}-{width}-{'dark' if dark else 'light'}.png")
            self.page.locator(".cram-bench-explorer").last.screenshot(
                path=Path(folder) / f"{name}-{width}-{'dark' if dark else 'light'}-panel.png"
            )
        assert "javascript error" not in self.page.inner_text("body").lower()
        assert len(seen["pictures"]) == len(PICTURES), seen["pictures"]
        for picture, words in zip(seen["pictures"], PICTURES, strict=True):
            assert words in picture["alt"]
            assert picture["alt"] == picture["title"]
            assert picture["natural"] > 100
            assert min(picture["width"], picture["high"]) > 50
        for chart, words in zip(seen["charts"], CHARTS, strict=True):
            assert chart["alt"].startswith(words)
            assert chart["role"] == "img"
            assert chart["width"] > 250
            assert chart["cut"] == []
            assert not [text for text in chart["letters"] if text.endswith("…")]
            assert all((light > 0.4) == dark for light in chart["colours"])
        assert {k: seen[k] for k in ("outside", "scrolled", "faint", "torn", "overlapping") if seen[k]} == {}
        assert name == "explore" or "hold Ctrl or Shift" in seen["text"]  # there is one network
        assert (seen["back"] < 0.2) == dark
        assert self.complaints == []


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def viewer(chromium):
    context = chromium.new_context(viewport={"width": 1400, "height": 1300})
    # Voilà's page asks another host for its icons: an empty answer, for there may be no network.
    elsewhere = re.compile(r"^https?://(?!127\.0\.0\.1[:/])")
    context.route(elsewhere, lambda route: route.fulfill(status=200, content_type="text/css", body=""))
    yield Viewer(context.new_page())
    context.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A clone with explore.ipynb, for networks that are trained here in a moment, and for those that are committed."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "notebooks").mkdir()
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "lab.py", folder / "scripts")
    shutil.copy(ROOT / ".gitignore", folder)
    notebook = (ROOT / "notebooks" / "explore.ipynb").read_text()
    store = cb.runs.Store(folder / "runs")
    cb.runs.ensure_all(cb.recipes.grid("digits", METHODS, 1, epochs=2), store, progress=False)
    settings = {"methods": METHODS, "store": str(store.root)}
    _write(folder / "notebooks" / "digits.ipynb", notebook, settings | {"epochs": 2})
    committed = {"dataset": "cifar10", "also": [str(COMMITTED)], "sample": 100, "calibration": 50}
    _write(folder / "notebooks" / "cifar10.ipynb", notebook, settings | committed)
    _git(folder, "init", "-q")
    _git(folder, "add", ".")
    _git(folder, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a house")
    return folder


def _write(path, notebook, settings):
    cells = json.loads(notebook)
    parameters = next(cell for cell in cells["cells"] if "parameters" in cell["metadata"].get("tags", []))
    source = "".join(parameters["source"]) + "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    parameters["source"] = source.splitlines(keepends=True)
    path.write_text(json.dumps(cells, indent=1) + "\n")


def _git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def server(command, port, folder, more=()):
    """Run a server until the block ends, and then all that it started."""
    environment = (
        os.environ
        | dict(more)
        | {
            "OMP_NUM_THREADS": "1",
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "HOME": str(folder),
        }
    )
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(480):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/?token=T", timeout=5).close()
                break
            except urllib.error.HTTPError:  # it answers: the token is another
                break
            except OSError:
                pass
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        log.close()


@pytest.fixture(scope="module")
def lab(house, tmp_path_factory):
    """What `make lab` starts."""
    port = free_port()
    command = [
        sys.executable, str(house / "scripts" / "lab.py"), "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        "--IdentityProvider.token=T", "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    with server(command, port, tmp_path_factory.mktemp("lab")) as address:
        yield address


@pytest.fixture(scope="module")
def voila(house, tmp_path_factory):
    pytest.importorskip("voila")
    port = free_port()
    command = [
        sys.executable, "-m", "voila", str(house / "notebooks"), "--no-browser", f"--port={port}",
        "--Voila.ip=127.0.0.1", "--MappingKernelManager.cull_idle_timeout=20", "--MappingKernelManager.cull_interval=5",
    ]  # fmt: skip
    with server(command, port, tmp_path_factory.mktemp("voila")) as address:
        yield address


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def move_and_compare(page, house):
    """Press an arrow key on the slider; the number on the screen is the one computed here."""
    assert page.get_by_text("global@0.8,").count()
    handle = page.locator(".noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    page.get_by_text("global@0.81,").wait_for(timeout=WAIT)
    page.get_by_text("● ready").wait_for(timeout=WAIT)
    shown = [float(text) for text in page.locator("b.accuracy").all_inner_texts()]
    experiments = cb.recipes.grid("digits", METHODS, 1, epochs=2)
    runs = cb.runs.ensure_all(experiments, cb.runs.Store(house / "runs"), progress=False)
    train, test = runs[0].experiment.load_data()
    for run, value in zip(runs, shown, strict=True):
        curve = cb.probes.sparsity_curve(
            run.load_model(), test.sample(1000), ["global@0.81"], train.calibration(250, batch_size=AT_ONCE)
        )
        assert value == pytest.approx(100 * curve.iloc[-1]["accuracy"], abs=0.051)


def touch_the_charts(page):
    """Point at a mark, click at a layer, and choose one with the keyboard."""
    page.locator("svg[aria-label^='accuracy against'] .mark-symbol.role-mark path").nth(8).hover(force=True)
    told = page.locator("#vg-tooltip-element")
    told.wait_for()
    assert re.search(r"accuracy, %\s*[\d.]+ ± [\d.]+", told.inner_text())
    assert re.search(r"n, examples\s*[\d,]+", told.inner_text())
    page.mouse.move(1, 1)
    layers, detail = page.locator("svg[aria-label^='zeros of every']"), page.locator("svg[aria-label^='one layer']")
    layers.locator(".mark-rect.role-mark path").first.click(force=True)
    page.locator("svg[aria-label='one layer: what pruning it alone costs, and how its weights are spread: "
                 "convs.0.weight']").wait_for(timeout=WAIT)  # fmt: skip
    choice = page.locator("select").filter(has_text="the costliest")
    assert choice.input_value() == "convs.0.weight"
    page.get_by_text("● ready").wait_for(timeout=WAIT)
    choice.select_option("linear.weight")
    page.locator("svg[aria-label$='linear.weight']").wait_for(timeout=WAIT)
    page.get_by_text("● ready").wait_for(timeout=WAIT)
    assert any(text.startswith("linear.weight") for text in detail.locator("text").all_text_contents())
    with page.expect_download() as saved:
        page.locator(".cram-bench-chart summary").first.click()
        page.get_by_text("Save as CSV").first.click()
    table = pd.read_csv(saved.value.path())
    assert {"run", "sparsity", "mean", "low", "high", "n"} <= set(table.columns)
    assert len(table) >= 10  # a run has as many sparsities
    page.locator(".cram-bench-chart summary").first.click()


def committed_runs():
    """Skip where the data of the committed runs are not."""
    experiments = cb.recipes.grid("cifar10", METHODS, 1)
    store = cb.runs.Store(COMMITTED)
    assert all(store.find(experiment) for experiment in experiments)  # else the notebook would train
    if not any(Path(os.environ.get("CRAM_BENCH_DATA", "")).glob("cifar10/*.parquet")):
        pytest.skip("no CIFAR-10 under CRAM_BENCH_DATA")


def theme(page, name):
    page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
    page.locator(f"body[data-jp-theme-name='{name}']").wait_for(state="attached", timeout=WAIT)


def open_in_lab(page, address, name):
    page.goto(f"{address}/lab/tree/{name}.ipynb?token=T&reset")
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=WAIT)
    page.get_by_text("| Idle").wait_for(timeout=WAIT)  # cells that run before the kernel is there are passed over


def sees_it_in_lab(viewer, name):
    page = viewer.page
    page.locator(".cram-bench-explorer").get_by_text("● ready").wait_for(timeout=WAIT)
    for dark in (False, True):
        theme(page, "JupyterLab Dark" if dark else "JupyterLab Light")
        for width in (1400, 400):
            page.set_viewport_size({"width": width, "height": 1300})
            page.evaluate(
                "() => { window.jupyterapp.shell.collapseLeft(); }"
            )  # the list of files would fill a telephone
            viewer.sees_the_panel(name, width, dark)
    assert not page.get_by_text("official Jupyter news").count()
    page.set_viewport_size({"width": 1400, "height": 1300})


def test_browser_jupyterlab_explorer(viewer, lab, house):
    page = viewer.page
    open_in_lab(page, lab, "digits")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator("li[data-command='runmenu:run-all']").click()
    sees_it_in_lab(viewer, "lab-digits")
    move_and_compare(page, house)
    # Once more, from a new kernel.
    page.evaluate("document.querySelector('.cram-bench-explorer').classList.add('of-before')")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator("li[data-command='runmenu:restart-and-run-all']").click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.locator(".cram-bench-explorer:not(.of-before)").get_by_text("● ready").wait_for(timeout=WAIT)
    sees_it_in_lab(viewer, "lab-digits-again")
    move_and_compare(page, house)
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    copy = house / "lab" / "digits.ipynb"
    for _ in range(100):
        if "cram-bench" in copy.read_text() or '"execution_count": 1' in copy.read_text():
            break
        page.wait_for_timeout(100)
    assert '"execution_count": 1' in copy.read_text()  # the outputs are saved, in the copy
    assert _git(house, "status", "--porcelain") == ""
    assert viewer.complaints == []


def test_browser_jupyterlab_explorer_on_the_committed_networks(viewer, lab, house):
    committed_runs()
    open_in_lab(viewer.page, lab, "cifar10")
    viewer.page.get_by_role("menuitem", name="Run", exact=True).click()
    viewer.page.locator("li[data-command='runmenu:run-all']").click()
    sees_it_in_lab(viewer, "lab-cifar10")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_browser_voila_explorer(viewer, voila, house, name, dark):
    if name == "cifar10":
        committed_runs()
    page = viewer.page
    page.goto(f"{voila}/voila/render/{name}.ipynb?theme={'dark' if dark else 'light'}", timeout=WAIT)
    page.get_by_text("● ready").wait_for(timeout=WAIT)
    for width in (1400, 400):
        viewer.sees_the_panel(f"voila-{name}", width, dark)
    if name == "digits" and not dark:
        page.set_viewport_size({"width": 1400, "height": 1300})
        move_and_compare(page, house)
        touch_the_charts(page)
        assert viewer.complaints == []


def test_browser_explore_opens_a_page_without_network(chromium, house, tmp_path):
    """What `cram-bench explore` serves: everything from this machine, to who has the token."""
    pytest.importorskip("voila")
    port, (run, *_) = free_port(), cb.runs.Store(house / "runs").runs()
    command = [sys.executable, "-m", "cram_bench", "explore", run.id, "--no-browser", f"--port={port}"]
    context = chromium.new_context(viewport={"width": 1400, "height": 1300})
    elsewhere = []
    outside = re.compile(r"^https?://(?!127\.0\.0\.1[:/])")
    context.route(outside, lambda route: (elsewhere.append(route.request.url), route.abort()))
    viewer = Viewer(context.new_page())
    with server(command, port, tmp_path, {"CRAM_BENCH_RUNS": str(house / "runs")}) as address:
        with urllib.request.urlopen(f"{address}/api/kernels", timeout=30) as asked:
            assert "/login?" in asked.url  # who has no token is asked for it
        token = re.search(r"\?token=(\S+)", (tmp_path / "server.log").read_text())[1]
        page = viewer.page
        page.goto(f"{address}/?token={token}", timeout=WAIT)
        page.get_by_text("● ready").wait_for(timeout=WAIT)
        assert page.title() == "cram-bench explore"
        for width in (1400, 400):
            viewer.sees_the_panel("explore", width, False)
        page.set_viewport_size({"width": 1400, "height": 1300})
        touch_the_charts(page)
        context.close()  # before the server is: a page that lost its socket complains
    assert elsewhere == []
    assert viewer.complaints == []


def test_browser_report_without_network(viewer, tmp_path):
    page = viewer.page
    small = {"epochs": 2, "methods": METHODS, "sparsities": [0.5, 0.9]}
    built = cb.report.build(
        "digits", "quick", 1, small, questions=["accuracy_vs_sparsity"], reports=tmp_path / "reports"
    )
    page.context.set_offline(True)
    page.goto((built.folder / "index.html").as_uri())
    table = pd.read_csv(built.folder / "tables" / "accuracy_vs_sparsity.csv")
    marks, slider, told = (
        page.locator(".chart svg.marks"),
        page.locator("input[name=at]"),
        page.locator(".chart output"),
    )
    marks.wait_for()
    names = {cb.recipes.label(method): method for method in METHODS}
    slider.focus()
    slider.press("Home")
    for level in (0.5, 0.9):
        slider.press("ArrowRight")
        told.filter(has_text=f"{100 * level:g} %").wait_for()  # after the chart itself
        assert slider.get_attribute("aria-valuetext") == f"{100 * level:g} %"
        for tuned in (True, False):
            page.locator("input[name=tuned]").set_checked(tuned)
            rows = table[(table["sparsity"] == level) & (table["calibrated"] == tuned)].set_index("method")["accuracy"]
            wanted = {f"{100 * rows[method]:.1f}" for method in METHODS}
            page.wait_for_function(
                """wanted => {
                    const texts = [...document.querySelectorAll(".chart svg.marks text")].map(t => t.textContent);
                    return wanted.every(w => texts.includes(w));
                }""",
                arg=sorted(wanted),
            )
            slider.focus()
    assert set(names) <= set(marks.locator("text").all_text_contents())
    for width, scheme in ((1400, "light"), (400, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.reload()
        marks.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert marks.bounding_box()["width"] >= 0.7 * min(width, 760)
        ink = page.evaluate("getComputedStyle(document.querySelector('.chart svg.marks text[fill=currentColor]')).fill")
        assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 384) == (scheme == "dark")
        page.screenshot(path=f"{tmp_path}/report-{width}.png", full_page=True)
    first = marks.locator(".mark-symbol.role-mark path").first
    first.hover(force=True)  # points may lie over each other
    assert "accuracy, %" in page.locator("#vg-tooltip-element").inner_text()
    with page.expect_download() as saved:
        page.locator(".chart summary").click()
        page.get_by_text("Save as SVG").click()
    assert "<svg" in Path(saved.value.path()).read_text()
    assert viewer.complaints == []


def test_browser_runs_no_script_of_a_report_of_somebody_else(viewer, hostile):
    """Its texts are shown as they are, wherever they stand, and after the slider has written them anew."""
    page, (text, folder) = viewer.page, hostile
    page.context.set_offline(True)
    dialogs, expected = [], {"index.html": 20, f"{folder.name}.html": 5, "../index.html": 4}
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    for name, least in expected.items():
        page.goto((folder / name).resolve().as_uri())
        if name == "index.html":
            marks = page.locator(".chart svg.marks")
            marks.wait_for()
            options = page.locator("select[name=pattern] option").all_inner_texts()
            assert set(options) == {"global", text, f"{text}+int8"}
            for pattern in options:
                page.locator("select[name=pattern]").select_option(pattern)
                for tuned in (True, False):
                    page.locator("input[name=tuned]").set_checked(tuned)
                    page.locator("input[name=at]").focus()
                    for _ in range(3):
                        page.locator("input[name=at]").press("ArrowRight")
                    letters = marks.locator("text").all_text_contents()  # a long name ends in an ellipsis
                    assert any(t.startswith(text[:20]) for t in letters)
                    page.locator("input[name=at]").press("Home")
                    marks.locator(".mark-symbol.role-mark path").first.hover(force=True)  # may lie below another
                    page.locator("#vg-tooltip-element").wait_for()
        assert page.inner_text("body").count(text) >= least
        assert page.evaluate("window.hit === undefined")
        names = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
        assert page.evaluate(f"{names}.filter(n => n.startsWith('on'))") == []
        assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
        assert page.evaluate("document.scripts.length") == 2 * (name == "index.html")
        broken = page.evaluate("[...document.images].filter(e => !e.naturalWidth).map(e => e.src)")
        assert broken == []
    assert dialogs == []
    assert viewer.complaints == []
