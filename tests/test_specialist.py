import pandas as pd
import pytest
import torch

import cram_bench as cb


@pytest.fixture(scope="module")
def world():
    train, test = cb.data.load("digits")
    torch.manual_seed(0)
    model = cb.models.create("convnet", 10, 1, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cb.train.fit(model, optimizer, train, epochs=2, batch_size=128)
    return model, train, test


def test_of_classes_keeps_order_labels_and_names(world):
    _, train, _ = world
    some = train.of_classes(["8", "3"])
    assert some.classes == train.classes
    assert some.labels.tolist() == [label for label in train.labels.tolist() if label in (3, 8)]
    assert torch.equal(some.images, train.images[(train.labels == 3) | (train.labels == 8)])


@pytest.mark.parametrize(("classes", "words"), [(["eight"], "'eight'"), ([], "empty")])
def test_of_classes_refuses_in_one_line(classes, words, world):
    with pytest.raises(ValueError, match=words):
        world[1].of_classes(classes)


def test_a_crossing_is_every_pair_of_sources_and_the_model_stays(world):
    model, train, test = world
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = cb.probes.specialist(
        model, train, test, ["3", "8"], ["global@0.5", "exactobs(samples=64)@0.5"], samples=64, draws=2,
        corrections=["none", "batchnorm", "statistics"],
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    looks = table[table["pattern"] == "exactobs(samples=64)"]
    assert looks.groupby(["draw", "looked", "corrected", "correction"]).size().eq(1).all()
    assert len(looks) == 2 * 2 * (1 + 2 + 2)
    blind = table[table["pattern"] == "global"]
    assert set(blind["looked"]) == {""}
    assert len(blind) == 2 * (1 + 2 + 2)
    assert (table["task_accuracy"] >= table["accuracy"]).all()  # two classes are easier than ten
    dense = table[table["pattern"] == "dense"].iloc[0]
    own = test.of_classes(["3", "8"])
    assert dense["accuracy"] == pytest.approx(cb.train.evaluate(model, own)["accuracy"])
    with torch.no_grad():
        (inputs, labels), *_ = own.batches(len(own))
        logits = model.eval()(inputs)
        chosen = torch.tensor([3, 8])[logits[:, [3, 8]].argmax(1)]
    assert dense["task_accuracy"] == pytest.approx(float((chosen == labels).float().mean()))


def test_what_is_quantized_has_its_control_too(world):
    model, train, test = world
    table = cb.probes.specialist(
        model, train, test, ["3", "8"], ["exactobs(samples=64)@0.5+int8", "global@0.5+int8"], samples=64, draws=1
    )
    assert set(table.loc[table["pattern"] == "exactobs(samples=64)+int8", "looked"]) == {"task", "random"}
    assert set(table.loc[table["pattern"] == "global+int8", "looked"]) == {""}


def test_the_correction_is_taken_from_the_source_that_is_named(world):
    model, train, test = world
    options = {"samples": 32, "draws": 1, "corrections": ["batchnorm"]}
    table = cb.probes.specialist(model, train, test, ["3"], ["global@0.8"], **options)
    with cb.compress.applied(model, "global@0.8"):
        for source, data in (("task", train.of_classes(["3"])), ("random", train)):
            cb.compress.tune_batchnorm(model, list(data.sample(32, seed=0).batches(32)))
            found = cb.train.evaluate(model, test.of_classes(["3"]))["accuracy"]
            assert table.loc[table["corrected"] == source, "accuracy"].iloc[0] == pytest.approx(found)


def test_the_interval_is_students(world):
    rows = pd.DataFrame(
        {"pattern": "p", "sparsity": 0.9, "looked": "task", "corrected": "task", "correction": "statistics",
         "accuracy": [0.5, 0.6, 0.7]}
    )  # fmt: skip
    assert cb.probes.specialist_table(rows)["90 %"].tolist() == ["60.0 ± 24.8"]  # 4.303 · 10 / √3


def test_every_draw_takes_other_examples(world):
    model, train, test = world
    options = {"samples": 32, "draws": 2, "corrections": ["batchnorm"]}
    table = cb.probes.specialist(model, train, test, ["3", "8"], ["global@0.8"], **options)
    for source in ("task", "random"):
        first, second = table.loc[table["corrected"] == source, "loss"]
        assert first != second


def test_the_figure_has_every_draw_its_mean_and_the_dense_model():
    names = ["pattern", "sparsity", "draw", "looked", "corrected", "correction", "accuracy", "task_accuracy"]
    rows = [
        ("dense", 0.0, 0, None, None, "none", 0.9, 0.95),
        ("global", 0.8, 0, None, "task", "statistics", 0.5, 0.6),
        ("global", 0.8, 1, None, "task", "statistics", 0.7, 0.8),
        ("obs", 0.8, 0, "random", None, "none", 0.4, 0.45),
        ("obs", 0.9, 0, "random", None, "none", 0.3, 0.35),
    ]
    figure = cb.plots.specialist(pd.DataFrame(rows, columns=names))
    left, right = figure.axes
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["80 % zeros", "90 % zeros"]
    shown = ["global; statistics on task", "obs, looked at random; none"]
    assert [text.get_text() for text in left.get_yticklabels()] == shown

    def drawn(axis):
        return {tuple(round(float(x), 3) for x in line.get_xdata()) for line in axis.lines if len(line.get_xdata())}

    means = {(0.6,) * 2, (0.7,) * 2, (0.4,) * 2, (0.45,) * 2}
    dense = {(0.9,) * 2, (0.95,) * 2}
    assert {line for line in drawn(left) if line[0] == line[0]} == {
        (0.5, 0.7),
        (0.6, 0.8),
        (0.4,),
        (0.45,),
    } | means | dense
    assert {line for line in drawn(right) if line[0] == line[0]} == {(0.3,), (0.35,), (0.3,) * 2, (0.35,) * 2} | dense
    below = {
        round(float(line.get_ydata()[0]), 2)
        for line in left.lines
        if line.get_marker() == "s" and len(line.get_xdata())
    }
    assert below == {0.12, 1.12}  # among the target classes
    figure.draw_without_rendering()
