"""One training by two processes: the run of one, within rounding; and what happens when one of them fails."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cram_bench as cb
from cram_bench import runs
from cram_bench.distributed import Group, Stopped, joined
from cram_bench.distributed.batchnorm import JointBatchNorm, synchronised
from cram_bench.recipes import METHODS, recipe
from cram_bench.runs import Store, ensure
from cram_bench.train import DivergedError, evaluate, fit

ROOT = Path(__file__).resolve().parent.parent


class Halted(Exception):
    """Stands for whatever interrupts a training."""


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def join(rank, port, **options):
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    return joined("cpu", **options)


def smooth():
    """A network without a kink, which would make a jump of a last bit."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 10))


def trained(method, group):
    experiment = recipe("digits", method, epochs=1)
    train, test = experiment.load_data()
    model = group.parallel(smooth())
    optimizer = experiment.build_optimizer(model)
    history = fit(model, optimizer, train, test, epochs=1, batch_size=128, halves=experiment.step.halved, group=group)
    return [parameter.detach().clone() for parameter in model.parameters()], history[0]


class Dropped(nn.Module):
    """A network that notes what its dropout leaves, step by step."""

    def __init__(self):
        super().__init__()
        self.drop, self.head, self.masks = nn.Dropout(0.5), nn.Linear(64, 10), []

    def forward(self, x):
        if self.training:
            self.masks.append(self.drop(torch.ones(64)))
        return self.head(x.flatten(1))


def dropped(group):
    """Return a row per step of two epochs: what dropout left in this process."""
    model = Dropped()
    parallel = group.parallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    train = cb.data.load("digits")[0].sample(256)
    fit(parallel, optimizer, train, epochs=2, batch_size=64, group=group)
    return torch.stack(model.masks)


def slowly(method):
    """Train a network with BatchNorm for ten steps, so that ReLUs that flip on a last bit do little."""
    return recipe("digits", method, epochs=1, lr=0.01)


def resumable():
    return recipe("digits", "cram+-multi", epochs=3, lr=0.01)


def halt(patch):
    """Stop every training after its first epoch, when the checkpoint is written."""
    on_epoch = runs.Checkpoint.on_epoch

    def halted(self, state):
        on_epoch(self, state)
        raise Halted

    patch.setattr(runs.Checkpoint, "on_epoch", halted)


def normed(group, model=None):
    """Return output, gradients and buffers of BatchNorms on a share of a batch, the loss being the mean over all."""
    torch.manual_seed(1)
    x = torch.randn(12, 3, 5, 5, dtype=torch.float64) * 3 + 7
    target = torch.randn(12, 3, 5, 5, dtype=torch.float64)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid(), nn.BatchNorm2d(3, momentum=None, affine=False)).double()
    rank, world = group.share
    model = synchronised(model, "cpu") if world > 1 else model
    x = x[rank::world].requires_grad_()
    for _ in range(2):
        out = model(x)
        (F.mse_loss(out, target[rank::world]) / world).backward()  # the sum over processes is the mean over the batch
    return {"out": out.detach(), "x": x.grad, "weight": model[0].weight.grad, **dict(model.named_buffers())}


def work(rank, port, folder):
    torch.set_num_threads(1)
    store = Store(f"{folder}/store")
    with join(rank, port) as group:
        results = {"norm": normed(group), **{method: trained(method, group) for method in METHODS}}
        for method in ("sgd", "cram+-multi", "cram-half"):
            ensure(slowly(method), store, group=group, progress=False)
        for word, experiment in (
            ("uneven", recipe("digits", epochs=1, batch_size=33)),
            ("uneven halves", recipe("digits", "cram-half", epochs=1, batch_size=34)),
            ("diverged", recipe("digits", "cram+", epochs=1, lr=1e30)),
        ):
            try:
                ensure(experiment, store, group=group, progress=False)
            except ValueError as error:
                results[word] = str(error)
            except DivergedError as error:
                results[word] = str(error)
        with pytest.MonkeyPatch.context() as patch:
            halt(patch)
            with pytest.raises(Halted):
                ensure(resumable(), store, group=group, progress=False)
        results["dropped"] = dropped(group)
        results["told"] = group.broadcast(lambda: f"by {rank}")
        results["order"] = group.in_order(lambda: (Path(folder, "made").exists(), Path(folder, "made").touch())[0])
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (free_port(), os.fspath(folder)), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_trains(method, both):
    weights, row = trained(method, Group())
    for theirs, their_row in (results[method] for results in both[1]):
        for ours, other in zip(weights, theirs, strict=True):
            torch.testing.assert_close(other, ours, rtol=0, atol=1e-5)
        assert {**their_row, "seconds": 0} == pytest.approx({**row, "seconds": 0}, rel=1e-5)
    first, second = (results[method][0] for results in both[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # bit for bit


@pytest.mark.parametrize("method", ["sgd", "cram+-multi", "cram-half"])
def test_the_run_is_that_of_one_process_batchnorm_included(method, both, tmp_path):
    alone = ensure(slowly(method), Store(tmp_path))
    run = Store(both[0] / "store").find(slowly(method))
    assert run.id == alone.id
    theirs = run.load_model().state_dict()
    for name, value in alone.load_model().state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=2e-4)
    assert run.environment["processes"] == 2
    assert run.environment["backend"] == "gloo"
    assert (alone.environment["processes"], alone.environment["backend"]) == (1, "")
    assert {path.name for path in run.path.iterdir()} == {path.name for path in alone.path.iterdir()}


def test_joint_batchnorm_is_batchnorm_of_the_joined_batch(both):
    alone, (first, second) = normed(Group()), (results["norm"] for results in both[1])
    for name, value in alone.items():
        if name in ("out", "x"):
            parts = torch.empty_like(value)
            parts[0::2], parts[1::2] = first[name], second[name]
        elif name == "weight":
            parts = first[name] + second[name]
        else:
            parts = first[name]
            assert torch.equal(parts, second[name])
        torch.testing.assert_close(parts, value, rtol=1e-10, atol=1e-10, msg=name)


def test_a_joint_batchnorm_in_one_process_is_batchnorm():
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 4)
    plain = nn.Sequential(nn.BatchNorm2d(3))
    joint = synchronised(nn.Sequential(nn.BatchNorm2d(3)), "cpu")
    assert isinstance(joint[0], JointBatchNorm)
    assert torch.equal(plain(x), joint(x))
    assert torch.equal(plain.eval()(x), joint.eval()(x))
    assert joint.state_dict().keys() == plain.state_dict().keys()


def test_dropout_is_drawn_anew_in_every_process_step_and_epoch(both):
    """And in the first process as in one alone."""
    first, second = (results["dropped"] for results in both[1])
    assert len(torch.cat([first, second]).unique(dim=0)) == 16
    assert torch.equal(first, dropped(Group()))


def test_an_uneven_batch_is_refused_in_every_process(both):
    for results in both[1]:
        assert (
            results["uneven"] == "batch_size must be a multiple of 2, for 2 processes share every batch evenly, not 33"
        )
        assert "must be a multiple of 4, for 2 processes share the halves of every batch" in results["uneven halves"]


def test_a_diverging_training_is_noted_once_and_told_to_all(both):
    store = Store(both[0] / "store")
    assert store.failure(recipe("digits", "cram+", epochs=1, lr=1e30)) == both[1][0]["diverged"]
    assert both[1][0]["diverged"] == both[1][1]["diverged"]


def test_the_first_process_is_heard_and_goes_first(both):
    assert [results["told"] for results in both[1]] == ["by 0", "by 0"]
    assert [results["order"] for results in both[1]] == [False, True]


def test_one_process_goes_on_with_what_two_began(both, tmp_path, capfd):
    straight = ensure(resumable(), Store(tmp_path))
    capfd.readouterr()
    run = ensure(resumable(), Store(both[0] / "store"))
    assert re.findall("epoch ./3", capfd.readouterr().err) == ["epoch 2/3", "epoch 3/3"]
    assert run.history["epoch"].tolist() == [1, 2, 3]
    assert run.history["train_loss"].tolist() == pytest.approx(straight.history["train_loss"].tolist(), rel=1e-4)
    theirs = run.load_model().state_dict()
    for name, value in straight.load_model().state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-3)


def torchrun(*changes):
    """Run the documentation's command, on the CPU, with more at its end."""
    page = (ROOT / "docs" / "scale.md").read_text()
    command = re.search("^torchrun (.* -m cram_bench train .*)$", page, re.MULTILINE)[1]
    call = [sys.executable, "-m", "torch.distributed.run", *command.split(), *changes]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_torchrun_goes_on_with_what_one_process_began(tmp_path):
    straight = ensure(resumable(), Store(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        halt(patch)
        with pytest.raises(Halted):
            ensure(resumable())
    done = torchrun("-s", "lr", "0.01")
    assert done.returncode == 0, done.stderr
    run = Store().find(resumable())
    assert done.stdout == f"{run.path}\n"  # by one of them
    assert re.findall("epoch ./3", done.stderr) == ["epoch 2/3", "epoch 3/3"]
    assert run.environment["processes"] == 2
    assert run.history["train_loss"].tolist() == pytest.approx(straight.history["train_loss"].tolist(), rel=1e-4)
    assert not list((Store().root / ".training").iterdir())


def test_a_wrong_call_under_torchrun_is_one_line():
    done = torchrun("-s", "lr", "-1")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("cram-bench")]
    assert said == ["cram-bench: lr must be positive, not -1"]
    assert "cram_bench/" not in done.stderr.partition("elastic")[0]  # no traceback of ours


def failing(rank, ports, folder):
    said = []
    try:
        with join(rank, ports[0]) as group:
            if rank == 1:
                raise OSError("the disk is gone")
            group.sums(1.0)  # waits for a process that does not come
    except (RuntimeError, Stopped) as error:
        said.append(f"{type(error).__name__}: {error}")
    try:
        with join(rank, ports[1], timeout=60) as group:
            if rank == 1:
                Path(folder, "1").write_text("\n".join(said))
                os._exit(9)
            group.sums(1.0)
    except RuntimeError as error:
        said.append(f"{type(error).__name__}: {error}")
    Path(folder, "0").write_text("\n".join(said))


def test_a_process_that_fails_or_dies_ends_the_others_with_one_reason(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    ports = free_port(), free_port()
    processes = [context.Process(target=failing, args=(rank, ports, os.fspath(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "it hangs"
    stopped, lost = (tmp_path / "0").read_text().splitlines()
    assert stopped == "Stopped: process 0 of 2 stopped because another one failed"
    assert lost.startswith("RuntimeError: process 0 of 2 lost another one, which died or hung for 60 s")
    assert (tmp_path / "1").read_text() == "RuntimeError: process 1 of 2 failed: the disk is gone"


def test_shares_of_a_batch_are_the_batch():
    train, test = cb.data.load("digits")
    whole = list(train.batches(50, seed=3, augment=True))
    shares = [list(train.batches(50, seed=3, augment=True, share=(rank, 3))) for rank in range(3)]
    for (inputs, labels), *parts in zip(whole, *shares, strict=True):
        for rank, (part, part_labels) in enumerate(parts):
            assert torch.equal(part, inputs[rank::3])
            assert torch.equal(part_labels, labels[rank::3])
    few = test.take(range(2))
    assert [len(list(few.batches(50, share=(rank, 3)))) for rank in range(3)] == [1, 1, 0]  # nothing for the third


def test_alone_nothing_changes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    model = smooth()
    with joined("cpu") as group:
        assert group == Group(device="cpu")
        assert group.parallel(model) is model
        assert group.broadcast(lambda: 3) == 3
        assert group.sums(1, 0.5) == [1, 0.5]
        train, test = cb.data.load("digits")
        assert evaluate(model, test, group=group) == evaluate(model, test)


@pytest.mark.parametrize(
    ("variables", "device", "message"),
    [
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE, which torchrun sets, must be a whole number, not 'two'"),
        ({}, "mps", "device must be cpu or cuda where torchrun shares the devices out, not 'mps'"),
        ({"LOCAL_RANK": "1000"}, "cuda", "process 1000 of this machine has no GPU"),
    ],
)
def test_what_torchrun_cannot_mean(variables, device, message, monkeypatch):
    usual = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (usual | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)), joined(device):
        pass
