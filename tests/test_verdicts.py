"""Verdicts on stability: the test by hand, and models that cannot be compared."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t as student

import cram_bench as cb
from cram_bench.probes.stability import LOSS_FACTOR, LOSS_NATS, QUANTITIES, _holm


def welch(one, other):
    """By hand: t = Δ/√(s₁²/n + s₂²/m), Welch's degrees of freedom, both sides."""
    parts = [side.var(ddof=1) / len(side) for side in (one, other)]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (one, other), strict=True))
    return 2 * student.sf(abs(one.mean() - other.mean()) / sum(parts) ** 0.5, freedom)


def rows(**values):
    """Return a table of method → values of every quantity, a seed each, at dense weights and at one loss."""
    tables = [
        pd.DataFrame({"seed": range(len(next(iter(own.values())))), **own}).assign(method=method)
        for method, own in values.items()
    ]
    return pd.concat(tables, ignore_index=True).assign(weights="dense", loss=0.2)


def test_they_claim_nothing_without_a_spread():
    table = rows(a={"trace": [1.0, 1.2]}, b={"trace": [1.1, 1.3]}, c={"trace": [0.1]})
    assert cb.probes.verdicts(table, "a", "b", ["trace"])["verdict"].tolist() == ["undecided"]
    assert cb.probes.verdicts(table, "c", "b", ["trace"])["verdict"].tolist() == ["undecided"]  # one seed
    worse = table.assign(trace=table["trace"] + 50 * (table["method"] == "a"))
    assert cb.probes.verdicts(worse, "a", "b", ["trace"])["verdict"].tolist() == ["contradicts"]
    flat = cb.probes.verdicts(rows(a={"trace": [0.0, 1.0, 2.0]}, b={"trace": [7.0, 8.0, 9.0]}), "a", "b", ["trace"])
    assert flat[["scale", "verdict"]].to_numpy().tolist() == [["raw", "supports"]]  # a 0 has no logarithm
    assert cb.probes.verdicts(worse, [], "b", ["trace"]).empty
    assert cb.probes.verdict_table(cb.probes.verdicts(worse, [], "b", ["trace"])).empty


def test_they_are_welchs_test_on_logarithms_after_holms_correction_for_every_method_by_itself():
    values = {
        "a": {"gap": [1.0, 1.1, 1.2], "trace": [5.0, 6.0, 9.0], "sharpness": [0.1, 0.2, 0.15]},
        "b": {"gap": [2.0, 2.2, 2.1], "trace": [5.0, 7.0, 8.0], "sharpness": [-0.1, -0.3, -0.25]},
        "c": {"gap": [1.0, 1.3, 1.2], "trace": [1.0, 1.1, 1.2], "sharpness": [0.4, 0.5, 0.45]},
        "d": {"gap": [np.nan], "trace": [np.nan], "sharpness": [np.nan]},
    }
    quantities = ["gap", "trace", "sharpness"]
    found = cb.probes.verdicts(rows(**values), ["b", "c", "d"], "a", quantities)
    assert set(found["method"]) == {"b", "c"}  # of d there is nothing
    for method in ("b", "c"):
        own = found[found["method"] == method].set_index("quantity")
        logs, raw = [], []
        for quantity in quantities:
            one, other = (np.array(values[name][quantity]) for name in (method, "a"))
            raw.append(welch(one, other))
            positive = min(one.min(), other.min()) > 0
            assert own.loc[quantity, "scale"] == ("log" if positive else "raw")
            logs.append(welch(np.log(one), np.log(other)) if positive else raw[-1])
        for column, plain in (("p", logs), ("raw_p", raw)):
            order = np.argsort(plain)  # the smallest three times, the next twice, and none below one before it
            expected = np.maximum.accumulate(np.array(plain)[order] * [3, 2, 1]).clip(max=1)
            assert own[column].to_numpy()[order] == pytest.approx(expected)
        assert own["seeds"].tolist() == own["baseline_seeds"].tolist() == [3, 3, 3]
    first = found.iloc[0]
    assert first[["mean", "baseline_mean", "std", "loss", "baseline_loss"]].tolist() == pytest.approx(
        [2.1, 1.1, 0.1, 0.2, 0.2]
    )
    trace = found.set_index(["method", "quantity"]).loc[("b", "trace")]
    assert [trace["std"], trace["baseline_std"]] == pytest.approx(
        [np.std([5, 7, 8], ddof=1), np.std([5, 6, 9], ddof=1)]
    )
    assert found.set_index(["method", "quantity"])["verdict"].to_dict() == {
        ("b", "gap"): "contradicts", ("c", "gap"): "undecided",
        ("b", "trace"): "undecided", ("c", "trace"): "supports",
        ("b", "sharpness"): "supports", ("c", "sharpness"): "contradicts",
    }  # fmt: skip


def test_methods_that_differ_in_nothing_rarely_get_a_verdict():
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(200):
        draws = np.exp(rng.standard_normal((6, len(QUANTITIES))))
        table = pd.DataFrame(draws, columns=QUANTITIES)
        table = table.assign(method=["a"] * 3 + ["b"] * 3, seed=[0, 1, 2] * 2, weights="dense", loss=0.2)
        decided += (cb.probes.verdicts(table, "a", "b")["verdict"] != "undecided").any()
    assert decided <= 20  # 10 are expected at most; 20 or more have a probability below 1 in 400


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (0.1, 0.1 * LOSS_FACTOR, True),
        (0.1, 0.101 * LOSS_FACTOR, False),
        (1.0, 1.0 + LOSS_NATS, True),
        (1.0, 1.01 + LOSS_NATS, False),
        (2.3, 0.2, False),
        (0.0, 0.0, True),
        (np.nan, 0.2, False),
        (np.inf, np.inf, False),
    ],
)
def test_models_that_fit_differently_are_not_compared(ours, theirs, expected):
    assert cb.probes.comparable(ours, theirs) is cb.probes.comparable(theirs, ours) is expected
    table = rows(a={"trace": [1.0, 1.1, 1.2]}, b={"trace": [9.0, 9.5, 9.9]})
    table["loss"] = np.where(table["method"] == "a", ours, theirs)
    found = cb.probes.verdicts(table, "a", "b", ["trace"]).iloc[0]
    assert found["verdict"] == ("supports" if expected else "not comparable")
    assert found["p"] < 0.001  # the number stands there all the same
    assert (found["loss"], found["baseline_loss"]) == pytest.approx((ours, theirs), nan_ok=True)


def test_the_loss_that_counts_is_the_mean_at_the_dense_weights_and_where_it_was_measured():
    """Two networks broken by pruning have like losses, and still nothing to say of each other if one was untrained."""
    dense = rows(a={"trace": [1.0, 1.1, 1.2]}, b={"trace": [9.0, 9.5, 9.9]})
    dense["loss"] = [0.1, 0.2, 0.3, 0.15, 0.2, 0.25]  # each of a differs from some of b by more than the factor
    pruned = dense.assign(weights="global@0.9")
    both = [dense, pruned]

    def said(*parts):
        return cb.probes.verdicts(pd.concat(parts), "a", "b", ["trace"])["verdict"].tolist()

    assert said(*both) == ["supports", "supports"]
    apart = pruned["loss"] + 0.5 * (pruned["method"] == "b")
    assert said(dense, pruned.assign(loss=apart)) == ["supports", "not comparable"]
    assert said(dense.assign(loss=apart.to_numpy()), pruned) == ["not comparable", "not comparable"]
    assert said(pruned) == ["supports"]


def test_untrained_networks_are_not_more_stable_than_trained_ones():
    """The whole way: they are flatter in everything, and no verdict says so."""
    train, _ = cb.data.load("digits")
    part, few = train.sample(200), train.sample(50)
    tables = []
    for method, epochs in (("sgd", 8), ("sam", 0)):
        for seed in range(3):
            torch.manual_seed(seed)
            model = cb.models.create("convnet", 10, 1)
            base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            model.train()
            for epoch in range(epochs):
                for x, y in train.batches(128, seed=epoch):
                    base.zero_grad()
                    torch.nn.functional.cross_entropy(model(x), y).backward()
                    base.step()
            named = {"method": method, "seed": seed}
            ball = cb.probes.loss_in_ball(model, part, directions=1, points=3).assign(**named)
            table = cb.probes.stability(model, part, "global@0.9", train, few=few).assign(**named)
            tables.append(cb.probes.with_random_directions(table, ball))
    table = pd.concat(tables, ignore_index=True)
    found = cb.probes.verdicts(table, "sam", "sgd")
    assert set(found["verdict"]) == {"not comparable"}
    assert (found["mean"] < found["baseline_mean"]).mean() > 0.8
    assert ((found["p"] < 0.05) & (found["mean"] < found["baseline_mean"])).any()  # they would have won
    assert set(found.loc[found["weights"] == "dense", "quantity"]) == set(QUANTITIES)


def test_a_corrected_p_is_no_less_than_that_of_a_smaller_p():
    found = _holm(pd.Series([0.02, np.nan, 0.011, 0.9, 0.6]))
    assert found.tolist() == pytest.approx([0.06, np.nan, 0.044, 1, 1], nan_ok=True)
    assert _holm(pd.Series([0.011, 0.01])).tolist() == pytest.approx([0.02, 0.02])


def test_random_directions_are_the_mean_rise_at_the_half_width():
    slices = pd.DataFrame(
        [("a", 0, d, a, loss) for d, losses in enumerate([(1, 5, 0.5, 5, 2), (3, 5, 0.5, 5, 4)])
         for a, loss in zip([-0.5, -0.2, 0, 0.2, 0.5], losses, strict=True)],
        columns=["method", "seed", "direction", "a", "loss"],
    )  # fmt: skip
    table = pd.DataFrame({"method": "a", "seed": [0, 0, 1], "weights": ["dense", "2:4", "dense"]})
    found = cb.probes.with_random_directions(table, slices)
    assert found["random_rise"].tolist() == pytest.approx([(1 + 2 + 3 + 4) / 4 - 0.5, np.nan, np.nan], nan_ok=True)
    again = cb.probes.with_random_directions(found, slices)
    pd.testing.assert_frame_equal(again, found)


def test_verdicts_are_laid_out_with_the_loss_first():
    dense = rows(sgd={"gap": [9.0, 9.5, 9.9]}, sam={"gap": [1.0, 1.1, 1.2]}, cram={"gap": [9.1, 9.4]})
    dense["loss"] = dense["method"].map({"sgd": 0.2, "sam": 0.25, "cram": 0.9})
    laid_out = cb.probes.verdict_table(cb.probes.verdicts(dense, ["sam", "cram"], "sgd", ["gap"]))
    assert list(laid_out.columns) == ["weights", "quantity", "SGD", "SAM", "CrAM"]
    assert laid_out.iloc[0].tolist() == ["dense", "loss", "0.2", "0.25", "0.9"]
    gap = laid_out.iloc[1]
    assert gap["SGD"] == "9.47"
    assert gap["SAM"].startswith("1.1: supports (p = ")
    assert gap["CrAM"].startswith("9.25: not comparable (p = ")


def test_verdicts_need_the_loss():
    table = rows(a={"trace": [1.0, 1.1]}, b={"trace": [1.0, 1.1]}).drop(columns="loss")
    for quantities in (None, ["trace"]):
        with pytest.raises(ValueError, match="no column 'loss'"):
            cb.probes.verdicts(table, "a", "b", quantities)
