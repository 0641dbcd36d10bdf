"""Files that somebody else made are data: what they try is one clear line, within bounds of time and memory."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cram_bench as cb
from cram_bench import cli, models, report, runs, sweep
from cram_bench.data import sentences
from cram_bench.data.parquet import read_parquet
from cram_bench.report import pages, reproduce

MEMORY = 500 * 2**20
PATIENCE = 60  # of seconds, on any machine: an attempt that succeeds would take for ever
SECONDS = 2  # of the processor, at which the kernel ends an attempt; a refusal takes 0.1 at most
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "cram_bench.data.parquet",
        "cram_bench.sweep",
        "cram_bench.data.sentences",
        "cram_bench.report.reproduce",
        "cram_bench.runs",
        "pyarrow.parquet",
        "torch.utils.data",
        "torchvision.transforms.v2",
    ]  # not what it takes to import
)


TRIED: list[str] = []
"""What was tried so far, for the number that the README gives."""


@pytest.fixture(autouse=True)
def noted(counted):
    yield
    counted("files of others", len(TRIED))


def attempt(call, *arguments) -> str:
    """Make a call in a process of its own, with bounds; return the line that refused it."""
    TRIED.append(call.__name__)
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_bounded, args=(there, call, arguments), daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(PATIENCE), f"{call.__name__} does not end"
        kind, message, grown = here.recv()
    except EOFError:
        process.join(PATIENCE)
        pytest.fail(f"{call.__name__} ended its process with status {process.exitcode}")
    finally:
        process.kill()
        process.join(PATIENCE)
    assert kind in ("DataError", "ValueError", "SweepError", "RunError", "ReportError", "OSError"), f"{kind}: {message}"
    assert message == message.strip()
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    assert grown < MEMORY, f"{call.__name__} took {grown / 2**20:.0f} MiB"
    return message


def _bounded(answer, call, arguments) -> None:
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest use of memory is counted from here
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4 * MEMORY,) * 2)
    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = math.ceil(used.ru_utime + used.ru_stime) + SECONDS - 1  # whole seconds: at least SECONDS - 1 are left
    resource.setrlimit(resource.RLIMIT_CPU, (allowed,) * 2)
    warnings.simplefilter("error")  # one line, and not a warning before it
    try:
        call(*arguments)
        answer.send(("nothing", "it was not refused", 0))
    except Exception as error:
        answer.send((type(error).__name__, str(error), _status("VmHWM") - before))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


# ---------------------------------------------------------------- images and tables


def pictures(folder: Path, evil: str = "train/cat/1.png") -> Path:
    """Write an image folder, and return the place of one image that is not there."""
    for name in ("train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name != evil:
            Image.fromarray(np.full((8, 8, 3), len(name), np.uint8)).save(folder / name)
    return folder / evil


def png(width: int, height: int) -> bytes:
    """Return a sound PNG of black pixels in colour, small as it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), bytes(1 + 3 * width)
    data = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def streamed(folder: Path) -> None:
    train, _ = cb.data.load(folder, crop=8, workers=0)
    train.sample(len(train))


def load_at_once(folder: Path) -> None:
    cb.data.load(folder)


def shape_of(folder: Path) -> None:
    cb.data.image_shape(str(folder))


@pytest.mark.parametrize("way", [load_at_once, streamed, shape_of])
def test_an_image_of_13000_by_13000_pixels_is_not_decoded(way, tmp_path):
    evil = pictures(tmp_path, "train/cat/0.png")
    evil.write_bytes(png(13_000, 13_000))
    assert evil.stat().st_size < 2**20
    said = attempt(way, tmp_path)
    assert said == f"{evil} is not readable as an image: it has 13000 × 13000 pixels, and an image may have 67,108,864"


@pytest.mark.parametrize("way", [load_at_once, streamed, shape_of])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
        (os.mkfifo, "it is a pipe, not a file"),
        (lambda path: (path.touch(), os.truncate(path, 2**40)),
         "it has 1,099,511,627,776 bytes, and may have 268,435,456"),
    ],
    ids=["an endless device", "a pipe", "a file of a terabyte of nothing"],
)  # fmt: skip
def test_what_is_no_image_file_is_neither_waited_for_nor_read(way, make, words, tmp_path):
    evil = pictures(tmp_path, "train/cat/0.png")
    make(evil)
    said = attempt(way, tmp_path)
    assert str(evil) in said
    assert said.endswith(words)


@pytest.mark.parametrize("suffix", ["eps", "gif", "ico", "tga", "pcx", "psd"])
def test_only_the_formats_that_are_meant_are_decoded(suffix, tmp_path):
    evil = pictures(tmp_path)
    with contextlib.suppress(OSError, KeyError):  # of those that Pillow only reads, the name is enough
        Image.new("RGB", (8, 8)).save(evil.with_suffix(f".{suffix}"))
    with contextlib.suppress(FileNotFoundError):
        evil.with_suffix(f".{suffix}").rename(evil)
    if not evil.exists():
        evil.write_bytes(b"8BPS\0\1" + bytes(20))
    assert "it is none of PNG, JPEG, PPM, BMP, TIFF, WEBP" in attempt(load_at_once, tmp_path)


def shard(path: Path, image: bytes, rows: int = 1, **more) -> Path:
    """Write a shard of the hub's layout in which one image stands in so many rows: the file holds it once."""
    images = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([image]))
    columns = {"img": pa.StructArray.from_arrays([images], ["bytes"]), "label": pa.array([3] * rows)}
    table = pa.table(columns | {name: pa.array(values) for name, values in more.items()})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False)
    return path


def read_shard(path: Path) -> None:
    read_parquet([path])


@pytest.mark.parametrize(
    ("image", "rows", "words"),
    [
        (bytes(10**6), 10_000, "it says that its {} bytes are 10,000 images"),
        (bytes(10**7), 500, "its {} bytes stand for 10,000,1.., .* times as many; allowed are 100 times"),
        (np.random.default_rng(0).bytes(10**6), 20_000,
         "its {} bytes stand for 20,000,000,000, .* as many; allowed are 100 times"),
    ],
    ids=["many rows", "one large image of nothing", "a file of a megabyte"],
)  # fmt: skip
def test_a_parquet_column_is_not_expanded(image, rows, words, tmp_path):
    path = shard(tmp_path / "evil.parquet", image, rows)
    size = path.stat().st_size
    assert len(image) * rows > min(3_000_000 * size, 10**10)
    pattern = f"{re.escape(str(path))} is not readable as Parquet: {words.format(f'{size:,}')}"
    assert re.fullmatch(pattern, attempt(read_shard, path))


def test_an_image_of_a_parquet_file_is_one_that_was_meant(tmp_path):
    more = np.random.default_rng(0).bytes(10**5)  # or the file is refused for how small it is
    said = attempt(read_shard, shard(tmp_path / "evil.parquet", png(13_000, 13_000) + more))
    assert said.startswith(f"{tmp_path}/evil.parquet")
    assert said.endswith("it has 13000 × 13000 pixels, and an image may have 67,108,864")


def test_columns_that_are_not_meant_are_not_read(tmp_path):
    file = png(4, 4)
    path = shard(tmp_path / "more.parquet", file, more=[bytes(10**8)])
    images, labels = read_parquet([path])
    assert images.shape == (1, 3, 4, 4)
    assert labels.tolist() == [3]


def test_the_same_images_in_several_row_groups_are_read_in_their_order(tmp_path):
    files = [png(4, 4), png(4, 4)[:-4] + b"\xaeB`\x82"]
    table = pa.table({"img": [{"bytes": files[i % 2], "path": str(i)} for i in range(7)], "label": list(range(7))})
    for dictionary in (True, False):
        pq.write_table(table, tmp_path / "groups.parquet", row_group_size=3, use_dictionary=dictionary)
        images, labels = read_parquet([tmp_path / "groups.parquet"])
        assert images.shape == (7, 3, 4, 4)
        assert labels.tolist() == list(range(7))


def read_sweep(path: Path) -> None:
    sweep.read(path)


LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        LAUGHS,
        LAUGHS + "epochs: *i\n",  # which a message would show
        LAUGHS + "method: *i\n",
        MERGES,
        "epochs: &a [*a]\n",
        "methods: &a {a: *a}\n",
    ],
    ids=["many", "in a message", "as a name", "merged", "in itself", "in its own values"],
)
def test_aliases_of_yaml_are_not_written_out(content, tmp_path):
    (tmp_path / "sweep.yaml").write_text(content)
    said = attempt(read_sweep, tmp_path / "sweep.yaml")
    assert said == f"{tmp_path}/sweep.yaml: its aliases stand for more than 4,194,304 characters"


def test_aliases_that_save_typing_are_read():
    shared = "shared: &lr [0.1, 0.2]\ngrid: {lr: *lr, rho: *lr}\nbase: &b {epochs: 3}\nmore: {<<: *b, seed: 1}\n"
    read = cb._yaml.load(shared)
    assert read["grid"] == {"lr": [0.1, 0.2], "rho": [0.1, 0.2]}
    assert read["more"] == {"epochs": 3, "seed": 1}


def test_a_sweep_without_an_end_is_refused(tmp_path):
    (tmp_path / "sweep.yaml").symlink_to("/dev/zero")
    assert "it has 4,194,305 characters, and may have 4,194,304" in attempt(read_sweep, tmp_path / "sweep.yaml")


# ---------------------------------------------------------------- sentences


def read_sentences(path: Path) -> None:
    sentences._read(path, 2)


def test_a_line_of_ten_million_words_does_not_reach_a_tokenizer(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("good\t1\n" + "word " * 10**7 + "\t1\n")
    assert (
        attempt(read_sentences, path) == f"{path}, line 2: it is longer than 100,000 bytes, which a sentence may have"
    )


@pytest.mark.parametrize("kind", ["a device", "a pipe"])
def test_sentences_come_from_a_file(kind, tmp_path):
    path = tmp_path / "train.tsv"
    path.symlink_to("/dev/zero") if kind == "a device" else os.mkfifo(path)
    assert attempt(read_sentences, path) == f"{path} is not readable: it is {kind}, not a file"


def test_lines_end_at_newlines_only_and_a_byte_order_mark_goes(tmp_path):
    odd = "one\u2028two\u2029\x0b\x0c\x1c\x1d\x1e\x85 three\rfour"
    (tmp_path / "train.tsv").write_bytes(f"\ufeffgood\t1\r\n{odd}\t0\na\tb\t1\n\ufefflast\t1".encode())
    read, labels = sentences._read(tmp_path / "train.tsv", 2)
    assert read == ["good", odd, "a\tb", "\ufefflast"]  # a mark is one at the beginning, a label after the last TAB
    assert labels == [1, 0, 1, 1]


# ---------------------------------------------------------------- weights


def header(path: Path, count: int) -> Path:
    """Write a file of safetensors with so many names of nothing."""
    of_nothing = '"layer.{}.weight": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
    content = f"{{{', '.join(map(of_nothing.format, range(count)))}}}".encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    return path


@pytest.mark.parametrize("read", [models.read, cb.compress.Masks.load])
def test_a_header_of_a_million_names_is_not_read(read, tmp_path):
    path = header(tmp_path / "model.safetensors", 1_000_000)
    words = r"is not readable as safetensors: its header has \d+,\d+,\d+ bytes, and may have 4,194,304$"
    assert re.search(f"^{re.escape(str(path))} {words}", attempt(read, path))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("kind", ["a device", "a pipe"])
def test_weights_come_from_a_file(suffix, kind, tmp_path):
    path = tmp_path / f"model.{suffix}"
    path.symlink_to("/dev/zero") if kind == "a device" else os.mkfifo(path)
    assert f"it is {kind}, not a file" in attempt(models.read, path)


def convnet():
    torch.manual_seed(0)
    return models.create("convnet", 10, 1)


def one(value):
    def change(weight):
        weight = weight.clone()
        weight.view(-1)[3] = value
        return weight

    return change


NO_WEIGHTS = [
    ("int8", lambda w: w.to(torch.int8), "'linear.weight' holds int8, and must hold floating-point numbers"),
    ("bool", lambda w: w > 0, "'linear.weight' holds bool, and must hold floating-point numbers"),
    ("complex", lambda w: w.to(torch.complex64),
     "'linear.weight' holds complex64, and must hold floating-point numbers"),
    ("infinite", one(float("inf")), "1 of 640 values of 'linear.weight' are infinite or no numbers"),
    ("no number", one(float("nan")), "1 of 640 values of 'linear.weight' are infinite or no numbers"),
    ("infinite here", lambda w: one(1e300)(w.double()),
     "1 of 640 values of 'linear.weight' are infinite or no numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in NO_WEIGHTS], ids=[row[0] for row in NO_WEIGHTS])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_what_are_no_weights_is_refused_before_a_number_is_printed(change, words, suffix, tmp_path, capsys):
    TRIED.append("probe")
    model, path = convnet(), tmp_path / f"model.{suffix}"
    state = model.state_dict()
    state["linear.weight"] = change(state["linear.weight"])
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    assert cli.main(["probe", str(path), "--arch", "convnet", "--data", "digits", "--sample", "50"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"cram-bench: {path} does not fit convnet: {words}\n"


def test_weights_of_other_widths_are_weights(tmp_path):
    source, model = convnet(), convnet()
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        state = {name: t.to(kind) if t.is_floating_point() else t.int() for name, t in source.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        models.load_(model, tmp_path / "model.safetensors")
        assert torch.equal(model.linear.weight, source.linear.weight.to(kind).float())


def test_a_buffer_that_is_infinite_where_it_is_made_may_be_so():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    models.check_values(model, model.state_dict())
    with pytest.raises(ValueError, match="1 of 2 values of 'bias' are infinite"):
        models.check_values(model, {"bias": torch.tensor([0.0, torch.inf])})


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in NO_WEIGHTS], ids=[row[0] for row in NO_WEIGHTS])
def test_a_run_with_other_numbers_is_refused(change, words, tmp_path):
    """Whoever writes weights can write their checksums too."""
    TRIED.append("load_model")
    run = runs.ensure(cb.recipes.recipe("digits", "sgd", epochs=1), progress=False)
    state = run.load_model().state_dict()
    state["linear.weight"] = change(state["linear.weight"])
    file, note = run.path / "model.safetensors", run.path / "environment.json"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    about = cb.files.unsealed(note.read_text(), note.name)
    about["sha256"][file.name] = cb.files.sha256(file)
    note.write_text(cb.files.sealed(about, note.name))
    with pytest.raises(runs.RunError, match=re.escape(f"{file} does not fit convnet: {words}")):
        runs.Store().open(run.id).load_model()


# ---------------------------------------------------------------- runs and reports

NO_FILES = {
    "a device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
    "a pipe": (os.mkfifo, "it is a pipe, not a file"),
    "a terabyte of nothing": (
        lambda path: (path.touch(), os.truncate(path, 2**40)),
        "it has 1,099,511,627,776 bytes, and may",
    ),
    "a line of ten million words": (
        lambda path: path.write_text("word " * 10**7),
        "it has 50,000,000 bytes, and may have",
    ),
    "a header of a million names": (
        lambda path: path.write_text(",".join(map(str, range(10**6))) + "\n"),
        "its first line has 6,888,889 bytes, and may have 65,536",
    ),
}
"""What may lie in the place of a file: how it is made, and the words that refuse it."""
CROWDED = f'{{"sha256":{{"report.json":"0"}},"runs":[{",".join(["{}"] * (2**23 // 3 - 13))}]}}'
"""JSON that takes twenty times as much memory as it has bytes."""


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRAM_BENCH_RUNS", str(tmp_path_factory.mktemp("runs")))
        return runs.ensure(cb.recipes.recipe("digits", "sgd", epochs=1), progress=False)


def look(root: Path, id: str) -> None:
    run = runs.Store(root).open(id)
    run.history, run.environment  # noqa: B018


def test_weights_of_a_run_have_a_header_that_was_meant(a_run, tmp_path):
    folder = tmp_path / a_run.id
    shutil.copytree(a_run.path, folder)
    (folder / "model.safetensors").unlink()
    about = cb.files.unsealed((folder / "environment.json").read_text(), "environment.json")
    about["sha256"]["model.safetensors"] = cb.files.sha256(header(folder / "model.safetensors", 1_000_000))
    (folder / "environment.json").write_text(cb.files.sealed(about, "environment.json"))
    words = r"model.safetensors is not readable as safetensors: its header has 78,888,890 bytes, and may have 4,194,304"
    assert words in attempt(load_weights, tmp_path, a_run.id)


HOSTILE_STRUCTURES = {
    "a million units": lambda: json.dumps({"layer1.0.channels": [0] * 10**6}),
    "a unit of a million digits": lambda: '{"layer1.0.channels": [' + "9" * 10**6 + "]}",
    "a million structures": lambda: json.dumps({f"layer{n}": [] for n in range(2 * 10**5)}),
    "a long name": lambda: json.dumps({"n" * 10**6: []}),
    "nested": lambda: '{"layer1.0.channels": ' + "[" * 10**5 + "]" * 10**5 + "}",
    "too long": lambda: json.dumps({"layer1.0.channels": [0] * 2 * 10**6}),
}
"""What a structure of somebody else's run may keep."""


@pytest.mark.parametrize("kind", HOSTILE_STRUCTURES)
def test_a_structure_of_a_run_is_read_within_bounds(kind, a_run, tmp_path):
    folder = tmp_path / a_run.id
    shutil.copytree(a_run.path, folder)
    text = '{"format": 1, "kept": ' + HOSTILE_STRUCTURES[kind]() + ', "sha256": {"structure.json": "0"}}'
    with contextlib.suppress(ValueError, RecursionError):  # where it is JSON at all, its checksum is right
        sys.set_int_max_str_digits(0)
        text = cb.files.sealed({**json.loads(text), "sha256": {}}, "structure.json")
    sys.set_int_max_str_digits(4300)
    (folder / "structure.json").write_text(text)
    about = cb.files.unsealed((folder / "environment.json").read_text(), "environment.json")
    about["sha256"]["structure.json"] = cb.files.sha256(folder / "structure.json")
    (folder / "environment.json").write_text(cb.files.sealed(about, "environment.json"))
    assert str(folder / "structure.json") in attempt(load_weights, tmp_path, a_run.id)


def load_weights(root: Path, id: str) -> None:
    runs.Store(root).open(id).load_model()


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("settings.json", "environment.json", "history.csv") for kind in NO_FILES
     if name == "history.csv" or kind != "a header of a million names"],
)  # fmt: skip
def test_a_run_is_read_from_files_within_bounds(name, kind, a_run, tmp_path):
    folder = tmp_path / a_run.id
    shutil.copytree(a_run.path, folder)
    (folder / name).unlink()
    make, words = NO_FILES[kind]
    make(folder / name)
    if kind == "a header of a million names":  # whoever writes a history can write its checksum too
        about = cb.files.unsealed((folder / "environment.json").read_text(), "environment.json")
        about["sha256"][name] = cb.files.sha256(folder / name)
        (folder / "environment.json").write_text(cb.files.sealed(about, "environment.json"))
    said = attempt(look, tmp_path, a_run.id)
    assert str(folder / name) in said
    assert words in said


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_table_of_a_report_is_read_from_a_file_within_bounds(kind, tmp_path):
    (tmp_path / "tables").mkdir()
    make, words = NO_FILES[kind]
    for name in ("transfer_runs", "transfer"):
        make(tmp_path / "tables" / f"{name}.csv")
    if kind not in ("a device", "a pipe"):  # which have no result
        assert words in attempt(cb.report.findings.findings, tmp_path, ["transfer"])
        assert words in attempt(reproduce._table, *[tmp_path / "tables" / "transfer.csv"] * 2)
    if kind != "a device":  # which leads out of the report
        assert words in attempt(pages._read, tmp_path, "transfer")
    else:
        assert "leads out of" in attempt(pages._read, tmp_path, "transfer")


@pytest.mark.parametrize("kind", NO_FILES)
def test_no_report_of_another_stops_the_shelf(kind, tmp_path):
    (tmp_path / "other" / "tables").mkdir(parents=True)
    (tmp_path / "other" / "report.json").write_text(json.dumps({"title": "t", "facts": {"Experiment": "E"}}))
    NO_FILES[kind][0](tmp_path / "other" / "tables" / "accuracy_summary.csv")
    assert attempt(shelved, tmp_path) == "done"
    assert "<dd>E</dd>" in (tmp_path / "index.html").read_text()
    (tmp_path / "index.html").unlink()
    NO_FILES[kind][0](tmp_path / "index.html")
    assert attempt(shelved, tmp_path) == "done"  # and what is no page is left as it is


def shelved(folder: Path) -> None:
    pages.shelf(folder)
    raise ValueError("done")


def test_a_crowded_note_of_a_report_is_read_within_bounds(tmp_path):
    assert 2**23 - 10 < len(CROWDED) <= 2**23
    (tmp_path / "report.json").write_text(CROWDED)
    assert attempt(report.building.note, tmp_path).endswith("its checksum does not match")
    (tmp_path / "report.json").write_text(CROWDED + " " * 10)
    assert attempt(report.building.note, tmp_path).endswith("and may have 8,388,608")


# ---------------------------------------------------------------- the cache of decoded images


def test_what_is_decoded_is_not_mapped_from_its_cache(tmp_path):
    """What was compared with the checksum is what is used: a cache that changes later changes no data set."""
    pictures(tmp_path / "set", evil="none")
    cb.data.load(tmp_path / "set")
    train, _ = cb.data.load(tmp_path / "set")  # of the cache
    before = train.images.clone()
    TRIED.append("load")
    (cache,) = (cb.data.cache_root() / "decoded").glob("*.safetensors")
    with open(cache, "rb+") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        file.seek(8 + length)
        file.write(bytes(cache.stat().st_size - 8 - length))
    assert torch.equal(train.images, before)
    with pytest.warns(UserWarning, match="is damaged and is rebuilt: its checksum does not match"):
        again, _ = cb.data.load(tmp_path / "set")
    assert torch.equal(again.images, before)


def test_the_code_of_a_model_is_not_run(tmp_path, monkeypatch):
    """A folder for ``hub:`` whose configuration names code of its own, which would leave a file."""
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    code = "modeling_evil.EvilModel"
    auto = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModel": code, "AutoTokenizer": [None, code]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "EvilModel"}))
    ran = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    for call in (lambda: models.create(f"hub:{folder}", 2), lambda: models.encoder.tokenizer(f"hub:{folder}")):
        TRIED.append("create")
        with pytest.raises(ValueError, match=r"^the model 'hub:.*' cannot be loaded: ") as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
    assert not ran.exists()
