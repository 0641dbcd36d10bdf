"""Image folders of many sizes, decoded by worker processes; and the recipe that is made for them."""

import os
import re
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cram_bench as cb
from cram_bench import runs
from cram_bench.data import DataError, Images, Streamed, streaming
from cram_bench.experiment import Experiment
from cram_bench.recipes import imagenet_resnet50, recipe
from cram_bench.runs import Store, ensure

CROP = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Striped JPEGs, across or along, of sizes around 224 pixels; and a grey one, and a CMYK one."""
    root = tmp_path_factory.mktemp("stripes")
    draw = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 6)):
        for label, name in enumerate(("across", "along")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = draw.integers(150, 300, 2)
                place = np.indices((height, width))[label]
                stripes = np.where(np.sin(place * draw.uniform(0.2, 0.5)) > 0, 200, 50)[..., None]
                noise = draw.normal(0, 20, (height, width, 3))
                image = Image.fromarray((stripes + noise).clip(0, 255).astype(np.uint8))
                mode = {0: "L", 1: "CMYK"}.get(number, "RGB")
                image.convert(mode).save(root / split / name / f"{number:02}.jpg")
    return root


def settings(folder, **changes):
    small = {"model": "torchvision:resnet18", "crop": CROP, "epochs": 1, "batch_size": 8, "lr": 0.01}
    return recipe(str(folder), **(small | changes))


def same(first, second):
    return all(
        torch.equal(x, other) and torch.equal(y, labels)
        for (x, y), (other, labels) in zip(first, second, strict=True)
    )  # fmt: skip


def test_a_folder_is_listed_not_read(folder):
    train, test = streaming.load(folder, CROP)
    assert (len(train), len(test)) == (26, 12)
    assert train.classes == ("across", "along")
    assert (train.channels, train.image_size, train.num_classes) == (3, CROP, 2)
    assert repr(train) == f"Streamed('{folder.name}', 26 images in crops of 3 × 32 × 32, 2 classes)"
    with pytest.raises(DataError, match="all must be alike"):  # which in memory they have to be
        cb.data.load(folder)


def test_batches_follow_from_the_seed_whatever_the_workers(folder):
    train, _ = streaming.load(folder, CROP, workers=0)
    many, _ = streaming.load(folder, CROP, workers=2)
    before = torch.random.get_rng_state()
    first = list(train.batches(8, seed=5, augment=True, drop_last=True, channels_last=True))
    assert same(first, many.batches(8, seed=5, augment=True, drop_last=True))
    assert not same(first, train.batches(8, seed=6, augment=True, drop_last=True))
    assert torch.equal(before, torch.random.get_rng_state())
    assert [tuple(x.shape) for x, _ in first] == [(8, 3, CROP, CROP)] * 3
    assert first[0][0].is_contiguous(memory_format=torch.channels_last)
    assert first[0][0].dtype == torch.float32
    assert len(list(train.batches(8))) == 4


def test_an_image_is_cut_alike_wherever_it_comes(folder):
    train, _ = streaming.load(folder, CROP, workers=0)
    place = 7
    alone = next(train.take([place]).batches(1, seed=5, augment=True))[0][0]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(5)).tolist()
    within = torch.cat([x for x, _ in train.batches(8, seed=5, augment=True)])
    assert torch.equal(within[order.index(place)], alone)


def test_processes_share_a_batch_out(folder):
    train, _ = streaming.load(folder, CROP, workers=0)
    whole = train.batches(8, seed=1, augment=True)
    shares = [train.batches(8, seed=1, augment=True, share=(rank, 2)) for rank in (0, 1)]
    for (inputs, labels), *parts in zip(whole, *shares, strict=True):
        for rank, (part, part_labels) in enumerate(parts):
            assert torch.equal(part, inputs[rank::2])
            assert torch.equal(part_labels, labels[rank::2])


def test_a_tested_image_is_its_scaled_middle(folder):
    _, test = streaming.load(folder, CROP, workers=0)
    inputs, labels = next(test.batches(12))
    assert labels.tolist() == [0] * 6 + [1] * 6
    image = Image.open(folder / "val" / "across" / "02.jpg")
    width, height = image.size
    scale = 37 / min(width, height)  # 8/7 of the crop, as 256 is of 224
    image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - CROP) / 2, (image.height - CROP) / 2
    middle = np.asarray(image.crop((round(left), round(top), round(left) + CROP, round(top) + CROP)))
    ours = (inputs[2] * torch.tensor(streaming.STD)[:, None, None] + torch.tensor(streaming.MEAN)[:, None, None]) * 255
    assert np.abs(ours.numpy() - middle.transpose(2, 0, 1)).mean() < 4  # of 150 between the stripes


def test_a_sample_is_decoded_once(folder):
    train, test = streaming.load(folder, CROP, workers=2)
    sample = test.sample(5, seed=1)
    assert type(sample) is Images
    assert sample.images.shape == (5, 3, CROP, CROP)
    assert sample.images.dtype == torch.uint8
    everything = test.sample(100)
    assert torch.equal(torch.cat([x for x, _ in everything.batches(5)]), torch.cat([x for x, _ in test.batches(5)]))
    rest, held = train.split(6)
    assert isinstance(held, Streamed)
    assert not set(rest.places.tolist()) & set(held.places.tolist())
    calibration = train.calibration(20, batch_size=10)
    assert [x.shape[0] for x, _ in calibration] == [10, 10]
    assert not same(calibration, train.calibration(20, augment=False, batch_size=10))


def test_large_images_are_tested_few_at_a_time(folder):
    _, test = streaming.load(folder, 224)
    assert test.at_once == 111
    assert test.take(range(2)).at_once == 111


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_is_one_line(workers, tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.jpg").write_bytes(b"no image")
    train, _ = streaming.load(tmp_path, CROP, workers)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}/train/a/0.jpg is not readable as an image") as e:
        list(train.batches(1))
    assert "\n" not in str(e.value)
    (tmp_path / "train" / "a" / "0.jpg").unlink()
    with pytest.raises(DataError, match="0.jpg is not readable: .*No such file"):
        list(train.batches(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: streaming.load(folder / "none", CROP), "none is not a folder of images"),
        (lambda folder: streaming.load(folder, CROP, workers=-1), "workers must be 0 or more, not -1"),
        (lambda folder: streaming.load(folder, CROP, 0)[0].resized(8),
         "in crops of 3 × 32 × 32, which are not scaled: leave resize out"),
        (lambda folder: next(streaming.load(folder, CROP, 0)[0].batches(0)), "batch_size must be at least 1, not 0"),
        (lambda folder: settings(folder, crop=4), "crop must be 0, or at least 8 pixels, not 4"),
        (lambda folder: settings(folder, resize=64), "crop needs an image folder as dataset, and no resize"),
        (lambda folder: recipe("cifar10", crop=32), "crop needs an image folder as dataset.*'cifar10'"),
        (lambda folder: cb.recipes.named("imagenet-resnet5"),
         "unknown recipe 'imagenet-resnet5'; did you mean 'imagenet-r"),
        (lambda folder: imagenet_resnet50(str(folder), "cram+multi"), "unknown method .*did you mean 'cram\\+-multi'"),
    ],
)  # fmt: skip
def test_what_cannot_be_streamed(call, message, folder):
    with pytest.raises(ValueError, match=message):
        call(folder)


def test_an_old_run_keeps_its_id():
    assert "crop" not in Experiment().changed()
    assert recipe("digits").id == "df2560540659"


def test_a_streamed_training_resumes_bit_for_bit(folder, tmp_path, monkeypatch):
    wanted = settings(folder, epochs=2, model="resnet20")
    straight = ensure(wanted, Store(tmp_path), workers=2, threads=1)
    on_epoch = runs.Checkpoint.on_epoch

    def interrupted(self, state):
        on_epoch(self, state)
        if state.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "on_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure(wanted, workers=2, threads=1)
    resumed = ensure(wanted, workers=0, threads=1)
    assert (resumed.path / "model.safetensors").read_bytes() == (straight.path / "model.safetensors").read_bytes()
    assert resumed.environment["data"]["image_size"] == CROP


def test_a_network_of_torchvision_is_trained_pruned_and_probed(folder, capsys):
    command = ["train", "--recipe", "imagenet-resnet50", "--dataset", str(folder), "--method", "cram+-multi"]
    changes = {"model": "torchvision:resnet18", "crop": 64, "batch_size": 8, "lr": 0.01, "precision": "float32"}
    pairs = [part for name, value in changes.items() for part in ("-s", name, str(value))]
    assert cb.cli.main([*command, "--epochs", "1", "--workers", "1", "--device", "cpu", *pairs]) == 0
    run = Store().open(capsys.readouterr().out.strip())
    assert run.experiment == imagenet_resnet50(str(folder), epochs=1, **changes)
    assert np.isfinite(run.history["test_loss"]).all()
    train, test = run.experiment.load_data(workers=0)
    curve = cb.probes.sparsity_curve(run.load_model(), test, ["global@0.5"], train.calibration(16, batch_size=8))
    assert curve["accuracy"].between(0, 1).all()
    assert len(cb.probes.cram_gap(run.load_model(), test.sample(6), ["global@0.5"])) == 1


def test_the_recipe_is_the_papers():
    wanted = imagenet_resnet50("imagenet")
    assert (wanted.model, wanted.method, wanted.data.crop) == ("torchvision:resnet50", "cram+-multi", 224)
    assert (wanted.epochs, wanted.schedule.warmup_epochs, wanted.batch_size) == (100, 5.0, 512)
    assert (wanted.optimizer.lr, wanted.optimizer.momentum, wanted.optimizer.weight_decay, wanted.step.rho) == (
        0.2,
        0.9,
        1e-4,
        0.05,
    )
    assert wanted.step.compressors == ("global@0.5", "global@0.7", "global@0.9")
    assert wanted.step.sparse_gradients
    assert imagenet_resnet50("imagenet", epochs=10).schedule.warmup_epochs == 0.5
    assert imagenet_resnet50("imagenet", warmup_epochs=1.0, lr=0.4).optimizer.lr == 0.4
    assert imagenet_resnet50("imagenet", "adamw").optimizer.lr == 1e-3  # its own
    patterns = imagenet_resnet50("imagenet", "cram+", compressors=["2:4", "4:8"])
    assert (patterns.step.rho, patterns.step.compressors) == (0.05, ("2:4", "4:8"))
    for method in cb.recipes.METHODS:
        assert imagenet_resnet50("imagenet", method).data.crop == 224


def test_the_readmes_commands_are_experiments(folder, monkeypatch):
    readme = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    lines = re.findall(
        r"^(?:torchrun .* -m cram_bench|cram-bench) (train .*(?:--recipe|-s crop).*)$", readme, re.MULTILINE
    )
    asked = []
    history = pd.DataFrame([{"epoch": 1, "train_accuracy": 0.5, "test_accuracy": 0.5}])

    def ensure(wanted, **how):
        asked.append(wanted)
        return SimpleNamespace(history=history, experiment=wanted, label="a run", path=folder)

    monkeypatch.setattr(runs, "ensure", ensure)
    for line in lines:
        assert cb.cli.main(shlex.split(re.sub(r"~/\w+", str(folder), line))) == 0
    assert [wanted.model for wanted in asked] == ["torchvision:resnet50", "torchvision:resnet50", "resnet20"]
    assert [wanted.data.crop for wanted in asked] == [224, 160, 64]


def test_resnet50_takes_a_step_of_the_recipe(folder):
    wanted = imagenet_resnet50(str(folder), batch_size=2, crop=64)
    train, _ = wanted.load_data(workers=0)
    model = wanted.build_model(train)
    assert sum(p.numel() for p in model.parameters()) == 23_512_130  # 25.6 million with 1,000 classes
    before = model.conv1.weight.detach().clone()
    history = cb.train.fit(model, wanted.build_optimizer(model), train.take([0, 20]), epochs=1, batch_size=2)
    assert np.isfinite(history[0]["train_loss"])
    assert not torch.equal(before, model.conv1.weight)


def test_flips_are_by_a_coin_mirror_exactly_and_can_be_turned_off(folder):
    (train, _), (plain, _) = (streaming.load(folder, CROP, 0, flip) for flip in (True, False))
    assert (train.flip, plain.flip, plain.sample(2).flip) == (True, False, False)
    mirrored = 0
    for seed in range(6):
        for (x, _), (other, _) in zip(
            train.batches(26, seed=seed, augment=True), plain.batches(26, seed=seed, augment=True), strict=True
        ):
            for ours, straight in zip(x, other, strict=True):  # the crops are the same
                same, flipped = torch.equal(ours, straight), torch.equal(ours.flip(-1), straight)
                assert same or flipped
                mirrored += not same
    assert 0.35 < mirrored / (6 * len(train)) < 0.65


def test_crops_and_order_are_drawn_anew_for_every_seed(folder):
    train, _ = streaming.load(folder, CROP, 0)
    first, second = (next(train.batches(26, seed=seed, augment=True)) for seed in (0, 1))
    assert not torch.equal(first[1], second[1])
    one = train.take([3])
    crops = [next(one.batches(1, seed=seed, augment=True))[0] for seed in range(4)]
    assert all(not torch.equal(crops[0], crop) for crop in crops[1:])


def test_a_streamed_holdout_is_the_same_for_every_seed_and_disjoint(folder):
    held = [settings(folder, holdout=6, seed=seed).load_data(workers=0) for seed in (0, 5)]
    for rest, kept in held:
        assert sorted(rest.places.tolist() + kept.places.tolist()) == list(range(26))
        assert len(kept) == 6
    assert torch.equal(held[0][1].places, held[1][1].places)


def test_streamed_labels_are_those_of_their_files(folder):
    for part in streaming.load(folder, CROP, 0):
        for place, label in zip(part.places.tolist(), part.labels.tolist(), strict=True):
            assert f"/{part.classes[label]}/" in part.files[place].decode()


def test_processes_of_one_machine_share_its_cpus(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cb.data.streaming.default_workers() == 8  # at most
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cb.data.streaming.default_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert cb.data.streaming.default_workers() == 1


def test_crops_cover_from_8_to_100_per_cent_of_the_area(tmp_path):
    """Red tells the place across and green the place down, so that a crop says what it was cut from."""
    across = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    place = Image.fromarray(np.stack([across, across.T, np.zeros_like(across)], 2))
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            place.save(tmp_path / split / name / "0.png")
    train, _ = streaming.load(tmp_path, 32, 0)
    std, mean = (torch.tensor(values)[:, None, None] for values in ((0.229, 0.224, 0.225), (0.485, 0.456, 0.406)))
    areas, shapes = [], []
    for seed in range(60):
        inputs, _ = next(train.batches(2, seed=seed, augment=True))
        for pixels in inputs * std + mean:
            assert pixels[2].abs().max() < 1e-6  # blue is 0: normalised by ImageNet's own numbers, channel by channel
            width, height = (float(channel.max() - channel.min()) * 32 / 31 for channel in pixels[:2])
            areas.append(width * height)
            shapes.append(width / height)
    assert 0.05 < min(areas) < 0.15
    assert 0.85 < max(areas) < 1.05
    assert sum(area < 0.54 for area in areas) / len(areas) == pytest.approx(0.5, abs=0.15)  # evenly in between
    assert 0.7 < min(shapes) < 0.85
    assert 1.2 < max(shapes) < 1.4  # from 3:4 to 4:3


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_images_are_the_same_under_any_defaults_of_torch(workers, folder):
    def drawn():
        train, test = streaming.load(folder, CROP, workers)
        both = [*train.batches(8, seed=3, augment=True, drop_last=True), *test.batches(8), *train.sample(5).batches(5)]
        return [*both, *train.calibration(10, batch_size=5)]

    usual = drawn()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        other = drawn()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert len(usual) == len(other) == 8
    assert same(usual, other)
    assert all(inputs.dtype is torch.float32 for inputs, _ in other)


@pytest.mark.parametrize("stopped", [False, True], ids=["sleeps", "is stopped"])
def test_workers_that_hang_are_ended_and_named(folder, monkeypatch, stopped, counted):
    """As on a file system that does not answer; one that is stopped is deaf to SIGTERM."""

    def hangs(*_):
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)

    train, _ = streaming.load(folder, CROP, workers=1)
    assert train.patience == streaming.PATIENCE == 600
    monkeypatch.setattr(streaming._Images, "__getitem__", hangs)
    with pytest.raises(DataError) as caught:
        next(replace(train, patience=1.0).batches(4))
    said = str(caught.value)
    found = re.fullmatch(
        r"the processes that decode images \((\d+)\) gave no batch for 1 s and were ended; its first image is '(.*)': "
        "see whether it can be read, or give patience= more seconds",
        said,
    )
    assert found[2] == str(folder / "train" / "across" / "00.jpg")
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[1]), 0)
    counted(f"workers that hang: {stopped}", 1)
