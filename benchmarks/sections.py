"""What is measured. A section is a function that yields lines of the table; a new one also has a line in `SECTIONS`."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from curvlinops import HessianLinearOperator
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cram_bench as cb
from benchmarks import peer
from benchmarks.preconditioners import preconditioners
from benchmarks.pruning import pruning
from benchmarks.sparse_layers import sparse_layers
from benchmarks.store import fabricate
from benchmarks.timing import REPEATS, Ratio, in_turns, seconds
from cram_bench.compress import select
from cram_bench.data import Images
from cram_bench.distributed import Group
from cram_bench.experiment import Experiment
from cram_bench.probes.double_backward import DoubleBackwardHessian
from cram_bench.recipes import recipe
from cram_bench.runs import Store
from cram_bench.train import Fit, _epoch, _objective

BATCH = 128
STEPS = 8  # in a turn
TRAINED, SEEDS = 20_000, 3  # of `accuracy`
SIZES = {"0.27M": 272_474, "11M": 11_170_000, "25M": 25_500_000, "86M": 86_000_000}


def data() -> tuple[Images, Images]:
    """CIFAR-10 where it is at hand, else as many random images of its shape: times do not depend on the pixels."""
    try:
        return cb.data.load("cifar10")
    except cb.data.DataError:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (5000, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (5000,), generator=generator)
        half = torch.full((3,), 0.5)
        both = Images("random", images, labels, tuple(map(str, range(10))), half, half / 2)
        return both, both.take(range(1000))


class Trainer:
    """Our training of ResNet-20, as `cram_bench.train.fit` runs it, `STEPS` steps at a time."""

    def __init__(
        self, method: str, train: Images, precision: str = "bfloat16", compile: bool = True, **changes
    ) -> None:
        self.experiment: Experiment = recipe("cifar10", method, precision=precision, **changes)
        self.train = train.take(range(BATCH * STEPS))
        self.model = self.experiment.build_model(train)
        self.optimizer = self.experiment.build_optimizer(self.model)
        self.objective = _objective(self.model, self.train, BATCH, precision, compile)
        self.seed = itertools.count()

    def __call__(self) -> None:
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        state = Fit(self.model, self.optimizer, scheduler, 1, STEPS)
        batches = self.train.batches(BATCH, seed=next(self.seed), augment=True, drop_last=True, channels_last=True)
        _epoch(state, self.objective, batches, False, (), Group())


class Straightforward:
    """The peer's training of the same network, as many steps."""

    def __init__(self, plus: bool, train: Images, seed: int | None = None) -> None:
        """Take the first `STEPS` batches; with a seed, all."""
        torch.manual_seed(seed or 0)
        self.model = cb.models.create("resnet20", train.num_classes)
        self.model.to(memory_format=torch.contiguous_format).train()
        self.optimizer = SGD(self.model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, foreach=False)
        part = train if seed is not None else train.take(range(BATCH * STEPS))
        self.loader = peer.loader(part.images, part.labels, part.mean.tolist(), part.std.tolist(), BATCH)
        self.plus = plus

    def __call__(self, after: Callable[[], object] = lambda: None) -> None:
        for inputs, labels in self.loader:
            if self.plus:
                peer.cram_plus_step(self.model, self.optimizer, inputs, labels, [0.7], 0.2)
            else:
                peer.sgd_step(self.model, self.optimizer, inputs, labels)
            after()


def throughput() -> Iterator[Ratio]:
    """Images a second of every method over the straightforward loop, and the cost of a step over our SGD's."""
    train, _ = data()
    sgd_peer, cram_peer = Straightforward(False, train), Straightforward(True, train)
    ours = {
        "sgd": Trainer("sgd", train),
        "sam": Trainer("sam", train),
        "cram+": Trainer("cram+", train),
        "cram-single": Trainer("cram-single", train, ramp=False, plain=0.5),
    }
    line = partial(in_turns, kind="speed", scale=BATCH * STEPS, unit="images/s")
    for name, trainer in ours.items():
        yield line(f"{name} throughput over eager sgd", trainer, sgd_peer)
    yield line("cram+ throughput over eager", ours["cram+"], cram_peer)
    for name in ("sam", "cram+", "cram-single"):
        yield in_turns(f"{name} step over sgd", ours[name], ours["sgd"], kind="cost", unit="s", repeats=3 * REPEATS)


def limit() -> Iterator[Ratio]:
    """Steps of SGD against a bfloat16 matrix product of as many operations, which nothing can beat, and their parts."""
    train, _ = data()
    ours, eager = Trainer("sgd", train), Straightforward(False, train)
    counter = FlopCounterMode(display=False)
    inputs, labels = next(iter(eager.loader))
    with counter:
        peer.sgd_step(eager.model, eager.optimizer, inputs, labels)
    side = 2048
    products = round(STEPS * counter.get_total_flops() / (2 * side**3))
    left, right = (torch.randn(side, side).bfloat16() for _ in range(2))

    def multiply() -> None:
        for _ in range(products):
            left @ right

    yield in_turns("sgd step over bfloat16 product of as many operations", ours, multiply, kind="cost")
    yield in_turns("eager sgd step over bfloat16 product of as many operations", eager, multiply, kind="cost")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ours()
    events = profiler.key_averages()
    parts = {
        "convolution": ("aten::convolution_backward", "aten::mkldnn_convolution"),
        "compiled elementwise": ("## Call CompiledFxGraph",),
    }
    whole = sum(event.self_cpu_time_total for event in events)
    for name, starts in parts.items():
        part = sum(event.self_cpu_time_total for event in events if event.key.startswith(starts))
        share = part / whole
        yield Ratio(f"{name} share of sgd step", share, share, share, part / STEPS / 1e3, whole / STEPS / 1e3, "ms")


def accuracy() -> Iterator[Ratio]:
    """Test accuracy after two epochs of CrAM+ on `TRAINED` images, dense and at 70 %: mean over `SEEDS` seeds a side.

    The columns low and high are the least of ours over the peer's greatest, and the reverse: 1 lies between where the
    seeds' ranges overlap.
    """
    train, test = data()
    train = train.take(range(min(TRAINED, len(train))))
    found: dict[str, dict[float, list[float]]] = {side: {0.0: [], 0.7: []} for side in ("ours", "peer")}
    for seed in range(SEEDS):
        experiment = recipe("cifar10", "cram+", epochs=2, seed=seed, precision="bfloat16")
        options = {"epochs": 2, "batch_size": BATCH, "seed": seed, "schedule": experiment.schedule}
        model = experiment.build_model(train)
        cb.train.fit(model, experiment.build_optimizer(model), train, precision="bfloat16", compile=True, **options)
        other = Straightforward(True, train, seed)
        steps = len(other.loader)
        factor = experiment.schedule.factor(2, steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(other.optimizer, factor)
        for _ in range(2):
            other.model.train()
            other(schedule.step)
        for side, trained in (("ours", model), ("peer", other.model)):
            curve = cb.probes.sparsity_curve(trained, test, ["global@0.7"], calibration=train)
            found[side][0.0].append(float(curve.query("sparsity == 0 and not calibrated")["accuracy"].iloc[0]))
            found[side][0.7].append(float(curve.query("sparsity == 0.7 and calibrated")["accuracy"].iloc[0]))
    for sparsity, name in ((0.0, "dense"), (0.7, "at 70 %")):
        ours, theirs = found["ours"][sparsity], found["peer"][sparsity]
        yield Ratio(
            f"cram+ accuracy after two epochs over eager, {name}", statistics.mean(ours) / statistics.mean(theirs),
            min(ours) / max(theirs), max(ours) / min(theirs), 100 * statistics.mean(ours),
            100 * statistics.mean(theirs), "%",
        )  # fmt: skip


def optimizer_share() -> Iterator[Ratio]:
    """What a step of CrAM+ takes beyond its two forward and backward passes, as a share of the step."""
    train, _ = data()
    trainer = Trainer("cram+", train)
    inputs, labels = next(trainer.train.batches(BATCH, channels_last=True))
    inside = 0.0

    def closure() -> Tensor:
        nonlocal inside
        start = time.perf_counter()
        trainer.optimizer.zero_grad()
        loss, _ = trainer.objective(inputs, labels)
        loss.backward()
        inside += time.perf_counter() - start
        return loss.detach()

    def steps() -> None:
        for _ in range(STEPS):
            trainer.optimizer.step(closure)

    trainer.model.train()
    steps()
    turns = []
    for _ in range(3 * REPEATS):
        inside = 0.0
        whole = seconds(steps)
        turns.append((1 - inside / whole, (whole - inside) / STEPS * 1000, whole / STEPS * 1000))
    shares, own, all_of_it = zip(*turns, strict=True)
    yield Ratio(
        "optimizer share of step", statistics.median(shares), min(shares), max(shares),
        statistics.median(own), statistics.median(all_of_it), "ms",
    )  # fmt: skip


def selection() -> Iterator[Ratio]:
    """Exact threshold at 90 % against torch's selections, which find the same weights."""
    for label, count in SIZES.items():
        scores = torch.randn(count, generator=torch.Generator().manual_seed(0)).abs_()
        zeros = select.zeros_for(0.9, count)
        ours = partial(select.keep_largest, scores, zeros)
        peers: dict[str, Callable[[], Tensor]] = {
            "topk": lambda scores=scores, kept=count - zeros: (
                scores >= torch.topk(scores, kept, sorted=False).values.min()
            ),
            "kthvalue": lambda scores=scores, zeros=zeros: scores > torch.kthvalue(scores, zeros).values,
            "sort": lambda scores=scores, zeros=zeros: scores > torch.sort(scores).values[zeros - 1],
        }
        for name, theirs in peers.items():
            different = ours() != theirs()  # they keep all of those tied at the threshold, or none
            if different.any() and len(scores[different].unique()) > 1:
                raise RuntimeError(f"{name} keeps other weights")
            yield in_turns(f"selection {label} over {name}", ours, theirs, kind="speed", unit="ms")


def curve() -> Iterator[Ratio]:
    """Twenty sparsity levels on a sample of 1,000 images, against copy, prune and evaluate."""
    train, test = data()
    model = recipe("cifar10").build_model(train).eval()
    sample = test.sample(1000)
    levels = [step / 20 for step in range(20)]
    inputs = sample.normalise(sample.images)
    specs = [cb.compress.Magnitude(level) for level in levels]
    plain = recipe("cifar10").build_model(train).to(memory_format=torch.contiguous_format).eval()
    plain.load_state_dict(model.state_dict())
    yield in_turns(
        "sparsity curve over naive loop",
        lambda: cb.probes.sparsity_curve(model, sample, specs),
        lambda: peer.curve(plain, inputs, sample.labels, levels, 500),
        kind="speed",
        unit="s",
    )


def hessian() -> Iterator[Ratio]:
    """A Hessian-vector product of ResNet-20, one vector after the other as for Lanczos, on one batch and on three."""
    train, _ = data()
    model = recipe("cifar10").build_model(train).eval()
    for name, batches in (("", 1), (", three batches", 3)):
        given = (
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            list(itertools.islice(train.batches(50), batches)),
        )
        ours, theirs = (
            build(*given, check_deterministic=False) for build in (DoubleBackwardHessian, HessianLinearOperator)
        )
        vector = torch.randn(ours.shape[1], generator=torch.Generator().manual_seed(0))
        found, expected = ours @ vector, theirs @ vector
        if float((found - expected).norm() / expected.norm()) > 1e-4:
            raise RuntimeError("the products differ")
        sides = (partial(operator.__matmul__, vector) for operator in (ours, theirs))
        yield in_turns(f"hessian-vector product over curvlinops{name}", *sides, kind="speed", unit="ms")


def memory() -> Iterator[Ratio]:
    """Peak memory of a step beyond SGD's, in copies of the weights, where the weights outweigh everything else."""
    width = 1024
    inputs, labels = torch.randn(2, width), torch.tensor([0, 1])
    peaks = {}
    for method in ("sgd", "sam", "cram+", "cram+-multi", "cram-single"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(6)))
        base = SGD(model.parameters(), 0.1, momentum=0.9)
        changes = {"ramp": False, "plain": 0.0} if recipe("digits", method).step.compresses else {}
        optimizer = recipe("digits", method, **changes).step.wrap(model, base, seed=0)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        optimizer.step(closure)  # makes the momentum
        peaks[method] = _peak(lambda optimizer=optimizer, closure=closure: optimizer.step(closure))
    weights = 6 * (width * width + width) * 4
    for method, peak in peaks.items():
        if method != "sgd":
            extra = (peak - peaks["sgd"]) / weights
            name = "extra memory in weights" if method == "cram+" else f"extra memory of {method} in weights"
            yield Ratio(name, extra, extra, extra, peak / 2**20, peaks["sgd"] / 2**20, "MiB")


def _peak(work: Callable[[], object]) -> int:
    """Return the greatest sum of bytes that are allocated on the CPU during a call, beyond those before it."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(live)


def report() -> Iterator[Ratio]:
    """All notebooks about images, on digits, from finished runs, against training and measuring them."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"CRAM_BENCH_RUNS": f"{folder}/runs"}
        _parity(Path(folder) / "parity")
        names = list(cb.report.NOTEBOOKS)
        listed = [item for name in names if name != "language" for item in ("--notebook", name)]

        def build(reports: str) -> None:
            command = [*_PYTHON, "-m", "cram_bench", "report", "--dataset", "digits", "--seeds", "1", *listed]
            command += ["-p", "target", f"{folder}/parity", "--reports", f"{folder}/{reports}"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the report failed: {done.stderr[-2000:]}")

        fresh = seconds(lambda: build("0"))
        again = [seconds(lambda turn=turn: build(str(turn))) for turn in range(1, 4)]
        ratios = [fresh / one for one in again]
        yield Ratio(
            "report from finished runs over trained ones", statistics.median(ratios), min(ratios), max(ratios),
            statistics.median(again), fresh, "s",
        )  # fmt: skip


def _parity(folder: Path) -> None:
    """Write a small folder of images for `transfer`: digits, even or odd."""
    for split, data in zip(("train", "test"), cb.data.load("digits"), strict=True):
        for index in range(200):
            file = folder / split / ("odd" if data.labels[index] % 2 else "even") / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[index, 0].numpy()).save(file)


_PYTHON = [sys.executable]


def start_up() -> Iterator[Ratio]:
    """Importing, and the first answer of the command line."""

    def python(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run(
            [*_PYTHON, *arguments], check=True, capture_output=True, cwd=Path(__file__).parents[1]
        )

    yield in_turns(
        "import cram_bench over import torch",
        python("-c", "import cram_bench as cb; cb.optim.CrAM, cb.compress.Magnitude"),
        python("-c", "import torch"),
        kind="cost",
    )
    yield in_turns("help over an empty python", python("-m", "cram_bench", "--help"), python("-c", "pass"), kind="cost")


LARGE, SMALL = 10_000, 100  # runs in a store


def store() -> Iterator[Ratio]:
    """What a look-up and a listing cost in a large store over a small one; folders and index are in memory by then."""
    there, absent = recipe("digits", epochs=1, seed=SMALL - 1), recipe("digits", epochs=1, seed=LARGE)
    with tempfile.TemporaryDirectory() as folder:
        large, small = (fabricate(Path(folder) / str(count), count) for count in (LARGE, SMALL))
        for each in (large, small):
            each.find(absent), each.table()
            time.sleep(3)  # an index does not rely on what changed just now
            each.find(absent)
        looks: dict[str, Callable[[Store], object]] = {
            "find of a run that is there": lambda each: each.find(there),
            "find of a run that is not there": lambda each: each.find(absent),
            "open by id": lambda each: each.open(there.id),
            "open by the beginning of an id": lambda each: each.open(there.id[:9]),
        }
        for name, look in looks.items():
            sides = (partial(_often, look, each, 50) for each in (large, small))
            yield in_turns(f"{name}, {LARGE:,} runs over {SMALL}", *sides, kind="cost")

        def listed(each: Store) -> Callable[[], object]:
            environment = os.environ | {"CRAM_BENCH_RUNS": str(each.root)}
            call = [*_PYTHON, "-m", "cram_bench", "runs"]
            return lambda: subprocess.run(call, env=environment, check=True, capture_output=True)

        yield in_turns(f"cram-bench runs, {LARGE:,} runs over {SMALL}", listed(large), listed(small), kind="cost")

        def trained(each: Store) -> None:
            run = cb.runs.ensure(recipe("digits", epochs=1, seed=LARGE + 1), each, device="cpu", progress=False)
            shutil.rmtree(run.path)

        sides = (partial(trained, each) for each in (large, small))
        yield in_turns(f"a new run on the digits, {LARGE:,} runs over {SMALL}", *sides, kind="cost")


def _often(look: Callable[[Store], object], each: Store, times: int) -> None:
    for _ in range(times):
        look(each)


SECTIONS: dict[str, Callable[[], Iterator[Ratio]]] = {
    "throughput": throughput,
    "limit": limit,
    "accuracy": accuracy,
    "optimizer": optimizer_share,
    "selection": selection,
    "curve": curve,
    "hessian": hessian,
    "memory": memory,
    "pruning": pruning,
    "preconditioners": preconditioners,
    "sparse": sparse_layers,
    "report": report,
    "store": store,
    "start-up": start_up,
}
