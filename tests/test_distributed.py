"""Two gloo processes take the steps that one process takes on the joined batch."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import cram_bench as cb
from cram_bench.compress import Magnitude
from cram_bench.optim import Dense
from cram_bench.optim.spectra import Inverse
from cram_bench.optim.window import Window

STEPS = 6
LEVELS = [Magnitude(0.5), Magnitude(0.7), Magnitude(0.9)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


RULES = {
    "sam": lambda m, seed: cb.optim.SAM(m, sgd(m), rho=0.1),
    "momentum-sam": lambda m, seed: cb.optim.MomentumSAM(m, sgd(m)),
    "cram": lambda m, seed: cb.optim.CrAM(m, sgd(m), LEVELS, plus=False, seed=seed),
    "cram without ascent": lambda m, seed: cb.optim.CrAM(m, sgd(m), LEVELS, rho=0.0, plus=False, seed=seed),
    "cram+": lambda m, seed: cb.optim.CrAM(m, sgd(m), LEVELS, seed=seed),
    "cram+ held masks": lambda m, seed: cb.optim.CrAM(m, sgd(m), LEVELS, mask_interval=2, seed=seed),
    "cram-single": lambda m, seed: cb.optim.CrAMSingle(m, sgd(m), LEVELS, seed=seed),
    "m-fac": lambda m, seed: cb.optim.MFAC(m, sgd(m), 4, 1e-2, dtype=torch.float64),
    "s-m-fac": lambda m, seed: sparse(m),
    "m-fac on machines that round differently": lambda m, seed: unlike(m, seed),
    "m-fac in shares": lambda m, seed: shares(m),
    "sam over ggt in shares": lambda m, seed: cb.optim.SAM(m, cb.optim.GGT(m, sgd(m), 4, 1e-2, **spread(m)), rho=0.1),
    "low rank": lambda m, seed: cb.optim.EFCP(
        m, sgd(m), cb.optim.LowRank(1), gradients=4, damping=1e-2, dtype=torch.float64
    ),
    "cram+ over s-m-fac": lambda m, seed: cb.optim.CrAM(m, sparse(m), LEVELS, seed=seed),
}


def unlike(model, seed):
    """M-FAC whose combinations differ from one process to the next: that of the first has to count."""
    optimizer = cb.optim.MFAC(model, sgd(model), 4, 1e-2, dtype=torch.float64)
    push = optimizer.window.push
    optimizer.window.push = lambda *given: push(*given) * (1 if seed == 3 else 1 + 1e-6)
    return optimizer


def sparse(model):
    return cb.optim.EFCP(model, sgd(model), cb.optim.TopK(0.2), gradients=4, damping=1e-2, dtype=torch.float64)


def spread(model):
    return {"dtype": torch.float64, "sharded": isinstance(model, DistributedDataParallel)}


def shares(model):
    return cb.optim.MFAC(model, sgd(model), 4, 1e-2, **spread(model))


def beside(build):
    """The rule over the matrices alone; another optimizer steps what is left, with the gradients of the step."""

    def make(m, seed):
        optimizer = build(m, torch.optim.SGD([p for p in m.parameters() if p.ndim == 2], lr=0.1, momentum=0.9), seed)
        optimizer.other = torch.optim.SGD([p for p in m.parameters() if p.ndim != 2], lr=0.05)
        return optimizer

    return make


RULES |= {
    "sam beside another": beside(lambda m, b, seed: cb.optim.SAM(m, b, rho=0.1)),
    "cram beside another": beside(lambda m, b, seed: cb.optim.CrAM(m, b, LEVELS, rho=0.0, plus=False, seed=seed)),
    "cram+ beside another": beside(lambda m, b, seed: cb.optim.CrAM(m, b, LEVELS, seed=seed)),
}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4)).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 32, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (STEPS, 32), generator=generator)


def train(model, optimizer, x, y):
    masks, other = [], getattr(optimizer, "other", None)
    if hasattr(optimizer, "draw"):
        apply, draw = optimizer.draw.apply_, optimizer.draw
        draw.apply_ = lambda: masks.append(apply()) or masks[-1]
    for inputs, labels in zip(x, y, strict=True):

        def closure(inputs=inputs, labels=labels):
            optimizer.zero_grad()
            if other is not None:
                other.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        if other is not None:
            other.step()
    return masks


def reductions(model):
    """Count how often gradients are averaged over the processes."""
    count = []

    def hook(state, bucket):
        count.append(1)
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    return count


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, y = batch()
    rings = {}
    results = {"rings": rings}
    for rule, make in RULES.items():
        for views in (False, True):
            model = DistributedDataParallel(build(), gradient_as_bucket_view=views)
            count = reductions(model)
            # another seed on each: that of the first process has to count
            masks = train(model, optimizer := make(model, 3 + rank), x[:, rank::2], y[:, rank::2])
            results[rule, views] = (model.module.state_dict(), [dict(m) for m in masks], len(count))
            window = getattr(optimizer, "window", None) or getattr(optimizer.base, "window", None)
            if window is not None:
                rings.setdefault(rule, []).append((window.count, window.gram))
    results["shares"] = in_shares(rank, x, y)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def in_shares(rank, x, y):
    """What each process holds of a ring in shares, whether its state resumes, and what it says to the other's."""
    x, y, step = x[:, rank::2], y[:, rank::2], 3
    model = DistributedDataParallel(build())
    optimizer = shares(model)
    train(model, optimizer, x[:step], y[:step])
    other = DistributedDataParallel(copy.deepcopy(model.module))
    state, twin = copy.deepcopy(optimizer.state_dict()), shares(other)
    twin.load_state_dict(state)
    train(model, optimizer, x[step:], y[step:])
    train(other, twin, x[step:], y[step:])
    foreign = [None, None]
    torch.distributed.all_gather_object(foreign, state)
    refused = []
    for theirs, wrong in ((foreign[1 - rank], "share"), (sparse(model).state_dict(), "method")):
        try:
            optimizer.load_state_dict(theirs)
        except ValueError as error:
            refused.append(f"{wrong}: {error}")
    odd = [torch.Size([3, 5]), torch.Size([]), torch.Size([7])]
    ours, whole = (Window(ring, Inverse(1e-3), 3, torch.float64) for ring in (Dense(sharded=True), Dense()))
    for window in (ours, whole):
        window.extend(odd[:2], torch.device("cpu"))
    rows = torch.randn(8, 23, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    far = []
    for place, row in enumerate(rows):
        if place == 2:
            for window in (ours, whole):
                window.extend(odd[2:], torch.device("cpu"))
        row = row if place >= 2 else row[:16]
        far.append(float((ours.push(row) - whole.push(row)).abs().max()))
    return {
        "columns": optimizer.window.rows.columns,
        "bytes": optimizer.nbytes,
        "resumed": all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)),
        "refused": refused,
        "count": optimizer.window.count,
        "odd": ours.rows.columns,
        "far": max(far),
        "gram": float((ours.gram - whole.gram).abs().max()),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (os.fspath(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_two_processes_equal_one_on_the_joined_batch(rule, views, both):
    alone = build()
    masks = train(alone, RULES[rule](alone, 3), *batch())
    for weights, theirs, _ in (ranks[rule, views] for ranks in both):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-10)
        for ours, other in zip(masks, theirs, strict=True):
            assert all(torch.equal(mask, other[name]) for name, mask in ours.items())
    first, second = (ranks[rule, views][0] for ranks in both)
    assert all(torch.equal(value, second[name]) for name, value in first.items())  # bit for bit


def test_a_ring_in_shares(both):
    """Each process holds its columns alone, and the combination is that of the whole ring, also of 23 columns."""
    count = sum(p.numel() for p in build().parameters())
    for rank, found in enumerate(ranks["shares"] for ranks in both):
        assert found["columns"] == count // 2
        assert found["bytes"] == 8 * 4 * count // 2 + 8 * 4**2
        assert found["resumed"]
        assert found["count"] == STEPS
        share, method = found["refused"]
        assert f"share {2 - rank} of 2, and this optimizer has" in share
        assert share.endswith(f"share {rank + 1} of 2")
        assert "saved by EFCP, not by MFAC" in method
        assert found["far"] < 1e-10
        assert found["gram"] < 1e-12
    assert [ranks["shares"]["odd"] for ranks in both] == [7 + 0 + 3, 8 + 1 + 4]


@pytest.mark.parametrize("kind", [cb.optim.MFAC, cb.optim.GGT])
def test_a_ring_in_shares_needs_processes(kind):
    model = build()
    with pytest.raises(ValueError, match="model must be a DistributedDataParallel over all of them, not Sequential"):
        kind(model, sgd(model), sharded=True)


def test_every_process_holds_the_ring(both):
    """Each could go on alone, or write the checkpoint."""
    first, second = (ranks["rings"] for ranks in both)
    assert len(first) == 7
    for rule, every in first.items():
        for (count, gram), (other, theirs) in zip(every, second[rule], strict=True):
            assert count == other == STEPS
            assert torch.equal(gram, theirs)
            assert bool(gram.diagonal().all())


def test_a_gradient_that_nothing_depends_on_is_not_averaged(both):
    averaged = {rule: both[0][rule, False][2] / STEPS for rule in RULES}
    assert averaged["cram without ascent"] == averaged["momentum-sam"] == averaged["cram-single"]  # one pass
    assert averaged["sam"] == averaged["cram"] == averaged["cram+"] == 2 * averaged["momentum-sam"]


def test_names_are_those_of_the_model_inside(both):
    assert list(both[0]["cram+", False][1][0]) == ["0.weight", "3.weight"]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
@pytest.mark.parametrize("rule", ["sam", "cram+"])
def test_statistics_of_every_batchnorm_are_those_of_one_plain_pass(norm, rule):
    """In one process SyncBatchNorm runs on the CPU too; over several it needs GPUs."""
    shape = {nn.BatchNorm1d: (6, 3, 4), nn.BatchNorm3d: (6, 3, 2, 2, 2)}.get(norm, (6, 3, 4, 4))
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = nn.Sequential(norm(3), nn.Flatten(), nn.Linear(x[0].numel(), 2))
    plain = copy.deepcopy(model)
    plain(x)
    train(model, RULES[rule](model, 0), x[None], torch.randint(2, (1, 6)))
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    cb.compress.tune_batchnorm(model, [(x, torch.zeros(6, dtype=torch.long))])
    torch.testing.assert_close(model[0].running_mean, x.transpose(0, 1).flatten(1).mean(1))
