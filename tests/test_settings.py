"""Settings as parts: checked strictly, named flatly, hashed as ever; a new part needs its own file and one line."""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import torch

import cram_bench as cb
from cram_bench import experiment, optim
from cram_bench.experiment import KINDS, Experiment, differing, names, setting
from cram_bench.recipes import METHODS, methods, recipe
from cram_bench.settings import ORIGINAL, Count, NotNegative, Part, Positive, Texts, meanings


@dataclass(frozen=True)
class Noisy(optim.Step):
    """A plain step with noise on the gradient, invented for these tests."""

    kind: ClassVar[str] = "noisy"

    sigma: NotNegative = 0.5
    """Standard deviation of the noise, in units of the gradient."""
    every: Count = 2
    """Steps from one noisy gradient to the next."""

    def wrap(self, model, base, seed):
        base.noise = (self.sigma, self.every, seed)
        return base


@pytest.fixture
def noisy(monkeypatch):
    """What a new file and its line in `STEPS` do."""
    monkeypatch.setitem(optim.STEPS, "noisy", Noisy)
    monkeypatch.setitem(METHODS, "noisy", methods.Method("noisy", {"step": "noisy"}))


def test_a_new_part_is_set_named_hashed_and_read_back(noisy):
    new = recipe("digits", "noisy")
    assert isinstance(new.step, Noisy)
    assert new.changed() == {"method": "noisy", "step": "noisy", "warmup_epochs": 0.5}
    changed = recipe("digits", "noisy", sigma=0.1)
    assert changed == recipe("digits", "noisy", **{"step.sigma": 0.1}) == new.but(sigma=0.1)
    assert changed.changed() == new.changed() | {"step.sigma": 0.1}
    assert changed.id != new.id
    assert Experiment.of(changed.settings()) == changed
    assert new.but(every=3).build_optimizer(torch.nn.Linear(2, 2)).noise == (0.5, 3, 0)
    assert {"step.sigma", "step.every"} < set(names())
    rows = {row["setting"]: row for row in cb.recipes.settings("noisy")}
    assert rows["step.sigma"] == {
        "setting": "step.sigma", "type": "float", "default": "0.5",
        "meaning": "Standard deviation of the noise, in units of the gradient.",
    }  # fmt: skip
    assert differing([new, changed]) == ["step.sigma"]
    asked = {"methods": ["noisy"], "grid": {"sigma": [0.1, 0.5]}}
    assert cb.sweep.experiments(asked) == [changed, new]
    assert cb.sweep.experiments({**asked, "grid": {"step.sigma": [0.1, 0.5]}}) == [changed, new]
    assert (setting(changed, "step.sigma"), setting(recipe("digits"), "step.sigma")) == (0.1, "")


def test_a_new_part_moves_no_other_and_gives_its_settings_to_no_other(noisy):
    assert recipe("digits", "sam").id == Experiment.of(recipe("digits", "sam").settings()).id
    with pytest.raises(ValueError, match=r"^method 'sam' has no setting 'sigma': it belongs to the step noisy$"):
        recipe("digits", "sam", sigma=0.1)
    with pytest.raises(ValueError, match=r"^sigma must be not negative, not -1.0$"):
        recipe("digits", "noisy", sigma=-1.0)
    with pytest.raises(TypeError, match=r"^every must be of type int, not 1.5$"):
        recipe("digits", "noisy", every=1.5)
    with pytest.raises(ValueError, match="unknown setting 'sigmo'; did you mean"):
        recipe("digits", "noisy", sigmo=1.0)


@dataclass(frozen=True)
class Signs(optim.bases.Base):
    """A base optimizer with defaults of its own, invented for these tests."""

    kind: ClassVar[str] = "signs"

    lr: Positive = 1e-4
    """Peak learning rate, positive."""
    every: Count = 1
    """Steps from one update to the next."""

    def build(self, model):
        return torch.optim.SGD(model.parameters(), self.lr)


@dataclass(frozen=True)
class Climbing(optim.Step):
    """A step with another default for a name of before there were parts."""

    kind: ClassVar[str] = "climbing"

    rho: NotNegative = 0.5
    """Ascent radius."""

    def wrap(self, model, base, seed):
        return base


@pytest.fixture
def others(monkeypatch, noisy):
    for kinds, part in ((optim.BASES, Signs), (optim.STEPS, Climbing)):
        monkeypatch.setitem(kinds, part.kind, part)
        monkeypatch.setitem(METHODS, part.kind, methods.Method(part.kind, {part.role: part.kind}))


def test_a_new_part_has_the_defaults_that_it_says(others, tmp_path):
    """And not those of other parts of before, under the same names: neither on images nor on sentences."""
    for dataset in ("digits", "cifar10", "sst2"):
        assert recipe(dataset, "signs").optimizer == Signs()
        assert recipe(dataset, "climbing").step == Climbing()
    assert Experiment.of({"method": "signs", "optimizer": "signs"}).optimizer == Signs()
    assert recipe("digits", "climbing").changed()["rho"] == 0.5  # so the id tells it
    assert cb.recipes.imagenet_resnet50("imagenet", "signs").optimizer == Signs()
    for index in range(16):
        (tmp_path / "train" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "ab"[index % 2] / f"{index}.png").touch()
    small = recipe(str(tmp_path), "signs")
    assert (small.batch_size, small.optimizer) == (2, Signs())  # only SGD's rate goes with the batch
    rows = {row["setting"]: row["default"] for row in cb.recipes.settings("signs")}
    assert (rows["lr"], rows["optimizer.every"]) == ("0.0001", "1")


def test_the_defaults_of_a_part_are_those_of_its_recipe():
    """Who composes by hand trains what who names the method does."""
    assert recipe("digits", "adamw").optimizer == optim.bases.AdamW()
    assert recipe("digits", "sgd").optimizer == optim.bases.SGD()
    for kind in ("sam", "momentum-sam", "cram", "cram+"):
        assert recipe("digits", kind).step == optim.STEPS[kind]()
    assert recipe("digits", "cram-single").step.rho == optim.STEPS["cram-single"]().rho
    bare = Experiment()  # of what is no method: the data set, the loss, the pruning, the schedule
    assert all(part == type(part)() for part in bare.parts)


def test_settings_of_one_name_are_told_apart(others, monkeypatch):
    both = recipe("digits", "noisy", optimizer="signs")
    with pytest.raises(ValueError, match=r"^'every' may mean optimizer.every or step.every: say which$"):
        both.but(every=5)
    told = both.but(**{"step.every": 5})
    assert (told.step.every, told.optimizer.every) == (5, 1)
    assert len({both.id, told.id, both.but(**{"optimizer.every": 5}).id}) == 3
    with pytest.raises(ValueError, match=r"^'step.sigma' is given twice, for 'sigma' means it too$"):
        recipe("digits", "noisy", **{"sigma": 0.1, "step.sigma": 0.2})

    @dataclass(frozen=True)
    class Seeded(optim.Plain):
        """It takes a name from every experiment."""

        kind: ClassVar[str] = "seeded"

        seed: int = 0

    monkeypatch.setitem(optim.STEPS, "seeded", Seeded)
    message = r"^'seed' is a setting of two parts, every experiment and step seeded: one of them needs another name$"
    for made in (lambda: Experiment.of({"step": "seeded", "method": "x"}), lambda: Experiment(step=Seeded())):
        with pytest.raises(ValueError, match=message):
            made()


def test_the_kind_of_every_part_is_in_the_id(monkeypatch):
    @dataclass(frozen=True)
    class Smooth(cb.losses.CrossEntropy):
        kind: ClassVar[str] = "smooth"

    @dataclass(frozen=True)
    class Constant(cb.schedules.Schedule):
        kind: ClassVar[str] = "constant"

    monkeypatch.setitem(cb.losses.LOSSES, "smooth", Smooth)
    monkeypatch.setitem(cb.schedules.SCHEDULES, "constant", Constant)
    loss, schedule = (Experiment.of(made) for made in ({"loss": "smooth"}, {"schedule": "constant"}))
    assert (loss.changed(), schedule.changed()) == ({"loss": "smooth"}, {"schedule": "constant"})
    assert Experiment.of(loss.settings()).loss == Smooth()
    assert len({loss.id, schedule.id, Experiment().id}) == 3


def test_what_a_part_lacks_is_compared_as_files_of_before_have_it():
    sgd, sam = recipe("digits", "sgd"), recipe("digits", "sam")
    assert (setting(sgd, "rho"), setting(sgd, "ramp"), setting(sgd, "compressors")) == (0.0, False, [])
    assert differing([sgd, sgd.but(seed=1)]) == ["seed"]
    assert differing([sgd, sgd.but(seed=1), sam], besides=["seed"]) == ["method", "rho"]
    assert differing([sgd, sam.but(rho=0.0)]) == ["method"]


def test_every_step_and_optimizer_is_a_method():
    assert (optim.STEPS.keys() - {"plain"}) | optim.BASES.keys() <= METHODS.keys()
    for kinds in KINDS.values():
        for kind, part in kinds.items():
            assert part.kind == kind
            assert all(text and text[-1] == "." for text in (meanings(part)[name] for name in part.flat()))


def test_old_files_hold_settings_that_no_part_has_and_only_at_their_defaults():
    assert Experiment.of(dict(ORIGINAL)) == Experiment()
    with pytest.raises(ValueError, match=r"^method 'sgd' has no setting 'rho': it belongs to the step sam"):
        Experiment.of(dict(ORIGINAL) | {"rho": 0.1})
    with pytest.raises(ValueError, match="has no setting 'rho'"):  # what is asked for now is not passed over
        Experiment().but(rho=0.0)


def test_but_changes_kinds_and_keeps_what_both_have():
    sam = recipe("digits", "sam", rho=0.3, lr=0.7)
    other = sam.but(optimizer="adamw")
    assert isinstance(other.optimizer, optim.bases.AdamW)
    assert (other.optimizer.lr, other.step.rho, other.method) == (0.7, 0.3, "sam")
    assert "momentum" not in other.settings()
    plain = sam.but(method="sgd")
    assert isinstance(plain.step, optim.Plain)
    assert plain.but(method="sam", rho=0.3) == sam
    assert sam == recipe("digits", "sam", rho=0.3, lr=0.7)  # untouched


@dataclass(frozen=True)
class Anything(Part):
    """For the checks."""

    role: ClassVar[str] = "step"
    kind: ClassVar[str] = "anything"

    rate: Positive = 1.0
    names: Texts = ()
    sure: bool = False


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rate": 0}, ValueError, "rate must be positive, not 0"),
        ({"rate": True}, TypeError, "rate must be of type float, not True"),
        ({"rate": float("inf")}, ValueError, "rate must be positive, not inf"),
        ({"rate": "1"}, TypeError, "rate must be of type float, not '1'"),
        ({"names": "a"}, TypeError, "names must be a list of strings, not 'a'"),
        ({"names": [1]}, TypeError, "names must be a list of strings, not [1]"),
        ({"names": ["a\0"]}, TypeError, "names must be a list of strings, not ['a\\x00']"),
        ({"sure": 1}, TypeError, "sure must be of type bool, not 1"),
        ({"sure": None}, TypeError, "sure must be of type bool, not None"),
    ],
)
def test_a_wrong_value_is_one_line(changes, error, message):
    with pytest.raises(error) as caught:
        Anything(**changes)
    assert str(caught.value) == message


def test_right_values_become_those_of_the_annotation():
    found = Anything(rate=2, names=["a", "b"])
    assert found == Anything(rate=2.0, names=("a", "b"))
    assert (type(found.rate), found.settings()) == (
        float,
        {"step.rate": 2.0, "step.names": ["a", "b"], "step.sure": False},
    )


def test_any_number_of_methods_is_told_apart(monkeypatch):
    for number in range(60):
        monkeypatch.setitem(METHODS, f"m{number}", methods.Method(f"M{number}"))
    looks = [(*cb.plots.look(method)[1:], cb.plots._style.dashes(method)) for method in METHODS]
    assert len(set(looks)) == len(METHODS) > 60
    again = len(cb.plots._style._PALETTE)
    for start in range(0, len(looks) - 2 * again, again):
        one, other = looks[start : start + again], looks[start + again : start + 2 * again]
        assert len({colour for colour, *_ in one}) == again
        alike = [(a, b) for a in one for b in other if a[0] == b[0]]
        assert len(alike) == again
        for first, second in alike:  # where the colours begin again, all else is another
            assert first[1] != second[1]
            assert first[2] != second[2]


def test_a_method_of_the_second_round_of_colours_has_another_line(monkeypatch):
    """In the figure that everybody looks at first, and not only by its marker."""
    for number in range(len(cb.plots._style._PALETTE)):
        monkeypatch.setitem(METHODS, f"m{number}", methods.Method(f"M{number}"))
    again = list(METHODS)[len(cb.plots._style._PALETTE) :]
    late = next(method for method in again if cb.plots.look(method)[1] == cb.plots.look("sgd")[1])
    columns = {"sparsity": [0.0, 0.9] * 2, "pattern": "global", "calibrated": False, "accuracy": 0.5, "seed": 0}
    figure = cb.plots.accuracy_vs_sparsity(pd.DataFrame(columns | {"method": ["sgd"] * 2 + [late] * 2}))
    lines = [line for line in figure.axes[0].lines if line.get_label() in ("SGD", METHODS[late].label)]
    assert len({line.get_color() for line in lines}) == 1
    assert [line.get_linestyle() for line in lines] == ["-", "--"]


def test_an_old_checkpoint_has_no_callbacks_and_a_new_one_keeps_their_state():
    train, _ = cb.data.load("digits")

    class Counting(cb.callbacks.Callback):
        count = 0

        def on_epoch(self, fit):
            self.count += 1
            self.saved = fit.state_dict()

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    class Resumed(cb.callbacks.Callback):
        def __init__(self, state):
            self.state = state

        def on_start(self, fit):
            fit.load_state_dict(self.state)

    def trained(epochs, *callbacks):
        model = experiment.Experiment().build_model(train)
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        return cb.train.fit(model, base, train, epochs=epochs, batch_size=256, callbacks=callbacks)

    first = Counting()
    trained(1, first)
    assert first.saved["callbacks"] == {"Counting": {"count": 1}}
    second = Counting()
    trained(3, Resumed(first.saved), second)
    assert second.count == 3
    old = {name: value for name, value in first.saved.items() if name != "callbacks"}
    third = Counting()
    assert [row["epoch"] for row in trained(2, Resumed(old), third)] == [1, 2]
    assert third.count == 1


def test_every_callback_gets_its_own_state_back():
    """Whatever their order then and now, and also where two are of one class."""

    class Other(cb.callbacks.Callback):
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    class Another(Other):
        pass

    model = torch.nn.Linear(2, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0)

    def state(*callbacks):
        return cb.train.Fit(model, base, scheduler, 1, 1, callbacks=callbacks)

    saved = state(Other(1), Another(2), Other(3)).state_dict()
    assert list(saved["callbacks"]) == ["Other", "Another", "Other 2"]
    fresh = [Another(0), Other(0), cb.callbacks.Callback(), Other(0)]
    state(*fresh).load_state_dict(saved)
    assert [callback.value for callback in fresh if isinstance(callback, Other)] == [2, 1, 3]


def test_the_method_of_contributing_is_one_file_and_one_line(tmp_path, monkeypatch):
    """What CONTRIBUTING shows is run as it stands there: its file, and the line that lists it."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tmp_path / "noisy_of_contributing.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1))
    monkeypatch.syspath_prepend(tmp_path)
    step = importlib.import_module("noisy_of_contributing").NoisyStep
    monkeypatch.setitem(optim.STEPS, step.kind, step)
    monkeypatch.setitem(METHODS, step.kind, methods.Method(step.kind, {"step": step.kind}))
    run = cb.runs.ensure(recipe("digits", "noisy", epochs=1, sigma=0.2), progress=False)
    assert cb.runs.Store().open(run.id).experiment.step == step(sigma=0.2)
    assert run.history["train_loss"].notna().all()
    plain = cb.runs.ensure(recipe("digits", "sgd", epochs=1), progress=False)
    assert run.history["train_loss"].iloc[0] != plain.history["train_loss"].iloc[0]
    assert {row["setting"] for row in cb.recipes.settings("noisy")} >= {"step.sigma", "step.every"}
