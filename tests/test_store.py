"""Neighbours, locks and size of the run store: nothing in it hides or stops anything else in it."""

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

import cram_bench as cb
from benchmarks.store import copy, fabricate
from cram_bench import cli, files
from cram_bench.files import HeldError, holder, locked
from cram_bench.recipes import recipe
from cram_bench.runs import Run, RunError, Store, ensure, index, publishing

ROOT = Path(__file__).resolve().parents[1]
ODD = ["{braces}", "$x^$", 'it\'s "quoted"', "[a-z]*", "50%j", "two\nlines"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="states of processes are read from /proc")


def tiny(**changes):
    return recipe("digits", **({"epochs": 1} | changes))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A store with one finished run, which tests copy from."""
    return ensure(tiny(), Store(tmp_path_factory.mktemp("trained")), progress=False)


def stocked(root, trained, count):
    """A store of so many finished runs, of seeds 0 … n − 1."""
    store = Store(root)
    store.root.mkdir(parents=True)
    for seed in range(count):
        copy(trained, store, seed)
    return store


def aged(store):
    """Let a minute pass since the last change of a store: what changed just now is not relied on."""
    index._known.clear(), index._rows.clear()
    then = time.time() - 60
    for path in (store.root, *store.root.glob("[0-9a-f]*"), *store.root.glob("[0-9a-f]*/*")):
        os.utime(path, (then, then))
    return store


# Neighbours


def warned(call):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value = call()
    return value, [str(each.message) for each in said]


def nested(path):
    path.write_text("[" * 100_000)


DAMAGES = {
    "settings nested": lambda run: nested(run / "settings.json"),
    "environment nested": lambda run: nested(run / "environment.json"),
    "environment a number": lambda run: (run / "environment.json").write_text("5"),
    "history gone": lambda run: (run / "history.csv").unlink(),
    "history no text": lambda run: (
        (run / "history.csv").unlink(),  # which others share
        (run / "history.csv").write_bytes(b"\xff\xfe\x00"),
    ),
    "history a terabyte": lambda run: (
        (run / "history.csv").unlink(),
        (run / "history.csv").touch(),
        os.truncate(run / "history.csv", 2**40),
    ),
    "a folder for a file": lambda run: ((run / "settings.json").unlink(), (run / "settings.json").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_once_and_hides_no_other(damage, tmp_path, trained, counted):
    store = stocked(tmp_path / "store", trained, 3)
    bad = store.root / tiny(seed=1).id
    DAMAGES[damage](bad)
    for look in (lambda: store.table()["seed"].tolist(), lambda: [run.experiment.seed for run in store.runs()]):
        found, said = warned(look)
        assert found == [0, 2]
        assert [bad.name in line for line in said] == [True], said
        assert "\n" not in said[0]
    assert store.open(tiny(seed=2).id[:9]).experiment.seed == 2
    assert store.find(tiny(seed=7)) is None
    assert cb.sweep.table([tiny(seed=seed) for seed in range(3)], store)["state"].tolist()[::2] == ["finished"] * 2
    counted(f"damaged neighbours: {damage}", 1)


def test_a_copy_of_a_run_is_named_and_not_taken_for_one(tmp_path, trained, counted):
    store = stocked(tmp_path / "store", trained, 2)
    run = store.open(tiny(seed=1).id)
    os.rename(copy(trained, store, 2), store.root / f"{run.id}.bak")
    for name in ODD:
        (store.root / name).mkdir()
        (store.root / f"{name}.txt").write_text("")
    assert store.open(run.id[:11]) == run
    table, said = warned(store.table)
    assert table["seed"].tolist() == [0, 1]
    assert len(said) == 1
    assert f"{run.id}.bak holds a model, and a run's folder is called by its id" in said[0]
    counted("foreign neighbours: what is no run", 1 + 2 * len(ODD))


def test_a_folder_that_may_not_be_looked_into_stops_nothing(tmp_path, trained, monkeypatch, counted):
    store = stocked(tmp_path / "store", trained, 2)
    closed, stat = str(store.root / tiny(seed=1).id), os.stat

    def refused(path, **how):
        if str(path).startswith(f"{closed}{os.sep}"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", refused)
    assert warned(store.table)[0]["seed"].tolist() == [0]
    assert store.find(tiny(seed=1)) is None
    assert store.find(tiny()).experiment == tiny()
    counted("damaged neighbours: a closed folder", 1)


def test_what_an_unfinished_run_has_damaged_is_named(tmp_path, trained, counted):
    store = stocked(tmp_path / "store", trained, 1)
    for seed, text in ((1, "[" * 100_000), (2, json.dumps(tiny(seed=2).settings()))):
        work = store.root / ".training" / tiny(seed=seed).id
        work.mkdir(parents=True)
        (work / "settings.json").write_text(text)
    (store.root / ".training" / "notes.txt").write_text("")
    (store.root / ".training" / tiny(seed=3).id).mkdir()
    table, said = warned(store.table)
    assert table["state"].tolist() == ["finished", "interrupted"]
    assert len(said) == 1
    assert tiny(seed=1).id in said[0]
    (store.root / ".training" / tiny(seed=2).id / "failed.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match="failed.json is damaged"):
        store.failure(tiny(seed=2))
    counted("damaged neighbours: unfinished", 2)


def test_a_run_that_was_finished_and_not_tidied_is_listed_once(tmp_path, trained):
    store = stocked(tmp_path / "store", trained, 1)
    work = store.root / ".training" / tiny().id
    work.mkdir(parents=True)
    (work / "settings.json").write_text(json.dumps(tiny().settings()))
    assert store.table()["state"].tolist() == ["finished"]


@pytest.mark.parametrize("name", ODD)
def test_a_store_of_any_name_trains_finds_and_sweeps(name, tmp_path, counted):
    store = Store(tmp_path / name)
    run = ensure(tiny(), store, progress=False)
    assert (store.find(tiny()), store.open(run.id[:6]), store.runs()) == (run, run, [run])
    assert store.table()["state"].tolist() == ["finished"]
    left = tmp_path / name / f".{name}.1-abc.part"
    left.write_text("half")
    os.utime(left, (0, 0))
    files.write(tmp_path / name / name, "whole")
    assert not left.exists()
    counted(f"odd names of a store: {name}", 1)


def test_links_in_a_run_are_not_followed_when_it_is_copied(tmp_path, trained, counted):
    store = stocked(tmp_path / "store", trained, 2)
    good, odd = store.open(tiny().id), store.open(tiny(seed=1).id)
    (tmp_path / "secret").write_text("secret")
    (good.path / "notes").symlink_to(tmp_path / "secret")
    (odd.path / "history.csv").unlink()
    (odd.path / "history.csv").symlink_to(tmp_path / "secret")
    assert publishing.copy(good, tmp_path / "beside") == tmp_path / "beside" / good.id
    copied, said = warned(lambda: publishing.copy(odd, tmp_path / "beside"))
    assert copied is None
    assert said == [f"not copied: {odd.path / 'history.csv'} is a link"]
    assert [path.name for path in (tmp_path / "beside").iterdir()] == [good.id]
    assert {path.name for path in (tmp_path / "beside" / good.id).iterdir()} == set(cb.runs.store.CONTENT)
    assert Run.open(tmp_path / "beside" / good.id).experiment == tiny()
    counted("links in a run", 2)


# Locks


def holding(path, then="time.sleep(120)"):
    """Start a process that holds a lock; return it when it does."""
    code = f"""
import sys, time
from pathlib import Path
from cram_bench.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    {then}
"""
    call = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "held\n"
    return process


@contextlib.contextmanager
def held(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    process = holding(path)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@needs_proc
def test_who_waits_for_a_stopped_process_says_for_whom_and_not_for_ever(tmp_path, capsys, counted):
    store = Store()
    work = store.root / ".training" / tiny().id
    work.mkdir(parents=True)
    (work / "settings.json").write_text(json.dumps(tiny().settings()))
    with held(store.root / ".locks" / f"{tiny().id}.lock") as process:
        assert store.table()["state"].tolist() == ["training"]
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        whom = (
            rf"process {process.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC, which is stopped: kill -CONT"
        )
        assert cli.main(["train", "--epochs", "1", "--wait", "0.5"]) == 1
        said = capsys.readouterr().err.splitlines()
        assert re.match(f"waiting for the process that trains {tiny().id}: {whom}", said[0])
        assert re.match(f"cram-bench: {tiny().id} is being trained by {whom}.*; waited 0.5 s for it", said[1])
        assert len(said) == 2
        assert cli.main(["runs"]) == 0
        line = capsys.readouterr().out.splitlines()[1]
        assert "stopped" in line
        assert re.search(whom, line)
        process.send_signal(signal.SIGCONT)
    assert store.table()["state"].tolist() == ["interrupted"]
    assert "holder" not in (cli.main(["runs"]), capsys.readouterr().out)[1]
    counted("stopped holders", 1)


def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_stays(tmp_path, capsys, counted):
    store, kept = Store(), tmp_path / "thesis.tex"
    kept.write_text("years of work")
    path = store.root / ".locks" / f"{tiny().id}.lock"
    path.parent.mkdir(parents=True)
    path.symlink_to(kept)
    assert cli.main(["train", "--epochs", "1"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "it is a link, and a lock must be a file: delete it" in said
    assert path.name in said
    with pytest.raises(OSError, match="it is a link"):
        holder(path)
    assert kept.read_text() == "years of work"
    counted("locks that are links", 1)


@pytest.mark.parametrize("code", ["ENOLCK", "ENOTSUP", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_one_line_that_says_what_to_do(code, monkeypatch, capsys, counted):
    def none(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", none)
    assert cli.main(["train", "--epochs", "1"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "has no locks" in said
    assert "set CRAM_BENCH_RUNS to a folder" in said
    counted(f"no locks: {code}", 1)


def test_a_lock_whose_file_is_removed_is_not_held_any_more(tmp_path, counted):
    path = tmp_path / "lock"
    with locked(path) as lock:
        assert lock.held()
        assert holder(path).pid == os.getpid()
        path.unlink()
        assert not lock.held()
        with locked(path, wait=0) as other:
            assert other.held()
            assert not lock.held()
            with pytest.raises(HeldError), locked(path, wait=0):
                pass
        path.unlink()
    assert holder(path) is None
    assert not path.exists()  # a look makes no file
    counted("locks removed: while held", 2)


def test_who_waits_while_the_lock_is_removed_gets_one_that_holds(tmp_path, counted):
    path, got = tmp_path / "lock", []

    def waits():
        with locked(path, wait=60) as lock:
            got.append(lock.held())

    with held(path):
        thread = threading.Thread(target=waits)
        thread.start()
        time.sleep(0.1)
        path.unlink()
        thread.join()
    assert got == [True]
    counted("locks removed: while waited for", 1)


def test_a_lock_file_removed_between_opening_and_locking_is_not_taken_for_one(tmp_path, monkeypatch, counted):
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def late(file, kind):
        if not calls:
            path.unlink()
        calls.append(kind)
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path, wait=0) as lock:
        assert lock.held()
    assert len(calls) == 2
    counted("locks removed: before it is held", 1)


@pytest.mark.parametrize("hours", [1, 5])
def test_a_clock_that_is_ahead_deletes_nobodys_work(hours, tmp_path, monkeypatch, counted):
    other = tmp_path / ".table.csv.1-abc.part"
    other.write_text("being written")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
    files.write(tmp_path / "table.csv", "a\n")
    assert other.exists()
    counted(f"clocks ahead: {hours} hours", 1)


TRAINS = """
import sys, time
from pathlib import Path
from cram_bench.recipes import recipe
from cram_bench.runs import Checkpoint, Store, ensure
written, (store, seen, go, left) = Checkpoint.on_epoch, sys.argv[1:]
def on_epoch(self, fit):
    written(self, fit)
    Path(seen).write_text(str(fit.epoch))
    while fit.epoch == 1 and not Path(go).exists():
        time.sleep(0.02)
Checkpoint.on_epoch = on_epoch
run = ensure(recipe("digits", epochs=2), Store(store), progress=False)
run.load_model()
print(run.path.name)
"""


@pytest.mark.parametrize("slower", [0, 1], ids=["the first", "the second"])
def test_two_processes_on_one_run_both_end_with_it(slower, tmp_path, counted):
    """Somebody removes the lock of a training; another process begins the same run. Whoever is slower loses nothing."""
    store, wanted = Store(tmp_path / "store"), recipe("digits", epochs=2)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = []

    def there(path, seconds=120):
        limit = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < limit, [each.poll() for each in both]
            time.sleep(0.02)

    try:
        for number in range(2):
            call = [sys.executable, "-c", TRAINS, store.root, *(tmp_path / f"{n}{number}" for n in ("seen", "go", "x"))]
            both.append(
                subprocess.Popen(
                    [str(each) for each in call],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            there(tmp_path / f"seen{number}")
            if number == 0:
                (store.root / ".locks" / f"{wanted.id}.lock").unlink()
                (store.root / ".training" / wanted.id / "checkpoint.pt").unlink()
        said = {}
        for number in (1 - slower, slower):
            (tmp_path / f"go{number}").touch()
            said[number] = both[number].communicate(timeout=120)
            assert both[number].returncode == 0, said[number]
            if number != slower:
                weights = (store.root / wanted.id / "model.safetensors").stat().st_ino
                left = store.root / ".training" / wanted.id / "checkpoint.pt"
                assert left.exists() == (slower == 1)  # of the second, which holds the lock that there is
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert {out.strip() for out, _ in said.values()} == {wanted.id}
    assert ["was removed while this process trained" in said[number][1] for number in range(2)] == [True, False]
    assert "first; its run is kept, and this one's is left out" in said[slower][1]
    assert (store.root / wanted.id / "model.safetensors").stat().st_ino == weights
    assert store.table()["state"].tolist() == ["finished"]
    assert not list((store.root / ".training").iterdir())
    straight = ensure(wanted, Store(tmp_path / "straight"), progress=False)
    assert (store.find(wanted).path / "model.safetensors").read_bytes() == (
        straight.path / "model.safetensors"
    ).read_bytes()
    counted(f"locks removed: while two train, slower {slower}", 1)


def test_a_sweep_whose_lock_is_removed_ends_in_one_line(tmp_path, counted):
    from cram_bench.executors import SweepError

    class Removes:
        every = 0.0

        def attach(self):
            return {}

        def room(self):
            (Store().root / ".sweeps" / "sweep" / "lock").unlink(missing_ok=True)
            return 0

        def close(self, settled):
            return ""

    with pytest.raises(SweepError, match="somebody removed .*lock, which keeps other commands out"):
        cb.sweep.run([tiny()], Store(), Removes())
    counted("locks removed: of a sweep", 1)


# Size


class Touched:
    """Files opened and folders listed below a path while it is on."""

    def __init__(self):
        self.root, self.files, self.folders = None, [], []
        sys.addaudithook(self._note)

    def _note(self, event, arguments):
        if self.root and event in ("open", "os.scandir", "os.listdir") and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            if isinstance(path, str) and path.startswith(self.root):
                (self.files if event == "open" else self.folders).append(os.path.relpath(path, self.root))

    def __call__(self, root, work):
        self.root, self.files, self.folders = str(root), [], []
        try:
            return work()
        finally:
            self.root = None


@pytest.fixture(scope="session")
def touched():
    return Touched()


def test_what_is_asked_for_is_opened_and_nothing_else(tmp_path, trained, touched):
    store = stocked(tmp_path / "store", trained, 300)
    there, absent = tiny(seed=57), tiny(seed=999)
    assert store.find(absent) is None  # looks at all, and remembers
    for fresh in (True, False):  # by a new process, and again
        aged(store)
        store.find(absent)
        index._known.clear()
        if not fresh:
            store.find(absent)
        assert touched(store.root, lambda: store.find(absent)) is None
        assert touched.files == ([f".index/names-{index.version()}.json"] if fresh else [])
        assert touched.folders == []
        assert touched(store.root, lambda: store.find(there)).experiment == there
        assert {Path(name).parent.name for name in touched.files} == {there.id}
        assert len(touched.files) == 2
        assert touched(store.root, lambda: store.open(there.id)).experiment == there
        assert len(touched.files) == 2
        assert touched.folders == []
        assert touched(store.root, lambda: store.open(there.id[:9])).experiment == there
        assert {Path(name).parent.name for name in touched.files} == {there.id}
        assert touched.folders == []
    copy(trained, store, 300)  # a new one is the only one that is read
    assert touched(store.root, lambda: store.find(absent)) is None
    assert [name for name in touched.files if not name.startswith(".index/")] == [f"{tiny(seed=300).id}/settings.json"]


def test_a_table_reads_only_what_has_changed(tmp_path, trained, touched):
    store = stocked(tmp_path / "store", trained, 60)
    before = aged(store).table()
    assert len(before) == 60
    for memory in (False, True):
        if not memory:
            index._rows.clear()
        assert touched(store.root, store.table).equals(before)
        opened = [f".index/rows-{index.version()}.jsonl", ".index/versions.json"]
        assert sorted(touched.files) == ([] if memory else opened)
    assert cb.sweep.table([tiny(seed=seed) for seed in range(60)], store)["epoch"].tolist() == [1] * 60
    runs = store.runs()
    assert touched(store.root, lambda: cb.runs.summary(runs))["run"].tolist() == [run.id for run in runs]
    assert touched.files == []
    changed = store.root / tiny(seed=7).id
    content = (changed / "environment.json").read_text()
    (changed / "environment.json").write_text(content.replace('"seconds"', '"minutes"'))
    table, said = warned(lambda: touched(store.root, store.table))
    assert len(table) == 59
    assert [changed.name in line for line in said] == [True]
    assert {Path(name).parent.name for name in touched.files} == {changed.name}


def index_files(store):
    return sorted(path for path in (store.root / ".index").iterdir() if path.name != "versions.json")


def seeds(store):
    index._known.clear(), index._rows.clear()
    assert store.find(tiny(seed=999)) is None
    return store.table()["seed"].tolist()


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff" * 99, b"[" * 100_000, b"00000000 [1, 2]", None])
def test_an_index_that_is_damaged_or_gone_is_built_anew(damage, tmp_path, trained, touched, counted):
    store = aged(stocked(tmp_path / "store", trained, 40))
    expected = seeds(store)
    assert expected == sorted(range(40), key=str)
    for path in index_files(store):
        path.unlink() if damage is None else path.write_bytes(damage)
    assert seeds(store) == expected
    for path in index_files(store):  # in the middle of a line
        path.write_bytes(path.read_bytes()[:-200])
    copy(trained, store, 40)
    aged(store)
    assert seeds(store) == sorted(range(41), key=str)
    assert touched(store.root, lambda: seeds(store)) == sorted(range(41), key=str)
    assert {Path(name).parent.name for name in touched.files} == {".index"}
    counted(f"damaged index: {damage and damage[:16]}", 2)  # and in the middle of a line


def test_a_run_that_went_or_came_under_another_name_is_noticed(tmp_path, trained):
    store = aged(stocked(tmp_path / "store", trained, 40))
    assert len(seeds(store)) == 40
    os.rename(store.root / tiny(seed=3).id, store.root / "0123456789ab")
    for _ in range(2):
        index._known.clear()
        run = store.find(tiny(seed=3))
        assert run.path.name == "0123456789ab"
        assert store.open(tiny(seed=3).id) == store.open(tiny(seed=3).id[:8]) == store.open("0123456789") == run
    half = store.root / tiny(seed=50).id
    half.mkdir()  # being copied from elsewhere, the settings last
    assert aged(store).find(tiny(seed=51)) is None
    source = copy(trained, Store(tmp_path), 51)
    for name in cb.runs.store.CONTENT:
        os.link(source / name, half / name)
    assert store.find(tiny(seed=51)).path == half  # though the store's own folder has not changed since
    for path in (run.path, half):
        os.rename(path, tmp_path / path.name)
    assert store.find(tiny(seed=3)) is None
    assert store.find(tiny(seed=51)) is None


def test_a_change_in_the_same_tick_of_the_clock_is_noticed(tmp_path, trained):
    """A file system's clock may stand still for some milliseconds: what changed just now may change again unseen."""
    store = stocked(tmp_path / "store", trained, 40)
    assert store.find(tiny(seed=999)) is None  # the index makes its folder
    now = time.time_ns()
    os.utime(store.root, ns=(now, now))
    assert store.find(tiny(seed=999)) is None
    assert len(store.table()) == 40
    os.rename(store.root / tiny(seed=3).id, store.root / "0123456789ab")
    os.utime(store.root, ns=(now, now))
    for fresh in (False, True):
        if fresh:
            index._known.clear()
        assert store.find(tiny(seed=3)).path.name == "0123456789ab"
    file = store.root / tiny(seed=4).id / "environment.json"
    before = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace('"seconds"', '"minutes"'))
    os.utime(file, ns=(before, before))
    table, said = warned(store.table)
    assert len(table) == 39
    assert len(said) == 1


def test_two_versions_side_by_side_keep_an_index_each(tmp_path, trained, monkeypatch):
    store = aged(stocked(tmp_path / "store", trained, 40))
    expected = seeds(store)
    for version in ("another", index.version()):
        monkeypatch.setattr(index, "version", lambda version=version: version)
        assert seeds(store) == expected
    assert len(index_files(store)) == 4


LISTS = """
import contextlib, io, json, os, sys
os.environ["CRAM_BENCH_RUNS"] = sys.argv[1]
from cram_bench.cli import main
with contextlib.redirect_stdout(io.StringIO()) as said:
    assert main(["runs", "--csv"]) == 0
print(json.dumps([said.getvalue(), "torch" in sys.modules]))
"""


def listed(store):
    """Return what `cram-bench runs --csv` prints in a process of its own, and whether that loaded torch."""
    call = [sys.executable, "-c", LISTS, str(store.root)]
    said = subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    return json.loads(said.stdout)


def test_known_runs_are_listed_without_torch(tmp_path, trained):
    store = stocked(tmp_path / "store", trained, 40)
    for seed, name in ((90, "checkpoint.pt"), (91, "failed.json")):
        begun = store.root / ".training" / tiny(seed=seed).id
        begun.mkdir(parents=True)
        (begun / "settings.json").write_text(json.dumps(tiny(seed=seed).settings()))
        (begun / name).write_text('{"reason": "diverged"}')
    aged(store)
    for path in store.root.glob(".training/*/*"):
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    expected, torch_too = listed(store)
    assert torch_too
    assert expected.count("finished") == 40
    assert expected.count("interrupted") == expected.count("failed") == 1
    assert listed(store) == [expected, False]

    versions = store.root / ".index" / "versions.json"
    for damage in (b"", b"00000000 {}", b"\xff"):  # read again, and noted again
        versions.write_bytes(damage)
        assert listed(store) == [expected, True]
        assert listed(store) == [expected, False]


def test_the_version_of_another_source_or_of_parts_of_ones_own_is_not_taken(tmp_path, trained, monkeypatch):
    store = aged(stocked(tmp_path / "store", trained, 40))
    versions = store.root / ".index" / "versions.json"
    monkeypatch.setattr(index, "source", lambda: "another")
    monkeypatch.setattr(index, "_only_ours", lambda: False)
    assert len(store.table()) == 40
    assert len(store.table()) == 40
    assert not versions.exists()
    monkeypatch.setattr(index, "_only_ours", lambda: True)
    assert seeds(store) == sorted(range(40), key=str)
    assert json.loads(versions.read_text().partition(" ")[2]) == {"another": index.version()}
    monkeypatch.undo()
    assert listed(store)[1]
    assert json.loads(versions.read_text().partition(" ")[2]) == {
        "another": index.version(),
        index.source(): index.version(),
    }


def test_a_store_that_cannot_be_written_is_indexed_in_memory(tmp_path, trained, monkeypatch, touched):
    store = aged(stocked(tmp_path / "store", trained, 40))

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    assert len(store.table()) == 40
    touched(store.root, store.table)
    assert touched.files == []
    assert not (store.root / ".index").exists()


LOOKS = """
import sys
from cram_bench.recipes import recipe
from cram_bench.runs import Store
store = Store(sys.argv[1])
for seed in range(900, 930):
    store.find(recipe("digits", epochs=1, seed=seed))
    store.table()
"""


def test_writers_at_once_leave_an_index_that_is_right(tmp_path, trained, counted):
    store = aged(stocked(tmp_path / "store", trained, 40))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", LOOKS, str(store.root)]
    writers = [subprocess.Popen(call, env=environment) for _ in range(4)]
    for seed in range(40, 60):
        copy(trained, store, seed)
        assert store.find(tiny(seed=seed)).experiment.seed == seed
    assert [writer.wait(timeout=300) for writer in writers] == [0] * 4
    assert seeds(store) == sorted(range(60), key=str)
    assert seeds(store) == sorted(range(60), key=str)
    counted("writers of the index at once", len(writers) + 1)


def test_a_fabricated_store_is_of_real_runs(tmp_path):
    store = fabricate(tmp_path / "store", 3)
    assert [run.experiment.seed for run in store.runs()] == [0, 1, 2]
    for run in store.runs():
        run.load_model()
    assert store.table()["state"].tolist() == ["finished"] * 3


# Pickles


def test_pickles_of_a_sweep_are_their_owners_alone(tmp_path, monkeypatch):
    from cram_bench import executors

    folder = executors.worker.private(tmp_path / "sweep" / "logs")
    assert folder.stat().st_mode & 0o777 == 0o700
    pickled = folder / "7_submitted.pkl"
    pickled.write_bytes(b"")
    executors.worker.check_own(pickled)
    (folder / "link.pkl").symlink_to(pickled)
    with pytest.raises(executors.SweepError, match="link.pkl is a link, and pickles in it may run anything"):
        executors.worker.check_own(folder / "link.pkl")
    monkeypatch.setattr(os, "geteuid", lambda: pickled.stat().st_uid + 1)
    with pytest.raises(executors.SweepError, match="belongs to another user, number"):
        executors.worker.check_own(pickled)
    monkeypatch.undo()
    folder.chmod(0o770)
    with pytest.raises(executors.SweepError, match=r"can be entered by others than its owner \(mode 770\)"):
        executors.worker.private(folder)


def test_a_worker_does_not_read_a_pickle_in_a_folder_that_others_can_enter(tmp_path):
    import cloudpickle

    folder = tmp_path / "logs"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "7_submitted.pkl").write_bytes(cloudpickle.dumps(exec))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7",
                                "SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_LOCALID": "0"}  # fmt: skip
    call = [sys.executable, "-m", "cram_bench.executors", "-u", "-m", "submitit.core._submit", str(folder)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "can be entered by others than its owner (mode 777)" in done.stderr.splitlines()[-1]
    assert "Loading pickle" not in done.stdout + done.stderr
