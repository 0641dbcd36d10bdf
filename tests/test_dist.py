"""The wheel holds all that is needed, and works where nothing of the checkout is in sight."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build as `make dist` does: the wheel from the source distribution, with what is installed."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    call = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_has_every_file_of_the_package_and_the_notebooks(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    here = [path for path in (ROOT / "cram_bench").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {path.relative_to(ROOT).as_posix() for path in here}
    wanted |= {f"cram_bench/_notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert wanted <= names
    assert {"cram_bench/deploy/kernel.c", "cram_bench/py.typed", "cram_bench/report/templates/page.html"} <= wanted
    assert not [name for name in names if name.startswith(("reports/", "tests/", "docs/"))]
    assert wheel.stat().st_size < 2e6


def test_the_source_distribution_is_small_and_builds_the_wheel(built):
    """The committed runs, 40 MB, stay in the repository."""
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "cram_bench/train.py"} <= names
    assert {"notebooks/anatomy.ipynb", "docs/start.md", "examples/pruners.py", "tests/test_dist.py"} <= names
    assert not [name for name in names if name.startswith("reports/")]
    assert source.stat().st_size < 3e6


def test_the_installed_wheel_trains_and_probes_away_from_the_checkout(built, tmp_path):
    """Installed without the checkout on the path; torch and the rest are those of this environment."""
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "bare"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=300)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(place), "CRAM_BENCH_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        call = [sys.executable, "-P", *arguments]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where, notebooks = run(
        "-c",
        "import cram_bench as cb; from cram_bench.report.notebook import notebooks_folder\n"
        "print(cb.__file__); print(*(path.stem for path in notebooks_folder().glob('*.ipynb')))",
    ).splitlines()
    assert Path(where).is_relative_to(place)
    assert set(notebooks.split()) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    folder = run("-m", "cram_bench", "train", "--epochs", "1", "--method", "cram+-multi").splitlines()[-1]
    assert Path(folder).is_relative_to(tmp_path / "runs")
