"""Executing notebooks: two at once, only what changed, and what an interruption leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from cram_bench.report import execute
from cram_bench.report.execute import Job, execute_all

ROOT = Path(__file__).parents[1]


def notebook(path: Path, *cells: str, key: str = "a") -> Job:
    written = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(written, path)
    return Job(path, {}, key)


def meets(own: Path, other: Path) -> str:
    """Return code that ends well only while somebody executes the code with the two files exchanged."""
    return (
        f"import pathlib, time\npathlib.Path({str(own)!r}).touch()\n"
        f"end = time.monotonic() + 60\n"
        f"while not pathlib.Path({str(other)!r}).exists():\n"
        f"    assert time.monotonic() < end, 'alone'\n    time.sleep(0.05)"
    )


def test_two_are_executed_at_once_and_a_failure_stops_nobody(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "out"
    out.mkdir()
    one, two = tmp_path / "1", tmp_path / "2"
    given = [
        notebook(tmp_path / "one.ipynb", meets(one, two)),
        notebook(tmp_path / "two.ipynb", meets(two, one)),
        notebook(
            tmp_path / "three.ipynb", "import os\nos.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS']", "1 / 0"
        ),
        notebook(tmp_path / "four.ipynb", "2 + 2"),
    ]
    assert execute_all(given, out, threads=3) == {"three": "cell 2: ZeroDivisionError: division by zero"}
    (first,) = (c for c in nbformat.read(out / "three.ipynb", as_version=4).cells if c.source.startswith("import"))
    assert first.outputs[0]["data"]["text/plain"] == "('passive', '3')"
    assert "OMP_NUM_THREADS" not in os.environ
    assert {path.name for path in (out / ".done").iterdir()} == {"one.json", "two.json", "four.json"}
    assert sorted(path.name for path in out.glob("*.html")) == ["four.html", "one.html", "three.html", "two.html"]


def test_folders_may_have_any_name(tmp_path):
    out = tmp_path / '{out} $x^$ "it\'s" [a]'
    (given := tmp_path / "{given}").mkdir()
    out.mkdir()
    assert execute_all([notebook(given / "sum.ipynb", "1 + 1")], out) == {}
    assert {path.name for path in out.iterdir()} == {"sum.ipynb", "sum.html", ".done"}
    assert "2" in (out / "sum.html").read_text()


def test_only_what_changed_is_executed_again(tmp_path):
    out, counter = tmp_path / "out", tmp_path / "counter"
    out.mkdir()

    def listed(keys):
        return [
            notebook(
                tmp_path / f"{n}.ipynb", f"with open({str(counter)!r}, 'a') as file: print({n}, file=file)", key=key
            )
            for n, key in enumerate(keys)
        ]

    execute_all(listed("aa"), out)
    execute_all(listed("ab"), out)
    (out / "0.html").unlink()
    execute_all(listed("ab"), out)
    assert sorted(counter.read_text().split()) == ["0", "0", "1", "1"]


def test_a_product_that_was_edited_is_made_again(tmp_path):
    """What somebody wrote into a report's page, notebook or table, the next build does not take for its result."""
    out, counter = tmp_path / "out", tmp_path / "counter"
    (out / "tables").mkdir(parents=True)
    written = f"open({str(counter)!r}, 'a').write('x'); open({str(out / 'tables' / 'sums.csv')!r}, 'w').write('1\\n')"
    job = notebook(tmp_path / "a.ipynb", f"if True:\n    {written}", "def no(): out.table(table, 'sums')")
    made = [out / name for name in ("a.html", "a.ipynb", "tables/sums.csv")]
    assert execute_all([job], out) == execute_all([job], out) == {}
    assert counter.read_text() == "x"
    for times, product in enumerate(made, 2):
        before = product.read_bytes()
        product.write_bytes(before + b" ")
        assert execute_all([job], out) == {}
        assert counter.read_text() == "x" * times
        assert product.read_bytes().strip() == before.strip()


def test_the_largest_file_is_executed_first(tmp_path):
    out, order = tmp_path / "out", tmp_path / "order"
    out.mkdir()
    line = f"with open({str(order)!r}, 'a') as file: print({{!r}}, file=file)"
    given = [notebook(tmp_path / f"{n}.ipynb", line.format(n) + " " * 99 * n) for n in (1, 3, 2)]
    assert execute_all(given, out, at_once=1) == {}
    assert order.read_text().split() == ["3", "2", "1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_kernels_end_with_who_asked_and_what_was_finished_stays(number, tmp_path):
    out, begun = tmp_path / "out", tmp_path / "begun"
    out.mkdir()
    waits = f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(600)"
    notebook(tmp_path / "short.ipynb", "1 + 1" + " " * 999)  # the largest file, and so the first
    notebook(tmp_path / "long.ipynb", waits)
    notebook(tmp_path / "later.ipynb", waits)
    (out / "long.html").write_text("old")
    program = (
        "import pathlib\nfrom cram_bench.report.execute import Job, execute_all\n"
        f"base = pathlib.Path({str(tmp_path)!r})\n"
        "names = ['short', 'long', 'later']\n"
        "execute_all([Job(base / f'{n}.ipynb', {}, 'a') for n in names], base / 'out')"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not (begun.exists() and (out / ".done" / "short.json").exists()):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        others = psutil.Process(process.pid).children(recursive=True)
        assert len(others) >= 2  # one that executes, and its kernel
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
    _, alive = psutil.wait_procs(others, timeout=30)
    assert not alive
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    whole = {"short.ipynb", "short.html", ".done/short.json"}
    if number == signal.SIGINT:
        assert left == whole
        assert process.stderr.read().strip().splitlines()[-1] == "KeyboardInterrupt"
    else:  # nobody was left to tidy up; the next one does
        assert left - {".long.ipynb.part.ipynb", ".later.ipynb.part.ipynb"} == whole
    process.stderr.close()


def test_what_fails_after_the_last_cell_is_named(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "page.html").mkdir()  # no page can be written there
    (out / "page.html" / "full").touch()
    products = notebook(tmp_path / "page.ipynb", "1 + 1")
    assert "page.html" in str(execute._execute(products, out))
    assert not (out / ".done").exists()


@pytest.mark.parametrize("how", ["sleeps", "is stopped"])
def test_a_kernel_that_hangs_is_ended_and_named_with_what_it_started(how, tmp_path, counted):
    """A process that is stopped is deaf to all but SIGKILL. What computes is not ended, however long it takes."""
    out, pids = tmp_path / "out", tmp_path / "pids"
    out.mkdir()
    assert execute.PATIENCE == 900
    stop = "os.kill(os.getpid(), signal.SIGSTOP)\n" if how == "is stopped" else ""
    hangs = notebook(
        tmp_path / "hangs.ipynb",
        "'before'",
        "import os, signal, subprocess, time\nchild = subprocess.Popen(['sleep', '1000'])\n"
        f"print(os.getpid(), child.pid, file=open({str(pids)!r}, 'w'))\n{stop}time.sleep(1000)",
        "'after'",
    )
    busy = "import time\nend = time.monotonic() + 8\nwhile time.monotonic() < end: pass\n'computed'"
    works = notebook(tmp_path / "works.ipynb", busy)
    said = "cell 2: it hangs: nothing was computed for 3 s; its kernel was ended"
    assert execute_all([hangs, works], out, patience=3.0) == {"hangs": said}
    for pid in map(int, pids.read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert "before" in (out / "hangs.html").read_text()  # what was there is shown
    assert "computed" in (out / "works.html").read_text()
    assert {path.name for path in (out / ".done").iterdir()} == {"works.json"}
    counted(f"kernels that hang: {how}", 1)


def test_a_process_that_dies_is_a_failure_that_is_named(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    dies = notebook(tmp_path / "dies.ipynb", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    lives = notebook(tmp_path / "lives.ipynb", "1 + 1")
    assert execute_all([dies, lives], out) == {"dies": "the process that executes it ended with status -9"}
    assert (out / "lives.html").exists()
    assert not (out / "dies.html").exists()
