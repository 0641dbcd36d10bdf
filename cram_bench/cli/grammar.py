"""The words of the command line: its commands, their options, and what each means."""

from __future__ import annotations

import argparse

from cram_bench import __version__
from cram_bench.cli import commands, exploring


def parser_of_commands() -> argparse.ArgumentParser:
    """Return the parser; `run` of what it reads is the function of the command."""
    parser = argparse.ArgumentParser(
        prog="cram-bench",
        description="Train, prune and probe networks; regenerate the reports that compare them.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"cram-bench {__version__}")
    kinds = parser.add_subparsers(required=True, metavar="command")

    train = kinds.add_parser("train", help="train one experiment, or find it trained; print its folder", add_help=False)
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
    train.add_argument(
        "--sparse",
        action="store_true",
        help="where a mask is held, and in CrAM's second pass, compute at nonzeros only in layers that are faster so",
    )
    train.set_defaults(run=commands.run_train, parser=train)

    sweep = kinds.add_parser("sweep", help="train many experiments over the cores of this machine, or over Slurm")
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
    sweep.set_defaults(run=commands.run_sweep)

    report = kinds.add_parser(
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
    report.add_argument("--keep-runs", action="store_true", help="copy the finished runs, weights too, into the report")
    report.add_argument(
        "--paths", action="store_true", help="publish where image folders are (default: their names alone)"
    )
    report.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help="set a notebook parameter, such as -p epochs 30; VALUE is read as YAML",
    )  # fmt: skip
    _machine(report)
    report.set_defaults(run=commands.run_report, parser=report)

    probe = kinds.add_parser("probe", help="measure a finished run: accuracy against sparsity, and local loss")
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
        help="pruners for the sparsity curve beside magnitude, such as 'greedy(gradients=64)@0.9' or 2:4+obs; a name "
        "alone, such as greedy, at every level",
    )  # fmt: skip
    probe.add_argument("--out", help="folder to write tables/*.csv to")
    probe.set_defaults(run=commands.run_probe)

    explore = kinds.add_parser("explore", help="open a page on which to prune networks and see what breaks")
    explore.add_argument(
        "run_names", nargs="*", metavar="RUN",
        help="runs' folders or beginnings of their ids; with neither these nor --model, the page lets one choose",
    )  # fmt: skip
    explore.add_argument("--data", help="a data set or an image folder: of --model, or the first choice of the page")
    explore.add_argument(
        "--model", metavar="NAME",
        help="a network: with --weights any, such as resnet20; without, one with weights of its library: "
        "torchvision:NAME, timm:NAME or hub:NAME",
    )  # fmt: skip
    explore.add_argument("--weights", metavar="FILE", help="its weights: .safetensors, or .pth and .pt")
    explore.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW", help="as of `cram-bench probe --help`"
    )
    explore.add_argument("--crop", type=int, default=0, help="as of `cram-bench probe --help`")
    explore.add_argument("--sample", type=int, default=1000, help="examples to evaluate on (default: 1000)")
    explore.add_argument(
        "--calibration", type=int, default=250, help="training images for BatchNorm tuning of runs (default: 250)"
    )
    explore.add_argument("--port", type=int, help="of the page (default: the first free one from 8866)")
    explore.add_argument(
        "--no-browser", dest="browser", action="store_false", help="print the address and open nothing"
    )
    explore.set_defaults(run=exploring.run_explore)

    export = kinds.add_parser("export", help="write a run's network, pruned and smaller, as ONNX or for a hub")
    export.add_argument("folder", metavar="RUN", help="a run's folder or the beginning of its id")
    export.add_argument(
        "--to", choices=["onnx", "hub", "run"], required=True,
        help="onnx: a file for other runtimes; hub: a folder with weights, configuration and a model card; run: a "
        "folder that all commands here take, with the smaller network",
    )  # fmt: skip
    export.add_argument("path", metavar="PATH", help="the file or folder to write")
    export.add_argument("-p", "--pruner", metavar="SPEC", help="prune first, such as greedy@0.9 or 2:4+obs")
    export.add_argument(
        "--speedup", type=float, metavar="TIMES",
        help="remove heads, columns and channels for that speed-up, as measured here (ZipLM); such as 2",
    )  # fmt: skip
    export.add_argument("--int8", action="store_true", help="of ONNX: products of matrices in 8 bits; the rest stays")
    export.add_argument("--batch", type=int, default=32, help="examples in a batch that is timed (default: 32)")
    export.add_argument("--threads", type=int, help="torch's and onnxruntime's on the CPU")
    export.add_argument("--repeats", type=int, default=21, help="warm runs whose median is told (default: 21)")
    export.add_argument(
        "--examples", type=int, default=1000, help="of the test set, on which logits are compared (default: 1000)"
    )
    export.add_argument(
        "--calibration", type=int, default=2000, help="training images for BatchNorm tuning (default: 2000)"
    )
    export.set_defaults(run=commands.run_export)

    again = kinds.add_parser("reproduce", help="train and build a report again, and say what differs")
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
    again.set_defaults(run=commands.run_reproduce)

    renew = kinds.add_parser(
        "renew", help="draw and judge a report anew from its own tables, training and measuring nothing"
    )
    renew.add_argument("report", metavar="REPORT", help="the report's folder")
    renew.add_argument("--notebooks", help="folder of the notebooks (default: those of this package)")
    renew.set_defaults(run=commands.run_renew)

    runs = kinds.add_parser("runs", help="list the runs in the store")
    runs.add_argument("--csv", action="store_true", help="print as CSV")
    runs.set_defaults(run=commands.run_runs)

    settings = kinds.add_parser("settings", help="list what -s can set, with type, default and meaning")
    settings.add_argument("method", nargs="?", default="", metavar="METHOD", help="only what this method looks at")
    settings.add_argument("--dataset", default="digits", help="whose defaults to list (default: digits)")
    settings.add_argument("--csv", action="store_true", help="print as CSV")
    settings.set_defaults(run=commands.run_settings)
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
