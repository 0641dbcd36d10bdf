"""Measure, print the table, and write it with what made it: ``python -m benchmarks [SECTION …] [--out FILE]``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from benchmarks.sections import SECTIONS
from cram_bench import runs
from cram_bench.files import write


def main() -> None:
    """Run the asked sections; lines of others that were measured before stay in the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks.csv"), help="default: %(default)s")
    arguments = parser.parse_args()
    for name in arguments.sections:
        if name not in SECTIONS:
            parser.error(f"unknown section {name!r}; allowed are {', '.join(SECTIONS)}")
    known = pd.read_csv(arguments.out) if arguments.out.exists() else pd.DataFrame({"name": []})
    machine = runs.machine()
    for section in arguments.sections or SECTIONS:
        for line in SECTIONS[section]():
            print(
                f"{line.name:45} {line.ratio:8.3g}  [{line.low:.3g}, {line.high:.3g}]  "
                f"{line.ours:.4g} / {line.peer:.4g} {line.unit}",
                flush=True,
            )
            made = {"commit": machine["commit"], "torch": machine["versions"]["torch"], "device": machine["device"]}
            row = pd.DataFrame([asdict(line) | made])
            known = pd.concat([known[known["name"] != line.name], row], ignore_index=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write(arguments.out, known.to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    main()
