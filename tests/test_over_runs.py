"""Rows of many runs carry the method, seed and settings of their own run, and results are those of the last epoch."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import cram_bench as cb


def weight_sum(model):
    return pd.DataFrame({"sum": [sum(float(p.detach().double().abs().sum()) for p in model.parameters())]})


def test_every_row_is_of_the_run_it_names():
    experiments = cb.recipes.grid("digits", ["sgd", "sam"], 2, epochs=1)
    trained = cb.runs.ensure_all(experiments)
    lost = cb.runs.Run(trained[0].path, experiments[0], failure="the loss is nan")
    found = cb.probes.over_runs([*trained, lost], weight_sum, settings=["epochs", "id"])
    own = [weight_sum(run.load_model())["sum"].iloc[0] for run in trained]
    assert len(set(own)) == 4  # other seeds start elsewhere
    assert found["sum"].tolist() == pytest.approx([*own, float("nan")], nan_ok=True)
    names = [(e.method, e.seed, e.epochs, e.id) for e in [*experiments, experiments[0]]]
    assert list(found[["method", "seed", "epochs", "id"]].itertuples(index=False, name=None)) == names
    changed = cb.probes.over_changes({"all": trained, "none": trained[3:]}, cb.probes.over_runs, weight_sum)
    assert changed["changed"].tolist() == ["all"] * 4 + ["none"]
    assert changed["sum"].tolist() == pytest.approx([*own, own[3]])


def test_a_result_is_that_of_the_last_epoch():
    """Neither the first nor the best."""
    experiment = cb.recipes.recipe("digits", "sgd", start="0" * 12, prune="global@0.9", seed=3)
    source = SimpleNamespace(id=experiment.start, experiment=cb.recipes.recipe("digits", "sam"))
    history = pd.DataFrame({"epoch": [1, 2, 3], "test_accuracy": [0.5, 0.9, 0.7]})
    tuned = SimpleNamespace(id="1", experiment=experiment, failure=None, history=history)
    found = cb.probes.transfer_accuracy([tuned], [source]).iloc[0]
    assert found.drop("held_out").to_dict() == {
        "method": "sam", "seed": 3, "sparsity": 0.9, "accuracy": 0.7, "lr": 0.1,
    }  # fmt: skip
    assert pd.isna(found["held_out"])


class Constant(torch.nn.Module):
    """Says one class of everything, and notes that it was asked."""

    def __init__(self, label, asked):
        super().__init__()
        self.label, self.asked = label, asked

    def forward(self, x):
        self.asked.append(self.label)
        return torch.nn.functional.one_hot(torch.full((len(x),), self.label), 10).float()


def test_the_rate_of_a_transfer_is_chosen_on_held_out_images_and_its_test_is_the_only_one():
    source = cb.recipes.recipe("digits", "sam")
    asked, runs = [], []

    def tuned(seed, sparsity, lr, held_out, label, failure=None):
        prune = f"global@{sparsity:g}" if sparsity else ""
        experiment = cb.recipes.recipe("digits", start="0" * 12, prune=prune, seed=seed, lr=lr, holdout=100, sample=200)
        history = None if failure else pd.DataFrame({"test_accuracy": [0.99, held_out]})
        model = Constant(label, asked)
        runs.append(
            SimpleNamespace(
                id=str(len(runs)), experiment=experiment, failure=failure, history=history, load_model=lambda: model
            )
        )

    tuned(0, 0.0, 0.1, 0.9, 1)  # the better of one seed, and worse on average
    tuned(1, 0.0, 0.1, 0.1, 1)
    tuned(0, 0.0, 0.2, 0.6, 2)
    tuned(1, 0.0, 0.2, 0.6, 3)
    tuned(0, 0.9, 0.1, 0.5, 4)
    tuned(1, 0.9, 0.1, 0.5, 5)
    tuned(0, 0.9, 0.2, 1.0, 6)
    tuned(1, 0.9, 0.2, 1.0, 7, failure="the loss is nan")  # a rate at which one failed is last
    tuned(0, 0.5, 0.1, 1.0, 8, failure="the loss is nan")
    tuned(0, 0.5, 0.2, 1.0, 8, failure="the loss is nan")
    found = cb.probes.transfer_accuracy(runs, [SimpleNamespace(id="0" * 12, experiment=source)])
    labels = cb.data.load("digits")[1].labels
    share = {label: round(float((labels == label).double().mean()), 6) for label in range(10)}
    rows = [(0, 0.0, 0.2, share[2]), (1, 0.0, 0.2, share[3]), (0, 0.9, 0.1, share[4]), (1, 0.9, 0.1, share[5])]
    kept = found[["seed", "sparsity", "lr", "accuracy"]]
    assert list(kept[:4].round(6).itertuples(index=False, name=None)) == rows
    assert found["held_out"].tolist()[:4] == [0.6, 0.6, 0.5, 0.5]
    assert len(found) == 5
    assert found["accuracy"].isna().tolist() == [False] * 4 + [True]
    assert set(asked) == {2, 3, 4, 5}
    for run in runs:
        run.experiment = run.experiment.but(holdout=0)
    with pytest.raises(ValueError, match=r"one of the rates \[0\.1, 0\.2\] is chosen on held-out images"):
        cb.probes.transfer_accuracy(runs, [SimpleNamespace(id="0" * 12, experiment=source)])


def test_a_table_of_accuracies_has_a_column_for_what_is_quantized_alone():
    """Beside the dense column, not in it; pruned to the pattern asked for, quantized or not."""
    cells = {("global", 0.0, False): 0.9, ("global", 0.0, True): 0.1, ("int8", 0.0, False): 0.2,
             ("int8", 0.0, True): 0.7, ("global", 0.5, True): 0.6, ("2:4", 0.5, True): 0.5,
             ("uniform", 0.5, True): 0.3, ("global", 0.5, False): 0.15, ("global+int4", 0.0, True): 0.4,
             ("global+int4", 0.5, True): 0.35, ("2:4+int8", 0.5, True): 0.45}  # fmt: skip
    rows = [("sgd", 0, *where, accuracy) for where, accuracy in cells.items()]
    curves = pd.DataFrame(rows, columns=["method", "seed", "pattern", "sparsity", "calibrated", "accuracy"])
    shown = cb.probes.accuracy_table(curves).loc["SGD"].to_dict()
    own = {"int8": "70.0", "2:4": "50.0", "global+int4": "40.0", "2:4+int8": "45.0"}
    assert shown == {"dense": "90.0", "50 %": "60.0", **own}
    assert list(shown) == ["dense", "50 %", *own]
    assert cb.probes.accuracy_table(curves, pattern="global+int4").loc["SGD", "50 %"] == "35.0"
    assert cb.probes.accuracy_table(curves, calibrated=False).loc["SGD"].to_dict() == {
        "dense": "90.0",
        "50 %": "15.0",
        "int8": "20.0",
    }


def test_the_head_of_a_table_says_of_how_many_seeds_it_is_where_some_failed():
    """The most that a method has; a method with fewer says so itself."""
    rows = [(m, s, "global", 0.5, True, 0.7) for m, seeds in (("sam", (0, 1)), ("sgd", (0, 1, 2))) for s in seeds]
    rows.append(("sam", 2, None, None, None, None))
    curves = pd.DataFrame(rows, columns=["method", "seed", "pattern", "sparsity", "calibrated", "accuracy"])
    shown = cb.probes.accuracy_table(curves)
    assert shown.index.name == "accuracy, % ± std (n = 3)"
    assert sorted(shown.index) == ["SAM (2 of 3 seeds)", "SGD"]


def lasting(run, seconds, accuracies):
    """The run, with a history of one's own."""
    history = pd.DataFrame({"epoch": [1, 2, 3], "seconds": seconds, "test_accuracy": accuracies})
    return type("Told", (cb.runs.Run,), {"history": history})(run.path, run.experiment)


def test_trainings_by_epoch_second_and_byte():
    sgd, adamw, sparse = cb.runs.ensure_all(
        [cb.recipes.recipe("digits", "sgd", epochs=1), cb.recipes.recipe("digits", "adamw", epochs=1),
         cb.recipes.recipe("digits", "s-m-fac", epochs=1, gradients=8, density=0.02)], progress=False
    )  # fmt: skip
    first = lasting(sgd, [2.0, 3.0, 9.0], [0.7, float("nan"), 0.6])  # the last is not the best
    second = lasting(sgd, [1.0, 1.0, 1.0], [0.2, 0.9, 0.8])
    lost = cb.runs.Run(sgd.path, sgd.experiment, failure="the loss is nan")
    curves = cb.probes.training_curves([first, second, lost])
    assert curves["epoch"].tolist()[:5] == [1, 3, 1, 2, 3]
    assert curves["seconds"].tolist()[:5] == [2, 14, 1, 2, 3]
    assert curves["accuracy"].tolist()[:5] == [0.7, 0.6, 0.2, 0.9, 0.8]
    assert curves.iloc[5][["epoch", "seconds", "megabytes", "accuracy"]].isna().all()
    held = 4 * sum(p.numel() for p in sgd.load_model().parameters()) / 1e6  # of momentum
    assert curves["megabytes"].tolist()[:5] == pytest.approx([held] * 5)
    costs = cb.probes.training_costs({"SGD": [first, second, lost], "AdamW": [adamw], "S": [sparse], "none": [lost]})
    count = sum(p.numel() for p in sgd.load_model().parameters())
    row = costs.set_index("changed")
    assert row.loc["SGD", ["accuracy", "seeds", "seconds"]].tolist() == pytest.approx([0.7, 2, 1.5])
    assert row.loc["SGD", "std"] == pytest.approx(0.02**0.5)
    ring = 8 * round(0.02 * count) * 8 + 4 * count + 8 * 8 * 8  # places and values, error, Gram; no momentum
    assert row["megabytes"].tolist()[:3] == pytest.approx([4 * count / 1e6, 8 * count / 1e6, ring / 1e6])
    assert row.loc["AdamW", "std"] != row.loc["AdamW", "std"]  # one seed has none
    assert row.loc["none", "seeds"] == 0
    assert row.loc["none", ["accuracy", "seconds", "megabytes"]].isna().all()
    shown = cb.probes.cost_table(costs).set_index("method")
    assert shown.loc["SGD"].to_dict() == {
        "seeds": "2", "accuracy, % ± std": "70.0 ± 14.1", "seconds an epoch": "1.5",
        "MB the optimizer holds": f"{4 * count / 1e6:.3g}",
    }  # fmt: skip
    assert shown.loc["AdamW", "accuracy, % ± std"] == f"{100 * row.loc['AdamW', 'accuracy']:.1f}"
    assert shown.loc["none"].tolist() == ["0", "failed", "", ""]
    told = lasting(sparse, [1.0, 1.0, 1.0], [0.5, 0.9, 0.7])
    kept = cb.probes.density_accuracy([told, cb.runs.Run(sparse.path, sparse.experiment, failure="lost")])
    assert kept[["density", "feedback", "seed"]].to_numpy().tolist() == [[0.02, True, 0]] * 2
    assert kept["accuracy"].tolist() == pytest.approx([0.7, float("nan")], nan_ok=True)


def test_the_bytes_of_wrappers_are_those_of_what_they_wrap():
    model = cb.models.create("convnet", 10, 1)
    weights = sum(p.numel() for p in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method, gradients in (("m-fac", 5), ("ggt", 7)):
        base = cb.recipes.recipe("digits", method, gradients=gradients, momentum=0.9).build_optimizer(model)
        optimizer = cb.optim.CrAM(model, base, cb.compress.Magnitude(0.5))
        ring = 4 * gradients * weights + 8 * gradients**2
        assert cb.probes.optimizer_bytes(optimizer) == ring + 4 * weights
        assert not base.state
        assert base.window.count == 0
        model.linear.requires_grad_(False)  # what is frozen has neither columns nor momentum
        weights_left = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert weights_left < weights
        ring = 4 * gradients * weights_left + 8 * gradients**2
        assert cb.probes.optimizer_bytes(optimizer) == ring + 4 * weights_left
        model.linear.requires_grad_(True)
    assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())
