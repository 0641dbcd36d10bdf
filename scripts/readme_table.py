"""Copy the committed reports' tables into README.md, between its markers, so that no number there is typed by hand."""

from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ("cifar10-resnet20-15-epochs", "cifar10-resnet20")
BEGIN, END = "<!-- begin table: make readme -->", "<!-- end table -->"


def table(report: Path) -> str:
    """Return the summary table of a report and what made it, as Markdown."""
    summary = pd.read_csv(report / "tables" / "accuracy_summary.csv", dtype=str).fillna("")
    runs = pd.read_csv(report / "tables" / "runs.csv", dtype=str).fillna("")
    head = list(summary.columns)
    rows = [head, ["---"] + ["--:"] * (len(head) - 1), *summary.to_numpy().tolist()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    facts = {name: ", ".join(dict.fromkeys(runs[name])) for name in ("epochs", "seed", "device", "commit")}
    note = (
        f"ResNet-20 on CIFAR-10, {facts['epochs']} epochs, seed {facts['seed']}, bfloat16, on {facts['device']}; "
        f"trained at commit {facts['commit']}."
    )
    return "\n".join([*lines, "", note])


def tables(reports: Path) -> str:
    """Return the tables of all committed reports, the headline first."""
    return "\n\n".join(table(reports / name) for name in REPORTS)


def filled(readme: str, content: str) -> str:
    """Return the text of the README with `content` between the markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), tables(ROOT / "reports")))
