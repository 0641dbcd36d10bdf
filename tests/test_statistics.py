"""Statistics correction: what it matches, what it leaves, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

import cram_bench as cb
from cram_bench.compress import correct_statistics, layer_statistics, prunable


def plain(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=bias), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(196, 12), nn.LayerNorm(12), nn.Linear(12, 4),
    )  # fmt: skip


def normed() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(50, 3, 8, 8))
    return model


def batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(30, 3, 8, 8, dtype=torch.float64, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("make", [plain, normed])
def test_outputs_have_the_dense_models_mean_and_variance(make, count: int) -> None:
    """Of every layer, with one batch and with several, all layers corrected; zeros stay zeros."""
    torch.manual_seed(0)
    model, data = make().double().train(), batches(count)
    reference = layer_statistics(model, data)
    start = copy.deepcopy(model)
    masks = cb.compress.apply_(model, "uniform@0.6")
    assert correct_statistics(model, reference, data) == {}
    assert model.training
    now = layer_statistics(model, data)
    assert list(now.sites) == list(reference.sites)
    names = dict(model.named_modules())
    for name, dense in reference.sites.items():
        found, module = now.sites[name], names[name]
        mean, variance = found.mean, found.variance
        wanted, spread = dense.mean, dense.variance
        if isinstance(module, nn.BatchNorm2d):  # its outputs, worked out from the inputs' statistics
            old = dict(start.named_modules())[name]
            mean, variance = (
                (mean - module.running_mean) / (module.running_var + module.eps).sqrt(),
                variance / (module.running_var + module.eps),
            )
            wanted, spread = (
                (wanted - old.running_mean) / (old.running_var + old.eps).sqrt(),
                spread / (old.running_var + old.eps),
            )
        assert torch.allclose(mean, wanted, rtol=1e-7, atol=1e-9)
        assert torch.allclose(variance, spread, rtol=1e-7, atol=1e-9)
    for name, weight in prunable(model).items():
        assert not weight[~masks[name]].any()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("make", [plain, normed])
def test_a_dense_model_stays_as_it_is(make, count: int) -> None:
    """Up to rounding, in float32."""
    torch.manual_seed(0)
    model, data = make(), [batch.float() for batch in batches(count)]
    before = copy.deepcopy(model.state_dict())
    correct_statistics(model, layer_statistics(model, data), data)
    for key, value in model.state_dict().items():
        assert torch.allclose(value, before[key], rtol=1e-5, atol=1e-6), key


def test_layers_that_batchnorm_follows_are_left_to_it() -> None:
    """Sites are the inputs of BatchNorm and other layers' outputs, in the order of the forward pass."""
    assert list(layer_statistics(normed().double(), batches(1)).sites) == ["1", "4", "7"]
    assert list(layer_statistics(plain().double(), batches(1)).sites) == ["0", "2", "5", "7"]


def test_constant_channels_get_the_mean_alone() -> None:
    """A filter of zeros: its outputs do not vary, and nothing is divided by nothing."""
    torch.manual_seed(0)
    for model in (plain().double(), normed().double()):
        data = batches(1)
        reference = layer_statistics(model, data)
        with torch.no_grad():
            model[0].weight[2] = 0.0
        correct_statistics(model, reference, data)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        first = next(iter(reference.sites))
        if first == "0":
            assert layer_statistics(model, data).sites[first].mean[2].item() == pytest.approx(
                reference.sites[first].mean[2].item()
            )


def test_little_variance_goes_to_the_affine_weight() -> None:
    """Where σ² would be negative, the outputs have the dense model's variance all the same."""
    for affine in (True, False):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=affine)).double().eval()
        x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        reference, dense = layer_statistics(model, [x]), model(x)
        with torch.no_grad():
            model[0].weight.mul_(1e-3)
        left = correct_statistics(model, reference, [x])
        assert torch.allclose(model(x).mean(0), dense.mean(0), atol=0.05 if not affine else 1e-9) or not affine
        assert bool(left) is not affine
        if affine:
            assert torch.allclose(model(x), dense, rtol=1e-6)


def test_a_layer_that_runs_twice_is_corrected_on_all_its_outputs() -> None:
    """On one batch too."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(40, 4, dtype=torch.float64)
    reference = layer_statistics(model, [x])
    assert reference.uses == {"a": 2, "b": 1}
    assert reference.sites["a"].count == 80
    cb.compress.apply_(model, "uniform@0.4")
    assert correct_statistics(model, reference, [x]) == {}
    found, wanted = layer_statistics(model, [x]).sites["b"], reference.sites["b"]
    assert torch.allclose(found.mean, wanted.mean, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found.variance, wanted.variance, rtol=1e-9)


def test_layers_of_transformers_are_scaled_by_output() -> None:
    """``Conv1D`` stores (inputs, outputs); square, so that the other axis would do as well by its shape."""
    library = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model, x = library.Conv1D(4, 4).double(), torch.randn(40, 4, dtype=torch.float64)
    reference = layer_statistics(model, [x])
    with torch.no_grad():
        model.weight[torch.rand(4, 4) < 0.4] = 0.0
    assert correct_statistics(model, reference, [x]) == {}
    found, wanted = layer_statistics(model, [x]).sites[""], reference.sites[""]
    assert torch.allclose(found.mean, wanted.mean, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found.variance, wanted.variance, rtol=1e-9)


def test_what_is_left_is_named() -> None:
    """No bias, a shared weight, a layer that does not run."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.b.weight, self.idle = self.a.weight, nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x)))

    torch.manual_seed(0)
    model, x = Odd().double(), torch.randn(9, 4, dtype=torch.float64)
    before = model.a.weight.detach().clone()
    left = correct_statistics(model, layer_statistics(model, [x]), [x])
    assert set(left) == {"a", "b", "c", "idle"}
    assert "shares" in left["a"]
    assert "no bias" in left["c"]
    assert "did not run" in left["idle"]
    assert torch.equal(model.a.weight, before)


def test_other_batches_and_models_are_refused() -> None:
    """One line each."""
    model, data = plain().double(), batches(2)
    reference = layer_statistics(model, data)
    cases = [
        (lambda: correct_statistics(model, reference, data[:1]), ValueError, "2 batches, and these are 1"),
        (lambda: correct_statistics(model, reference, [data[0], data[1][:4]]), ValueError, "the same batches"),
        (lambda: correct_statistics(nn.Linear(2, 2), reference, data), ValueError, "had a layer"),
        (lambda: correct_statistics(model, {}, data), TypeError, "layer_statistics"),
        (lambda: layer_statistics(model, []), ValueError, "at least one batch"),
        (lambda: layer_statistics(model, [3]), TypeError, "a batch must be inputs"),
        (lambda: layer_statistics(model, [data[0] * torch.inf]), ValueError, "not finite"),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
