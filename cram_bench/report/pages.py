"""The pages of a report: HTML that needs no kernel and no network."""

from __future__ import annotations

import base64
import contextlib
import html
import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from cram_bench import charts, untrusted
from cram_bench.checks import one_line
from cram_bench.files import parsed, write
from cram_bench.probes.stability import LOSS_FACTOR, LOSS_NATS, SIGNIFICANCE
from cram_bench.report import chart
from cram_bench.report.findings import counted, findings, listed, trained_at
from cram_bench.report.page import OURS, render

REPORT = 2**23
"""Bytes that report.json may have: read, they take some twenty times as many."""
_SUMMARY = 2**16  # bytes of a table that is shown whole


def index(
    folder: Path,
    questions: Sequence[str],
    identities: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
    facts: Mapping[str, str],
    remark: str = "",
    name: str = "",
    question: str = "",
) -> None:
    """Write ``index.html``: the result in words, figure, table, provenance, then everything else.

    Args:
        folder: of the report, with its figures and tables.
        questions: its notebooks; the first leads.
        identities: the runs as ``report.json`` has them.
        failures: notebook → error.
        facts: of `facts`, markup.
        remark: what the reader must know of how the report was made.
        name: of the report; by default its folder's.
        question: what the notebook that leads asks; it heads the page. Without one, name and notebook do.
    """
    lead = questions[0]
    figures = sorted(path.stem for path in (folder / "figures").glob("*.svg"))
    name = name or folder.name
    curves = _read(folder, "accuracy_vs_sparsity") if lead == "accuracy_vs_sparsity" else None
    usual = _read(folder, "accuracy_summary", str)
    summary = _read(folder, f"{lead}_summary", str) if usual is None and lead != "verdicts" else usual
    verdicts = _read(folder, "verdicts_summary", str)
    page = render(
        "index.html",
        title=question or f"{name}: {lead.replace('_', ' ')}",
        name=name,
        result=said(findings(folder, questions)),
        remark=remark,
        failures=failures,
        first=figure(folder, lead) if lead in figures else "",
        chart="" if curves is None else touched(curves),
        accuracies="" if summary is None else _markup(with_training(summary.fillna(""), trained_at(identities))),
        usual=usual is not None,
        corrected=summary is not None and "pruner" in summary,
        verdicts="" if verdicts is None else _markup(verdicts.fillna("")),
        limits={"factor": f"{LOSS_FACTOR:g}", "nats": f"{LOSS_NATS:g}", "significance": f"{SIGNIFICANCE:g}"},
        other="" if verdicts is None else _other_on_raw_values(folder),
        facts=facts,
        notebooks=[s for s in questions if all((folder / f"{s}.{suffix}").exists() for suffix in ("html", "ipynb"))],
        tables=sorted(path.stem for path in (folder / "tables").glob("*.csv")),
        figures=[figure(folder, stem) for stem in figures if stem != lead],
    )
    write(folder / "index.html", page)


def _read(folder: Path, name: str, dtype: type | None = None) -> pd.DataFrame | None:
    """Read a table of a report; None where it has none of that name."""
    file = untrusted.inside(folder, f"tables/{name}.csv")
    if not file.exists():
        return None
    return pd.read_csv(untrusted.table(file, _SUMMARY) if dtype else untrusted.table(file), dtype=dtype)


def _markup(table: pd.DataFrame) -> Markup:
    """Return a table of texts in the house's style: numbers to the right, words to the left."""
    table = table.astype(str)
    texts = [place for place, name in enumerate(table) if not numbers(table[name])]
    return render("table.html", heads=list(table.columns), rows=table.to_numpy().tolist(), texts=texts)


def numbers(column: pd.Series) -> bool:
    """Return whether a column of texts holds numbers, with ± or the letter of a correction, and nothing else.

    >>> numbers(pd.Series(["54.4 ± 4.0", "−1.0 b", ""])), numbers(pd.Series(["12.0", "greedy"]))
    (True, False)
    """
    return bool(column.str.fullmatch(r"([−+-]?[\d.]+( ± [\d.]+)?( [bs])?)?").all())


def itemised(texts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the sentences of results, each with the items that it lists after a colon and between semicolons.

    >>> itemised(["Accuracy in % (in brackets: of two): at 80 %, 82.0; at 90 %, 59.1. Means of 3 seeds."])
    [('Accuracy in % (in brackets: of two):', ['at 80 %, 82.0', 'at 90 %, 59.1.']), ('Means of 3 seeds.', [])]
    >>> itemised(["Dense it is so: 1; pruned it is other: 2."])
    [('Dense it is so: 1; pruned it is other: 2.', [])]
    """
    found = []
    for sentence in re.split(r"(?<=\.) (?=[A-Z\d])", " ".join(texts)):
        head = re.match(r"((?:[^:(]|\([^)]*\))*): (.*; .*)", sentence)
        parts = head[2].split("; ") if head else []
        listing = head and not any(": " in part for part in parts)  # else each is a statement of its own
        found.append((f"{head[1]}:", parts) if head and listing else (sentence, []))
    return [entry for entry in found if entry[0]]


def said(texts: Sequence[str]) -> Markup:
    """Return results as markup, what they list as lists."""
    return render("result.html", said=itemised(texts))


def facts(
    identities: Sequence[Mapping[str, Any]], command: str, machine: Mapping[str, Any], measured: str = ""
) -> dict[str, str]:
    """Say where the numbers of a report come from, as markup by heading.

    Args:
        identities: the runs as ``report.json`` has them.
        command: that made the report; by default the machine's.
        machine: of `cram_bench.runs.machine`, at present.
        measured: when and at which commit the tables were measured, where that is not now.
    """
    finished = [run for run in identities if "failure" not in run]
    settings = [run["settings"] for run in identities]

    def every(name: str, of: Sequence[Mapping[str, Any]]) -> list[Any]:
        return sorted({one[name] for one in of})

    datasets = listed(list(dict.fromkeys(Path(one["dataset"]).name for one in settings)))
    epochs, seeds, threads = every("epochs", settings), every("seed", settings), every("threads", finished)
    trained = (
        listed(every("device", finished), "and")
        + f"; {sum(run['seconds'] for run in finished) / 60:.1f} minutes of training in all"
    )
    on = f", on {listed(threads, 'or')} {'thread' if threads == [1] else 'threads'}" if threads else ""
    experiment = [
        datasets,
        called(settings[0]["model"]),
        f"{listed(epochs)} {'epoch' if epochs == [1] else 'epochs'}",
        f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}",
        settings[0]["precision"],
    ]
    return {
        "Command": f"<code>{escape(command or machine['command'])}</code>",
        "Experiment": escape(", ".join(experiment)),
        **({"Measured": escape(measured)} if measured else {}),
        "Report made": escape(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC at commit {machine['commit']}"),
        "Runs trained at commit": escape(", ".join(every("commit", finished))),
        "Device": escape(trained + on),
        "Versions": escape(", ".join(f"{k} {v}" for k, v in machine["versions"].items())),
    }


def called(model: str) -> str:
    """Return the name of a model, and what would be mistaken about it.

    >>> called("resnet20"), called("vgg16_bn")
    ('resnet20 (shortcuts without parameters)', 'vgg16_bn')
    """
    plain = re.fullmatch(r"resnet(20|32|44|56)", model)
    return f"{model} (shortcuts without parameters)" if plain else model


def with_training(summary: pd.DataFrame, trained: Mapping[str, str]) -> pd.DataFrame:
    """Return a table of accuracies by method with a second column: what each method was trained at.

    Where no row is a method of `trained`, or none was trained at a compression, the table is as it was.

    >>> table = pd.DataFrame({"accuracy, %": ["SGD", "CrAM (2 of 3 seeds)"], "90 %": ["54.4", "84.3"]})
    >>> with_training(table, {"SGD": "dense", "CrAM": "70 %"}).to_numpy().tolist()
    [['SGD', 'dense', '54.4'], ['CrAM (2 of 3 seeds)', '70 %', '84.3']]
    """
    found = [trained.get(re.sub(r" \(\d+ of \d+ seeds\)$", "", str(name)), "") for name in summary.iloc[:, 0]]
    if not set(found) - {"", "dense"}:
        return summary
    table = summary.copy()
    table.insert(1, "trained at", found)
    return table


def _other_on_raw_values(folder: Path) -> str:
    """Say how many verdicts the test on raw values would change."""
    table = pd.read_csv(untrusted.table(folder / "tables" / "verdicts.csv"))
    said = table[table["verdict"] != "not comparable"].dropna(subset=["p", "raw_p"])
    other = int(((said["p"] <= SIGNIFICANCE) != (said["raw_p"] <= SIGNIFICANCE)).sum())
    return f": by it {other} of the {counted(len(said), 'verdict')} would be other" if len(said) else ""


def touched(curves: pd.DataFrame) -> Markup:
    """Return the chart of accuracy against sparsity, or nothing where no accuracy was measured.

    Args:
        curves: columns method, seed, pattern, sparsity, calibrated, accuracy.
    """
    if "accuracy" not in curves or curves["accuracy"].isna().all():
        return Markup("")
    return chart.markup(charts.accuracy_vs_sparsity(curves), "Accuracy against sparsity, and every method's at one")


def shelf(reports: Path) -> None:
    """Write ``index.html`` over all reports in a folder: their headline figures and tables, side by side."""
    target = reports / "index.html"
    try:
        if OURS.encode() not in untrusted.contents(target, 2**26):
            return  # somebody else's page
    except FileNotFoundError:
        pass
    except OSError:  # and what is no page is not ours, either
        return
    cards = []
    for folder in sorted(path.parent for path in reports.glob("*/report.json")):
        try:
            about = parsed(untrusted.contents(folder / "report.json", REPORT))
            title, facts = about["title"], about["facts"]
            shown = {name: facts[name] for name in ("Experiment", "Device", "Report made") if name in facts}
            lead = title.replace(" ", "_")
            shown["Experiment"]
            question = about.get("question", "")
            texts = shown | {"question": question}
            if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
                raise ValueError(f"{wrong[0]} is no text")
            drawn = untrusted.inside(folder, f"figures/{lead}.svg").exists()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{folder / 'report.json'} is not a report's: {one_line(error)}"
            warnings.warn(f"left out of {target}: {what}", stacklevel=2)
            continue
        card = {"name": folder.name, "title": title, "question": question, "facts": shown, "table": "", "result": ""}
        card["figure"] = lead if drawn else ""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # of tables that are not as ours are
            card["result"] = said(findings(folder, [lead]))
        for name in ("accuracy_summary", f"{lead}_summary"):
            with contextlib.suppress(OSError, ValueError):  # another report's damage is not this one's
                if (table := _read(folder, name, str)) is not None:
                    card["table"] = _markup(table.fillna(""))
                    break
        cards.append(card)
    write(target, render("shelf.html", title="Reports", cards=cards))


def figure(folder: Path, stem: str) -> Markup:
    """Return the markup of a figure of the report in `folder`, with its downloads.

    The picture itself is in the page, so that the page alone can be sent to somebody; what it shows is in its title.
    """
    picture = untrusted.contents(untrusted.inside(folder, f"figures/{stem}.svg")).decode("utf-8")
    title = re.search(r"<dc:title>(.*?)</dc:title>", picture, re.DOTALL)
    return render(
        "figure.html",
        name=stem,
        alt=html.unescape(title[1].strip()) if title else stem.replace("_", " "),
        source=base64.b64encode(picture.encode()).decode(),
    )
