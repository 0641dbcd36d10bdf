"""Trainings of one cost, and what an accuracy costs: alone, and with those of all other sparsities."""

import pandas as pd
import pytest

import cram_bench as cb
from cram_bench import probes
from cram_bench.recipes import aim, prices, recipe
from cram_bench.runs import Run, Store, ensure_all


def test_trainings_of_one_cost():
    found = prices("digits", ["sgd", "cram+-multi", "gmp*", "safe"], [0, 3], [0.9, 0.98], ["gmp*"], epochs=15)
    rows = [(e.method, e.seed, aim(e), e.loss.kind, e.epochs, round(e.gradients)) for e in found]
    plain = "cross-entropy"
    assert rows == [
        ("sgd", 0, 0.0, plain, 30, 30), ("sgd", 3, 0.0, plain, 30, 30),
        ("cram+-multi", 0, 0.0, plain, 15, 30), ("cram+-multi", 3, 0.0, plain, 15, 30),
        *[("gmp*", seed, level, plain, 30, 30) for seed in (0, 3) for level in (0.9, 0.98)],
        *[("safe", seed, level, plain, 15, 30) for seed in (0, 3) for level in (0.9, 0.98)],
        *[("gmp*", seed, level, "distil", 22, 29) for seed in (0, 3) for level in (0.9, 0.98)],
    ]  # fmt: skip
    assert len({e.id for e in found}) == len(found)
    by_id = {e.id: e for e in found}
    for e in found[-4:]:
        assert (by_id[e.loss.teacher].method, by_id[e.loss.teacher].seed) == ("sgd", e.seed)
    assert all(e.schedule.warmup_epochs == pytest.approx(e.epochs / 40) for e in found)
    half_more = prices("digits", ["sgd", "gmp*"], 1, [0.9], ["gmp*"], epochs=17)  # 34 gradients are 25.5 epochs of 4/3
    assert [e.epochs for e in half_more] == [34, 34, 26]
    fewer = prices("digits", ["sgd", "gmp*"], [0, 3], [0.9, 0.98], ["gmp*"], epochs=15, repeated=[0.98])
    aims = [("sgd", 0, 0), ("sgd", 3, 0), *[("gmp*", 0, 0.9), ("gmp*", 0, 0.98), ("gmp*", 3, 0.98)] * 2]
    assert [(e.method, e.seed, aim(e)) for e in fewer] == aims
    assert {e.data.holdout for e in prices("digits", ["sgd", "gmp*"], 1, [0.9], ["gmp*"], holdout=300)} == {300}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["gmp*", "sgd"], 1, [0.9], ["gmp*"]), "the first method teaches, and 'gmp\\*' aims at one sparsity"),
        ((["sgd"], 1, [0.9], ["gmp*"]), "unknown method to distil 'gmp\\*'"),
        ((["sgd"], 1, [], []), "sparsities must be a list of numbers"),
        ((["sgd"], 1, [1.5], []), "sparsity must be in"),
        ((["sgd"], 1, [0.9], [], "", 0, [0.8]), "unknown sparsity to repeat 0.8"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        prices("digits", *arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_what_every_accuracy_is_and_costs(tmp_path):
    """Against direct calls and costs by hand: 2 epochs of two gradients, 4 of one; with a teacher 3 of 4/3."""
    experiments = prices("digits", ["sgd", "cram+-multi", "gmp*"], 1, [0.8, 0.95], ["gmp*"], epochs=2)
    runs = ensure_all(experiments, Store(tmp_path), progress=False)
    train, test = experiments[0].load_data()
    tuning = train.calibration(300)
    table = probes.prices(runs, test, [0.8, 0.95], tuning, train, ["global", "obd(gradients=16)"])
    looks = 16 * 8 / len(train)
    costs = {
        "sgd": (4, 0, 4, 4), "sgd, obd": (4, looks, 4 + looks, 4 + looks),
        "cram+-multi": (4, 0, 4, 4), "cram+-multi, obd": (4, looks, 4 + looks, 4 + looks),
        "gmp*": (4, 0, 4, 8), "gmp*, distilled": (4, 4, 8, 12),
    }  # fmt: skip
    assert list(dict.fromkeys(table["method"])) == list(costs)
    for method, expected in costs.items():
        own = table[table["method"] == method]
        assert own["sparsity"].tolist() == [0.8, 0.95]
        for row in own[["own", "shared", "one", "curve"]].to_numpy():
            assert row.tolist() == pytest.approx(expected)
    for run, (method, level) in zip(
        runs[2:], [(m, s) for m in ("gmp*", "gmp*, distilled") for s in (0.8, 0.95)], strict=True
    ):
        shown = table[(table["method"] == method) & (table["sparsity"] == level)]["accuracy"].item()
        assert shown == pytest.approx(run.history["test_accuracy"].iloc[-1])
        assert cb.compress.sparsity(run.load_model()) == pytest.approx(level, abs=1e-4)
    for run, method in zip(runs[:2], ("sgd", "cram+-multi"), strict=True):
        for pruner, name in (("global", method), ("obd(gradients=16)", f"{method}, obd")):
            model = run.load_model()
            cb.prune.apply_(model, f"{pruner}@0.95", train)
            cb.compress.tune_batchnorm(model, tuning)
            shown = table[(table["method"] == name) & (table["sparsity"] == 0.95)]["accuracy"].item()
            assert shown == pytest.approx(cb.train.evaluate(model, test)["accuracy"])
    shown = probes.price_table(table).set_index("method")
    assert list(shown) == ["80 %", "95 %", "one sparsity", "whole curve"]
    assert shown.loc["GMP*, distilled", ["one sparsity", "whole curve"]].tolist() == ["8.0", "12.0"]
    assert shown.loc["GMP*", "95 %"] == f"{100 * runs[3].history['test_accuracy'].iloc[-1]:.1f}"


def test_the_table_of_prices_by_hand():
    """Columns by sparsity, whatever the order of the rows; ± one standard deviation of seeds, both in per cent."""
    rows = [("gmp*", 0, 0.98, 0.5, 30.0, 60.0), ("gmp*", 0, 0.9, 0.7, 30.0, 60.0), ("gmp*", 1, 0.9, 0.8, 30.0, 60.0),
            ("cram+-multi", 0, 0.9, 0.6, 40.0, 40.0)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "seed", "sparsity", "accuracy", "one", "curve"])
    shown = probes.price_table(table).set_index("method")
    assert list(shown) == ["90 %", "98 %", "one sparsity", "whole curve"]
    assert shown.loc["GMP*"].tolist() == ["75.0 ± 7.1", "50.0", "30.0", "60.0"]
    assert shown.loc["CrAM+-Multi"].tolist() == ["60.0", "", "40.0", "40.0"]


def test_a_teacher_that_is_no_run_of_these_costs_its_passes_alone(tmp_path):
    """A classifier of a hub: nobody trained it here."""
    taught = recipe("sst2", "gmp*", epochs=6, loss="distil", teacher="hub:somebody/something")
    table = probes.prices([Run(tmp_path, taught, failure="it diverged")], None, [0.8, 0.9], [], None)
    (row,) = table.to_dict("records")
    assert (row["method"], row["sparsity"]) == ("gmp*, distilled", 0.9)
    assert [row[name] for name in ("own", "shared", "one", "curve")] == pytest.approx([8.0, 0.0, 8.0, 16.0])


def test_prices_are_of_a_list_of_runs():
    with pytest.raises(TypeError, match="^runs must be a list of runs"):
        probes.prices(3, None, [0.9], [], None)


def test_a_failed_run_is_a_row_without_a_number(tmp_path):
    test = recipe("digits").load_data()[1]
    failed = [Run(tmp_path, recipe("digits", name), failure="it diverged") for name in ("sgd", "gmp*")]
    table = probes.prices(failed, test, [0.9], [], test, ["global"])
    assert table["accuracy"].isna().all()
    assert table["method"].tolist() == ["sgd", "gmp*"]
    assert table["sparsity"].tolist() == [0.9, 0.9]
    assert probes.price_table(table)["90 %"].tolist() == ["failed", "failed"]
    assert isinstance(table, pd.DataFrame)
