"""README, documentation and examples: their code runs, their numbers are the reports', their links lead somewhere."""

import contextlib
import copy
import doctest
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cram_bench as cb

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted(DOCS.rglob("*.md")))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = [page for page in PAGES if BLOCK.search((ROOT / page).read_text())]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OPTIONAL = {"timm", "transformers", "lightning", "accelerate", "tensorboard"}


def blocks(page):
    return BLOCK.findall((ROOT / page).read_text())


@pytest.fixture(scope="module")
def started():
    """What the first two blocks of Start leave: the pages of the systems go on from it."""
    names = {}
    for block in blocks("docs/start.md")[:2]:
        exec(compile(block, "docs/start.md", "exec"), names)
    return names


def missing(block):
    """Return which optional packages that a block asks for are not installed."""
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", block, re.MULTILINE))
    imported |= {"tensorboard"} if "callbacks.TensorBoard" in block else set()
    return sorted(name for name in imported & OPTIONAL if importlib.util.find_spec(name) is None)


@pytest.mark.parametrize("page", CODE)
def test_the_code_of_a_page_runs(page, started, tmp_path, monkeypatch, subtests):
    """Blocks go on from each other; one that names torchrun is a file of its own, and is run by it."""
    monkeypatch.setenv("CRAM_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT if page == "docs/gallery.md" else tmp_path)
    torch.manual_seed(0)
    names = dict(started, model=copy.deepcopy(started["model"])) if "/systems/" in page else {}
    for number, block in enumerate(blocks(page), 1):
        if command := re.match(r"# (\S+\.py): run it by torchrun (.*)\n", block):
            (tmp_path / command[1]).write_text(block)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            call = [sys.executable, "-m", "torch.distributed.run", *command[2].split()]
            done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.count("global") == 4  # dense and pruned, plain and tuned: printed by one process
        elif absent := missing(block):
            with subtests.test(f"block {number}"):
                pytest.skip(f"{page}, block {number}: {', '.join(absent)} not installed")
        else:
            exec(compile(block, f"{page}, block {number}", "exec"), names)
    if page == "README.md":
        assert torch.isfinite(names["loss"])
        assert names["masks"].sparsity == pytest.approx(0.9, abs=1e-3)
    with contextlib.suppress(ImportError):
        from matplotlib import pyplot

        pyplot.close("all")


def test_a_block_is_left_out_only_for_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "OPTIONAL", {"absent_package", "torch"})
    assert missing("import torch\n    import absent_package\n") == ["absent_package"]
    assert missing("import torch\nabsent_package = 1\n") == []


@pytest.fixture(scope="module")
def fill():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location("fill", ROOT / "scripts" / "fill.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


def test_numbers_of_pages_are_those_of_the_committed_reports(fill):
    assert doctest.testmod(fill).failed == 0
    assert {page.relative_to(ROOT).as_posix() for page in fill.pages()} == set(PAGES)
    for page in fill.pages():
        text = page.read_text(encoding="utf-8")
        assert fill.filled(text, fill.way_up(page)) == text, f"{page.name}: say make readme"


def test_a_changed_number_is_written_anew(fill):
    page = DOCS / "results.md"
    text = page.read_text(encoding="utf-8")
    assert fill.filled(text.replace("54.4 ± 4.0", "99.9 ± 0.0"), fill.way_up(page)) == text
    with pytest.raises(ValueError, match="unknown block 'nonsense'; allowed are headline"):
        fill.filled("<!-- begin nonsense: make readme -->\n<!-- end -->", "")
    with pytest.raises(ValueError, match="a block has no end"):
        fill.filled("<!-- begin claims: make readme -->\n", "")


def test_every_committed_report_is_among_the_results(fill):
    named = re.findall(r"^!/reports/([\w-]+)/$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    assert set(named) == set(fill.ASKED)
    told = (DOCS / "results.md").read_text()
    assert all(f"begin result {name}: " in told for name in named)


def test_numbers_of_a_system_are_rows_of_its_own(fill):
    """A pruner with settings is found by its name, another of a like name is not, and magnitude stands beside it."""
    told = fill.measured(ROOT / "reports", "../", "pruners", "obert", "in", "cifar10-second-order", "sst2-second-order")
    rows = re.findall(r"^\| (?:SGD|AdamW) \| (\S+) \|", told, re.MULTILINE)
    assert rows == ["global", "obert", "global", "obert(gradients=256,block=50)"]
    assert fill.measured(ROOT / "reports", "../", "methods", "nobody") == "No committed report has it yet."


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project_lead_somewhere(page):
    """In the repository, without the site; the strict build checks those of the site, anchors included."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    assert "make test " in "\n".join(lines)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(name, reason="pip install 'cram-bench[docs]'")
    folder = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_is_built_strictly_and_asks_nothing_of_the_network(site):
    pages = [path for path in site.rglob("*.html") if "reports" not in path.relative_to(site).parts]
    assert len(pages) > len(PAGES)
    for path in pages:
        html = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?([^">\s]+)', html)
        loaded += re.findall(
            r'<link\b(?=[^>]*rel="?(?:stylesheet|preload|preconnect|icon))[^>]*href="?([^">\s]+)', html
        )
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], path.name
        assert 'class="arithmatex"' not in html, f"{path.name}: a formula was left"
        formulas = re.findall(r"<math.*?</math>", html, re.DOTALL)
        assert not [formula for formula in formulas if "\\" in formula], f"{path.name}: TeX was left in a formula"


def test_the_site_has_formulas_figures_reports_and_the_api(site):
    cram = (site / "systems" / "cram.html").read_text(encoding="utf-8")
    assert cram.count("<math") > 5
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith('var __index = {"config"')
    assert (site / "reports" / "cifar10-resnet20-15-epochs" / "figures" / "accuracy_vs_sparsity.png").is_file()
    assert not list(site.glob("reports/*/runs"))
    for room in ("compress", "prune", "optim", "probes", "plots"):
        public = [name for name in getattr(cb, room).__all__ if callable(getattr(getattr(cb, room), name))]
        html = (site / "api" / f"{room}.html").read_text(encoding="utf-8")
        absent = [name for name in public if not re.search(rf'id="[\w.]*\b{name}"', html)]
        assert not absent, f"{room} lacks {absent}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path), run_name="__main__")
    assert names["__doc__"]
    assert capsys.readouterr().out.strip()
    assert ("savefig" in path.read_text()) == bool(list(tmp_path.glob("*.svg")))
