"""Kill, fill, forbid, damage: nothing is lost and nothing half-written is trusted."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings

import cloudpickle
import nbformat
import pandas as pd
import pytest
import torch

import cram_bench as cb
from benchmarks.store import copy
from cram_bench import files, report, runs
from cram_bench.recipes import recipe
from cram_bench.report import execute
from cram_bench.runs import RunError, Store, ensure, ensure_all

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is needed")
ROUNDS = int(os.environ.get("CRAM_BENCH_TEST_ROUNDS", 20))  # least kills at random times
WANTED = recipe("digits", "cram+-multi", epochs=4, plain=0.25)
NAMES = (str, bytes, os.PathLike)
FINISHED = {"settings.json", "history.csv", "model.safetensors", "environment.json"}


# Forked from a server that has never computed: a fork of this process, after other tests have used OpenMP's threads,
# waits for threads that it does not have.
PROCESSES = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None


def called(work, environment):
    """Call what `work` was before it was pickled, as a process of this environment and without a word."""
    os.environ.clear()
    os.environ.update(environment)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        try:
            cloudpickle.loads(work)()
        except BaseException:
            os._exit(1)


def child(work):
    """Run `work` in a process of its own; return the process."""
    PROCESSES.set_forkserver_preload(
        [
            "pytest",
            "cram_bench.report.building",
            "cram_bench.runs.training",
            "sklearn.datasets",
            "torchvision",
            "torch._dynamo",
        ]
    )
    process = PROCESSES.Process(target=called, args=(cloudpickle.dumps(work), dict(os.environ)))
    process.start()
    return process


def is_in(folder, event, arguments):
    """Tell whether an audit event is about opening, renaming or removing something in `folder`."""
    events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
    return event in events and any(str(folder) in os.fsdecode(name) for name in arguments if isinstance(name, NAMES))


def dies_at(step, folder):
    """Kill this process just before it opens, renames or removes something in `folder` for the `step`-th time."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if is_in(folder, event, arguments):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def dying(step, folder, work, *arguments, **options):
    """Call `work` in a process that dies at `step`; return its exit status."""
    return ended(child(lambda: (dies_at(step, folder), work(*arguments, **options))))


def touches(folder, work, *arguments):
    """Call `work` in a process; return how often it opened, renamed or removed something in `folder`."""
    note = folder.with_name(f"{folder.name} touched")

    def counted():
        touched = []
        sys.addaudithook(lambda event, names: touched.append(1) if is_in(folder, event, names) else None)
        work(*arguments)
        note.write_text(str(len(touched)))

    assert ended(child(counted)) == 0
    return int(note.read_text())


def ended(process):
    """Wait for a process; return its exit status, or minus the signal that killed it."""
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights and the history of a training that nothing disturbed."""
    run = ensure(WANTED, Store(tmp_path_factory.mktemp("straight")), threads=1, progress=False)
    return (run.path / "model.safetensors").read_bytes(), run.history.drop(columns="seconds")


def bytes_lost(path, expected):
    """How many bytes of a file are not those expected."""
    found = path.read_bytes()
    return sum(one != other for one, other in zip(found, expected, strict=False)) + abs(len(found) - len(expected))


def check(store, straight):
    """The store holds the run, whole and equal to the undisturbed one, and nothing else."""
    run = store.find(WANTED)
    assert {path.name for path in run.path.iterdir()} == FINISHED
    assert bytes_lost(run.path / "model.safetensors", straight[0]) == 0
    pd.testing.assert_frame_equal(run.history.drop(columns="seconds"), straight[1])
    run.load_model()
    assert store.table()["state"].tolist() == ["finished"]


def test_a_training_killed_before_every_single_change_of_a_file(tmp_path, straight, counted):
    kills = 0
    for step in range(1, 1000):
        store = Store(tmp_path / str(step))
        if dying(step, store.root, ensure, WANTED, store, threads=1) == 0:
            check(store, straight)
            break
        kills += 1
        if run := store.find(WANTED):  # killed after the run had its name
            assert {path.name for path in run.path.iterdir()} == FINISHED
        else:
            assert set(store.table()["state"]) <= {"interrupted"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is found damaged
            ensure(WANTED, store, threads=1, progress=False)
        check(store, straight)
        shutil.rmtree(store.root)
    assert kills > 40
    counted("kills before a change of a file", kills)


def test_a_training_killed_again_and_again_at_random(tmp_path, straight, counted):
    store, dice, kills, lost = Store(tmp_path / "store"), random.Random(0), 0, 0
    begin = time.monotonic()
    Store(tmp_path / "measure")
    assert ended(child(lambda: ensure(WANTED, Store(tmp_path / "measure"), threads=1))) == 0
    whole = time.monotonic() - begin
    while kills < ROUNDS:
        reached = 0
        for _ in range(200):
            process = child(lambda: ensure(WANTED, store, threads=1))
            time.sleep(dice.uniform(0, whole))
            process.kill()
            if ended(process) == 0:
                break
            kills += 1
            assert store.find(WANTED) is None or {p.name for p in store.find(WANTED).path.iterdir()} == FINISHED
            checkpoint = store.root / ".training" / WANTED.id / "checkpoint.pt"
            if checkpoint.exists():  # no epoch that was finished is lost
                epoch = torch.load(checkpoint, weights_only=True)["epoch"]
                assert epoch >= reached
                reached = epoch
        ensure(WANTED, store, threads=1, progress=False)
        lost += bytes_lost(store.find(WANTED).path / "model.safetensors", straight[0])
        check(store, straight)
        shutil.rmtree(store.root)
    counted("kills at random times", kills)
    counted("bytes lost", lost)


def test_a_killed_process_does_not_hold_its_lock(tmp_path):
    store = Store(tmp_path / "store")

    def holds():
        with store.lock(WANTED):
            time.sleep(60)

    process = child(holds)
    while store.holder(WANTED.id) is None:
        time.sleep(0.001)
    process.kill()
    ended(process)
    with store.lock(WANTED):
        pass


def test_eight_processes_with_overlapping_experiments_train_each_once(tmp_path, counted):
    experiments = [recipe("digits", method, epochs=1, seed=seed) for method in ("sgd", "cram+") for seed in range(4)]
    experiments.append(recipe("digits", epochs=1, lr=1e30))
    serial = Store(tmp_path / "serial")
    ensure_all(experiments, serial, threads=1, progress=False)
    store, log = Store(tmp_path / "store"), tmp_path / "log"
    fit = runs.training.fit

    def noted(*arguments, **options):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return fit(*arguments, **options)

    def asks(number):
        runs.training.fit = noted
        order = random.Random(number).sample(experiments, 7)
        ensure_all(order, store, threads=1)

    processes = [child(lambda number=number: asks(number)) for number in range(8)]
    while not log.exists() or not log.read_text().endswith("\n"):
        time.sleep(0.001)
    first = int(log.read_text().split()[0])  # it trains, and the others wait for it or train something else
    os.kill(first, signal.SIGKILL)
    for process in processes:
        assert ended(process) == (-signal.SIGKILL if process.pid == first else 0)
    ensure_all(experiments, store, threads=1, progress=False)
    trained = len(log.read_text().splitlines())
    assert trained == len(experiments) + 1  # what the killed one had begun was begun again
    counted("processes at once", len(processes))
    pd.testing.assert_frame_equal(store.table(), serial.table())
    for run in serial.runs():
        assert (store.find(run.experiment).path / "model.safetensors").read_bytes() == (
            run.path / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("name", sorted(FINISHED))
def test_a_flipped_bit_is_noticed_and_named(name, counted):
    run = ensure(WANTED, threads=1, progress=False)
    file, dice = run.path / name, random.Random(1)
    content = file.read_bytes()
    for _ in range(60):
        place, bit = dice.randrange(len(content)), dice.randrange(8)
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        file.write_bytes(bytes(damaged))
        said = ""
        try:
            opened = runs.Run.open(run.path)
            opened.history, opened.load_model()
        except RunError as error:
            said = str(error)
        if said:
            assert f"{file} is damaged" in said
            assert "\n" not in said
        else:  # a blank of JSON, without a meaning
            assert name == "environment.json"
            assert json.loads(damaged) == json.loads(content)
    counted(f"bits flipped: {name}", 60)


def test_a_full_disk_leaves_the_store_intact(tmp_path, straight, capfd, counted):
    """A limit on the size of files stands in for the disk: the same call fails at the same place."""
    store = Store(tmp_path / "store")
    checkpoint = store.root / ".training" / WANTED.id / "checkpoint.pt"

    def stopped():
        written = runs.Checkpoint.on_epoch
        runs.Checkpoint.on_epoch = lambda *arguments: (written(*arguments), os.kill(os.getpid(), signal.SIGKILL))
        ensure(WANTED, store, threads=1)

    assert ended(child(stopped)) == -signal.SIGKILL
    before = checkpoint.read_bytes()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        command = ["train", "--method", "cram+-multi", "--epochs", "4", "-s", "plain", "0.25", "--threads", "1"]
        os.environ["CRAM_BENCH_RUNS"] = str(store.root)
        with open(tmp_path / "said", "w", buffering=1) as said, contextlib.redirect_stderr(said):
            assert cb.cli.main(command) == 1

    assert ended(child(limited)) == 0
    said = (tmp_path / "said").read_text().splitlines()[-1]
    assert said == f"cram-bench: File too large; nothing was changed: '{checkpoint}'"
    assert checkpoint.read_bytes() == before
    assert not list(store.root.rglob("*.part"))
    ensure(WANTED, store, threads=1, progress=False)
    check(store, straight)
    counted("full disks", 1)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
def test_a_store_that_may_only_be_read(tmp_path, counted):
    run = ensure(WANTED, Store(tmp_path / "store"), threads=1, progress=False)
    folders = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
    above = list(tmp_path.parents)[:3]
    modes = {path: path.stat().st_mode for path in (tmp_path, *above)}

    def asks():
        cb.data.load("digits")
        ensure(WANTED, Store(tmp_path / "store")).load_model()  # what is imported late may be out of reach afterwards
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        store = Store(tmp_path / "store")
        assert ensure(WANTED, store) == run  # what is there is read
        run.load_model()
        with pytest.raises(OSError, match="the run store cannot be written: Permission denied; set CRAM_BENCH_RUNS"):
            ensure(recipe("digits", epochs=1), store)

    try:
        for path in modes:
            if path.owner() == tmp_path.owner() and path != path.parent:
                with contextlib.suppress(OSError):
                    path.chmod(path.stat().st_mode | 0o055)
        for path in folders:
            path.chmod(0o555 if path.is_dir() else 0o444)
        assert ended(child(asks)) == 0
        counted("stores that may only be read", 1)
    finally:
        for path in folders:
            path.chmod(0o755 if path.is_dir() else 0o644)
        for path, mode in modes.items():
            with contextlib.suppress(OSError):
                path.chmod(mode)


def test_a_checkpoint_of_another_training_is_refused(tmp_path, straight):
    store = Store(tmp_path / "store")
    work = store.root / ".training" / WANTED.id
    work.mkdir(parents=True)
    model = WANTED.build_model(cb.data.load("digits")[0])
    wrong = {"model": {name: value * 0 for name, value in model.state_dict().items()}, "optimizer": {"nothing": 1}}
    torch.save(wrong, work / "plain.pt")
    content = (work / "plain.pt").read_bytes()
    (work / "checkpoint.pt").write_bytes(content + hashlib.sha256(content).digest())
    (work / "plain.pt").unlink()
    with pytest.raises(RunError, match=r"checkpoint.pt is of another training, delete it to start anew"):
        ensure(WANTED, store, threads=1, progress=False)
    (work / "checkpoint.pt").unlink()
    ensure(WANTED, store, threads=1, progress=False)
    check(store, straight)


def test_a_cache_of_images_killed_anywhere_is_built_again(tmp_path, monkeypatch, counted):
    from PIL import Image

    dice = random.Random(0)
    for split in ("train", "test"):
        for label in ("day", "night"):
            (tmp_path / "sky" / split / label).mkdir(parents=True)
            for index in range(3):
                Image.new("L", (8, 8), dice.randrange(256)).save(tmp_path / "sky" / split / label / f"{index}.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plain"))
    expected = cb.data.load(tmp_path / "sky")[0].images
    for step in range(1, 50):
        cache = tmp_path / f"cache{step}"
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        status = dying(step, cache, cb.data.load, tmp_path / "sky")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(cb.data.load(tmp_path / "sky")[0].images, expected)
            assert torch.equal(cb.data.load(tmp_path / "sky")[0].images, expected)
        if status == 0:
            break
    assert status == 0
    assert step > 3
    counted("kills of a cache", step - 1)


def test_a_writer_of_the_index_killed_anywhere_leaves_one_that_is_right(tmp_path, counted):
    store = Store(tmp_path / "store")
    source = ensure(recipe("digits", epochs=1), store, progress=False)
    for seed in range(1, 40):
        copy(source, store, seed)
    then = time.time() - 60
    for path in (store.root, *store.root.glob("[0-9a-f]*"), *store.root.glob("[0-9a-f]*/*")):
        os.utime(path, (then, then))  # what changed just now is not relied on

    def looks(half=False):
        write = os.write

        def written(file, data):
            if half and len(data) > 1000:
                write(file, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, data)

        os.write = written
        looked = Store(store.root)
        looked.find(recipe("digits", epochs=9))
        looked.table()

    expected, kills = store.table(), 0
    for step in range(40):
        shutil.rmtree(store.root / ".index", ignore_errors=True)
        status = dying(step, store.root / ".index", looks, half=step == 0)
        for memory in (runs.index._known, runs.index._rows):
            memory.clear()
        assert store.find(recipe("digits", epochs=9)) is None
        pd.testing.assert_frame_equal(store.table(), expected)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert 6 < kills < 39
    assert {path.suffix for path in (store.root / ".index").iterdir()} == {".json", ".jsonl"}
    counted("kills of a writer of the index", kills)


def test_what_a_killed_writer_left_is_removed_later(tmp_path):
    left = tmp_path / ".table.csv.1-abc.part"
    left.write_text("half")
    files.write(tmp_path / "table.csv", "a\n")
    assert left.exists()  # it may belong to a process that still writes
    os.utime(left, (0, 0))
    files.write(tmp_path / "table.csv", "b\n")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_report_killed_in_the_middle_is_made_whole(tmp_path, counted):
    small = {"epochs": 1, "sparsities": [0.5], "methods": ["sgd"]}
    options = {"questions": ["accuracy_vs_sparsity"], "progress": False}

    def build(reports):
        return report.build("digits", "quick", 1, small, reports=reports, **options)

    count = touches(tmp_path / "straight", build, tmp_path / "straight")
    (straight,) = (path for path in (tmp_path / "straight").iterdir() if path.is_dir())
    expected = {path.relative_to(straight) for path in straight.rglob("*") if path.is_file()}
    steps = (count // 2, count - 3)
    for step in steps:
        reports = tmp_path / str(step)
        assert dying(step, reports, build, reports) == -signal.SIGKILL
        whole = build(reports).folder
        found = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
        assert {path for path in found if path.suffix != ".part"} == expected  # what a killed writer left goes later
        for name in ("accuracy_vs_sparsity.csv", "accuracy_summary.csv"):
            assert (whole / "tables" / name).read_bytes() == (straight / "tables" / name).read_bytes()
    counted("kills of a report", len(steps))


def test_a_notebook_killed_while_it_is_kept_is_executed_again(tmp_path, counted):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")]), tmp_path / "sum.ipynb")
    notebook = execute.Job(tmp_path / "sum.ipynb", {}, "key")

    (tmp_path / "straight").mkdir()
    count = touches(tmp_path / "straight", execute._execute, notebook, tmp_path / "straight")
    steps = range(count, max(0, count - 12), -3)  # the executed notebook, its page, the note that both are there
    for step in steps:
        (out := tmp_path / f"out{step}").mkdir()
        assert dying(step, out, execute._execute, notebook, out) == -signal.SIGKILL
        assert execute.execute_all([notebook], out) == {}
        left = {
            path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path.suffix != ".part"
        }
        assert left == {"sum.ipynb", "sum.html", ".done/sum.json"}
        assert "2" in (out / "sum.html").read_text()
    counted("kills of a notebook", len(steps))


def test_a_worker_that_outlives_a_killed_training_does_not_hold_its_lock(tmp_path):
    store = Store(tmp_path / "store")
    said = tmp_path / "worker"

    def holds():
        with store.lock(WANTED):
            if (worker := os.fork()) == 0:
                time.sleep(60)
                os._exit(0)
            said.write_text(f"{worker}\n")
            time.sleep(60)

    process = child(holds)
    while not said.exists() or not said.read_text().endswith("\n"):
        time.sleep(0.001)
    worker = int(said.read_text())
    process.kill()
    ended(process)
    try:
        assert store.holder(WANTED.id) is None
    finally:
        os.kill(worker, signal.SIGKILL)
