"""Wrong settings, files and shapes: each is one clear line that names the value and what is allowed.

`ROWS` is the table for the library, `test_bad_input_cli.ROWS` and `NOTEBOOKS` that for the command line and the
notebooks. After every row the model, the optimizer and the run store are as they were.
"""

import copy
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import cram_bench as cb
from cram_bench.compress import NM, Magnitude, Masks, Quantize
from cram_bench.data import DataError
from cram_bench.experiment import Experiment
from cram_bench.files import sealed
from cram_bench.recipes import grid, profile_changes, recipe
from cram_bench.runs import Run, RunError, Store, ensure, ensure_all
from cram_bench.runs.how import Machine
from cram_bench.train import DivergedError, evaluate, fit

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A store with one finished run, and the digits; only read."""
    train, test = cb.data.load("digits")
    store = Store(tmp_path_factory.mktemp("made"))
    return SimpleNamespace(
        train=train, test=test, store=store, run=ensure(recipe("digits", epochs=1), store, progress=False)
    )


class World:
    """What a row may use: data, an untrained model with its optimizer, a finished run, and an empty folder."""

    def __init__(self, made, tmp):
        self.tmp, self.train, self.test = tmp, made.train, made.test
        self.few = made.test.sample(40)
        self.pairs = list(self.few.batches(20))
        torch.manual_seed(0)
        self.model = cb.models.create("convnet", 10, 1)
        self.base = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.made = made

    @property
    def run(self) -> Run:
        """A finished run of one's own, to damage."""
        target = self.store.root / self.made.run.id
        if not target.exists():
            shutil.copytree(self.made.run.path, target)
        return Run(target, self.made.run.experiment)

    @property
    def store(self) -> Store:
        return Store(self.tmp / "own")

    def scores(self) -> pd.DataFrame:
        return pd.DataFrame({"state": ["dense"], "accuracy": [0.5]})

    def closure(self):
        self.base.zero_grad()
        loss = F.cross_entropy(self.model(self.pairs[0][0]), self.pairs[0][1])
        loss.backward()
        return loss

    def silent(self) -> None:
        self.closure()

    def fit(self, **changes):
        options = {"train": self.few, "epochs": 1, "batch_size": 20, "model": self.model, "optimizer": self.base}
        return fit(**(options | changes))

    def layerwise(self, rest):
        return cb.prune.apply_(self.model, f"exactobs{rest}", self.few)

    def labelled(self, labels):
        return [(self.pairs[0][0], labels)]

    def pictures(self, damage=None) -> Path:
        """A sound image folder of two classes, which `damage` then breaks."""
        root = self.tmp / "pets"
        for split in ("train", "test"):
            for index, name in enumerate(("cat", "dog")):
                (root / split / name).mkdir(parents=True)
                Image.new("RGB", (16, 16), (90 * index, 9, 9)).save(root / split / name / "0.png")
        if damage is not None:
            damage(root)
        return root

    def load(self, damage):
        return cb.data.load(self.pictures(damage))

    def parquet(self, columns=None, damage=None):
        file = io.BytesIO()
        Image.new("RGB", (32, 32)).save(file, "PNG")
        image = {"bytes": file.getvalue(), "path": None}
        sound = {"img": [image] * 2, "label": [0, 1]}
        (self.tmp / "data" / "cifar10").mkdir(parents=True)
        for split in ("train", "test"):
            table = {"img": [image] * 2} | columns if columns and split == "test" else sound
            pq.write_table(pa.table(table), self.tmp / "data" / "cifar10" / f"{split}-0.parquet")
        if damage is not None:
            damage(self.tmp / "data" / "cifar10" / "test-0.parquet")
        return cb.data.load("cifar10", self.tmp / "data")

    def sentences(self, content: bytes):
        (self.tmp / "sst2").mkdir()
        for split in ("train", "test"):
            (self.tmp / "sst2" / f"{split}.tsv").write_bytes(content)
        return cb.data.load("sst2", self.tmp, model="minilm")

    def file(self, name="file", content=b"x") -> Path:
        (self.tmp / name).write_bytes(content)
        return self.tmp / name

    def damaged(self, name, content, resign=False) -> Run:
        """Damage a file of the run; with `resign`, enter its checksum, as somebody who means harm would."""
        run = self.run
        if content is None:
            (run.path / name).unlink()
        elif callable(content):
            content(run.path / name)
        else:
            (run.path / name).write_bytes(content)
        if resign:
            environment = json.loads((run.path / "environment.json").read_text())
            environment["sha256"][name] = hashlib.sha256((run.path / name).read_bytes()).hexdigest()
            (run.path / "environment.json").write_text(sealed(environment, "environment.json"))
        return run

    def curves(self):
        rows = [("sgd", 0, "global", s, False, 0.5) for s in (0.0, 0.5)]
        return pd.DataFrame(rows, columns=["method", "seed", "pattern", "sparsity", "calibrated", "accuracy"])


@pytest.fixture
def world(made, tmp_path):
    return World(made, tmp_path)


def bomb(path: Path) -> None:
    """Write a PNG of a few bytes that claims to have 40,000 × 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def poisoned(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.convs[1].weight.data[0, 0, 0, 0] = NAN
    return model


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def of(**settings):
    return lambda w: Experiment.of(settings)


def rec(method="sgd", **changes):
    return lambda w: recipe("digits", method, **changes)


# ---------------------------------------------------------------- the table: id, call, exception, words of its message

SETTINGS = [
    ("epochs: bool", of(epochs=True), TypeError, ("epochs", "int", "True")),
    ("epochs: text", of(epochs="ten"), TypeError, ("epochs", "int", "'ten'")),
    ("epochs: none", of(epochs=None), TypeError, ("epochs", "int", "None")),
    ("epochs: nan", of(epochs=NAN), TypeError, ("epochs", "int", "nan")),
    ("epochs: zero", of(epochs=0), ValueError, ("epochs", "from 1 to", "not 0")),
    ("epochs: more than a life", of(epochs=10**400), ValueError, ("epochs", "from 1 to 1000000", "not 1000")),
    ("epochs: more than a life, recipe", rec(epochs=10**400), ValueError, ("epochs", "from 1 to 1000000")),
    ("lr: nan", of(lr=NAN), ValueError, ("lr", "positive", "nan")),
    ("lr: infinite", of(lr=INF), ValueError, ("lr", "positive", "inf")),
    ("lr: negative", of(lr=-0.1), ValueError, ("lr", "positive", "-0.1")),
    ("lr: text", of(lr="1e-3"), TypeError, ("lr", "float", "'1e-3'")),
    ("lr: list", of(lr=[0.1]), TypeError, ("lr", "float", "[0.1]")),
    ("lr: an integer beyond floats", of(lr=10**400), TypeError, ("lr", "float")),
    ("seed: negative", of(seed=-1), ValueError, ("seed", "from 0", "-1")),
    ("seed: too large", of(seed=2**31), ValueError, ("seed", "2**31 - 1", "2147483648")),
    ("batch_size: one", of(batch_size=1), ValueError, ("batch_size", "at least 2", "not 1")),
    ("momentum: one", of(momentum=1.0), ValueError, ("momentum", "[0, 1)", "1.0")),
    ("weight_decay: nan", of(weight_decay=NAN), ValueError, ("weight_decay", "not negative", "nan")),
    ("warmup: longer than training", of(epochs=2, warmup_epochs=3.0), ValueError, ("warmup_epochs", "3.0")),
    ("rho: infinite", of(method="sam", rho=INF), ValueError, ("rho", "not negative", "inf")),
    ("precision: unknown", of(precision="float16"), ValueError, ("precision", "bfloat16", "'float16'")),
    ("density: zero", of(optimizer="s-m-fac", density=0.0), ValueError, ("density", "in (0, 1]", "not 0.0")),
    ("density: above one", of(optimizer="s-ggt", density=1.5), ValueError, ("density", "in (0, 1]", "not 1.5")),
    ("damping: zero", of(optimizer="m-fac", damping=0.0), ValueError, ("damping", "positive", "not 0.0")),
    ("gradients: none", of(optimizer="ggt", gradients=0), ValueError, ("gradients", "at least 1", "not 0")),
    ("rank: none", of(optimizer="lowrank-m-fac", rank=0), ValueError, ("rank", "at least 1", "not 0")),
    ("divisor: unknown", of(optimizer="m-fac", divisor="m"), ValueError, ("divisor", "window or count", "'m'")),
    ("storage: unknown", of(optimizer="m-fac", storage="half"), ValueError, ("storage", "bfloat16", "'half'")),
    ("rank of S-M-FAC", of(optimizer="s-m-fac", rank=4), ValueError, ("no setting 'rank'", "lowrank-m-fac")),
    ("optimizer: unknown", of(optimizer="adam"), ValueError, ("optimizer", "allowed: sgd, adamw", "'adam'")),
    ("resize: tiny", of(resize=4), ValueError, ("resize", "from 8", "not 4")),
    ("resize: beyond memory", of(resize=10**6), ValueError, ("resize", "to 4096 pixels", "1000000")),
    ("holdout: negative", of(holdout=-1), ValueError, ("holdout", "not negative", "-1")),
    ("sample: negative", of(sample=-1), ValueError, ("sample", "not negative", "-1")),
    (
        "sample: more than are left",
        lambda w: Experiment.of({"holdout": 200, "sample": 1098}).load_data(),
        ValueError,
        ("sample", "at most the 1097 training images", "1098"),
    ),
    (
        "transfer: rates and nothing to choose by",
        lambda w: cb.recipes.transfer("cifar10", "digits", ["sgd"], 1, [0.9], rates=[0.01, 0.1]),
        ValueError,
        ("rates", "held_out", "[0.01, 0.1]"),
    ),
    (
        "transfer: rate 0",
        lambda w: cb.recipes.transfer("cifar10", "digits", ["sgd"], 1, [0.9], rates=[0.0]),
        ValueError,
        ("lr", "positive", "0.0"),
    ),
    ("holdout: all", lambda w: Experiment.of({"holdout": 5000}).load_data(), ValueError, ("5000", "1297 images")),
    ("model: unknown", of(model="resnet21"), ValueError, ("'resnet21'", "did you mean 'resnet20'")),
    ("method: unknown", rec("sdg"), ValueError, ("'sdg'", "did you mean 'sgd'", "cram+-multi")),
    ("method: list", rec(["sgd"]), TypeError, ("method", "str", "['sgd']")),
    ("setting: unknown", of(epcohs=1), ValueError, ("'epcohs'", "did you mean 'epochs'")),
    ("setting: no text", lambda w: Experiment.of({1: 2}), ValueError, ("unknown setting 1",)),
    ("settings: list", lambda w: Experiment.of([]), TypeError, ("mapping", "[]")),
    ("settings: none", lambda w: Experiment.of(None), TypeError, ("mapping", "None")),
    ("dataset: number", lambda w: recipe(5), TypeError, ("dataset", "str", "5")),
    ("dataset: nul", lambda w: recipe("dig\0its"), ValueError, ("dataset", "without NUL", "x00its")),
    ("compressors: text", rec("cram", compressors="global@0.5"), TypeError, ("compressors", "list", "'global@0.5'")),
    ("compressors: numbers", rec("cram", compressors=[0.5]), TypeError, ("compressors", "list of strings", "[0.5]")),
    ("compressors: empty", rec("cram", compressors=[]), ValueError, ("'cram'", "needs compressors", "()")),
    ("compressors: all weights", rec("cram", compressors=["global@1.0"]), ValueError, ("[0, 1)", "global@1")),
    ("compressors: negative", rec("cram", compressors=["global@-0.1"]), ValueError, ("'global@-0.1'", "global@0.9")),
    ("compressors: half written", rec("cram", compressors=["global@"]), ValueError, ("'global@'", "global@0.9")),
    ("compressors: 2:0", rec("cram", compressors=["2:0"]), ValueError, ("0 < n <= m", "2:0")),
    ("compressors: 5:4", rec("cram", compressors=["5:4"]), ValueError, ("0 < n <= m", "5:4")),
    ("prune: all weights", of(start="0" * 12, prune="uniform@1"), ValueError, ("[0, 1)", "uniform@1")),
    ("prune: without start", of(prune="global@0.5"), ValueError, ("prune needs start", "start ''")),
    ("start: a path upwards", of(start="../../etc"), ValueError, ("start", "twelve hexadecimal", "'../../etc'")),
    ("start: the root", of(start="/"), ValueError, ("start", "twelve hexadecimal", "'/'")),
    ("start: a line break after it", of(start="0" * 12 + "\n"), ValueError, ("start", "twelve", "\\n")),
    ("halves: one gradient", rec("sgd", halves=True), ValueError, ("halves", "belongs to the step sam", "'sgd'")),
    ("plain: one", rec("cram", plain=1.0), ValueError, ("plain", "[0, 1)", "1.0")),
    ("ramp: no CrAM", rec("sam", ramp=True), ValueError, ("ramp", "belongs to the step cram", "'sam'")),
    ("language: a model of images", lambda w: recipe("sst2", model="resnet20"), ValueError, ("'resnet20'", "minilm")),
    ("grid: methods are a text", lambda w: grid("digits", "sgd", 1), TypeError, ("methods", "list", "'sgd'")),
    ("grid: no method", lambda w: grid("digits", [], 1), ValueError, ("methods", "empty")),
    ("grid: seeds below one", lambda w: grid("digits", ["sgd"], -1), ValueError, ("seeds", "from 1", "-1")),
    ("grid: seeds beyond memory", lambda w: grid("digits", ["sgd"], 10**12), ValueError, ("seeds", "10000", "1000000")),
    ("grid: seeds are true", lambda w: grid("digits", ["sgd"], True), TypeError, ("seeds", "integer", "True")),
    ("grid: seeds are a fraction", lambda w: grid("digits", ["sgd"], 1.5), TypeError, ("seeds", "list", "1.5")),
    ("profile: unknown", lambda w: profile_changes("digits", "ful"), ValueError, ("'ful'", "did you mean 'full'")),
    ("ablations: seeds", lambda w: cb.recipes.ablations("digits", 0), ValueError, ("seeds", "not 0")),
    (
        "language: images",
        lambda w: cb.recipes.language("digits", ["sgd"], 1),
        ValueError,
        ("set of sentences 'digits'", "sst2"),
    ),
    (
        "transfer: to itself",
        lambda w: cb.recipes.transfer("digits", "digits", ["sgd"], 1, [0.9]),
        ValueError,
        ("other than the source", "'digits'"),
    ),
    (
        "transfer: sparsities are a number",
        lambda w: cb.recipes.transfer("cifar10", "digits", ["sgd"], 1, 0.9),
        TypeError,
        ("sparsities", "list", "0.9"),
    ),
    (
        "transfer: all weights pruned",
        lambda w: cb.recipes.transfer("cifar10", "digits", ["sgd"], 1, [1.0]),
        ValueError,
        ("[0, 1)", "global@1"),
    ),
]

DATA = [
    ("set: unknown", lambda w: cb.data.load("cifr10"), DataError, ("'cifr10'", "did you mean 'cifar10'", "digits")),
    ("set: a number", lambda w: cb.data.load(5), TypeError, ("data set", "name or the path", "5")),
    ("set: none", lambda w: cb.data.load(None), TypeError, ("data set", "None")),
    ("set: a file", lambda w: cb.data.load(w.file("pets")), DataError, ("pets", "neither a folder nor one of")),
    ("folder: empty", lambda w: cb.data.load(w.tmp), DataError, ("no folder train/", "test/<class>/*")),
    ("folder: no test", lambda w: w.load(lambda f: shutil.rmtree(f / "test")), DataError, ("no folder test/",)),
    (
        "folder: one class",
        lambda w: w.load(lambda f: [shutil.rmtree(f / s / "dog") for s in ("train", "test")]),
        DataError,
        ("1 class folders", "at least 2"),
    ),
    (
        "folder: a class without images",
        lambda w: w.load(lambda f: (f / "test/dog/0.png").unlink()),
        DataError,
        ("test/dog", "holds no image", ".webp"),
    ),
    (
        "folder: a class of tests alone",
        lambda w: w.load(lambda f: (f / "test/emu").mkdir()),
        DataError,
        ("test/emu", "without training images"),
    ),
    (
        "image: no bytes",
        lambda w: w.load(lambda f: (f / "test/cat/0.png").write_bytes(b"")),
        DataError,
        ("test/cat/0.png", "not readable as an image"),
    ),
    (
        "image: truncated",
        lambda w: w.load(lambda f: (f / "train/dog/0.png").write_bytes((f / "train/dog/0.png").read_bytes()[:60])),
        DataError,
        ("train/dog/0.png", "not readable as an image"),
    ),
    (
        "image: a text",
        lambda w: w.load(lambda f: (f / "train/cat/1.jpg").write_text("hello")),
        DataError,
        ("train/cat/1.jpg", "not readable as an image"),
    ),
    (
        "image: a link to nothing",
        lambda w: w.load(lambda f: (f / "train/cat/1.png").symlink_to(f / "none")),
        DataError,
        ("train/cat/1.png", "No such file"),
    ),
    (
        "image: of a format that is not read",
        lambda w: w.load(lambda f: Image.new("RGB", (16, 16)).save(f / "train/cat/1.png", "GIF")),
        DataError,
        ("train/cat/1.png", "none of PNG, JPEG"),
    ),
    (
        "folder: flip in words",
        lambda w: cb.data.load(w.pictures(), flip="no"),
        TypeError,
        ("flip", "True or False", "no"),
    ),
    ("folder: crop in words", lambda w: cb.data.load(w.pictures(), crop="64"), TypeError, ("crop", "'64'")),
    (
        "folder: crop below zero",
        lambda w: cb.data.load(w.pictures(), crop=-1),
        ValueError,
        ("crop", "at least 0", "-1"),
    ),
    ("set: crop of digits", lambda w: cb.data.load("digits", crop=8), ValueError, ("crop", "image folder", "'digits'")),
    ("set: sentences", lambda w: cb.data.load("sst2"), DataError, ("sst2", "model=")),
    (
        "image: a bomb",
        lambda w: w.load(lambda f: bomb(f / "train/cat/1.png")),
        DataError,
        ("train/cat/1.png", "1600000000 pixels"),
    ),
    (
        "image: another size",
        lambda w: w.load(lambda f: Image.new("RGB", (15, 16)).save(f / "test/dog/1.png")),
        DataError,
        ("test/dog/1.png is 15×16", "16×16", "alike"),
    ),
    (
        "image: 32 bits a channel",
        lambda w: w.load(
            lambda f: [
                Image.fromarray(np.full((16, 16), 9, np.int32)).save(p, "TIFF") if p.suffix == ".png" else None
                for p in f.rglob("*.png")
            ]
        ),
        DataError,
        ("0.png", "mode", "8 or 16 bits"),
    ),
    ("parquet: label too large", lambda w: w.parquet({"label": [1, 10]}), DataError, ("label 10", "0 to 9")),
    ("parquet: label negative", lambda w: w.parquet({"label": [1, -1]}), DataError, ("label -1", "0 to 9")),
    ("parquet: label a fraction", lambda w: w.parquet({"label": [1.0, 0.5]}), DataError, ("label (double)", "integer")),
    ("parquet: label a word", lambda w: w.parquet({"label": ["a", "b"]}), DataError, ("label (string)", "integer")),
    ("parquet: label missing", lambda w: w.parquet({"label": [1, None]}), DataError, ("label", "integer in every row")),
    (
        "parquet: no image",
        lambda w: w.parquet({"img": [1, 2], "label": [0, 1]}),
        DataError,
        ("img (int64)", "img.bytes"),
    ),
    (
        "parquet: no rows",
        lambda w: w.parquet(damage=lambda p: pq.write_table(pq.read_table(p).slice(0, 0), p)),
        DataError,
        ("test-0.parquet", "no images"),
    ),
    ("parquet: truncated", lambda w: w.parquet(damage=cut), DataError, ("test-0.parquet", "not readable as Parquet")),
    (
        "data folder: a file",
        lambda w: cb.data.load("cifar10", w.file()),
        DataError,
        ("must be a folder", "file", "CRAM_BENCH_DATA"),
    ),
    (
        "sentences: unknown set",
        lambda w: cb.data.load("sst3", model="minilm"),
        DataError,
        ("'sst3'", "did you mean 'sst2'"),
    ),
    ("sentences: label", lambda w: w.sentences(b"good\t7\n"), DataError, ("line 1", "label from 0 to 1")),
    ("sentences: none", lambda w: w.sentences(b""), DataError, ("train.tsv", "no sentences")),
    ("sentences: not UTF-8", lambda w: w.sentences(b"caf\xe9\t1\n"), DataError, ("train.tsv", "UTF-8")),
    ("batches: zero", lambda w: next(w.train.batches(0)), ValueError, ("batch_size", "at least 1", "not 0")),
    ("batches: a text", lambda w: next(w.train.batches("8")), TypeError, ("batch_size", "integer", "'8'")),
    (
        "batches: larger than the data",
        lambda w: next(w.few.batches(41, drop_last=True)),
        ValueError,
        ("41", "40 images"),
    ),
    ("batches: no seed", lambda w: next(w.few.batches(4, augment=True)), ValueError, ("augmentation", "seed")),
    ("sample: zero", lambda w: w.train.sample(0), ValueError, ("sample", "at least 1", "not 0")),
    ("sample: a fraction", lambda w: w.train.sample(0.5), TypeError, ("sample", "integer", "0.5")),
    ("calibration: zero images", lambda w: w.train.calibration(0), ValueError, ("sample", "at least 1", "not 0")),
    ("calibration: zero a batch", lambda w: w.train.calibration(9, batch_size=0), ValueError, ("batch_size", "not 0")),
    ("split: everything", lambda w: w.few.split(40), ValueError, ("hold out 40 of 40",)),
    ("resized: zero", lambda w: w.few.resized(0), ValueError, ("size", "at least 1", "not 0")),
]

MODELS = [
    ("create: unknown", lambda w: cb.models.create("resnt20", 10), ValueError, ("'resnt20'", "'resnet20'")),
    ("create: none", lambda w: cb.models.create(None, 10), TypeError, ("model", "name", "None")),
    ("create: no class", lambda w: cb.models.create("convnet", 0), ValueError, ("num_classes", "at least 1", "not 0")),
    ("create: classes a text", lambda w: cb.models.create("convnet", "10"), TypeError, ("num_classes", "'10'")),
    (
        "create: channels",
        lambda w: cb.models.create("convnet", 10, -1),
        ValueError,
        ("in_channels", "at least 1", "-1"),
    ),
    (
        "create: size",
        lambda w: cb.models.create("vit_tiny", 10, image_size=30),
        ValueError,
        ("image_size", "divisible", "30"),
    ),
    (
        "create: unknown to torchvision",
        lambda w: cb.models.create("torchvision:resnet81", 10),
        ValueError,
        ("'resnet81'", "did you mean 'resnet18'"),
    ),
    (
        "create: channels of torchvision",
        lambda w: cb.models.create("torchvision:resnet18", 10, 1),
        ValueError,
        ("3 channels", "have 1"),
    ),
    ("parse: number", lambda w: cb.compress.parse(0.9), TypeError, ("compressor", "'global@0.9'", "not 0.9")),
    ("parse: misspelt", lambda w: cb.compress.parse("globl@0.9"), ValueError, ("'globl@0.9'", "global@0.9")),
    ("parse: beyond one", lambda w: cb.compress.parse("global@1.5"), ValueError, ("[0, 1]", "1.5")),
    ("parse: nan", lambda w: cb.compress.parse("global@nan"), ValueError, ("'global@nan'",)),
    ("parse: one bit", lambda w: cb.compress.parse("int1"), ValueError, ("bits", "2 to 16", "not 1")),
    ("parse: 10,000 digits", lambda w: cb.compress.parse("9" * 10**4 + ":4"), ValueError, ("99", "write global@0.9")),
    ("parse: 10,000 parts", lambda w: cb.compress.parse("2:4+" * 10**4), ValueError, ("2:4", "write global@0.9")),
    ("magnitude: text", lambda w: Magnitude("0.5"), TypeError, ("sparsity", "number", "'0.5'")),
    ("magnitude: bool", lambda w: Magnitude(True), TypeError, ("sparsity", "number", "True")),
    ("magnitude: nan", lambda w: Magnitude(NAN), ValueError, ("sparsity", "[0, 1]", "nan")),
    ("magnitude: negative", lambda w: Magnitude(-0.1), ValueError, ("sparsity", "[0, 1]", "-0.1")),
    ("magnitude: scope", lambda w: Magnitude(0.5, "layer"), ValueError, ("scope", "global, uniform", "'layer'")),
    ("n:m: fractions", lambda w: NM(2.0, 4), ValueError, ("integers", "2.0:4")),
    ("n:m: bool", lambda w: NM(True, 2), ValueError, ("integers", "True:2")),
    ("quantize: fraction", lambda w: Quantize(8.0), ValueError, ("bits", "2 to 16", "8.0")),
    ("grid: patterns a text", lambda w: cb.compress.grid("global", [0.5]), TypeError, ("patterns", "list", "'global'")),
    ("grid: sparsity a text", lambda w: cb.compress.grid(["global"], ["0.5"]), TypeError, ("sparsity", "'0.5'")),
    ("grid: sparsity one", lambda w: cb.compress.grid(["global"], [1]), ValueError, ("[0, 1)", "global@1")),
    ("grid: no sparsity", lambda w: cb.compress.grid(["global"], []), ValueError, ("sparsities", "empty")),
    ("apply: number", lambda w: cb.compress.apply_(w.model, 0.9), TypeError, ("compressor", "0.9")),
    ("apply: no model", lambda w: cb.compress.apply_(None, "2:4"), TypeError, ("model", "torch model", "None")),
    (
        "apply: nothing prunable",
        lambda w: cb.compress.apply_(nn.BatchNorm2d(3), "2:4"),
        ValueError,
        ("BatchNorm2d", "no convolution or linear layer"),
    ),
    *(
        (
            f"apply: NaN weights, {spec}",
            lambda w, spec=spec: cb.compress.apply_(poisoned(w.model), spec),
            ValueError,
            ("NaN", "convs.1.weight"),
        )
        for spec in ("global@0.5", "uniform@0.5", "2:4", "int8")
    ),
    ("exclude: a text", lambda w: cb.compress.prunable(w.model, "*.bias"), TypeError, ("exclude", "list", "'*.bias'")),
    ("exclude: a number", lambda w: cb.compress.prunable(w.model, 3), TypeError, ("exclude", "list of patterns", "3")),
    ("exclude: numbers", lambda w: cb.compress.prunable(w.model, [3]), TypeError, ("exclude", "'conv1.*'", "3")),
    (
        "exclude: iterator",
        lambda w: cb.compress.prunable(w.model, iter(["*.bias"])),
        TypeError,
        ("once", "list", "iter"),
    ),
    ("exclude: nothing", lambda w: cb.compress.prunable(w.model, ["conv1.*"]), ValueError, ("'conv1.*'", "convs.0")),
    ("masks: values", lambda w: Masks({"w": torch.tensor([0.5])}), ValueError, ("mask 'w'", "0.5", "0 or 1")),
    ("masks: list", lambda w: Masks({"w": [1, 0]}), TypeError, ("mask 'w'", "tensor", "[1, 0]")),
    ("masks: of another model", lambda w: Masks({"x": torch.ones(1)}).apply_(w.model), ValueError, ("'x'", "ConvNet")),
    ("masks: no file", lambda w: Masks.load(w.tmp / "none"), OSError, ("none",)),
    ("masks: truncated", lambda w: Masks.load(w.file("m.safetensors")), ValueError, ("m.safetensors", "safetensors:")),
    ("shrink: structure", lambda w: cb.deploy.shrink(w.model, {}), ValueError, ("ConvNet", "no structures", "heads")),
    (
        "ziplm: speed-up",
        lambda w: cb.prune.ziplm(cb.models.create("resnet20", 10), w.few, [1], latency=pd.DataFrame()),
        ValueError,
        ("speed-up", "above 1", "not 1"),
    ),
    (
        "ziplm: table",
        lambda w: cb.prune.ziplm(cb.models.create("resnet20", 10), w.few, [2], latency=pd.DataFrame()),
        ValueError,
        ("table", "no column 'structure'", "none"),
    ),
    ("layerwise: ends", lambda w: w.layerwise("(ends=open)@0.5"), ValueError, ("ends", "dense or pruned", "'open'")),
    (
        "layerwise: scope",
        lambda w: w.layerwise("(scope=row)@0.5"),
        ValueError,
        ("scope", "uniform or global", "'row'"),
    ),
    ("layerwise: damping", lambda w: w.layerwise("(damping=0)@0.5"), ValueError, ("damping", "positive", "0")),
    ("layerwise: few", lambda w: w.layerwise("@0.5"), ValueError, ("1,024 examples", "40")),
    ("layerwise: too many", lambda w: w.layerwise("(samples=40)@0.999"), ValueError, ("0.999", "ends=pruned")),
    (
        "layerwise: black images",
        lambda w: cb.prune.apply_(w.model, "sparsegpt(samples=20)@0.5", [(w.pairs[0][0] * 0, w.pairs[0][1])]),
        ValueError,
        ("all inputs", "are zero", "exclude"),
    ),
    (
        "layerwise: an input that is infinite",
        lambda w: cb.prune.apply_(w.model, "exactobs(samples=20)@0.5", [(w.pairs[0][0] * INF, w.pairs[0][1])]),
        ValueError,
        ("not finite",),
    ),
    ("statistics: no batch", lambda w: cb.compress.layer_statistics(w.model, []), ValueError, ("at least one batch",)),
    (
        "statistics: a set",
        lambda w: cb.compress.layer_statistics(w.model, w.few),
        TypeError,
        ("calibration()", "Dataset"),
    ),
    (
        "statistics: other batches",
        lambda w: cb.compress.correct_statistics(w.model, cb.compress.layer_statistics(w.model, w.pairs), w.pairs[:1]),
        ValueError,
        ("2 batches", "the same batches"),
    ),
    (
        "statistics: no reference",
        lambda w: cb.compress.correct_statistics(w.model, None, w.pairs),
        TypeError,
        ("layer_statistics", "None"),
    ),
    ("tuning: no batch", lambda w: cb.compress.tune_batchnorm(w.model, []), ValueError, ("at least two values", "0")),
    ("tuning: none", lambda w: cb.compress.tune_batchnorm(w.model, None), TypeError, ("batches of inputs", "None")),
    ("tuning: a set", lambda w: cb.compress.tune_batchnorm(w.model, w.few), TypeError, ("calibration()", "Dataset")),
    ("tuning: words", lambda w: cb.compress.tune_batchnorm(w.model, ["x"]), TypeError, ("inputs", "'x'")),
]

OPTIM = [
    ("SAM: rho a text", lambda w: cb.optim.SAM(w.model, w.base, rho="0.1"), TypeError, ("rho", "number", "'0.1'")),
    ("SAM: rho nan", lambda w: cb.optim.SAM(w.model, w.base, rho=NAN), ValueError, ("rho", ">= 0", "nan")),
    ("SAM: rho negative", lambda w: cb.optim.SAM(w.model, w.base, rho=-1), ValueError, ("rho", ">= 0", "-1")),
    ("SAM: rho true", lambda w: cb.optim.SAM(w.model, w.base, rho=True), TypeError, ("rho", "number", "True")),
    ("SAM: no base", lambda w: cb.optim.SAM(w.model, None), TypeError, ("base", "torch optimizer", "None")),
    ("SAM: no model", lambda w: cb.optim.SAM([1], w.base), TypeError, ("model", "torch model", "[1]")),
    (
        "SAM: another model's",
        lambda w: cb.optim.SAM(nn.Linear(2, 2), w.base),
        ValueError,
        ("shape (16, 1, 3, 3)", "not in the model"),
    ),
    ("SAFE: all go", lambda w: cb.optim.SAFE(w.model, w.base, 1.0), ValueError, ("[0, 1)", "global@1", "no weight")),
    (
        "SAFE: sparsity a text",
        lambda w: cb.optim.SAFE(w.model, w.base, "0.9"),
        TypeError,
        ("sparsity", "number", "'0.9'"),
    ),
    ("SAFE: penalty", lambda w: cb.optim.SAFE(w.model, w.base, penalty=-1), ValueError, ("penalty", ">= 0", "-1")),
    ("SAFE: every", lambda w: cb.optim.SAFE(w.model, w.base, every=0), ValueError, ("every", "at least 1", "0")),
    ("SAFE: rho nan", lambda w: cb.optim.SAFE(w.model, w.base, rho=NAN), ValueError, ("rho", ">= 0", "nan")),
    (
        "GradualMasks: no model",
        lambda w: cb.optim.GradualMasks([1], w.base),
        TypeError,
        ("model", "torch model", "[1]"),
    ),
    ("GradualMasks: no optimizer", lambda w: cb.optim.GradualMasks(w.model, 0.1), TypeError, ("optimizer", "0.1")),
    (
        "GradualMasks: all go",
        lambda w: cb.optim.GradualMasks(w.model, w.base).prune_("global", 1.0),
        ValueError,
        ("[0, 1)", "no weight"),
    ),
    (
        "GradualMasks: sparsity above 1",
        lambda w: cb.optim.GradualMasks(w.model, w.base).prune_("global", 1.5),
        ValueError,
        ("sparsity", "[0, 1]", "1.5"),
    ),
    (
        "GradualMasks: a sparsity of its own",
        lambda w: cb.optim.GradualMasks(w.model, w.base).prune_("global@0.9", 0.9),
        ValueError,
        ("without a sparsity", "'global@0.9'"),
    ),
    (
        "GradualMasks: a pruner that is no text",
        lambda w: cb.optim.GradualMasks(w.model, w.base).prune_(Magnitude(0.5), 0.9),
        TypeError,
        ("pruner", "text"),
    ),
    (
        "GradualMasks: nothing to look at",
        lambda w: cb.optim.GradualMasks(w.model, w.base).prune_("obert", 0.9),
        ValueError,
        ("obert@0.9", "give batches="),
    ),
    ("CrAM: a text", lambda w: cb.optim.CrAM(w.model, w.base, "2:4"), TypeError, ("Magnitude(0.5)", "'2:4'")),
    ("CrAM: none", lambda w: cb.optim.CrAM(w.model, w.base, None), TypeError, ("Magnitude(0.5)", "None")),
    ("CrAM: empty", lambda w: cb.optim.CrAM(w.model, w.base, []), ValueError, ("at least one compressor",)),
    ("CrAM: all", lambda w: cb.optim.CrAM(w.model, w.base, Magnitude(1.0)), ValueError, ("[0, 1)", "global@1")),
    (
        "CrAM: mask_interval",
        lambda w: cb.optim.CrAM(w.model, w.base, Magnitude(0.5), mask_interval=0),
        ValueError,
        ("mask_interval", ">= 1", "not 0"),
    ),
    (
        "CrAM: plain a text",
        lambda w: cb.optim.CrAM(w.model, w.base, Magnitude(0.5), plain="x"),
        TypeError,
        ("plain", "number", "'x'"),
    ),
    (
        "CrAM: seed",
        lambda w: cb.optim.CrAM(w.model, w.base, Magnitude(0.5), seed=-1),
        ValueError,
        ("seed", "at least 0", "-1"),
    ),
    (
        "CrAM: exclude",
        lambda w: cb.optim.CrAM(w.model, w.base, Magnitude(0.5), exclude="conv*"),
        TypeError,
        ("exclude", "list", "'conv*'"),
    ),
    (
        "CrAM: nothing prunable",
        lambda w: cb.optim.CrAM(n := nn.BatchNorm1d(2), torch.optim.SGD(n.parameters(), lr=0.1), Magnitude(0.5)),
        ValueError,
        ("BatchNorm1d", "no prunable weight"),
    ),
    (
        "CrAMSingle: ascent",
        lambda w: cb.optim.CrAMSingle(w.model, w.base, Magnitude(0.5), ascent="up"),
        ValueError,
        ("ascent", "gradient, momentum", "'up'"),
    ),
    (
        "MomentumSAM: no momentum",
        lambda w: cb.optim.MomentumSAM(w.model, torch.optim.SGD(w.model.parameters(), lr=0.1)),
        ValueError,
        ("momentum", "keeps none: SGD"),
    ),
    ("MFAC: no row", lambda w: cb.optim.MFAC(w.model, w.base, 0), ValueError, ("gradients", "at least 1", "not 0")),
    ("MFAC: rows a text", lambda w: cb.optim.MFAC(w.model, w.base, "9"), TypeError, ("gradients", "integer", "'9'")),
    ("MFAC: no damping", lambda w: cb.optim.MFAC(w.model, w.base, 9, 0), ValueError, ("damping", "positive", "0")),
    ("MFAC: damping < 0", lambda w: cb.optim.MFAC(w.model, w.base, 9, -1), ValueError, ("damping", "positive", "-1")),
    ("GGT: damping nan", lambda w: cb.optim.GGT(w.model, w.base, 9, NAN), ValueError, ("damping", "nan")),
    ("MFAC: divisor", lambda w: cb.optim.MFAC(w.model, w.base, 9, 1, "m"), ValueError, ("divisor", "count", "'m'")),
    ("MFAC: decay", lambda w: cb.optim.MFAC(w.model, w.base, decay=-1.0), ValueError, ("decay", ">= 0", "-1")),
    ("MFAC: decoupled", lambda w: cb.optim.MFAC(w.model, w.base, decoupled=2), TypeError, ("decoupled", "True", "2")),
    (
        "MFAC: decoupled decay of one",
        lambda w: cb.optim.MFAC(w.model, w.base, decay=1, decoupled=True),
        ValueError,
        ("decay", "[0, 1]", "1.0"),
    ),
    (
        "MFAC: float16",
        lambda w: cb.optim.MFAC(w.model, w.base, dtype=torch.float16),
        ValueError,
        ("dtype", "torch.bfloat16", "torch.float16"),
    ),
    ("EFCP: ring a text", lambda w: cb.optim.EFCP(w.model, w.base, "topk"), TypeError, ("ring", "TopK", "'topk'")),
    ("EFCP: spectrum", lambda w: cb.optim.EFCP(w.model, w.base, spectrum="m"), ValueError, ("mfac or ggt", "'m'")),
    ("TopK: nothing", lambda w: cb.optim.TopK(0), ValueError, ("density", "(0, 1]", "not 0")),
    ("TopK: too much", lambda w: cb.optim.TopK(1.1), ValueError, ("density", "(0, 1]", "1.1")),
    ("TopK: below nothing", lambda w: cb.optim.TopK(-0.1), ValueError, ("density", "(0, 1]", "-0.1")),
    ("TopK: density nan", lambda w: cb.optim.TopK(NAN), ValueError, ("density", "finite", "nan")),
    ("TopK: feedback", lambda w: cb.optim.TopK(0.1, feedback=2), TypeError, ("feedback", "True or False", "2")),
    ("LowRank: feedback", lambda w: cb.optim.LowRank(4, 2), TypeError, ("feedback", "True or False", "2")),
    ("LowRank: rank", lambda w: cb.optim.LowRank(0), ValueError, ("rank", "at least 1", "0")),
    ("Dense: sharded", lambda w: cb.optim.Dense("yes"), TypeError, ("sharded", "True or False", "'yes'")),
    ("TopK: a text", lambda w: cb.optim.TopK("1 %"), TypeError, ("density", "number", "'1 %'")),
    ("TopK: block", lambda w: cb.optim.TopK(0.1, -1), ValueError, ("block", "at least 0", "-1")),
    ("LowRank: none", lambda w: cb.optim.LowRank(0), ValueError, ("rank", "at least 1", "not 0")),
    ("HeldMasks: a dict", lambda w: cb.optim.HeldMasks(w.model, w.base, {}), TypeError, ("masks", "Masks", "{}")),
    (
        "HeldMasks: over SAM",
        lambda w: cb.optim.HeldMasks(w.model, cb.optim.SAM(w.model, w.base), Masks({})),
        TypeError,
        ("plain torch optimizer", "SAM"),
    ),
    ("step: no closure", lambda w: cb.optim.SAM(w.model, w.base).step(), TypeError, ("SAM.step", "closure")),
    ("step: a number", lambda w: cb.optim.SAM(w.model, w.base).step(5), TypeError, ("SAM.step", "closure")),
    *(
        (
            f"step: a closure that returns nothing, {name}",
            lambda w, build=build: build(w).step(w.silent),
            TypeError,
            ("closure", "return the loss", "None"),
        )
        for name, build in {
            "SAM": lambda w: cb.optim.SAM(w.model, w.base),
            "CrAM": lambda w: cb.optim.CrAM(w.model, w.base, Magnitude(0.5)),
            "CrAMSingle": lambda w: cb.optim.CrAMSingle(w.model, w.base, Magnitude(0.5)),
        }.items()
    ),
    (
        "load_state_dict: of SGD",
        lambda w: cb.optim.CrAM(w.model, w.base, Magnitude(0.5)).load_state_dict(w.base.state_dict()),
        ValueError,
        ("not saved by CrAM", "'cram'"),
    ),
]

TRAIN = [
    ("fit: no epoch", lambda w: w.fit(epochs=0), ValueError, ("epochs", "at least 1", "not 0")),
    ("fit: epochs true", lambda w: w.fit(epochs=True), TypeError, ("epochs", "integer", "True")),
    ("fit: epochs a text", lambda w: w.fit(epochs="3"), TypeError, ("epochs", "integer", "'3'")),
    ("fit: no batch", lambda w: w.fit(batch_size=0), ValueError, ("batch_size", "at least 1", "not 0")),
    ("fit: test_every", lambda w: w.fit(test_every=0), ValueError, ("test_every", "at least 1", "not 0")),
    (
        "fit: warm-up nan",
        lambda w: w.fit(schedule=cb.schedules.Cosine(warmup_epochs=NAN)),
        ValueError,
        ("warmup_epochs", "not negative", "nan"),
    ),
    ("fit: a teacher's name", lambda w: w.fit(loss=cb.losses.Distil("0" * 12)), ValueError, ("loss.taught(model)",)),
    ("fit: a loss of torch", lambda w: w.fit(loss=nn.CrossEntropyLoss()), TypeError, ("loss", "CrossEntropyLoss")),
    ("fit: precision", lambda w: w.fit(precision="half"), ValueError, ("precision", "bfloat16", "'half'")),
    ("fit: seed", lambda w: w.fit(seed="a"), TypeError, ("seed", "integer", "'a'")),
    ("fit: data a list", lambda w: w.fit(train=w.pairs), TypeError, ("train", "Dataset", "tensor")),
    ("fit: data empty", lambda w: w.fit(train=w.few.take([])), ValueError, ("empty",)),
    (
        "fit: labels are fractions",
        lambda w: w.fit(train=replace(w.few, labels=w.few.labels.float())),
        ValueError,
        ("labels", "integers", "float32", "give labels.long()"),
    ),
    (
        "fit: fewer labels than images",
        lambda w: w.fit(train=replace(w.few, labels=w.few.labels[:9])),
        ValueError,
        ("labels", "(40,)", "(9,)"),
    ),
    ("fit: test an iterator", lambda w: w.fit(test=iter(w.pairs)), TypeError, ("more than once", "iterator")),
    ("fit: optimizer none", lambda w: w.fit(optimizer=None), TypeError, ("optimizer", "torch optimizer", "None")),
    ("fit: model a text", lambda w: w.fit(model="convnet"), TypeError, ("model", "torch model", "'convnet'")),
    (
        "fit: labels beyond the classes",
        lambda w: w.fit(train=replace(w.few, labels=w.few.labels + 5)),
        ValueError,
        ("labels", "0 to 9", "not 14"),
    ),
    (
        "fit: fewer outputs than classes",
        lambda w: w.fit(model=(m := cb.models.create("convnet", 3, 1)), optimizer=torch.optim.SGD(m.parameters(), 0.1)),
        ValueError,
        ("output a class, 10", "has 3"),
    ),
    ("evaluate: empty", lambda w: evaluate(w.model, []), ValueError, ("empty",)),
    (
        "evaluate: labels one-hot",
        lambda w: evaluate(w.model, w.labelled(F.one_hot(w.pairs[0][1]))),
        ValueError,
        ("int64 of shape", "labels.argmax(1)"),
    ),
    (
        "evaluate: labels in a column",
        lambda w: evaluate(w.model, w.labelled(w.pairs[0][1][:, None].float())),
        ValueError,
        ("float32 of shape", "labels.flatten().long()"),
    ),
    ("evaluate: none", lambda w: evaluate(w.model, None), TypeError, ("data", "(inputs, labels)", "None")),
    ("evaluate: an iterator", lambda w: evaluate(w.model, iter(w.pairs)), TypeError, ("more than once", "iterator")),
    ("evaluate: no labels", lambda w: evaluate(w.model, [w.pairs[0][0]]), TypeError, ("(inputs, labels)", "tensor")),
    ("evaluate: no batch", lambda w: evaluate(w.model, w.few, 0), ValueError, ("batch_size", "not 0")),
    (
        "evaluate: label -1",
        lambda w: evaluate(w.model, w.labelled(torch.full((20,), -1))),
        ValueError,
        ("0 to 9", "-1"),
    ),
    (
        "evaluate: label 12",
        lambda w: evaluate(w.model, w.labelled(torch.full((20,), 12))),
        ValueError,
        ("0 to 9", "12"),
    ),
    (
        "evaluate: fractions",
        lambda w: evaluate(w.model, w.labelled(torch.rand(20))),
        ValueError,
        ("integers", "float32"),
    ),
    (
        "evaluate: too few",
        lambda w: evaluate(w.model, w.labelled(torch.zeros(3).long())),
        ValueError,
        ("(20,)", "(3,)"),
    ),
]


def probe(name, *arguments, **options):
    return lambda w: getattr(cb.probes, name)(w.model, w.pairs, *arguments, **options)


PROBES = [
    *(
        (f"{name}: {kind}", lambda w, f=f, bad=bad: f(w.model, bad(w)), error, words)
        for name, f in {
            "sparsity_curve": cb.probes.sparsity_curve,
            "sam_sharpness": cb.probes.sam_sharpness,
            "curvature": cb.probes.curvature,
            "loss_in_ball": cb.probes.loss_in_ball,
        }.items()
        for kind, bad, error, words in (
            ("no data", lambda w: None, TypeError, ("data", "(inputs, labels)", "None")),
            ("empty", lambda w: [], ValueError, ("empty",)),
            ("an iterator", lambda w: iter(w.pairs), TypeError, ("more than once", "iterator")),
            ("a label out of range", lambda w: w.labelled(torch.full((20,), 10)), ValueError, ("0 to 9", "10")),
        )
    ),
    (
        "sparsity_curve: a text",
        probe("sparsity_curve", "global@0.5"),
        TypeError,
        ("compressors", "list", "'global@0.5'"),
    ),
    ("sparsity_curve: number", probe("sparsity_curve", [0.5]), TypeError, ("compressor", "0.5")),
    (
        "sparsity_curve: no calibration",
        probe("sparsity_curve", ["2:4"], []),
        ValueError,
        ("two values per channel", "0"),
    ),
    ("sparsity_curve: iterator", probe("sparsity_curve", ["2:4"], iter([])), TypeError, ("more than once", "iterator")),
    (
        "sparsity_curve: NaN weights",
        lambda w: cb.probes.sparsity_curve(poisoned(w.model), w.pairs, ["2:4"]),
        ValueError,
        ("NaN", "convs.1.weight"),
    ),
    (
        "sparsity_curve: nothing prunable",
        lambda w: cb.probes.sparsity_curve(nn.Flatten(), w.pairs),
        ValueError,
        ("Flatten", "no prunable weight"),
    ),
    ("flips: misspelt", probe("flips", "globl@0.9"), ValueError, ("'globl@0.9'", "global@0.9")),
    ("calibration_curve: batches", probe("calibration_curve", [], "2:4"), TypeError, ("calibration", "Dataset", "[]")),
    (
        "calibration_curve: sizes",
        lambda w: cb.probes.calibration_curve(w.model, w.pairs, w.few, "2:4", sizes=[0]),
        ValueError,
        ("size", "from 1 to", "not 0"),
    ),
    ("curvature: kind", probe("curvature", kind="fisher"), ValueError, ("kind", "gauss-newton", "'fisher'")),
    ("curvature: top", probe("curvature", 0), ValueError, ("top", "at least 1", "not 0")),
    ("curvature: parts", probe("curvature", parts="4"), TypeError, ("parts", "integer", "'4'")),
    ("curvature: too few", probe("curvature", parts=41), ValueError, ("40 samples", "41 parts")),
    ("spectral_density: parts", probe("spectral_density", parts=1), ValueError, ("parts", "at least 2", "not 1")),
    ("spectral_density: points", probe("spectral_density", points=0), ValueError, ("points", "at least 1", "not 0")),
    ("loss_in_ball: radius", probe("loss_in_ball", NAN), ValueError, ("radius", "finite", "nan")),
    ("loss_in_ball: points", probe("loss_in_ball", 0.5, 0), ValueError, ("points", "at least 1", "not 0")),
    ("loss_in_ball: directions", probe("loss_in_ball", 0.5, 3, 0), ValueError, ("directions", "at least 1", "not 0")),
    ("loss_in_plane: radius", probe("loss_in_plane", -1), ValueError, ("radius", ">= 0", "-1")),
    ("loss_along_compression: points", probe("loss_along_compression", "2:4", -1), ValueError, ("points", "-1")),
    (
        "loss_along_compression: end",
        probe("loss_along_compression", "2:4", end=INF),
        ValueError,
        ("end", "finite", "inf"),
    ),
    ("loss_along_compressions: none", probe("loss_along_compressions", []), ValueError, ("compressors", "empty")),
    (
        "loss_on_grid: a name",
        probe("loss_on_grid", [{"x": torch.ones(1)}], [0.0]),
        ValueError,
        ("'x'", "not a parameter"),
    ),
    (
        "loss_on_grid: a shape",
        probe("loss_on_grid", [{"linear.bias": torch.ones(3)}], [0.0]),
        ValueError,
        ("'linear.bias'", "(3,)", "(10,)"),
    ),
    ("loss_on_grid: no step", probe("loss_on_grid", [], []), ValueError, ("steps", "empty")),
    ("layer_sensitivity: a number", probe("layer_sensitivity", 0.5), TypeError, ("sparsities", "list", "0.5")),
    (
        "layer_sensitivity: a sparsity too",
        lambda w: cb.probes.layer_sensitivity(w.model, w.few, [0.5], pruner="greedy@0.9", batches=w.few),
        ValueError,
        ("pruner", "without a sparsity", "'greedy@0.9'"),
    ),
    ("layer_sensitivity: beyond", probe("layer_sensitivity", [1.5]), ValueError, ("sparsity", "[0, 1]", "1.5")),
    ("layer_blame: 5:4", probe("layer_blame", "5:4"), ValueError, ("0 < n <= m", "5:4")),
    ("weight_histogram: bins", lambda w: cb.probes.weight_histogram(w.model, 0), ValueError, ("bins", "not 0")),
    (
        "weight_histogram: NaN",
        lambda w: cb.probes.weight_histogram(poisoned(w.model)),
        ValueError,
        ("finite", "convs.1.weight"),
    ),
    (
        "loss_along_path: another model",
        lambda w: cb.probes.loss_along_path(w.model, cb.models.create("convnet", 3, 1), w.pairs),
        ValueError,
        ("differ in linear.bias", "(10,)", "(3,)"),
    ),
    (
        "loss_on_plane: one line",
        lambda w: cb.probes.loss_on_plane(w.model, w.model, w.model, w.pairs),
        ValueError,
        ("one line",),
    ),
    (
        "loss_at: shares",
        lambda w: cb.probes.loss_at(w.model, [w.model], w.pairs, [(1, 2)]),
        ValueError,
        ("1 numbers", "(1, 2)"),
    ),
    ("sam_sharpness: forward", probe("sam_sharpness", forward="mean"), TypeError, ("forward", "function", "'mean'")),
    ("curvature: loss", probe("curvature", loss=0.5), TypeError, ("loss", "function", "0.5")),
    ("sam_sharpness: text", probe("sam_sharpness", "x"), TypeError, ("rho", "list", "'x'")),
    ("sam_sharpness: negative", probe("sam_sharpness", [0.1, -1]), ValueError, ("rho", ">= 0", "-1")),
    (
        "sam_sharpness: frozen",
        lambda w: cb.probes.sam_sharpness(copy.deepcopy(w.model).requires_grad_(False), w.pairs),
        ValueError,
        ("ConvNet", "requires_grad"),
    ),
    ("sharpness_over_radii: a number", probe("sharpness_over_radii", 0.1), TypeError, ("radii", "list", "0.1")),
    ("sharpness_over_radii: steps", probe("sharpness_over_radii", [0.1], steps=0), ValueError, ("steps", "not 0")),
    ("cram_gap: rho", probe("cram_gap", ["2:4"], NAN), ValueError, ("rho", "finite", "nan")),
    (
        "cram_gap: too few to tune",
        probe("cram_gap", ["2:4"], calibration=[]),
        ValueError,
        ("BatchNorm", "two values", "given 0"),
    ),
    (
        "anatomy: one method",
        lambda w: cb.recipes.anatomy("digits", ["sgd"]),
        ValueError,
        ("two methods", "['sgd']"),
    ),
    (
        "anatomy: sparsity",
        lambda w: cb.recipes.anatomy("digits", ["sgd", "sam"], sparsity=2),
        ValueError,
        ("sparsity", "[0, 1]", "2"),
    ),
    (
        "calibration plot: a column",
        lambda w: cb.plots.calibration_curve(w.curves()),
        ValueError,
        ("'size'", "accuracy"),
    ),
    ("cram_gap: none", probe("cram_gap", []), ValueError, ("compressors", "empty")),
    ("stability: radius", probe("stability", radius=-1), ValueError, ("radius", ">= 0", "-1")),
    (
        "verdicts: a column",
        lambda w: cb.probes.verdicts(w.curves(), "sgd", "sam"),
        ValueError,
        ("'weights'", "method, seed"),
    ),
    (
        "verdicts: a method",
        lambda w: cb.probes.verdicts(w.curves().assign(weights="dense", loss=1.0), "sdg", "sgd", ["loss"]),
        ValueError,
        ("'sdg'", "did you mean 'sgd'"),
    ),
    ("over_runs: a model", lambda w: cb.probes.over_runs([w.model], len), TypeError, ("a run", "ensure", "ConvNet")),
    ("over_runs: one run", lambda w: cb.probes.over_runs(w.made.run, len), TypeError, ("runs", "list", "Run(")),
    (
        "over_runs: a setting",
        lambda w: cb.probes.over_runs([w.made.run], len, settings=["epcohs"]),
        ValueError,
        ("'epcohs'", "did you mean 'epochs'"),
    ),
    (
        "transfer_accuracy: no source",
        lambda w: cb.probes.transfer_accuracy([w.made.run], []),
        ValueError,
        (recipe("digits", epochs=1).id, "not among the sources"),
    ),
    (
        "mean_and_std: a column",
        lambda w: cb.probes.mean_and_std(w.curves(), "loss", ["method"]),
        ValueError,
        ("'loss'", "accuracy"),
    ),
]

PLOTS = [
    (
        "accuracy: a column",
        lambda w: cb.plots.accuracy_vs_sparsity(w.curves()[["method"]]),
        ValueError,
        ("'seed'", "method"),
    ),
    ("accuracy: no rows", lambda w: cb.plots.accuracy_vs_sparsity(w.curves()[:0]), ValueError, ("rows", "empty")),
    ("accuracy: none", lambda w: cb.plots.accuracy_vs_sparsity(None), TypeError, ("table", "DataFrame", "None")),
    (
        "accuracy: every run failed",
        lambda w: cb.plots.accuracy_vs_sparsity(pd.DataFrame({"method": ["sgd"], "seed": [0]})),
        ValueError,
        ("'pattern'", "every run failed"),
    ),
    ("gaps: a column", lambda w: cb.plots.gaps(w.curves()), ValueError, ("'gap'", "accuracy")),
    ("planes: a column", lambda w: cb.plots.loss_planes(w.curves()), ValueError, ("'a'", "accuracy")),
    ("layers: no table", lambda w: cb.plots.layer_profile({}), ValueError, ("tables", "empty")),
    ("ablations: a list", lambda w: cb.plots.ablations([0.5]), TypeError, ("table", "DataFrame", "[0.5]")),
    (
        "examples: captions",
        lambda w: cb.plots.examples(w.few.images[:2], ["x"], "t"),
        ValueError,
        ("caption", "2", "not 1"),
    ),
    ("explorer: no run", lambda w: cb.widgets.explorer([]), ValueError, ("at least one finished run",)),
    ("explorer: a text", lambda w: cb.widgets.explorer("runs"), TypeError, ("runs", "list", "'runs'")),
    ("explorer: a path", lambda w: cb.widgets.explorer([w.tmp]), TypeError, ("a run", "ensure")),
    ("explorer: sample", lambda w: cb.widgets.explorer([w.made.run], sample=0), ValueError, ("sample", "not 0")),
    ("explorer: delay", lambda w: cb.widgets.explorer([w.made.run], delay=-1), ValueError, ("delay", ">= 0", "-1")),
]


def malicious(marker: Path) -> bytes:
    """A checkpoint with a valid checksum whose pickle would make a file."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    content = pickle.dumps({"model": Evil()})
    return content + hashlib.sha256(content).digest()


def another_model(path: Path) -> None:
    save_file(cb.models.create("convnet", 3, 1).state_dict(), path)


RUNS = [
    ("store: a file", lambda w: Store(w.file()), RunError, ("must be a folder", "file", "CRAM_BENCH_RUNS")),
    ("open: upwards", lambda w: w.store.open("../../x"), RunError, ("0 finished runs", "'../../x'", "cram-bench runs")),
    ("open: a folder", lambda w: w.store.open(w.tmp), RunError, ("not a finished run", "model.safetensors")),
    ("open: none", lambda w: w.store.open(None), TypeError, ("a run", "beginning of an id", "None")),
    ("open: a file", lambda w: Run.open(w.file()), RunError, ("file", "not a finished run")),
    (
        "settings: damaged",
        lambda w: Run.open(w.damaged("settings.json", b"{", resign=True).path),
        RunError,
        ("settings in", "cannot be used"),
    ),
    (
        "settings: bytes",
        lambda w: Run.open(w.damaged("settings.json", b"\xff\xfe", resign=True).path),
        RunError,
        ("settings in", "Expecting value"),
    ),
    (
        "settings: a list",
        lambda w: Run.open(w.damaged("settings.json", b"[]", resign=True).path),
        RunError,
        ("mapping", "[]"),
    ),
    (
        "settings: missing",
        lambda w: Run.open(w.damaged("settings.json", None).path),
        RunError,
        ("settings.json", "No such file"),
    ),
    (
        "settings: a path as start",
        lambda w: Run.open(w.damaged("settings.json", b'{"start": "../../../etc"}', resign=True).path),
        RunError,
        ("start", "twelve hexadecimal", "'../../../etc'"),
    ),
    (
        "environment: missing",
        lambda w: w.damaged("environment.json", None).load_model(),
        RunError,
        ("environment.json", "No such"),
    ),
    (
        "environment: empty",
        lambda w: w.damaged("environment.json", b"{}").environment,
        RunError,
        ("environment.json", "is damaged", "is missing"),
    ),
    (
        "environment: reused",
        lambda w: ensure(w.damaged("environment.json", b"[]").experiment, w.store),
        RunError,
        ("environment.json", "is damaged", "no JSON object"),
    ),
    ("history: empty", lambda w: w.damaged("history.csv", b"").history, RunError, ("history.csv", "is damaged")),
    (
        "history: empty, signed",
        lambda w: w.damaged("history.csv", b"", resign=True).history,
        RunError,
        ("history.csv", "cannot be used"),
    ),
    (
        "weights: truncated",
        lambda w: w.damaged("model.safetensors", cut).load_model(),
        RunError,
        ("damaged", "checksum"),
    ),
    (
        "weights: truncated and signed",
        lambda w: w.damaged("model.safetensors", cut, resign=True).load_model(),
        RunError,
        ("model.safetensors", "does not fit convnet"),
    ),
    (
        "weights: of another model, signed",
        lambda w: w.damaged("model.safetensors", another_model, resign=True).load_model(),
        RunError,
        ("does not fit convnet", "linear.weight", "[3, 64]"),
    ),
    ("ensure: a name", lambda w: ensure("digits"), TypeError, ("experiment", "recipe", "'digits'")),
    ("ensure: a path as store", lambda w: ensure(Experiment(), "runs"), TypeError, ("store", "Store", "'runs'")),
    ("ensure: a device", lambda w: ensure(Experiment(), w.store, device="gpu"), ValueError, ("device", "cpu", "'gpu'")),
    (
        "ensure: a GPU too many",
        lambda w: ensure(Experiment(), w.store, device="cuda:99"),
        ValueError,
        ("device", "'cuda:99'"),
    ),
    (
        "ensure: no thread",
        lambda w: ensure(Experiment(), w.store, threads=0),
        ValueError,
        ("threads", "at least 1", "not 0"),
    ),
    (
        "ensure: threads a text",
        lambda w: ensure(Experiment(), w.store, threads="2"),
        TypeError,
        ("threads", "integer", "'2'"),
    ),
    (
        "ensure: compile a text",
        lambda w: ensure(Experiment(), w.store, compile="no"),
        TypeError,
        ("compile", "True, False or None", "'no'"),
    ),
    (
        "ensure: workers fewer than none",
        lambda w: ensure(Experiment(), w.store, workers=-1),
        ValueError,
        ("workers", "at least 0", "not -1"),
    ),
    ("ensure: wait", lambda w: ensure(Experiment(), w.store, wait=-1), ValueError, ("wait", ">= 0", "not -1.0")),
    ("ensure: wait a text", lambda w: ensure(Experiment(), w.store, wait="1"), TypeError, ("wait", "number", "'1'")),
    (
        "ensure: data",
        lambda w: ensure(Experiment.of({"dataset": "/nowhere"}), w.store),
        DataError,
        ("'/nowhere'", "digits"),
    ),
    (
        "ensure: batch",
        lambda w: ensure(Experiment(batch_size=4096), w.store),
        ValueError,
        ("batch_size 4096", "1297 images"),
    ),
    (
        "ensure: model and data",
        lambda w: ensure(Experiment(model="torchvision:resnet18"), w.store),
        ValueError,
        ("torchvision:resnet18", "3 channels", "have 1"),
    ),
    (
        "ensure: no source",
        lambda w: ensure(Experiment(start="0" * 12), w.store),
        RunError,
        ("'000000000000'", "no finished run"),
    ),
    (
        "ensure: another model's source",
        lambda w: ensure(recipe("digits", model="resnet20", start=w.run.id), w.store),
        RunError,
        ("does not fit resnet20", recipe("digits", epochs=1).id),
    ),
    ("ensure_all: one", lambda w: ensure_all(Experiment()), TypeError, ("experiments", "list", "Experiment(")),
]


def look(spec, **options):
    return lambda w: cb.prune.apply_(w.model, spec, **({"batches": w.few} | options))


PRUNE = [
    ("unknown", look("gredy@0.9"), ValueError, ("unknown", "'gredy@0.9'", "did you mean 'greedy'")),
    ("no sparsity", look("greedy"), ValueError, ("'greedy'", "needs a sparsity", "greedy@0.9")),
    ("negative", look("greedy@-0.1"), ValueError, ("'greedy@-0.1'", "[0, 1]", "greedy@0.9")),
    ("above one", look("greedy@1.5"), ValueError, ("sparsity", "[0, 1]", "1.5")),
    ("setting", look("greedy(blok=3)@0.9"), ValueError, ("'blok'", "did you mean 'block'")),
    ("setting twice", look("obs(block=3,block=4)@0.9"), ValueError, ("block", "twice")),
    ("block: zero", look("obs(block=0)@0.9"), ValueError, ("block", "at least 1", "0")),
    ("block: text", look("obs(block=a)@0.9"), TypeError, ("block", "int", "'a'")),
    ("damping: zero", look("obd(damping=0)@0.9"), ValueError, ("damping", "positive", "0")),
    ("update", look("obs(update=some)@0.9"), ValueError, ("update", "none, single or joint", "'some'")),
    ("group", look("obert(group=5)@0.9"), ValueError, ("group", "divide", "48")),
    (
        "settings after steps",
        look("obsx4(block=3)@0.9"),
        ValueError,
        ("'obsx4(block=3)@0.9'", "obs(damping=0.1)x16@0.9"),
    ),
    ("spacing", look("obsx4h@0.9"), ValueError, ("'obsx4h@0.9'", "obs(damping=0.1)x16@0.9")),
    ("too few samples", look("exactobs@0.5"), ValueError, ("samples=1024", "there are 40", "samples=40")),
    ("steps", look("obsx0@0.9"), ValueError, ("steps", "at least 1", "not 0")),
    ("masks and sparsity", look("2:4+obs@0.9"), ValueError, ("2:4", "sparsity", "one step")),
    ("number", look(0.9), TypeError, ("compressor or pruner", "greedy@0.9", "0.9")),
    ("no examples", look("obd@0.5", batches=None), ValueError, ("obd@0.5", "batches=")),
    (
        "too few",
        look("obd@0.5"),
        ValueError,
        ("gradients=512", "8 examples", "4,096 examples", "there are 40", "gradients=5"),
    ),
    ("exclude: text", look("obd@0.5", exclude="a"), TypeError, ("exclude", "list of patterns", "'a'")),
    ("in a draw", lambda w: cb.compress.parse("greedy@0.9"), ValueError, ("greedy@0.9", "CrAM", "cb.prune.apply_")),
]

DEPLOY = [
    ("no model", lambda w: cb.deploy.swap_("resnet20", w.few), TypeError, ("model", "a torch model", "'resnet20'")),
    ("no runs", lambda w: cb.deploy.swap_(w.model, w.few, repeats=0), ValueError, ("repeats", "at least 1", "not 0")),
    ("runs: text", lambda w: cb.deploy.swap_(w.model, w.few, repeats="5"), TypeError, ("repeats", "integer", "'5'")),
    ("lazy", lambda w: cb.deploy.swap_(nn.LazyLinear(2), w.few), ValueError, ("weight", "not initialised")),
    ("sparse: text", lambda w: Machine(sparse="yes"), TypeError, ("sparse", "True or False", "'yes'")),
    ("sparse and compiled", lambda w: Machine(sparse=True, compile=True), ValueError, ("compile", "leave one out")),
    ("nothing to put back", lambda w: cb.deploy.dense_(None), TypeError, ("model", "a torch model", "None")),
    ("time: no runs", lambda w: cb.deploy.timed([w.model], w.pairs[0][0], 0), ValueError, ("repeats", "at least 1")),
    (
        "hub: settings", lambda w: cb.deploy.write_hub(w.model, w.tmp / "x", [], w.few, w.scores()), TypeError,
        ("settings of an experiment", "[]"),
    ),
    (
        "hub: table", lambda w: cb.deploy.write_hub(w.model, w.tmp / "x", {}, w.few, w.curves()), ValueError,
        ("state",),
    ),
    ("hub: no folder", lambda w: cb.deploy.from_hub(w.tmp / "nowhere"), OSError, ("nowhere",)),
    (
        "smaller run: units", lambda w: cb.runs.write_shrunk(w.run, w.model, {"heads": [0]}, w.tmp / "x"), ValueError,
        ("'heads'", "0 units", "structure says 1"),
    ),
    (
        "smaller run: structure", lambda w: cb.runs.write_shrunk(w.run, w.model, [0], w.tmp / "x"), TypeError,
        ("structure", "mapping", "[0]"),
    ),
    (
        "counts: no structures", lambda w: cb.prune.structured.to_counts(w.model, w.few, [1]), ValueError,
        ("has no structures that are known",),
    ),
    ("structured: units", lambda w: w.made.run.experiment.but(pruning="structured", units="1,2"), ValueError,
     ("units", "'6 768 6 768'", "'1,2'")),
    ("structured: start", lambda w: w.made.run.experiment.but(pruning="structured", units="1 2"), ValueError,
     ("structured", "start", "id of a run")),
    ("speeds: sparsity", lambda w: cb.probes.speeds(w.model, w.few, w.few, [1.5]), ValueError, ("sparsity", "1.5")),
    ("speeds: runs", lambda w: cb.probes.speeds(w.model, w.few, w.few, repeats=0), ValueError, ("repeats", "not 0")),
]  # fmt: skip

ROWS = [
    (f"{room}: {name}", call, error, words)
    for room, rows in (
        ("settings", SETTINGS),
        ("data", DATA),
        ("models", MODELS),
        ("prune", PRUNE),
        ("deploy", DEPLOY),
        ("optim", OPTIM),
        ("train", TRAIN),
        ("probes", PROBES),
        ("plots", PLOTS),
        ("runs", RUNS),
    )
    for name, call, error, words in rows
]


def check_line(message: str, words: tuple[str, ...]) -> None:
    """One line, not endless, with the value and what is allowed in it."""
    assert message == message.strip()
    assert len(message.splitlines()) == 1
    assert len(message) < 500
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def found(root: Path) -> list[str]:
    """What lies in a store, apart from its locks."""
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if ".locks" not in p.parts and p.is_file())


@pytest.mark.parametrize(("call", "error", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_each_is_one_line_and_changes_nothing(call, error, words, world):
    model, base = world.model, world.base
    before = copy.deepcopy((model.state_dict(), [m.training for m in model.modules()], base.state_dict()))
    store = found(world.made.store.root)
    with pytest.raises(error) as caught:
        call(world)
    check_line(str(caught.value), words)
    for setting in ("rho", "adaptive"):  # of a wrapper; no step of the base reads them
        base.param_groups[0].pop(setting, None)
    assert same((model.state_dict(), [m.training for m in model.modules()], base.state_dict()), before)
    assert found(world.made.store.root) == store
    own = world.tmp / "own"
    assert not [name for name in found(own) if not name.startswith(recipe("digits", epochs=1).id)]
    assert not found(world.tmp / "runs")


def test_the_table_is_long_and_no_row_is_there_twice():
    names = [row[0] for row in ROWS]
    assert len(names) == len(set(names)) >= 200


# ---------------------------------------------------------------- runs that fail, and files that mean harm


def test_a_run_that_diverges_stops_and_is_marked_failed_everywhere(tmp_path):
    store = Store(tmp_path / "own")
    wanted = [recipe("digits", method, epochs=3, lr=lr) for method, lr in (("sgd", 1e6), ("sgd", 0.1), ("cram", 1e6))]
    with pytest.raises(DivergedError) as caught:
        ensure(wanted[0], store, progress=False)
    check_line(str(caught.value), ("in epoch 1", "try a lower lr or rho"))
    runs = ensure_all(wanted, store, progress=False)
    assert [run.failure is None for run in runs] == [False, True, False]
    assert store.table()["state"].value_counts().to_dict() == {"failed": 2, "finished": 1}
    states = cb.runs.summary(runs)["state"].tolist()
    assert states[1] == "finished"
    assert states[0].startswith("failed: ")
    curves = cb.probes.over_runs(runs, cb.probes.sparsity_curve, cb.data.load("digits")[1].sample(50), ["global@0.5"])
    assert curves["accuracy"].isna().sum() == 2
    assert curves["accuracy"].notna().sum() == 2  # dense and pruned, of the one that went well
    assert "failed" in cb.probes.accuracy_table(curves, calibrated=False).to_string()


@pytest.mark.parametrize("method", ["sgd", "sam", "cram+-multi", "cram-single", "momentum-sam"])
def test_nan_weights_stop_the_training_of_every_method(method, world):
    experiment = recipe("digits", method, epochs=2)
    model = poisoned(world.model)
    with pytest.raises(DivergedError) as caught:
        fit(model, experiment.build_optimizer(model), world.few, epochs=2, batch_size=20)
    check_line(str(caught.value), ("epoch 1", "try a lower lr or rho"))


def test_a_checkpoint_that_means_harm_is_not_executed(world, tmp_path):
    marker, wanted = tmp_path / "executed", world.made.run.experiment
    work = world.store.root / ".training" / wanted.id
    work.mkdir(parents=True)
    content = malicious(marker)
    (work / "checkpoint.pt").write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint.pt is damaged, training starts anew") as caught:
        run = ensure(wanted, world.store, progress=False)
    assert not marker.exists()
    assert all(len(str(warning.message).splitlines()) == 1 for warning in caught)
    assert (run.path / "model.safetensors").read_bytes() == (world.made.run.path / "model.safetensors").read_bytes()
    pickle.loads(content[:-32])  # it would have worked
    assert marker.exists()


def test_a_checkpoint_of_another_training_is_refused(world):
    wanted = world.made.run.experiment
    work = world.store.root / ".training" / wanted.id
    work.mkdir(parents=True)
    other = cb.models.create("convnet", 3, 1)
    state = {"model": other.state_dict(), "optimizer": {}, "scheduler": {}, "epoch": 0, "history": []}
    file = io.BytesIO()
    torch.save(state, file)
    (work / "checkpoint.pt").write_bytes(file.getvalue() + hashlib.sha256(file.getvalue()).digest())
    with pytest.raises(RunError) as caught:
        ensure(wanted, world.store, progress=False)
    check_line(str(caught.value), ("checkpoint.pt", "of another training", "delete it"))


def test_a_start_is_looked_for_in_the_store_and_nowhere_else(world, monkeypatch):
    """A folder of that name in the folder where one happens to stand is not it."""
    run = world.run
    elsewhere = world.tmp / "elsewhere"
    shutil.copytree(run.path, elsewhere / run.id)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(RunError, match="no finished run"):
        ensure(recipe("digits", epochs=1, start=run.id), Store(world.tmp / "empty"), progress=False)


@pytest.mark.parametrize("name", ["data.json", "failed.json"])
def test_a_damaged_note_of_a_training(name, world):
    wanted = world.made.run.experiment
    work = world.store.root / ".training" / wanted.id
    work.mkdir(parents=True)
    (work / name).write_bytes(b"\xff{")
    if name == "failed.json":
        with pytest.raises(RunError) as caught:
            ensure(wanted, world.store, progress=False)
        check_line(str(caught.value), ("failed.json is damaged", "delete"))
    else:
        with pytest.warns(UserWarning, match="training starts anew"):
            assert ensure(wanted, world.store, progress=False).failure is None


def test_one_unreadable_history_does_not_hide_the_other_runs(world):
    other = ensure(recipe("digits", epochs=1, seed=1), world.store, progress=False)
    world.damaged("history.csv", b"")
    with pytest.warns(UserWarning, match="left out: .*history.csv is damaged"):
        assert world.store.table()["run"].tolist() == [other.id]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_may_not_be_written(world):
    world.store.root.mkdir()
    world.store.root.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied") as caught:
        ensure(world.made.run.experiment, world.store, progress=False)
    check_line(str(caught.value), ("own",))


# ---------------------------------------------------------------- anything at all

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["2:4", "sam", "int8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
NAMES = st.sampled_from([*Experiment().settings(), "epcohs", "", 1, None])
QUICK = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_settings_build_or_are_refused_in_one_line(chosen):
    for build in (Experiment.of, lambda chosen: recipe("digits", **{str(name): v for name, v in chosen.items()})):
        try:
            experiment = build(
                {k: v for k, v in chosen.items() if build is Experiment.of or k not in ("dataset", "method")}
            )
        except (ValueError, TypeError) as error:
            check_line(str(error), ())
        else:
            assert Experiment.of(json.loads(json.dumps(experiment.settings()))).id == experiment.id


SPECS = st.text(alphabet="globaluniform@.0123456789:+e-int ٢\n", max_size=16) | st.text(max_size=12) | st.lists(
    st.sampled_from(["global", "@", "0.5", "2:4", "+", "int8", "-reference", "uniform@1e-3", "9"]), max_size=5
).map("".join)  # fmt: skip


@QUICK
@given(SPECS | VALUES)
def test_any_specification_is_read_or_refused_in_one_line(spec):
    try:
        compressor = cb.compress.parse(spec)
    except (ValueError, TypeError) as error:
        check_line(str(error), ())
    else:
        assert cb.compress.parse(str(compressor)) == compressor
        assert 0 <= compressor.sparsity <= 1
