import math

import pytest

import cram_bench as cb
from cram_bench.experiment import Experiment
from cram_bench.optim import BASES
from cram_bench.recipes import METHODS, PROFILES, grid, profile_changes, recipe


def test_the_id_is_a_hash_of_what_differs_from_the_defaults():
    assert Experiment().id == Experiment.of({"lr": 0.1, "epochs": 20}).id == Experiment.of({}).id
    assert Experiment().changed() == {}
    ids = {Experiment().id, Experiment.of({"lr": 0.2}).id, Experiment(seed=1).id, Experiment(model="resnet20").id}
    assert len(ids) == 4
    # Written down, so that no refactoring moves the results of others: a default may not change, a field may be added.
    assert Experiment.of({"lr": 0.2}).id == "3b3a21228000"
    assert recipe("cifar10", "cram+-multi").id == "648fa533dc0c"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_settings_round_trip(dataset, method):
    import json

    experiment = recipe(dataset, method, seed=3)
    again = Experiment.of(json.loads(json.dumps(experiment.settings())))
    assert again == experiment
    assert again.id == experiment.id


def test_the_authors_constants():
    cram = recipe("cifar10", "cram+-multi")
    assert cram.step.compressors == tuple(f"global@0.{tenths}" for tenths in range(3, 10))
    assert (
        cram.step.rho,
        cram.optimizer.lr,
        cram.optimizer.weight_decay,
        cram.batch_size,
        cram.optimizer.momentum,
    ) == (0.2, 0.1, 5e-4, 128, 0.9)
    assert recipe("cifar10", "cram+-multi", epochs=200).schedule.warmup_epochs == 5
    assert recipe("cifar10", "sam").step.rho == 0.05
    assert recipe("cifar10").model == "resnet20"


def test_an_image_folder_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe("pictures").data.dataset == str(tmp_path / "pictures")


@pytest.mark.parametrize("method", METHODS)
def test_the_rate_shrinks_with_the_batch_of_a_small_folder(method, tmp_path):
    for index in range(143):
        (tmp_path / "train" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "ab"[index % 2] / f"{index}.png").touch()
    usual = recipe("cifar10", method)
    small = recipe(str(tmp_path), method)
    assert (usual.batch_size, small.batch_size) == (128, 16)
    own = method in BASES and method != "sgd"  # an optimizer with a rate of its own, that is not scaled
    assert small.optimizer.lr == pytest.approx(1e-3 if own else 0.1 / 8)
    assert usual.optimizer.lr == (1e-3 if own else 0.1)
    assert recipe(str(tmp_path), method, lr=0.3).optimizer.lr == 0.3
    assert (
        recipe(str(tmp_path), method, batch_size=16).optimizer.lr == usual.optimizer.lr
    )  # who chooses the batch chooses the rate
    assert recipe("digits", method, batch_size=16).optimizer.lr == usual.optimizer.lr
    if method not in BASES:
        assert recipe(str(tmp_path), method, optimizer="adamw").optimizer.lr == 0.1  # only SGD's is scaled


@pytest.mark.parametrize(("images", "batch_size", "epochs"), [(0, 128, 2), (3, 2, 60), (100, 8, 60), (2000, 128, 5)])
def test_a_small_folder_gets_small_batches_and_more_epochs(images, batch_size, epochs, tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for index in range(images):
        (tmp_path / "train" / "cat" / f"{index}.png").touch()
    changes = profile_changes(str(tmp_path), "quick")
    assert changes["epochs"] == epochs
    assert recipe(str(tmp_path), **changes).batch_size == batch_size


@pytest.mark.parametrize(
    ("method", "changes", "gradients"),
    [
        ("cram+", {"plain": 0.2}, 1.8),  # every fifth step takes one gradient
        ("cram+", {"plain": 0.2, "ramp": True}, 1.4),  # from all of them to every fifth: 0.6 on average
        ("sam", {"halves": True}, 1.0),
        ("cram-single", {"plain": 0.2}, 1.0),
    ],
)
def test_the_cost_of_steps_that_leave_a_gradient_out(method, changes, gradients):
    assert recipe("digits", method, epochs=10, **changes).gradients == pytest.approx(10 * gradients)


def test_grid():
    listed = grid("digits", ["sgd", "sam"], 2, epochs=3)
    assert [(e.method, e.seed, e.epochs) for e in listed] == [
        ("sgd", 0, 3),
        ("sgd", 1, 3),
        ("sam", 0, 3),
        ("sam", 1, 3),
    ]
    assert [e.seed for e in grid("digits", ["sgd"], [5, 7])] == [5, 7]
    assert grid("digits", ["sgd"], 1, model="", epochs=0) == [recipe("digits", "sgd")]


def test_profiles():
    epochs = {
        name: [recipe(dataset, **profile_changes(dataset, name)).epochs for dataset in ("digits", "cifar10", "sst2")]
        for name in PROFILES
    }
    assert epochs == {"quick": [20, 2, 1], "full": [60, 10, 3]}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be from 1 to 1000000, not 0"),
        ({"epochs": -5}, ValueError, "epochs must be from 1 to 1000000, not -5"),
        ({"epochs": 2.0}, TypeError, "epochs must be of type int, not 2.0"),
        ({"epochs": "ten"}, TypeError, "epochs must be of type int, not 'ten'"),
        ({"epochs": True}, TypeError, "epochs must be of type int, not True"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"seed": 2**31}, ValueError, "seed must be from 0"),
        ({"seed": None}, TypeError, "seed must be of type int, not None"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        ({"lr": 0.0}, ValueError, "lr must be positive, not 0.0"),
        ({"lr": -0.1}, ValueError, "lr must be positive, not -0.1"),
        ({"lr": math.nan}, ValueError, "lr must be positive, not nan"),
        ({"lr": math.inf}, ValueError, "lr must be positive, not inf"),
        ({"lr": "0.1"}, TypeError, "lr must be of type float, not '0.1'"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), not 1.0"),
        ({"momentum": -0.1}, ValueError, "momentum must be in"),
        ({"weight_decay": -1e-4}, ValueError, "weight_decay must be not negative, not -0.0001"),
        ({"warmup_epochs": 21.0}, ValueError, "warmup_epochs must be from 0 to the number of epochs, not 21.0"),
        ({"augment": 1}, TypeError, "augment must be of type bool, not 1"),
        ({"precision": "float16"}, ValueError, "precision must be float32 or bfloat16, not 'float16'"),
        ({"method": "sam", "rho": -0.2}, ValueError, "rho must be not negative, not -0.2"),
        ({"method": "sam", "rho": math.nan}, ValueError, "rho must be not negative, not nan"),
        ({"holdout": -1}, ValueError, "holdout must be not negative"),
        ({"model": "resnet21"}, ValueError, "unknown model 'resnet21'; did you mean 'resnet20'"),
        ({"method": 3}, TypeError, "method must be of type str, not 3"),
        ({"optimizer": "sdg"}, ValueError, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        (
            {"method": "mine", "step": "cram++", "rho": 0.1},
            ValueError,
            "unknown step 'cram\\+\\+'; did you mean 'cram\\+'",
        ),
        ({"method": "cram"}, ValueError, "step 'cram' needs compressors"),
        (
            {"compressors": ["global@0.5"]},
            ValueError,
            "method 'sgd' has no setting 'compressors': it belongs to the step cram",
        ),
        (
            {"method": "sam", "momentum": 0.5, "optimizer": "adamw"},
            ValueError,
            "method 'sam' with optimizer 'adamw' has no setting 'mom",
        ),
        ({"method": "cram", "compressors": ["globl@0.5"]}, ValueError, "unknown compressor 'globl@0.5'"),
        ({"method": "cram", "compressors": ["global@1.5"]}, ValueError, r"sparsity must be in \[0, 1\]"),
        ({"method": "cram", "compressors": "global@0.5"}, TypeError, "compressors must be a list of strings"),
        ({"method": "cram", "compressors": [0.5]}, TypeError, "compressors must be a list of strings"),
        ({"learning_rate": 0.1}, ValueError, "unknown setting 'learning_rate'"),
        ({"epcohs": 1}, ValueError, "unknown setting 'epcohs'; did you mean 'epochs'"),
    ],
)
def test_wrong_settings_are_one_clear_line(settings, error, message):
    with pytest.raises(error, match=message) as caught:
        Experiment.of(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipe("digits", "adam"), "unknown method 'adam'"),
        (lambda: recipe("digits", "sgd", compressors=("2:4",)), "method 'sgd' has no setting 'compressors'"),
        (
            lambda: recipe("digits", "sgd", rho=0.0),
            "method 'sgd' has no setting 'rho': it belongs to the step sam, momentum-sam",
        ),
        (lambda: grid("digits", [], 3), "methods must be a list of names .* and is empty"),
        (lambda: grid("digits", ["sgd"], 0), "seeds must be from 1 to 10000, not 0"),
        (lambda: profile_changes("digits", "fast"), "unknown profile 'fast'"),
    ],
)
def test_wrong_recipes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", ["ten", None, 2.5])
def test_a_recipe_names_the_setting_that_is_wrong(value):
    with pytest.raises(TypeError, match=r"^epochs must be of type int"):
        cb.recipes.recipe("digits", epochs=value)


def test_the_settings_reach_the_optimizer():
    changes = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.02, "rho": 0.7, "seed": 5}  # none is a default of torch
    for method in cb.recipes.METHODS:
        wanted = cb.recipes.recipe("digits", method)
        wanted = wanted.but(**{name: value for name, value in changes.items() if name in wanted.settings()})
        optimizer = wanted.build_optimizer(cb.models.create("convnet", 10, 1))
        group = optimizer.param_groups[0]
        assert (group["lr"], group.get("decay", group["weight_decay"])) == (0.3, 0.02)
        assert group.get("momentum", 0.8) == 0.8
        assert ("rho" in group) == (method not in BASES and method not in ("gmp*", "obert"))
        if "rho" in group:
            assert group["rho"] == 0.7
        if wanted.step.compresses:
            assert [str(c) for c in optimizer.draw.compressors] == list(wanted.step.compressors)
            assert getattr(optimizer, "plus", False) == ("+" in method or method == "cram-half")
            assert optimizer.draw.generator.initial_seed() == 5
            interval = 1 if method == "cram+-looking" else 3  # there the pruner decides how long masks hold
            held = wanted.but(mask_interval=interval, normalize=True)
            other = held.build_optimizer(cb.models.create("convnet", 10, 1))
            assert (other.draw.interval, other.normalize) == (interval, True)
            assert (optimizer.draw.interval, optimizer.normalize) == (1, False)
            if method == "cram-single":
                other = wanted.but(plain=0.25, ascent="gradient")
                other = other.build_optimizer(cb.models.create("convnet", 10, 1))
                assert (other.plain, other.ascent) == (0.25, "gradient")
            dense = wanted.but(sparse_gradients=False)
            assert optimizer.sparse_gradients
            assert not dense.build_optimizer(cb.models.create("convnet", 10, 1)).sparse_gradients


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("sgd", {"halves": True}, "has no setting 'halves': it belongs to the step sam, cram"),
        ("cram-single", {"halves": True}, "has no setting 'halves': it belongs to the step sam, cram"),
        ("cram+", {"halves": True, "batch_size": 2}, "a batch of 4"),
        ("cram-half", {"halves": False}, "halves of method 'cram-half' is True, not False"),
        ("sam", {"ramp": True}, "method 'sam' has no setting 'ramp': it belongs to the step cram"),
        ("cram-half", {"ramp": True}, "halves needs both"),
        ("cram+", {"halves": True, "plain": 0.1}, "halves needs both"),
        ("sgd", {"optimizer": "adamw"}, "'sgd' is an optimizer of its own"),
        ("cram+", {"mask_interval": 0}, "mask_interval must be at least 1, not 0"),
        ("cram-single", {"plain": 1.0}, r"plain must be in \[0, 1\), not 1.0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(method, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("digits", method, **changes)
