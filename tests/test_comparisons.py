"""Which experiments answer which question."""

import pytest
from PIL import Image

import cram_bench as cb
from cram_bench import recipes

EQUAL_COST = ["sgd", "sam", "cram+-multi", "cram+-ramp", "cram-half", "cram-single"]


def test_at_equal_cost_every_method_has_the_gradients_of_a_two_pass_method():
    at_epochs, at_cost = recipes.equal_cost("digits", EQUAL_COST, 2, epochs=6)
    everyone = {(method, seed) for method in EQUAL_COST for seed in (0, 1)}
    for part in (at_epochs, at_cost):
        assert len(part) == len(everyone)
        assert {(e.method, e.seed) for e in part} == everyone
    assert {e.epochs for e in at_epochs} == {6}
    assert {e.gradients for e in at_cost} == {12}
    assert {(e.method, e.epochs) for e in at_cost if e.seed == 0} == {
        ("sgd", 12), ("sam", 6), ("cram+-multi", 6), ("cram+-ramp", 8), ("cram-half", 12), ("cram-single", 12)
    }  # fmt: skip
    assert all(e.schedule.warmup_epochs == pytest.approx(e.epochs / 40) for e in at_cost)
    assert {e for e in at_cost if e.epochs == 6} < set(at_epochs)  # trained once, for both


def test_at_the_cost_of_the_cheapest_the_dearer_train_shorter():
    at_epochs, at_cost = recipes.equal_cost("digits", EQUAL_COST, 1, epochs=15, shorter=True)
    assert {e.epochs for e in at_epochs} == {15}
    assert {(e.method, e.gradients) for e in at_cost} == {
        ("sgd", 15), ("sam", 16), ("cram+-multi", 16), ("cram+-ramp", 15), ("cram-half", 15), ("cram-single", 15)
    }  # fmt: skip
    # The same experiments as a plain list of that many epochs holds, so that nothing is trained twice.
    assert set(cb.recipes.grid("digits", ["sam", "cram+-multi"], 1, epochs=8)) < set(at_cost)
    assert {e.epochs for e in recipes.equal_cost("digits", ["sgd", "sam"], 1, epochs=1, shorter=True)[1]} == {1}


def test_without_a_two_pass_method_there_is_one_cost():
    one = cb.recipes.grid("digits", ["sgd"], 1)
    assert recipes.equal_cost("digits", ["sgd"], 1) == (one, one)


def test_an_ablation_changes_one_thing():
    variants = recipes.ablations("digits", 1, epochs=3)
    base = variants["CrAM+-Multi"][0]
    expected = {"without +": {"method", "step"}, "ramp": {"ramp"}, "ramp, 95 % too": {"method", "ramp", "compressors"},
                "dense gradients": {"sparse_gradients"}, "ρ = 0": {"rho"}, "only 70 %": {"compressors"},
                "ρ/‖g‖ = 0.2": {"normalize"}, "masks held 20 times": {"mask_interval"}}  # fmt: skip
    for name, changed in expected.items():
        other = variants[name][0].settings()
        assert {key for key, value in base.settings().items() if other[key] != value} == changed


def test_some_ablations_are_those_of_all_and_the_unchanged_is_among_them():
    everything = recipes.ablations("digits", 2)
    some = recipes.ablations("digits", 2, only=["masks held 20 times", "without +"])
    assert list(some) == ["CrAM+-Multi", "without +", "masks held 20 times"]
    assert all(everything[name] == experiments for name, experiments in some.items())
    with pytest.raises(ValueError, match=r"'without plus'; did you mean 'without \+'.*only 70 %"):
        recipes.ablations("digits", 2, only=["without plus"])
    with pytest.raises(TypeError, match="only must be a list of names of changes, not 'ramp'"):
        recipes.ablations("digits", 2, only="ramp")


def test_the_ablations_of_sentences_begin_at_their_own_constants():
    listed = recipes.ablations("sst2", 1, only=["without +", "ρ × ½ = 0.0005"])
    base, bare, half = (listed[name][0].step for name in ("CrAM+-Multi", "without +", "ρ × ½ = 0.0005"))
    assert (base.rho, bare.rho, half.rho) == (1e-3, 1e-3, 5e-4)
    assert bare.compressors == base.compressors == recipes.cram.UPPER


def test_a_transfer_starts_from_the_sources_and_scales_the_target(tmp_path):
    sources, tuned = recipes.transfer("cifar10", "digits", ["sgd", "cram+-multi"], 2, [0.9], epochs=1)
    assert len(tuned) == 2 * 2 * 2
    assert {(e.start, e.seed, e.pruning.prune, e.data.resize) for e in tuned} == {
        (source.id, source.seed, prune, 32) for source in sources for prune in ("", "global@0.9")
    }
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "train" / name / "0.png")
    _, tuned = recipes.transfer("cifar10", str(tmp_path), ["sgd"], 1, [0.9], epochs=1)
    assert {e.data.resize for e in tuned} == {0}
    with pytest.raises(ValueError, match="the source 'digits' has 1"):
        recipes.transfer("digits", str(tmp_path), ["sgd"], 1, [0.9], epochs=1)
    with pytest.raises(ValueError, match="other than the source, 'cifar10'"):
        recipes.transfer("cifar10", "cifar10", ["sgd"], 1, [0.9])
    (tmp_path / "empty").mkdir()
    with pytest.raises(cb.data.DataError, match="holds no image"):
        recipes.transfer("cifar10", str(tmp_path / "empty"), ["sgd"], 1, [0.9])


def test_a_transfer_is_tried_at_every_rate_on_what_is_not_held_out():
    options = {"target_images": 100, "rates": [0.01, 0.05, 0.01], "held_out": 30, "target_precision": "float32"}
    (source,), tuned = recipes.transfer("cifar10", "digits", ["sgd"], 1, [0.9], epochs=1, **options)
    assert (source.precision, source.data.holdout, source.data.sample) == ("bfloat16", 0, 0)
    assert {(e.precision, e.data.holdout, e.data.sample) for e in tuned} == {("float32", 30, 100)}
    tries = [(e.pruning.prune, e.optimizer.lr) for e in tuned]
    assert tries == [("", 0.01), ("", 0.05), ("global@0.9", 0.01), ("global@0.9", 0.05)]
    _, usual = recipes.transfer("cifar10", "digits", ["sgd"], 1, [0.9], epochs=1)
    assert {(e.precision, e.optimizer.lr, e.data.holdout) for e in usual} == {("bfloat16", 0.01, 0)}


def test_language_is_asked_of_sentences():
    assert [e.method for e in recipes.language("sst2", ["adamw", "cram+"], 1)] == ["adamw", "cram+"]
    assert recipes.language("sst2", ["cram+"], 1)[0].step.compressors == ("global@0.7",)
    with pytest.raises(ValueError, match=r"unknown set of sentences 'digits'.*sst2"):
        recipes.language("digits", ["adamw"], 1)


def test_anatomy_is_two_trainings_and_the_second_pruned_and_fine_tuned():
    other, whole, tuned = recipes.anatomy("digits", ["sgd", "sam", "cram+-multi"], epochs=3, sparsity=0.8)
    assert [other.method, whole.method, tuned.method] == ["sgd", "cram+-multi", "sgd"]
    assert (tuned.start, tuned.pruning.prune, tuned.epochs, tuned.optimizer.lr) == (
        whole.id,
        "global@0.8",
        5,
        whole.optimizer.lr / 10,
    )


def test_preconditioners_differ_in_what_is_kept_and_in_nothing_else():
    methods = ["sgd", "adamw", "m-fac", "s-m-fac", "lowrank-m-fac", "ggt", "s-ggt"]
    compared = recipes.preconditioners("cifar10", methods, 3, epochs=12, densities=[0.001], lr=0.01, gradients=64)
    extra = ["S-M-FAC, no feedback", "S-M-FAC, 0.1 %", "S-M-FAC, 0.1 %, no feedback"]
    assert list(compared) == ["SGD", "AdamW", "M-FAC", "S-M-FAC", "Low-rank M-FAC", "GGT", "S-GGT", *extra]
    assert {name: [e.seed for e in found] for name, found in compared.items()} == {
        name: [0, 1, 2] if name in ("SGD", "S-M-FAC") else [0] for name in compared
    }
    sparse = compared["S-M-FAC"][0]
    assert (sparse.optimizer.lr, sparse.optimizer.gradients, sparse.epochs) == (0.01, 64, 12)
    first = {name: found[0].settings() for name, found in compared.items()}
    changed = {name: {k: v for k, v in own.items() if sparse.settings().get(k) != v} for name, own in first.items()}
    assert changed["M-FAC"] == {"method": "m-fac", "optimizer": "m-fac"}
    assert changed["Low-rank M-FAC"] == {
        "method": "lowrank-m-fac", "optimizer": "lowrank-m-fac", "optimizer.rank": 4,
    }  # fmt: skip
    assert changed["S-M-FAC, no feedback"] == {"optimizer.feedback": False}
    assert changed["S-M-FAC, 0.1 %"] == {"optimizer.density": 0.001}
    assert changed["S-M-FAC, 0.1 %, no feedback"] == {"optimizer.density": 0.001, "optimizer.feedback": False}
    ours, theirs = compared["GGT"][0].settings(), compared["S-GGT"][0].settings()
    assert {k for k, v in ours.items() if theirs.get(k) != v} == {"method", "optimizer"}
    assert (ours["lr"], ours["optimizer.gradients"]) == (0.01, 100)
    for name in ("SGD", "AdamW"):
        assert compared[name][0] == recipes.recipe("cifar10", name.lower(), epochs=12)
    slow = recipes.preconditioners("cifar10", ["sgd", "s-m-fac", "ggt", "s-ggt"], lr=0.01, ggt_lr=0.3)
    assert [found[0].optimizer.lr for found in slow.values()] == [0.1, 0.01, 0.3, 0.3, 0.01]
    usual = recipes.preconditioners("cifar10", ["sgd", "s-m-fac"], [4, 5], repeated=[])
    assert [e.seed for found in usual.values() for e in found] == [4, 4, 4]
    assert usual["S-M-FAC"][0].optimizer == recipes.recipe("cifar10", "s-m-fac").optimizer
    assert list(recipes.preconditioners("digits", ["sgd", "m-fac"], densities=[0.5])) == ["SGD", "M-FAC"]
