"""Networks by name, each free to say which of its weights are prunable.

A new model is a new file and a line in `BUILDERS`. A model that disagrees with the general rule of
`cram_bench.compress.prunable` defines ``prunable()`` and returns the names of the weights that may be zeroed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from cram_bench.checks import instance, integer, one_line, unknown
from cram_bench.compress import prunable
from cram_bench.models.convnet import convnet
from cram_bench.models.encoder import Classifier, Encoder, check_tokens, is_encoder
from cram_bench.models.pretrained import pretrained, timm_model
from cram_bench.models.resnet import resnet18, resnet20, resnet20_projection
from cram_bench.models.vgg import vgg16_bn
from cram_bench.models.vit import vit_tiny
from cram_bench.models.weights import check_values, load_, read, renamed, storable

__all__ = [
    "BUILDERS",
    "Classifier",
    "check",
    "check_tokens",
    "check_values",
    "create",
    "head",
    "is_encoder",
    "load_",
    "names",
    "pretrained",
    "prunable",
    "read",
    "renamed",
    "storable",
    "unknown",
]

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "convnet": convnet,
    "resnet20": resnet20,
    "resnet20-projection": resnet20_projection,
    "resnet18": resnet18,
    "vgg16_bn": vgg16_bn,
    "vit_tiny": vit_tiny,
}


def names() -> list[str]:
    """Return the names that `create` knows; ``torchvision:NAME``, ``timm:NAME``, ``hub:NAME``, ``minilm`` are more."""
    return list(BUILDERS)


def create(name: str, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Build a freshly initialised network; weights are drawn from torch's default generator.

    Args:
        name: one of `names()`, or ``torchvision:NAME`` for any classifier of torchvision, ``timm:NAME`` for one of
            timm, or ``hub:NAME`` for a pretrained encoder of text, of which ``minilm`` is one; an encoder's weights are
            those of the hub.
        num_classes: number of outputs.
        in_channels: image channels; torchvision's classifiers take 3.
        image_size: side of the image in pixels, for models that must know it.

    Raises:
        ValueError: the name is unknown (with a suggestion), a number is not positive, or a torchvision classifier is
            asked for other channels.
        TypeError: an argument has another type.

    >>> sum(p.numel() for p in create("resnet20", num_classes=10).parameters())
    269722
    """
    instance("model", name, str, "a name")
    integer("num_classes", num_classes, 1)
    integer("in_channels", in_channels, 1)
    integer("image_size", image_size, 1)
    if name.startswith("torchvision:"):
        return _torchvision(name.removeprefix("torchvision:"), num_classes, in_channels)
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), num_classes, in_channels, image_size)
    if is_encoder(name):
        return Encoder(name, num_classes)
    check(name)
    builder = BUILDERS[name]
    options: dict[str, Any] = (
        {"image_size": image_size} if "image_size" in inspect.signature(builder).parameters else {}
    )
    return builder(num_classes=num_classes, in_channels=in_channels, **options)


def check(name: str) -> None:
    """Refuse a name that `create` does not know, with a suggestion; names of other libraries are theirs to refuse."""
    if name not in BUILDERS and not is_encoder(name) and not name.startswith(("torchvision:", "timm:")):
        raise ValueError(unknown("model", name, [*BUILDERS, "minilm", "torchvision:NAME", "timm:NAME", "hub:NAME"]))


def head(model: nn.Module) -> list[str]:
    """Return the names of the last linear layer's parameters: what belongs to the classes and not to the images.

    >>> head(create("resnet20", 10))
    ['linear.weight', 'linear.bias']
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, _ in model.named_parameters() if linear and name.rpartition(".")[0] == linear[-1]]


def _torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(unknown("torchvision classifier", name, known))
    if in_channels != 3:
        raise ValueError(f"torchvision:{name} takes images with 3 channels, and these have {in_channels}")
    # These two return a tuple in training unless told otherwise, and warn about their initialisation.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)


def _timm(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    try:
        try:
            return timm_model(name, img_size=image_size, **options)  # a transformer must know it
        except TypeError:
            return timm_model(name, **options)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"timm:{name} cannot be built for images of {image_size} pixels: {one_line(error)}") from error
