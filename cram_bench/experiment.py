"""An experiment: everything that decides the trained weights, as a tuple of parts. The composition, and nothing else.

What a setting means stands beside the code that it sets: `data.part`, `optim`, `schedules`, `losses`. The experiments
that papers describe are in `recipes`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from cram_bench import models
from cram_bench._defaults import usual_defaults
from cram_bench.checks import instance, unknown
from cram_bench.data import Data, Dataset
from cram_bench.losses import LOSSES, CrossEntropy, Loss
from cram_bench.optim import BASES, PRUNINGS, STEPS, OneShot, Plain, Pruning, Step, Structured
from cram_bench.optim.bases import SGD, Base
from cram_bench.schedules import SCHEDULES, Cosine, Schedule
from cram_bench.settings import ORIGINAL, Part, Text, plain, unknown_setting

KINDS: dict[str, Mapping[str, type[Part]]] = {
    "data": {"": Data},
    "optimizer": BASES,
    "step": STEPS,
    "loss": LOSSES,
    "pruning": PRUNINGS,
    "schedule": SCHEDULES,
}
"""Role → name → part: all that an experiment can be composed of. The first of a role is its default."""

_STEPS = {
    "sam": "sam", "momentum-sam": "momentum-sam", "cram": "cram", "cram-single": "cram-single", "cram+": "cram+",
    "cram+-multi": "cram+", "cram+-ramp": "cram+", "cram-half": "cram+",
}  # fmt: skip
"""The methods of before there were parts, whose name alone says how they step. Frozen: a new method says its step."""

_ID = re.compile("[0-9a-f]{12}")

_OLD = frozenset({"sgd", "adamw", "plain", *_STEPS.values()})
"""The kinds of then: what is not said of them is as `ORIGINAL` has it. Frozen: a new kind has its own defaults."""


@dataclass(frozen=True)
class Experiment(Part):
    """Everything that decides the trained weights, apart from the machine.

    Device, threads and compilation are how, not what: they are given to the run and noted beside it.

    Raises:
        ValueError: a value is outside what its line allows, or two parts do not go together; the message names it.
        TypeError: a value has another type than its field.
    """

    method: Text = "sgd"
    """How tables call it, and which recipe it is of."""
    model: Text = "convnet"
    """A name that `cram_bench.models.create` knows."""
    epochs: Annotated[int, Field(ge=1, le=1_000_000, description="from 1 to 1000000")] = 20
    """Passes over the training data, from 1 to a million."""
    seed: Annotated[int, Field(ge=0, lt=2**31, description="from 0 to 2**31 - 1")] = 0
    """Of the initial weights, the order and augmentation of the data, and the draw of compressors; not negative."""
    batch_size: Annotated[int, Field(ge=2, description="at least 2, for BatchNorm has to see two")] = 128
    """Images per step."""
    precision: Annotated[Literal["float32", "bfloat16"], Field(description="float32 or bfloat16")] = "float32"
    """``float32``, or ``bfloat16`` for autocast."""
    start: Annotated[
        str, Field(pattern="^([0-9a-f]{12})?$", description="the id of a run, twelve hexadecimal digits")
    ] = ""
    """Id of the finished run in the same store whose weights to start from; empty for a fresh network."""
    data: Data = Data()
    optimizer: Base = SGD()
    step: Step = Plain()
    loss: Loss = CrossEntropy()
    pruning: Pruning = OneShot()
    schedule: Schedule = Cosine()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_apart([type(self), *map(type, self.parts)])
        models.check(self.model)
        if self.data.of_sentences != models.is_encoder(self.model):
            raise ValueError(
                f"model {self.model!r} does not read {self.data.dataset!r}: sentences go with minilm or hub:NAME"
            )
        one_shot = isinstance(self.pruning, OneShot) and self.pruning.prune
        if one_shot and not (self.start and isinstance(self.step, Plain)):
            given = f"it was given start {self.start!r} and method {self.method!r}"
            raise ValueError(f"prune needs start, the id of a run, and the method sgd or adamw; {given}")
        if isinstance(self.pruning, Structured) and not self.start:
            raise ValueError("pruning 'structured' needs start, the id of a run, and was given ''")
        if (warmup := getattr(self.schedule, "warmup_epochs", 0.0)) > self.epochs:
            raise ValueError(f"warmup_epochs must be from 0 to the number of epochs, not {warmup}")
        if self.step.halved and self.batch_size < 4:
            raise ValueError(f"halves needs a batch of 4 images at least, and batch_size is {self.batch_size}")
        if self.method in BASES and (self.optimizer.kind != self.method or not isinstance(self.step, Plain)):
            given = f"optimizer {self.optimizer.kind!r} and step {self.step.kind!r}"
            raise ValueError(f"method {self.method!r} is an optimizer of its own; it was given {given}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, by role."""
        return tuple(getattr(self, role) for role in KINDS)

    @property
    def gradients(self) -> float:
        """How often the training evaluates the gradient at every image, on average: epochs × evaluations a step.

        A teacher's forward pass counts as a third of a gradient, which is a forward and a backward pass of twice its
        price: right for a teacher of the student's size.

        >>> from cram_bench.recipes import recipe
        >>> recipe("digits", "cram+", epochs=15).gradients, recipe("digits", "cram-half", epochs=30).gradients
        (30.0, 30.0)
        >>> recipe("digits", "cram+", epochs=20, ramp=True).gradients  # a half of the second gradients is left out
        30.0
        """
        return self.epochs * self.step.cost() * (1 + self.loss.passes / 3)

    @property
    def needs(self) -> tuple[str, ...]:
        """Ids of the runs that have to be there before this one is trained: what it starts from, and its teacher."""
        teacher = getattr(self.loss, "teacher", "")
        return tuple(dict.fromkeys(filter(None, (self.start, teacher if _ID.fullmatch(teacher) else ""))))

    @functools.cached_property
    def id(self) -> str:
        """Hash of the settings that differ from the defaults: adding a setting keeps old runs addressable."""
        text = json.dumps(self.changed(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def settings(self) -> dict[str, Any]:
        """Return all settings by their flat names, ready for JSON."""
        found = super().settings()
        for part in self.parts:
            found |= ({part.role: part.kind} if part.kind else {}) | part.settings()
        return {name: found[name] for name in sorted(found, key=_place)}

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, ready for JSON.

        The default of a kind is the first of its role, and of a step what `method` alone used to say.
        """
        usual = dict(ORIGINAL) | {role: next(iter(known)) for role, known in KINDS.items() if role != "data"}
        usual["step"] = _STEPS.get(self.method, "plain")
        for part in self.parts:
            usual = {part.flat()[f.name]: plain(f.default) for f in fields(part) if f.name in part.flat()} | usual
        return {name: value for name, value in self.settings().items() if value != usual[name]}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Experiment:
        """Build from a mapping such as `settings` returns.

        Files of before there were parts hold every setting: one that no part has is passed over at its default.

        Raises:
            ValueError: a name is unknown, with a suggestion, or no part of this experiment has the setting.
        """
        instance("settings", settings, Mapping, "a mapping of names to values")  # type: ignore[type-abstract]
        return cls._composed(settings, {}, passed_over=ORIGINAL)

    def but(self, **changes: Any) -> Experiment:
        """Return the experiment with some settings changed by name.

        >>> Experiment().but(lr=0.2, seed=1).changed()
        {'seed': 1, 'lr': 0.2}

        Raises:
            ValueError: a name is unknown, with a suggestion, or no part of this experiment has the setting.
        """
        return self._composed(changes, self.settings())

    @classmethod
    def _composed(
        cls, given: Mapping[str, Any], beneath: Mapping[str, Any], passed_over: Mapping[str, Any] | None = None
    ) -> Experiment:
        """Build of what is `given`, and for the rest what is `beneath` or a default; see that each is some part's."""
        left = dict(given)
        method = left.get("method", beneath.get("method", "sgd"))
        if "step" not in given and ("method" in given or "step" not in beneath):
            left["step"] = _STEPS.get(method, "plain") if isinstance(method, str) else "plain"
        kinds: dict[str, type[Part]] = {}
        for role, known in KINDS.items():
            kind = "" if role == "data" else left.pop(role, beneath.get(role, next(iter(known))))
            if not isinstance(kind, str):
                raise TypeError(f"{role} must be of type str, not {kind!r}")
            if kind not in known:
                raise ValueError(unknown(role, kind, list(known)))
            kinds[role] = known[kind]
        _check_apart([cls, *kinds.values()], left)
        parts = {role: kind(**_taken(kind, left, beneath)) for role, kind in kinds.items()}
        own = _taken(cls, left, beneath)
        for name, value in left.items():
            if not (passed_over and name in passed_over and plain(value) == passed_over[name]):
                base = parts["optimizer"].kind
                here = f"method {method!r}" + (f" with optimizer {base!r}" if base not in (method, "sgd") else "")
                everything = [cls, *(part for known in KINDS.values() for part in known.values())]
                raise ValueError(unknown_setting(name, everything, here))
        return cls(**own, **parts)  # type: ignore[arg-type]

    def build_model(self, train: Dataset) -> nn.Module:
        """Build the network with the initial weights that `seed` gives."""
        import torch

        with torch.random.fork_rng(), usual_defaults():
            torch.manual_seed(self.seed)
            return models.create(self.model, train.num_classes, train.channels, train.image_size)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """Build the method's optimizer over the parameters of `model`."""
        return self.step.wrap(model, self.optimizer.build(model), self.seed)

    def load_data(self, workers: int | None = None) -> tuple[Dataset, Dataset]:
        """Return (train, test); with `holdout`, training images stand in for the test set.

        `workers` is how many processes decode images that are streamed.
        """
        return self.data.load(self.model, workers)


def names(bare: bool = False) -> list[str]:
    """Return every setting that there is, by its flat name; with `bare` also by its own, which is understood too."""
    parts: list[type[Part]] = [Experiment, *(part for known in KINDS.values() for part in known.values())]
    found = {outside for part in parts for outside in part.flat().values()} | {role for role in KINDS if role != "data"}
    if bare:
        found |= {name for part in parts for name in part.flat()}
    return sorted(found, key=_place)


def setting(experiment: Experiment, name: str) -> Any:
    """Return a setting by its flat name; what no part has is as `ORIGINAL` has it, or empty."""
    return {**ORIGINAL, **experiment.settings()}.get(name, "")


def differing(experiments: Sequence[Experiment], besides: Sequence[str] = ()) -> list[str]:
    """Return the settings in which experiments differ; one that an experiment lacks counts as `ORIGINAL` has it."""
    left_out = {"step", *besides}  # the method tells the step
    asked = [name for name in names() if name not in left_out]
    known = [{**ORIGINAL, **each.settings()} for each in experiments]
    return [name for name in asked if len({json.dumps(settings.get(name, "")) for settings in known}) > 1]


def _check_apart(kinds: Sequence[type[Part]], given: Mapping[str, Any] = {}) -> None:
    """Refuse two parts whose settings have one name, and what is `given` twice or may mean two settings."""
    owners: dict[str, type[Part]] = {}
    alone: dict[str, list[str]] = {}
    for kind in kinds:
        for name, outside in kind.flat().items():
            if outside in owners:
                both = " and ".join(f"{k.role} {k.kind}".strip() or "every experiment" for k in (owners[outside], kind))
                raise ValueError(f"{outside!r} is a setting of two parts, {both}: one of them needs another name")
            owners[outside] = kind
            if outside != name:
                alone.setdefault(name, []).append(outside)
    for name in given:
        if len(meant := alone.get(name, [])) > 1:
            raise ValueError(f"{name!r} may mean {' or '.join(meant)}: say which")
        if meant and meant[0] in given:
            raise ValueError(f"{meant[0]!r} is given twice, for {name!r} means it too")


def _taken(kind: type[Part], left: dict[str, Any], beneath: Mapping[str, Any]) -> dict[str, Any]:
    """Take from `left` what are settings of `kind`; return its fields, with what is `beneath` or a default."""
    found = {}
    usual = ORIGINAL if kind.kind in _OLD else {}
    for name, outside in kind.flat().items():
        if outside not in left and name in left and outside != name:
            left[outside] = left.pop(name)
        value = left.pop(outside) if outside in left else beneath.get(outside, usual.get(outside, ...))
        if value is not ...:
            found[name] = value
    return found


def _place(name: str) -> tuple[int, str]:
    known = list(ORIGINAL)
    return (known.index(name), "") if name in known else (len(known), name)
