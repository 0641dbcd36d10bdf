import dataclasses
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cram_bench as cb
from cram_bench import runs
from cram_bench.files import sealed
from cram_bench.recipes import recipe
from cram_bench.runs import Machine, Run, RunError, Store, ensure, ensure_all
from cram_bench.train import DivergedError


def tiny(method="sgd", **changes):
    return recipe("digits", method, **({"epochs": 3} | changes))


def test_a_finished_run(tmp_path):
    run = ensure(tiny("cram+-multi"))
    store = Store()
    assert run.path == store.root / run.experiment.id
    files = {path.name for path in run.path.iterdir()}
    assert files == {"settings.json", "history.csv", "model.safetensors", "environment.json"}
    assert json.loads((run.path / "settings.json").read_text())["rho"] == 0.2
    assert run.history["epoch"].tolist() == [1, 2, 3]
    environment = run.environment
    assert environment["versions"]["torch"] == torch.__version__
    assert {"commit", "device", "threads", "compile", "command", "seconds", "started", "finished"} <= environment.keys()
    assert not list((store.root / ".training").iterdir())
    train, test = cb.data.load("digits")
    accuracy = cb.train.evaluate(run.load_model(), test)["accuracy"]
    assert accuracy == pytest.approx(run.history["test_accuracy"].iloc[-1])
    assert Run.open(run.path) == store.open(run.id[:5]) == store.find(run.experiment) == run


def test_the_same_experiment_is_never_trained_twice(monkeypatch):
    first = ensure(tiny())
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained again"))
    assert ensure(tiny()) == first


@pytest.mark.parametrize("method", ["sgd", "sam", "cram+-multi", "cram-half", "cram-single", "cram+-looking"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_resume_equals_uninterrupted_training(method, epoch, tmp_path, monkeypatch):
    straight = ensure(tiny(method), Store(tmp_path / "straight"))
    store = Store(tmp_path / "interrupted")
    on_epoch = runs.Checkpoint.on_epoch

    def interrupted(self, fit):
        on_epoch(self, fit)
        if fit.epoch == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "on_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure(tiny(method), store)
    assert store.find(tiny(method)) is None
    assert store.table()["state"].tolist() == ["interrupted"]
    resumed = ensure(tiny(method), store)
    assert (resumed.path / "model.safetensors").read_bytes() == (straight.path / "model.safetensors").read_bytes()
    drop = ["seconds"]
    pd.testing.assert_frame_equal(resumed.history.drop(columns=drop), straight.history.drop(columns=drop))


def test_a_damaged_checkpoint_is_noticed(tmp_path):
    straight = ensure(tiny(), Store(tmp_path / "straight"))
    store = Store(tmp_path / "damaged")
    work = store.root / ".training" / tiny().id
    work.mkdir(parents=True)
    (work / "checkpoint.pt").write_bytes(b"half a checkpoint")
    with pytest.warns(UserWarning, match="checkpoint.pt is damaged, training starts anew"):
        run = ensure(tiny(), store)
    assert (run.path / "model.safetensors").read_bytes() == (straight.path / "model.safetensors").read_bytes()


def test_damaged_weights_are_noticed():
    run = ensure(tiny(epochs=1))
    content = bytearray((run.path / "model.safetensors").read_bytes())
    content[-3] ^= 4
    (run.path / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(RunError, match="model.safetensors is damaged: its checksum does not match"):
        run.load_model()


def rewrite(run, **settings):
    """Change settings of a finished run with everything that vouches for them, as another version might have."""
    text = json.dumps(json.loads((run.path / "settings.json").read_text()) | settings)
    (run.path / "settings.json").write_text(text)
    environment = run.environment
    environment["sha256"]["settings.json"] = hashlib.sha256(text.encode()).hexdigest()
    (run.path / "environment.json").write_text(sealed(environment, "environment.json"))


def test_a_folder_with_other_settings_is_refused():
    run = ensure(tiny(epochs=1))
    rewrite(run, lr=0.3)
    with pytest.raises(RunError, match="holds other settings than its name says"):
        ensure(tiny(epochs=1))
    rewrite(run, epcohs=1)
    with pytest.raises(RunError, match="unknown setting 'epcohs'"):
        Run.open(run.path)


def test_a_run_under_the_name_of_other_defaults_is_found(monkeypatch):
    run = ensure(tiny(epochs=1))
    os.rename(run.path, run.path.with_name("0123456789ab"))
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained again"))
    assert ensure(tiny(epochs=1)).path.name == "0123456789ab"


def test_a_run_of_a_newer_format_is_refused():
    run = ensure(tiny(epochs=1))
    (run.path / "environment.json").write_text(sealed(run.environment | {"format": 7}, "environment.json"))
    with pytest.raises(RunError, match="has format 7, of another version of cram_bench; this one reads 1"):
        ensure(tiny(epochs=1))


def test_a_run_of_a_version_without_own_checksum_is_read():
    run = ensure(tiny(epochs=1))
    environment = run.environment
    del environment["sha256"]["environment.json"], environment["format"]
    (run.path / "environment.json").write_text(json.dumps(environment))
    assert Run.open(run.path) == run
    run.load_model()


def test_two_processes_that_ask_for_one_run_do_not_collide(tmp_path):
    code = "import cram_bench as cb; print(cb.runs.ensure(cb.recipes.recipe('digits', epochs=4)).path)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CRAM_BENCH_RUNS": str(tmp_path / "shared")}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    folders = {out.splitlines()[-1] for out, _ in results}
    assert len(folders) == 1
    trained = [err for _, err in results if "epoch 4/4" in err]
    assert len(trained) == 1  # the other waited, or came late, and found it
    assert len(load_file(Path(folders.pop()) / "model.safetensors"))


def test_a_failed_run_is_kept_and_not_dropped(monkeypatch):
    listed = ensure_all([tiny(lr=1e30), tiny()])
    assert [run.failure is None for run in listed] == [False, True]
    assert "the training loss is" in listed[0].failure
    assert sorted(Store().table()["state"]) == ["failed", "finished"]
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("tried again"))
    with pytest.raises(DivergedError, match="failed before"):
        ensure(tiny(lr=1e30))
    summary = runs.summary(listed)
    assert summary["state"].iloc[0].startswith("failed: ")
    table = cb.probes.over_runs(listed, cb.probes.sam_sharpness, cb.data.load("digits")[0].sample(50))
    assert table["seed"].tolist() == [0, 0]
    assert table["sharpness"].isna().tolist() == [True, False]


def test_runs_beside_a_report_are_read(tmp_path, monkeypatch):
    run = ensure(tiny(epochs=1), Store(tmp_path / "committed"))
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained again"))
    store = Store(tmp_path / "own", also=[tmp_path / "committed", tmp_path / "nowhere"])
    assert ensure(tiny(epochs=1), store) == run
    assert store.runs() == [run]
    assert not (tmp_path / "own" / run.id).exists()


def test_what_takes_longer_to_test_than_to_train_is_tested_at_the_end():
    few = ensure(tiny(epochs=3, sample=160))  # 500 are tested
    assert few.history["test_accuracy"].isna().tolist() == [True, True, False]
    enough = ensure(tiny(epochs=3, sample=170))
    assert not enough.history["test_accuracy"].isna().any()


def test_a_processor_without_bfloat16_is_warned_of(monkeypatch):
    monkeypatch.setattr("cram_bench.runs.how.has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="no instructions for bfloat16.*-s precision float32"):
        ensure(tiny(epochs=1, sample=64, batch_size=64, precision="bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensure(tiny(epochs=1, sample=64, batch_size=64))
        monkeypatch.setattr("cram_bench.runs.how.has_bfloat16", lambda: True)
        ensure(tiny(epochs=1, sample=65, batch_size=64, precision="bfloat16"))


def test_validation_images_stand_in_for_the_test_set(monkeypatch):
    _, test = cb.data.load("digits")
    run = ensure(tiny(epochs=1, holdout=200))
    assert (run.environment["data"]["train"], run.environment["data"]["test"]) == (1097, 200)
    _, held = run.experiment.load_data()
    rows = {image.numpy().tobytes() for image in test.images}
    assert sum(image.numpy().tobytes() in rows for image in held.images) < 5  # a few digits are drawn alike


def test_a_run_is_not_reused_when_the_images_of_its_folder_have_changed(tmp_path):
    for split in ("train", "test"):
        for label, shade in (("day", 200), ("night", 20)):
            (tmp_path / "sky" / split / label).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (8, 8), shade + index).save(tmp_path / "sky" / split / label / f"{index}.png")
    wanted = recipe(str(tmp_path / "sky"), model="convnet", epochs=1)
    run = ensure(wanted)
    assert ensure(wanted) == run
    Image.new("L", (8, 8), 99).save(tmp_path / "sky" / "train" / "day" / "more.png")
    with pytest.raises(RunError, match="the images in .*sky have changed since"):
        ensure(wanted)


def test_an_interrupted_training_starts_anew_when_the_images_have_changed(tmp_path, monkeypatch):
    """Its checkpoint is of other images; what comes of it is the run of today's alone."""
    for split in ("train", "test"):
        for label, shade in (("day", 200), ("night", 20)):
            (tmp_path / "sky" / split / label).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (8, 8), shade + index).save(tmp_path / "sky" / split / label / f"{index}.png")
    wanted = recipe(str(tmp_path / "sky"), model="convnet", epochs=2)
    write = runs.Checkpoint.on_epoch

    def stop(self, fit):
        write(self, fit)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "on_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            ensure(wanted)
    Image.new("L", (8, 8), 99).save(tmp_path / "sky" / "train" / "day" / "0.png")
    with pytest.warns(UserWarning, match="the images in .*sky have changed, training starts anew"):
        run = ensure(wanted)
    straight = ensure(wanted, Store(tmp_path / "other"))
    assert (run.path / "model.safetensors").read_bytes() == (straight.path / "model.safetensors").read_bytes()
    pd.testing.assert_frame_equal(run.history.drop(columns="seconds"), straight.history.drop(columns="seconds"))


def test_images_are_looked_at_once_for_all_runs_that_are_there(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for label, shade in (("day", 200), ("night", 20)):
            (tmp_path / "sky" / split / label).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (8, 8), shade + index).save(tmp_path / "sky" / split / label / f"{index}.png")
    wanted = [recipe(str(tmp_path / "sky"), model="convnet", epochs=1, seed=seed) for seed in range(3)]
    looked, fingerprint = [], runs.training.fingerprint
    monkeypatch.setattr("cram_bench.runs.training.fingerprint", lambda name: looked.append(1) or fingerprint(name))
    listed = ensure_all(wanted)
    looked.clear()
    for _ in range(2):
        assert ensure_all(wanted) == listed
    assert len(looked) == 2
    Image.new("L", (8, 8), 99).save(tmp_path / "sky" / "train" / "day" / "0.png")
    with pytest.raises(RunError, match="the images in .*sky have changed since"):
        ensure_all(wanted)
    looked.clear()
    Image.new("L", (8, 8), 200).save(tmp_path / "sky" / "train" / "day" / "0.png")
    shutil.rmtree(listed[1].path)
    os.utime(tmp_path / "sky" / "train" / "day" / "0.png", ns=(1, 1))
    with pytest.raises(RunError, match="the images in .*sky have changed since"):
        ensure_all(wanted[1:])  # after the training of the first
    assert len(looked) == 2
    for run in (listed[0], listed[2]):
        shutil.rmtree(run.path)
    ensure_all(wanted)
    shutil.rmtree(listed[1].path)
    fit = runs.training.fit

    def while_an_image_changes(*arguments, **options):
        os.utime(tmp_path / "sky" / "train" / "day" / "0.png", ns=(2, 2))
        return fit(*arguments, **options)

    monkeypatch.setattr("cram_bench.runs.training.fit", while_an_image_changes)
    with pytest.raises(RunError, match="the images in .*sky have changed since"):
        ensure_all(wanted)  # the first was looked at before


@pytest.mark.parametrize("name", ["zz", "nowhere"])
def test_a_run_that_is_not_there(name):
    ensure(tiny(epochs=1))
    ensure(tiny(epochs=1, seed=1))
    with pytest.raises(RunError, match="finished runs in .* are called"):
        Store().open(name)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is not a finished run"):
        Run.open(tmp_path)


def test_a_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="batch_size 4096 is larger than the training data, 1297 images"):
        ensure(tiny(batch_size=4096))


def test_everything_that_an_experiment_says_reaches_the_training(monkeypatch):
    """Every argument of the loop is another than its default, and so is every part."""

    @dataclass(frozen=True)
    class Smooth(cb.losses.CrossEntropy):
        kind: ClassVar[str] = "smooth"

    monkeypatch.setitem(cb.losses.LOSSES, "smooth", Smooth)
    found = {}

    def noted(model, optimizer, train, test, **given):
        found.update(given, optimizer=optimizer, train=train, test=test)
        raise KeyboardInterrupt

    monkeypatch.setattr(cb.runs.training, "fit", noted)
    settings = {"epochs": 3, "batch_size": 32, "seed": 4, "precision": "bfloat16", "augment": False}
    other = {"loss": "smooth", "warmup_epochs": 0.7, "holdout": 97}
    with pytest.raises(KeyboardInterrupt):
        ensure(recipe("digits", "cram-half", **settings, **other), progress=False, compile=False)
    parts = {"loss": Smooth(), "schedule": cb.schedules.Cosine(warmup_epochs=0.7), "halves": True}
    expected = settings | parts | {"test_every": 1, "compile": False}
    assert {name: found[name] for name in expected} == expected
    assert (len(found["train"]), len(found["test"])) == (1200, 97)
    _, held_out = cb.data.load("digits")[0].split(97, seed=0)  # whatever the experiment's seed: all are validated alike
    assert torch.equal(found["test"].images, held_out.images)
    assert isinstance(found["optimizer"], cb.optim.CrAM)
    for ramp in (False, True):
        with pytest.raises(KeyboardInterrupt):
            ensure(recipe("digits", "cram+", epochs=1, ramp=ramp), progress=False)
        assert [type(c).__name__ for c in found["callbacks"]] == ["Checkpoint", *["Ramp"] * ramp]


def test_only_a_long_training_on_images_is_compiled_unless_asked():
    train, _ = cb.data.load("digits")
    long, short = recipe("digits", epochs=155), recipe("digits", epochs=154)  # of 1,297 images
    assert Machine().suited(long, train).compile is True
    assert Machine().suited(short, train).compile is False
    assert Machine(compile=True).suited(short, train).compile is True
    assert Machine(compile=False).suited(long, train).compile is False
    sentences = cb.data.Sentences("words", torch.zeros(len(train), 16, dtype=torch.long), train.labels, train.classes)
    suited = Machine().suited(long, sentences)
    assert (suited.compile, suited.threads) == (False, None)
    several = types.SimpleNamespace(world=2, device="cpu")
    assert Machine().joined(several).suited(long, train).compile is False
    with pytest.raises(ValueError, match="compile is for one process, not for 2"):
        Machine(compile=True).joined(several)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ensure(tiny(epochs=1), threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["sgd", "sam", "cram", "cram+", "cram+-multi"])
def test_every_method_that_diverges_is_a_failed_run(method):
    wanted = cb.recipes.recipe("digits", method, epochs=2, lr=1e9)
    (run,) = cb.runs.ensure_all([wanted], progress=False)
    assert "in epoch 1; try a lower lr" in run.failure
    assert list(cb.runs.Store().table().state) == ["failed"]


@pytest.fixture
def interrupted(monkeypatch):
    wanted, store = cb.recipes.recipe("digits", "sgd", epochs=2), cb.runs.Store()
    write = cb.runs.Checkpoint.on_epoch

    def stop(self, fit):
        write(self, fit)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cb.runs.Checkpoint, "on_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            cb.runs.ensure(wanted, progress=False)
    return wanted, store.root / ".training" / wanted.id / "checkpoint.pt"


def packed(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def flipped(data, share):
    position = int(len(data) * share)
    return data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: flipped(data, 0.2),
        lambda data: flipped(data, 0.5),
        lambda data: flipped(data, 0.8),
        lambda data: packed({"a": 1}),
        lambda data: packed([1]),
    ],
    ids=["truncated", "emptied", "flipped early", "flipped midway", "flipped late", "another dict", "a list"],
)
def test_any_damaged_checkpoint_is_noticed(damage, interrupted, tmp_path, request, counted):
    wanted, checkpoint = interrupted
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.warns(UserWarning, match="damaged, training starts anew"):
        run = cb.runs.ensure(wanted, progress=False)
    straight = cb.runs.ensure(wanted, cb.runs.Store(tmp_path / "other"), progress=False).load_model().state_dict()
    assert all(torch.equal(value, straight[name]) for name, value in run.load_model().state_dict().items())
    counted(f"damaged checkpoints: {request.node.callspec.id}", 1)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_damaged_environment_is_a_run_error(content):
    run = cb.runs.ensure(cb.recipes.recipe("digits", epochs=1), progress=False)
    (run.path / "environment.json").unlink()
    if content is not None:
        (run.path / "environment.json").write_text(content)
    with pytest.raises(cb.runs.RunError, match=run.id):
        run.load_model()


def test_a_sparse_model_is_transferred_with_its_mask_held():
    """Pruned at the source's own weights, trained on other data with a fresh head, and as sparse in the end."""
    source = ensure(tiny("cram+-multi", epochs=1, resize=16))
    moved = ensure(recipe("digits", epochs=2, resize=16, start=source.id, prune="global@0.8"), progress=False)
    before, after = source.load_model(), moved.load_model()
    masks = cb.compress.apply_(before, cb.compress.Magnitude(0.8))
    for name, mask in masks.items():
        assert not after.get_parameter(name)[~mask].any()
        assert not torch.equal(after.get_parameter(name), before.get_parameter(name))
    assert moved.experiment.load_data()[0].images.shape[1:] == (3, 16, 16)


def test_another_data_set_gets_a_fresh_head(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (16, 16), (index * 9, 100, 20)).save(tmp_path / "set" / split / name / f"{index}.png")
    source = ensure(tiny(epochs=1, resize=16))
    changes = {"model": "convnet", "epochs": 1, "batch_size": 4, "precision": "float32", "lr": 1e-9}
    moved = ensure(recipe(tmp_path / "set", start=source.id, prune="global@0.5", **changes))
    before, after = source.load_model(), moved.load_model()
    masks = cb.compress.apply_(before, cb.compress.Magnitude(0.5))
    head = cb.models.head(after)
    assert after.get_parameter(head[0]).shape[0] == 2
    assert after.get_parameter(head[0]).all()  # dense
    for name in set(masks) - set(head):
        torch.testing.assert_close(after.get_parameter(name), before.get_parameter(name), rtol=0, atol=1e-6)


def test_a_start_that_does_not_fit_is_refused():
    source = ensure(tiny(epochs=1))
    with pytest.raises(RunError, match=r"does not fit resnet20: .* is missing"):
        ensure(recipe("digits", epochs=1, model="resnet20", start=source.id))
    with pytest.raises(RunError, match="0123456789ab"):
        ensure(recipe("digits", epochs=1, start="0123456789ab"))
    with pytest.raises(ValueError, match="prune needs start"):
        recipe("digits", prune="global@0.5")
    with pytest.raises(ValueError, match="start must be the id of a run, twelve hexadecimal digits, not 'there'"):
        recipe("digits", start="there")


def test_a_failed_source_fails_what_starts_from_it_and_stands_in_the_tables():
    source = tiny("cram+-multi", epochs=1, lr=1e30)
    sound = tiny("cram+-multi", epochs=1)
    tuned = [recipe("digits", epochs=1, start=e.id, prune="global@0.5") for e in (source, sound)]
    listed = ensure_all([source, sound, *tuned])
    assert [run.failure is None for run in listed] == [False, True, False, True]
    assert f"the run it starts from, {source.id}, failed" in listed[2].failure
    accuracy = cb.probes.transfer_accuracy(listed[2:], listed[:2])["accuracy"]
    assert accuracy.isna().tolist() == [True, False]
    further = recipe("digits", epochs=1, start=tuned[0].id)
    table = cb.sweep.table([source, tuned[0], further])
    assert table["state"].tolist() == ["failed"] * 3
    assert table["reason"][2] == f"the run it starts from, {tuned[0].id}, failed"


def test_a_change_that_fails_keeps_its_row():
    listed = ensure_all([tiny(epochs=1), tiny(epochs=1, lr=1e30)])
    curves = [cb.probes.over_runs([run], cb.probes.sparsity_curve, run.experiment.load_data()[1], ["global@0.5"],
                                  [next(run.experiment.load_data()[0].batches(100))]).assign(changed=name)
              for run, name in zip(listed, ("as it is", "lr = 1e30"), strict=True)]  # fmt: skip
    means = cb.probes.ablation_means(pd.concat(curves, ignore_index=True))
    assert list(means.index) == ["as it is", "lr = 1e30"]
    assert list(means.columns) == ["dense", "50"]
    assert means.notna().all(axis=1).tolist() == [True, False]
    texts = [text.get_text() for text in cb.plots.ablations(means).axes[0].texts]
    assert texts[2:] == ["failed", "failed"]


def test_a_run_that_cannot_be_read_does_not_hide_the_others():
    good, bad = ensure(tiny(epochs=1)), ensure(tiny(epochs=2))
    rewrite(bad, lr=-1.0)
    with pytest.warns(UserWarning, match=r"left out: .*lr must be positive, not -1.0"):
        assert Store().runs() == [good]


@pytest.fixture
def tied_hub(tmp_path, monkeypatch):
    """A folder with a tiny random BART, whose three embeddings are one tensor, and a set of sentences."""
    transformers = pytest.importorskip("transformers", reason="the extra cram-bench[language] is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "good", "bad", "film", "a"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(tmp_path / "bart")
    torch.manual_seed(0)
    transformers.BartModel(
        transformers.BartConfig(
            vocab_size=6, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
            pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
        )
    ).save_pretrained(tmp_path / "bart")  # fmt: skip
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "data" / "sst2" / f"{split}.tsv").write_text("a good film\t1\na bad film\t0\ngood\t1\nbad\t0\n" * 4)
    monkeypatch.setenv("CRAM_BENCH_DATA", str(tmp_path / "data"))
    return f"hub:{tmp_path / 'bart'}"


def test_a_model_of_the_hub_with_tied_weights_is_trained_saved_and_loaded(tied_hub):
    run = ensure(recipe("sst2", "adamw", model=tied_hub, epochs=2, batch_size=4, lr=1e-2))
    state = load_file(run.path / "model.safetensors")
    names = [name for name in state if name.endswith(("shared.weight", "embed_tokens.weight"))]
    assert len(names) == 3
    assert all(torch.equal(state[name], state[names[0]]) for name in names)
    model = run.load_model()
    shared = [model.get_parameter(name) for name in names]
    assert all(tensor is shared[0] for tensor in shared)  # tied again
    assert not torch.equal(shared[0], run.experiment.build_model(run.experiment.load_data()[0]).get_parameter(names[0]))
    accuracy = cb.train.evaluate(model, run.experiment.load_data()[1])["accuracy"]
    assert accuracy == pytest.approx(run.history["test_accuracy"].iloc[-1])


class Odd(torch.nn.Module):
    """A classifier of the digits with something amiss."""

    def __init__(self, num_classes, in_channels, image_size, amiss):
        super().__init__()
        self.amiss = amiss
        self.linear = torch.nn.Linear(image_size**2, num_classes - (amiss == "few"))
        if amiss == "lazy":
            self.linear = torch.nn.LazyLinear(num_classes)
        if amiss == "complex":
            self.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
        self.register_buffer("drawn", torch.randn(image_size**2), persistent=False)
        if amiss == "frozen":
            self.requires_grad_(False)

    def forward(self, x):
        if self.amiss == "hurts":
            raise AssertionError
        if self.amiss == "counts" and self.training:
            self.drawn += 1
        y = self.linear(x.flatten(1) * self.drawn)
        return (
            y.flatten()
            if self.amiss == "flat"
            else {"odd": y}
            if self.amiss == "dict"
            else (y, x)
            if self.amiss == "tuple"
            else y
        )


def odd(monkeypatch, amiss):
    monkeypatch.setitem(cb.models.BUILDERS, "odd", lambda num_classes, in_channels, image_size: Odd(
        num_classes, in_channels, image_size, amiss))  # fmt: skip
    return tiny(model="odd", epochs=1)


@pytest.mark.parametrize(
    ("amiss", "words"),
    [
        ("few", r"model 'odd' must return logits of shape \(n, 10\), one a class, and returns shape \(2, 9\)"),
        ("flat", r"model 'odd' must return logits of shape \(n, 10\), one a class, and returns shape \(20,\)"),
        ("lazy", "'linear.weight' is not initialised yet: call the model on one batch"),
        ("dict", "the model returns dict of odd, in which no logits are found"),
        ("frozen", "no parameter of Odd has requires_grad"),
        ("complex", "Odd could not be saved after its training: 'odd' .*complex128"),
        ("hurts", "model 'odd' cannot take images of 1 × 8 × 8: AssertionError"),
    ],
)
def test_a_model_that_could_not_train_or_be_saved_is_refused_before_the_first_step(amiss, words, monkeypatch):
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        ensure(odd(monkeypatch, amiss))
    assert len(str(caught.value).splitlines()) == 1
    assert not (Store().root / ".training").exists()


def test_a_model_that_returns_a_tuple_is_trained(monkeypatch):
    plain = ensure(odd(monkeypatch, ""), Store(Store().root / "plain")).history
    pd.testing.assert_frame_equal(
        ensure(odd(monkeypatch, "tuple")).history.drop(columns="seconds"), plain.drop(columns="seconds")
    )


def test_buffers_that_are_not_saved_are_those_of_the_training(monkeypatch):
    """They are drawn from the seed, as they were then."""
    drawn = []
    for seed in (0, 1):
        run = ensure(dataclasses.replace(odd(monkeypatch, ""), seed=seed))
        torch.manual_seed(123)
        model = run.load_model()
        accuracy = cb.train.evaluate(model, cb.data.load("digits")[1])["accuracy"]
        assert accuracy == pytest.approx(run.history["test_accuracy"].iloc[-1])
        drawn.append(model.drawn)
    assert not torch.equal(*drawn)


def test_a_buffer_that_training_changes_and_nobody_saves_is_named(monkeypatch):
    with pytest.warns(UserWarning, match="training changed 'drawn', a buffer that odd does not save"):
        ensure(odd(monkeypatch, "counts"))


@pytest.mark.parametrize("name", ["googlenet", "vit_b_16"])
def test_classifiers_of_torchvision_that_are_awkward(name):
    wanted = tiny(model=f"torchvision:{name}", resize=64, epochs=1)
    train, _ = wanted.load_data()
    model = wanted.build_model(train)
    if name == "googlenet":  # auxiliary heads would make it return a tuple in training
        assert isinstance(model.train()(torch.zeros(2, 3, 64, 64)), torch.Tensor)
    else:
        with pytest.raises(
            ValueError, match="cannot take images of 3 × 64 × 64: Wrong image height! Expected 224 but got 64"
        ):
            ensure(wanted)


class Noting(torch.nn.Module):
    """A classifier that notes, while it is trained, what is said to have been so."""

    noted: ClassVar[list] = []

    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.linear = torch.nn.Linear(in_channels * image_size**2, num_classes)

    def forward(self, x):
        if self.training:
            self.noted.append((torch.get_num_threads(), self.linear.weight.device.type))
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("changes", "threads", "expected"), [({}, None, 1), ({}, 2, 2), ({"resize": 16}, None, 3), ({"resize": 16}, 1, 1)]
)
def test_threads_are_those_that_trained(changes, threads, expected, monkeypatch):
    """One for tiny images, else as many as the process has; or what was asked for."""
    monkeypatch.setitem(cb.models.BUILDERS, "noting", Noting)
    monkeypatch.setattr(Noting, "noted", [])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run = ensure(tiny(model="noting", epochs=1, **changes), device="cpu", threads=threads)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(Noting.noted) == {(expected, "cpu")}
    assert run.environment["threads"] == expected
    assert run.environment["device_type"] == "cpu"


def test_trainings_on_200_000_images_in_all_are_compiled_where_nobody_says():
    train, _ = cb.data.load("digits")
    enough = -(-200_000 // len(train))
    for epochs, asked, expected in (
        (enough - 1, None, False), (enough, None, True), (enough, False, False), (1, True, True),
    ):  # fmt: skip
        how = cb.runs.how.Machine(compile=asked).suited(recipe("digits", epochs=epochs), train)
        assert how.compile is expected


def test_the_environment_says_what_ran_and_when(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/cram-bench", "train", "--dataset", "digits"])
    before = datetime.now().astimezone() - timedelta(seconds=1)  # times are noted in whole seconds
    run = ensure(tiny("sam", epochs=2), device="cpu")
    after = datetime.now().astimezone()
    facts = run.environment
    assert facts["command"] == "cram-bench train --dataset digits"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["platform"] == platform.platform()
    assert facts["device"].endswith(f", {os.cpu_count()} cores")
    started, finished = (datetime.fromisoformat(facts[name]) for name in ("started", "finished"))
    assert before <= started <= finished <= after
    assert facts["seconds"] == round(run.history["seconds"].sum(), 1)
    assert facts["compile"] is False
    shape = {name: facts["data"][name] for name in ("num_classes", "channels", "image_size", "train", "test")}
    assert shape == {"num_classes": 10, "channels": 1, "image_size": 8, "train": 1297, "test": 500}
    assert facts["data"]["fingerprint"] is None
    assert facts["sha256"].keys() == {"settings.json", "history.csv", "model.safetensors", "environment.json"}
    for name in ("settings.json", "history.csv", "model.safetensors"):
        assert facts["sha256"][name] == hashlib.sha256((run.path / name).read_bytes()).hexdigest()


def test_a_gpu_is_named_by_its_own_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU at {device}")
    assert runs.machine("cuda:1")["device"] == "GPU at cuda:1"
    assert runs.machine("cuda:1")["device_type"] == "cuda"


def test_commit_and_command_are_those_at_the_start(monkeypatch):
    """Whoever goes on working while a training runs does not change what it was trained by."""
    train = runs.training.fit

    def changed(*arguments, **options):
        history = train(*arguments, **options)
        monkeypatch.setattr("cram_bench.runs.environment.commit", lambda: "later")
        return history

    monkeypatch.setattr("cram_bench.runs.environment.commit", lambda: "earlier")
    monkeypatch.setattr("cram_bench.runs.training.fit", changed)
    assert ensure(tiny(epochs=1)).environment["commit"] == "earlier"


def repository(folder):
    """Make a repository with one file in one commit; return a function that calls git there."""

    def git(*command):
        identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        return subprocess.run(
            ["git", "-C", folder, *identity, *command], check=True, capture_output=True, text=True
        ).stdout

    folder.mkdir()
    git("init", "--quiet")
    (folder / "notes.txt").write_text("of their own")
    git("add", "notes.txt")
    git("commit", "--quiet", "--message", "notes")
    return git


@pytest.mark.skipif(shutil.which("git") is None, reason="git is needed")
def test_the_commit_is_that_of_this_packages_own_checkout(tmp_path, monkeypatch):
    git = repository(tmp_path / "theirs")
    package = tmp_path / "theirs" / "cram_bench"
    (package / "runs").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr("cram_bench.runs.environment.__file__", str(package / "runs" / "environment.py"))
    assert runs.commit() == "unknown"  # installed inside a repository that does not hold it
    git("add", "cram_bench")
    git("commit", "--quiet", "--message", "a copy in a project of their own")
    assert runs.commit() == "unknown"
    (tmp_path / "theirs" / "pyproject.toml").write_text('[project]\nname = "thesis"\n')
    assert runs.commit() == "unknown"
    (tmp_path / "theirs" / "pyproject.toml").write_text('[project]\nname = "cram-bench"\n')  # a checkout
    head = git("rev-parse", "HEAD")[:12]
    assert runs.commit() == head
    repository(tmp_path / "another")
    with monkeypatch.context() as patch:  # as a hook of git sets it
        patch.setenv("GIT_DIR", str(tmp_path / "another" / ".git"))
        assert runs.commit() == head
    (tmp_path / "theirs" / "notes.txt").write_text("changed")  # which is no code of this package
    assert runs.commit() == head
    (package / "__init__.py").write_text("changed = True")
    assert runs.commit() == f"{head}+changes"
    shutil.rmtree(tmp_path / "theirs" / ".git")
    assert runs.commit() == "unknown"


def test_the_seconds_of_a_resumed_training_are_those_of_all_its_epochs(monkeypatch):
    write = runs.Checkpoint.on_epoch

    def slow(self, fit):
        fit.history[-1]["seconds"] += 1000
        write(self, fit)
        if fit.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "on_epoch", slow)
        with pytest.raises(KeyboardInterrupt):
            ensure(tiny(epochs=2))
    run = ensure(tiny(epochs=2))
    assert run.history["seconds"].tolist()[0] > 1000 > run.history["seconds"].tolist()[1]
    assert 1000 < run.environment["seconds"] == round(run.history["seconds"].sum(), 1)


def test_every_row_of_a_summary_is_its_own_runs():
    """In whatever order the runs come, and the result is that of the last epoch, not of the best."""
    wanted = [tiny(method, seed=seed, epochs=epochs) for method, seed, epochs in
              (("sam", 3, 1), ("sgd", 1, 2), ("sgd", 0, 1), ("sam", 0, 2))]  # fmt: skip
    failed = tiny(seed=2, epochs=1, lr=1e30)
    listed = ensure_all([wanted[0], failed, *wanted[1:]])
    falling = listed[2]  # its first epoch becomes its best
    history = falling.history
    history["test_accuracy"] = [0.875, 0.25]
    (falling.path / "history.csv").write_text(history.to_csv(index=False))
    facts = falling.environment
    facts["sha256"]["history.csv"] = hashlib.sha256((falling.path / "history.csv").read_bytes()).hexdigest()
    (falling.path / "environment.json").write_text(sealed(facts, "environment.json"))
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
        given = [listed[place] for place in order]
        rows = runs.summary(given).to_dict("records")
        assert len(rows) == 5
        for row, run in zip(rows, given, strict=True):
            own = (run.id, run.experiment.method, run.experiment.seed, run.experiment.epochs)
            assert tuple(row[name] for name in ("run", "method", "seed", "epochs")) == own
            if run.failure:
                assert row["state"] == f"failed: {run.failure}"
                assert pd.isna(row["dense_accuracy"])
                assert pd.isna(row["seconds"])
            else:
                assert row["state"] == "finished"
                assert row["dense_accuracy"] == run.history["test_accuracy"].iloc[-1]
                for name in ("seconds", "device", "threads", "compile", "commit", "finished"):
                    assert row[name] == run.environment[name]
    table = Store().table().set_index("run")
    assert table.loc[falling.id, "accuracy"] == 0.25
    for run in listed:
        assert table.loc[run.id, "seed"] == run.experiment.seed
        assert table.loc[run.id, "method"] == run.experiment.method
        assert table.loc[run.id, "epochs"] == run.experiment.epochs
    assert runs.summary([falling])["dense_accuracy"].tolist() == [0.25]


def test_a_run_that_lost_its_weights_is_named(tmp_path):
    """In every list, where it is asked for by its id, and where it is trained again."""
    kept, bare = ensure(tiny(epochs=1)), ensure(tiny(epochs=1, seed=1))
    weights = (bare.path / "model.safetensors").read_bytes()
    (bare.path / "model.safetensors").unlink()
    words = rf"{bare.path} has lost its model.safetensors"
    remedy = "; put that file back, or train it again"
    with pytest.warns(UserWarning, match=f"left out: {words}{remedy}$") as caught:
        assert Store().runs() == [kept]
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=f"left out: {words}"):
        assert Store().table()["run"].tolist() == [kept.id]
    beside = Store(tmp_path / "own", also=[Store().root])
    for store in (Store(), beside):
        with pytest.raises(RunError, match=f"{words}{remedy}$"):
            store.finished(bare.id)
    assert Store(tmp_path / "empty", also=[Store().root]).finished(kept.id) == kept
    with pytest.warns(UserWarning, match=f"{words} and is trained again$"):
        again = ensure(tiny(epochs=1, seed=1), beside)
    assert again.path == tmp_path / "own" / bare.id
    assert beside.finished(bare.id) == again
    with pytest.warns(UserWarning, match=f"{words} and is trained again$"):
        assert ensure(tiny(epochs=1, seed=1)) == bare
    assert (bare.path / "model.safetensors").read_bytes() == weights
    (Store().root / "notes").mkdir()  # which is no run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {run.id for run in Store().runs()} == {kept.id, bare.id}
        assert Store(tmp_path / "nowhere").runs() == []


def test_ones_own_run_comes_before_one_beside_a_report(tmp_path):
    first, second, own = (Store(tmp_path / name) for name in ("first", "second", "own"))
    for store in (first, second, own):
        ensure(tiny(epochs=1), store)
    every = Store(own.root, also=[first.root, second.root])
    assert [run.path.parent for run in every.runs()] == [own.root]
    assert every.find(tiny(epochs=1)).path.parent == every.finished(tiny(epochs=1).id).path.parent == own.root
    shutil.rmtree(own.root)
    assert [run.path.parent for run in every.runs()] == [first.root]
    assert every.find(tiny(epochs=1)).path.parent == every.finished(tiny(epochs=1).id).path.parent == first.root


def test_a_start_brings_the_statistics_of_batchnorm_too(monkeypatch):
    source = ensure(tiny(epochs=2))
    started = []

    def stopped(model, *arguments, **options):
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr("cram_bench.runs.training.fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        ensure(tiny(epochs=1, start=source.id))
    theirs = source.load_model().state_dict()
    assert started[0].keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(started[0][name], value), name


def test_the_head_is_fresh_for_other_data_and_kept_for_other_sizes(tmp_path):
    """Other images may have as many classes; the same images in another size have the same."""
    for split in ("train", "test"):
        for name in map(str, range(10)):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for index in range(2):
                image = Image.new("RGB", (16, 16), (int(name) * 9, 100, index))
                image.save(tmp_path / "set" / split / name / f"{index}.png")
    source = ensure(tiny(epochs=1, resize=16))
    still = {"model": "convnet", "epochs": 1, "lr": 1e-30, "weight_decay": 0.0, "start": source.id}
    other = ensure(recipe(tmp_path / "set", batch_size=4, precision="float32", resize=16, **still))
    larger = ensure(recipe("digits", resize=24, **still))
    weight = source.load_model().linear.weight
    torch.testing.assert_close(larger.load_model().linear.weight, weight, rtol=0, atol=1e-20)
    fresh = other.experiment.build_model(other.experiment.load_data()[0]).linear.weight
    torch.testing.assert_close(other.load_model().linear.weight, fresh, rtol=0, atol=1e-20)
    assert not torch.equal(weight, fresh)


@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("meta", torch.float64)]
)
def test_a_run_is_the_same_under_any_defaults_of_torch(device, dtype, tmp_path):
    """What an experiment says decides its weights, not what the caller's notebook has set before."""
    usual = ensure(tiny("cram+-multi", epochs=1), Store(tmp_path / "usual"))
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        other = ensure(tiny("cram+-multi", epochs=1), Store(tmp_path / "other"), device="cpu")
        loaded = other.load_model()
        train, _ = other.experiment.load_data()
        begun = other.experiment.build_model(train)
        assert torch.get_default_dtype() is dtype
        assert torch.get_default_device().type == device
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert (other.path / "model.safetensors").read_bytes() == (usual.path / "model.safetensors").read_bytes()
    pd.testing.assert_frame_equal(other.history.drop(columns="seconds"), usual.history.drop(columns="seconds"))
    for one, plain in ((loaded, usual.load_model()), (begun, usual.experiment.build_model(train))):
        for ours, theirs in zip(one.state_dict().values(), plain.state_dict().values(), strict=True):
            assert ours.dtype is theirs.dtype
            assert torch.equal(ours, theirs)
