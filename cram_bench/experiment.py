"""Experiments: what is trained, as a frozen value; and the recipes that return one.

A recipe is a plain function. A new method is one line in `METHODS`, after its optimizer has its file in `optim/`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from cram_bench import compress, data, models, text
from cram_bench._checks import instance, integer, items, shown, unknown
from cram_bench._defaults import usual_defaults
from cram_bench._documented import unknown_setting
from cram_bench.optim import SAM, CrAM, CrAMSingle, MomentumSAM


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the trained weights, apart from the machine.

    Device, threads and compilation are how, not what: they are given to the run and noted beside it.

    Raises:
        ValueError: a value is outside what its line below allows; the message names it.
        TypeError: a value has another type than its field.
    """

    dataset: str = "digits"
    """A name that `cram_bench.data.load` knows, or the path of an image folder."""
    model: str = "convnet"
    """A name that `cram_bench.models.create` knows."""
    method: str = "sgd"
    """One of `METHODS`; how tables call it."""
    epochs: int = 20
    """Passes over the training data, from 1 to a million."""
    seed: int = 0
    """Of the initial weights, the order and augmentation of the data, and the draw of compressors; not negative."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 0.1
    """Peak learning rate, positive."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    optimizer: str = "sgd"
    """The base optimizer: ``sgd`` or ``adamw``."""
    weight_decay: float = 5e-4
    """On every parameter, coupled for SGD and decoupled for AdamW; not negative."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the cosine."""
    augment: bool = True
    """Random crop, and `flip`."""
    halves: bool = False
    """Give each of a method's two gradients a half of the batch, so that a step costs what a plain one does."""
    precision: str = "float32"
    """``float32``, or ``bfloat16`` for autocast."""
    rho: float = 0.0
    """Ascent radius of SAM (normalised) and CrAM (not normalised)."""
    compressors: tuple[str, ...] = ()
    """Specifications that CrAM draws from, such as ``global@0.9`` or ``2:4``."""
    sparse_gradients: bool = True
    """Mask CrAM's gradient at the compressed weights."""
    normalize: bool = False
    """Whether CrAM divides its ascent by the norm, as SAM does."""
    mask_interval: int = 1
    """Uses of a compressor per choice of its masks, at least 1."""
    plain: float = 0.0
    """Of CrAM: the probability of a plain step, in [0, 1)."""
    ramp: bool = False
    """Of CrAM: lower that probability linearly from 1 to ``plain`` over the training."""
    ascent: str = "momentum"
    """Of cram-single: ``momentum`` or ``gradient``."""
    start: str = ""
    """Id of the finished run in the same store whose weights to start from; empty for a fresh network."""
    prune: str = ""
    """Specification of a compressor that prunes `start` before the first step; the pruned weights then stay zero."""
    resize: int = 0
    """Pixels a side that images are scaled to, with three channels; 0 leaves them as they are."""
    holdout: int = 0
    """Training images held out for validation: tests then use those, and the test set is not touched."""
    crop: int = 0
    """Pixels a side of the random crops of an image folder that is streamed from disk; 0 decodes all into memory."""
    flip: bool = True
    """Whether augmentation mirrors images at random; ``digits`` and ``mnist`` it never does."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            object.__setattr__(self, item.name, _typed(item.name, getattr(self, item.name), hints[item.name]))
        if self.method not in METHODS:
            raise ValueError(unknown("method", self.method, list(METHODS)))
        models.check(self.model)
        if (self.dataset in data.SENTENCES) != models.is_encoder(self.model):
            raise ValueError(
                f"model {self.model!r} does not read {self.dataset!r}: sentences go with minilm or hub:NAME"
            )
        if self.prune and (not self.start or self.method not in ("sgd", "adamw")):
            given = f"it was given start {self.start!r} and method {self.method!r}"
            raise ValueError(f"prune needs start, the id of a run, and the method sgd or adamw; {given}")
        bounds: dict[str, tuple[bool, str]] = {
            "epochs": (1 <= self.epochs <= 1_000_000, "from 1 to 1000000"),
            "seed": (0 <= self.seed < 2**31, "from 0 to 2**31 - 1"),
            "batch_size": (self.batch_size >= 2, "at least 2, for BatchNorm has to see two"),
            "lr": (self.lr > 0, "positive"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "not negative"),
            "warmup_epochs": (0 <= self.warmup_epochs <= self.epochs, "from 0 to the number of epochs"),
            "precision": (self.precision in ("float32", "bfloat16"), "float32 or bfloat16"),
            "rho": (self.rho >= 0, "not negative"),
            "mask_interval": (self.mask_interval >= 1, "at least 1"),
            "plain": (0 <= self.plain < 1, "in [0, 1)"),
            "ascent": (self.ascent in ("momentum", "gradient"), "momentum or gradient"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            "start": (
                not self.start or re.fullmatch("[0-9a-f]{12}", self.start) is not None,
                "the id of a run, twelve hexadecimal digits",
            ),
            "resize": (self.resize == 0 or 8 <= self.resize <= 4096, "0, or from 8 to 4096 pixels"),
            "holdout": (self.holdout >= 0, "not negative"),
            "crop": (self.crop == 0 or self.crop >= 8, "0, or at least 8 pixels"),
        }
        for name, (holds, allowed) in bounds.items():
            value = getattr(self, name)
            if not holds or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{name} must be {allowed}, not {shown(value)}")
        if self.crop and (self.resize or not data.is_folder(self.dataset)):
            what = f"dataset {self.dataset!r} and resize {self.resize}"
            raise ValueError(f"crop needs an image folder as dataset, and no resize; it was given {what}")
        if self.method in ("sgd", "adamw") and self.optimizer != self.method:
            raise ValueError(
                f"method {self.method!r} is an optimizer of its own; it was given optimizer {self.optimizer!r}"
            )
        if self.halves and (METHODS[self.method].passes != 2 or self.batch_size < 4):
            given = f"it was given method {self.method!r} and batch_size {self.batch_size}"
            raise ValueError(
                f"halves needs a method of two gradients a step, and a batch of 4 images at least; {given}"
            )
        if self.method == "cram-half" and not self.halves:
            raise ValueError("method 'cram-half' needs halves; without them it is 'cram+-multi'")
        if (self.ramp or self.plain) and not METHODS[self.method].compresses:
            raise ValueError(f"plain and ramp belong to the CrAM methods, not to {self.method!r}")
        if (self.ramp or self.plain) and self.halves:
            raise ValueError("plain and ramp leave out gradients, and halves needs both; give one or the other")
        for spec in (*self.compressors, *([self.prune] if self.prune else [])):
            compress.check_leaves(compress.parse(spec))
        if METHODS[self.method].compresses != bool(self.compressors):
            need = (
                "needs compressors, such as ('global@0.5',)"
                if METHODS[self.method].compresses
                else "takes no compressors"
            )
            raise ValueError(f"method {self.method!r} {need}; it was given {self.compressors!r}")

    @property
    def gradients(self) -> float:
        """How often the training evaluates the gradient at every image, on average: epochs × evaluations a step.

        >>> recipe("digits", "cram+", epochs=15).gradients, recipe("digits", "cram-half", epochs=30).gradients
        (30.0, 30.0)
        >>> recipe("digits", "cram+", epochs=20, ramp=True).gradients  # a half of the second gradients is left out
        30.0
        """
        plain = (1 + self.plain) / 2 if self.ramp else self.plain
        second = 0.0 if self.halves else METHODS[self.method].passes - 1
        return self.epochs * (1 + second * (1 - plain))

    @property
    def id(self) -> str:
        """Hash of the settings that differ from the defaults: adding a field keeps old runs addressable."""
        text = json.dumps(self.changed(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, ready for JSON."""
        return {
            f.name: _plain(value)
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default or f.default is MISSING
        }

    def settings(self) -> dict[str, Any]:
        """Return all settings, ready for JSON."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Experiment:
        """Build from a mapping such as `settings` returns; an unknown name is refused with a suggestion."""
        instance("settings", settings, Mapping, "a mapping of names to values")  # type: ignore[type-abstract]
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(unknown_setting(name))
        return cls(**settings)

    def load_data(self, workers: int | None = None) -> tuple[data.Dataset, data.Dataset]:
        """Return (train, test); with `holdout`, training images stand in for the test set.

        `workers` is how many processes decode images that are streamed.
        """
        train: data.Dataset
        test: data.Dataset
        if self.dataset in data.SENTENCES:
            train, test = text.load(self.dataset, self.model)
        else:
            train, test = data.load(self.dataset, crop=self.crop, workers=workers, flip=self.flip)
        if self.resize:
            train, test = train.resized(self.resize), test.resized(self.resize)
        return train.split(self.holdout, seed=0) if self.holdout else (train, test)

    def build_model(self, train: data.Dataset) -> nn.Module:
        """Build the network with the initial weights that `seed` gives."""
        import torch

        with torch.random.fork_rng(), usual_defaults():
            torch.manual_seed(self.seed)
            return models.create(self.model, train.num_classes, train.channels, train.image_size)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """Build the method's optimizer over the parameters of `model`."""
        base: Optimizer
        if self.optimizer == "adamw":
            base = AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay, fused=True)
        else:
            base = SGD(model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)
        return METHODS[self.method].wrap(self, model, base)


@dataclass(frozen=True)
class Method:
    """A way to train: its label in figures, its optimizer, and the paper's constants for it."""

    label: str
    wrap: Callable[[Experiment, nn.Module, Optimizer], Optimizer]
    constants: dict[str, Any]
    passes: int = 2
    """Gradients a step, at the whole batch or, with `Experiment.halves`, at a half of it each."""

    @property
    def compresses(self) -> bool:
        """Whether it draws from `Experiment.compressors`."""
        return bool(self.constants.get("compressors"))


def _base(experiment: Experiment, model: nn.Module, base: Optimizer) -> Optimizer:
    return base


def _sam(experiment: Experiment, model: nn.Module, base: Optimizer) -> Optimizer:
    return SAM(model, base, rho=experiment.rho)


def _momentum_sam(experiment: Experiment, model: nn.Module, base: Optimizer) -> Optimizer:
    return MomentumSAM(model, base, rho=experiment.rho)


def _cram(plus: bool) -> Callable[[Experiment, nn.Module, Optimizer], Optimizer]:
    return lambda experiment, model, base: CrAM(model, base, plus=plus, **_compression(experiment))


def _cram_single(experiment: Experiment, model: nn.Module, base: Optimizer) -> Optimizer:
    ascent: Any = experiment.ascent
    return CrAMSingle(model, base, ascent=ascent, **_compression(experiment))


def _compression(experiment: Experiment) -> dict[str, Any]:
    return {
        "compressors": [compress.parse(spec) for spec in experiment.compressors],
        "rho": experiment.rho,
        "sparse_gradients": experiment.sparse_gradients,
        "normalize": experiment.normalize,
        "mask_interval": experiment.mask_interval,
        "plain": experiment.plain,
        "seed": experiment.seed,
    }


_MULTI = tuple(f"global@{tenths / 10:g}" for tenths in range(3, 10))

_WIDE = (*_MULTI, "global@0.95")

_UPPER = tuple(f"global@{tenths / 10:g}" for tenths in range(5, 10))
_LANGUAGE: dict[str, Any] = {
    "model": "minilm", "epochs": 3, "batch_size": 32, "precision": "bfloat16",
    "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.01,
}  # fmt: skip

METHODS: dict[str, Method] = {
    "sgd": Method("SGD", _base, {}, passes=1),
    "sam": Method("SAM", _sam, {"rho": 0.05}),
    "cram": Method("CrAM", _cram(plus=False), {"rho": 0.2, "compressors": ("global@0.7",)}),
    "cram+": Method("CrAM+", _cram(plus=True), {"rho": 0.2, "compressors": ("global@0.7",)}),
    "cram+-multi": Method("CrAM+-Multi", _cram(plus=True), {"rho": 0.2, "compressors": _MULTI}),
    "cram-single": Method("CrAM-Single", _cram_single, {"rho": 0.02, "compressors": _WIDE, "ramp": True}, passes=1),
    "momentum-sam": Method("Momentum-SAM", _momentum_sam, {"rho": 0.3}, passes=1),
    "cram-half": Method("CrAM-Half", _cram(plus=True), {"rho": 0.2, "compressors": _MULTI, "halves": True}),
    "adamw": Method("AdamW", _base, {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}, passes=1),
    "cram+-ramp": Method("CrAM+-Ramp", _cram(plus=True), {"rho": 0.2, "compressors": _WIDE, "ramp": True}),
}
"""Methods by the name that the command line and the tables use.

ρ of SAM is its paper's default (arXiv 2010.01412, section 3.1); ρ and the sparsities of CrAM+-Multi are those of the
authors' ResNet-20 runs (arXiv 2207.14200); CrAM and CrAM+ take the middle of that range. A new method goes to the end,
for its place gives its colour. What CrAM-Single and CrAM+-Ramp add to the Multi list, 95 %, and that their plain steps
give way to compressed ones, was chosen on 5,000 held-out training images of CIFAR-10 (5 epochs, one seed), never on the
test set.
"""


PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {"digits": {"epochs": 20}, "images": {"epochs": 2}, "sentences": {"epochs": 1}},
    "full": {"digits": {"epochs": 60}, "images": {"epochs": 10}, "sentences": {"epochs": 3}},
}
"""Profile → settings for digits, sentences and all other data."""


def recipe(dataset: str, method: str = "sgd", **changes: Any) -> Experiment:
    """Return the experiment that suits a data set, with the constants of a method, and any setting changed by name.

    Args:
        dataset: a name or the path of an image folder. Where that holds few images, the batch is smaller than 128, and SGD's
            learning rate with it, in proportion (arXiv 1706.02677), unless `changes` has either; AdamW keeps its own, which
            did better so.
        method: one of `METHODS`.
        changes: settings of `Experiment`.

    Raises:
        ValueError: a name is unknown (with a suggestion) or a value not allowed.
        TypeError: a value has another type than its setting.

    >>> recipe("cifar10", "cram+-multi", seed=1).compressors[:2]
    ('global@0.3', 'global@0.4')
    """
    dataset, method = _typed("dataset", dataset, str), _typed("method", method, str)
    if method not in METHODS:
        raise ValueError(unknown("method", method, list(METHODS)))
    if data.is_folder(dataset):
        dataset = str(Path(dataset).expanduser().resolve())
    settings: dict[str, Any] = {"dataset": dataset, "method": method, **METHODS[method].constants}
    if dataset == "digits":
        settings |= {"model": "convnet", "epochs": 20, "augment": True}
    elif dataset in data.SENTENCES:
        settings |= _LANGUAGE
        if method == "sgd":
            settings |= {"optimizer": "sgd", "lr": 0.01}
        if METHODS[method].compresses:
            settings |= {"rho": 1e-3}  # of 1e-3 and 1e-2, the better at 70 % on 800 held-out sentences of sst2
        if settings.get("compressors") in (_MULTI, _WIDE):
            settings |= {"compressors": _UPPER}
    else:
        # 10 epochs as a default that two cores can bear; the paper trains 200.
        settings |= {"model": "resnet20", "epochs": 10, "precision": "bfloat16"}
        if "batch_size" not in changes:
            settings["batch_size"] = size = _batch_size(dataset)
            optimizer = changes.get("optimizer", settings.get("optimizer"))
            if size < 128 and optimizer != "adamw":
                settings["lr"] = settings.get("lr", 0.1) * size / 128
    settings["warmup_epochs"] = (
        min(_typed("epochs", changes.get("epochs", settings["epochs"]), int), 10**9) / 40
    )  # the paper's 5 of 200
    if not METHODS[method].compresses and "compressors" in changes:
        raise ValueError(f"method {method!r} takes no compressors")
    return Experiment.of(settings | changes)


def imagenet_resnet50(dataset: str, method: str = "cram+-multi", **changes: Any) -> Experiment:
    """Return the ImageNet experiment of the CrAM paper (arXiv 2207.14200): ResNet-50, 100 epochs, batch 512.

    SGD at 0.2 with weight decay 1e-4, cosine after 5 % of warm-up; for the CrAM methods of the paper ρ = 0.05, and the
    sparsities 0.5, 0.7 and 0.9 for Multi. Images are streamed in random crops of 224 pixels. bfloat16, and whatever
    another method sets itself, is not the paper's.

    Args:
        dataset: the path of an image folder.
        method: one of `METHODS`.
        changes: settings of `Experiment`, each of which may be changed.

    Raises:
        ValueError: as `recipe`.

    >>> imagenet_resnet50("imagenet", compressors=["2:4", "4:8"], crop=160).lr
    0.2
    """
    settings: dict[str, Any] = {
        "model": "torchvision:resnet50", "crop": 224, "epochs": 100, "batch_size": 512, "lr": 0.2, "weight_decay": 1e-4,
    }  # fmt: skip
    own = METHODS[method].constants if method in METHODS else {}
    settings = {name: value for name, value in settings.items() if name not in own}
    if own.get("rho") == 0.2:  # what the paper gives for CIFAR-10
        settings["rho"] = 0.05
    if own.get("compressors") == _MULTI:
        settings["compressors"] = ("global@0.5", "global@0.7", "global@0.9")
    settings |= changes
    settings.setdefault("warmup_epochs", _typed("epochs", settings["epochs"], int) / 20)
    return recipe(dataset, method, **settings)


RECIPES: dict[str, Callable[..., Experiment]] = {"imagenet-resnet50": imagenet_resnet50}
"""Settings of a paper, by the name that the command line uses: each a function as `recipe` is."""


def named(name: str) -> Callable[..., Experiment]:
    """Return the recipe called `name`.

    Raises:
        ValueError: there is none, with a suggestion.
    """
    if name not in RECIPES:
        raise ValueError(unknown("recipe", name, list(RECIPES)))
    return RECIPES[name]


def profile_changes(dataset: str, profile: str) -> dict[str, Any]:
    """Return the settings of a report's profile: ``quick`` is for a first look, ``full`` for numbers to quote.

    Raises:
        ValueError: the profile is unknown.
    """
    dataset, profile = _typed("dataset", dataset, str), _typed("profile", profile, str)
    if profile not in PROFILES:
        raise ValueError(unknown("profile", profile, list(PROFILES)))
    kind = "digits" if dataset == "digits" else "sentences" if dataset in data.SENTENCES else "images"
    changes = dict(PROFILES[profile][kind])
    if images := data.is_folder(dataset) and data.training_size(dataset):
        changes["epochs"] = max(changes["epochs"], min(60, 10_000 // images))  # few images need more passes
    return changes


def _batch_size(dataset: str) -> int:
    """128 as in the paper, or for a small image folder the power of two that leaves eight steps an epoch."""
    images = data.training_size(dataset)
    return 128 if images == 0 else max(2, min(128, 2 ** int(math.log2(max(2, images / 8)))))


def grid(
    dataset: str, methods: Sequence[str], seeds: int | Sequence[int], model: str = "", epochs: int = 0, **changes: Any
) -> list[Experiment]:
    """Return one experiment per method and seed, methods outermost.

    Args:
        dataset: a name or the path of an image folder.
        methods: names in `METHODS`.
        seeds: a number n for the seeds 0 … n − 1, or the seeds themselves.
        model: empty for what suits the data set.
        epochs: 0 for what suits the data set.
        changes: any other setting of `Experiment`.

    Raises:
        ValueError: a name is unknown, a value not allowed, or there is no method or no seed.
        TypeError: something is no list, or a value has another type than its setting.
    """
    changes |= {
        name: value for name, value in (("model", model), ("epochs", epochs)) if value not in ("", 0) or value is False
    }
    listed = range(integer("seeds", seeds, 1, 10_000)) if isinstance(seeds, int) else items("seeds", seeds, "seeds")
    methods = items("methods", methods, "names such as 'sgd'")
    return [recipe(dataset, method, seed=seed, **changes) for method in methods for seed in listed]


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as the field's type, or refuse it by name. Integers serve as floats, lists as tuples."""
    if kind is float and type(value) is int and abs(value) < 2**1000:  # beyond, it is no float
        return float(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind in (int, float, str, bool):
        if type(value) is not kind:
            raise TypeError(f"{name} must be of type {kind.__name__}, not {shown(value)}")
        if kind is str and "\0" in value:  # no path may hold one
            raise ValueError(f"{name} must be a text without NUL, not {shown(value)}")
        if kind is str and any(
            "\ud800" <= letter <= "\udfff" for letter in value
        ):  # a name in bytes that were not understood
            remedy = "where the locale is not UTF-8, set PYTHONUTF8=1"
            raise ValueError(f"{name} must be a text that UTF-8 can hold, not {shown(value)}; {remedy}")
        return value
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list of strings, not {shown(value)}")
    return tuple(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
