"""What each command does. Nothing heavy is imported before its function runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cram_bench.cli.terminal import say

if TYPE_CHECKING:
    from cram_bench.distributed import Group


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("device", "threads", "compile", "wait")}


def run_train(arguments: argparse.Namespace) -> int:
    """Train one experiment, with the processes that torchrun started."""
    from cram_bench import distributed

    if arguments.help:
        _help_with_lists(arguments.parser)
    try:
        with distributed.joined(arguments.device) as group:
            return _train_together(arguments, group)
    except distributed.Stopped:
        return 1  # another process has said why


def _train_together(arguments: argparse.Namespace, group: Group) -> int:
    from cram_bench import recipes, runs

    changes = _values(arguments.settings)
    if own := sorted({"dataset", "method", "epochs", "seed"} & changes.keys()):
        raise ValueError(f"{own[0]} is given as --{own[0]}, not with -s")
    changes["seed"] = arguments.seed
    if arguments.epochs is not None:
        changes["epochs"] = arguments.epochs
    recipe = recipes.named(arguments.recipe)
    run = runs.ensure(
        recipe(arguments.dataset, arguments.method, **changes),
        **_machine(arguments),
        workers=arguments.workers,
        sparse=arguments.sparse,
        group=group,
    )
    if group.first:
        last, tested = run.history.iloc[-1], "validation" if run.experiment.data.holdout else "test"
        accuracies = f"accuracy {last['train_accuracy']:.1%} in training, {last['test_accuracy']:.1%} in {tested}"
        print(
            f"{run.label}, {int(last['epoch'])} epoch{'s' if last['epoch'] > 1 else ''}: {accuracies}", file=sys.stderr
        )
        print(run.path)
    return 0


def run_sweep(arguments: argparse.Namespace) -> int:
    """Train the experiments of a file; print and save their table."""
    import warnings

    from cram_bench import runs, sweep
    from cram_bench.files import check_writable

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        experiments = sweep.read(arguments.file)
    for warning in said:
        say(str(warning.message))
    store, name = runs.Store(), sweep.name_of(arguments.file)
    if arguments.folder:
        check_writable(arguments.folder, "--folder")
    results = sweep.run(
        experiments,
        store,
        arguments.executor,
        name=name,
        workers=arguments.workers,
        per_job=arguments.per_job,
        retries=arguments.retries,
        retry_failed=arguments.retry_failed,
        slurm=_values(arguments.slurm),
        **_machine(arguments),
    )
    path = sweep.save(results, arguments.folder or store.root / ".sweeps" / name)
    if arguments.csv:
        print(results.to_csv(index=False), end="")
    else:
        print(results.drop(columns=list(sweep.OF_THE_MACHINE)).to_string(index=False, na_rep="-"))
        print(path)
    missing = int((results["state"] != "finished").sum())
    if missing:
        say(f"{missing} of {len(results)} experiments have no result; the table says why")
    return 1 if missing else 0


def run_runs(arguments: argparse.Namespace) -> int:
    """List the runs of the store."""
    from cram_bench import runs

    store = runs.Store()
    table = store.table()
    if arguments.csv:
        print(table.to_csv(index=False), end="")
    elif table.empty:
        print(f"no runs in {store.root}")
    else:
        if table["holder"].isna().all():
            table = table.drop(columns="holder")
        print(table.to_string(index=False, na_rep="-", formatters={"accuracy": "{:.1%}".format}))
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    """Build a report."""
    from cram_bench import report

    if arguments.help:
        _help_with_notebooks(arguments.parser)
    built = report.build(
        arguments.dataset,
        arguments.profile,
        arguments.seeds,
        _values(arguments.parameters),
        questions=arguments.notebook,
        reports=arguments.reports,
        notebooks=arguments.notebooks,
        name=arguments.name,
        keep_runs=arguments.keep_runs,
        paths=arguments.paths,
        command=shlex.join(["cram-bench", *arguments.argv]),
        **_machine(arguments),
    )
    for name, error in built.failures.items():
        say(f"the notebook {name} failed: {error}")
    for name, error in built.trainings.items():
        say(f"the training {name} failed: {error}")
    print(built.folder / "index.html")
    return 1 if built.failures or built.trainings else 0


def _help_with_lists(parser: argparse.ArgumentParser) -> NoReturn:
    from cram_bench import data, recipes

    print(f"{parser.format_help()}\ndata sets: {', '.join(data.names())}, or the path of an image folder")
    print(f"methods: {', '.join(recipes.METHODS)}\nrecipes: {', '.join(recipes.RECIPES)}")
    print("`cram-bench settings METHOD` lists what -s can set.")
    parser.exit()


def _help_with_notebooks(parser: argparse.ArgumentParser) -> NoReturn:
    from importlib.util import find_spec

    from cram_bench.report.notebook import RESERVED, find

    print(f"{parser.format_help()}\nnotebooks, and what -p can set in each:")
    for name, notebook in find().items():
        print(f"\n{name}: {notebook.question}")
        for parameter in notebook.parameters.values() if find_spec("papermill") else ():
            if parameter.name not in RESERVED:
                print(f"  {parameter.name} ({parameter.kind}, {parameter.default!r}): {parameter.meaning}")
    parser.exit()


def run_renew(arguments: argparse.Namespace) -> int:
    """Draw and judge a report anew."""
    from cram_bench import report

    built = report.renew(arguments.report, arguments.notebooks)
    for name, error in built.failures.items():
        say(f"the notebook {name} failed, and the report stays as it was: {error}")
    print(built.folder / "index.html")
    return 1 if built.failures else 0


def run_reproduce(arguments: argparse.Namespace) -> int:
    """Build a report again; print what differs."""
    from cram_bench.files import check_writable
    from cram_bench.report import reproduce

    check_writable(arguments.into, "--into")
    table = reproduce.reproduce(
        arguments.report,
        arguments.into,
        retrain=not arguments.reuse_runs,
        notebooks=arguments.notebooks,
        folders=_pairs("--folder", "NAME=PATH, such as birds=/data/birds", arguments.folder),
    )
    print(table.to_csv(index=False) if arguments.csv else table.to_string(index=False))
    differing = table[(table["state"] != "same") & (table["kind"] != "version") & (table["kind"] != "device")]
    return 1 if len(differing) else 0


def run_probe(arguments: argparse.Namespace) -> int:
    """Measure a run, or a file of weights."""
    from cram_bench import compress, models, probes, prune, report, runs
    from cram_bench.files import check_writable
    from cram_bench.progress import working

    if arguments.out:
        check_writable(arguments.out, "--out")
    if Path(arguments.folder).is_file() or arguments.folder.endswith(models.weights.FILES):
        train, test, model = _file(arguments)
        augment, name = True, arguments.folder
    else:
        if arguments.arch or arguments.data or arguments.crop or arguments.rename:
            raise ValueError("--arch, --data, --crop and --rename belong to a file of weights; a run knows its own")
        run = runs.Store().open(arguments.folder)
        train, test = run.experiment.load_data()
        model = run.load_model()
        augment, name = run.experiment.data.augment, f"{run.id}: {run.label}, {run.experiment.epochs} epochs"
    sample = train.sample(arguments.sample)
    levels = [f"global@{level:g}" for level in probes.LEVELS]
    calibration = train.calibration(arguments.calibration, augment)
    pruners = [
        spec
        for given in arguments.prune
        for spec in ([f"{given}@{level:g}" for level in probes.LEVELS] if prune.is_name(given) else [given])
    ]
    for spec in pruners:
        prune.parse(spec)  # what is wrong is said before anything is measured
    tables = {
        "sparsity_curve": lambda: probes.sparsity_curve(
            model, test, [*levels, "2:4", *pruners], calibration, batches=train
        ),
        "cram_gap": lambda: probes.cram_gap(model, sample, levels),
        "sam_sharpness": lambda: probes.sam_sharpness(model, sample, [0.05, 0.1, 0.2]),
        "loss_in_ball": lambda: probes.loss_in_ball(model, sample),
        "layer_blame": lambda: probes.layer_blame(model, sample, "global@0.9"),
        "curvature": lambda: probes.curvature(model, sample.sample(200)),
    }
    print(f"{name}; test {len(test)} examples, local loss {len(sample)}, curvature {min(200, len(sample))}")
    weights = compress.prunable(model)
    print(
        f"prunable: {sum(w.numel() for w in weights.values()):,} weights in {len(weights)} tensors; "
        f"dense: {compress.listing(weights.dense, most=20) or 'no other matrix'}"
    )
    if arguments.arch:  # a run knows what it was trained on, a file does not
        print(train.preparation)
    for number, (name, measure) in enumerate(tables.items(), 1):  # shown as they come: the last ones take longest
        with working(f"{name}, {number} of {len(tables)}"):
            table = measure()
        print(f"\n{name}\n{table.to_string(index=False)}", flush=True)
        if arguments.out:
            report.Output(arguments.out).table(table, name)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write a run's network, pruned and smaller where that is asked, for other programs and people."""
    import pandas as pd

    from cram_bench import compress, deploy, prune, runs
    from cram_bench.checks import integer, needs, number
    from cram_bench.files import check_writable
    from cram_bench.progress import working
    from cram_bench.train import evaluate

    target = Path(arguments.path).expanduser()
    if arguments.to == "onnx":
        needs("ONNX files", "deploy", "onnx", "onnxscript", "onnxruntime")
        check_writable(target.parent, "the folder of PATH")
        if target.is_dir():
            raise ValueError(f"PATH must be a file, such as {target / 'model.onnx'}, and {target} is a folder")
    elif arguments.int8:
        raise ValueError(f"--int8 belongs to --to onnx, not to --to {arguments.to}")
    elif target.exists():
        raise ValueError(f"{target} is there already: name a new folder")
    integer("--batch", arguments.batch, 2)
    integer("--repeats", arguments.repeats, 1)
    if arguments.speedup is not None:
        number("--speedup", arguments.speedup, 1.0)
    if arguments.pruner is not None:
        prune.parse(arguments.pruner)
    run = runs.Store().open(arguments.folder)
    train, test = run.experiment.load_data()
    dense, model = run.load_model(), run.load_model()
    inputs = next(test.batches(arguments.batch, channels_last=True))[0]
    with runs.Machine(device="cpu", threads=arguments.threads).limits() as threads:
        said = []
        if arguments.pruner is not None:
            with working(f"pruning, {arguments.pruner}"):
                prune.apply_(model, arguments.pruner, train)
            said.append(arguments.pruner)
        if arguments.speedup is not None:
            with working("latencies of all widths"):
                table = deploy.latency(model, inputs)
            with working(f"ZipLM for {arguments.speedup:g} times the speed"):
                (found,) = prune.ziplm(model, train, [arguments.speedup], latency=table)
            found.apply_(model)
            say(f"units that stay, for -s pruning structured: -s units '{' '.join(map(str, found.counts))}'")
            said.append(f"ziplm for {arguments.speedup:g}x, {found.predicted:.2f}x predicted")
        if said:
            compress.tune_batchnorm(model, train.calibration(arguments.calibration, run.experiment.data.augment))
        weights = compress.prunable(model)
        zeros = sum(int((weight == 0).sum()) for weight in weights.values()) / sum(w.numel() for w in weights.values())
        kept = deploy.alive(model)
        gone = any(len(units) < prune.structures(model)[name].count for name, units in kept.items())
        small = deploy.shrink(model, kept) if gone else model
        structure = deploy.composed(run.structure or {}, kept) if gone else run.structure
        if arguments.to == "run":
            if not gone:
                raise ValueError(
                    f"nothing of {run.id} goes as a whole, so there is no smaller network: try --speedup 2"
                )
            written = runs.write_shrunk(run, small, structure or {}, target)
            print(written.path)
            return 0
        if arguments.to == "onnx":
            with working("ONNX"):
                deploy.write_onnx(small, inputs, target, int8=arguments.int8)
            with working("torch and onnxruntime on the same examples"):
                sample = test.take(range(min(len(test), arguments.examples)))
                results = deploy.compared(small, sample.batches(arguments.batch), [target], inputs, arguments.repeats)
            results.insert(0, "network", ", ".join(said) or "as trained")
            print(results.to_string(index=False))
            print(f"largest difference of a logit: {results['max_difference'].iloc[1]:.2g}")
        else:
            with working("accuracy and latency"):
                rows = [("as trained", dense)] + ([(", ".join(said), small)] if said else [])
                seconds = deploy.timed([network for _, network in rows], inputs, arguments.repeats)
                results = pd.DataFrame(
                    {
                        "state": state,
                        "accuracy": evaluate(network, test)["accuracy"],
                        "sparsity": zeros if network is small and said else 0.0,
                        "parameters": sum(parameter.numel() for parameter in network.parameters()),
                        "bytes": deploy.size(network),
                        "ms": 1000 * time,
                        "batch": len(inputs),
                        "threads": threads,
                    }
                    for (state, network), time in zip(rows, seconds, strict=True)
                )
            deploy.write_hub(small, target, run.experiment.settings(), test, results, structure)
            print(results.to_string(index=False))
        print(target)
    return 0


def _file(arguments: argparse.Namespace) -> Any:
    """Return (train, test, model) of a file of weights of somebody else's training."""
    from cram_bench import data, models

    if not arguments.arch or not arguments.data:
        raise ValueError("a file of weights needs --arch, the model, and --data, what to probe it on")
    rename = _pairs("--rename", "OLD=NEW, such as downsample=shortcut", arguments.rename)
    train, test = data.load(arguments.data, crop=arguments.crop, model=arguments.arch)
    model = models.create(arguments.arch, train.num_classes, train.channels, train.image_size)
    try:
        models.load_(model, arguments.folder, rename, kind=arguments.arch)
    except ValueError as error:
        more = (
            "; --rename OLD=NEW changes a part of the names" if " missing, first " in str(error) and not rename else ""
        )
        raise ValueError(f"{error}{more}") from error
    return train, test, model


def run_settings(arguments: argparse.Namespace) -> int:
    """List what ``-s`` can set."""
    import csv
    import shutil
    import textwrap

    from cram_bench import recipes

    rows = recipes.settings(arguments.method, arguments.dataset)
    for row in rows:
        if row["setting"] in ("dataset", "method", "epochs", "seed"):
            row["setting"] = f"--{row['setting']}"
    if arguments.csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return 0
    widths = [max(len(row[column]) for row in rows) for column in ("setting", "type")]
    room = max(40, min(120, shutil.get_terminal_size((100, 24)).columns) - sum(widths) - 4)
    for row in rows:
        lines = textwrap.wrap(f"{row['meaning']} ({row['default']})", room) or [""]
        print(f"{row['setting']:<{widths[0]}}  {row['type']:<{widths[1]}}  {lines[0]}")
        for line in lines[1:]:
            print(f"{'':{sum(widths) + 4}}{line}")
    of = f"{arguments.method} on {arguments.dataset}" if arguments.method else f"sgd on {arguments.dataset}"
    print(f"\nIn brackets the defaults of {of}. -s NAME VALUE sets those without dashes, such as -s lr 0.05.")
    return 0


def _values(pairs: list[list[str]]) -> dict[str, Any]:
    """Read NAME VALUE pairs, the values as YAML; a name given twice is refused."""
    from cram_bench import _yaml
    from cram_bench.checks import shown

    values: dict[str, Any] = {}
    for name, text in pairs:
        called = name if name.isidentifier() else shown(name)
        if name in values:
            raise ValueError(f"{called} is given twice")
        try:
            values[name] = _yaml.load(text)
        except Exception as error:  # much else is raised where a tag or a date does not fit
            raise ValueError(f"the value of {called}, {shown(text)}, is not YAML of plain values") from error
    return values


def _pairs(option: str, form: str, texts: list[str]) -> dict[str, str]:
    """Read texts such as OLD=NEW; one given twice is refused."""
    from cram_bench.checks import shown

    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals or not value:
            raise ValueError(f"{option} must be {form}, not {shown(text)}")
        if name in found:
            raise ValueError(f"{option} {name} is given twice")
        found[name] = value
    return found


TRAINING = (run_train, run_sweep, run_report, run_reproduce)
"""The commands that go on where they were interrupted."""
