"""Trained networks of other libraries, by name."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

from torch import Tensor, nn

from cram_bench.checks import one_line, suggestion, unknown

FORMS = "torchvision:NAME, timm:NAME or hub:NAME"


class HubImages(nn.Module):
    """An image classifier of the hub, which gives its logits as a tensor.

    Args:
        name: of the hub, or a folder that transformers can load.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        transformers = library("transformers", "hub")
        transformers.utils.logging.disable_progress_bar()
        loader = transformers.AutoModelForImageClassification
        # a model's own code stays unread, whatever its files ask for
        log = logging.getLogger("huggingface_hub")
        level = log.level
        log.setLevel(logging.ERROR)  # every try that finds no network is a warning
        try:
            self.body, told = loader.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
        finally:
            log.setLevel(level)
        if told["missing_keys"]:
            raise ValueError(f"it has no trained classifier: {sorted(told['missing_keys'])[0]!r} is missing")

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixel_values=pixels).logits


def pretrained(name: str) -> nn.Module:
    """Return an image classifier with the weights that its library has for it, all its classes included.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, or ``hub:NAME`` of the hub or of a folder that transformers loads.

    Raises:
        ValueError: the name is of another form or unknown, or the weights cannot be had, as without a network.
        ModuleNotFoundError: the library is not installed.
    """
    kind, _, own = name.partition(":")
    if not own or kind not in ("torchvision", "timm", "hub"):
        raise ValueError(f"{name!r} has no weights of its own: give a file of weights, or as a model {FORMS}")
    try:
        if kind == "hub":
            return HubImages(own)
        if kind == "timm":
            return timm_model(own, pretrained=True)
        import torchvision.models

        known = torchvision.models.list_models(module=torchvision.models)
        if own not in known:
            raise KeyError(unknown("torchvision classifier", own, known))
        return torchvision.models.get_model(own, weights="DEFAULT")
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    except ImportError:
        raise
    except Exception as error:  # whatever a library meets that finds no network, no such name, or another's files
        raise ValueError(f"the weights of {name!r} cannot be had: {one_line(error)}") from error


def timm_model(name: str, **options: Any) -> nn.Module:
    """Return a classifier of timm.

    Raises:
        KeyError: the name is unknown; the message is the first argument.
        ModuleNotFoundError: timm is not installed.
    """
    timm = library("timm", "timm")
    if not timm.is_model(name):
        raise KeyError(f"unknown timm classifier {name!r}{suggestion(name, timm.list_models())}")
    return timm.create_model(name, **options)


def library(module: str, prefix: str) -> Any:
    """Import what models of this prefix come from.

    >>> library("no_such_module", "some")
    Traceback (most recent call last):
    ModuleNotFoundError: some:NAME needs no_such_module, which is not installed: pip install no_such_module
    """
    if importlib.util.find_spec(module) is None:
        what = f"{prefix}:NAME needs {module}, which is not installed: pip install {module}"
        raise ModuleNotFoundError(what, name=module)
    return importlib.import_module(module)
