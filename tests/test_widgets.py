"""The explorer without a browser: its controls, its numbers, and what happens when it is moved about."""

import re
import threading
import time

import pytest
import torch

import cram_bench as cb
from cram_bench.compress import Magnitude, parse
from cram_bench.data import AT_ONCE

pytest.importorskip("ipywidgets")


@pytest.fixture
def runs():
    experiments = [cb.experiment.recipe("digits", method, epochs=1) for method in ("sgd", "cram+-multi")]
    return cb.runs.ensure_all(experiments, progress=False)


def shown(explorer):
    """Accuracies in per cent as they stand in the table, by run."""
    rows = re.findall(r"<tr><td>([^<]*)</td>.*?<b class='accuracy'>([\d.]+)</b>", explorer.numbers.value)
    return {label: float(value) for label, value in rows}


def measured(run, spec, tuned, sample=500, calibration=250):
    train, test = run.experiment.load_data()
    table = cb.probes.sparsity_curve(
        run.load_model(), test.sample(sample), [spec], train.calibration(calibration, batch_size=AT_ONCE)
    )
    compressor = parse(spec)
    row = table[(table["pattern"] == compressor.pattern) & (table["calibrated"] == tuned)].iloc[-1]
    return round(100 * row["accuracy"], 1)


@pytest.mark.parametrize(("pattern", "bits"), [("global", "float32"), ("uniform", "8 bits"), ("2:4", "float32")])
@pytest.mark.parametrize("tuned", [True, False])
def test_the_numbers_are_those_of_the_probe(pattern, bits, tuned, runs):
    explorer = cb.widgets.explorer(runs)
    explorer.sparsity.value, explorer.pattern.value, explorer.bits.value, explorer.tune.value = (
        0.9,
        pattern,
        bits,
        tuned,
    )
    assert explorer.wait()
    spec = (pattern if ":" in pattern else f"{pattern}@0.9") + cb.widgets.BITS[bits]
    assert spec in explorer.numbers.value
    assert "ready" in explorer.status.value
    assert list(shown(explorer).values()) == pytest.approx([measured(run, spec, tuned) for run in runs], abs=0.11)
    pictures = (explorer.curve, explorer.layers, explorer.slice, explorer.flips)
    assert all("src='data:image/png;base64,iVBORw0KGgo" in picture.value for picture in pictures)


def test_the_last_of_many_moves_is_what_is_shown(runs, monkeypatch):
    explorer = cb.widgets.explorer(runs, delay=0.01)
    for step in range(40):
        explorer.sparsity.value = 0.5 + step / 100
        time.sleep(0.01)
    assert explorer.wait()
    assert "global@0.89" in explorer.numbers.value
    explorer.sparsity.value = 0.71
    assert explorer.wait()
    monkeypatch.setattr(cb.widgets, "apply_", lambda *a: pytest.fail("what is known was asked again"))
    explorer.sparsity.value = 0.89
    assert explorer.wait()
    assert "ready" in explorer.status.value


def test_the_models_are_left_as_they_were(runs):
    explorer = cb.widgets.explorer(runs)
    assert explorer.wait()
    for label, run in zip(explorer.runs.options, runs, strict=True):
        state = run.load_model().state_dict()
        ours = explorer._subjects[label].model.state_dict()
        assert all((ours[name] == value).all() for name, value in state.items())


def test_a_problem_is_shown_and_the_explorer_goes_on(runs, monkeypatch):
    explorer = cb.widgets.explorer(runs)
    assert explorer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(
            cb.widgets.Subject, "answer", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of <memory>"))
        )
        explorer.sparsity.value = 0.33
        assert explorer.wait()
        assert "RuntimeError: out of &lt;memory&gt;" in explorer.status.value
    explorer.sparsity.value = 0.34
    assert explorer.wait()
    assert "ready" in explorer.status.value


def test_an_n_of_m_pattern_has_no_slider(runs):
    explorer = cb.widgets.explorer(runs)
    explorer.pattern.value = "4:8"
    assert explorer.sparsity.disabled
    assert str(explorer.compressor) == "4:8"
    explorer.pattern.value = "global"
    assert not explorer.sparsity.disabled
    assert explorer.compressor == Magnitude(0.8)


def test_the_costliest_layer_is_named_and_what_was_measured_is_said(runs):
    explorer = cb.widgets.explorer(runs, sample=300)
    explorer.tune.value = False
    explorer.sparsity.value = 0.95
    assert explorer.wait()
    assert "global@0.95, untuned; 300 test examples" in explorer.numbers.value
    named = re.findall(r"<b class='layer'>([^<]*)</b>", explorer.blamed.value)
    part = runs[0].experiment.load_data()[1].sample(300).sample(200)
    blames = [cb.probes.layer_blame(run.load_model(), part, "global@0.95").set_index("layer")["rise"] for run in runs]
    assert named == [blame.idxmax() for blame in blames]
    assert "on 200 of these examples" in explorer.blamed.value
    explorer.tune.value = True
    assert explorer.wait()
    assert "BatchNorm tuned on 250 training examples" in explorer.numbers.value


def test_a_run_that_failed_is_named(runs, tmp_path):
    lost = cb.runs.Run(tmp_path, cb.experiment.recipe("digits", "sam"), failure="the loss is <nan>")
    explorer = cb.widgets.explorer([*runs, lost])
    assert explorer.failed.value == "SAM, seed 0: failed: the loss is &lt;nan&gt;"
    assert len(explorer.runs.options) == 2


def test_a_sample_in_the_order_of_its_classes_is_looked_at_in_all_of_them():
    train, test = cb.data.load("digits")
    ordered = test.take(test.labels.argsort(stable=True))
    model = cb.models.create("convnet", 10, 1, 8)
    subject = cb.widgets.Subject(model, ordered, train.calibration(100))
    assert len(torch.cat([labels for _, labels in subject._few]).unique()) == 10


def test_without_runs_there_is_nothing_to_explore(runs):
    with pytest.raises(ValueError, match="at least one finished run"):
        cb.widgets.explorer([])
    other = cb.runs.ensure(cb.experiment.recipe("digits", epochs=1, resize=16), progress=False)
    with pytest.raises(ValueError, match="on one data set"):
        cb.widgets.explorer([*runs, other])


def test_runs_that_differ_in_anything_have_labels_of_their_own(runs):
    other = cb.runs.ensure(cb.experiment.recipe("digits", "cram+-multi", epochs=1, ramp=True), progress=False)
    seeds = cb.runs.ensure_all(cb.experiment.grid("digits", ["sgd"], 2, epochs=1), progress=False)
    explorer = cb.widgets.explorer([*runs, other, seeds[1]])
    assert len(explorer.runs.options) == 4
    assert sum(other.id in label for label in explorer.runs.options) == 1
    explorer.runs.value = explorer.runs.options
    assert explorer.wait()
    assert len(shown(explorer)) == 4
    explorer.runs.value = ()
    assert explorer.wait()
    assert "choose a run" in explorer.status.value
    assert not explorer.layers.value
    assert not explorer.slice.value


def test_a_closed_explorer_leaves_no_thread(runs):
    before = threading.active_count()
    explorer = cb.widgets.explorer(runs)
    assert explorer.wait()
    explorer.sparsity.value = 0.3
    explorer.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_a_quantized_curve_starts_at_the_quantized_network(runs):
    explorer = cb.widgets.explorer(runs[:1])
    explorer.bits.value = "4 bits"
    explorer.tune.value = False
    assert explorer.wait()
    label = explorer.runs.value[0]
    curve = explorer._subjects[label].curve("global+int4", tuned=False)
    assert round(100 * curve.iloc[0]["accuracy"], 1) == pytest.approx(
        measured(runs[0], "global@0.0+int4", False), abs=0.11
    )
