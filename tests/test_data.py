import gzip
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import cram_bench as cb
from cram_bench import data
from cram_bench.data import DataError


@pytest.fixture
def folder(tmp_path) -> Path:
    """An image folder of coloured 32×32 PNGs, two classes, six and three images each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{index}.png")
    return tmp_path / "pets"


def test_digits():
    train, test = cb.data.load("digits")
    assert (len(train), len(test), train.channels, train.image_size, train.num_classes) == (1297, 500, 1, 8, 10)
    assert train.images.dtype is torch.uint8
    assert int(train.images.max()) == 255
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both) == 1797  # scikit-learn's count: nothing lost, nothing twice


def test_digits_are_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cb.data.load("digits")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # importing it fails now
    again = cb.data.load("digits")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert (one.classes, one.flip) == (other.classes, other.flip)
    (cached,) = (tmp_path / "cram_bench" / "decoded").iterdir()
    cached.unlink()
    with pytest.raises(ImportError):
        cb.data.load("digits")


def test_an_image_folder(folder):
    train, test = cb.data.load(folder)
    assert (train.name, train.classes, len(train), len(test)) == ("pets", ("cat", "dog"), 12, 6)
    assert train.labels.tolist() == [0] * 6 + [1] * 6
    direct = np.asarray(Image.open(folder / "train" / "dog" / "3.png")).transpose(2, 0, 1)
    assert torch.equal(train.images[9], torch.from_numpy(direct.copy()))
    assert torch.equal(test.mean, train.mean)


def test_grey_images_have_one_channel_and_mixed_ones_three(folder, tmp_path):
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert cb.data.load(folder)[0].channels == 1
    Image.new("RGB", (32, 32), (9, 8, 7)).save(folder / "test" / "cat" / "0.png")
    train, test = cb.data.load(folder)
    assert (train.channels, test.images[0, :, 0, 0].tolist()) == (3, [9, 8, 7])


def break_size(folder):
    Image.new("RGB", (30, 32)).save(folder / "train" / "dog" / "2.png")


def break_file(folder):
    (folder / "test" / "cat" / "1.png").write_bytes(b"\x89PNG\r\n but no more")


def truncate_file(folder):
    path = folder / "test" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:500])


def empty_class(folder):
    for path in (folder / "test" / "dog").iterdir():
        path.unlink()


def no_train(folder):
    (folder / "train").rename(folder / "training")


def extra_class(folder):
    (folder / "test" / "emu").mkdir()


def one_class(folder):
    shutil.rmtree(folder / "train" / "dog")
    shutil.rmtree(folder / "test" / "dog")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_size, r"train/dog/2.png is 30×32 pixels, 3 channels, and the first image is 32×32 pixels"),
        (break_file, r"test/cat/1.png is not readable as an image"),
        (truncate_file, r"test/cat/1.png is not readable as an image"),
        (empty_class, r"test/dog holds no image \(\.bmp, .*\.webp\)"),
        (no_train, r"pets has no folder train/"),
        (extra_class, r"test/emu is a class without training images"),
        (one_class, r"holds 1 class folders; at least 2"),
    ],
)
def test_a_malformed_folder_is_one_clear_line(damage, message, folder):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        cb.data.load(folder)
    assert "\n" not in str(caught.value)


def cache_file() -> Path:
    (path,) = (data.cache_root() / "decoded").iterdir()
    return path


def test_the_cache_is_used(folder, monkeypatch):
    train, _ = cb.data.load(folder)
    assert cache_file().suffix == ".safetensors"  # and no part file is left
    monkeypatch.setattr("cram_bench.data.folders.decode", lambda *arguments: pytest.fail("decoded again"))
    again, _ = cb.data.load(folder)
    assert torch.equal(train.images, again.images)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped"])
def test_a_damaged_cache_is_noticed_and_rebuilt(damage, folder):
    train, _ = cb.data.load(folder)
    path = cache_file()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes({"truncated": content[: len(content) // 2], "emptied": b"", "flipped": bytes(content)}[damage])
    with pytest.warns(UserWarning, match="damaged and is rebuilt"):
        again, _ = cb.data.load(folder)
    assert torch.equal(train.images, again.images)
    cb.data.load(folder)  # no warning: pytest would show one, and the next line fails on it
    assert len(list(path.parent.iterdir())) == 1


def test_a_changed_file_is_read_again(folder):
    cb.data.load(folder)
    path = folder / "train" / "cat" / "0.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(path)
    assert cb.data.load(folder)[0].images[0, :, 0, 0].tolist() == [1, 2, 3]


def test_a_cache_that_cannot_be_written_only_warns(folder, monkeypatch):
    monkeypatch.setattr(
        "safetensors.torch.save_file", lambda *a: (_ for _ in ()).throw(OSError("No space left on device"))
    )
    with pytest.warns(UserWarning, match="could not be cached.*No space left"):
        assert len(cb.data.load(folder)[0]) == 12


def write_parquet(folder: Path, split: str, labels: list[int], column: str = "img", label: str = "label") -> None:
    rows = []
    for index in range(len(labels)):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (index, 0, 255)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: rows, label: labels}), folder / f"{split}-00000-of-00001.parquet")


def test_parquet_in_the_hubs_layout(tmp_path):
    write_parquet(tmp_path / "cifar10", "train", [3, 0, 9])
    write_parquet(tmp_path / "cifar10", "test", [1])
    train, test = cb.data.load("cifar10", root=tmp_path)
    assert train.labels.tolist() == [3, 0, 9]
    assert test.labels.tolist() == [1]
    assert train.images[2, :, 5, 5].tolist() == [2, 0, 255]
    write_parquet(tmp_path / "cifar100", "train", [99], label="fine_label")
    write_parquet(tmp_path / "cifar100", "test", [1], column="image", label="fine_label")
    assert cb.data.load("cifar100", root=tmp_path)[0].labels.tolist() == [99]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: write_parquet(f, "test", [1, 10]), "cifar10 test has the label 10; labels run from 0 to 9"),
        (lambda f: write_parquet(f, "test", [-1]), "cifar10 test has the label -1"),
        (lambda f: write_parquet(f, "test", [1], column="picture"), "has columns .*; expected img.bytes"),
        (lambda f: (f / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no"), "is not readable as Parquet"),
    ],
)
def test_malformed_parquet_is_one_clear_line_and_is_not_cached(damage, message, tmp_path):
    write_parquet(tmp_path / "cifar10", "train", [3, 0])
    write_parquet(tmp_path / "cifar10", "test", [1])
    damage(tmp_path / "cifar10")
    with pytest.raises(DataError, match=message) as caught:
        cb.data.load("cifar10", root=tmp_path)
    assert "\n" not in str(caught.value)
    assert not (data.cache_root() / "decoded").exists()


def test_a_missing_set_says_how_to_get_it(tmp_path, monkeypatch):
    class Offline:
        def __init__(self, *arguments, **options):
            raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.MNIST", Offline)
    with pytest.raises(
        DataError, match=r"mnist is not in .*\(Name or service not known\): put train-\*.parquet"
    ) as caught:
        cb.data.load("mnist", root=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="unknown data set 'mnits'.*did you mean 'mnist'"):
        cb.data.load("mnits", root=tmp_path)


def test_torchvisions_files_serve_too(tmp_path, monkeypatch):
    class Small:
        def __init__(self, root, train, download):
            self.data = torch.arange(2 * 28 * 28, dtype=torch.int64).remainder(256).to(torch.uint8).view(2, 28, 28)
            self.targets = torch.tensor([1, 7])

    monkeypatch.setattr("torchvision.datasets.MNIST", Small)
    train, _ = cb.data.load("mnist", root=tmp_path)
    assert (train.images.shape, train.labels.tolist(), train.flip) == ((2, 1, 28, 28), [1, 7], False)


def test_normalised_training_images_have_mean_zero_and_variance_one(folder):
    train, test = cb.data.load(folder)
    x = train.normalise(train.images).double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)
    pixel = (test.images[0, 1, 4, 5] / 255 - train.mean[1]) / train.std[1]
    assert test.normalise(test.images)[0, 1, 4, 5] == pytest.approx(float(pixel), abs=1e-6)


def test_batches_give_every_image_once():
    train, _ = cb.data.load("digits")
    numbered = replace(train, labels=torch.arange(len(train)))
    for options in ({"seed": None}, {"seed": 3}, {"seed": 3, "augment": True}):
        seen = torch.cat([labels for _, labels in numbered.batches(128, **options)])
        assert sorted(seen.tolist()) == list(range(len(train)))
        assert (seen.tolist() == sorted(seen.tolist())) == (options["seed"] is None)
    assert [len(labels) for _, labels in numbered.batches(500)] == [500, 500, 297]
    assert [len(labels) for _, labels in numbered.batches(500, drop_last=True)] == [500, 500]
    first, again = (next(train.batches(64, seed=5, augment=True))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, next(train.batches(64, seed=6, augment=True))[0])


def test_augmentation_against_a_slow_reference():
    images = torch.randint(1, 256, (50, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ours = cb.data.augmented(images, torch.Generator().manual_seed(4))
    draw = torch.Generator().manual_seed(4)
    top, left = torch.randint(5, (2, 50), generator=draw)
    mirror = torch.rand(50, generator=draw) < 0.5
    for index in range(50):
        padded = torch.zeros(3, 20, 20, dtype=torch.uint8)
        padded[:, 2:18, 2:18] = images[index]
        crop = padded[:, top[index] : top[index] + 16, left[index] : left[index] + 16]
        assert torch.equal(ours[index], crop.flip(-1) if mirror[index] else crop)
    assert mirror.any()
    assert not mirror.all()


def test_parts_of_a_data_set():
    train, _ = cb.data.load("digits")
    assert len(train.sample(100)) == 100
    assert torch.equal(train.sample(100, seed=1).images, train.sample(100, seed=1).images)
    assert train.sample(10**6) is train
    numbered = replace(train, labels=torch.arange(len(train)))
    rest, held = numbered.split(200)
    assert sorted(rest.labels.tolist() + held.labels.tolist()) == list(range(len(train)))
    assert len(held) == 200


def test_calibration_on_augmented_images_gives_back_the_statistics_of_training():
    """Momentum 0.1 makes training's own estimate noisy; plain images would be off by far more than that."""
    train, _ = cb.data.load("digits")
    model = cb.models.create("convnet", 10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    cb.train.fit(model, optimizer, train, epochs=10, batch_size=128)
    trained = model.norms[0].running_var.clone()
    distances = []
    for augment in (True, False):
        cb.compress.tune_batchnorm(model, train.calibration(augment=augment))
        distances.append(float((model.norms[0].running_var / trained).log().abs().max()))
    assert distances[0] < 0.5 * distances[1]


def test_calibration_batches_are_equal_and_leave_out_the_fewest():
    train, _ = cb.data.load("digits")
    assert [len(labels) for _, labels in train.calibration(1000, batch_size=300)] == [250] * 4
    assert [len(labels) for _, labels in train.calibration()] == [432] * 3  # 1 of 1297 is left over


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: next(d.batches(0)), "batch_size must be at least 1, not 0"),
        (lambda d: next(d.batches(10**6, drop_last=True)), "larger than the data, 1297 images"),
        (lambda d: next(d.batches(8, augment=True)), "needs a seed"),
        (lambda d: d.sample(0), "images of a sample must be at least 1, not 0"),
        (lambda d: d.split(1297), "cannot hold out 1297 of 1297"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call(cb.data.load("digits")[0])


REAL = Path(os.environ.get("CRAM_BENCH_DATA", "")) / "cifar10"


def test_a_lost_shard_is_named(tmp_path):
    folder = tmp_path / "cifar10"
    write_parquet(folder, "train", [3, 0])
    write_parquet(folder, "test", [1])
    (folder / "train-00000-of-00001.parquet").rename(folder / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet is missing; train has 1 of 2 shards"):
        cb.data.load("cifar10", tmp_path)


@pytest.mark.skipif(not list(REAL.glob("train-*.parquet")), reason="no CIFAR-10 in CRAM_BENCH_DATA")
def test_a_slice_of_real_cifar10(tmp_path):
    (tmp_path / "cifar10").mkdir()
    tables = {}
    for split in ("train", "test"):
        shard = sorted(REAL.glob(f"{split}-*.parquet"))[0]
        tables[split] = pq.ParquetFile(shard).read_row_group(0).slice(0, 100)
        pq.write_table(tables[split], tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet")
    train, test = cb.data.load("cifar10", root=tmp_path)
    for dataset, table in ((train, tables["train"]), (test, tables["test"])):
        assert dataset.images.shape == (100, 3, 32, 32)
        assert dataset.labels.tolist() == table["label"].to_pylist()
        for index in (0, 50, 99):
            image = Image.open(io.BytesIO(table["img"][index]["bytes"].as_py()))
            assert np.array_equal(dataset.images[index].permute(1, 2, 0).numpy(), np.asarray(image))
    inputs, labels = next(train.batches(64, seed=0, augment=True, channels_last=True))
    assert cb.models.create("resnet20", 10)(inputs).shape == (64, 10)
    assert labels.min() >= 0


@pytest.mark.parametrize(("old", "new"), [(b'"I64"', b'"F64"'), (b'"U8"', b'"I8"')])
def test_a_flipped_type_in_the_cache_is_noticed(old, new, folder, tmp_path):
    first = cb.data.load(folder)[0]
    (cache,) = (tmp_path / "cache").rglob("*.safetensors")
    cache.write_bytes(cache.read_bytes().replace(old, new, 1))
    with pytest.warns(UserWarning, match="damaged and is rebuilt"):
        again = cb.data.load(folder)[0]
    assert (again.images.dtype, again.labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(again.images, first.images)


def test_a_home_that_is_a_file_only_warns(folder, tmp_path, monkeypatch):
    (tmp_path / "null").touch()  # as a service's HOME=/dev/null
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "null"))
    with pytest.warns(UserWarning, match="could not be cached"):
        assert len(cb.data.load(folder)[0]) == 12


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_in_a_png_header_is_one_clear_line(folder):
    file = folder / "train" / "cat" / "0.png"
    whole = file.read_bytes()
    for bit in range(8 * 8, 8 * 33):  # the first chunk, after the signature
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(damaged))
        try:
            cb.data.load(folder)
        except cb.data.DataError as error:
            assert "0.png" in str(error)  # noqa: PT017  # some flips leave a readable image


@pytest.mark.parametrize("kind", ["bytes without a struct", "a missing image", "labels in words"])
def test_parquet_with_the_right_names_and_wrong_content(kind, tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file, "PNG")
    image = [{"bytes": file.getvalue(), "path": "x"}] * 2
    columns = {
        "bytes without a struct": {"img": [file.getvalue()] * 2, "label": [0, 1]},
        "a missing image": {"img": [image[0], None], "label": [0, 1]},
        "labels in words": {"img": image, "label": ["cat", "dog"]},
    }[kind]
    (tmp_path / "cifar10").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / "cifar10" / f"{split}-0.parquet")
    with pytest.raises(cb.data.DataError, match=r"train-0\.parquet"):
        cb.data.load("cifar10", tmp_path)


def test_a_file_of_the_same_size_and_another_time_is_read_again(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), 100, np.uint8)).save(tmp_path / split / name / "0.png")
    cb.data.load(tmp_path)
    file = tmp_path / "train" / "a" / "0.png"
    size = file.stat().st_size
    Image.fromarray(np.full((8, 8), 101, np.uint8)).save(file)
    assert file.stat().st_size == size  # or this would test nothing
    os.utime(file, ns=(1, 1))
    assert cb.data.load(tmp_path)[0].images[0].eq(101).all()


def test_resized_images_are_three_channels_and_keep_their_looks():
    train, _ = cb.data.load("digits")
    large = train.resized(32)
    assert large.images.shape == (len(train), 3, 32, 32)
    assert large.channels == len(large.mean) == 3
    assert torch.equal(large.images[:, 0], large.images[:, 2])
    back = torch.nn.functional.avg_pool2d(large.images[:, :1].float(), 4)
    assert (back - train.images.float()).abs().mean() < 25  # of 255: strokes are blurred, not moved
    exact = torch.nn.functional.interpolate(
        train.images[:20].double(), size=(32, 32), mode="bilinear", antialias=True, align_corners=False
    )
    assert (large.images[:20, :1].double() - exact).abs().max() <= 0.5 + 1e-4  # rounded, not cut off
    assert large.resized(32) is large


def test_guessing_is_the_share_of_the_commonest_label():
    _, test = cb.data.load("digits")
    uneven = replace(test.take(range(10)), labels=torch.tensor([3, 3, 3, 3, 3, 3, 3, 0, 1, 9]))
    assert uneven.majority == 0.7  # always guessing 3; not 1 of 10 classes
    assert uneven.take([0, 7, 8, 9]).majority == 0.25  # of what is evaluated, not of what it was taken from
    assert test.majority == max(test.labels.tolist().count(label) for label in range(10)) / 500
    with pytest.raises(ValueError, match="digits has no labels"):
        _ = test.take([]).majority


def test_every_guessing_line_is_that_of_the_evaluated_data():
    root = Path(__file__).parent.parent
    lines = [line for path in (root / "notebooks").glob("*.ipynb") for line in path.read_text("utf-8").splitlines()]
    drawn = [line for line in lines if "chance=" in line]
    assert len(drawn) >= 3
    assert all("chance=test.majority" in line for line in drawn)
    written = "".join(path.read_text("utf-8") for path in (root / "cram_bench").rglob("*.py"))
    assert not re.search(r"1(\.0)? / [\w.]*(num_classes|len\([\w.]*classes\))", written)


JUNK = {
    ".DS_Store": "root", "train/.ipynb_checkpoints/cat-checkpoint.png": "a class",
    "train/__MACOSX/._cat/._0.png": "a class", "train/cat/._0.png": "an image",
    "train/cat/.ipynb_checkpoints/0-checkpoint.png": "an image", "test/dog/Thumbs.db": "a file",
    "test/dog/desktop.ini": "a file", "train/dog/notes.txt": "a text", "train/dog/loop.gif": "a GIF",
    "train/stray.png": "no class", "test/.hidden/0.png": "a class of tests alone",
    "valid/cat/0.png": "a part that is not used",
}  # fmt: skip


@pytest.mark.parametrize("crop", [0, 16])
def test_what_is_no_image_is_neither_a_class_nor_an_error_and_is_counted(crop, folder):
    clean = [len(part) for part in cb.data.load(folder)]
    seen = data.fingerprint(str(folder))
    for name in JUNK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"junk")
    with pytest.warns(UserWarning, match="files or folders are skipped") as caught:
        train, test = cb.data.load(folder, crop=crop, workers=0)
    assert (train.classes, [len(train), len(test)]) == (("cat", "dog"), clean)
    assert data.training_size(str(folder)) == len(train)
    (folder / "valid" / "cat" / "0.png").unlink()
    assert data.fingerprint(str(folder)) == seen
    (message,) = {str(w.message) for w in caught}
    assert "\n" not in message
    for part in (
        "11 files or folders",
        "7 hidden or made by a system",
        "2 no image by its name",
        "1 in no class folder",
    ):
        assert part in message
    for name in ("train/dog/loop.gif", "train/dog/notes.txt", "train/stray.png", "1 not used beside test/ (valid/)"):
        assert name in message


def test_a_clean_folder_is_read_without_a_word(folder, recwarn):
    cb.data.load(folder)
    cb.data.load(folder, crop=16, workers=0)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_the_test_images(name, folder):
    (folder / "test").rename(folder / name)
    before = data.fingerprint(str(folder))
    for part in (cb.data.load(folder)[1], cb.data.load(folder, crop=16, workers=0)[1]):
        assert part.labels.tolist() == [0] * 3 + [1] * 3
    os.utime(folder / name / "cat" / "0.png", ns=(1, 1))
    assert data.fingerprint(str(folder)) != before


def test_every_format_that_torchvision_reads_and_subfolders_too(folder):
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMG_EXTENSIONS) | {".jfif"} == data.decoding.SUFFIXES
    deep = folder / "train" / "cat" / "deep" / "er"
    deep.mkdir(parents=True)
    (deep / "back").symlink_to(folder / "train" / "cat")  # a circle
    for number, suffix in enumerate(sorted(IMG_EXTENSIONS)):
        kind = {".jpg": "JPEG", ".tif": "TIFF", ".pgm": "PPM"}.get(suffix, suffix[1:].upper())
        Image.new("RGB", (32, 32), (20 * number, 7, 9)).save(deep / f"{number}{suffix.upper()}", kind)
    (deep / "back").unlink()
    reference = ImageFolder(folder / "train")
    (deep / "back").symlink_to(folder / "train" / "cat")
    train, _ = cb.data.load(folder)
    assert train.labels.tolist() == reference.targets
    theirs = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in reference])
    order = [reference.imgs.index((str(path), label)) for path, label in data.listed(folder)[1]["train"]]
    assert torch.equal(train.images, theirs[order])


def test_two_spellings_of_a_name_are_one_class(tmp_path):
    import unicodedata

    names = [unicodedata.normalize(form, "crème") for form in ("NFC", "NFD")]
    assert names[0] != names[1]
    for split, used in (("train", names), ("test", names[1:])):
        for number, name in enumerate([*used, "thé"]):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), number).save(tmp_path / split / name / f"{number}.png")
    train, test = cb.data.load(tmp_path)
    assert train.classes == (names[0], "thé")
    assert train.labels.tolist() == [0, 0, 1]
    assert test.labels.tolist() == [0, 1]


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return data.decoding.decode(file.getvalue(), "it")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(kind, orientation):
    from PIL import ImageOps

    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    assert upright.shape == ((6, 9, 3) if orientation < 5 else (9, 6, 3))
    assert np.array_equal(data.decoding.decode(file.getvalue(), "it"), upright.transpose(2, 0, 1))


def test_a_damaged_exif_leaves_the_image_as_it_is():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "PNG", exif=b"Exif\0\0MM nothing of the kind")
    assert data.decoding.decode(file.getvalue(), "it")[:, 0, 0].tolist() == [1, 2, 3]


def test_what_is_transparent_is_white_and_its_hidden_colour_is_not_seen():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [[200, 10, 30, 0], [200, 10, 30, 255], [200, 10, 30, 51]]  # 51 of 255 is a fifth
    rgba = Image.fromarray(pixels)
    half = [255 + (value - 255) // 5 for value in (200, 10, 30)]
    assert saved(rgba, "PNG").transpose(1, 2, 0).tolist() == [[[255] * 3, [200, 10, 30], half]]
    grey = Image.fromarray(pixels[..., 2:])  # 30, with the same alpha
    assert grey.mode == "LA"
    assert saved(grey, "PNG").tolist() == [[[255, 30, 210]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 30, 7, 8, 9])
    palette.putpixel((1, 0), 1)
    assert saved(palette, "PNG", transparency=0)[:, 0].T.tolist() == [[255] * 3, [7, 8, 9]]
    assert saved(palette, "PNG", transparency=b"\xff\x00")[:, 0].T.tolist() == [[200, 10, 30], [255] * 3]
    assert saved(Image.new("RGB", (1, 1), (5, 6, 7)), "PNG", transparency=(5, 6, 7))[:, 0, 0].tolist() == [255] * 3
    assert saved(Image.new("L", (1, 1), 5), "PNG", transparency=5).tolist() == [[[255]]]
    deep = Image.fromarray(np.array([[0x1234, 0x1235]], np.uint16))
    assert saved(deep, "PNG").tolist() == [[[0x12, 0x12]]]
    assert saved(deep, "PNG", transparency=0x1234).tolist() == [[[255, 0x12]]]


def test_other_kinds_of_pixels():
    assert saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")[:, 0, 0].tolist() == [255, 0, 0]
    assert saved(Image.new("1", (8, 8), 1), "PNG")[:, 0, 0].tolist() == [255]
    assert saved(Image.fromarray(np.full((2, 2), 0xAB01, np.uint16)), "TIFF")[:, 0, 0].tolist() == [0xAB]
    deep = b"P5 2 1 65535\n" + bytes([0x12, 0x34, 0xFF, 0])
    assert data.decoding.decode(deep, "it").tolist() == [[[0x12, 0xFF]]]
    phone = saved(
        Image.new("RGB", (8, 8), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]
    )
    assert phone[:, 0, 0].tolist() == [254, 0, 0]  # the first picture
    with pytest.raises(DataError, match="it has pixels of mode F; allowed are 8 or 16 bits"):
        saved(Image.new("F", (2, 2)), "TIFF")


def test_the_shape_of_a_folder_is_that_of_its_loaded_images(folder):
    Image.new("L", (32, 32)).save(folder / "train" / "cat" / "0.png")  # the first image is grey, the others are not
    train, _ = cb.data.load(folder)
    assert data.image_shape(str(folder)) == tuple(train.images.shape[1:]) == (3, 32, 32)


def test_images_of_many_sizes_and_too_many_images_are_told_of_crop(folder, monkeypatch):
    monkeypatch.setattr("cram_bench.data.folders.memory_left", lambda: 2 * 18 * 3 * 32 * 32 - 1)
    with pytest.raises(
        DataError, match=r"18 images, which need .* GiB are left; stream .*crop=64\), or -s crop 64 "
    ) as caught:
        cb.data.load(folder)
    assert "\n" not in str(caught.value)
    assert len(cb.data.load(folder, crop=16, workers=0)[0]) == 12
    monkeypatch.setattr("cram_bench.data.folders.memory_left", lambda: 2 * 18 * 3 * 32 * 32)
    assert len(cb.data.load(folder)[0]) == 12
    Image.new("RGB", (30, 32)).save(folder / "train" / "dog" / "2.png")
    with pytest.raises(DataError, match=r"all must be alike, or stream .*crop=64\), or -s crop 64 "):
        cb.data.load(folder)
    train, test = cb.data.load(folder, crop=16, workers=0)
    assert (len(train), len(test), train.image_size) == (12, 6, 16)


def test_the_memory_that_is_left_is_what_the_machine_says():
    lines = Path("/proc/meminfo")
    if not lines.is_file():
        pytest.skip("this system has no /proc/meminfo")
    kilobytes = next(int(line.split()[1]) for line in lines.read_text().splitlines() if line.startswith("MemAvailable"))
    total = next(int(line.split()[1]) for line in lines.read_text().splitlines() if line.startswith("MemTotal"))
    assert 2**20 < data.folders.memory_left() <= total * 1024
    if data.folders.memory_left() > total * 512:  # no control group allows less
        assert data.folders.memory_left() == pytest.approx(kilobytes * 1024, rel=0.5)


def test_images_of_one_value_normalise_to_zero(folder):
    for path in folder.rglob("*.png"):
        Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(path)
    train, _ = data.load(folder)
    inputs, _ = next(train.batches(4))
    assert inputs.abs().max() < 1e-6


def test_without_flip_nothing_is_mirrored(folder):
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[:, None], (32, 32, 3))  # brighter to the right
    for path in folder.rglob("*.png"):
        Image.fromarray(np.ascontiguousarray(ramp)).save(path)

    def mirrored(flip, crop):
        train, _ = cb.data.load(folder, flip=flip, crop=crop, workers=0)
        assert train.flip is flip
        seen = torch.cat([x for seed in range(20) for x, _ in train.batches(12, seed=seed, augment=True)])
        middle = seen[:, :, seen.shape[2] // 2]  # padding is above and below, and at the sides
        third = middle.shape[2] // 3
        return float((middle[..., third].mean(1) > middle[..., -third - 1].mean(1)).float().mean())

    for crop in (0, 16):
        assert mirrored(False, crop) == 0
        assert 0.4 < mirrored(True, crop) < 0.6  # of 240 coins


def test_the_setting_flip_reaches_the_data(folder):
    wanted = cb.recipes.recipe(str(folder), flip=False)
    assert [part.flip for part in wanted.load_data()] == [False, False]
    assert [part.flip for part in wanted.but(crop=16).load_data(workers=0)] == [False, False]
    assert [part.flip for part in wanted.but(flip=True).load_data()] == [True, True]
    assert wanted.changed()["flip"] is False
    assert "flip" not in wanted.but(flip=True).changed()
    assert [part.flip for part in cb.data.load("digits", flip=True)] == [False, False]  # a mirrored 2 is none


def test_named_sets_can_be_loaded_without_flip(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / "cifar10", split, [3, 0])
    assert [part.flip for part in cb.data.load("cifar10", tmp_path)] == [True, True]
    assert [part.flip for part in cb.data.load("cifar10", tmp_path, flip=False)] == [False, False]


def test_the_fingerprint_of_an_ordinary_folder_is_what_older_runs_noted(folder):
    """As it was computed when runs began to note it: their folders must not look changed."""
    files = sorted(path for split in ("train", "test", "val") for path in folder.glob(f"{split}/*/*"))
    stats = [(path.relative_to(folder).as_posix(), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    assert data.fingerprint(str(folder)) == hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.bool, torch.uint16])
def test_labels_of_every_kind_of_integer_train_and_are_evaluated_alike(kind):
    train, test = (part.take(torch.where(part.labels < 2)[0][:60]) for part in cb.data.load("digits"))
    results = []
    for cast in (torch.int64, kind):
        few = replace(train, labels=train.labels.to(cast))
        assert few.labels.dtype is torch.int64
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        history = cb.train.fit(model, torch.optim.SGD(model.parameters(), 0.1), few, epochs=1, batch_size=20)
        pairs = [(x, y.to(cast)) for x, y in test.batches(30)]
        score = cb.train.evaluate(model, pairs)
        gap = cb.probes.cram_gap(model, pairs, ["global@0.5"])
        results.append((history[0]["train_loss"], score, gap["gap"].tolist()))
        assert 0 < score["accuracy"] < 1 or score["loss"] > 0
    assert results[0] == results[1]


def test_a_locale_without_utf8_reads_writes_and_prints(tmp_path):
    root = tmp_path / "menu"
    for split in ("train", "test"):
        for number, name in enumerate(("crème", "thé")):
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (8, 8), 40 * index + number).save(root / split / name / f"ü{index}.png")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    sweep = tmp_path / "é.yaml"
    sweep.write_text("# ρ, é\ndataset: digits\nmethods: [sgd]\nseeds: 1\nepochs: 1\n", encoding="utf-8")
    small = ["--epochs", "1", "--device", "cpu", "--threads", "1"]
    commands = [
        ["train", "--help"], ["report", "--help"], ["train", "--dataset", str(root), *small, "-s", "model", "convnet"],
        ["train", "--method", "sam", *small], ["runs"], ["runs", "--csv"],
    ]  # fmt: skip
    code = f"""
import locale, sys
from pathlib import Path
from cram_bench import cli, report, sweep
from cram_bench.data import sentences
assert locale.getpreferredencoding(False) in ("ANSI_X3.4-1968", "US-ASCII", "ascii"), locale.getpreferredencoding(False)
for command in {[[os.fsencode(part) for part in command] for command in commands]!r}:
    try:
        status = cli.main([__import__("os").fsdecode(part) for part in command])
    except SystemExit as error:
        status = error.code
    assert status == 0, (command, status)
assert len(sweep.read(__import__("os").fsdecode({os.fsencode(sweep)!r}))) == 1
print(chr(0x2026), chr(0x3c1))
assert cli.main(["train", "--dataset", "d\\udcc3"]) == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, **plain}, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert b"\\u2026 \\u03c1" in done.stdout
    assert b"Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(b"where the locale is not UTF-8, set PYTHONUTF8=1")


def rows(part) -> set[bytes]:
    return {image.numpy().tobytes() for image in part.images}


def test_a_holdout_is_of_the_training_images_the_same_for_every_seed_and_method_and_disjoint():
    train, test = cb.data.load("digits")
    held = []
    for method, seed in (("sgd", 0), ("sgd", 1), ("sam", 7)):
        rest, kept = cb.recipes.recipe("digits", method, seed=seed, holdout=200).load_data()
        assert (len(rest), len(kept)) == (1097, 200)
        assert not rows(rest) & rows(kept)
        assert rows(rest) | rows(kept) == rows(train)
        assert not (rows(rest) | rows(kept)) & rows(test)
        held.append(kept)
    assert all(torch.equal(kept.images, held[0].images) and torch.equal(kept.labels, held[0].labels) for kept in held)


def write_idx(folder, split, images, labels, head=b"\0\0\x08"):
    """Write a split as its makers do; `head` are the first bytes of the images."""
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        begin = (head if kind == "images-idx3" else b"\0\0\x08") + bytes([values.ndim])
        content = begin + struct.pack(f">{values.ndim}I", *values.shape) + values.numpy().tobytes()
        (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


@pytest.fixture
def fashion(tmp_path):
    """Return a data folder with a small Fashion-MNIST in it, and its arrays."""
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    made = {}
    for split, count in (("train", 30), ("t10k", 20)):
        random = torch.Generator().manual_seed(count)
        images = torch.randint(0, 256, (count, 28, 28), generator=random, dtype=torch.uint8)
        made[split] = images, torch.arange(count).remainder(10).to(torch.uint8)
        write_idx(folder, split, *made[split])
    return tmp_path, made


def test_the_makers_own_files_of_fashion_mnist_are_read(fashion):
    root, made = fashion
    train, test = cb.data.load("fashion_mnist", root)
    for part, split in ((train, "train"), (test, "t10k")):
        assert torch.equal(part.images, made[split][0].unsqueeze(1))
        assert torch.equal(part.labels, made[split][1].long())
    assert (train.classes[-1], train.flip) == ("boot", True)
    assert cb.data.load("fashion_mnist", root, flip=False)[0].flip is False


def test_a_bad_file_of_fashion_mnist_is_one_line(fashion):
    root, made = fashion
    folder, (images, labels) = root / "fashion_mnist", made["train"]
    first = folder / "train-images-idx3-ubyte.gz"
    whole = first.read_bytes()

    def says(match):
        with pytest.raises(cb.data.DataError, match=match) as error:
            cb.data.load("fashion_mnist", root)
        assert "\n" not in str(error.value)

    write_idx(folder, "train", images[:, :27], labels)
    says(r"train-images.* must hold images of 28 × 28, not 27 × 28")
    write_idx(folder, "train", images, labels, b"\0\0\x0d")
    says(r"train-images.*does not begin as bytes of 3 axes")
    write_idx(folder, "train", images, labels[:29])
    says(r"holds 30 images, and train-labels.* 29 labels")
    first.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    says(r"it has fewer values than the 23,520 that it says")
    first.write_bytes(gzip.compress(gzip.decompress(whole) + b"0"))
    says(r"it has more values than the 23,520 that it says")
    first.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 28, 28)))
    says(r"from 1 to 100,000 examples, not 2,147,483,648")
    first.write_bytes(whole[: len(whole) // 2])
    says(r"train-images.* is not readable as IDX")
    first.write_bytes(b"no gzip")
    says(r"train-images.* is not readable as IDX")
    first.unlink()
    says(r"train-images.* is missing, of four files")
    os.mkfifo(first)
    says(r"train-images.* is not readable as IDX: .*it is a pipe")


def test_a_failed_download_leaves_no_folder_behind(tmp_path, monkeypatch):
    def made_and_failed(root, **more):
        (root / "FashionMNIST" / "raw").mkdir(parents=True)
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", made_and_failed)
    with pytest.raises(cb.data.DataError, match=r"no network.*or the four \*-ubyte\.gz into"):
        cb.data.load("fashion_mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_sample_is_of_what_is_not_held_out_and_the_same_for_every_seed():
    rest, held = cb.recipes.recipe("digits", holdout=200).load_data()
    drawn = [cb.recipes.recipe("digits", seed=seed, holdout=200, sample=90).load_data() for seed in (0, 3)]
    for train, kept in drawn:
        assert len(train) == 90
        assert rows(train) <= rows(rest)
        assert torch.equal(kept.images, held.images)
    assert torch.equal(drawn[0][0].images, drawn[1][0].images)
    train, test = cb.recipes.recipe("digits", sample=1297).load_data()
    assert (len(train), len(test)) == (1297, 500)


def test_tests_are_normalised_by_the_training_images_and_not_their_own():
    train, test = cb.data.load("digits")
    pixels = train.images.double() / 255
    for part in (train, test):
        assert float(part.mean) == pytest.approx(float(pixels.mean()), abs=1e-6)
        assert float(part.std) == pytest.approx(float(pixels.std(correction=0)), abs=1e-6)
    assert float(test.mean) != pytest.approx(float((test.images.double() / 255).mean()), abs=1e-6)


def test_samples_and_tuning_data_are_of_the_set_they_are_taken_from():
    train, test = cb.data.load("digits")
    assert rows(train.sample(300, seed=3)) < rows(train)
    assert not rows(train.sample(300, seed=3)) & rows(test)
    inputs = torch.cat([x for x, _ in train.calibration(300, augment=False)])
    seen = ((inputs * train.std + train.mean) * 255).round().to(torch.uint8)
    assert {image.numpy().tobytes() for image in seen.contiguous()} < rows(train)
    assert len(seen) == 300
    first, second = (train.sample(300, seed=seed).images for seed in (0, 1))
    assert not torch.equal(first, second)


def test_labels_stay_beside_their_images():
    train, _ = cb.data.load("digits")
    known = {image.numpy().tobytes(): int(label) for image, label in zip(train.images, train.labels, strict=True)}
    parts = [train.sample(200, seed=2), *train.split(200, seed=4), train.take([5, 3, 900])]
    for part in parts:
        assert [known[image.numpy().tobytes()] for image in part.images] == part.labels.tolist()
    for x, y in train.batches(64, seed=9):
        images = ((x * train.std + train.mean) * 255).round().to(torch.uint8)
        assert [known[image.numpy().tobytes()] for image in images] == y.tolist()


def test_every_image_of_a_batch_has_crops_and_coins_of_its_own():
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(1000, 1, 8, 8)
    ours = cb.data.augmented(images, torch.Generator().manual_seed(0))
    looks = {image.numpy().tobytes() for image in ours}
    assert len(looks) == 3 * 3 * 2  # an eighth of 8 pixels up or down, left or right, mirrored or not
    middle = images[0, 0]
    plain, mirrored = (int((ours[:, 0] == look).all(-1).all(-1).sum()) for look in (middle, middle.flip(1)))
    assert 30 < plain < 85  # a ninth of a half of 1000 each
    assert 30 < mirrored < 85


@pytest.mark.parametrize("crop", [0, 16])
def test_of_several_folders_of_test_images_it_is_test_and_the_others_are_named(crop, folder):
    for name in ("val", "validation"):
        shutil.copytree(folder / "test", folder / name)
        (folder / name / "cat" / "0.png").unlink()
    with pytest.warns(
        UserWarning, match=r"2 files or folders are skipped: 2 not used beside test/ \(val/, validation/\)"
    ):
        assert len(cb.data.load(folder, crop=crop, workers=0)[1]) == 6
    shutil.rmtree(folder / "test")
    with pytest.warns(UserWarning, match=r"1 not used beside val/ \(validation/\)"):
        assert len(cb.data.load(folder, crop=crop, workers=0)[1]) == 5


def test_a_changed_shard_is_read_again(tmp_path):
    """Other labels in a file of the same name, beside one that stays; the decoded images of before are not taken."""
    folder = tmp_path / "cifar10"
    write_parquet(folder, "train", [3, 0, 9])
    write_parquet(folder, "test", [1])
    shard = folder / "train-00000-of-00001.parquet"
    assert cb.data.load("cifar10", root=tmp_path)[0].labels.tolist() == [3, 0, 9]
    size, time = shard.stat().st_size, shard.stat().st_mtime_ns
    write_parquet(folder, "train", [3, 0, 8])
    assert shard.stat().st_size == size  # or this would test less
    os.utime(shard, ns=(time + 1, time + 1))
    assert cb.data.load("cifar10", root=tmp_path)[0].labels.tolist() == [3, 0, 8]
    write_parquet(folder, "train", [3, 0, 8, 7])  # larger
    os.utime(shard, ns=(time + 1, time + 1))
    assert cb.data.load("cifar10", root=tmp_path)[0].labels.tolist() == [3, 0, 8, 7]
    write_parquet(folder, "test", [2])
    os.utime(folder / "test-00000-of-00001.parquet", ns=(time + 2, time + 2))
    assert cb.data.load("cifar10", root=tmp_path)[1].labels.tolist() == [2]
    assert len(list((data.cache_root() / "decoded").iterdir())) == 4


def test_images_that_came_went_or_moved_are_noticed(folder):
    def labels():
        train, test = cb.data.load(folder)
        return train.labels.tolist(), test.labels.tolist()

    noted = [data.fingerprint(str(folder))]
    assert labels() == ([0] * 6 + [1] * 6, [0] * 3 + [1] * 3)
    for change, expected in (
        (lambda: (folder / "train" / "cat" / "5.png").unlink(), ([0] * 5 + [1] * 6, [0] * 3 + [1] * 3)),
        (lambda: (folder / "train" / "cat" / "0.png").rename(folder / "train" / "dog" / "x.png"),
         ([0] * 4 + [1] * 7, [0] * 3 + [1] * 3)),
        (lambda: (folder / "test" / "dog" / "0.png").rename(folder / "test" / "cat" / "x.png"),
         ([0] * 4 + [1] * 7, [0] * 4 + [1] * 2)),
    ):  # fmt: skip
        change()
        assert labels() == expected
        noted.append(data.fingerprint(str(folder)))
    os.utime(folder / "test" / "dog" / "1.png", ns=(1, 1))  # of the same size, perhaps with other pixels
    noted.append(data.fingerprint(str(folder)))
    assert len(set(noted)) == 5


def test_an_image_replaced_by_one_of_its_size_and_time_is_decoded_anew(folder):
    """What the cache of decoded images is named by has a time that nobody can set."""
    image = folder / "train" / "cat" / "0.png"
    before, noted = cb.data.load(folder)[0], data.fingerprint(str(folder))
    time, content = image.stat().st_mtime_ns, image.read_bytes()
    other = (folder / "train" / "cat" / "1.png").read_bytes()
    size = max(len(content), len(other))
    for name in (image.name, "1.png"):  # what follows the end of a PNG is no part of it
        path = image.with_name(name)
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(time, time))
    padded, noted = cb.data.load(folder)[0], data.fingerprint(str(folder))
    assert torch.equal(padded.images, before.images)
    image.write_bytes(other.ljust(size, b"\0"))
    os.utime(image, ns=(time, time))
    after = cb.data.load(folder)[0]
    assert data.fingerprint(str(folder)) == noted  # as its docstring says
    assert torch.equal(after.images[0], before.images[1])
    assert not torch.equal(after.images[0], before.images[0])


def test_classes_are_in_the_order_of_torchvisions_image_folder(folder):
    """Capitals before small letters, and 10 before 9: networks of others have their outputs in this order."""
    import torchvision.datasets

    for split in ("train", "test"):
        for name in ("Zebra", "10", "9"):
            (folder / split / name).mkdir()
            Image.new("RGB", (32, 32)).save(folder / split / name / "0.png")
    for split, ours in zip(("train", "test"), cb.data.load(folder), strict=True):
        theirs = torchvision.datasets.ImageFolder(folder / split)
        assert list(ours.classes) == theirs.classes
        assert ours.labels.tolist() == theirs.targets


def test_cifar100_has_its_fine_labels(tmp_path):
    """The hub's files hold the twenty coarse ones too."""
    for split in ("train", "test"):
        write_parquet(tmp_path / "cifar100", split, [99, 4], label="fine_label")
        file = tmp_path / "cifar100" / f"{split}-00000-of-00001.parquet"
        table = pq.read_table(file)
        both = {"img": table.column("img"), "coarse_label": pa.array([1, 2]), "fine_label": table.column("fine_label")}
        pq.write_table(pa.table(both), file)
    for part in cb.data.load("cifar100", root=tmp_path):
        assert part.labels.tolist() == [99, 4]
        assert part.num_classes == 100


def test_mean_and_deviation_are_those_of_all_pixels_channel_by_channel():
    """Of the pixels there are, not of a population that they were drawn from; and scaled images keep them."""
    pixels = torch.randint(256, (4, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[:, 2] //= 4
    arrays = {split: (pixels, torch.tensor([0, 1, 0, 1])) for split in ("train", "test")}
    train, _ = data.images.built("four", arrays, classes=("a", "b"), flip=True)
    exact = (pixels.double() / 255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(train.mean.double(), exact.mean(1), rtol=0, atol=1e-7)
    torch.testing.assert_close(train.std.double(), exact.std(1, correction=0), rtol=0, atol=1e-7)
    scaled = train.resized(4)
    assert torch.equal(scaled.mean, train.mean)
    assert torch.equal(scaled.std, train.std)


def test_images_scaled_down_are_averaged():
    """One bright column of four becomes a quarter of its brightness; without antialiasing it would be missed."""
    columns = torch.where(torch.arange(32) % 4 == 0, 255, 0).to(torch.uint8).expand(2, 3, 32, 32).contiguous()
    names = ("a", "b")
    striped = cb.data.Images("stripes", columns, torch.arange(2), names, torch.zeros(3), torch.ones(3))
    small = striped.resized(8).images
    assert small.shape == (2, 3, 8, 8)
    assert (small[..., 1:-1].float() - 255 / 4).abs().max() <= 1


def test_every_image_is_trained_on_in_some_epoch():
    """A last smaller batch is left out, and it is of other images in every epoch."""
    train = cb.data.load("digits")[0].take(range(20))
    numbered = replace(train, labels=torch.arange(20), classes=tuple(map(str, range(20))))
    epochs = [torch.cat([labels for _, labels in numbered.batches(6, seed=seed, drop_last=True)]) for seed in range(20)]
    assert all(len(epoch.unique()) == 18 for epoch in epochs)
    assert torch.cat(epochs).unique().tolist() == list(range(20))
