"""Sets of experiments that answer one question together. Each is a plain function that returns experiments.

A notebook calls the function it is named after, and ``cram-bench report`` trains the same experiments beforehand. A
new question is a function here, and a notebook whose metadata name it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cram_bench.checks import integer, items, number, unknown
from cram_bench.data import SENTENCES, image_shape
from cram_bench.experiment import Experiment
from cram_bench.recipes.cram import HIGH
from cram_bench.recipes.defaults import grid, recipe
from cram_bench.recipes.methods import known


def equal_cost(
    dataset: str,
    methods: Sequence[str],
    seeds: int | Sequence[int],
    model: str = "",
    epochs: int = 0,
    shorter: bool = False,
    precision: str = "",
    **changes: Any,
) -> tuple[list[Experiment], list[Experiment]]:
    """Return (at equal epochs, at equal cost): `grid`, and what each of its experiments becomes at one cost for all.

    The cost is the gradient evaluations an image, epochs × gradients a step (`Experiment.gradients`), of the dearest
    method, and the cheaper ones train longer; with `shorter` of the cheapest, and the dearer ones train shorter.
    Epochs are whole and at least one, so costs may differ, by half an epoch's where there is more than one. What costs
    as much already is in both lists.

    >>> at_epochs, at_cost = equal_cost("digits", ["sgd", "sam"], 1, epochs=15, shorter=True)
    >>> [(e.method, e.epochs, e.gradients) for e in at_cost]
    [('sgd', 15, 15.0), ('sam', 8, 16.0)]
    """
    at_epochs = grid(dataset, methods, seeds, model, epochs, precision, **changes)
    cost = (min if shorter else max)(experiment.gradients for experiment in at_epochs)
    lengths = [max(1, round(experiment.epochs * cost / experiment.gradients)) for experiment in at_epochs]
    at_cost = [
        experiment.but(epochs=n, **experiment.schedule.stretched(n, experiment.epochs))
        for experiment, n in zip(at_epochs, lengths, strict=True)
    ]
    return at_epochs, at_cost


def prices(
    dataset: str,
    methods: Sequence[str],
    seeds: int | Sequence[int],
    sparsities: Sequence[float],
    distilled: Sequence[str] = (),
    model: str = "",
    epochs: int = 0,
    repeated: Sequence[float] = (),
    precision: str = "",
    **changes: Any,
) -> list[Experiment]:
    """Return trainings of one cost: one for all sparsities, or of methods that aim at one, a training for each.

    Args:
        methods: names in `METHODS`. Such as train once and are pruned afterwards come once; gradual pruning and SAFE
            once for every sparsity.
        seeds, model, precision: as of `grid`.
        sparsities: to aim at.
        distilled: of `methods`, those that are trained a second time with a teacher, the training of the first method
            with the same seed; its passes count, so that they train shorter.
        epochs: of a method with two gradients a step; 0 for what suits the data set. The others train as long as costs
            the same, in whole epochs.
        repeated: of `sparsities`, those that all seeds aim at, and others the first seed alone; empty for all.
        changes: any other setting of the experiment.

    Raises:
        ValueError: a name or a sparsity to repeat is unknown, the first method aims at one sparsity and cannot teach,
            or there is no sparsity.

    >>> found = prices("digits", ["sgd", "cram+-multi", "gmp*"], 1, [0.9, 0.95], ["gmp*"], epochs=15)
    >>> [(e.method, aim(e), e.loss.kind, e.epochs) for e in found][:3]
    [('sgd', 0.0, 'cross-entropy', 30), ('cram+-multi', 0.0, 'cross-entropy', 15), ('gmp*', 0.9, 'cross-entropy', 30)]
    >>> [(e.method, aim(e), e.loss.kind, e.epochs) for e in found][-1]
    ('gmp*', 0.95, 'distil', 22)
    """
    levels = [number("sparsity", s, 0, 1) for s in items("sparsities", sparsities, "numbers in [0, 1)")]
    for name in distilled:
        if name not in methods:
            raise ValueError(unknown("method to distil", name, list(methods)))
    for level in repeated:
        if level not in levels:
            raise ValueError(unknown("sparsity to repeat", level, [f"{known:g}" for known in levels]))
    dense = grid(dataset, methods, seeds, model, epochs, precision, **changes)
    cost = 2 * dense[0].epochs
    often = {each.seed: list(repeated) or levels for each in dense} | {dense[0].seed: levels}
    found: list[Experiment] = []
    for each in dense:
        found += [_lasting(one, cost) for one in _aimed(each, often[each.seed])]
    teachers = {each.seed: each for each in found if each.method == dense[0].method}
    if distilled and _aims(dense[0]):
        raise ValueError(
            f"the first method teaches, and {dense[0].method!r} aims at one sparsity: take sgd, for example"
        )
    for each in dense:
        if each.method in distilled:
            taught = each.but(loss="distil", teacher=teachers[each.seed].id)
            found += [_lasting(one, cost) for one in _aimed(taught, often[each.seed])]
    return found


def aim(experiment: Experiment) -> float:
    """Return the sparsity that a training aims at, 0 for one that is dense in the end.

    >>> aim(recipe("digits", "gmp*", final=0.95)), aim(recipe("digits", "safe")), aim(recipe("digits", "cram+"))
    (0.95, 0.9, 0.0)
    """
    return max(experiment.pruning.sparsity, experiment.settings().get("step.sparsity", 0.0))


def _aims(experiment: Experiment) -> str:
    """Return the setting of the sparsity that a training aims at, or nothing."""
    known = experiment.settings()
    return next((name for name in ("pruning.final", "step.sparsity") if name in known), "")


def _aimed(experiment: Experiment, levels: Sequence[float]) -> Iterator[Experiment]:
    name = _aims(experiment)
    for level in levels if name else [0.0]:
        yield experiment.but(**{name: level}) if name else experiment


def _lasting(experiment: Experiment, cost: float) -> Experiment:
    """Return the experiment with as many whole epochs as cost so many gradients an image, or nearly so."""
    epochs = max(1, round(experiment.epochs * cost / experiment.gradients))
    return experiment.but(epochs=epochs, **experiment.schedule.stretched(epochs, experiment.epochs))


def speed(
    dataset: str,
    methods: Sequence[str],
    seeds: int | Sequence[int],
    model: str = "",
    epochs: int = 0,
    precision: str = "",
    **changes: Any,
) -> list[Experiment]:
    """Return `grid` of networks that can lose units as a whole: on the digits of ResNet-20, where no model is named.

    >>> speed("digits", ["sgd"], 1)[0].model, speed("cifar10", ["sgd"], 1)[0].model
    ('resnet20', 'resnet20')
    """
    return grid(
        dataset, methods, seeds, model or ("resnet20" if dataset == "digits" else ""), epochs, precision, **changes
    )


def language(
    dataset: str,
    methods: Sequence[str],
    seeds: int | Sequence[int],
    model: str = "",
    epochs: int = 0,
    precision: str = "",
    **changes: Any,
) -> list[Experiment]:
    """Return `grid` over a set of sentences.

    Raises:
        ValueError: the data set is one of images.
    """
    if dataset not in SENTENCES:
        raise ValueError(unknown("set of sentences", dataset, list(SENTENCES)))
    return grid(dataset, methods, seeds, model, epochs, precision, **changes)


def ablations(
    dataset: str,
    seeds: int | Sequence[int],
    model: str = "",
    epochs: int = 0,
    only: Sequence[str] = (),
    precision: str = "",
    **changes: Any,
) -> dict[str, list[Experiment]]:
    """Return what is changed → the experiments: CrAM+-Multi, and CrAM+-Multi with one thing changed at a time.

    With `only`, of the changes those that are named; CrAM+-Multi itself is always there.

    Raises:
        ValueError: `only` names a change that is none, with those there are.

    >>> list(ablations("digits", 1, only=["without +", "ρ = 0"]))
    ['CrAM+-Multi', 'without +', 'ρ = 0']
    """
    base = recipe(dataset, "cram+-multi").settings()
    multi = {name: base[name] for name in ("compressors", "rho")}
    rho = multi["rho"]
    variants: dict[str, dict[str, Any]] = {
        "CrAM+-Multi": {},
        "ramp": {"ramp": True},
        "ramp, 95 % too": {"method": "cram+-ramp"},
        "without +": {"method": "cram", **multi},
        "dense gradients": {"sparse_gradients": False},
        "ρ = 0": {"rho": 0.0},
        f"ρ × ½ = {rho / 2:g}": {"rho": rho / 2},
        f"ρ × 2 = {rho * 2:g}": {"rho": rho * 2},
        f"ρ/‖g‖ = {rho:g}": {"normalize": True},
        "masks held 20 times": {"mask_interval": 20},
        "only 70 %": {"compressors": ("global@0.7",)},
        "50 to 95 %, ρ = 0.15": {"compressors": HIGH, "rho": 0.15},
    }
    if only:
        for name in items("only", only, "names of changes"):
            if name not in variants:
                raise ValueError(unknown("change", name, list(variants)))
        variants = {name: changed for name, changed in variants.items() if not changed or name in only}
    return {
        name: grid(
            dataset, [changed.pop("method", "cram+-multi")], seeds, model, epochs, precision, **changes, **changed
        )
        for name, changed in ((name, dict(changed)) for name, changed in variants.items())
    }


def preconditioners(
    dataset: str,
    methods: Sequence[str] = ("sgd", "adamw", "m-fac", "s-m-fac"),
    seeds: int | Sequence[int] = 1,
    model: str = "",
    epochs: int = 0,
    repeated: Sequence[str] = ("sgd", "s-m-fac"),
    densities: Sequence[float] = (),
    lr: float = 0.0,
    gradients: int = 0,
    ggt_lr: float = 0.0,
    precision: str = "",
    **changes: Any,
) -> dict[str, list[Experiment]]:
    """Return what is compared → its experiments: methods, S-M-FAC without error feedback, and S-M-FAC by density.

    M-FAC and GGT take S-M-FAC's damping and weight decay, or S-GGT's, so that what is kept of a gradient is all in
    which they differ.

    Args:
        dataset: a name or the path of an image folder.
        methods: names in `METHODS`. Error feedback is left out, and densities are gone through, where ``s-m-fac`` is
            among them.
        seeds: for the methods of `repeated`; the others have the first of them.
        model: empty for what suits the data set.
        epochs: 0 for what suits the data set.
        repeated: methods that are trained with all seeds.
        densities: fractions of a gradient's entries that S-M-FAC keeps, each with and without error feedback.
        lr: of all preconditioned methods, 0 for the papers'.
        gradients: length of the ring of M-FAC in all its forms, 0 for the papers'.
        ggt_lr: of GGT and S-GGT, whose steps are at most as long as it; 0 for `lr`.
        changes: any other setting of all experiments.

    Raises:
        ValueError: a name is unknown or a value not allowed.

    >>> compared = preconditioners("digits", ["sgd", "s-m-fac"], 2, densities=[0.1])
    >>> {name: len(experiments) for name, experiments in compared.items()}
    {'SGD': 2, 'S-M-FAC': 2, 'S-M-FAC, no feedback': 1, 'S-M-FAC, 10 %': 1, 'S-M-FAC, 10 %, no feedback': 1}
    """
    listed = (
        list(range(integer("seeds", seeds, 1, 10_000))) if isinstance(seeds, int) else items("seeds", seeds, "seeds")
    )
    methods = items("methods", methods, "names such as 'sgd'")

    def trained(method: str, several: bool = False, **own: Any) -> list[Experiment]:
        alike = {"m-fac": "s-m-fac", "ggt": "s-ggt"}.get(method)
        if alike:
            same = recipe(dataset, alike).optimizer
            own |= {name: getattr(same, name) for name in ("damping", "decoupled", "weight_decay")}
        settings = recipe(dataset, method).settings()
        if "optimizer.damping" in settings:
            rate = (number("ggt_lr", ggt_lr, 0) if "ggt" in method else 0.0) or number("lr", lr, 0)
            own |= {"lr": rate} if rate else {}
        if "optimizer.divisor" in settings:
            own |= {"gradients": gradients} if integer("gradients", gradients, 0) else {}
        return grid(dataset, [method], listed if several else listed[:1], model, epochs, precision, **changes, **own)

    compared = {known(method).label: trained(method, method in repeated) for method in methods}
    if "s-m-fac" in methods:
        sparse = known("s-m-fac").label
        compared[f"{sparse}, no feedback"] = trained("s-m-fac", feedback=False)
        for density in densities:
            name = f"{sparse}, {100 * number('density', density, 0, 1):g} %"
            compared[name] = trained("s-m-fac", density=density)
            compared[f"{name}, no feedback"] = trained("s-m-fac", density=density, feedback=False)
    return compared


def anatomy(
    dataset: str,
    methods: Sequence[str],
    model: str = "",
    epochs: int = 0,
    sparsity: float = 0.9,
    target_epochs: int = 5,
    precision: str = "",
    **changes: Any,
) -> list[Experiment]:
    """Return three experiments of seed 0: the first and the last of `methods`, and the last pruned and fine-tuned.

    Fine-tuning holds the mask, by SGD at a tenth of the usual learning rate.

    Raises:
        ValueError: there are fewer than two methods, or the sparsity is not in [0, 1).
    """
    methods = items("methods", methods, "names such as 'sgd'")
    if methods[0] == methods[-1]:
        raise ValueError(f"anatomy needs two methods, the first and the last of the list, not {methods}")
    number("sparsity", sparsity, 0, 1)
    other, whole = grid(dataset, [methods[0], methods[-1]], 1, model, epochs, precision, **changes)
    tuned = recipe(
        dataset,
        model=whole.model,
        epochs=target_epochs,
        start=whole.id,
        prune=f"global@{sparsity:g}",
        lr=whole.optimizer.lr / 10,
        precision=whole.precision,
    )
    return [other, whole, tuned]


def transfer(
    dataset: str,
    target: str,
    methods: Sequence[str],
    seeds: int | Sequence[int],
    sparsities: Sequence[float],
    model: str = "",
    epochs: int = 0,
    target_epochs: int = 20,
    target_images: int = 0,
    rates: Sequence[float] = (0.01,),
    held_out: int = 0,
    target_precision: str = "",
    precision: str = "",
    **changes: Any,
) -> tuple[list[Experiment], list[Experiment]]:
    """Return (sources, fine-tunings): train densely, prune in one shot, fine-tune on `target` with the mask held.

    Every source is fine-tuned dense (sparsity 0) and at every sparsity of `sparsities`, by SGD at every rate of `rates`
    (a tenth of the usual one where that is not said). Where the images differ in shape, those of the target are scaled
    to the source's side and three channels, which the source must have then.

    Args:
        dataset: the source, and `methods`, `seeds`, `model`, `epochs` and `changes` as `grid` has them.
        target: the new data.
        sparsities: of the prunable weights, in [0, 1).
        target_epochs: of fine-tuning.
        target_images: training images of the target that are learned from; 0: all that are not held out.
        rates: learning rates; `cram_bench.probes.transfer_accuracy` takes the best on the held-out images.
        held_out: training images of the target that choose among the rates; nobody learns from them.
        target_precision: ``float32`` or ``bfloat16`` for fine-tuning; empty: the source's.

    Raises:
        ValueError: the target is the source, its images cannot be made like the source's, or there are several rates
            and no held-out images to choose by.
    """
    sparsities = [number("sparsity", s, 0, 1) for s in items("sparsities", sparsities, "numbers in [0, 1)")]
    rates = list(dict.fromkeys(number("rate", r, 0) for r in items("rates", rates, "positive numbers")))
    if len(rates) != 1 and not held_out:
        raise ValueError(f"rates needs one number, or held_out images to choose by, and was given {rates} and 0 images")
    sources = grid(dataset, methods, seeds, model, epochs, precision, **changes)
    if target == dataset:
        raise ValueError(f"transfer needs a target other than the source, {dataset!r}")
    shape = (
        (3, sources[0].data.resize, sources[0].data.resize)
        if sources[0].data.resize
        else image_shape(sources[0].data.dataset)
    )
    resize = 0 if image_shape(target) == shape else shape[1]
    if resize and shape[0] != 3:
        raise ValueError(
            f"images of {target!r} are scaled to three channels, and the source {dataset!r} has {shape[0]}"
        )
    tuned = [
        recipe(
            target,
            model=source.model,
            epochs=target_epochs,
            seed=source.seed,
            start=source.id,
            prune=f"global@{sparsity:g}" if sparsity else "",
            resize=resize,
            holdout=held_out,
            sample=target_images,
            lr=rate,
            precision=target_precision or source.precision,
        )
        for source in sources
        for sparsity in (0.0, *sparsities)
        for rate in rates
    ]
    return sources, tuned
