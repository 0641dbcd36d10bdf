"""Rows of many runs carry the method, seed and settings of their own run, and results are those of the last epoch."""

from types import SimpleNamespace

import pandas as pd
import pytest

import cram_bench as cb


def weight_sum(model):
    return pd.DataFrame({"sum": [sum(float(p.detach().double().abs().sum()) for p in model.parameters())]})


def test_every_row_is_of_the_run_it_names():
    experiments = cb.experiment.grid("digits", ["sgd", "sam"], 2, epochs=1)
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
    experiment = cb.experiment.recipe("digits", "sgd", start="0" * 12, prune="global@0.9", seed=3)
    source = SimpleNamespace(id=experiment.start, experiment=cb.experiment.recipe("digits", "sam"))
    environment = dict.fromkeys(("seconds", "device", "threads", "compile", "commit", "finished"), 1)
    history = pd.DataFrame({"epoch": [1, 2, 3], "test_accuracy": [0.5, 0.9, 0.7]})
    tuned = SimpleNamespace(
        id="1", experiment=experiment, failure=None, history=history, environment=environment, start=experiment.start
    )
    found = cb.probes.transfer_accuracy([tuned], [source]).iloc[0]
    assert found.to_dict() == {"method": "sam", "seed": 3, "sparsity": 0.9, "accuracy": 0.7}
    assert cb.runs.summary([tuned])["dense_accuracy"].tolist() == [0.7]
