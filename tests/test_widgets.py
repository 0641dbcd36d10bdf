"""The explorer without a browser: its controls, its numbers, and what happens when it is moved about."""

import base64
import copy
import functools
import html
import re
import struct
import threading
import time

import matplotlib as mpl
import pandas as pd
import pytest
import torch

import cram_bench as cb
from cram_bench.compress import Magnitude, apply_, listing, parse, tune_batchnorm
from cram_bench.data import AT_ONCE
from cram_bench.widgets import choices, networks, subject, texts

for module in ("ipywidgets", "anywidget", "altair", "vl_convert"):
    pytest.importorskip(module)


@pytest.fixture
def runs():
    experiments = [cb.recipes.recipe("digits", method, epochs=1) for method in ("sgd", "cram+-multi")]
    return cb.runs.ensure_all(experiments, progress=False)


def shown(explorer):
    """Accuracies in per cent as they stand in the table, by run."""
    rows = re.findall(r"<tr><td>([^<]*)</td>.*?<b class='accuracy'>([\d.]+)</b>", explorer.numbers.value)
    return {label: float(value) for label, value in rows}


def measured(run, spec, tuned, sample=500, calibration=250):
    train, test = run.experiment.load_data()
    table = cb.probes.sparsity_curve(
        run.load_model(), test.sample(sample), [spec], train.calibration(calibration, batch_size=AT_ONCE), batches=train
    )
    compressor = cb.prune.parse(spec)
    row = table[(table["pattern"] == compressor.pattern) & (table["calibrated"] == tuned)].iloc[-1]
    return round(100 * row["accuracy"], 1)


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [
        ("global", "float32"),
        ("uniform", "8 bits"),
        ("2:4", "float32"),
        ("greedy(gradients=128)", "8 bits"),
        ("2:4+obs(gradients=128)", "float32"),
    ],
)
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
    assert str(cb.prune.parse(spec)) in explorer.numbers.value
    assert "ready" in explorer.status.value
    assert list(shown(explorer).values()) == pytest.approx([measured(run, spec, tuned) for run in runs], abs=0.11)
    assert all("src='data:image/png;base64,iVBORw0KGgo" in part.value for part in (explorer.slice, explorer.flips))
    assert all(chart.spec["config"] for chart in (explorer.curve, explorer.layers, explorer.detail))


def test_the_last_of_many_moves_is_what_is_shown(runs, monkeypatch):
    explorer = cb.widgets.explorer(runs, delay=0.01)
    for step in range(40):
        explorer.sparsity.value = 0.5 + step / 100
        time.sleep(0.01)
    assert explorer.wait()
    assert "global@0.89" in explorer.numbers.value
    explorer.sparsity.value = 0.71
    assert explorer.wait()
    monkeypatch.setattr(subject, "apply_", lambda *a: pytest.fail("what is known was asked again"))
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
    part = runs[0].experiment.load_data()[1].sample(300).sample(100)
    blames = [cb.probes.layer_blame(run.load_model(), part, "global@0.95").set_index("layer")["rise"] for run in runs]
    assert named == [blame.idxmax() for blame in blames]
    assert "on 100 of these examples" in explorer.blamed.value
    explorer.tune.value = True
    assert explorer.wait()
    assert "BatchNorm tuned on 250 training examples" in explorer.numbers.value


def test_a_run_that_failed_is_named(runs, tmp_path):
    lost = cb.runs.Run(tmp_path, cb.recipes.recipe("digits", "sam"), failure="the loss is <nan>")
    explorer = cb.widgets.explorer([*runs, lost])
    assert explorer.failed.value == "SAM, seed 0: failed: the loss is &lt;nan&gt;"
    assert len(explorer.runs.options) == 2


def test_a_sample_in_the_order_of_its_classes_is_looked_at_in_all_of_them():
    train, test = cb.data.load("digits")
    ordered = test.take(test.labels.argsort(stable=True))
    model = cb.models.create("convnet", 10, 1, 8)
    subject = cb.widgets.Subject(model, ordered, train.calibration(100))
    assert len(torch.cat([labels for _, labels in subject._few]).unique()) == 10


def test_every_run_is_tuned_on_images_as_in_its_training(runs):
    plain = cb.runs.ensure(cb.recipes.recipe("digits", epochs=1, augment=False), progress=False)
    for order in ([runs[0], plain], [plain, runs[0]]):
        explorer = cb.widgets.explorer(order, sample=50, calibration=100)
        assert explorer.wait()
        for label, run in zip(explorer.runs.options, order, strict=True):
            train = run.experiment.load_data()[0]
            expected = train.calibration(100, augment=run.experiment.data.augment, batch_size=AT_ONCE)
            tuned_on = explorer._subjects[label].calibration
            assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(tuned_on, expected, strict=True))


def test_what_is_remembered_is_that_of_its_compression(runs):
    train, test = runs[0].experiment.load_data()
    subject = cb.widgets.Subject(runs[0].load_model(), test.sample(50), train.calibration(100))
    for ask in (subject.slice, subject.blame):
        much, little = (ask(parse(spec), lambda: None) for spec in ("global@0.9", "global@0.5"))
        assert not much.equals(little)
        assert ask(parse("global@0.9"), lambda: None) is much


def test_a_pruner_looks_once_for_all_its_sparsities(runs):
    train, test = runs[0].experiment.load_data()
    subject = cb.widgets.Subject(runs[0].load_model(), test.sample(50), train.calibration(100), train)
    one, two = (subject.operator(cb.prune.parse(f"obd(gradients=4)@{sparsity}")) for sparsity in (0.5, 0.9))
    assert one.fitted is two.fitted
    assert (one.sparsity, two.sparsity) == (0.5, 0.9)


def test_pruners_ask_for_no_more_examples_than_there_are(runs, monkeypatch):
    train, _ = runs[0].experiment.load_data()
    monkeypatch.setattr(choices, "_GRADIENTS", 10**6)
    explorer = cb.widgets.explorer(runs[:1], sample=20, calibration=20)
    offered = dict(explorer.pattern.options)
    explorer.close()
    assert offered["greedy"] == f"greedy(gradients={len(train) // 8})"


def test_without_runs_there_is_nothing_to_explore(runs):
    with pytest.raises(ValueError, match="at least one finished run"):
        cb.widgets.explorer([])
    other = cb.runs.ensure(cb.recipes.recipe("digits", epochs=1, resize=16), progress=False)
    with pytest.raises(ValueError, match="on one data set"):
        cb.widgets.explorer([*runs, other])


def test_examples_that_were_held_out_of_training_are_called_so_and_not_mixed_with_the_test_data(runs):
    held = cb.runs.ensure(cb.recipes.recipe("digits", epochs=1, holdout=200), progress=False)
    explorer = cb.widgets.explorer([held], sample=50, calibration=100)
    assert explorer.wait()
    assert "50 held-out training examples" in explorer.numbers.value
    assert torch.equal(explorer.sample.images, held.experiment.load_data()[1].sample(50).images)
    with pytest.raises(ValueError, match="on one data set"):
        cb.widgets.explorer([*runs, held])


def test_runs_that_differ_in_anything_have_labels_of_their_own(runs):
    other = cb.runs.ensure(cb.recipes.recipe("digits", "cram+-multi", epochs=1, ramp=True), progress=False)
    seeds = cb.runs.ensure_all(cb.recipes.grid("digits", ["sgd"], 2, epochs=1), progress=False)
    explorer = cb.widgets.explorer([*runs, other, seeds[1]])
    assert len(explorer.runs.options) == 4
    assert sum(other.id in label for label in explorer.runs.options) == 1
    explorer.runs.value = explorer.runs.options
    assert explorer.wait()
    assert len(shown(explorer)) == 4
    explorer.runs.value = ()
    assert explorer.wait()
    assert "choose a network" in explorer.status.value
    assert not explorer.layers.spec
    assert not explorer.curve.spec
    assert not explorer.detail.spec
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


def test_a_curve_is_of_its_pattern_its_bits_and_its_tuning(runs):
    train, test = runs[0].experiment.load_data()
    subject = cb.widgets.Subject(runs[0].load_model(), test.sample(20), train.calibration(50))
    asked = [(f"{pattern}@{level}{bits}", tuned) for pattern in ("uniform", "global") for level in (0.9, 0.5)
             for bits in ("+int4", "+int8", "") for tuned in (True, False)]  # fmt: skip
    for place, (spec, tuned) in enumerate(asked):
        found = cb.widgets.Answer(place / 100, 1.0, torch.zeros(1), torch.zeros(1), 1, 2, {})
        subject.answers[parse(spec), tuned] = found
    for pattern in ("uniform", "global"):
        for bits in ("", "+int8", "+int4"):
            for tuned in (True, False):
                places = [asked.index((f"{pattern}@{level}{bits}", tuned)) for level in (0.5, 0.9)]
                curve = subject.curve(pattern + bits, tuned)
                assert curve["sparsity"].tolist() == [0.5, 0.9]
                assert curve["accuracy"].tolist() == [place / 100 for place in places]


def curve_of(explorer, label):
    """Sparsity and accuracy as they are drawn, in per cent."""
    return {row["sparsity"]: row["mean"] for row in explorer.curve.rows["curve"] if row["run"] == label}


def test_a_quantized_curve_starts_at_the_quantized_network(runs):
    explorer = cb.widgets.explorer(runs[:1])
    explorer.bits.value = "4 bits"
    explorer.tune.value = False
    assert explorer.wait()
    label = explorer.runs.value[0]
    assert curve_of(explorer, label)[0.0] == pytest.approx(measured(runs[0], "global@0.0+int4", False), abs=0.11)


def rows(explorer):
    """The cells of the table, as text, by run."""
    found = {}
    for row in re.findall(r"<tr><td>.*?</tr>", explorer.numbers.value):
        label, *cells = (re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", row))
        found[html.unescape(label)] = cells
    return found


def outputs(model, spec, images, calibration=None):
    """Logits of a copy that is compressed, and tuned where there are data for it; nothing is folded."""
    model = copy.deepcopy(model)
    apply_(model, parse(spec))
    if calibration is not None:
        tune_batchnorm(model, calibration)
    with torch.no_grad():
        return model.eval()(images).float()


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_every_cell_of_the_table_is_that_of_its_run(runs, tuned, which):
    explorer = cb.widgets.explorer(runs, sample=300, calibration=100)
    explorer.runs.value = (explorer.runs.options[which],)
    explorer.tune.value = tuned
    explorer.sparsity.value = 0.9
    assert explorer.wait()
    run, (train, test) = runs[which], runs[which].experiment.load_data()
    sample, model = test.sample(300), run.load_model()
    images, labels = sample.batches(300).__iter__().__next__()

    def cells(of, calibration):
        logits, dense = outputs(of, "global@0.9", images, calibration), outputs(of, "global@0", images)
        right, before = (logits.argmax(1) == labels).float(), (dense.argmax(1) == labels).float()
        share, change = 100 * right.mean().item(), 100 * (right.mean() - before.mean()).item()
        error = 100 * right.std(correction=0).item() / 300**0.5
        changed = int((logits.argmax(1) != dense.argmax(1)).sum())
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        return [f"{share:.1f} ± {error:.1f}", f"{change:+.1f}".replace("-", "−"), f"{loss:.3f}", str(changed)]

    tuning = {
        "training": train.calibration(100, augment=run.experiment.data.augment, batch_size=AT_ONCE),
        "test": test.calibration(100, augment=run.experiment.data.augment, batch_size=AT_ONCE),
        "none": None,
    }
    expected = {name: cells(model, batches) for name, batches in tuning.items()}
    assert len({tuple(found) for found in expected.values()}) == 3  # or this test would tell nothing apart
    assert rows(explorer) == {explorer.runs.options[which]: expected["training" if tuned else "none"]}
    assert explorer.runs.options[which].startswith(run.label)


def test_a_folded_network_answers_with_the_weights_of_now():
    torch.manual_seed(0)
    model = cb.models.create("resnet20", 10)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    images = torch.randint(256, (80, 3, 32, 32), dtype=torch.uint8)
    data = cb.data.Images(
        "noise", images, torch.arange(80) % 10, tuple("abcdefghij"), torch.full((3,), 0.5), torch.full((3,), 0.25)
    )
    calibration = [(batch, labels) for batch, labels in data.take(torch.arange(40)).batches(40)]
    tune_batchnorm(model, calibration)
    subject = cb.widgets.Subject(model, data, calibration)
    assert subject.graph is not None  # folded
    inputs = torch.cat([batch for batch, _ in data.batches(80)])
    losses = set()
    for spec, tuned in [
        ("global@0.0", False), ("global@0.8", True), ("global@0.8", False), ("global@0.5", False), ("2:4", True),
        ("uniform@0.5+int4", True), ("global@0.3", False),
    ]:  # fmt: skip
        logits = outputs(model, spec, inputs, calibration if tuned else None)
        answer = subject.answer(parse(spec), tuned)
        assert answer.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, data.labels).item(), abs=1e-4)
        assert answer.accuracy == pytest.approx((logits.argmax(1) == data.labels).float().mean().item(), abs=0.013)
        torch.testing.assert_close(answer.confidence, logits.softmax(1).amax(1), atol=1e-3, rtol=1e-3)
        losses.add(round(answer.loss, 3))
    assert len(losses) == 7
    assert subject.answer(parse("global@0.8"), True) is not subject.answer(parse("global@0.8"), False)


@pytest.fixture
def drawn(monkeypatch):
    """What the pictures were last drawn from, by the name of the function."""
    last = {}

    def watch(name):
        original = getattr(cb.plots, name)

        def draw(*arguments):
            last[name] = arguments
            return original(*arguments)

        monkeypatch.setattr(cb.plots, name, draw)

    for name in ("examples", "loss_slice"):
        watch(name)
    return last


@pytest.mark.parametrize("tuned", [True, False])
def test_the_pictures_show_what_the_probes_return(runs, drawn, tuned):
    explorer = cb.widgets.explorer(runs, sample=300, calibration=100)
    explorer.tune.value = tuned
    explorer.sparsity.value = 0.93
    assert explorer.wait()
    train, test = runs[0].experiment.load_data()
    sample = test.sample(300)
    rows, slices = explorer.curve.rows, drawn["loss_slice"][0]
    assert (rows["here"], rows["chance"]) == ([{"sparsity": 93}], [{"chance": 100 * sample.majority}])
    layers = pd.DataFrame(explorer.layers.rows["layers"])
    assert list(slices) == list(explorer.runs.options) == list(dict.fromkeys(layers["run"]))
    assert drawn["loss_slice"][1] == {label: run.experiment.method for label, run in zip(slices, runs, strict=True)}
    for label, run in zip(explorer.runs.options, runs, strict=True):
        model = run.load_model()
        batches = train.calibration(100, augment=run.experiment.data.augment, batch_size=AT_ONCE)
        curve = curve_of(explorer, label)
        levels = [f"global@{level / 100:g}" for level in curve]
        known = cb.probes.sparsity_curve(model, sample, ["global@0.0", *levels], batches)
        known = known[known["calibrated"] == tuned].drop_duplicates("sparsity")["accuracy"]
        assert len(levels) == 11
        assert list(curve.values()) == pytest.approx(list(100 * known), abs=0.4)
        (here,) = [row for row in rows["curve"] if row["run"] == label and row["here"]]
        error = 100 * (here["mean"] / 100 * (1 - here["mean"] / 100) / 300) ** 0.5
        assert (here["sparsity"], here["n"], here["told"]) == (93, 300, f"{here['mean']:.1f} ± {error:.1f}")
        few = list(sample.sample(100).batches(100))
        blame, way = (
            cb.probes.layer_blame(model, few, "global@0.93"),
            cb.probes.loss_along_compression(model, few, "global@0.93", points=7, end=1.2),
        )
        own = layers[layers["run"] == label].reset_index(drop=True)
        assert list(own["layer"]) == list(blame["layer"])
        assert list(own["zeros"]) == list(blame["zeros"])
        assert list(own["rise"]) == pytest.approx(list(blame["rise"]), rel=1e-3, abs=1e-4)
        assert set(own["n"]) == {100}
        pd.testing.assert_frame_equal(slices[label], way, rtol=1e-3, atol=1e-4)
    model, names = runs[0].load_model(), sample.classes
    batches = train.calibration(100, augment=runs[0].experiment.data.augment, batch_size=AT_ONCE)
    images, labels = next(iter(sample.batches(300)))
    before, after = (
        outputs(model, "global@0", images),
        outputs(model, "global@0.93", images, batches if tuned else None),
    )
    changed = (before.argmax(1) != after.argmax(1)).nonzero().flatten()
    order = changed[before.softmax(1).amax(1)[changed].argsort(descending=True)][:12].tolist()
    shown_images, captions, title = drawn["examples"]
    assert torch.equal(shown_images, sample.images[order])
    assert captions == [
        f"{names[before[i].argmax()]} → {names[after[i].argmax()]}\n({names[labels[i]]})" for i in order
    ]
    assert title == f"{explorer.runs.options[0]}: {len(changed)} of 300 predictions change"


def test_the_pictures_say_what_they_show_and_are_as_large_as_they_say(runs):
    explorer = cb.widgets.explorer(runs, sample=100)
    assert explorer.wait()
    words = {"slice": "loss on the way", "flips": "predicted class the compression changes"}
    for name, text in words.items():
        value = getattr(explorer, name).value
        assert re.search(rf"<img alt='[^']*{text}[^']*' title='[^']*{text}", value)
        png = base64.b64decode(re.search("base64,([^']*)", value)[1])
        size = [int(number) for number in re.search(r"width='(\d+)' height='(\d+)'", value).groups()]
        assert list(struct.unpack(">II", png[16:24])) == pytest.approx(size, abs=1)
    charts = {"curve": "accuracy against sparsity", "layers": "zeros of every layer", "detail": "one layer: "}
    assert all(getattr(explorer, name).alt.startswith(text) for name, text in charts.items())
    assert explorer.widget._dom_classes == ("cram-bench-explorer",)
    assert any(texts.HINT in str(getattr(child, "value", "")) for child in explorer.widget.children)


@pytest.mark.parametrize(("pattern", "left"), [("global", []), ("2:4", ["convs.0.weight"])])
def test_zeros_are_counted_and_what_is_left_dense_is_named(runs, pattern, left):
    explorer = cb.widgets.explorer(runs, sample=100)
    explorer.pattern.value = pattern
    explorer.sparsity.value = 0.9
    assert explorer.wait()
    assert explorer.curve.rows["here"] == [{"sparsity": 50 if left else 90}]  # where the line stands
    masks = apply_(runs[0].load_model(), "2:4" if left else "global@0.9")
    assert list(masks.dense) == left
    assert f"{100 * masks.sparsity:.1f} % of {masks.count:,} prunable weights are zero" in explorer.numbers.value
    if left:
        assert f"left dense, {masks.dense_weights:,} weights: {listing(masks.dense)}" in explorer.numbers.value
    else:
        assert "no matrix is left dense" in explorer.numbers.value


def test_zeros_that_differ_are_told_apart():
    answer = lambda zeros: cb.widgets.Answer(0.5, 1.0, torch.zeros(1), torch.zeros(1), zeros, 1000, {})  # noqa: E731
    found = {label: texts.zeros(answer(zeros)) for label, zeros in (("<a>", 900), ("b", 905), ("c", 905))}
    lines = re.sub("<div.*?>|</div>", "", texts.by_run(found)).split("<br>")
    assert lines[0].startswith("&lt;a&gt;: 90.0 % of 1,000")
    assert lines[1].startswith("b; c: 90.5 % of 1,000")


def test_labels_and_layers_are_shown_as_they_are_written(runs, monkeypatch):
    monkeypatch.setattr(networks, "labelled", lambda found: {"<i>&'": found[0]})
    explorer = cb.widgets.explorer(runs, sample=100)
    assert explorer.wait()
    assert "&lt;i&gt;&amp;&#x27;</td>" in explorer.numbers.value
    assert explorer.blamed.value.count("&lt;i&gt;&amp;") == 1
    assert "<i>" not in explorer.numbers.value + explorer.blamed.value
    table = pd.DataFrame({"layer": ["<u>"], "rise": [1.0], "sparsity": [0.5]})
    assert "<b class='layer'>&lt;u&gt;</b>" in texts.blamed({"a": table}, 10)
    table = pd.DataFrame({"layer": ["dear", "cheap"], "rise": [2.0, -1.0], "sparsity": [0.1, 0.9]})
    assert "<b class='layer'>dear</b> (10 % zeros) costs most, +2.00 nats" in texts.blamed({"a": table}, 10)
    assert "&lt;b&gt;" in texts.status("<b>", "red")


def test_networks_of_different_layers_have_no_common_picture_and_it_says_so(runs):
    other = cb.runs.ensure(cb.recipes.recipe("digits", "sam", epochs=1, model="resnet20"), progress=False)
    explorer = cb.widgets.explorer([runs[0], other], sample=100)
    assert explorer.wait()
    assert "the networks differ in theirs" in explorer.blamed.value
    assert "costs most" in explorer.blamed.value
    assert not explorer.layers.spec
    assert "ready" in explorer.status.value


def test_the_thread_of_the_explorer_changes_no_setting_of_matplotlib(runs, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    met = []

    def look():
        met.append({name: mpl.rcParams[name] for name in cb.plots.STYLE})

    draw = FigureCanvasAgg.print_png

    @functools.wraps(draw)
    def watched(*arguments, **options):  # while the explorer saves a figure, a cell of the user's reads its settings
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return draw(*arguments, **options)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", watched)
    monkeypatch.setitem(mpl.rcParams, "font.size", 17.0)
    before = {name: mpl.rcParams[name] for name in cb.plots.STYLE}
    explorer = cb.widgets.explorer(runs, sample=100)
    assert explorer.wait()
    assert "ready" in explorer.status.value
    assert len(met) > 1
    assert all(found == before for found in met)
    assert {name: mpl.rcParams[name] for name in cb.plots.STYLE} == before


def test_everything_is_sent_once_more_before_it_is_ready(runs, monkeypatch):
    explorer = cb.widgets.explorer(runs, sample=60)
    assert explorer.wait()
    sent = []
    charts = ("curve", "layers", "detail")
    for name in ("numbers", "costs", "blamed", "slice", "flips", *charts):
        part = getattr(explorer, name)
        monkeypatch.setattr(
            type(part), "send_state", lambda self, key=None: sent.append((self, key, explorer.status.value))
        )
    explorer.sparsity.value = 0.61
    assert explorer.wait()
    again = [(part, key) for part, key, state in sent if "ready" not in state]
    for name in ("numbers", "costs", "blamed", "slice", "flips"):
        assert (getattr(explorer, name), "value") in again[-8:]
    for name in charts:
        assert (getattr(explorer, name), ["spec", "rows", "picked"]) in again[-8:]
