import contextlib
import getpass
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from submitit.core.utils import UncompletedJobError

from cram_bench import _yaml, cli, executors, runs, sweep
from cram_bench.executors import SweepError
from cram_bench.experiment import Experiment
from cram_bench.recipes import METHODS, recipe
from cram_bench.runs import Store, ensure, ensure_all
from cram_bench.sweep import running
from cram_bench.train import DivergedError

ROOT = Path(__file__).resolve().parent.parent
SPEC = """
dataset: digits
methods: [sgd, cram+]
seeds: 2
holdout: 200
grid:
  epochs: [1, 2]
  lr: [5e-2, 0.1, 1e30]  # the last diverges
"""


def tiny(**changes):
    return recipe("digits", **({"epochs": 1, "holdout": 900} | changes))


def placed(path, text):
    """Write a file into a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def lasting(results):
    """What of a table does not depend on when and where it was made."""
    return results.drop(columns=list(sweep.OF_THE_MACHINE))


# What a file may hold


def test_a_grid_is_every_combination_methods_outermost_seeds_innermost():
    found = sweep.experiments(_yaml.load(SPEC))
    assert len(found) == 24
    assert [(e.method, e.epochs, e.optimizer.lr, e.seed) for e in found[:4]] == [
        ("sgd", 1, 0.05, 0), ("sgd", 1, 0.05, 1), ("sgd", 1, 0.1, 0), ("sgd", 1, 0.1, 1),
    ]  # fmt: skip
    assert found[12] == recipe("digits", "cram+", epochs=1, lr=0.05, holdout=200)
    assert {e.data.holdout for e in found} == {200}


def test_a_list_of_experiments_shares_what_stands_beside_it(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "epochs: 3\nexperiments:\n  - {method: sam}\n  - {method: cram+, epochs: 1, seed: 4}\n"
    )
    assert sweep.read(tmp_path / "s.yaml") == [
        recipe("digits", "sam", epochs=3),
        recipe("digits", "cram+", epochs=1, seed=4),
    ]


def test_seeds_may_be_listed_and_nothing_is_one_experiment():
    assert [e.seed for e in sweep.experiments({"seeds": [7, 3]})] == [7, 3]
    assert sweep.experiments({}) == [recipe("digits")]


def test_a_repeated_experiment_is_trained_once_and_said():
    with pytest.warns(UserWarning, match="2 of 4 experiments are repeated"):
        found = sweep.experiments({"experiments": [{"seed": 1}, {"seed": 0}, {"seed": 1}, {"lr": 0.1}]})
    assert [e.seed for e in found] == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a sweep is a mapping"),
        ("[1, 2]", "a sweep is a mapping such as 'methods: [sgd, cram+]', not [1, 2]"),
        ("methods: [sgd\nlr: 1", "line 2: "),
        ("lr: 0.1\nlr: 0.2", "line 2: lr stands twice"),
        ("!!python/object/apply:os.system ['echo']", "could not determine a constructor"),
        ("[" * 5000, "nested too deeply"),
        ("method: [sgd, sam]", "method is one value, not ['sgd', 'sam']; several go under methods"),
        ("lr: [0.1, 0.2]", "lr is one value, not [0.1, 0.2]; several go under grid"),
        ("methods: sgd", "methods must be a list of at least one value, not 'sgd'"),
        ("methods: []", "methods must be a list of at least one value, not []"),
        ("methods: [sdg]", "unknown method 'sdg'; did you mean 'sgd'?"),
        ("methods: [1]", "method must be of type str, not 1"),
        ("dataset:", "dataset must be of type str, not None"),
        ("dataset: cifr10", "unknown data set 'cifr10'"),
        ("epcohs: 2", "unknown setting 'epcohs'; did you mean 'epochs'?"),
        ("1: 2", "unknown setting '1'"),
        ("grid: {epcohs: [2]}", "unknown setting 'epcohs'; did you mean 'epochs'?"),
        ("grid: [lr]", "grid must map settings to lists of values, not ['lr']"),
        ("grid: {lr: 0.1}", "lr in the grid must be a list of at least one value, not 0.1"),
        ("grid: {lr: [fast]}", "lr must be of type float, not 'fast'"),
        ("grid: {lr: [.nan]}", "lr must be"),
        ("lr: 0.1\ngrid: {lr: [0.2]}", "lr is given twice"),
        ("seed: 1\nseeds: 2", "seed is given twice"),
        ("methods: [sgd]\ngrid: {method: [sam]}", "method is given twice"),
        ("seeds: 0", "seeds must be a number from 1 to 10000, or a list of seeds, not 0"),
        ("seeds: true", "seeds must be a number from 1 to 10000, or a list of seeds, not True"),
        ("seeds: [a]", "seed must be of type int, not 'a'"),
        ("seeds: 5000\ngrid: {lr: [0.1, 0.2, 0.3]}", "a sweep may have 10000 experiments, not 15000"),
        ("epochs: 0", "epochs must be from 1 to 1000000, not 0"),
        ("batch_size: 2000", "batch_size 2000 is larger than the training data, 1297 images"),
        ("holdout: 1297", "holdout must be below the 1297 training images, not 1297"),
        ("holdout: 1000\nbatch_size: 298", "batch_size 298 is larger than the training data, 297 images"),
        ("experiments: {method: sgd}", "experiments must be a list of at least one value"),
        ("experiments: [sgd]", "experiment 1: it must be a mapping of settings, not 'sgd'"),
        ("experiments: [{}, {lr: -1}]", "experiment 2: lr must be positive, not -1"),
        ("experiments: [{seeds: 2}]", "experiment 1: unknown setting 'seeds'; did you mean 'seed'?"),
        ("seeds: 2\nexperiments: [{}]", "seeds and experiments exclude each other"),
        ("method: sgd\ncompressors: [global@0.5]", "method 'sgd' has no setting 'compressors'"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_before_anything_trains(text, message, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(text)
    assert cli.main(["sweep", str(tmp_path / "wrong.yaml")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert "wrong.yaml: " in captured.err
    assert message in captured.err
    assert not Store().root.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "workers must be a whole number, at least 1, not 0"),
        (["--per-job", "0"], "per_job must be a whole number, at least 1, not 0"),
        (["--retries", "-1"], "retries must be a whole number, at least 0, not -1"),
        (["--slurm", "partition", "x"], "Slurm's parameters need the executor slurm"),
        (
            ["--executor", "slurm", "--slurm", "partion", "x"],
            "unknown Slurm parameter 'partion'; did you mean 'partition'?",
        ),
        (
            ["--executor", "slurm", "--slurm", "mem", "8"],
            "the Slurm parameter mem must have a unit, such as 8GB, not 8",
        ),
        (
            ["--executor", "slurm", "--slurm", "timeout", "1:00"],
            "must be a whole number of minutes, at least 1, not '1:00'",
        ),
        (["--executor", "slurm", "--slurm", "nodes", "2"], "nodes is not free in a sweep"),
        (
            ["--executor", "slurm", "--slurm", "cpus", "2", "--slurm", "cpus_per_task", "2"],
            "cpus and cpus_per_task are the same Slurm parameter",
        ),
    ],
)
def test_a_wrong_call_is_one_line_before_anything_trains(arguments, message, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("epochs: 1")
    assert cli.main(["sweep", str(tmp_path / "s.yaml"), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not Store().root.exists()


@pytest.mark.parametrize(("state", "status"), [("finished", 0), ("failed", 1), ("died", 1)])
def test_the_exit_status_is_1_where_an_experiment_has_no_result(state, status, tmp_path, capsys, monkeypatch):
    (tmp_path / "s.yaml").write_text("epochs: 1\nseeds: 2")
    found = pd.DataFrame({"id": ["a", "b"], "state": ["finished", state]} | dict.fromkeys(sweep.OF_THE_MACHINE, 1))
    monkeypatch.setattr(sweep, "run", lambda *a, **k: found)
    assert cli.main(["sweep", str(tmp_path / "s.yaml")]) == status
    assert ("cram-bench: 1 of 2 experiments have no result" in capsys.readouterr().err) == bool(status)


def test_a_start_that_is_nowhere_is_refused_before_anything_trains():
    with pytest.raises(runs.RunError, match="0 finished runs .* '0123456789ab'"):
        sweep.run([tiny(), tiny(start="0123456789ab")])
    assert not Store().root.exists()


def test_the_readmes_example_is_a_sweep():
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
    found = sweep.experiments(_yaml.load(text))
    assert len(found) == 12
    assert {e.method for e in found} < METHODS.keys()


# What follows jobs, with jobs that are only pretended


class Pretended:
    """Jobs that do what a script says of each, in the order in which they are submitted, and train in this process.

    A script is what a job says at each look (an exception is raised, a function called); then it ends, having trained
    as many experiments as given. An exception instead of a script is one of `submit`.
    """

    every = 0.0

    def __init__(self, store, *scripts, left=None):
        self.store, self.scripts, self.left = store, list(scripts), left or {}
        self.jobs, self.sent, self.closed = {}, [], None

    def attach(self):
        for name, keys in self.left.items():
            self.jobs[name] = (iter(self.scripts.pop(0)), [(key, None) for key in keys])
        return self.left

    def room(self):
        return 2 - len(self.jobs)

    def submit(self, jobs):
        names = []
        for job in jobs:
            if self.scripts and isinstance(self.scripts[0], Exception):
                if names:
                    break
                raise self.scripts.pop(0)
            name = f"job {len(self.sent)}"
            self.sent.append([each["seed"] for _, each in job])
            self.jobs[name] = (iter(self.scripts.pop(0) if self.scripts else [99]), job)
            names.append(name)
        return names

    def poll(self, jobs):
        found = {}
        for name in jobs:
            said = next(self.jobs[name][0])
            if isinstance(said, Exception):
                raise said
            if callable(said):
                said = said()
            if isinstance(said, int):
                for _, settings in self.jobs[name][1][:said]:
                    with contextlib.suppress(DivergedError):
                        ensure(Experiment.of(settings), self.store, progress=False)
                said = "ended"
            found[name] = tuple(said.partition(" ")[::2])
        return found

    def forget(self, job):
        del self.jobs[job]

    def log(self, job):
        return None

    def close(self, settled):
        self.closed = settled
        return "" if settled else "jobs stay"


def follow(*scripts, count=2, **options):
    store, wanted = Store(), [tiny(seed=seed) for seed in range(count)]
    backend = Pretended(store, *scripts, left=options.pop("left", None))
    results = sweep.run(wanted, store, backend, stream=io.StringIO(), **options)
    assert results["run"].tolist() == [each.id for each in wanted]
    assert backend.closed is True
    return results, backend


def test_a_worker_that_dies_is_tried_again_so_often_and_no_oftener():
    results, backend = follow([1], *[["running", 0]] * 4, retries=3)
    assert backend.sent == [[0], [1], [1], [1], [1]]
    assert results["state"].tolist() == ["finished", "died"]
    assert "its worker ended without a result" in results["reason"][1]
    results, backend = follow(retries=0)  # and by the next command again
    assert results["state"].tolist() == ["finished"] * 2
    assert backend.sent == [[1]]


def test_a_job_that_dies_takes_nobody_with_it():
    """Three in one job: the second kills its worker whenever it is tried; the third never pays for it."""
    results, backend = follow([1], [0], [1], count=3, per_job=3, retries=1)
    assert backend.sent == [[0, 1, 2], [1], [2]]
    assert results["state"].tolist() == ["finished", "died", "finished"]


def test_what_diverged_is_not_submitted_again_unless_asked():
    store, wanted = Store(), [tiny(lr=1e30), tiny()]
    for retry, sent in ((False, 2), (False, 0), (True, 1)):
        backend = Pretended(store)
        results = sweep.run(wanted, store, backend, retry_failed=retry, stream=io.StringIO())
        assert len(backend.sent) == sent
        assert results["state"].tolist() == ["failed", "finished"]
        assert "the training loss is" in results["reason"][0]


def test_a_job_of_which_nothing_is_known_is_not_waited_for_without_a_limit():
    results, backend = follow(["unknown NODE"] * 1000, count=1, patience=0.05, every=0.01)
    assert backend.sent == [[0], [0]]
    assert results["state"].tolist() == ["finished"]


def test_a_job_that_is_heard_of_in_between_was_not_silent_all_the_time():
    def after_a_while():
        time.sleep(0.1)
        return "running"

    _, backend = follow(["unknown NODE", after_a_while, "unknown NODE", "running", 1], count=1, patience=0.05)
    assert backend.sent == [[0]]


def test_a_squeue_that_fails_for_long_ends_the_command_and_leaves_its_jobs():
    backend = Pretended(Store(), ["running", *[executors.NoAnswerError("no controller")] * 1000])
    with pytest.raises(SweepError, match=r"squeue fails for 0\.05 s: no controller"):
        sweep.run([tiny()], Store(), backend, stream=io.StringIO(), patience=0.05, every=0.01)
    assert backend.closed is False
    assert backend.sent == [[0]]
    assert list(backend.jobs) == ["job 0"]


def test_a_squeue_that_fails_for_a_while_is_borne_with():
    results, backend = follow(["running", *[executors.NoAnswerError("no controller")] * 3, 1], count=1)
    assert backend.sent == [[0]]
    assert results["state"].tolist() == ["finished"]


def test_a_sbatch_that_fails_for_a_while_is_borne_with_once_it_worked():
    refused = SweepError("Slurm refuses the jobs: Socket timed out")
    results, backend = follow([1], refused, refused, [1], [1], count=3)
    assert results["state"].tolist() == ["finished"] * 3
    with pytest.raises(SweepError, match="Socket timed out"):
        sweep.run([tiny(seed=8)], Store(), Pretended(Store(), refused), stream=io.StringIO())
    backend = Pretended(Store(), [0], *[refused] * 1000)
    with pytest.raises(SweepError, match=r"sbatch fails for 0\.05 s: .*timed out"):
        sweep.run([tiny(seed=9)], Store(), backend, stream=io.StringIO(), patience=0.05, every=0.01)


def test_a_training_that_gets_on_may_meet_many_time_limits():
    checkpoint = Store().root / ".training" / tiny().id / "checkpoint.pt"
    clock = iter(range(1, 100))

    def saved():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()
        os.utime(checkpoint, (0, next(clock)))
        return "ended TIMEOUT"

    results, backend = follow(*[[saved]] * 5, [1], count=1, retries=1)
    assert len(backend.sent) == 6
    assert results["state"].tolist() == ["finished"]
    checkpoint.parent.mkdir(exist_ok=True)
    shutil.rmtree(Store().root / tiny().id)
    results, backend = follow([saved], ["ended TIMEOUT"], count=1, retries=1)  # no new epoch
    assert len(backend.sent) == 2
    assert "its worker ended without a result (TIMEOUT)" in results["reason"][0]


def test_a_look_does_not_read_the_whole_store(monkeypatch):
    ensure(tiny(seed=7), Store(), progress=False)
    finds, find = [], Store.find
    monkeypatch.setattr(Store, "runs", lambda self: pytest.fail("all runs are read"))
    monkeypatch.setattr(Store, "find", lambda self, wanted: finds.append(1) or find(self, wanted))
    backend = Pretended(Store(), *[[*["running"] * 20, "ended CANCELLED"]] * 3)
    sweep.run([tiny(seed=seed) for seed in range(3)], Store(), backend, stream=io.StringIO())
    assert len(finds) == 6  # at the start and for the table


def test_a_damaged_run_is_its_row_and_stops_nobody():
    store, wanted = Store(), [tiny(seed=seed) for seed in range(3)]
    run = ensure(wanted[0], store, progress=False)
    (run.path / "settings.json").write_text("{")
    placed(store.root / ".training" / wanted[1].id / "failed.json", "{")
    for retry in (False, True):
        results = sweep.run(wanted, store, Pretended(store), retry_failed=retry, stream=io.StringIO())
        assert results["state"].tolist() == ["damaged", "damaged", "finished"]
        assert "settings.json is damaged" in results["reason"][0]
        assert "failed.json is damaged" in results["reason"][1]


def test_files_of_one_name_are_different_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {sweep.name_of("a/lr.yaml"), sweep.name_of(tmp_path / "a" / "lr.yaml"), sweep.name_of("b/lr.yaml")}
    assert len(names) == 2
    assert all(re.fullmatch(r"lr-[0-9a-f]{6}", name) for name in names)


def test_a_job_that_somebody_cancelled_is_not_submitted_again():
    results, backend = follow(["waiting Priority", "ended CANCELLED"], [1])
    assert backend.sent == [[0], [1]]
    assert results["state"].tolist() == ["died", "finished"]
    assert results["reason"][0] == "cancelled on Slurm"


def test_a_job_of_an_earlier_command_is_waited_for():
    wanted = tiny(seed=0)
    thread = threading.Timer(0.5, ensure, [wanted, Store()], {"progress": False})
    thread.start()
    results, backend = follow(["running"] * 10_000, left={"old": [wanted.id]}, every=0.05)
    thread.join()
    assert backend.sent == [[1]]
    assert results["state"].tolist() == ["finished"] * 2


def test_one_that_starts_from_another_waits_for_it():
    source = tiny(seed=1)
    tuned = tiny(seed=2, start=source.id, prune="global@0.5")
    failed = tiny(seed=3, lr=1e30)
    wanted = [tuned, tiny(seed=4, start=failed.id), source, failed]
    backend = Pretended(Store(), ["running", "running", 1], ["running", 1])
    results = sweep.run(wanted, Store(), backend, stream=io.StringIO(), per_job=1, retries=0)
    assert backend.sent[:2] == [[1], [3]]
    assert results["state"].tolist() == ["finished", "failed", "finished", "failed"]
    assert results["reason"][1] == f"the run it starts from, {failed.id}, failed"


def test_an_interrupt_says_what_stays():
    class Interrupted(Pretended):
        def poll(self, jobs):
            raise KeyboardInterrupt

    backend, stream = Interrupted(Store()), io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        sweep.run([tiny()], Store(), backend, stream=stream)
    assert backend.closed is False
    assert stream.getvalue().splitlines()[-1] == "jobs stay"


def test_two_commands_do_not_follow_one_sweep():
    with (
        running._alone(Store().root / ".sweeps" / "sweep" / "lock", "sweep"),
        pytest.raises(SweepError, match="another command follows the sweep 'sweep'"),
    ):
        sweep.run([tiny()], Store(), Pretended(Store()), stream=io.StringIO())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_table_in_place_and_a_log_few_lines(monkeypatch):
    wanted = [tiny(seed=seed, lr=lr) for seed in range(15) for lr in (0.1, 0.2)]
    states = {each.id: sweep.State("waiting") for each in wanted}
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    terminal, log = Terminal(), io.StringIO()
    with sweep.View(wanted, terminal) as shown, sweep.View(wanted, log) as printed:
        for index, key in enumerate(states):
            states[key] = sweep.State("failed", "the loss is [nan]") if index == 3 else sweep.State("finished")
            for view in (shown, printed):
                view.show(states)
                view.show(states)
    assert "\x1b[" in terminal.getvalue()
    assert "30 experiments: 29 finished, 1 failed" in terminal.getvalue()
    assert "the loss is [nan]" in terminal.getvalue()
    lines = log.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[-1] == "30 experiments: 29 finished, 1 failed"
    assert "SGD, seed 1, lr 0.2: failed, the loss is [nan]" in lines
    log = io.StringIO()
    with sweep.View(wanted, log) as printed:
        for name in ("waiting", "cached"):  # what was there before is settled too
            printed.show(dict.fromkeys(states, sweep.State(name)))
    assert log.getvalue().splitlines() == ["30 experiments: 30 waiting", "30 experiments: 30 cached"]


def test_the_store_is_left_by_no_name():
    for name in ("..", "../../etc", ".hidden", "a/b", "%j", "", "a,b c"):
        assert re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*", sweep.safe(name))


def test_an_exception_of_one_experiment_is_its_row(tmp_path):
    good, bad = tiny(), tiny(start="0123456789ab")
    executors.work([bad.settings(), good.settings()], str(tmp_path), str(tmp_path / "notes"), {})
    assert Store(tmp_path).find(good)
    note = json.loads((tmp_path / "notes" / f"{bad.id}.json").read_text())
    assert "no finished run in " in note["reason"]
    assert note["again"] is False


LIMIT = "its job came to its time limit, the Slurm parameter timeout"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("No space left on device"), "No space left on device"),
        (MemoryError(), "MemoryError"),
        (UncompletedJobError("Job not requeued because: timed-out and not checkpointable."), LIMIT),
        (RuntimeError("CUDA error: device-side assert triggered\nhint"), "CUDA error: device-side assert triggered"),
    ],
)
def test_what_another_try_may_not_meet_ends_the_worker(error, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ensure", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        executors.work([tiny().settings(), tiny(seed=1).settings()], str(tmp_path), str(tmp_path), {})
    assert json.loads((tmp_path / f"{tiny().id}.json").read_text()) == {"reason": reason, "again": True}
    assert not (tmp_path / f"{tiny(seed=1).id}.json").exists()


def test_processes_share_gpus_or_else_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def local(workers=None, **options):
        made = running._local(tmp_path, {}, workers, options)
        return made.workers, made.gpus, made.common["threads"]

    assert local() == (2, ["0", "1"], 4)
    assert local(3) == (3, ["0", "1"], 2)
    assert local(device="cpu") == (8, [], 1)
    assert local(2, device="cpu", threads=3) == (2, [], 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert local() == (3, ["GPU-a", "GPU-b", "GPU-c"], 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for nothing in ("", "0,1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert local() == (8, [], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": 2}, "unknown option 'thread'; did you mean 'threads'?"),
        ({"wait": -1}, "wait must be a finite number >= 0, not -1.0"),
        ({"threads": 0}, "threads must be a whole number, at least 1, not 0"),
        ({"compile": "no"}, "compile must be True or False, not 'no'"),
        ({"device": "gpu"}, "device must be cpu or cuda in a sweep, not 'gpu'"),
        ({"device": "cuda:1"}, "device must be cpu or cuda in a sweep, not 'cuda:1'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_submitted(options, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(SweepError, match=re.escape(message)):
        sweep.run([tiny()], Store(), stream=io.StringIO(), **options)
    assert not Store().root.exists()


def test_a_gpu_is_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SweepError, match="device must be cpu in a sweep, not 'cuda'"):
        sweep.run([tiny()], Store(), stream=io.StringIO(), device="cuda")
    backend = Pretended(Store())  # elsewhere there may be many
    assert sweep.run([tiny()], Store(), backend, stream=io.StringIO(), device="cuda:1")["state"].tolist() == [
        "finished"
    ]


def test_a_worker_loads_torch_only_when_its_gpu_is_chosen():
    code = "import sys, cram_bench.executors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Real workers


def workers(store):
    """Numbers of the processes that train into a store, and of those that watch over them: (workers, controllers)."""
    found = {"core._submit": [], "local._local": []}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_text().split("\0")
            if any(word.startswith(f"{store.root}/") for word in words):
                for name, numbers in found.items():
                    if f"submitit.{name}" in words:
                        numbers.append(int(path.parent.name))
    return found["core._submit"], found["local._local"]


def soon(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.02)
    return value


class Killer(threading.Thread):
    """Kill workers (kill -9): one as it starts, `inside` of them between two epochs, one of the controllers."""

    def __init__(self, store, inside, controller=False):
        super().__init__(daemon=True)
        self.store, self.inside, self.controller = store, inside, controller
        self.random, self.killed, self.over = random.Random(0), [], threading.Event()

    def run(self):
        self._at_random()
        numbers, looked = [], 0.0
        while not self.over.is_set() and (self.killed.count("inside") < self.inside or self.controller):
            if time.monotonic() - looked > 0.2:
                (numbers, controllers), looked = workers(self.store), time.monotonic()
                if self.controller and self.killed.count("inside") and controllers:
                    self._kill(self.random.choice(controllers), "controller")
                    self.controller = False
            for file in self.store.root.glob(".training/*/checkpoint.pt"):
                if self.killed.count("inside") < self.inside:
                    self._inside(file, numbers)
            time.sleep(0.002)

    def _at_random(self):
        while not self.over.is_set():
            time.sleep(self.random.uniform(0.5, 2.0))
            if numbers := workers(self.store)[0]:
                self._kill(self.random.choice(numbers), "start")
                return

    def _inside(self, file, numbers):
        lock = f"{file.parent.name}.lock"
        for number in numbers:
            killed = False
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGSTOP)  # hold it, look, and then kill: it dies where it was seen
                try:
                    held = [link for link in Path(f"/proc/{number}/fd").iterdir() if os.readlink(link).endswith(lock)]
                    if held and file.exists():
                        self._kill(number, "inside")
                        killed = True
                finally:
                    if not killed:
                        os.kill(number, signal.SIGCONT)
            if killed:
                return

    def _kill(self, number, what):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
            self.killed.append(what)


@contextlib.contextmanager
def limited(seconds):
    """Fail what takes so long that it hangs."""

    def late(*_):
        raise AssertionError(f"it hangs for {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The experiments of `SPEC`, their table and their store after a serial run."""
    store, wanted = Store(tmp_path_factory.mktemp("serial")), sweep.experiments(_yaml.load(SPEC))
    ensure_all(wanted, store, progress=False)
    return wanted, sweep.table(wanted, store), store


def agree(results, serial, store):
    """The table is that of a serial run, and the weights are the same bytes."""
    wanted, table, before = serial
    pd.testing.assert_frame_equal(lasting(results), lasting(table), check_exact=True)
    assert lasting(results).to_csv() == lasting(table).to_csv()
    assert results["state"].value_counts().to_dict() == {"finished": 16, "failed": 8}
    for each in wanted:
        if run := before.find(each):
            assert (store.find(each).path / "model.safetensors").read_bytes() == (
                run.path / "model.safetensors"
            ).read_bytes()
    assert results["seconds"].notna().sum() == 16
    assert not list(store.root.glob(".sweeps/*/*/*.pkl"))


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="workers are found through /proc")


@needs_proc
def test_a_local_sweep_whose_workers_are_killed_ends_with_the_table_of_a_serial_run(serial, tmp_path, counted):
    store, stream = Store(tmp_path / "store"), io.StringIO()
    killer = Killer(store, inside=1, controller=True)
    killer.start()
    try:
        with limited(600):
            results = sweep.run(serial[0], store, workers=2, per_job=8, retries=10, stream=stream)
    finally:
        killer.over.set()
        killer.join()
    assert sorted(killer.killed) == ["controller", "inside", "start"]
    counted("kills in a local sweep", len(killer.killed))
    agree(results, serial, store)
    assert workers(store) == ([], [])
    said = stream.getvalue()
    assert "try 2: its worker ended without a result; see " in said
    assert said.splitlines()[-1] == "24 experiments: 16 finished, 8 failed"


def command(tmp_path, *arguments, text="epochs: 100000\nseeds: 2\n"):
    (tmp_path / "long.yaml").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "cram_bench.cli", "sweep", str(tmp_path / "long.yaml"), *arguments]
    return subprocess.Popen(call, env=environment, start_new_session=True, text=True, stderr=subprocess.PIPE)


@needs_proc
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_local_workers_end_with_their_sweep(sent, tmp_path):
    store = Store()
    started = command(tmp_path, "--workers", "1", "--device", "cpu", "--no-compile")
    try:
        soon(lambda: list(store.root.glob(".training/*/checkpoint.pt")))
        os.killpg(started.pid, sent) if sent == signal.SIGINT else os.kill(started.pid, sent)  # as a terminal does
        _, said = started.communicate(timeout=60)
        soon(lambda: workers(store) == ([], []))
    finally:
        started.kill()
    if sent == signal.SIGINT:
        assert started.returncode == 130
        assert said.splitlines()[-1] == "interrupted; the same command goes on from the last finished epoch"
        assert "Traceback" not in said
    assert store.table()["state"].tolist() == ["interrupted"]


# Slurm

CONF = """
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
KillWait=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm():
    """A Slurm of one node on the loopback; its daemons are children of this process and end with the tests."""
    no = pytest.fail if os.environ.get("CRAM_BENCH_NEED_SLURM") else pytest.skip
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if not shutil.which(name)]
    if missing:
        no(f"no Slurm here: {missing[0]} is missing (slurm-wlm and munge)")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path is short
    folder.chmod(0o755)
    for name in ("state", "spool", "keys"):
        (folder / name).mkdir(mode=0o700)
    (folder / "keys" / "munge.key").write_bytes(os.urandom(1024))
    (folder / "keys" / "munge.key").chmod(0o600)
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (first, second)]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, user=getpass.getuser(), ports=ports))
    key, seed = folder / "keys" / "munge.key", folder / "keys" / "seed"
    calls = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={seed}",
         "--num-threads=2"],
        ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-D", "-N", "localhost", "-f", str(folder / "slurm.conf")],
    ]  # fmt: skip
    daemons = []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        log = stack.enter_context(open(folder / "daemons.log", "w"))
        try:
            for call in calls:
                daemons.append(subprocess.Popen(call, stdout=log, stderr=log, start_new_session=True))
                limit = time.monotonic() + 10
                while call[0] == "munged" and not (folder / "munge.sock").exists() and time.monotonic() < limit:
                    time.sleep(0.05)
            limit = time.monotonic() + 40
            while said("sinfo", "--noheader", "--format=%T") != "idle":
                if time.monotonic() > limit or any(daemon.poll() is not None for daemon in daemons):
                    no(f"Slurm does not start here: {(folder / 'daemons.log').read_text()[-300:]}")
                time.sleep(0.2)
            yield folder
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):  # daemons that do not answer end all the same
                said("scancel", "--state=PENDING", "--user", getpass.getuser())
                said("scancel", "--signal=KILL", "--full", "--user", getpass.getuser())
                limit = time.monotonic() + 20
                while said("squeue", "--noheader") and time.monotonic() < limit:
                    time.sleep(0.2)
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in reversed(daemons):
                try:
                    daemon.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def said(*call):
    return subprocess.run(call, capture_output=True, text=True, timeout=30, check=False).stdout.strip()


@needs_proc
def test_a_sweep_on_slurm_interrupted_and_killed_ends_with_the_table_of_a_serial_run(slurm, serial, tmp_path, counted):
    """The command is interrupted, its jobs go on; the next one finds them, and workers are killed."""
    store = Store()
    started = command(tmp_path, "--executor", "slurm", "--workers", "2", "--per-job", "8", text=SPEC)
    name = sweep.name_of(tmp_path / "long.yaml")
    note = store.root / ".sweeps" / name / "jobs.json"
    try:
        soon(note.exists)
        os.killpg(started.pid, signal.SIGINT)
        _, words = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 130
    stay = "3 jobs stay on Slurm, and the same command looks again"
    assert f"{stay}; scancel --name=cram-bench-{name} stops them" in words
    jobs = json.loads(note.read_text())
    assert len(jobs) == 3
    queued = said("squeue", "--noheader", "--array", "--format=%i").split()
    assert set(queued) <= set(jobs)
    assert queued

    killer, stream = Killer(store, inside=1), io.StringIO()
    killer.start()
    try:
        options = {"name": name, "per_job": 8, "retries": 10, "every": 0.5}
        with limited(600):
            results = sweep.run(serial[0], store, "slurm", stream=stream, **options)
    finally:
        killer.over.set()
        killer.join()
    assert sorted(killer.killed) == ["inside", "start"]
    counted("kills in a sweep on Slurm", len(killer.killed))
    agree(results, serial, store)
    assert json.loads(note.read_text()) == {}
    assert "try 2: its worker ended without a result (FAILED); see " in stream.getvalue()
    soon(lambda: not said("squeue", "--noheader"))
    assert workers(store) == ([], [])


def test_slurm_says_what_it_refuses_and_what_was_cancelled(slurm, capfd):
    wanted = [tiny(seed=seed) for seed in range(2)]
    with pytest.raises(SweepError, match="Slurm refuses the jobs: invalid partition specified: nowhere; "):
        sweep.run(wanted, Store(), "slurm", slurm={"partition": "nowhere"}, stream=io.StringIO())
    assert capfd.readouterr().err == ""
    note = Store().root / ".sweeps/sweep/jobs.json"

    def cancel(started):
        soon(note.exists)
        if started:
            soon(lambda: "RUNNING" in said("squeue", "--noheader", "--format=%T"))
        said("scancel", "--name=cram-bench-sweep")

    for started in (False, True):  # an array of which nothing has started is listed otherwise
        thread = threading.Thread(target=cancel, args=(started,))
        thread.start()
        results = sweep.run(wanted, Store(), "slurm", slurm={"setup": "sleep 60"}, every=0.5, stream=io.StringIO())
        thread.join()
        assert results["state"].tolist() == ["died", "died"]
        assert results["reason"].tolist() == ["cancelled on Slurm"] * 2
        note.unlink()


def test_a_slurm_that_does_not_answer_is_not_waited_for_without_a_limit(tmp_path, monkeypatch):
    """Both squeue and sbatch fail from the start: one line, soon, and what was noted stays."""
    for name, line in (
        ("squeue", "slurm_load_jobs error: Unable to contact"),
        ("sbatch", "sbatch: error: Batch job failed"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{line}' >&2\nexit 1\n")
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    for name in ("squeue", "sbatch", "srun"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    wanted = tiny()
    with pytest.raises(SweepError, match="Slurm refuses the jobs: Batch job failed"):
        sweep.run([wanted], Store(), "slurm", stream=io.StringIO())
    assert not list(Store().root.glob(".sweeps/sweep/*/*"))
    note, pickled = Store().root / ".sweeps/sweep/jobs.json", Store().root / ".sweeps/sweep/old/7_submitted.pkl"
    placed(note, json.dumps({"7": [wanted.id]}))
    placed(pickled, "")
    stream = io.StringIO()
    with pytest.raises(
        SweepError, match=r"squeue fails for 0\.2 s: squeue says: slurm_load_jobs error: Unable to contact"
    ):
        sweep.run([wanted], Store(), "slurm", patience=0.2, every=0.05, stream=stream)
    assert json.loads(note.read_text()) == {"7": [wanted.id]}
    assert pickled.exists()
    assert "1 jobs stay on Slurm" in stream.getvalue()
    assert not Store().find(wanted)


def pretended_slurm(folder, monkeypatch, squeue):
    """Put a squeue that says the content of a file, and a sbatch that takes arrays, first on the path."""
    (folder / "said").write_text(squeue)
    (folder / "squeue").write_text(f"#!/bin/sh\ncat {folder}/said\n")
    (folder / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {folder}/script\necho Submitted batch job 9\n')
    (folder / "srun").write_text("#!/bin/sh\n")
    for name in ("squeue", "sbatch", "srun"):
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return executors.Slurm(folder / "sweep", "sweep", {"store": "", "notes": "", "options": {}}, {"time": 60})


def test_jobs_on_slurm_that_did_not_end_stay_noted(tmp_path, monkeypatch):
    made = pretended_slurm(tmp_path, monkeypatch, "5|PENDING|Priority\n6|RUNNING|None\n7|COMPLETED|None\n")
    placed(made.notes, json.dumps({job: [f"id {job}"] for job in "4567"}))
    pickles = [tmp_path / "sweep" / "old" / f"{job}_submitted.pkl" for job in "4567"]
    for path in pickles:
        placed(path, "")
    assert made.attach() == {"5": ["id 5"], "6": ["id 6"]}
    assert [path.exists() for path in pickles] == [False, True, True, False]
    ends = threading.Timer(0.2, (tmp_path / "said").write_text, ["5|PENDING|Priority\n"])
    ends.start()
    assert "1 jobs stay on Slurm" in made.close(settled=True)  # 6 is running, and soon over
    ends.join()
    assert json.loads(made.notes.read_text()) == {"5": ["id 5"]}
    assert [path.exists() for path in pickles] == [False, True, False, False]


def test_an_array_is_as_parallel_as_it_is_long(tmp_path, monkeypatch):
    made = pretended_slurm(tmp_path, monkeypatch, "")
    assert made.submit([[("a", {})]] * 300) == [f"9_{index}" for index in range(300)]
    assert "--array=0-299%300" in (tmp_path / "script").read_text()
    made.at_once = 2
    made.submit([[("a", {})]] * 3)
    assert "--array=0-2%2" in (tmp_path / "script").read_text()


def test_a_short_job_is_warned_late_enough():
    assert executors.slurm_parameters({"timeout": 1})["signal_delay_s"] == 15
    assert executors.slurm_parameters({"timeout": 2, "signal_delay_s": 100})["signal_delay_s"] == 100
    assert "signal_delay_s" not in executors.slurm_parameters({"timeout": 6})
    with pytest.raises(SweepError, match="signal_delay_s must be .* below the 60 of a job, not 60"):
        executors.slurm_parameters({"timeout": 1, "signal_delay_s": 60})


def test_without_slurm_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SweepError, match="there is no Slurm here"):
        sweep.run([tiny()], Store(), "slurm", stream=io.StringIO())
