"""Measure committed runs anew, and say how many numbers of the committed tables agree to the last digit.

    python scripts/recompute.py reports/cifar10-resnet20 accuracy_vs_sparsity
    python scripts/recompute.py reports/cifar10-second-order second_order -p pruners '["global"]'
    python scripts/recompute.py reports/cifar10-resnet20-15-epochs accuracy_vs_sparsity --threads 2

The notebook's own cells run, on one thread unless told otherwise, with the runs whose weights lie in the report's
folder; nothing is trained.
`cram-bench reproduce` does more, and trains what is missing. A number that differs comes of another version of torch,
of other threads, or of the code.
"""

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import torch

from cram_bench.report import output
from cram_bench.report.plan import plan
from cram_bench.runs import Store

KEYS = ["method", "seed", "changed", "epochs", "pattern", "sparsity", "calibrated", "correction", "weights", "radius"]


def differences(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Return a row per number of `old`: its column, its value, and that of `new`, or NaN with ``there`` false.

    >>> old = pd.DataFrame({"method": ["sgd", "sgd", "sam"], "seed": 0, "loss": [1.0, 2.0, 3.0]})
    >>> differences(old, old.head(2).assign(loss=[1.0, 2.5]))[["loss", "loss_new", "there"]].values.tolist()
    [[1.0, 1.0, True], [2.0, 2.5, True], [3.0, nan, False]]
    """
    keys = [name for name in KEYS if name in old]
    numbered = [table.assign(row=table.groupby(keys).cumcount()) for table in (old, new)]
    return (
        numbered[0]
        .merge(numbered[1], "left", [*keys, "row"], suffixes=("", "_new"), indicator="there")
        .assign(there=lambda found: found["there"] == "both")
    )


class Recomputed(output.Output):
    """What a notebook writes to: measures the tables that are asked for, and compares; takes the rest as committed."""

    report: Path
    asked: list[str]

    def runs(self, experiments: Any, store: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as none:
            committed = Store(none, also=[self.report / "runs"])
            return [run for experiment in experiments if (run := committed.find(experiment))]

    def measured(self, name: str, measure: Any, *arguments: Any, **options: Any) -> pd.DataFrame:
        committed = pd.read_csv(self.report / "tables" / f"{name}.csv")
        if name not in self.asked:
            return committed
        self.asked.remove(name)
        new = measure(*arguments, **options)
        new = pd.read_csv(io.StringIO(new.to_csv(index=False, float_format="%.8g")))  # as the report's were written
        found = differences(committed, new)
        there = found[found["there"]]
        for column in committed.select_dtypes("number"):
            if f"{column}_new" in found and column != "seconds":
                gaps = (there[column] - there[f"{column}_new"]).abs().fillna(0)
                print(
                    f"{self.report.name} {name} {column}: {(gaps == 0).sum()} agree, {(gaps > 0).sum()} differ (by at "
                    f"most {gaps.max():.2g}), {len(found) - len(there)} not measured",
                    flush=True,
                )
        return committed

    def figure(self, *arguments: Any, **options: Any) -> None:
        """Draw nothing."""

    def table(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("tables", nargs="+", help="names of tables that are measured, such as accuracy_vs_sparsity")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="other parameter")
    parser.add_argument("--threads", type=int, default=1, help="that measure: as many as then, or last digits differ")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, not {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    about = json.loads((arguments.report / "report.json").read_text())
    versions = f"torch {about['versions']['torch']} then, {torch.__version__} now"
    print(f"{arguments.report.name}: {versions}; threads: {torch.get_num_threads()}")
    changed = {name: json.loads(value) for name, value in arguments.p}
    planned = plan(**about["build"] | {"parameters": about["build"]["parameters"] | changed})
    output.Output = Recomputed  # type: ignore[misc]
    Recomputed.report, Recomputed.asked = arguments.report, arguments.tables
    for notebook in planned.notebooks:
        cells = [cell.source for cell in nbformat.read(notebook.path, 4).cells if cell.cell_type == "code"]
        space: dict[str, Any] = {"In": [""]}  # what was executed, as IPython keeps it: the parameters are read from it
        for place, cell in enumerate(cells):
            if Recomputed.asked:
                space["In"].append(cell)
                exec(cell, space)
                space |= {} if place else planned.parameters(notebook)
    if Recomputed.asked:
        raise SystemExit(f"no such measured table: {', '.join(Recomputed.asked)}")


if __name__ == "__main__":
    main()
