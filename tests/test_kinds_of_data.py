"""What every kind of data answers, whoever asks: images in memory, streamed folders and sentences."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

import cram_bench as cb
from cram_bench.data import Dataset, Images, Sentences, Streamed
from cram_bench.runs import Machine

LABELS = [0, 1, 0, 1, 1, 0, 1]
KINDS = ("images", "streamed", "sentences")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for split in ("train", "test"):
        for label, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for number in range(LABELS.count(label)):
                pixels = np.full((40 + number, 50, 3), 20 * number + 100 * label, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    pixels = torch.arange(7).repeat_interleave(2 * 8 * 9).reshape(7, 2, 8, 9).to(torch.uint8)
    ids = torch.tensor([[place + 1] * (1 + place % 4) + [0] * (3 - place % 4) for place in range(7)])
    labels = torch.tensor(LABELS)
    return {
        "images": Images("made", pixels, labels, ("no", "yes"), torch.zeros(2), torch.ones(2)),
        "streamed": cb.data.load(root, crop=32, workers=0)[0],
        "sentences": Sentences("made", ids, labels, ("no", "yes")),
    }


@pytest.fixture(params=KINDS)
def data(request, kinds):
    return kinds[request.param]


def test_every_kind_says_what_it_holds(kinds):
    images, streamed, sentences = (kinds[name] for name in KINDS)
    assert repr(images) == "Images('made', 7 images of 2 × 8 × 9, 2 classes)"
    assert repr(streamed) == f"Streamed({streamed.name!r}, 7 images in crops of 3 × 32 × 32, 2 classes)"
    assert repr(sentences) == "Sentences('made', 7 sentences of up to 4 tokens, 2 classes)"
    assert [(k.channels, k.image_size, k.noun) for k in kinds.values()] == [
        (2, 8, "images"), (3, 32, "images"), (1, 4, "sentences")
    ]  # fmt: skip
    assert images.preparation == (
        "images normalised by mean 0.000, 0.000 and std 1.000, 1.000, those of the training images"
    )
    assert streamed.preparation == "images normalised by mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225"
    assert sentences.preparation == "sentences as ids of the model's tokenizer, padded with 0"


def test_a_network_is_tried_on_what_it_will_be_given(data):
    inputs, _ = next(data.batches(2))
    assert data.trial.dtype == inputs.dtype
    assert data.trial.shape[:2] == (2, *inputs.shape[1:2]) or isinstance(data, Sentences)  # which are cut in a batch
    assert data.trial.ndim == inputs.ndim


def test_a_part_is_of_the_same_kind_and_has_its_own_examples(data):
    rest, held = data.split(3)
    taken = data.take([4, 0])
    moved = data.to("cpu")
    assert type(rest) is type(held) is type(taken) is type(moved) is type(data)
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == sorted(data.labels.tolist())
    assert taken.labels.tolist() == data.labels[[4, 0]].tolist()
    whole = {tuple(row.flatten().tolist()): label for row, label in rows(data)}
    assert [whole[tuple(row.flatten().tolist())] for row, _ in rows(taken)] == taken.labels.tolist()
    assert len(data.take([])) == 0
    assert not list(data.take([]).batches(2))


def rows(data):
    """Examples one by one: padding of a batch then depends on none beside it."""
    return [(inputs[0], int(labels)) for inputs, labels in data.batches(1)]


def test_batches_are_the_data_once_and_are_shared_out(data):
    for options in ({}, {"seed": 1}, {"seed": 1, "augment": True, "channels_last": True}):
        whole = list(data.batches(4, **options))
        shares = [list(data.batches(4, **options, share=(rank, 2))) for rank in (0, 1)]
        for (inputs, labels), *parts in zip(whole, *shares, strict=True):
            for rank, (part, part_labels) in enumerate(parts):
                assert torch.equal(part, inputs[rank::2])
                assert torch.equal(part_labels, labels[rank::2])
        assert sorted(torch.cat([labels for _, labels in whole]).tolist()) == sorted(LABELS)
    assert [len(labels) for _, labels in data.batches(4, seed=2, drop_last=True)] == [4]


def test_what_is_asked_wrongly_is_refused_in_the_words_of_the_kind(data):
    with pytest.raises(ValueError, match=f"batch_size 8 is larger than the data, 7 {data.noun}"):
        next(data.batches(8, drop_last=True))
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        next(data.batches(0))
    with pytest.raises(ValueError, match=f"cannot hold out 7 of 7 {data.noun}"):
        data.split(7)
    with pytest.raises(ValueError, match=f"{data.noun} of a sample must be at least 1, not 0"):
        data.sample(0)
    if not isinstance(data, Images):
        with pytest.raises(ValueError, match=r"resize|crop"):
            data.resized(16)


def test_only_images_in_memory_are_compiled_for_and_shown(kinds):
    images, streamed, sentences = (kinds[name] for name in KINDS)
    assert [kind.steady for kind in kinds.values()] == [True, False, False]
    assert [kind.tiny for kind in kinds.values()] == [True, False, False]
    assert not Images("large", torch.zeros(1, 1, 17, 16), torch.zeros(1), ("no",), *[torch.zeros(1)] * 2).tiny
    assert torch.equal(images.pictures([3, 1]), images.images[[3, 1]])
    assert streamed.pictures([0]) is sentences.pictures([0]) is None
    assert streamed.sample(3).pictures([0]).shape == (1, 3, 32, 32)  # a sample is in memory
    long = cb.recipes.recipe("digits", epochs=10**5)
    assert [Machine().suited(long, kind).compile for kind in kinds.values()] == [True, False, False]
    assert [Machine().suited(long, kind).threads for kind in kinds.values()] == [1, None, None]


@pytest.mark.parametrize(("kind", "counts", "batches"), [("images", 2000, 500), ("streamed", 1000, 125)])
def test_batchnorm_is_tuned_by_default_on_so_many(kind, counts, batches, kinds):
    assert kinds[kind].calibrates == (counts, batches)
    assert [len(labels) for _, labels in kinds[kind].calibration()] == [7]
    assert [len(labels) for _, labels in kinds[kind].calibration(6, batch_size=4)] == [3, 3]


def test_a_kind_of_data_answers_everything_that_is_asked():
    """What a kind adds beside its fields and its constructor's is answered by all: nobody asks which kind it has."""
    asked = {name for name in vars(Dataset) if not name.startswith("_")}
    for kind in (Images, Streamed, Sentences):
        assert not inspect.isabstract(kind)
        fields = set(kind.__dataclass_fields__)
        own = {name for name in vars(kind) if not name.startswith("_")} - fields - asked
        assert own <= {"normalise"}, kind
