"""The sentences that head a report say what its tables say, the bad with the good."""

from pathlib import Path

import pandas as pd
import pytest

from cram_bench.probes import verdicts
from cram_bench.report import findings


def curves(cells, **more):
    """Return rows of accuracy from (method, sparsity) → per cent: tuned where pruned, and decoys not to count."""
    rows = []
    for (method, sparsity), per_cent in cells.items():
        right = {"method": method, "sparsity": sparsity, "pattern": "global", "accuracy": per_cent / 100}
        rows.append(right | {"calibrated": sparsity > 0} | more)
        rows.append(right | {"calibrated": sparsity == 0, "accuracy": 0.011} | more)
        if sparsity:
            rows.append(right | {"calibrated": True, "pattern": "2:4", "accuracy": 0.022} | more)
    return pd.DataFrame(rows)


def runs(*methods, seeds=(0, 1, 2), epochs=15, **more):
    return pd.DataFrame([{"method": m, "seed": s, "epochs": epochs} | more for m in methods for s in seeds])


def told(folder, question, **tables):
    (folder / "tables").mkdir(exist_ok=True)
    for name, table in tables.items():
        table.to_csv(folder / "tables" / f"{name}.csv", index=False)
    return findings.findings(folder, [question])


def test_accuracy_is_compared_with_the_first_method_dense_and_at_90_percent(tmp_path):
    cells = {("sgd", 0): 88.1, ("sgd", 0.9): 54.4, ("sgd", 0.95): 26.0, ("sam", 0): 88.04, ("sam", 0.9): 63.9,
             ("sam", 0.95): 31.0, ("cram", 0): 80.0, ("cram", 0.9): 54.4, ("cram", 0.95): 20.0}  # fmt: skip
    made = told(tmp_path, "accuracy_vs_sparsity", runs=runs("sgd", "sam", "cram"), accuracy_vs_sparsity=curves(cells))
    assert made == [
        "Dense, SAM is 0.1 and CrAM 8.1 points below SGD (88.1 %); at 90 %, SAM is 9.5 points above SGD (54.4 %) and "
        "CrAM is level with it. Means of seeds 0, 1 and 2, 15 epochs."
    ]


def test_without_tuning_the_plain_curves_count(tmp_path):
    table = curves({("adamw", 0): 88.7, ("adamw", 0.8): 71.7, ("cram+", 0): 89.6, ("cram+", 0.8): 60.0})
    table = table[(table["accuracy"] > 0.1)].assign(calibrated=False)
    made = told(tmp_path, "language", language_runs=runs("adamw", "cram+", seeds=[0], epochs=3), language_curves=table)
    assert made == [
        "Dense, CrAM+ is 0.9 points above AdamW (88.7 %); at 80 %, CrAM+ is 11.7 points below AdamW (71.7 %). "
        "One seed, 3 epochs: what one training gives."
    ]


@pytest.mark.parametrize("shorter", [True, False])
def test_at_equal_cost_each_method_has_the_training_of_the_common_cost(shorter, tmp_path):
    """SGD takes one gradient a step, SAM two: of 15 epochs, the shorter are SAM's of 8, the longer SGD's of 30."""
    equal = [("sgd", 15, 88.0, 54.0), ("sam", 30, 90.0, 60.0)]
    other = ("sam", 16, 84.0, 56.5) if shorter else ("sgd", 30, 91.0, 50.0)
    expected = {("sgd", 15), ("sam", 16)} if shorter else {("sgd", 30), ("sam", 30)}
    listed = [*equal, other]
    at = {(method, gradients): (dense, pruned) for method, gradients, dense, pruned in listed}
    table = pd.concat([curves({(m, 0): d, (m, 0.9): p}, gradients=g) for m, g, d, p in listed])
    trained = pd.concat([runs(m, gradients=g) for m, g, *_ in listed])
    (made,) = told(tmp_path, "equal_cost", equal_cost_runs=trained, accuracy_by_cost=table)
    (dense, pruned), (sam_dense, sam_pruned) = (at["sgd", 15 if shorter else 30], at["sam", 16 if shorter else 30])
    assert set(at) > expected
    cost = "15 or 16" if shorter else "30"
    assert (
        f"At equal cost, {cost} gradients an image, SAM is below SGD dense (by {dense - sam_dense:.1f} points)" in made
    )
    assert f"and above it at 90 % (by {sam_pruned - pruned:.1f} points)." in made


def test_an_accuracy_is_the_mean_over_the_seeds():
    seeds = [curves({("sgd", 0.0): dense, ("sgd", 0.9): pruned}) for dense, pruned in ((90, 50), (90, 50), (60, 20))]
    (found,) = findings.means(pd.concat(seeds)).values()
    assert found == pytest.approx({0.0: 0.8, 0.9: 0.4})  # no median, which is 90 and 50


def test_the_common_cost_is_where_the_farthest_method_is_least_far(tmp_path):
    """At 30 nobody is farther than 4; at 10 two are there and one is 5 away, which is less in sum."""
    costs = {"sgd": (10, 30), "sam": (10, 26), "cram": (15, 34)}
    accuracy = {("sgd", 30): 80.0, ("sam", 26): 82.0, ("cram", 34): 81.0}
    table = pd.concat(
        curves({(m, 0): accuracy.get((m, g), 50.0), (m, 0.9): 40.0}, gradients=g)
        for m, several in costs.items()
        for g in several
    )
    trained = pd.concat(runs(m, gradients=g) for m, several in costs.items() for g in several)
    assert told(tmp_path, "equal_cost", equal_cost_runs=trained, accuracy_by_cost=table) == [
        "At equal cost, 26, 30 or 34 gradients an image, SAM is above SGD dense (by 2.0 points); CrAM is above SGD "
        "dense (by 1.0 points). Means of seeds 0, 1 and 2, 15 epochs."
    ]


def test_of_common_costs_as_near_as_each_other_the_cheaper_counts(tmp_path):
    """Also of two trainings of one method: 12 and 18 are as far from 15."""
    accuracy = {("sgd", 15): 80.0, ("sam", 12): 82.0, ("sam", 18): 90.0}
    table = pd.concat(curves({(m, 0): value, (m, 0.9): 40.0}, gradients=g) for (m, g), value in accuracy.items())
    trained = pd.concat(runs(m, gradients=g) for m, g in accuracy)
    (said,) = told(tmp_path, "equal_cost", equal_cost_runs=trained, accuracy_by_cost=table)
    assert said.startswith("At equal cost, 12 or 15 gradients an image, SAM is above SGD dense (by 2.0 points).")


def test_ablations_and_transfer_name_every_sparsity_where_the_method_loses(tmp_path):
    cells = {("CrAM+-Multi", 0): 83.9, ("CrAM+-Multi", 0.9): 80.3, ("CrAM+-Multi", 0.95): 71.4, ("ρ = 0", 0): 84.7,
             ("ρ = 0", 0.9): 80.5, ("ρ = 0", 0.95): 67.8, ("without +", 0): 75.6, ("without +", 0.9): 74.1,
             ("without +", 0.95): 71.4}  # fmt: skip
    table = curves(cells)
    table["changed"], table["method"] = table["method"], "cram+-multi"
    trained = runs("cram+-multi", seeds=[0], epochs=8, changed="CrAM+-Multi")
    assert told(tmp_path, "ablations", ablations_runs=trained, ablations=table) == [
        "With ρ = 0, compression without ascent, accuracy is below CrAM+-Multi at 95 % (by 3.6 points) and above it "
        "dense and at 90 % (by 0.8 and 0.2 points); without +, plain CrAM, it is below CrAM+-Multi dense and at 90 % "
        "(by 8.3 and 6.2 points). One seed, 8 epochs: what one training gives."
    ]
    rows = [
        ("sgd", 0, 0.984),
        ("sgd", 0.7, 0.98),
        ("sgd", 0.8, 0.97),
        ("cram", 0, 0.984),
        ("cram", 0.7, 0.94),
        ("cram", 0.8, 0.91),
    ]
    accuracy = pd.DataFrame(rows, columns=["method", "sparsity", "accuracy"])
    assert told(tmp_path, "transfer", transfer_runs=runs("sgd", seeds=[0], epochs=20), transfer=accuracy) == [
        "On the new data, CrAM is below SGD at 70 and 80 % (by 4.0 and 6.0 points). "
        "One seed, 20 epochs: what one training gives."
    ]


def stable(losses, **values):
    tables = [
        pd.DataFrame({"method": m, "seed": range(len(v)), "trace": v, "loss": losses[m]}) for m, v in values.items()
    ]
    return pd.concat(tables, ignore_index=True).assign(weights="dense")


def test_stability_counts_verdicts_and_says_where_there_can_be_none(tmp_path):
    values = {"sgd": [9.0, 9.5, 9.9], "sam": [1.0, 1.1, 1.2], "cram": [90.0, 95.0, 99.0]}
    table = stable({"sgd": 0.2, "sam": 0.3, "cram": 0.2}, **values)
    pruned = stable({"sgd": 1.3, "sam": 0.3, "cram": 0.4}, **values).assign(weights="global@0.9")
    both = pd.concat([table, pruned])
    found = verdicts(both, ["sam", "cram"], "sgd")
    (made,) = told(tmp_path, "loss_stability", verdicts=found, stability=both)
    assert made.startswith(
        "At the dense weights, against SGD, SAM is more stable in 1 of 1 quantities (trace) and CrAM is less stable in "
        "1 of 1 quantities (trace); at weights pruned to 90 % nothing can be compared: the loss of SGD is 1.30 nats "
        "there, that of the others 0.30 to 0.40. Welch's test over 3 seeds, p ≤ 0.05 after Holm's correction. Not "
        "measured in this report: gap, "
    )
    single = stable({"sgd": 0.2, "sam": 0.3}, sgd=[9.0], sam=[1.0])
    (made,) = told(tmp_path, "loss_stability", verdicts=verdicts(single, "sam", "sgd"), stability=single)
    assert made.startswith("At the dense weights no difference to SGD is decided. One seed decides nothing.")


def test_a_report_without_results_says_nothing(tmp_path):
    assert findings.findings(tmp_path, ["accuracy_vs_sparsity", "anatomy"]) == []
    one = curves({("sgd", 0): 88.0, ("sgd", 0.9): 54.0})
    assert told(tmp_path, "accuracy_vs_sparsity", runs=runs("sgd"), accuracy_vs_sparsity=one) == []
    failed = curves({("sgd", 0): 88.0, ("sgd", 0.9): 54.0}).assign(accuracy=None)
    assert told(tmp_path, "accuracy_vs_sparsity", runs=runs("sgd", "sam"), accuracy_vs_sparsity=failed) == []


def test_what_a_method_was_trained_at_is_said_of_its_settings():
    def run(method, compressors=(), **more):
        return {"settings": {"method": method, "compressors": list(compressors), "start": ""} | more}

    multi, wide = [f"global@{s / 10:g}" for s in range(3, 10)], [f"global@{s:g}" for s in (0.3, 0.4, 0.5, 0.6, 0.95)]
    found = findings.trained_at(
        [run("sgd"), run("cram+-multi", multi), run("cram-single", wide), run("cram", ["global@0.7"]),
         run("cram", ["2:4"]), run("sgd", ["global@0.5"], start="0123"), run("gmp*", **{"pruning.final": 0.9}),
         run("gmp*", **{"pruning.final": 0.95}), run("safe", **{"step.sparsity": 0.9})]
    )  # fmt: skip
    assert found == {
        "SGD": "dense",
        "CrAM+-Multi": "30, 40 … 90 %",
        "CrAM-Single": "30, 40 … 60 and 95 %",
        "CrAM": "70 % or 2:4",
        "GMP*": "90 % or 95 %",
        "SAFE": "90 %",
    }


def test_pruners_are_chosen_by_held_out_loss_and_compared_with_magnitude_that_was_tuned(tmp_path):
    columns = ["method", "seed", "sparsity", "pattern", "correction", "accuracy", "held_out_loss"]
    rows = [
        ("sgd", 0, 0.0, "dense", "none", 0.99, 0.01),
        ("sgd", 0, 0.9, "global", "batchnorm", 0.48, 2.2),
        ("sgd", 1, 0.9, "global", "batchnorm", 0.52, 1.8),
        ("sgd", 0, 0.9, "global", "none", 0.1, 9.0),
        ("sgd", 0, 0.9, "greedy", "statistics", 0.6, 1.0),
        ("sgd", 1, 0.9, "greedy", "statistics", 0.9, 1.9),  # better by the mean of the losses, not for this run
        ("sgd", 0, 0.9, "obs", "batchnorm", 0.7, 1.5),  # more accurate, and yet not the least loss
        ("sgd", 1, 0.9, "obs", "batchnorm", 0.64, 1.7),
        ("sgd", 0, 0.9, "chosen", "chosen", 0.8, 0.1),
        ("sgd", 0, 0.95, "global", "batchnorm", 0.3, 3.0),
        ("sgd", 0, 0.95, "obs", "batchnorm", 0.35, 2.0),
        ("cram+", 0, 0.9, "global", "batchnorm", 0.71, 0.8),
        ("cram+", 0, 0.9, "greedy", "statistics", 0.72, 0.9),
        ("cram+", 0, 0.95, "greedy", "statistics", 0.72, 0.9),  # nothing to compare it with
    ]
    table = pd.DataFrame(rows, columns=columns)
    trained = runs("sgd", "cram+")
    assert told(tmp_path, "better_pruner", better_pruner_runs=trained, better_pruner=table) == [
        "Magnitude with BatchNorm tuned → the pruner of least held-out loss of each run, test accuracy in %: at 90 %, "
        "SGD 50.0 → 62.0 (greedy 1, obs 1) and CrAM+ 71.0 → 71.0 (global); at 95 %, SGD 30.0 → 35.0 (obs). What "
        "training adds to SGD, in points, under magnitude → under the pruner chosen: at 90 %, CrAM+ +21.0 → +9.0. "
        "Means of seeds 0, 1 and 2, 15 epochs."
    ]
    dense = table[table["sparsity"] == 0]
    assert told(tmp_path, "better_pruner", better_pruner_runs=trained, better_pruner=dense) == []
    without = table[(table["correction"] == "none") | (table["pattern"] == "obs")].assign(correction="none")
    (made,) = told(tmp_path, "better_pruner", better_pruner_runs=trained, better_pruner=without)
    assert made.startswith("Magnitude with nothing tuned → the pruner")
    assert "at 90 %, SGD 10.0 → 67.0 (obs)." in made


def test_masks_and_values_are_told_apart(tmp_path):
    columns = ["method", "seed", "sparsity", "pattern", "correction", "accuracy", "held_out_loss"]
    rows = [
        ("sgd", 0, 0.95, "global", "batchnorm", 0.5, 1.0),
        ("sgd", 1, 0.95, "global", "batchnorm", 0.6, 1.0),
        ("sgd", 0, 0.95, "global+obs", "batchnorm", 0.8, 2.0),
        ("sgd", 0, 0.95, "global+obs", "statistics", 0.9, 3.0),
        ("sgd", 0, 0.95, "greedy(update=none)", "batchnorm", 0.4, 2.0),
        ("sgd", 0, 0.95, "greedy", "none", 0.3, 2.0),
        ("sgd", 0, 0.95, "greedy", "batchnorm", 0.31, 2.0),
        ("cram+", 0, 0.95, "greedy", "batchnorm", 0.31, 2.0),
    ]
    (made,) = told(
        tmp_path,
        "better_pruner",
        better_pruner_runs=runs("sgd", "cram+", seeds=[0, 1]),
        better_pruner=pd.DataFrame(rows, columns=columns),
    )
    said = "Masks alone → values updated too, BatchNorm tuned, in %: at 95 %, "
    assert f"{said}SGD magnitude 55.0 → 80.0, greedy 40.0 → 31.0. Means of" in made


def test_a_specialist_says_what_each_awareness_of_the_task_brings(tmp_path):
    """Of two draws: 90 and 92 % with both; without the task in looking 3 and 1 points less, in correcting 10 and 8."""
    rows = [("dense", 0.0, 0, None, None, "none", 0.95), ("global", 0.9, 0, None, "task", "statistics", 0.5)]
    for draw, (both, look, correct) in enumerate([(0.90, 0.87, 0.80), (0.92, 0.91, 0.84)]):
        for looked, corrected, accuracy in (
            ("task", "task", both),
            ("random", "task", look),
            ("task", "random", correct),
            ("random", "random", 0.7),
        ):
            rows.append(("exactobs", 0.9, draw, looked, corrected, "statistics", accuracy))
            rows.append(("exactobs", 0.8, draw, looked, corrected, "statistics", 0.01))
    columns = ["pattern", "sparsity", "draw", "looked", "corrected", "correction", "accuracy"]
    table = pd.DataFrame(rows, columns=columns)
    table["task_accuracy"] = table["accuracy"].where(table["corrected"] == "task", 0.97)
    trained = runs("sgd", seeds=[0])
    assert told(tmp_path, "specialist", specialist_runs=trained, specialist=table) == [
        "Dense, accuracy on the task is 95.0 %; at 90 %, all from examples of the task, and what that brings over as "
        "many of all classes (in brackets: to accuracy among the task's classes alone): exactobs, statistics, 91.0: "
        "+2.0 ± 12.7 by what the pruner looks at (+2.0 ± 12.7) and +9.0 ± 12.7 by the correction (−6.0 ± 12.7). "
        "95 % intervals over 2 draws. One seed, 15 epochs: what one training gives."
    ]
    alone = table[table["pattern"].isin(["dense", "global"])]
    assert told(tmp_path, "specialist", specialist_runs=trained, specialist=alone) == []


@pytest.mark.parametrize("alone", [False, True])
def test_error_feedback_is_told_with_its_control_and_its_price(alone, tmp_path):
    names = ["SGD", "M-FAC", "S-M-FAC", "S-M-FAC, no feedback", "S-M-FAC, 0.1 %", "S-M-FAC, 0.1 %, no feedback", "GGT"]
    costs = pd.DataFrame(
        {
            "changed": names,
            "accuracy": [0.92, 0.914, 0.909, 0.88, 0.9, 0.7, None],
            "std": [0.002, None, None if alone else 0.003, None, None, None, None],
            "seeds": [3, 1, 1 if alone else 3, 1, 1, 1, 0],
            "seconds": [2.0, 6.0, 2.5, 2.5, 2.5, 2.5, None],
            "megabytes": [1.09, 1080.0, 32.0, 31.0, 20.0, 19.0, None],
        }
    )
    cells = {("sgd", 0): 92.0, ("sgd", 0.9): 60.0, ("m-fac", 0): 91.4, ("m-fac", 0.9): 65.5, ("s-m-fac", 0): 90.9,
             ("s-m-fac", 0.9): 58.0}  # fmt: skip
    count = 1 if alone else 3
    claims = pd.DataFrame(
        [
            {"method": m, "seed": s, "weights": "dense", "loss": 0.2, "sharpness": size * (1 + s / 50)}
            for m, size, seeds in (("sgd", 2.0, 3), ("m-fac", 0.5, 1), ("s-m-fac", 1.0, count))
            for s in range(seeds)
        ]
    )
    trained = pd.concat([runs("sgd"), runs("m-fac", seeds=[0]), runs("s-m-fac", seeds=range(count))])
    (made,) = told(
        tmp_path, "preconditioners", preconditioners_runs=trained, preconditioners_costs=costs,
        preconditioners_pruned=curves(cells), preconditioners_stability=claims,
        preconditioners_verdicts=verdicts(claims, ["m-fac", "s-m-fac"], "sgd"),
    )  # fmt: skip
    spread = "" if alone else ", beyond the ± 0.3 of its seeds"
    assert made.startswith(
        f"S-M-FAC is 0.5 points below M-FAC (91.4 %){spread}, in 1/34 of the memory; with → without error feedback, "
        "as published 90.9 → 88.0 %, 0.1 % 90.0 → 70.0 %. Beside SGD (92.0 % in 1.09 MB) stand M-FAC 91.4 % in 3.0 "
        "times the time and 1.08 GB and S-M-FAC 90.9 % in 1.2 times the time and 32 MB. At 90 %, S-M-FAC is 2.0 "
        "points below SGD (60.0 %) and M-FAC is 5.5 points above it."
    )
    flat = "Flatness is undecided: one seed." if alone else "At the dense weights, against SGD, S-M-FAC is more stable"
    assert flat in made
    single = "M-FAC and S-M-FAC" if alone else "M-FAC"
    assert made.endswith(f"Means of seeds 0, 1 and 2, 15 epochs. Of one seed: {single}.")
    told(tmp_path, "preconditioners", preconditioners_costs=costs.assign(accuracy=[0.92, 0.91, 0.912] + [None] * 4))
    (close,) = findings.findings(tmp_path, ["preconditioners"])
    assert close.startswith(f"S-M-FAC is 0.2 points above M-FAC (91.0 %){'' if alone else ', within the ± 0.3 of its'}")


def test_a_difference_is_of_exact_means_and_rounded_once_in_sentences_and_claims(tmp_path, monkeypatch):
    """91.04 and 91.76, shown as 91.0 and 91.8, are 0.7 apart, from either side and whoever says it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import claims

    rows = [("gmp*", 0.8, 0.9176, 80.0), ("cram+-multi", 0.8, 0.9104, 40.0), ("gmp*", 0.9, 0.9, 80.0),
            ("cram+-multi", 0.9, 0.8935, 40.0)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "sparsity", "accuracy", "curve"])
    table = table.assign(seed=0, own=40.0, shared=0.0, one=40.0)
    trained = runs("gmp*", "cram+-multi", seeds=[0])
    (said,) = told(tmp_path, "gradual", gradual_runs=trained, gradual=table)
    assert "it is below GMP* at 80 and 90 % (by 0.7 and 0.7 points)" in said
    _, numbers = claims.gradual(table, {0.8: 1.0, 0.9: 1.0})
    assert numbers.startswith("−0.7 at 80 % and −0.7 at 90 %")
    swapped = table.assign(accuracy=[0.9104, 0.9176, 0.8935, 0.9])
    (said,) = told(tmp_path, "gradual", gradual_runs=trained, gradual=swapped)
    assert "it is above GMP* at 80 and 90 % (by 0.7 and 0.7 points)" in said
    assert claims.gradual(swapped, {0.8: 1.0, 0.9: 1.0})[1].startswith("+0.7 at 80 % and +0.7 at 90 %")
    level = curves({("sgd", 0): 88.04, ("sgd", 0.9): 50.0, ("sam", 0): 88.08, ("sam", 0.9): 50.0})  # 88.0 and 88.1
    (said,) = told(tmp_path, "accuracy_vs_sparsity", runs=runs("sgd", "sam"), accuracy_vs_sparsity=level)
    assert said.startswith("Dense, SAM is level with SGD (88.0 %)")


def test_from_how_many_sparsities_on_cram_pays(tmp_path):
    columns = ["method", "seed", "sparsity", "accuracy", "own", "shared", "one", "curve"]
    rows = [
        ("sgd", 0, 0.9, 0.6, 30.0, 0.0, 30.0, 30.0),
        ("cram+-multi", 0, 0.9, 0.8, 30.0, 0.0, 30.0, 30.0),
        ("cram+-multi", 0, 0.95, 0.7, 30.0, 0.0, 30.0, 30.0),
        ("gmp*", 0, 0.9, 0.75, 30.0, 0.0, 30.0, 60.0),  # level in cost for one, dearer from two on
        ("gmp*", 0, 0.95, 0.76, 30.0, 0.0, 30.0, 60.0),
        ("gmp*, distilled", 0, 0.9, 0.8, 29.0, 30.0, 59.0, 88.0),  # dearer at once, for its teacher
        ("gmp*, distilled", 0, 0.95, 0.8, 29.0, 30.0, 59.0, 88.0),
        ("safe", 0, 0.9, 0.9, 10.0, 0.0, 10.0, 20.0),
    ]
    table, trained = pd.DataFrame(rows, columns=columns), runs("sgd", "cram+-multi", "gmp*")
    (said,) = told(tmp_path, "gradual", gradual_runs=trained, gradual=table)
    assert said.startswith(
        "CrAM+-Multi costs 30 gradients an image for all sparsities; from 2 sparsities on it costs less than GMP* "
        "(0 + 30 for each): it is below GMP* at 95 % (by 6.0 points) and above it at 90 % (by 5.0 points); from 1 "
        "sparsity on it costs less than GMP*, distilled (30 + 29 for each): it is below GMP*, distilled at 95 % (by "
        "10.0 points); from 4 sparsities on it costs less than SAFE (0 + 10 for each): it is below SAFE at 90 % (by "
        "10.0 points). Means of seeds 0, 1 and 2, 15 epochs."
    )
    dear = table.assign(shared=table["shared"].where(table["method"] != "gmp*, distilled", 90.0))
    (said,) = told(tmp_path, "gradual", gradual_runs=trained, gradual=dear)  # its teacher alone costs more than CrAM
    assert "from 1 sparsity on it costs less than GMP*, distilled (90 + 29 for each)" in said
    dear = table.assign(one=table["one"] + 31 * (table["method"] == "cram+-multi"))
    dear["curve"] = dear[["one", "curve"]].max(axis=1)
    (said,) = told(tmp_path, "gradual", gradual_runs=trained, gradual=dear)  # what is looked at counts
    assert said.startswith("CrAM+-Multi costs 61 gradients an image for all sparsities; from 3 sparsities on")
    assert told(tmp_path, "gradual", gradual_runs=trained, gradual=table[table["method"] != "cram+-multi"]) == []


def test_the_fastest_within_a_point_is_told_and_who_is_not_there(tmp_path):
    """Of a way with several marks the fastest that is near enough; means over seeds."""
    rows = [
        ("float32", 0, 1.0, 0.90), ("bfloat16", 0, 1.5, 0.899), ("sparse", 0.8, 1.2, 0.895), ("sparse", 0.9, 1.9, 0.88),
        ("ziplm", 1.5, 1.6, 0.93), ("ziplm", 2, 2.2, 0.891), ("ziplm", 3, 3.1, 0.6), ("2:4", 0.5, 0.9, 0.7),
    ]  # fmt: skip
    table = pd.DataFrame(
        [(seed, *row, 32, 1) for row in rows for seed in (0, 1)],
        columns=["seed", "kind", "asked", "speedup", "accuracy", "batch", "threads"],
    )
    made = told(tmp_path, "speed", speed_runs=runs("sgd", seeds=(0, 1)), speed=table)
    assert made == [
        "Within a point of dense float32 (90.0 %), in batches of 32 on 1 thread: ZipLM is 2.20 times as fast (89.1 %), "
        "dense bfloat16 is 1.50 times as fast (89.9 %) and single zeros with sparse kernels is 1.20 times as fast "
        "(89.5 %); not there: 2:4 with sparse kernels. Means of seeds 0 and 1, 15 epochs."
    ]
