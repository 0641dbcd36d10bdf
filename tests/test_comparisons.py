"""Which experiments answer which question."""

import pytest
from PIL import Image

import cram_bench as cb
from cram_bench import comparisons


def test_at_equal_cost_every_method_has_the_gradients_of_a_two_pass_method():
    methods = ["sgd", "sam", "cram+-multi", "cram-half", "cram-single"]
    experiments = comparisons.equal_cost("digits", methods, 2, epochs=6)
    at_epochs = [e for e in experiments if e.epochs == 6]
    at_cost = [e for e in experiments if e.gradients == 12]
    for part in (at_epochs, at_cost):
        assert {(e.method, e.seed) for e in part} == {(m, s) for m in methods for s in (0, 1)}
    assert len(experiments) == len(set(experiments)) == 2 * (5 + 3)


def test_without_a_two_pass_method_there_is_one_cost():
    assert comparisons.equal_cost("digits", ["sgd"], 1) == cb.experiment.grid("digits", ["sgd"], 1)


def test_an_ablation_changes_one_thing():
    variants = comparisons.ablations("digits", 1, epochs=3)
    base = variants["CrAM+-Multi"][0]
    expected = {"without +": {"method"}, "ramp": {"ramp"}, "ramp, 95 % too": {"method", "ramp", "compressors"}, "dense gradients": {"sparse_gradients"}, "ρ = 0": {"rho"}, "only 70 %": {"compressors"},
                "ρ/‖g‖ = 0.2": {"normalize"}, "masks held 20 times": {"mask_interval"}}  # fmt: skip
    for name, changed in expected.items():
        other = variants[name][0].settings()
        assert {key for key, value in base.settings().items() if other[key] != value} == changed


def test_a_transfer_starts_from_the_sources_and_scales_the_target(tmp_path):
    sources, tuned = comparisons.transfer("cifar10", "digits", ["sgd", "cram+-multi"], 2, [0.9], epochs=1)
    assert len(tuned) == 2 * 2 * 2
    assert {(e.start, e.seed, e.prune, e.resize) for e in tuned} == {
        (source.id, source.seed, prune, 32) for source in sources for prune in ("", "global@0.9")
    }
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "train" / name / "0.png")
    _, tuned = comparisons.transfer("cifar10", str(tmp_path), ["sgd"], 1, [0.9], epochs=1)
    assert {e.resize for e in tuned} == {0}
    with pytest.raises(ValueError, match="the source 'digits' has 1"):
        comparisons.transfer("digits", str(tmp_path), ["sgd"], 1, [0.9], epochs=1)
    with pytest.raises(ValueError, match="other than the source, 'cifar10'"):
        comparisons.transfer("cifar10", "cifar10", ["sgd"], 1, [0.9])
    (tmp_path / "empty").mkdir()
    with pytest.raises(cb.data.DataError, match="holds no image"):
        comparisons.transfer("cifar10", str(tmp_path / "empty"), ["sgd"], 1, [0.9])


def test_language_is_asked_of_sentences():
    assert [e.method for e in comparisons.language("sst2", ["adamw", "cram+"], 1)] == ["adamw", "cram+"]
    assert comparisons.language("sst2", ["cram+"], 1)[0].compressors == ("global@0.7",)
    with pytest.raises(ValueError, match=r"unknown set of sentences 'digits'.*sst2"):
        comparisons.language("digits", ["adamw"], 1)


def test_anatomy_is_two_trainings_and_the_second_pruned_and_fine_tuned():
    other, whole, tuned = comparisons.anatomy("digits", ["sgd", "sam", "cram+-multi"], epochs=3, sparsity=0.8)
    assert [other.method, whole.method, tuned.method] == ["sgd", "cram+-multi", "sgd"]
    assert (tuned.start, tuned.prune, tuned.epochs, tuned.lr) == (whole.id, "global@0.8", 5, whole.lr / 10)
