"""What the notebooks do between the library's calls: their cells, run in this process, against the same calls here.

Two seeds, so that one that is dropped or mistaken shows, and sizes of which no two are alike.
"""

import json

import pandas as pd
import pytest
from PIL import Image

import cram_bench as cb
from cram_bench import probes, report

LEVELS = ["global@0.5", "global@0.9"]
SMALL = {"methods": ["sgd", "sam"], "seeds": 2, "epochs": 1, "sparsities": [0.5, 0.9]}


@pytest.fixture
def execute(monkeypatch):
    """Return a function that runs a notebook's cells and returns (its tables, what its figures were drawn from)."""
    tables, drawn = {}, {}
    monkeypatch.setattr(
        report.Output, "table", lambda self, table, name: (tables.update({name: table.copy()}), table)[1]
    )
    monkeypatch.setattr(report.Output, "figure", lambda *_, **__: None)
    for name in set(cb.plots.__all__) - {"STYLE", "look", "style"}:
        monkeypatch.setattr(cb.plots, name, lambda *given, _name=name, **how: drawn.update({_name: (given, how)}))

    def run(stem, **parameters):
        cells = json.loads((report.notebooks_folder() / f"{stem}.ipynb").read_text())["cells"]
        namespace = {"In": [""]}  # what was executed, as IPython keeps it: the parameters are read from it
        for cell in cells:
            if cell["cell_type"] == "code":
                namespace["In"].append("".join(cell["source"]))
                exec(namespace["In"][-1], namespace)
                if "parameters" in cell["metadata"].get("tags", []):
                    assert parameters.keys() <= namespace.keys()
                    namespace.update(parameters)
        return tables, drawn

    return run


def others(tables, ours):
    """Names of the tables that are not those that were made here."""
    found = []
    for name, table in ours.items():
        try:
            pd.testing.assert_frame_equal(tables[name], table, rtol=1e-4, atol=1e-6, check_dtype=False)
        except (AssertionError, KeyError):
            found.append(name)
    return found


def data(experiment, images=2000):
    train, test = experiment.load_data()
    return train, test, train.calibration(images, augment=experiment.data.augment)


def test_accuracy_vs_sparsity(execute):
    tables, drawn = execute("accuracy_vs_sparsity", **SMALL, patterns=["uniform", "2:4"], calibration=300)
    experiments = cb.recipes.grid("digits", ["sgd", "sam"], 2, epochs=1)
    runs = cb.runs.ensure_all(experiments, progress=False)
    _, test, calibrating = data(experiments[0], 300)
    curves = probes.over_runs(runs, probes.sparsity_curve, test, ["uniform@0.5", "uniform@0.9", "2:4"], calibrating)
    summary = probes.accuracy_table(curves, pattern="uniform")
    ours = {"accuracy_vs_sparsity": curves, "accuracy_summary": summary, "runs": cb.runs.summary(runs)}
    assert others(tables, ours) == []
    assert list(summary) == ["dense", "50 %", "90 %", "2:4"]
    assert drawn["accuracy_vs_sparsity"][1] == {"pattern": "uniform", "chance": test.majority}
    few = {"methods": ["sgd"], "seeds": 1, "epochs": 1, "sparsities": [0.5], "patterns": ["uniform", "global"]}
    tables, drawn = execute("accuracy_vs_sparsity", **few, calibration=300)
    assert drawn["accuracy_vs_sparsity"][1]["pattern"] == "global"  # wherever it stands
    assert others(tables, {"accuracy_summary": probes.accuracy_table(tables["accuracy_vs_sparsity"])}) == []


def test_loss_stability(execute):
    sizes = {"sample": 60, "curvature_sample": 20, "directions": 2, "rho": 0.13, "radii": [0.03, 0.05], "ball": 0.3}
    tables, drawn = execute("loss_stability", **SMALL, **sizes)
    experiments = cb.recipes.grid("digits", ["sgd", "sam"], 2, epochs=1)
    runs = cb.runs.ensure_all(experiments, progress=False)
    train, _, calibrating = data(experiments[0])
    part = train.sample(60, seed=0)
    few = part.sample(20, seed=0)
    slices = probes.over_runs(runs, probes.loss_in_ball, part, radius=0.3, directions=2)
    claims = probes.over_runs(runs, probes.stability, part, "global@0.9", calibrating, rho=0.13, few=few)
    claims = probes.with_random_directions(claims, slices)
    decided = probes.verdicts(claims, ["sam"], "sgd")
    ours = {
        "cram_gap": probes.over_runs(runs, probes.cram_gap, part, LEVELS, rho=0.13, calibration=calibrating),
        "loss_along_compression": probes.over_runs(runs, probes.loss_along_compressions, part, LEVELS),
        "sam_sharpness": probes.over_runs(runs, probes.sam_sharpness, part, [0.03, 0.05]),
        "loss_in_ball": slices,
        "loss_in_plane": probes.over_runs(runs[::2], probes.loss_in_plane, part, radius=0.3, points=11),  # seed 0
        "stability": claims,
        "verdicts": decided,
        "verdicts_summary": probes.verdict_table(decided),
    }
    assert [(run.experiment.method, run.experiment.seed) for run in runs[::2]] == [("sgd", 0), ("sam", 0)]
    assert others(tables, ours) == []
    figures = {
        "gaps": "cram_gap",
        "sharpness": "sam_sharpness",
        "loss_planes": "loss_in_plane",
        "stability": "stability",
    }
    assert all(drawn[figure][0][0].equals(tables[name]) for figure, name in figures.items())


def test_equal_cost(execute):
    tables, drawn = execute("equal_cost", **SMALL, calibration=300)
    at_epochs, at_cost = cb.recipes.equal_cost("digits", ["sgd", "sam"], 2, "", 1)
    runs = cb.runs.ensure_all(list(dict.fromkeys([*at_epochs, *at_cost])), progress=False)
    _, test, calibrating = data(at_epochs[0], 300)
    settings = ["epochs", "gradients", "id"]
    curves = probes.over_runs(runs, probes.sparsity_curve, test, LEVELS, calibrating, settings=settings)
    equal_epochs = curves[curves["epochs"] == 1]  # of SGD and SAM
    equal_cost = curves[curves["gradients"] == 2]  # SAM again, and SGD of two epochs
    ours = {
        "accuracy_by_cost": curves,
        "accuracy_at_equal_epochs": probes.accuracy_table(equal_epochs),
        "equal_cost_summary": probes.accuracy_table(equal_cost),
    }
    assert others(tables, ours) == []
    assert others(dict(enumerate(drawn["equal_cost"][0])), {0: equal_epochs, 1: equal_cost}) == []
    assert tables["equal_cost_runs"]["gradients"].tolist() == [run.experiment.gradients for run in runs]


def test_ablations(execute):
    small = {key: value for key, value in SMALL.items() if key != "methods"}
    tables, drawn = execute("ablations", **small, only=["without +"], calibration=300)
    variants = cb.recipes.ablations("digits", 2, "", 1, ["without +"])
    runs = {name: cb.runs.ensure_all(experiments, progress=False) for name, experiments in variants.items()}
    _, test, calibrating = data(variants["CrAM+-Multi"][0], 300)
    curves = probes.over_changes(runs, probes.over_runs, probes.sparsity_curve, test, LEVELS, calibrating)
    tuned = curves[curves["calibrated"] == (curves["sparsity"] > 0)]  # and the dense ones untuned
    shown = tables["ablations_summary"]
    for name, own in tuned.groupby("changed"):
        means = own.groupby("sparsity")["accuracy"].mean()
        assert shown.loc[name].tolist() == [f"{100 * mean:.1f}" for mean in means]
    assert list(shown.index) == list(drawn["ablations"][0][0].index) == ["CrAM+-Multi", "without +"]
    spread = curves[curves["calibrated"] | (curves["sparsity"] == 0)]
    spread = probes.mean_and_std(spread, "accuracy", ["changed", "sparsity", "calibrated"])
    assert others(tables, {"ablations": curves, "ablations_spread": spread}) == []


def test_transfer(execute, tmp_path, monkeypatch):
    for split, count in (("train", 8), ("test", 4)):
        for shade, label in enumerate(("dark", "light")):
            (tmp_path / "grey" / split / label).mkdir(parents=True)
            for index in range(count):
                picture = Image.new("L", (8, 8), 20 * index + 100 * shade)
                picture.save(tmp_path / "grey" / split / label / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    tables, drawn = execute("transfer", **SMALL, dataset="digits", target="grey", target_epochs=2)
    sources, tuned = cb.recipes.transfer("digits", "grey", ["sgd", "sam"], 2, [0.5, 0.9], "", 1, 2)
    runs = cb.runs.ensure_all([*sources, *tuned], progress=False)
    methods = {source.id: source.method for source in sources}
    rows = [
        (methods[run.experiment.start], run.experiment.seed,
         float((run.experiment.pruning.prune or "@0").split("@")[1]), run.history["test_accuracy"].iloc[-1])
        for run in runs[len(sources) :]
    ]  # fmt: skip
    accuracy = pd.DataFrame(rows, columns=["method", "seed", "sparsity", "accuracy"])
    accuracy = accuracy.assign(lr=0.01, held_out=float("nan"))
    laid_out = accuracy.assign(pattern="global", calibrated=accuracy["sparsity"] > 0)
    ours = {"transfer": accuracy, "transfer_summary": probes.accuracy_table(laid_out)}
    assert others(tables, ours) == []
    assert drawn["transfer"][1] == {"chance": 0.5}
    assert drawn["transfer"][0][1] == "grey"
    choice = {"target_images": 6, "rates": [0.01, 0.1], "held_out": 4, "target_precision": "float32"}
    found = execute("transfer", **SMALL, dataset="digits", target="grey", target_epochs=2, **choice)[0]["transfer"]
    assert len(found) == len(accuracy)
    assert found["held_out"].notna().all()
    assert set(found["lr"]) <= {0.01, 0.1}


def test_language(execute, monkeypatch):
    """Its cells on digits, for a pretrained encoder is not always there."""
    asked = []
    monkeypatch.setattr(
        cb.recipes,
        "language",
        lambda *given, precision: (
            asked.append((*given, precision)) or cb.recipes.grid("digits", given[1], given[2], epochs=given[4])
        ),
    )
    tables, _ = execute("language", **SMALL)
    assert asked == [("sst2", ["sgd", "sam"], 2, "", 1, "")]
    runs = cb.runs.ensure_all(cb.recipes.grid("digits", ["sgd", "sam"], 2, epochs=1), progress=False)
    curves = probes.over_runs(runs, probes.sparsity_curve, data(runs[0].experiment)[1], LEVELS)
    ours = {"language_curves": curves, "language_summary": probes.accuracy_table(curves, calibrated=False)}
    assert others(tables, ours) == []


def test_anatomy(execute):
    """Which of the networks each part looks at, and where the ends of its lines are."""
    small = {"epochs": 1, "target_epochs": 1, "sparsity": 0.8, "sample": 60, "curvature_sample": 20, "points": 3}
    tables, drawn = execute("anatomy", **small, sizes=[20, 30], radii=[0.1], ball=0.3)
    experiments = cb.recipes.anatomy("digits", ["sgd", "cram+-multi"], "", 1, 0.8, 1)
    other, dense, tuned = (run.load_model() for run in cb.runs.ensure_all(experiments, progress=False))
    train, test, calibrating = data(experiments[1])
    part = train.sample(60, seed=0)
    pruned = cb.compress.compressed(dense, "global@0.8")
    cb.compress.tune_batchnorm(pruned, calibrating)
    around, few = {"dense": dense, "pruned": pruned}, part.sample(20, seed=0)
    planes = [probes.loss_in_plane(m, part, 0.3, 3).assign(method=name, seed=0) for name, m in around.items()]
    spectra = [
        probes.spectral_density(m, few, lanczos=16, repeats=1).assign(method=name, seed=0) for name, m in around.items()
    ]
    lines = [probes.loss_along_path(other, dense, part, 3, calibration=tuning) for tuning in (None, calibrating)]
    ours = {
        "layer_sensitivity": probes.layer_sensitivity(dense, part),
        "weight_histogram": probes.weight_histogram(dense),
        "planes": pd.concat(planes, ignore_index=True),
        "plane_through_three": probes.loss_on_plane(dense, pruned, tuned, part, points=3)[0],
        "path": pd.concat(
            [line.assign(method=name, seed=0) for name, line in zip(("untuned", "tuned"), lines, strict=True)],
            ignore_index=True,
        ),
        "spectral_density": pd.concat(spectra, ignore_index=True),
    }
    assert others(tables, ours) == []
    assert drawn["loss_along_path"][0][1] == ("SGD", "CrAM+-Multi")
    assert drawn["layer_profile"][0][0]["cram+-multi"].equals(tables["layer_blame"])
    changed = tables["flips"]["index"].head(12).tolist()
    assert changed
    assert drawn["examples"][0][0].equal(test.take(changed).images)
    labels, before, _ = probes.predictions(dense, test)
    _, after, _ = probes.predictions(pruned, test)
    called = [f"{test.classes[before[i]]} → {test.classes[after[i]]}\n({test.classes[labels[i]]})" for i in changed]
    assert drawn["examples"][0][1] == called


PRUNED = {"pruners": ["global", "greedy(gradients=16)"], "corrections": ["none", "batchnorm"], "calibration": 300}


def without_times(tables):
    return {name: table.drop(columns="seconds", errors="ignore") for name, table in tables.items()}


@pytest.mark.parametrize("notebook", ["better_pruner", "second_order"])
def test_pruners_against_each_other(notebook, execute):
    tables, drawn = execute(notebook, **SMALL, **PRUNED, held_out=250)
    experiments = cb.recipes.grid("digits", ["sgd", "sam"], 2, epochs=1)
    runs = cb.runs.ensure_all(experiments, progress=False)
    train, test, _ = data(experiments[0])
    looked_at, unseen = train.split(250, seed=1)
    specs = [f"{pruner}@{level}" for pruner in PRUNED["pruners"] for level in (0.5, 0.9)]
    table = probes.over_runs(
        runs, probes.pruners, test, specs, looked_at.calibration(300), looked_at, unseen, PRUNED["corrections"]
    )
    ours = {notebook: table, f"{notebook}_summary": probes.pruner_table(table)}
    if notebook == "better_pruner":
        chosen = probes.chosen_by_loss(table)
        ours[f"{notebook}_chosen"] = chosen[["method", "seed", "sparsity", "chosen", "accuracy", "held_out_loss"]]
        ours[f"{notebook}_against"] = probes.chosen_against(table)
    else:
        costs = table[table["sparsity"] > 0].groupby("pattern", sort=False)[["gradients"]].mean()
        ours[f"{notebook}_costs"] = costs.reset_index()
    assert others(without_times(tables), without_times(ours)) == []
    assert drawn["pruners"][1] == ({} if notebook == "better_pruner" else {"by": "correction"})
    assert drawn["pruners"][0][0].equals(tables[notebook])


def test_gradual(execute):
    options = SMALL | {"methods": ["sgd", "cram+-multi", "gmp*"], "distilled": ["gmp*"]}
    tables, drawn = execute("gradual", **options, pruners=["global", "greedy(gradients=16)"], calibration=300)
    experiments = cb.recipes.prices("digits", options["methods"], 2, [0.5, 0.9], ["gmp*"], epochs=1)
    runs = cb.runs.ensure_all(experiments, progress=False)
    train, test, calibrating = data(experiments[0], 300)
    table = probes.prices(runs, test, [0.5, 0.9], calibrating, train, ["global", "greedy(gradients=16)"])
    assert others(tables, {"gradual": table, "gradual_summary": probes.price_table(table)}) == []
    assert others({"drawn": drawn["prices"][0][0]}, {"drawn": table}) == []
    shown = tables["gradual_runs"]
    assert shown["gradients"].tolist() == [experiment.gradients for experiment in experiments]
    assert shown["sparsity"].tolist() == [0, 0, 0, 0, *[0.5, 0.9] * 4]


def test_speed(execute, monkeypatch):
    """Accuracies are those of the library; times are a clock's, and every network is there once a way and asking."""
    monkeypatch.setattr(cb.deploy, "write_onnx", lambda *_, **__: pytest.fail("asked for without the extra"))
    monkeypatch.setattr(probes.speeds.__globals__["importlib"].util, "find_spec", lambda name, *_: None)
    options = {"sparsities": [0.9], "speedups": [1.05], "samples": 32, "trials": 1, "calibration": 300, "repeats": 1}
    tables, drawn = execute("speed", **options, epochs=1)
    (experiment,) = cb.recipes.speed("digits", ["sgd"], 1, epochs=1)
    (run,) = cb.runs.ensure_all([experiment], progress=False)
    assert experiment.model == "resnet20"
    _, test, calibration = data(experiment, 300)
    curve = probes.sparsity_curve(run.load_model(), test, ["global@0", "global@0.9", "2:4"], calibration)
    (table,) = drawn["speeds"][0]
    assert table["kind"].tolist() == ["float32", "bfloat16", "sparse", "2:4", "ziplm", "uniform"]
    assert table["asked"].tolist() == [0.0, 0.0, 0.9, 0.5, 1.05, 1.05]
    tuned = curve[curve["calibrated"]].set_index("pattern")["accuracy"]
    assert table["accuracy"][0] == curve["accuracy"][0]
    assert table["accuracy"][2] == pytest.approx(tuned["global"].iloc[-1])
    assert table["accuracy"][3] == pytest.approx(tuned["2:4"])
    assert table["speedup"][0] == 1.0
    assert (table["ms"] * table["speedup"]).tolist() == pytest.approx([table["ms"][0]] * 6)
    assert table["bytes"][1] < 0.6 * table["bytes"][0]
    assert (table["bytes"][4:] < table["bytes"][0]).all()
    assert others(tables, {"speed_summary": probes.speed_table(table)}) == []
    assert tables["speed_summary"]["accuracy"].tolist() == pytest.approx((100 * table["accuracy"]).tolist())


def test_specialist(execute):
    options = {"pruners": ["global", "exactobs(samples=32)"], "corrections": ["statistics"], "samples": 32, "draws": 2}
    tables, drawn = execute("specialist", **(SMALL | {"methods": ["sgd"]}), **options, task=["1", "7"])
    experiments = cb.recipes.grid("digits", ["sgd"], 2, epochs=1)
    runs = cb.runs.ensure_all(experiments, progress=False)
    train, test, _ = data(experiments[0])
    specs = [f"{pruner}@{level}" for pruner in options["pruners"] for level in (0.5, 0.9)]
    table = probes.over_runs(runs, probes.specialist, train, test, ["1", "7"], specs, 32, 2, ["statistics"])
    ours = {"specialist_accuracy": probes.specialist_table(table)}
    ours["specialist_task_accuracy"] = probes.specialist_table(table, "task_accuracy")
    assert others(tables, ours) == []
    assert others({"drawn": drawn["specialist"][0][0]}, {"drawn": table}) == []


def test_preconditioners(execute):
    options = {"repeated": ["s-m-fac"], "densities": [0.1], "lr": 0.01, "gradients": 6}
    sizes = {"sample": 60, "curvature_sample": 20, "calibration": 300}
    small = SMALL | {"methods": ["sgd", "m-fac", "s-m-fac"]}
    tables, drawn = execute("preconditioners", **small, **options, **sizes)
    compared = cb.recipes.preconditioners(
        "digits", small["methods"], 2, "", 1, ["s-m-fac"], [0.1], lr=0.01, gradients=6
    )
    runs = {name: cb.runs.ensure_all(experiments, progress=False) for name, experiments in compared.items()}
    every = [run for found in runs.values() for run in found]
    shown = every[:4]  # SGD, M-FAC, and two of S-M-FAC
    assert [(run.experiment.method, run.experiment.seed) for run in shown] == [
        ("sgd", 0), ("m-fac", 0), ("s-m-fac", 0), ("s-m-fac", 1),
    ]  # fmt: skip
    train, test, calibrating = data(every[0].experiment, 300)
    curves = probes.over_runs(shown, probes.sparsity_curve, test, LEVELS, calibrating)
    ours = {
        "preconditioners_runs": probes.over_changes(runs, cb.runs.summary),
        "preconditioners_costs": probes.training_costs(runs),
        "preconditioners_summary": probes.cost_table(probes.training_costs(runs)),
        "preconditioners_pruned_summary": probes.accuracy_table(curves),
    }
    assert others(tables, ours) == []
    part = train.sample(60, seed=0)
    claims = probes.over_runs(shown, probes.stability, part, "global@0.9", calibrating, few=part.sample(20, seed=0))
    decided = probes.verdicts(claims, ["m-fac", "s-m-fac"], "sgd")
    ours = {"preconditioners_verdicts": decided, "preconditioners_verdicts_summary": probes.verdict_table(decided)}
    assert others(tables, ours) == []
    whole = runs["M-FAC"][0].history["test_accuracy"].iloc[-1]
    ours = {
        "training": probes.training_curves(shown),
        "density": probes.density_accuracy([run for run in every if run.experiment.method == "s-m-fac"]),
        "accuracy_vs_sparsity": curves,
        "stability": claims,
    }
    assert others({name: given[0] for name, (given, _) in drawn.items()}, ours) == []
    assert drawn["density"][0][1] == whole


def test_sparse_training(execute, monkeypatch):
    """On a clock that stands still, a step of anything takes a second."""
    monkeypatch.setattr(
        probes.steps, "medians", lambda works, repeats: ([work() for work in works], [4.0, 2.0, 1.0])[1]
    )
    monkeypatch.setattr(
        cb.deploy.swapping, "medians", lambda works, repeats: ([work() for work in works], [2.0, 1.0])[1]
    )
    options = SMALL | {"methods": ["sgd"]}
    tables, drawn = execute("sparse_training", **options, batch=40, repeats=2)
    experiments = cb.recipes.grid("digits", ["sgd"], 2, epochs=1)
    runs = cb.runs.ensure_all(experiments, progress=False)
    train, _ = experiments[0].load_data()
    table = probes.over_runs(runs, probes.step_times, train, [0.5, 0.9], 40, 2)
    ours = {"sparse_training": table, "sparse_training_summary": probes.step_table(table)}
    of_layers = table[(table["sparsity"] == 0.9) & (table["layer"] != "network")]
    ours["sparse_training_layers"] = of_layers[["layer", "kind", "weights", "zeros", "dense_ms", "sparse_ms", "reason"]]
    assert others(tables, ours) == []
    assert others({"drawn": drawn["step_times"][0][0]}, {"drawn": table}) == []
    summary = tables["sparse_training_summary"]
    assert summary["over dense"].tolist() == [4.0] * 4
    assert summary["over bfloat16"].tolist() == [2.0] * 4
    assert summary["sparsity"].tolist() == [50.0, 90.0] * 2
    assert tables["sparse_training_layers"]["reason"].unique().tolist() == ["sparse is 2.00 × as fast"]
