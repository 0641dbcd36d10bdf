"""The command line: ``cram-bench train | sweep | report | reproduce | renew | probe | runs | settings``.

Nothing heavy is imported before a command is known, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cram_bench import __version__
from cram_bench.untrusted import printable

if TYPE_CHECKING:
    from cram_bench.distributed import Group


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 when done, 1 after a problem said in one line, 2 a wrong call, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("cram_bench", _as_can_be)
        sys.stdout.reconfigure(errors="cram_bench")
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    if others:
        how = "; settings are given as -s NAME VALUE, and `cram-bench settings` lists them"
        parser.error(f"unrecognized arguments: {shlex.join(others)}{how if arguments.run is _train else ''}")
    arguments.argv = argv
    try:
        with _warnings_on_a_line(), contextlib.redirect_stdout(_Printable(sys.stdout)):  # type: ignore[type-var]
            return arguments.run(arguments)
    except KeyboardInterrupt:
        on = "; the same command goes on from the last finished epoch" if arguments.run in _TRAINING else ""
        print(f"interrupted{on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        _say(_line(error))
        return 1


def _say(line: str) -> None:
    print(printable(f"cram-bench: {line}"), file=sys.stderr)


class _Printable:
    """Standard output that carries no commands to a terminal, whatever a run, a class or a file is called."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _as_can_be(error: UnicodeError) -> tuple[bytes, int]:
    """Write what a terminal has no letters for as Python does, and the bytes of a file's name as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    parts = [bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else ascii(c)[1:-1].encode() for c in wrong]
    return b"".join(parts), error.end


def _line(error: Exception) -> str:
    """Return what to say of an error: one line, never empty, with the file of a system's error and what helps."""
    from cram_bench.checks import one_line

    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        helps = "; free some space there, and the same command goes on" if full else ""
        return f"{one_line(error)}{helps}" + (f": {error.filename!r}" if error.filename else "")
    if isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError)):
        return one_line(error)
    what = type(error).__name__  # nobody foresaw it, so that its words alone say little
    return f"{what}{f': {one_line(error)}' if str(error).strip() else ''} (cram-bench --debug … shows where)"


@contextlib.contextmanager
def _warnings_on_a_line() -> Iterator[None]:
    """Say this package's warnings as its errors are said, without file and line."""
    import warnings

    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
            if category is UserWarning:
                _say(str(message).strip().partition(chr(10))[0])
            else:
                usual(message, category, *where, **options)

        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cram-bench",
        description="Train, prune and probe networks; regenerate the reports that compare them.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"cram-bench {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser(
        "train", help="train one experiment, or find it trained; print its folder", add_help=False
    )
    train.add_argument("-h", "--help", action="store_true", help="show this, and the data sets, methods and recipes")
    train.add_argument("--dataset", default="digits", help="one of those below, or an image folder (default: digits)")
    train.add_argument("--method", default="sgd", help="one of those below (default: sgd)")
    train.add_argument(
        "--recipe", metavar="NAME", help="settings of a paper, one of those below (default: for two cores)"
    )
    train.add_argument("--epochs", type=int, help="passes over the data (default: the recipe's)")
    train.add_argument("--seed", type=int, default=0)
    _settings(train)
    _machine(train)
    train.add_argument("--workers", type=int, help="processes that decode streamed images (default: one a CPU)")
    train.set_defaults(run=_train, parser=train)

    sweep = commands.add_parser("sweep", help="train many experiments over the cores of this machine, or over Slurm")
    sweep.add_argument("file", metavar="SWEEP.yaml", help="a grid or a list of experiments")
    sweep.add_argument("--executor", choices=["local", "slurm"], default="local", help="where (default: local)")
    sweep.add_argument("--workers", type=int, help="jobs at once (default: GPUs or else cores; on Slurm, what it lets)")
    sweep.add_argument("--per-job", type=int, default=1, help="experiments that a job trains in turn (default: 1)")
    sweep.add_argument("--retries", type=int, default=3, help="new tries of one whose worker died (default: 3)")
    sweep.add_argument("--retry-failed", action="store_true", help="train those anew that diverged before")
    sweep.add_argument(
        "--slurm", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
        help="a parameter of sbatch, such as --slurm partition gpu, --slurm timeout 120 (minutes; default: 60), "
        "--slurm cpus 4, --slurm mem 8GB or --slurm gres gpu:1",
    )  # fmt: skip
    sweep.add_argument("--folder", help="for results.csv (default: the sweep's own in the store)")
    sweep.add_argument("--csv", action="store_true", help="print the results as CSV")
    _machine(sweep)
    sweep.set_defaults(run=_sweep)

    report = commands.add_parser(
        "report", help="train what is missing, execute the notebooks, write reports/NAME/", add_help=False
    )
    report.add_argument("-h", "--help", action="store_true", help="show this, and the notebooks with their parameters")
    report.add_argument(
        "--dataset",
        help="one of those of `cram-bench train --help`, or an image folder (default: the notebook's)",
    )
    report.add_argument(
        "--notebook", action="append", metavar="NAME",
        help="execute this notebook; may be repeated (default: the first two of those below)",
    )  # fmt: skip
    report.add_argument(
        "--profile", default="", help="quick (a first look) or full (numbers to quote) (default: the notebook's)"
    )
    report.add_argument("--seeds", type=int, help="how many seeds, 0 … N-1 (default: 3 for digits, else 1)")
    report.add_argument("--reports", default="reports", help="folder to write to (default: reports)")
    report.add_argument("--name", help="of the report's folder (default: DATASET-MODEL, with -quick for that profile)")
    report.add_argument("--notebooks", help="folder of the notebooks (default: those of this package)")
    report.add_argument("--keep-runs", action="store_true", help="copy the finished seed-0 runs beside the report")
    report.add_argument(
        "--paths", action="store_true", help="publish where image folders are (default: their names alone)"
    )
    report.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help="set a notebook parameter, such as -p epochs 30; VALUE is read as YAML",
    )  # fmt: skip
    _machine(report)
    report.set_defaults(run=_report, parser=report)

    probe = commands.add_parser("probe", help="measure a finished run: accuracy against sparsity, and local loss")
    probe.add_argument(
        "folder", metavar="RUN",
        help="a run's folder or the beginning of its id; or a file of weights: .safetensors, or .pth and .pt, of which "
        "only weights are loaded",
    )  # fmt: skip
    probe.add_argument("--arch", help="of a file: the model, such as resnet20 or torchvision:resnet18")
    probe.add_argument("--data", help="of a file: a data set or an image folder to probe on")
    probe.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW",
        help="of a file: what the model calls a part of its names, such as --rename downsample=shortcut "
        "--rename fc=linear",
    )  # fmt: skip
    probe.add_argument(
        "--crop", type=int, default=0,
        help="of a file: cut images of any size to CROP pixels a side and normalise as for ImageNet, as torchvision's "
        "own weights expect (224 for most); without it images must be of one size, and are normalised by the training "
        "images'",
    )  # fmt: skip
    probe.add_argument(
        "--calibration", type=int, default=2000, help="training images for BatchNorm tuning (default: 2000)"
    )
    probe.add_argument(
        "--sample", type=int, default=1000, help="training images for the local-loss probes (default: 1000)"
    )
    probe.add_argument(
        "--prune", action="append", default=[], metavar="SPEC",
        help="pruners for the sparsity curve beside magnitude, such as greedy@0.9 or 2:4+obs; a name alone, such as "
        "greedy, at every level",
    )  # fmt: skip
    probe.add_argument("--out", help="folder to write tables/*.csv to")
    probe.set_defaults(run=_probe)

    again = commands.add_parser("reproduce", help="train and build a report again, and say what differs")
    again.add_argument("report", metavar="REPORT", help="the report's folder")
    again.add_argument(
        "--into", default="reproduced", help="folder for the new report and its runs (default: reproduced)"
    )
    again.add_argument(
        "--reuse-runs", action="store_true", help="take finished runs from the store instead of training"
    )
    again.add_argument(
        "--folder", action="append", default=[], metavar="NAME=PATH",
        help="where an image folder is that the report names; may be repeated",
    )  # fmt: skip
    again.add_argument("--notebooks", help="folder of the notebooks (default: those of this package)")
    again.add_argument("--csv", action="store_true", help="print as CSV")
    again.set_defaults(run=_reproduce)

    renew = commands.add_parser(
        "renew", help="draw and judge a report anew from its own tables, training and measuring nothing"
    )
    renew.add_argument("report", metavar="REPORT", help="the report's folder")
    renew.add_argument("--notebooks", help="folder of the notebooks (default: those of this package)")
    renew.set_defaults(run=_renew)

    runs = commands.add_parser("runs", help="list the runs in the store")
    runs.add_argument("--csv", action="store_true", help="print as CSV")
    runs.set_defaults(run=_runs)

    settings = commands.add_parser("settings", help="list what -s can set, with type, default and meaning")
    settings.add_argument("method", nargs="?", default="", metavar="METHOD", help="only what this method looks at")
    settings.add_argument("--dataset", default="digits", help="whose defaults to list (default: digits)")
    settings.add_argument("--csv", action="store_true", help="print as CSV")
    settings.set_defaults(run=_list_settings)
    return parser


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-s", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="settings",
        help="change any other setting, such as -s lr 0.2 or -s model vgg16_bn; VALUE is read as YAML; "
        "`cram-bench settings` lists them",
    )  # fmt: skip


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: for long trainings)"
    )
    parser.add_argument(
        "--wait", type=float, metavar="SECONDS",
        help="how long to wait for another process that trains the same run (default: without a limit)",
    )  # fmt: skip


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


def _train(arguments: argparse.Namespace) -> int:
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
        device=arguments.device,
        threads=arguments.threads,
        compile=arguments.compile,
        wait=arguments.wait,
        workers=arguments.workers,
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


def _sweep(arguments: argparse.Namespace) -> int:
    import warnings

    from cram_bench import runs, sweep
    from cram_bench.files import check_writable

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        experiments = sweep.read(arguments.file)
    for warning in said:
        _say(str(warning.message))
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
        device=arguments.device,
        threads=arguments.threads,
        compile=arguments.compile,
        wait=arguments.wait,
    )
    path = sweep.save(results, arguments.folder or store.root / ".sweeps" / name)
    if arguments.csv:
        print(results.to_csv(index=False), end="")
    else:
        print(results.drop(columns=list(sweep.OF_THE_MACHINE)).to_string(index=False, na_rep="-"))
        print(path)
    missing = int((results["state"] != "finished").sum())
    if missing:
        _say(f"{missing} of {len(results)} experiments have no result; the table says why")
    return 1 if missing else 0


def _runs(arguments: argparse.Namespace) -> int:
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


def _report(arguments: argparse.Namespace) -> int:
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
        device=arguments.device,
        threads=arguments.threads,
        compile=arguments.compile,
        wait=arguments.wait,
    )
    for name, error in built.failures.items():
        _say(f"the notebook {name} failed: {error}")
    for name, error in built.trainings.items():
        _say(f"the training {name} failed: {error}")
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


def _renew(arguments: argparse.Namespace) -> int:
    from cram_bench import report

    built = report.renew(arguments.report, arguments.notebooks)
    for name, error in built.failures.items():
        _say(f"the notebook {name} failed, and the report stays as it was: {error}")
    print(built.folder / "index.html")
    return 1 if built.failures else 0


def _reproduce(arguments: argparse.Namespace) -> int:
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


def _probe(arguments: argparse.Namespace) -> int:
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


def _list_settings(arguments: argparse.Namespace) -> int:
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


_TRAINING = (_train, _sweep, _report, _reproduce)


if __name__ == "__main__":
    sys.exit(main())
