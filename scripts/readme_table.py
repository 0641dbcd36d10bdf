"""Copy the committed reports' tables into README.md, between its markers, so that no number there is typed by hand."""

import json
from pathlib import Path

import pandas as pd
from claims import claims

from cram_bench.report.findings import findings, listed, trained_at
from cram_bench.report.pages import with_training

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ("cifar10-resnet20-15-epochs", "cifar10-resnet20", "sst2-minilm")
ASKED = {
    "cifar10-equal-cost": "What CrAM's second gradient buys",
    "cifar10-ablations": "Which part of CrAM does the work",
    "cifar10-transfer": "Whether a sparse model still learns something new",
    "cifar10-second-order": "What curvature buys in one shot",
    "cifar10-specialist-vehicles": "Whether a few examples of four classes prune a network for them",
    "cifar10-specialist-cat-dog": "Whether a few examples of cats and dogs do",
    "sst2-second-order": "What curvature buys on sentences",
    "cifar10-better-pruner": "Whether training for compression pays when the pruner is good",
    "cifar10-looking": "Whether CrAM gains from the masks of a pruner that looks",
    "cifar10-pruners-at-95": "Why a pruner that looks does harm at 95 %, masks and values apart",
}
"""Reports of which the README has the result in words → what they ask."""
NAMES = {
    "resnet20": "ResNet-20 (shortcuts without parameters)", "cifar10": "CIFAR-10", "minilm": "MiniLM", "sst2": "SST-2"
}  # fmt: skip
BEGIN, END = "<!-- begin table: make readme -->", "<!-- end table -->"
BENCHMARKS = "<!-- begin benchmarks: make benchmark -->", "<!-- end benchmarks -->"
CLAIMS = "<!-- begin claims: make readme -->", "<!-- end claims -->"
COUNTS = "<!-- begin counts: make counts -->", "<!-- end counts -->"


def table(report: Path) -> str:
    """Return the result of a report in words, its summary table and what made it, as Markdown."""
    built = json.loads((report / "report.json").read_text(encoding="utf-8"))
    questions = built["build"]["questions"]
    usual = (report / "tables" / "accuracy_summary.csv").exists()
    names = ("accuracy_summary", "runs") if usual else (f"{questions[0]}_summary", f"{questions[0]}_runs")
    summary, runs = (pd.read_csv(report / "tables" / f"{name}.csv", dtype=str).fillna("") for name in names)
    summary = with_training(summary, trained_at(built["runs"]))
    head = list(summary.columns)
    rows = [head, ["---"] + ["--:"] * (len(head) - 1), *summary.to_numpy().tolist()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    facts = {name: list(dict.fromkeys(runs[name])) for name in ("epochs", "seed", "device", "commit")}
    settings = built["runs"][0]["settings"]
    note = (
        f"{NAMES[settings['model']]} on {NAMES[settings['dataset']]}, {listed(facts['epochs'])} epochs, "
        f"{'seed' if len(facts['seed']) == 1 else 'seeds'} {listed(facts['seed'])}, {settings['precision']}, "
        f"on {listed(facts['device'])}; trained at commit {', '.join(facts['commit'])}."
    )
    return "\n\n".join([*findings(report, questions), "\n".join(lines), note])


def result(report: Path, asked: str) -> str:
    """Return a line of a list: what a report asks, and its result in words."""
    questions = json.loads((report / "report.json").read_text(encoding="utf-8"))["build"]["questions"]
    return f"* {asked} ([report](reports/{report.name}/)): {' '.join(findings(report, questions))}"


def tables(reports: Path) -> str:
    """Return the results and tables of all committed reports, the headline first."""
    told = "\n".join(result(reports / name, asked) for name, asked in ASKED.items())
    return "\n\n".join([*(table(reports / name) for name in REPORTS), told])


def counts(reports: Path) -> str:
    """Return the table of what was done to the run store, as `tests` counted it, as Markdown."""
    found = json.loads((reports / "robustness.json").read_text(encoding="utf-8"))
    sweeps = [found.get(name, "not run") for name in ("kills in a local sweep", "kills in a sweep on Slurm")]

    def all_of(kind: str) -> int | str:
        return sum(number for name, number in found.items() if name.startswith(kind)) or "not run"

    rows = [
        ("`kill -9` of a training, before each change of a file", found["kills before a change of a file"]),
        ("`kill -9` of a training, at random times", found["kills at random times"]),
        (
            "`kill -9` while images are cached, while a report is built",
            f"{found['kills of a cache']}, {found['kills of a report']}",
        ),
        ("`kill -9` in a sweep of 24 trainings, on this machine and on Slurm", f"{sweeps[0]}, {sweeps[1]}"),
        ("processes at once that ask for overlapping experiments, one of them killed", found["processes at once"]),
        ("bits flipped in a finished run", all_of("bits flipped")),
        ("`kill -9` of a writer of the index of many runs", found.get("kills of a writer of the index", "not run")),
        ("a damaged run among sound ones", all_of("damaged neighbours")),
        (
            "a process that holds a lock and is stopped; a lock that is a link to a file",
            f"{found['stopped holders']}, {found['locks that are links']}",
        ),
        ("a lock removed underneath; a file system without locks", f"{all_of('locks removed')}, {all_of('no locks')}"),
        (
            "a clock that is hours ahead; a process that decodes and hangs",
            f"{all_of('clocks ahead')}, {all_of('workers that hang')}",
        ),
        ("wrong settings, files and shapes", found["wrong inputs"]),
    ]
    lines = ["| tried | times |", "| --- | --: |", *(f"| {what} | {number} |" for what, number in rows)]
    return "\n".join([*lines, f"| bytes lost | {found['bytes lost']} |"])


def benchmarks(reports: Path) -> str:
    """Return the ratios and the machine that they were measured on, as Markdown."""
    lines = pd.read_csv(reports / "benchmarks.csv")
    text = ["| | ratio | least … greatest | ours | peer | |", "| --- | --: | --: | --: | --: | --- |"]
    for line in lines.itertuples():
        low, high = f"{line.low:.3g}", f"{line.high:.3g}"
        spread = "" if low == high else f"{low} … {high}"
        ours, peer = (f"{float(f'{side:.4g}'):g}" for side in (line.ours, line.peer))  # four digits, and no exponent
        text.append(f"| {line.name} | {line.ratio:.3g} | {spread} | {ours} | {peer} | {line.unit} |")
    made = {name: ", ".join(sorted(set(lines[name]))) for name in ("device", "torch", "commit")}
    where = f"{made['device']}, torch {made['torch']}, at commit {made['commit']}"
    return "\n".join([*text, "", f"Measured on {where}; `make benchmark` measures again."])


def filled(readme: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """Return the text of the README with `content` between the markers."""
    before, _, rest = readme.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = filled(readme.read_text(encoding="utf-8"), tables(ROOT / "reports"))
    text = filled(text, claims(ROOT / "reports"), *CLAIMS)
    text = filled(text, benchmarks(ROOT / "reports"), *BENCHMARKS)
    readme.write_text(filled(text, counts(ROOT / "reports"), *COUNTS), encoding="utf-8")
