"""Executing notebooks into a folder: some at once, each only if its inputs changed.

Much of a short notebook is the start of its kernel, which uses one core: two at once use another.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cram_bench.files import sha256, write
from cram_bench.report.folders import everywhere, without
from cram_bench.report.notebook import outputs
from cram_bench.report.page import export

PATIENCE = 900.0
"""Seconds for which a kernel and what it started may compute nothing while a cell runs: who waits longer hangs."""
_NOTHING = 0.01  # of a core: a kernel that waits looks now and then whether it is alone


@dataclass(frozen=True)
class Job:
    """A notebook to execute, with what is put into it, and a key that changes with all that its result depends on.

    `names` are what is published in the place of paths, by path.
    """

    path: Path
    parameters: Mapping[str, Any]
    key: str
    names: Mapping[str, str] = field(default_factory=dict)


def execute_all(
    notebooks: Sequence[Job], folder: Path, at_once: int = 2, threads: int = 0, patience: float = PATIENCE
) -> dict[str, str]:
    """Execute notebooks into `folder` and export them, except those that were executed with the same key.

    Worker processes execute them, some at once. A notebook that fails does not stop the others, nor does one that
    hangs: its kernel is ended. When this process is interrupted or killed, the workers and their kernels end with it,
    and what was finished stays.

    Args:
        notebooks: what to execute, the largest files first: they take the longest, roughly.
        folder: where the results go.
        at_once: notebooks, at least 1.
        threads: that a kernel computes with, unless ``OMP_NUM_THREADS`` says; 0 for as many as there are cores.
        patience: seconds after which a kernel hangs that has used less than a hundredth of a core in all of them. One
            that computes may take any time.

    Returns:
        The name of each notebook that failed → one line that says where and why.
    """
    waiting = [notebook for notebook in notebooks if not _Products(notebook, folder).current()]
    waiting.sort(key=lambda notebook: -notebook.path.stat().st_size)  # or the longest runs alone at the end
    for notebook in waiting:  # nothing old may stand beside what comes now; all of it first, as two may make one file
        _Products(notebook, folder).remove()
    total = len(waiting)
    begun: list[Job] = []
    errors: dict[str, str | None] = {}

    def work(worker: _Worker) -> None:
        while True:
            try:
                begun.append(notebook := waiting.pop(0))
            except IndexError:
                return
            place, start = len(begun), time.monotonic()
            _say(f"executing {notebook.path.name}, {place} of {total}")
            errors[notebook.path.stem] = error = worker.execute(notebook, folder, patience)
            took = f"{time.monotonic() - start:.0f} s"
            _say(f"{notebook.path.name} {f'failed after {took}' if error else f'done in {took}'}")

    workers = [_Worker(threads) for _ in range(min(at_once, len(waiting)))]
    with ThreadPoolExecutor(at_once) as pool:  # its threads only wait for the workers
        try:
            for done in [pool.submit(work, worker) for worker in workers]:
                done.result()
        except BaseException:
            waiting.clear()
            raise
        finally:
            for worker in workers:
                worker.end()
            for notebook in begun:
                _Products(notebook, folder).part.unlink(missing_ok=True)
    return {notebook.path.stem: error for notebook in notebooks if (error := errors.get(notebook.path.stem))}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


class _Worker:
    """A process that executes notebooks one after the other. It ends when its standard input does, so with this one."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process: subprocess.Popen[str] | None = None
        self._ended = False
        self._lock = threading.Lock()  # none begins after the end

    def execute(self, notebook: Job, folder: Path, patience: float = PATIENCE) -> str | None:
        """Let it execute a notebook; return the error, None if all went well."""
        with self._lock:
            if self._ended:
                return "interrupted"
            self._process = process = self._process or _start(self._threads)
        assert process.stdin is not None
        assert process.stdout is not None
        order: dict[str, Any] = {
            "path": str(notebook.path),
            "parameters": dict(notebook.parameters),
            "key": notebook.key,
        }
        order |= {"names": dict(notebook.names), "patience": patience}
        with contextlib.suppress(BrokenPipeError):  # it died: that it does not answer says so
            process.stdin.write(json.dumps(order | {"folder": str(folder)}) + "\n")
            process.stdin.flush()
        with contextlib.suppress(ValueError):  # it died before its answer ended, or began
            return None if (error := json.loads(process.stdout.readline())) is None else str(error)
        self._process = None  # the next notebook gets a new one
        return f"the process that executes it ended with status {process.wait()}"

    def end(self) -> None:
        """End the process; its kernel notices, and ends within seconds."""
        with self._lock:
            self._ended = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()


def _start(threads: int) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").exists():  # kernels, too, use the code that asked for them
        environment["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [environment.get("PYTHONPATH")])])
    environment.setdefault("OMP_WAIT_POLICY", "passive")  # threads that turn idly on a core keep others from working
    if threads:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cram_bench.report.execute"],  # not what lies in the current folder
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
        start_new_session=True,  # who presses Ctrl-C interrupts the process above, which then ends this one
    )


def main() -> None:
    """Execute the notebooks that lines of standard input ask for; answer each with its error, or null."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what else is printed, by kernels too, is no answer
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    while True:
        order = json.loads(orders.get())
        folder, patience = Path(order.pop("folder")), order.pop("patience")
        error = _execute(Job(Path(order.pop("path")), **order), folder, patience)
        print(json.dumps(error), file=answers, flush=True)


def _listen(orders: queue.SimpleQueue[str]) -> None:
    """Pass lines of standard input on; end this process with it. A kernel notices that it is alone and ends, too."""
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)


class _Products:
    """The files that a notebook makes in `folder`, and the note of what made them."""

    def __init__(self, notebook: Job, folder: Path) -> None:
        self.key = notebook.key
        self.note = folder / ".done" / f"{notebook.path.stem}.json"
        self.executed = folder / notebook.path.name
        self.part = folder / f".{notebook.path.name}.part.ipynb"
        self.files = [
            self.executed,
            self.executed.with_suffix(".html"),
            *(folder / name for name in outputs(notebook.path)),
        ]

    def current(self) -> bool:
        """Say whether all is there, made with the same key, and as it was made."""
        return self.note.exists() and self.note.read_text(encoding="utf-8") == self._text()

    def remove(self) -> None:
        for file in (self.note, self.part, *self.files):
            file.unlink(missing_ok=True)

    def record(self) -> None:
        self.note.parent.mkdir(exist_ok=True)
        write(self.note, self._text())

    def _text(self) -> str:
        made = {file.name: sha256(file) if file.exists() else "" for file in self.files}
        return json.dumps({"key": self.key, "sha256": made}) + "\n"


def _execute(notebook: Job, folder: Path, patience: float = PATIENCE) -> str | None:
    """Execute one notebook and export it; return the error if it fails."""
    products = _Products(notebook, folder)
    error = None
    try:
        with _watched(patience) as ended:
            error = _into(notebook, products.part)
        if ended:
            waited = f"nothing was computed for {patience:g} s; its kernel was ended"
            error = f"cell {_running(products.part)}: it hangs: {waited}"
        _without_machine_paths(products.part, notebook.names)
        for file in products.files:
            if notebook.names and file.suffix in (".csv", ".svg") and file.exists():
                text = file.read_text(encoding="utf-8")
                if (short := without(text, notebook.names)) != text:
                    write(file, short)
        os.replace(products.part, products.executed)
        export(products.executed)
        if error is None:
            products.record()
    except Exception as failure:  # a full disk, a page that cannot be made: the other notebooks go on
        error = error or _named(failure)
    return error


@contextlib.contextmanager
def _watched(patience: float) -> Iterator[list[int]]:
    """End the kernel and what it started when together they have computed nothing for so long; list whom.

    A pause of this process does not count: nothing computes in it either.
    """
    from psutil import Error, Process  # which every kernel needs

    over, ended, step = threading.Event(), list[int](), patience / 10

    def spent() -> float:
        total = 0.0
        for process in Process().children(recursive=True):
            with contextlib.suppress(Error):  # it ended
                total += sum(process.cpu_times()[:2])
        return total

    def watch() -> None:
        before, quiet = 0.0, 0.0
        while not over.wait(step):
            now, quiet = spent(), quiet + step
            if now == 0 or abs(now - before) > _NOTHING * patience:  # none has begun, or one ended
                before, quiet = now, 0.0
            elif quiet >= patience:
                for process in Process().children(recursive=True):
                    with contextlib.suppress(Error):
                        process.kill()
                        ended.append(process.pid)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        over.set()
        thread.join()


def _running(part: Path) -> int:
    """Return the number of the cell of code that was begun last."""
    cells = json.loads(part.read_text(encoding="utf-8"))["cells"]
    begun = [cell for cell in cells if cell["metadata"].get("papermill", {}).get("start_time")]
    return sum(cell["cell_type"] == "code" for cell in begun)


def _into(notebook: Job, part: Path) -> str | None:
    """Let papermill execute a notebook into `part`, which is there afterwards; return the error if it fails."""
    import papermill

    try:
        papermill.execute_notebook(
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook.path, part)),  # which it formats
            dict(notebook.parameters),
            progress_bar=False,
            cwd=str(notebook.path.parent),
            kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # or every kernel warns that loopback is not encrypted
        )
    except papermill.PapermillExecutionError as failure:
        return f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}".splitlines()[0]
    except Exception as failure:  # the kernel died or did not start
        if not part.exists():
            shutil.copy(notebook.path, part)
        return _named(failure)
    return None


def _named(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def _without_machine_paths(notebook: Path, names: Mapping[str, str]) -> None:
    """Cut what differs between machines: absolute folders, papermill's own record; write `names` for paths."""
    text = json.dumps(everywhere(json.loads(notebook.read_text(encoding="utf-8")), names), ensure_ascii=False)
    own = [(Path(sys.prefix), ".venv")] if sys.prefix != sys.base_prefix else []
    for path, short in ((Path(__file__).resolve().parents[2], "."), *own, (Path.home(), "~")):
        if len(path.parts) > 1:
            text = text.replace(f"{path}/", f"{short}/")
    content = json.loads(text)
    content["metadata"].pop("papermill", None)
    for cell in content["cells"]:
        cell["metadata"].pop("papermill", None)
        cell["metadata"].pop("execution", None)
        if "injected-parameters" in cell["metadata"].get("tags", []):
            lines = "".join(cell["source"]).splitlines(keepends=True)
            cell["source"] = [line for line in lines if not line.startswith(("output = ", "store = ", "tables = "))]
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
