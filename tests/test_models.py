import numpy as np
import pytest
import torch

import cram_bench as cb

COUNTS = {
    "convnet": 24346,
    "resnet20": 269722,
    "resnet20-projection": 272474,
    "resnet18": 11173962,
    "vgg16_bn": 14724042,
    "vit_tiny": 5362762,
}


def test_every_listed_model_is_counted_here():
    assert set(cb.models.names()) == set(COUNTS)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameters_shapes_and_prunable_weights(name, count):
    model = cb.models.create(name, num_classes=10, in_channels=3)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    weights = cb.models.prunable(model)
    assert all(weight.ndim > 1 for weight in weights.values())
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1}
    assert matrices - set(weights) == ({"token", "positions"} if name == "vit_tiny" else set())
    grey = cb.models.create(name, num_classes=3, in_channels=1)
    assert grey(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(("name", "size"), [("convnet", 8), ("resnet20", 28), ("vit_tiny", 64)])
def test_other_image_sizes(name, size):
    model = cb.models.create(name, num_classes=4, in_channels=1, image_size=size)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 4)


def test_the_authors_network_starts_as_theirs():
    torch.manual_seed(0)
    draws = [cb.models.create("resnet20-projection", 10) for _ in range(20)]
    for name, std in (("conv1", (2 / 144) ** 0.5), ("layer2.0.shortcut.0", (2 / 32) ** 0.5)):  # N(0, 2/(k²·outputs))
        values = torch.stack([model.get_parameter(f"{name}.weight") for model in draws]).detach()
        assert abs(float(values.std()) / std - 1) < 0.03
        assert abs(float(values.mean()) / std) < 0.03
    linear = torch.stack([model.linear.weight for model in draws]).detach()
    assert float(linear.abs().max()) <= 1 / 8 + 1e-6  # uniform in ± 1/√64
    assert abs(float(linear.std()) * 8 * 3**0.5 - 1) < 0.03


def test_torchvisions_classifiers_by_name():
    model = cb.models.create("torchvision:squeezenet1_1", num_classes=7)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    for name in ("googlenet", "inception_v3"):  # tuples in training, by default
        assert cb.models.create(f"torchvision:{name}", num_classes=7)(torch.zeros(2, 3, 96, 96)).shape == (2, 7)
    with pytest.raises(ValueError, match="3 channels, and these have 1"):
        cb.models.create("torchvision:squeezenet1_1", num_classes=7, in_channels=1)


@pytest.mark.parametrize(
    ("name", "hint"), [("resnet21", "resnet20"), ("vgg16", "vgg16_bn"), ("torchvision:resnet81", "resnet18")]
)
def test_unknown_names_come_with_a_suggestion(name, hint):
    with pytest.raises(ValueError, match=f"did you mean '{hint}'"):
        cb.models.create(name, num_classes=10)


def test_a_patch_that_does_not_fit():
    with pytest.raises(ValueError, match="image_size must be divisible.*30 is not"):
        cb.models.create("vit_tiny", 10, image_size=30)


def filled(model):
    """Give every weight and statistic a value that no version of torch and no initialisation decides."""
    draw = np.random.RandomState(0)  # frozen by numpy
    state = {}
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.from_numpy(draw.standard_normal(value.shape)).double()
        if value.ndim > 1:
            state[name] = noise * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = (noise * 0.1).exp() if name.endswith(("var", "weight")) else noise * 0.1
    model.double().load_state_dict(state, strict=False)
    return model.eval()


COMPUTED = {
    ("convnet", 32): [-0.594689825, -0.907021062, 1.54440008],
    ("convnet", 12): [-0.466755192, -0.635148225, 1.80816281],
    ("resnet20", 32): [-4.78532664, -23.1330103, -68.3146947],
    ("resnet20", 12): [-7.27443523, -13.7512556, -35.8390071],
    ("resnet20-projection", 32): [62.4883728, -6.69976482, -8.86575523],
    ("resnet20-projection", 12): [35.3931525, -12.0318708, 6.06695695],
    ("resnet18", 32): [5.78479231, -43.5691184, 15.6553092],
    ("resnet18", 12): [-2.27554119, -13.8947116, 12.0645837],
    ("vgg16_bn", 32): [1.70789381, 0.00745042069, 0.325209461],
    ("vgg16_bn", 12): [0.0158153478, 0.0985319068, -0.0234751189],
    ("vit_tiny", 32): [1.93298753, -2.92313309, 2.53934851],
    ("vit_tiny", 12): [1.13386129, 0.927188203, -1.41369554],
}
"""The first three logits by model and size of the image, as version 1 of the run's folder has them."""


@pytest.mark.parametrize(("name", "size"), COMPUTED)
def test_every_network_computes_what_stored_runs_were_trained_with(name, size):
    """Another place of a pooling or a shortcut has as many weights, and would give stored weights other accuracies."""
    model = filled(cb.models.create(name, 10, 3, size))
    across = torch.linspace(-2, 2, size, dtype=torch.float64)
    images = torch.stack([torch.sin(3 * across)[:, None] * across, across.outer(across), across.expand(size, size)])
    with torch.no_grad():
        logits = model(images[None])[0]
    assert logits[:3].tolist() == pytest.approx(COMPUTED[name, size], rel=1e-6)


@pytest.mark.parametrize("name", COUNTS)
def test_the_head_is_what_has_a_row_for_every_class(name):
    model = cb.models.create(name, num_classes=7)
    head = [model.get_parameter(name) for name in cb.models.head(model)]
    assert [tuple(p.shape) for p in head] == [(7, head[0].shape[1]), (7,)]
    assert cb.models.head(model) == [name for name, p in model.named_parameters() if p.shape[0] == 7]
