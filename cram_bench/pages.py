"""The pages of a report: HTML that needs no kernel and no network."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from cram_bench._files import write
from cram_bench._page import OURS, page, text
from cram_bench.findings import counted, findings, listed, trained_at
from cram_bench.plots import look
from cram_bench.probes import mean_and_std, seeds_left
from cram_bench.probes.over_runs import apart, partly
from cram_bench.probes.stability import LOSS_FACTOR, LOSS_NATS, SIGNIFICANCE


def index(
    folder: Path,
    questions: Sequence[str],
    identities: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
    facts: Mapping[str, str],
    remark: str = "",
    name: str = "",
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
    """
    lead = questions[0]
    figures = sorted(path.stem for path in (folder / "figures").glob("*.svg"))
    tables = sorted(path.stem for path in (folder / "tables").glob("*.csv"))
    name = name or folder.name
    parts = [f"<h1>{text(name)}: {text(lead.replace('_', ' '))}</h1>"]
    parts += [f'<p class="result">{text(sentence)}</p>' for sentence in findings(folder, questions)]
    if remark:
        parts.append(f'<p class="remark">{text(remark)}</p>')
    if failures:
        items = "".join(f"<li><b>{text(stem)}</b>: {text(error)}</li>" for stem, error in failures.items())
        parts.append(f'<div class="failed"><p>Notebooks that failed:</p><ul>{items}</ul></div>')
    if lead in figures:
        parts.append(figure(folder, lead))
    curves = folder / "tables" / "accuracy_vs_sparsity.csv"
    if lead == "accuracy_vs_sparsity" and curves.exists():
        table = pd.read_csv(curves)
        if "accuracy" in table and table["accuracy"].notna().any():
            parts.append(slider(table))
    usual = folder / "tables" / "accuracy_summary.csv"
    summary = usual if usual.exists() else folder / "tables" / f"{lead}_summary.csv"
    if summary.exists() and summary.stem != "verdicts_summary":
        laid_out = with_training(pd.read_csv(summary, dtype=str).fillna(""), trained_at(identities))
        parts.append(laid_out.to_html(index=False, border=0))
    if usual.exists():
        parts.append(
            "<p>Test accuracy in per cent after one-shot pruning of the share of prunable weights at the head of the "
            "column, by the pattern that the figure names, or by an n:m pattern, n of m consecutive input weights left, and "
            "BatchNorm tuning; the dense model is untuned. "
            "<i>Trained at</i> says which sparsities the training itself drew: a method that has one in its list is at home there. "
            "± is one standard deviation over the seeds.</p>"
        )
    decided = folder / "tables" / "verdicts_summary.csv"
    if decided.exists():
        parts.append("<h2>Is the loss more stable?</h2>")
        parts.append(pd.read_csv(decided, dtype=str).fillna("").to_html(index=False, border=0))
        parts.append(
            "<p>Means over the seeds; lower is more stable. The loss stands above: methods whose mean losses, at the dense weights or "
            f"at these, differ by more than a factor of {LOSS_FACTOR:g} or by more than {LOSS_NATS:g} nats are <i>not comparable</i>. "
            f"<i>Supports</i> and <i>contradicts</i> are Welch's t-test at p ≤ {SIGNIFICANCE:g}, on logarithms where all values are "
            'positive, after Holm\'s correction over everything measured of a method. <a href="tables/verdicts.csv">The whole '
            f"table</a> has the p of raw values too{_other_on_raw_values(folder)}.</p>"
        )
    parts.append("<h2>What made it</h2><dl>" + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items()) + "</dl>")
    made = [s for s in questions if all((folder / f"{s}.{suffix}").exists() for suffix in ("html", "ipynb"))]
    links = "".join(
        f'<li><a href="{quote(s)}.html">{_words(s)}</a> (<a href="{quote(s)}.ipynb">notebook</a>)</li>' for s in made
    )
    parts.append(f"<h2>Notebooks</h2><ul>{links}</ul>")
    csv = "".join(f'<li><a href="tables/{quote(s)}.csv">{_words(s)}</a></li>' for s in tables)
    parts.append(f"<h2>Tables (CSV)</h2><ul>{csv}</ul>")
    parts.append("<h2>Figures</h2>" + "".join(figure(folder, stem) for stem in figures if stem != lead))
    write(folder / "index.html", page(name, "\n".join(parts)))


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
        "Command": f"<code>{text(command or machine['command'])}</code>",
        "Experiment": text(", ".join(experiment)),
        **({"Measured": text(measured)} if measured else {}),
        "Report made": text(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC at commit {machine['commit']}"),
        "Runs trained at commit": text(", ".join(every("commit", finished))),
        "Device": text(trained + on),
        "Versions": text(", ".join(f"{k} {v}" for k, v in machine["versions"].items())),
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
    table = pd.read_csv(folder / "tables" / "verdicts.csv")
    said = table[table["verdict"] != "not comparable"].dropna(subset=["p", "raw_p"])
    other = int(((said["p"] <= SIGNIFICANCE) != (said["raw_p"] <= SIGNIFICANCE)).sum())
    return f": by it {other} of the {counted(len(said), 'verdict')} would be other" if len(said) else ""


def slider(curves: pd.DataFrame) -> str:
    """Return a panel whose slider moves over the measured sparsities: accuracies of every method, and a marked curve.

    Nothing is computed or interpolated in the page: it shows the means over seeds that it carries. The dense model is untuned,
    as in `cram_bench.probes.accuracy_table`.

    Args:
        curves: columns method, seed, pattern, sparsity, calibrated, accuracy.
    """
    known = curves.dropna(subset=["accuracy"])
    known = known.assign(apart=apart(known))
    reduced = mean_and_std(known, "accuracy", ["method", "pattern", "sparsity", "calibrated", "apart"])
    compressed = known[known["apart"] | (known["sparsity"] > 0)]
    patterns = list(dict.fromkeys(compressed["pattern"]))
    flags = sorted({bool(flag) for flag in compressed["calibrated"]}) or [False]
    values: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for row in reduced.to_dict("records"):
        dense = row["sparsity"] == 0 and not row["apart"]
        if dense and row["calibrated"]:
            continue  # the dense model is untuned here, as in the table below
        for pattern in patterns if dense else [row["pattern"]]:
            for flag in flags if dense else [bool(row["calibrated"])]:
                place = values.setdefault(f"{pattern}|{flag}", {}).setdefault(row["method"], {})
                level = row["pattern"] if row["sparsity"] == 0 and row["apart"] else f"{row['sparsity']:g}"
                place[level] = [row["mean"], None if pd.isna(row["std"]) else row["std"]]
    left = seeds_left(curves, "accuracy")
    methods = {
        name: [look(name)[0] + partly(*left[name]), look(name)[1], _DASHES[place % len(_DASHES)]]
        for place, name in enumerate(left)
    }
    seeds = int(curves["seed"].nunique())
    told = {"values": values, "methods": methods, "patterns": patterns, "seeds": seeds}
    data = json.dumps(told).replace("<", "\\u003c")  # in a script neither </script> nor <!-- may stand
    return _SLIDER.replace("__DATA__", data)


def shelf(reports: Path) -> None:
    """Write ``index.html`` over all reports in a folder: their headline figures and tables, side by side."""
    target = reports / "index.html"
    if target.exists() and OURS not in target.read_text(encoding="utf-8", errors="replace"):
        return  # somebody else's page
    cards = []
    for folder in sorted(path.parent for path in reports.glob("*/report.json")):
        try:
            about = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            about["title"], about["facts"]["Experiment"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a report
        lead = about["title"].replace(" ", "_")
        link = f"{quote(folder.name)}/index.html"
        parts = [f'<h2><a href="{link}">{text(folder.name)}</a></h2><p>{text(about["title"])}</p>']
        if (folder / "figures" / f"{lead}.svg").exists():
            parts.append(
                f'<a href="{link}"><img src="{quote(folder.name)}/figures/{quote(lead)}.svg" alt="{text(about["title"])}"></a>'
            )
        for name in ("accuracy_summary", f"{lead}_summary"):
            table = folder / "tables" / f"{name}.csv"
            if table.exists():
                with contextlib.suppress(OSError, ValueError):  # another report's damage is not this one's
                    parts.append(pd.read_csv(table, dtype=str).fillna("").to_html(index=False, border=0))
                break
        shown = [name for name in ("Experiment", "Device", "Report made") if name in about["facts"]]
        parts.append("<dl>" + "".join(f"<dt>{k}</dt><dd>{about['facts'][k]}</dd>" for k in shown) + "</dl>")
        cards.append(f"<section>{''.join(parts)}</section>")
    body = f"<h1>Reports</h1><div class='shelf'>{''.join(cards)}</div>"
    write(target, page("Reports", body))


def figure(folder: Path, stem: str) -> str:
    """Return the markup of a figure of the report in `folder`, with its downloads.

    The picture itself is in the page, so that the page alone can be sent to somebody; what it shows is in its title.
    """
    name = _words(stem)
    picture = (folder / "figures" / f"{stem}.svg").read_text(encoding="utf-8")
    title = re.search(r"<dc:title>(.*?)</dc:title>", picture, re.DOTALL)
    source = base64.b64encode(picture.encode()).decode()
    links = f'<a href="figures/{quote(stem)}.svg">SVG</a>, <a href="figures/{quote(stem)}.png">PNG</a>'
    return (
        f'<figure><img src="data:image/svg+xml;base64,{source}" alt="{text(html.unescape(title[1].strip())) if title else name}">'
        f"<figcaption>{name} ({links})</figcaption></figure>"
    )


def _words(stem: str) -> str:
    return text(stem.replace("_", " "))


_DASHES = ("", "7 3", "2 3", "9 3 2 3")

_SLIDER = """<div class="slider"><p><b>Move the slider</b> over the measured sparsities
(mean over <span id="seeds"></span>).</p>
<label for="where">sparsity</label> <output id="level" for="where"></output>
<input type="range" id="where" min="0" step="1" value="0">
<p><label>pattern <select id="pattern"></select></label>
<label><input type="checkbox" id="tuned" checked> BatchNorm tuned after pruning; the dense model is untuned</label></p>
<svg id="chart" viewBox="0 -16 640 276" role="img" aria-label="accuracy against sparsity"></svg>
<table id="numbers"></table></div>
<script>
(() => {
  const data = __DATA__, $ = id => document.getElementById(id);
  $("seeds").textContent = data.seeds + (data.seeds > 1 ? " seeds" : " seed");
  for (const name of data.patterns) $("pattern").add(new Option(name));
  const told = s => s.replace(/[&<>"']/g, c => "&#" + c.charCodeAt(0) + ";");
  const percent = s => s === "0" ? "dense" : isNaN(s) ? s : +(100 * s).toFixed(2) + " %";
  const share = s => isNaN(s) ? 1e-9 : +s;  // quantized and not pruned: next to the dense
  function chosen() {
    const tuned = $("tuned").checked, all = data.values;
    return all[$("pattern").value + "|" + (tuned ? "True" : "False")] || all[$("pattern").value + "|False"] || {};
  }
  function draw() {
    const curves = chosen(), first = Object.values(curves)[0] || {};
    const levels = Object.keys(first).sort((a, b) => share(a) - share(b)), slider = $("where");
    slider.max = levels.length - 1;
    const at = Math.min(+slider.value, levels.length - 1), level = levels[at];
    $("level").textContent = percent(level);
    slider.setAttribute("aria-valuetext", percent(level));
    const x = i => 44 + i * 560 / Math.max(1, levels.length - 1), y = v => 226 - 210 * v;
    let svg = `<text x="2" y="0">test accuracy, %</text>`, rows = `<tr><th>method</th><th>accuracy, %</th><th>${data.seeds > 1 ? `± std (n = ${data.seeds})` : ""}</th></tr>`;
    for (const v of [0, 0.25, 0.5, 0.75, 1])
      svg += `<line x1="44" x2="604" y1="${y(v)}" y2="${y(v)}" stroke="#e4e4e4"/>` +
        `<text x="38" y="${y(v) + 4}" text-anchor="end">${100 * v}</text>`;
    levels.forEach((l, i) => svg += `<text x="${x(i)}" y="246" text-anchor="middle">${told(percent(l))}</text>`);
    svg += `<line x1="${x(at)}" x2="${x(at)}" y1="16" y2="226" stroke="#888"/>`;
    for (const [method, [label, colour, dashes]] of Object.entries(data.methods)) {
      const curve = curves[method];
      if (!curve) { rows += `<tr><td>${told(label)}</td><td>failed</td><td></td></tr>`; continue; }
      const points = levels.map((l, i) => curve[l] ? `${x(i)},${y(curve[l][0])}` : "").join(" ");
      svg += `<polyline fill="none" stroke="${colour}" stroke-width="2" stroke-dasharray="${dashes}" points="${points}"/>`;
      if (!curve[level]) continue;
      const [mean, std] = curve[level];
      svg += `<circle cx="${x(at)}" cy="${y(mean)}" r="5" fill="${colour}" stroke="#fff"/>`;
      const sample = `<svg width="34" height="8" aria-hidden="true"><line x1="0" x2="34" y1="4" y2="4" stroke="${colour}" ` +
        `stroke-width="3" stroke-dasharray="${dashes}"/></svg>`;
      rows += `<tr><td>${sample} ${told(label)}</td><td data-method="${told(method)}">` +
        `${(100 * mean).toFixed(1)}</td><td>${std === null ? "" : (100 * std).toFixed(1)}</td></tr>`;
    }
    $("chart").innerHTML = svg;
    $("numbers").innerHTML = rows;
  }
  for (const id of ["where", "pattern", "tuned"]) $(id).addEventListener("input", draw);
  draw();
})();
</script>"""
