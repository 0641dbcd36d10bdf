"""What each method and each ablation trains: every setting, written down by hand, and the optimizer that it becomes."""

import pytest
import torch

import cram_bench as cb
from cram_bench.experiment import Experiment
from cram_bench.recipes import METHODS, ablations, anatomy, imagenet_resnet50, recipe, transfer
from cram_bench.settings import ORIGINAL

SEVEN = [f"global@{s}" for s in ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")]
FIVE = [f"global@{s}" for s in ("0.5", "0.6", "0.7", "0.8", "0.9")]
EIGHT = [*SEVEN, "global@0.95"]
COMMON = {
    "seed": 0, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "optimizer": "sgd", "weight_decay": 5e-4, "augment": True,
    "halves": False, "sparse_gradients": True, "normalize": False, "mask_interval": 1, "plain": 0.0, "ramp": False,
    "ascent": "momentum", "start": "", "prune": "", "resize": 0, "holdout": 0, "crop": 0, "rho": 0.0, "compressors": [],
}  # fmt: skip
DIGITS = {"dataset": "digits", "model": "convnet", "epochs": 20, "warmup_epochs": 0.5, "precision": "float32"}
CIFAR10 = {"dataset": "cifar10", "model": "resnet20", "epochs": 10, "warmup_epochs": 0.25, "precision": "bfloat16"}
SST2 = {
    "dataset": "sst2", "model": "minilm", "epochs": 3, "warmup_epochs": 0.075, "precision": "bfloat16",
    "batch_size": 32, "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.01,
}  # fmt: skip
GRADUAL = {
    "pruning": "gradual", "pruning.pruner": "global", "pruning.initial": 0.5, "pruning.final": 0.9,
    "pruning.begin": 0.1, "pruning.end": 0.5, "pruning.times": 50,
    "schedule": "cycles", "schedule.rewind": 0.3, "schedule.cycles": 1, "schedule.floor": 0.0,
}  # fmt: skip
THIRTY = {
    "pruning.initial": 0.7, "pruning.begin": 0.0667, "pruning.end": 0.8667, "lr": 8e-5, "schedule.rewind": 0.0667,
    "schedule.cycles": 7, "schedule.floor": 0.1,
}  # fmt: skip
SAFE = {"rho": 0.1, "weight_decay": 1e-4, "step.sparsity": 0.9, "step.penalty": 0.0, "step.every": 32}
IMAGES = {
    "sgd": {},
    "sam": {"rho": 0.05},
    "cram": {"rho": 0.2, "compressors": ["global@0.7"]},
    "cram+": {"rho": 0.2, "compressors": ["global@0.7"]},
    "cram+-multi": {"rho": 0.2, "compressors": SEVEN},
    "cram-single": {"rho": 0.02, "compressors": EIGHT, "ramp": True},
    "momentum-sam": {"rho": 0.3},
    "cram-half": {"rho": 0.2, "compressors": SEVEN, "halves": True},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01},
    "cram+-ramp": {"rho": 0.2, "compressors": EIGHT, "ramp": True},
    "cram+-looking": {"rho": 0.2, "compressors": EIGHT, "step.pruner": "greedy(gradients=128)", "step.every": 1},
    "gmp*": GRADUAL,
    "obert": {**GRADUAL, "pruning.pruner": "obert(gradients=128)", "pruning.times": 7},
    "safe": SAFE,
}
COMPRESSED = {"optimizer.decoupled": True, "optimizer.feedback": True}
SPARSE = {**COMPRESSED, "optimizer.density": 0.01, "optimizer.block": 0}
MFAC = {"optimizer.gradients": 1024, "optimizer.divisor": "window"}
PRECONDITIONED = {
    "m-fac": {**MFAC, "optimizer.damping": 1e-5, "optimizer.decoupled": False},
    "s-m-fac": {**MFAC, **SPARSE, "optimizer.damping": 1e-4},
    "lowrank-m-fac": {**MFAC, **COMPRESSED, "optimizer.damping": 1e-4, "optimizer.rank": 4},
    "ggt": {"optimizer.gradients": 100, "optimizer.damping": 1e-5, "optimizer.decoupled": False},
    "s-ggt": {**SPARSE, "optimizer.gradients": 100, "optimizer.damping": 1e-5},
}
SGD = {"lr": 1e-3, "weight_decay": 1e-4, "momentum": 0.0, "optimizer.storage": "float32"}
IMAGES |= {method: {"optimizer": method, **SGD, **own} for method, own in PRECONDITIONED.items()}
SENTENCES = {
    "sgd": {"optimizer": "sgd", "lr": 0.01},
    "sam": {"rho": 0.05},
    "cram": {"rho": 1e-3, "compressors": ["global@0.7"]},
    "cram+": {"rho": 1e-3, "compressors": ["global@0.7"]},
    "cram+-multi": {"rho": 1e-3, "compressors": FIVE},
    "cram-single": {"rho": 1e-3, "compressors": FIVE, "ramp": True},
    "momentum-sam": {"rho": 0.3},
    "cram-half": {"rho": 1e-3, "compressors": FIVE, "halves": True},
    "adamw": {},
    "cram+-ramp": {"rho": 1e-3, "compressors": FIVE, "ramp": True},
    "cram+-looking": {"rho": 1e-3, "compressors": FIVE, "step.pruner": "greedy(gradients=128)", "step.every": 1},
    "gmp*": {**GRADUAL, **THIRTY},
    "obert": {**GRADUAL, **THIRTY, "pruning.pruner": "obert(gradients=1024)", "pruning.times": 7},
    "safe": {**SAFE, "weight_decay": 0.01},
}
SENTENCES |= {
    method: {**IMAGES[method], "lr": 2e-5, "weight_decay": 0.0, **own}
    for method, own in {
        "m-fac": {"lr": 1e-4, "optimizer.damping": 1e-6},
        "s-m-fac": {"optimizer.damping": 5e-5},
        "lowrank-m-fac": {"optimizer.damping": 5e-5},
        "ggt": {},
        "s-ggt": {},
    }.items()
}


def everything(experiment):
    """Every setting: those of its parts, and of the others what was hashed before there were parts."""
    return {**ORIGINAL, **experiment.settings()}


@pytest.mark.parametrize(
    ("data", "table"), [(DIGITS, IMAGES), (CIFAR10, IMAGES), (SST2, SENTENCES)], ids=["digits", "cifar10", "sst2"]
)
@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_method(method, data, table):
    expected = {**COMMON, **data, "method": method, **table[method]}
    settings = everything(recipe(data["dataset"], method))
    assert {name: settings[name] for name in expected} == expected
    newer = settings.keys() - expected.keys() - {"step"}
    assert {name: settings[name] for name in newer} == {name: everything(Experiment())[name] for name in newer}
    assert settings["step"] == STEPS.get(method, "plain")


STEPS = {
    "sam": "sam", "momentum-sam": "momentum-sam", "cram": "cram", "cram-single": "cram-single", "cram+": "cram+",
    "cram+-multi": "cram+", "cram+-ramp": "cram+", "cram-half": "cram+", "cram+-looking": "cram+-looking",
    "safe": "safe",
}  # fmt: skip
PASSES = {
    "sgd": 1, "adamw": 1, "momentum-sam": 1, "cram-single": 1, "gmp*": 1, "obert": 1,
    **dict.fromkeys(PRECONDITIONED, 1),
}  # fmt: skip
LABELS = {
    "sgd": "SGD", "sam": "SAM", "cram": "CrAM", "cram+": "CrAM+", "cram+-multi": "CrAM+-Multi", "adamw": "AdamW",
    "cram-single": "CrAM-Single", "momentum-sam": "Momentum-SAM", "cram-half": "CrAM-Half", "cram+-ramp": "CrAM+-Ramp",
    "cram+-looking": "CrAM+-Looking", "m-fac": "M-FAC", "s-m-fac": "S-M-FAC", "lowrank-m-fac": "Low-rank M-FAC",
    "ggt": "GGT", "s-ggt": "S-GGT", "gmp*": "GMP*", "obert": "oBERT, gradual", "safe": "SAFE",
}  # fmt: skip
CLASSES = {
    "sam": cb.optim.SAM, "momentum-sam": cb.optim.MomentumSAM, "cram-single": cb.optim.CrAMSingle,
    "m-fac": cb.optim.MFAC, "ggt": cb.optim.GGT, "safe": cb.optim.SAFE,
    **dict.fromkeys(["s-m-fac", "lowrank-m-fac", "s-ggt"], cb.optim.EFCP),
}  # fmt: skip
BARE = ("sgd", "adamw", "gmp*", "obert")


def evaluations(model, optimizer):
    count = []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 1, 8, 8)).square().mean()
        loss.backward()
        count.append(1)
        return loss.detach()

    optimizer.step(closure)
    return len(count)


@pytest.mark.parametrize("method", METHODS)
def test_the_optimizer_of_every_method(method):
    """Its class, its base with every constant, and how often it evaluates the gradient in a step."""
    experiment = recipe("digits", method, seed=4)
    model = cb.models.create("convnet", 10, 1)
    optimizer = experiment.build_optimizer(model)
    assert METHODS[method].label == LABELS[method]
    assert experiment.step.passes == PASSES.get(method, 2)
    base = optimizer if method in BARE else optimizer.base
    group = base.param_groups[0]
    if method == "adamw":
        assert type(base) is torch.optim.AdamW
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 0.01)
    else:
        assert type(base) is torch.optim.SGD
        constants = [group[name] for name in ("lr", "momentum", "weight_decay", "dampening", "nesterov")]
        # what is preconditioned has its weight decay outside the base
        usual = [0.1, 0.9, 1e-4 if method == "safe" else 5e-4, 0, False]
        assert constants == ([1e-3, 0.0, 0.0, 0, False] if method in PRECONDITIONED else usual)
    assert len(group["params"]) == len(list(model.parameters()))
    if base is not optimizer:
        assert type(optimizer) is CLASSES.get(method, cb.optim.CrAM)
        assert group.get("rho") == IMAGES[method].get("rho")
        assert not group.get("adaptive")
    if method in PRECONDITIONED:
        assert_preconditioned(method, optimizer)
    if method == "safe":
        assert (str(optimizer.operator), optimizer.penalty, optimizer.every) == ("global@0.9", 0.0, 32)
    if experiment.step.compresses:
        assert [str(c) for c in optimizer.draw.compressors] == IMAGES[method]["compressors"]
        assert (optimizer.sparse_gradients, optimizer.normalize, optimizer.plain) == (True, False, 0.0)
        assert optimizer.draw.interval == 1
        assert optimizer.draw.generator.initial_seed() == 4
        assert getattr(optimizer, "plus", None) == {"cram": False, "cram-single": None}.get(method, True)
        assert getattr(optimizer, "ascent", "momentum") == "momentum"
    assert evaluations(model, optimizer) == PASSES.get(method, 2)


def assert_preconditioned(method, optimizer):
    window, group = optimizer.window, optimizer.param_groups[0]
    ring = {
        "m-fac": cb.optim.Dense(), "ggt": cb.optim.Dense(), "lowrank-m-fac": cb.optim.LowRank(4, feedback=True),
    }.get(method, cb.optim.TopK(0.01, block=0, feedback=True))  # fmt: skip
    count = 100 if "ggt" in method else 1024
    assert (window.ring, window.gradients, window.dtype) == (ring, count, torch.float32)
    root = isinstance(window.spectrum, cb.optim.spectra.Root)
    assert root == ("ggt" in method)
    assert root or window.spectrum.divisor == "window"
    assert window.spectrum.damping == PRECONDITIONED[method]["optimizer.damping"]
    assert (group["decay"], optimizer.decoupled) == (1e-4, method not in ("m-fac", "ggt"))


def test_low_rank_weighs_the_newest_by_what_momentum_leaves():
    """Low rank has μv + (1 − μ)u, the others μv + u."""
    for method, dampening in (("lowrank-m-fac", 0.9), ("s-m-fac", 0.0), ("m-fac", 0.0), ("s-ggt", 0.0)):
        optimizer = recipe("digits", method, momentum=0.9).build_optimizer(cb.models.create("convnet", 10, 1))
        assert optimizer.param_groups[0]["momentum"] == 0.9
        assert optimizer.param_groups[0]["dampening"] == dampening


def test_every_setting_of_a_preconditioner_reaches_it():
    changes = {
        "gradients": 7,
        "damping": 0.5,
        "storage": "bfloat16",
        "decoupled": True,
        "weight_decay": 0.25,
        "lr": 3.0,
    }
    for method in PRECONDITIONED:
        sparse = {"density": 0.5, "block": 9} if method.startswith("s-") else {}
        compressed = {"feedback": False} if sparse or "lowrank" in method else {}
        own = sparse | compressed | ({} if "ggt" in method else {"divisor": "count"})
        own |= {"rank": 2} if "lowrank" in method else {}
        optimizer = recipe("digits", method, **changes, **own).build_optimizer(cb.models.create("convnet", 10, 1))
        window, group = optimizer.window, optimizer.param_groups[0]
        assert (window.gradients, window.spectrum.damping, window.dtype) == (7, 0.5, torch.bfloat16)
        assert (group["decay"], group["lr"], optimizer.decoupled) == (0.25, 3.0, True)
        assert getattr(window.spectrum, "divisor", "count") == "count"
        expected = {"s-": cb.optim.TopK(0.5, 9, False), "lo": cb.optim.LowRank(2, False)}
        assert window.ring == expected.get(method[:2], cb.optim.Dense())


@pytest.mark.parametrize("method", METHODS)
def test_the_imagenet_recipe(method):
    settings = everything(imagenet_resnet50("imagenet", method))
    own = {
        "sam": {"rho": 0.05},
        "momentum-sam": {"rho": 0.3},
        "cram": {"rho": 0.05, "compressors": ["global@0.7"]},
        "cram+": {"rho": 0.05, "compressors": ["global@0.7"]},
        "cram+-multi": {"rho": 0.05, "compressors": ["global@0.5", "global@0.7", "global@0.9"]},
        "cram-half": {"rho": 0.05, "compressors": ["global@0.5", "global@0.7", "global@0.9"], "halves": True},
        "cram+-ramp": {"rho": 0.05, "compressors": EIGHT, "ramp": True},
        "cram+-looking": {"rho": 0.05, "compressors": EIGHT},
        "cram-single": {"rho": 0.02, "compressors": EIGHT, "ramp": True},
        "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01},
        **{method: IMAGES[method] for method in PRECONDITIONED},
        "gmp*": GRADUAL,
        "obert": {**GRADUAL, "pruning.pruner": "obert(gradients=128)", "pruning.times": 7},
        "safe": SAFE,
    }
    for one in ("s-m-fac", "lowrank-m-fac"):
        own[one] = {**own[one], "optimizer.damping": 1e-7, "weight_decay": 1e-5}
    expected = {
        **COMMON, "model": "torchvision:resnet50", "crop": 224, "epochs": 100, "batch_size": 512, "lr": 0.2,
        "weight_decay": 1e-4, "warmup_epochs": 5.0, "precision": "bfloat16", "method": method, **own.get(method, {}),
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected


ABLATIONS = {
    "CrAM+-Multi": {},
    "ramp": {"ramp": True},
    "ramp, 95 % too": {"method": "cram+-ramp", "ramp": True, "compressors": EIGHT},
    "without +": {"method": "cram"},
    "dense gradients": {"sparse_gradients": False},
    "ρ = 0": {"rho": 0.0},
    "ρ × ½ = 0.1": {"rho": 0.1},
    "ρ × 2 = 0.4": {"rho": 0.4},
    "ρ/‖g‖ = 0.2": {"normalize": True},
    "masks held 20 times": {"mask_interval": 20},
    "only 70 %": {"compressors": ["global@0.7"]},
    "50 to 95 %, ρ = 0.15": {
        "compressors": ["global@0.5", "global@0.7", "global@0.8", "global@0.9", "global@0.95"], "rho": 0.15,
    },
}  # fmt: skip


@pytest.mark.parametrize("data", [DIGITS, CIFAR10], ids=["digits", "cifar10"])
def test_every_setting_of_every_ablation(data):
    listed = ablations(data["dataset"], 2)
    assert list(listed) == list(ABLATIONS)
    for name, changed in ABLATIONS.items():
        for seed, experiment in enumerate(listed[name]):
            multi = {"method": "cram+-multi", "rho": 0.2, "compressors": SEVEN}
            expected = {**COMMON, **data, **multi, **changed, "seed": seed}
            settings = everything(experiment)
            assert {key: settings[key] for key in expected} == expected, name
        assert len(listed[name]) == 2


def test_every_ablation_is_another_optimizer():
    """What the settings change is there in the object that trains."""
    of = {}
    for name, (experiment,) in ablations("digits", 1).items():
        optimizer = experiment.build_optimizer(cb.models.create("convnet", 10, 1))
        of[name] = (
            optimizer.plus, optimizer.sparse_gradients, optimizer.normalize, optimizer.draw.interval,
            optimizer.param_groups[0]["rho"], [str(c) for c in optimizer.draw.compressors],
        )  # fmt: skip
    assert of == {
        "CrAM+-Multi": (True, True, False, 1, 0.2, SEVEN),
        "ramp": (True, True, False, 1, 0.2, SEVEN),  # differs in a callback of the training
        "ramp, 95 % too": (True, True, False, 1, 0.2, EIGHT),
        "without +": (False, True, False, 1, 0.2, SEVEN),
        "dense gradients": (True, False, False, 1, 0.2, SEVEN),
        "ρ = 0": (True, True, False, 1, 0.0, SEVEN),
        "ρ × ½ = 0.1": (True, True, False, 1, 0.1, SEVEN),
        "ρ × 2 = 0.4": (True, True, False, 1, 0.4, SEVEN),
        "ρ/‖g‖ = 0.2": (True, True, True, 1, 0.2, SEVEN),
        "masks held 20 times": (True, True, False, 20, 0.2, SEVEN),
        "only 70 %": (True, True, False, 1, 0.2, ["global@0.7"]),
        "50 to 95 %, ρ = 0.15": (
            True, True, False, 1, 0.15, ["global@0.5", "global@0.7", "global@0.8", "global@0.9", "global@0.95"],
        ),
    }  # fmt: skip


def test_every_setting_of_what_is_fine_tuned():
    """Pruned, with a tenth of the learning rate, and everything else as the source or as usual."""
    other, whole, tuned = anatomy("digits", ["sgd", "sam", "cram+-multi"], epochs=7, sparsity=0.8, target_epochs=3)
    base = {**COMMON, **DIGITS, "epochs": 7, "warmup_epochs": 0.175}
    assert everything(other) == everything(other) | base | {"method": "sgd"}
    assert everything(whole) == everything(whole) | base | {"method": "cram+-multi", **IMAGES["cram+-multi"]}
    own = {"method": "sgd", "epochs": 3, "warmup_epochs": 0.075, "start": whole.id, "prune": "global@0.8", "lr": 0.01}
    assert everything(tuned) == everything(tuned) | {**COMMON, **DIGITS, **own}
    # what is fine-tuned is trained in the precision of its source, usual or not
    assert anatomy("digits", ["sgd", "sam"], precision="bfloat16")[-1].precision == "bfloat16"
    _, unusual = transfer("cifar100", "cifar10", ["sgd"], 1, [0.7], precision="float32")
    assert {target.precision for target in unusual} == {"float32"}
    sources, targets = transfer("cifar100", "cifar10", ["sgd", "cram+-multi"], [5], [0.7], epochs=4, target_epochs=2)
    assert [(s.method, s.data.dataset, s.seed, s.epochs) for s in sources] == [
        ("sgd", "cifar100", 5, 4),
        ("cram+-multi", "cifar100", 5, 4),
    ]
    for source, (dense, pruned) in zip(sources, (targets[:2], targets[2:]), strict=True):
        for target, prune in ((dense, ""), (pruned, "global@0.7")):
            own = {
                "method": "sgd", "epochs": 2, "warmup_epochs": 0.05, "seed": 5, "start": source.id, "prune": prune,
                "lr": 0.01,
            }  # fmt: skip
            assert everything(target) == everything(target) | {**COMMON, **CIFAR10, **own}
