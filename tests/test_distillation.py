"""Distillation: its formula by hand, who teaches, what it costs, and that nothing changes where it is off."""

import json
import math

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cram_bench as cb
from cram_bench import runs, sweep
from cram_bench.losses import Distil, distillation
from cram_bench.recipes import recipe
from cram_bench.runs import RunError, Store, ensure
from cram_bench.runs.teachers import taught
from cram_bench.train import DivergedError, fit

Z = [[1.0, 0.0, -2.0], [0.5, 2.0, 1.0]]
TEACHER = [[2.0, 0.0, 1.0], [0.0, 0.0, 3.0]]
LABELS = [0, 2]


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def by_hand(temperature, hardness):
    """(1 − h) CE + h T² Σ p log(p/q), each averaged over the two items, in Python's floats."""
    task = soft = 0.0
    for z, t, y in zip(Z, TEACHER, LABELS, strict=True):
        q, p = softmax(z, temperature), softmax(t, temperature)
        soft += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(Z)
        task -= math.log(softmax(z, 1.0)[y]) / len(Z)
    return (1 - hardness) * task + hardness * temperature**2 * soft


@pytest.mark.parametrize(("temperature", "hardness"), [(1.0, 1.0), (2.0, 1.0), (5.5, 0.25), (0.5, 0.75)])
def test_the_loss_by_hand(temperature, hardness):
    z, t = torch.tensor(Z, dtype=torch.float64, requires_grad=True), torch.tensor(TEACHER, dtype=torch.float64)
    loss = distillation(z, t, torch.tensor(LABELS), temperature, hardness)
    assert float(loss.detach()) == pytest.approx(by_hand(temperature, hardness), rel=1e-12)
    loss.backward()
    for row, (student, teacher, label) in enumerate(zip(Z, TEACHER, LABELS, strict=True)):
        for place in range(3):  # h T (q − p) and (1 − h)(softmax(z) − y), over two items
            soft = temperature * (softmax(student, temperature)[place] - softmax(teacher, temperature)[place])
            task = softmax(student, 1.0)[place] - (place == label)
            expected = (hardness * soft + (1 - hardness) * task) / 2
            assert float(z.grad[row, place]) == pytest.approx(expected, abs=1e-12)


def test_the_published_defaults():
    assert (Distil("0" * 12).temperature, Distil("0" * 12).hardness) == (2.0, 1.0)


def tiny(method="sgd", **changes):
    return recipe("digits", method, **({"epochs": 2} | changes))


def distilled(teacher, **changes):
    return tiny(loss="distil", teacher=teacher, **changes)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """A store with one trained run, and the run."""
    store = Store(tmp_path_factory.mktemp("teacher"))
    return store, ensure(tiny(seed=5, epochs=3), store, progress=False)


def weights(run):
    return (run.path / "model.safetensors").read_bytes()


def test_hardness_0_trains_what_no_teacher_trains(lesson):
    """Bit for bit, and whoever would teach: nobody is even looked for."""
    store, teacher = lesson
    plain = ensure(tiny(), store, progress=False)
    for name in ("", "0123456789ab", teacher.id):
        soft = ensure(distilled(name, hardness=0.0), store, progress=False)
        assert weights(soft) == weights(plain)
        pd.testing.assert_frame_equal(soft.history.drop(columns="seconds"), plain.history.drop(columns="seconds"))
    assert weights(ensure(distilled(teacher.id), store, progress=False)) != weights(plain)


def test_a_teacher_by_its_id_is_that_run_in_eval_mode_on_the_students_inputs(lesson):
    store, teacher = lesson
    experiment = distilled(teacher.id, temperature=3.0, hardness=0.4)
    run = ensure(experiment, store, progress=False, threads=torch.get_num_threads())  # as `fit` below
    train, test = experiment.load_data()
    model, known = experiment.build_model(train), teacher.load_model()
    seen = []
    known.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].clone())))
    model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].clone())))
    before = {name: value.clone() for name, value in known.state_dict().items()}
    known.train()
    options = {"epochs": 2, "batch_size": 128, "schedule": experiment.schedule}
    loss = experiment.loss.taught(known)
    rows = fit(model, experiment.build_optimizer(model), train, test, loss=loss, **options)
    assert rows[-1]["train_loss"] == run.history["train_loss"].iloc[-1]
    trained = run.load_model().state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in known.state_dict().items())
    assert not any(parameter.requires_grad for parameter in known.parameters())
    steps = 2 * (len(train) // 128)
    in_training = [(student, teacher) for student, teacher in zip(seen[::2], seen[1::2], strict=True)][: steps // 2]
    for (student_trains, inputs), (teacher_trains, same) in in_training:
        assert (student_trains, teacher_trains) == (True, False)
        assert torch.equal(inputs, same)


def test_a_student_that_is_its_teacher_has_no_loss(lesson):
    _, teacher = lesson
    train, _ = teacher.experiment.load_data()
    inputs, labels = next(train.batches(64))
    loss = Distil(teacher.id).taught(teacher.load_model())
    assert abs(loss(teacher.load_model()(inputs), labels, inputs).item()) < 1e-6


def test_a_teacher_of_another_type_gets_inputs_of_its_own(lesson):
    """And the loss is of the student's type."""
    _, teacher = lesson
    inputs = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    loss = Distil(teacher.id).taught(teacher.load_model())
    logits = torch.zeros(4, 10, dtype=torch.float64, requires_grad=True)
    value = loss(logits, torch.zeros(4, dtype=torch.long), inputs)
    assert value.dtype is torch.float64
    theirs = teacher.load_model()(inputs.float()).detach().double()
    assert value.item() == pytest.approx(distillation(logits, theirs, torch.zeros(4), 2.0, 1.0).item(), rel=1e-6)


def test_the_beginning_of_an_id_and_a_file_of_weights_teach_the_same(lesson, tmp_path):
    store, teacher = lesson
    by_id = ensure(distilled(teacher.id), store, progress=False)
    assert weights(ensure(distilled(teacher.id[:6]), store, progress=False)) == weights(by_id)
    file = tmp_path / "teacher.safetensors"
    save_file(cb.models.storable(teacher.load_model()), file)
    assert weights(ensure(distilled(f"convnet={file}"), store, progress=False)) == weights(by_id)


def test_a_teacher_runs_in_the_precision_of_its_student(lesson, monkeypatch):
    """Its matrices are multiplied in bfloat16 where the student's are."""
    store, teacher = lesson
    for precision, kind in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        experiment = distilled(teacher.id, precision=precision)
        train, _ = experiment.load_data()
        loss, kinds = taught(experiment, store, train, torch.device("cpu")), []

        def note(module, inputs, output, kinds=kinds):
            kinds.append(output.dtype)

        for module in loss.network.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(note)
        inputs, labels = next(train.batches(8))
        value = loss(torch.zeros(8, 10, requires_grad=True), labels, inputs)
        assert set(kinds) == {kind}
        assert value.dtype is torch.float32


@pytest.mark.parametrize("method", ["sgd", "cram+-multi", "gmp*"])
def test_resume_in_mid_distillation(method, lesson, tmp_path, monkeypatch):
    _, teacher = lesson
    experiment = distilled(teacher.id, method=method, epochs=3)
    straight = ensure(experiment, Store(tmp_path / "straight", also=[teacher.path.parent]), progress=False)
    store, on_epoch = Store(tmp_path / "interrupted", also=[teacher.path.parent]), runs.Checkpoint.on_epoch

    def interrupted(self, fit):
        on_epoch(self, fit)
        if fit.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "on_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure(experiment, store, progress=False)
    resumed = ensure(experiment, store, progress=False)
    assert weights(resumed) == weights(straight)
    pd.testing.assert_frame_equal(resumed.history.drop(columns="seconds"), straight.history.drop(columns="seconds"))


def test_what_a_teacher_costs():
    """A forward pass is a third of a gradient, and there is one at every gradient."""
    teacher = "0" * 12
    assert distilled(teacher, epochs=6).gradients == pytest.approx(8.0)
    assert distilled(teacher, epochs=6, hardness=0.0).gradients == 6.0
    assert distilled(teacher, method="cram+-multi", epochs=3).gradients == pytest.approx(8.0)
    assert distilled(teacher, method="cram-half", epochs=6).gradients == pytest.approx(8.0)


def test_what_an_experiment_waits_for():
    teacher, start = "0" * 12, "1" * 12
    assert tiny().needs == ()
    assert distilled(teacher, start=start).needs == (start, teacher)
    assert distilled(teacher, start=teacher).needs == (teacher,)
    assert distilled("hub:somebody/something").needs == ()


def test_a_sweep_trains_the_teacher_first(tmp_path):
    store = Store(tmp_path)
    teacher = tiny(epochs=1)
    student = distilled(teacher.id, epochs=1)
    bad = tiny(epochs=1, lr=1e30)
    left = distilled(bad.id, epochs=1)
    results = sweep.run([student, left, teacher, bad], store, workers=1, device="cpu", progress=False)
    assert results["state"].tolist() == ["finished", "failed", "finished", "failed"]
    assert results["reason"][1] == f"its teacher, {bad.id}, failed"
    with pytest.raises(DivergedError, match=f"^its teacher, {bad.id}, failed$"):
        ensure(left, store, progress=False)
    with pytest.raises(RunError, match="are called '0123456789ab'"):
        sweep.run([distilled("0123456789ab")], store)


def other_classes(folder):
    for split in ("train", "test"):
        for label in ("dark", "light"):
            (folder / split / label).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (8, 8), 20 * index).save(folder / split / label / f"{index}.png")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("0123456789ab", "0 finished runs in"),
        ("resnet20", "teacher must be the id of a run, hub:NAME or NAME=FILE, not 'resnet20'"),
        ("convnat={file}", "unknown model 'convnat'; did you mean 'convnet'?"),
        ("convnet={file}", "does not fit convnet"),
        ("vit_tiny={vit}", "does not fit vit_tiny: 'positions' has shape"),
    ],
)
def test_who_is_no_teacher_is_one_line(teacher, message, tmp_path):
    torch.manual_seed(0)
    save_file(cb.models.storable(cb.models.create("convnet", 7, 1, 8)), tmp_path / "seven.safetensors")
    save_file(cb.models.storable(cb.models.create("vit_tiny", 10, 1, 32)), tmp_path / "vit.safetensors")
    name = teacher.format(file=tmp_path / "seven.safetensors", vit=tmp_path / "vit.safetensors")
    with pytest.raises((ValueError, RunError)) as caught:
        ensure(distilled(name), Store(tmp_path / "runs"), progress=False)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "runs" / ".training").exists() or not list((tmp_path / "runs" / ".training").iterdir())


def test_a_teacher_of_other_classes_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other_classes(tmp_path / "grey")
    store = Store(tmp_path / "runs")
    shades = ensure(recipe("grey", model="convnet", epochs=1, augment=False), store, progress=False)
    with pytest.raises(ValueError, match="knows the classes of .*grey.*: take one that was trained on 'digits'$"):
        ensure(distilled(shades.id), store, progress=False)
    train, _ = tiny().load_data()
    logits, labels = torch.zeros(4, 10), train.labels[:4]
    images = torch.zeros(4, 1, 8, 8)
    with pytest.raises(ValueError, match="as many classes as the student, 10, not 2$"):
        Distil(shades.id).taught(shades.load_model())(logits, labels, images)
    # a network of the right data and the wrong outputs
    monkeypatch.setattr(runs.Run, "load_model", lambda self: cb.models.create("convnet", 7, 1, 8))
    digits = ensure(tiny(epochs=1), store, progress=False)
    with pytest.raises(ValueError, match=f"^teacher '{digits.id}' must have the 10 classes of the data, not 7$"):
        ensure(distilled(digits.id), store, progress=False)
    monkeypatch.setattr(runs.Run, "load_model", lambda self: torch.nn.Linear(3, 10))
    with pytest.raises(ValueError, match=f"^teacher '{digits.id}' cannot take images of 1 × 8 × 8: mat1 and mat2"):
        ensure(distilled(digits.id), store, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "needs a teacher: the id of a run"),
     ({"teacher": "a" * 12, "temperature": 0.0}, "temperature must be positive"),
     ({"teacher": "a" * 12, "hardness": 1.5}, r"hardness must be in \[0, 1\]")],
)  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        Distil(**settings)
    assert len(str(caught.value).splitlines()) == 1


def test_a_loss_whose_teacher_was_forgotten_is_one_line():
    model = cb.models.create("convnet", 10, 1, 8)
    with pytest.raises(ValueError, match=r"has no teacher at hand: give fit loss.taught\(model\)"):
        fit(model, torch.optim.SGD(model.parameters(), 0.1), cb.data.load("digits")[0], epochs=1, batch_size=64,
            loss=Distil("a" * 12))  # fmt: skip
    with pytest.raises(TypeError, match="teacher must be a torch model"):
        Distil("a" * 12).taught("a" * 12)


def test_a_classifier_of_the_hub_teaches_its_own_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")

    def save(folder, words, kind, **more):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        transformers.BertTokenizer(str(tmp_path / folder / "vocab.txt")).save_pretrained(tmp_path / folder)
        config = transformers.BertConfig(
            vocab_size=5 + len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            **more,
        )  # fmt: skip
        kind(config).save_pretrained(tmp_path / folder)
        return f"hub:{tmp_path / folder}"

    torch.manual_seed(0)
    whole = transformers.BertForSequenceClassification
    mine = save("teacher", ["good", "bad"], whole, num_labels=3)
    reader = save("reader", ["good", "bad"], transformers.BertModel)
    network = cb.models.Classifier(mine, reader).eval()
    ids = torch.tensor([[2, 5, 3], [2, 3, 0]])
    expected = (
        whole.from_pretrained(tmp_path / "teacher").eval()(input_ids=ids, attention_mask=(ids != 0).long()).logits
    )
    assert torch.equal(network(ids), expected)
    other = save("other", ["good", "awful"], transformers.BertModel)
    with pytest.raises(ValueError, match="reads other tokens than"):
        cb.models.Classifier(mine, other)

    class Run:  # a run on the same sentences, of an encoder that reads them in other tokens
        experiment = recipe("sst2", model=other)

    class Runs:
        root, open = tmp_path, staticmethod(lambda name: Run)

    student = recipe("sst2", model=reader, loss="distil", teacher="0123456789ab")
    with pytest.raises(ValueError, match="reads other tokens than"):
        taught(student, Runs, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="has no trained classifier: 'classifier"):
        cb.models.Classifier(reader, reader)


def test_settings_go_there_and_back():
    experiment = distilled("0123456789ab", temperature=4.0)
    settings = json.loads(json.dumps(experiment.settings()))
    assert settings["loss.teacher"] == "0123456789ab"
    assert cb.experiment.Experiment.of(settings) == experiment
    assert experiment.id != distilled("0123456789ab").id != tiny().id
