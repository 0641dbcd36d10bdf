import pandas as pd
import pytest
import torch

import cram_bench as cb
from cram_bench.probes import chosen_against, chosen_by_loss, pruner_table, pruners


@pytest.fixture(scope="module")
def world():
    train, test = cb.data.load("digits")
    torch.manual_seed(0)
    model = cb.models.create("convnet", 10, 1, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cb.train.fit(model, optimizer, train, epochs=2, batch_size=128)
    looked_at, unseen = train.split(300, seed=1)
    return model, looked_at, unseen, test


def test_rows_are_what_the_parts_give(world):
    model, looked_at, unseen, test = world
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = looked_at.calibration(500)
    specs = ["global@0.9", "greedy(gradients=16)@0.9", "greedy(gradients=16)@0.5"]
    table = pruners(model, test, specs, calibration, looked_at, unseen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert table["pattern"].tolist() == ["dense"] + ["global"] * 3 + ["greedy(gradients=16)"] * 6
    assert table["gradients"].tolist() == [0] * 4 + [128] * 6
    assert table.loc[0, "accuracy"] == pytest.approx(cb.train.evaluate(model, test)["accuracy"])
    reference = cb.compress.layer_statistics(model, calibration)
    fitted = cb.prune.Greedy(gradients=16).fit(model, looked_at)
    for correction in ("none", "batchnorm", "statistics"):
        with cb.compress.applied(model, fitted.at(0.9)):
            if correction == "batchnorm":
                cb.compress.tune_batchnorm(model, calibration)
            if correction == "statistics":
                cb.compress.correct_statistics(model, reference, calibration)
            row = table[(table["pattern"] == "greedy(gradients=16)") & (table["sparsity"] == 0.9)]
            row = row[row["correction"] == correction].iloc[0]
            for data, prefix in ((test, ""), (unseen, "held_out_")):
                found = cb.train.evaluate(model, data)
                assert row[f"{prefix}accuracy"] == pytest.approx(found["accuracy"])
                assert row[f"{prefix}loss"] == pytest.approx(found["loss"], rel=1e-4)


def test_what_is_quantized_costs_what_its_pruner_looked_at(world):
    model, looked_at, _, test = world
    specs = ["greedy(gradients=16)@0.9+int8", "global@0.9+int8"]
    table = pruners(model, test, specs, looked_at, corrections=["none"])
    assert table["gradients"].tolist() == [0, 128, 0]
    curve = cb.probes.sparsity_curve(model, test, specs, calibration=looked_at)
    assert curve.groupby("pattern")["gradients"].first()["greedy(gradients=16)+int8"] == 128


def test_an_unknown_correction_is_one_line(world):
    model, looked_at, _, test = world
    with pytest.raises(ValueError, match=r"unknown correction 'batchnrom'.*batchnorm"):
        pruners(model, test, ["global@0.9"], looked_at, corrections=["batchnrom"])


def rows(**changes):
    both = {"method": "sgd", "seed": 0, "sparsity": 0.9, "correction": "batchnorm"}
    return [both | changes]


def test_it_chooses_by_held_out_loss_never_by_test_accuracy():
    table = pd.DataFrame(
        rows(pattern="global", accuracy=0.9, held_out_loss=0.5)
        + rows(pattern="greedy", accuracy=0.6, held_out_loss=0.4)
        + rows(pattern="greedy", accuracy=0.99, held_out_loss=0.6, correction="none")
        + rows(pattern="greedy", accuracy=0.2, held_out_loss=0.1, seed=1)
        + rows(pattern="global", accuracy=0.3, held_out_loss=0.2, seed=1)
        + rows(pattern="dense", accuracy=1.0, held_out_loss=0.0, sparsity=0.0)
    )
    chosen = chosen_by_loss(table)
    assert chosen["chosen"].tolist() == ["greedy, batchnorm"] * 2
    assert chosen["accuracy"].tolist() == [0.6, 0.2]
    assert chosen_by_loss(table, ["global"])["accuracy"].tolist() == [0.9, 0.3]
    tested = table.assign(loss=1 - table["held_out_loss"], held_out_accuracy=1 - table["held_out_loss"])
    pd.testing.assert_frame_equal(chosen_by_loss(tested)[list(chosen)], chosen)  # nor by the loss on the test set
    untuned = pd.DataFrame(rows(pattern="global", accuracy=0.01, held_out_loss=9.0, correction="none"))
    against = chosen_against(pd.concat([table, untuned], ignore_index=True)).iloc[0]
    assert against[["accuracy", "global, batchnorm", "points", "seeds"]].tolist() == [40, 60, -20, 2]
    assert against["chosen"] == "greedy, batchnorm (2)"


def test_the_table_says_which_correction():
    table = pd.DataFrame(
        rows(pattern="global", accuracy=0.5, held_out_loss=0.5)
        + rows(pattern="global", accuracy=0.7, held_out_loss=0.3, seed=1)
        + rows(pattern="global", accuracy=0.9, held_out_loss=0.9, correction="none")
    )
    assert pruner_table(table).to_numpy().tolist() == [["SGD", "global", "60.0 ± 14.1 b"]]
    assert pruner_table(table, "none").to_numpy().tolist() == [["SGD", "global", "90.0"]]


@pytest.mark.parametrize("by", ["method", "correction"])
def test_every_row_of_the_figure_has_its_mean(by):
    table = pd.DataFrame(
        rows(pattern="global", accuracy=0.5)
        + rows(pattern="global", accuracy=0.7, seed=1)
        + rows(pattern="greedy", accuracy=0.8, correction="none")
        + rows(pattern="greedy", accuracy=0.9, sparsity=0.95, correction="none")
    )
    figure = cb.plots.pruners(table, by)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["90 % zeros", "95 % zeros"]
    shown = [x for line in figure.axes[0].lines for x in line.get_xdata() if x == x]
    assert {round(float(x), 3) for x in shown} >= {0.6, 0.8}
    figure.draw_without_rendering()
