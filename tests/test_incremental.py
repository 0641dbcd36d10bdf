"""One parameter changed, and only what follows computed anew: the same numbers as from the beginning."""

import copy

import pytest
import torch
from torch import nn

import cram_bench as cb
from cram_bench.probes import incremental
from cram_bench.probes.incremental import evaluate_changes
from cram_bench.train import evaluate

IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DATA = [(IMAGES[:24], torch.arange(24) % 10), (IMAGES[24:], torch.arange(16) % 10)]


class Tied(nn.Module):
    """A weight that is used twice, one that is not used, an addition in place, and one of the model's own."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8)
        self.mix, self.head, self.idle = nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(8, 8))

    def forward(self, x):
        x = torch.nn.functional.relu(self.norm(self.stem(x)), inplace=True).mean((2, 3))
        y = self.mix(x)
        y += self.mix(y)
        return self.head(torch.relu(y @ self.scale))


class Branching(Tied):
    def forward(self, x):
        return super().forward(x if float(x.sum()) > 0 else -x)


class InPlace(Tied):
    def forward(self, x):
        x = self.norm(self.stem(x)).mean((2, 3))
        return self.head(x.add_(self.mix(x)))


def made(name):
    torch.manual_seed(0)
    model = {"tied": Tied, "branching": Branching, "in place": InPlace}.get(name, lambda: cb.models.create(name, 10))()
    with torch.no_grad():
        for inputs, _ in DATA:
            model.train()(inputs)
    return model


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18", "tied", "branching", "in place"])
def test_changes_are_evaluated_as_from_the_beginning(name):
    model = made(name)
    before = copy.deepcopy(model.state_dict())
    names = [key for key, value in model.named_parameters() if value.ndim > 1]
    names = names[:: max(1, len(names) // 6)] + ["bn1.weight"] * (name == "resnet20")
    changes = [(key, lambda values, factor=factor: values * factor) for key in names for factor in (0.0, 0.5)]
    found = evaluate_changes(model, DATA, changes)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for (key, change), result in zip(changes, found, strict=True):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(key).copy_(change(other.get_parameter(key)))
        expected = evaluate(other, DATA)
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5), key
        assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6), key


@pytest.mark.parametrize(("name", "starts"), [("resnet20", 0), ("tied", 0), ("branching", 2), ("in place", 2)])
def test_what_can_be_traced_is_not_begun_again(name, starts, monkeypatch):
    begun = []
    plain = incremental._from_the_start
    monkeypatch.setattr(incremental, "_from_the_start", lambda *given: (begun.append(1), plain(*given))[1])
    model = made(name)
    weight = next(iter(cb.compress.prunable(model)))
    evaluate_changes(model, DATA, [(weight, torch.zeros_like), (weight, torch.ones_like)])
    assert len(begun) == starts


def test_large_activations_are_kept_for_fewer_images_or_not_at_all(monkeypatch):
    model = made("resnet20")
    changes = [("layer2.0.conv1.weight", torch.zeros_like), ("linear.weight", torch.zeros_like)]
    expected = evaluate_changes(model, DATA, changes)
    runs, begun = [], []
    keep, plain = incremental._Keeping.activations, incremental._from_the_start
    monkeypatch.setattr(incremental._Keeping, "activations", lambda self, x: (runs.append(len(x)), keep(self, x))[1])
    monkeypatch.setattr(incremental, "_from_the_start", lambda *given: (begun.append(1), plain(*given))[1])
    each = 40 * 16 * 32 * 32 * 4  # bytes a picture, more or less
    for budget, least, starts in ((4 * each, 2, 0), (each, 16, 2)):
        runs.clear(), begun.clear()
        monkeypatch.setattr(incremental, "_BYTES", budget)
        monkeypatch.setattr(incremental, "_LEAST", least)
        for one, other in zip(evaluate_changes(model, DATA, changes), expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert len(begun) == starts
        assert starts or (sum(runs) == 2 + 40 and len(runs) > 3)  # two to measure, and the batches in pieces


def test_an_interruption_leaves_the_model_as_it_was():
    model = made("resnet20")
    before = copy.deepcopy(model.state_dict())
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_changes(model, DATA, [(name, torch.zeros_like) for name in cb.compress.prunable(model)], stop)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="empty"):
        evaluate_changes(model, [], [("linear.weight", torch.zeros_like)])
