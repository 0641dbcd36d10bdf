"""Copy the committed reports' tables into README.md and docs/, between their markers: no number there is typed by hand.

    <!-- begin result cifar10-transfer: make readme -->
    <!-- end -->

names a block of `BLOCKS` and its arguments. What stands between the two lines is written anew by ``make readme``, and a
test compares.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from claims import claims

from cram_bench.report.findings import findings, listed, trained_at
from cram_bench.report.pages import itemised, numbers, with_training

ROOT = Path(__file__).resolve().parent.parent
ASKED = {
    "cifar10-resnet20-15-epochs": "Accuracy against sparsity, three seeds",
    "cifar10-resnet20": "Accuracy against sparsity, CrAM+-Ramp too",
    "sst2-minilm": "Accuracy against sparsity on sentences",
    "cifar10-equal-cost": "What CrAM's second gradient buys",
    "cifar10-ablations": "Which part of CrAM does the work",
    "cifar10-transfer": "Whether a sparse model still learns something new",
    "cifar10-second-order": "What curvature buys in one shot",
    "cifar10-specialist-vehicles": "Whether a few examples of four classes prune a network for them",
    "cifar10-specialist-cat-dog": "Whether a few examples of cats and dogs do",
    "sst2-second-order": "What curvature buys on sentences",
    "digits-gradual": "From how many sparsities on CrAM pays, on the digits",
    "digits-preconditioners": "Whether error feedback keeps M-FAC's accuracy, on the digits",
    "cifar10-better-pruner": "Whether training for compression pays when the pruner is good",
    "cifar10-looking": "Whether CrAM gains from the masks of a pruner that looks",
    "cifar10-pruners-at-95": "Why a pruner that looks does harm at 95 %, masks and values apart",
}
"""Committed reports → what they ask, in the order of the docs."""
NAMES = {
    "resnet20": "ResNet-20 (shortcuts without parameters)", "cifar10": "CIFAR-10", "minilm": "MiniLM", "sst2": "SST-2",
    "convnet": "A small convolutional network", "digits": "the digits",
}  # fmt: skip
SUMMARIES = {
    "accuracy_vs_sparsity": ("accuracy_summary",),
    "specialist": ("specialist_accuracy", "specialist_task_accuracy"),
    "preconditioners": ("preconditioners_summary", "preconditioners_pruned_summary"),
}
"""Notebook → its tables that readers see; of others NOTEBOOK_summary."""
MEANT = {
    "specialist_accuracy": "Accuracy on the task in per cent, among all classes",
    "specialist_task_accuracy": "Accuracy in per cent among the task's classes alone",
}
LETTERS = "b: BatchNorm tuned; s: statistics corrected; of both, the one of less held-out loss."
BLOCK = re.compile(r"(<!-- begin ([^:>]+): make \w+ -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def built(report: Path) -> dict:
    """Return what a report says about itself."""
    return json.loads((report / "report.json").read_text(encoding="utf-8"))


def markdown(table: pd.DataFrame) -> str:
    """Return a table of texts as Markdown, numbers to the right.

    >>> print(markdown(pd.DataFrame({"": ["SGD"], "90 %": ["54.4 ± 4.0"]})))
    |  | 90 % |
    | --- | --: |
    | SGD | 54.4 ± 4.0 |
    """
    table = table.astype(str)
    kinds = ["--:" if numbers(table[name]) else "---" for name in table]
    rows = [list(table.columns), kinds, *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summaries(report: Path) -> dict[str, pd.DataFrame]:
    """Return name → table, as texts, of what a report shows its readers; sparsities are headed in per cent."""
    question = built(report)["build"]["questions"][0]
    found = {}
    for name in SUMMARIES.get(question, (f"{question}_summary",)):
        table = pd.read_csv(report / "tables" / f"{name}.csv", dtype=str).fillna("")
        table = table.rename(columns=lambda head: f"{head} %" if re.fullmatch(r"[\d.]+", head) else head)
        if question in ("accuracy_vs_sparsity", "language"):
            table = with_training(table, trained_at(built(report)["runs"]))
        found[name] = table
    return found


def note(report: Path, commits: bool = True) -> str:
    """Say what a report's networks are, what they were trained on, and by which commits."""
    question, settings = built(report)["build"]["questions"][0], built(report)["runs"][0]["settings"]
    name = "runs" if question == "accuracy_vs_sparsity" else f"{question}_runs"
    runs = pd.read_csv(report / "tables" / f"{name}.csv", dtype=str).fillna("")
    facts = {name: list(dict.fromkeys(runs[name])) for name in ("epochs", "seed", "device", "commit")}
    names = {part: NAMES.get(settings[part], settings[part]) for part in ("model", "dataset")}
    trained = f"; trained at commit {', '.join(facts['commit'])}" if commits else ""
    return (
        f"{names['model']} on {names['dataset']}, {listed(facts['epochs'])} epochs, "
        f"{'seed' if len(facts['seed']) == 1 else 'seeds'} {listed(facts['seed'])}, {settings['precision']}, "
        f"on {listed(facts['device'])}{trained}."
    )


def headline(reports: Path, up: str, name: str) -> str:
    """Return the first result of a report in words, its table, and what made it."""
    report = reports / name
    (table,) = summaries(report).values()
    first = findings(report, built(report)["build"]["questions"])[0]
    return "\n\n".join([first, markdown(table), note(report)])


def result(reports: Path, up: str, name: str) -> str:
    """Return what a report asks as a heading, its results in words as a list, its tables, and what made it."""
    report = reports / name
    said = itemised(findings(report, built(report)["build"]["questions"]))
    told = "\n".join("\n".join([f"* {head}", *(f"    * {part}" for part in parts)]) for head, parts in said)
    tables = [shown(name, table) for name, table in summaries(report).items()]
    where = f"[The report]({up}reports/{name}/) has figures, tables and notebook. {note(report)}"
    return "\n\n".join([f"## {ASKED[name]}", told, *tables, where])


def shown(name: str, table: pd.DataFrame) -> str:
    """Return a table with what it means above and what its letters mean below."""
    letters = any(re.search(r"\d [bs]$", cell) for cell in table.to_numpy().ravel())
    meant = f"{MEANT[name]}:" if name in MEANT else "Accuracy in per cent:" if "pruner" in table else ""
    return "\n\n".join(filter(None, [meant, markdown(table), LETTERS if letters else ""]))


def measured(reports: Path, up: str, kind: str, *names: str) -> str:
    """Return what the committed reports have of some methods or pruners, beside what they are compared with.

    Args:
        reports: folder of the reports.
        up: the way from the page to the root of the project.
        kind: ``methods``, by their labels with ``_`` for a space, or ``pruners``, without settings.
        names: of these; after ``in``, reports: of all, where it is left out.
    """
    names, among = (names[: names.index("in")], names[names.index("in") + 1 :]) if "in" in names else (names, ASKED)
    told = []
    for report in (reports / name for name in among):
        found = []
        for name, table in summaries(report).items():
            own = table["pruner" if "pruner" in table else table.columns[0]]
            if ("pruner" in table) != (kind == "pruners"):
                continue
            plain = own.str.replace(" ", "_") if kind == "methods" else own.str.replace(r"\([^()]*\)", "", regex=True)
            wanted, against = plain.isin(names), own.index == 0 if kind == "methods" else own == "global"
            if wanted.any():
                rows = table[wanted | against]
                found.append(shown(name, rows.loc[:, (rows != "").any()]))
        if found:
            what = f"**{ASKED[report.name]}** ([report]({up}reports/{report.name}/))"
            told += [what, *found, note(report, commits=False)]
    return "\n\n".join(told) or "No committed report has it yet."


def counts(reports: Path, up: str) -> str:
    """Return the table of what was done to the run store, as `tests` counted it, as Markdown."""
    found = json.loads((reports / "robustness.json").read_text(encoding="utf-8"))

    def of(*kinds: str) -> str:
        """Return how often each kind was tried, in all its variants: `kind` itself, or `kind: variant`."""
        sums = (sum(n for name, n in found.items() if name.partition(": ")[0] == kind) for kind in kinds)
        return ", ".join(str(number or "not run") for number in sums)

    rows = [
        ("`kill -9` of a training, before each change of a file", of("kills before a change of a file")),
        ("`kill -9` of a training, at random times", of("kills at random times")),
        (
            "`kill -9` while images are cached, a report is built, a notebook is kept",
            of("kills of a cache", "kills of a report", "kills of a notebook"),
        ),
        (
            "`kill -9` in a sweep of 24 trainings, on this machine and on Slurm",
            of("kills in a local sweep", "kills in a sweep on Slurm"),
        ),
        ("processes at once that ask for overlapping experiments, one of them killed", of("processes at once")),
        ("a bit flipped in a finished run; a checkpoint damaged", of("bits flipped", "damaged checkpoints")),
        ("a full disk; a store that may only be read", of("full disks", "stores that may only be read")),
        (
            "the index of many runs: `kill -9` of a writer, damaged or gone, writers at once",
            of("kills of a writer of the index", "damaged index", "writers of the index at once"),
        ),
        (
            "a damaged run among sound ones; a damaged report; files and folders that are no run",
            of("damaged neighbours", "damaged reports", "foreign neighbours"),
        ),
        ("stores called by braces, quotes, `$x^$`, two lines …", of("odd names of a store")),
        (
            "a process that holds a lock and is stopped; a lock that is a link; links in a run that is copied",
            of("stopped holders", "locks that are links", "links in a run"),
        ),
        ("a lock removed underneath; a file system without locks", of("locks removed", "no locks")),
        (
            "a clock that is hours ahead; a process that decodes and hangs, a kernel that hangs",
            of("clocks ahead", "workers that hang", "kernels that hang"),
        ),
        ("files of others: bombs, devices, pipes, headers, weights that are none", of("files of others")),
        ("reports of others that would choose what runs or what is read", of("reports of others")),
        ("texts of others that would be markup, scripts or commands of a terminal", of("texts of others")),
        ("wrong settings, files and shapes", of("wrong inputs")),
    ]
    lines = ["| tried | times |", "| --- | --: |", *(f"| {what} | {number} |" for what, number in rows)]
    return "\n".join([*lines, f"| bytes lost | {found['bytes lost']} |"])


def benchmarks(reports: Path, up: str) -> str:
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


BLOCKS: dict[str, Callable[..., str]] = {
    "headline": headline,
    "result": result,
    "measured": measured,
    "claims": claims,
    "benchmarks": benchmarks,
    "counts": counts,
}
"""Name of a block → a function of the folder of the reports, the way up to the root, and the block's arguments."""


def pages() -> list[Path]:
    """Return the files that have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, up: str, reports: Path = ROOT / "reports") -> str:
    """Return a page with all its blocks written anew; `up` is the way from it to the root of the project.

    Raises:
        ValueError: a block is unknown, or has no end.
    """

    def block(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        if name not in BLOCKS:
            raise ValueError(f"unknown block {name!r}; allowed are {', '.join(BLOCKS)}")
        return f"{match[1]}\n{BLOCKS[name](reports, up, *arguments)}\n\n{match[4]}"

    if text.count("<!-- begin ") != len(BLOCK.findall(text)):
        raise ValueError("a block has no end")
    return BLOCK.sub(block, text)


def way_up(page: Path) -> str:
    """Return the way from a page to the root of the project, such as ``../``."""
    return "../" * (len(page.relative_to(ROOT).parts) - 1)


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8"), way_up(page)), encoding="utf-8")
