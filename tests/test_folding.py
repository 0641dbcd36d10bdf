"""BatchNorm folded into convolutions computes the same, or is left alone."""

import copy
import threading

import pytest
import torch
from torch import nn

import cram_bench as cb
from cram_bench.models.folding import Folded, folded


def trained(name, **options):
    """A network whose BatchNorms have statistics and factors that are not those of a fresh one."""
    torch.manual_seed(0)
    model = cb.models.create(name, 10, **options).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize(("name", "norms"), [("resnet20", 19), ("vgg16_bn", 13), ("torchvision:resnet18", 20)])
@torch.no_grad()
def test_folded_networks_compute_the_same_in_float64(name, norms):
    model, images = trained(name).double(), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    quick = folded(model, images, worth=0)
    left = [
        m
        for m in quick.graph.nodes
        if m.op == "call_module" and isinstance(quick.get_submodule(m.target), nn.BatchNorm2d)
    ]
    found = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (found, left) == (norms, [])
    torch.testing.assert_close(quick(images), model(images), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        x = self.norm(self.conv(x)) + self.conv(x)  # the convolution serves twice
        return self.head(x.mean((2, 3)))


class Branching(Odd):
    def forward(self, x):
        return super().forward(x if float(x.sum()) > 0 else -x)


@pytest.mark.parametrize("model", [Odd(), Branching(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))])
def test_what_cannot_be_folded_is_left_alone(model):
    model.eval()
    images = torch.randn(8, 3, 32, 32)
    assert folded(model, images, worth=0) is model


def test_a_network_with_hooks_and_a_small_batch_are_left_alone():
    model = trained("resnet20")
    images = torch.randn(8, 3, 32, 32)
    assert folded(model, images) is model
    handle = model.register_forward_hook(lambda *_: None)
    assert folded(model, images, worth=0) is model
    handle.remove()
    assert folded(model, images, worth=0) is not model


def test_evaluation_is_that_of_the_plain_network(monkeypatch):
    model, images = trained("resnet20"), torch.randn(128, 3, 32, 32)
    data = [(images[:64], torch.arange(64) % 10), (images[64:], torch.arange(64) % 10)]
    made = []
    monkeypatch.setattr(cb.train, "folded", lambda *arguments: made.append(folded(*arguments)) or made[-1])
    quick = cb.train.evaluate(model, data)
    assert len(made) == 1
    assert made[0] is not model
    monkeypatch.setattr(cb.train, "folded", lambda model, inputs: model)
    plain = cb.train.evaluate(model, data)
    assert quick["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert quick["accuracy"] == plain["accuracy"]


def test_other_threads_compute_while_one_traces():
    """torch.fx reroutes the modules of all threads: others may not be recorded, nor two tracings undo each other."""
    call = nn.Module.__call__
    torch.manual_seed(0)
    network = cb.models.create("resnet20", 10).eval()
    other, inputs = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    expected, wrong, stop = other(inputs), [], threading.Event()

    def compute():
        while not stop.is_set():
            try:
                if not torch.equal(other(inputs), expected):
                    wrong.append("another result")
            except Exception as error:
                wrong.append(repr(error))

    def trace():
        for _ in range(5):
            if Folded.of(network) is None:
                wrong.append("not traced")

    computing = threading.Thread(target=compute)
    computing.start()
    tracing = [threading.Thread(target=trace) for _ in range(2)]
    for thread in tracing:
        thread.start()
    for thread in tracing:
        thread.join()
    stop.set()
    computing.join()
    assert not wrong
    assert nn.Module.__call__ is call


class Noting(nn.Module):
    """Its forward leaves something behind: in a buffer, or in attributes."""

    def __init__(self, buffer):
        super().__init__()
        self.conv, self.norm, self.noted = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), None
        if buffer:
            self.register_buffer("ran", torch.zeros(()))

    def forward(self, x):
        if hasattr(self, "ran"):
            self.ran += 1
        self.noted = self.new = x
        return self.norm(self.conv(x)).mean((2, 3))


def test_a_tracing_leaves_nothing_in_the_network_and_takes_none_that_counts():
    model = Noting(buffer=True).eval()
    assert Folded.of(model) is None
    assert float(model.ran) == 0
    model = Noting(buffer=False).eval()
    assert len(Folded.of(model).folds) == 1
    assert model.noted is None
    assert not hasattr(model, "new")


@torch.no_grad()
def test_tied_convolutions_are_folded_each_with_its_own_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    model[2].weight = model[0].weight
    for norm in (model[1], model[3]):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.normal_()
    images = torch.randn(4, 3, 9, 9)
    graph = Folded.of(model.eval())
    assert len(graph.folds) == 2
    torch.testing.assert_close(graph.module(images), model(images), rtol=1e-4, atol=1e-5)
    model[0].weight.mul_(0.5)  # of both
    torch.testing.assert_close(graph.refolded()(images), model(images), rtol=1e-4, atol=1e-5)
    assert model[2].weight is model[0].weight
