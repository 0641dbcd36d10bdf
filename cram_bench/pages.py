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
from urllib.parse import quote

import pandas as pd

from cram_bench import runs
from cram_bench._files import write
from cram_bench._page import OURS, page, text
from cram_bench.plots import look
from cram_bench.probes import mean_and_std, seeds_left
from cram_bench.probes.over_runs import partly


def index(
    folder: Path, questions: Sequence[str], trained: Sequence[runs.Run], failures: Mapping[str, str], command: str
) -> dict[str, str]:
    """Write ``index.html``: figure, table, provenance, then everything else; return the provenance, as markup."""
    lead = questions[0]
    first = trained[0].experiment
    figures = sorted(path.stem for path in (folder / "figures").glob("*.svg"))
    tables = sorted(path.stem for path in (folder / "tables").glob("*.csv"))
    machine = runs.machine()
    finished = [run for run in trained if run.failure is None]
    parts = [f"<h1>{text(folder.name)}: {text(lead.replace('_', ' '))}</h1>"]
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
    summary = folder / "tables" / "accuracy_summary.csv"
    if not summary.exists():
        summary = folder / "tables" / f"{lead}_summary.csv"
        if summary.exists():
            parts.append(pd.read_csv(summary, dtype=str).fillna("").to_html(index=False, border=0))
    else:
        parts.append(pd.read_csv(summary, dtype=str).fillna("").to_html(index=False, border=0))
        parts.append(
            "<p>Test accuracy in per cent after one-shot pruning of the share of prunable weights at the head of the "
            "column, by the pattern that the figure names, or by an n:m pattern, n of m consecutive input weights left, and "
            "BatchNorm tuning; the dense model is untuned. "
            "± is one standard deviation over seeds.</p>"
        )
    devices = ", ".join(sorted({run.environment["device"] for run in finished}))
    commits = ", ".join(sorted({run.environment["commit"] for run in finished}))
    seeds = ", ".join(map(str, sorted({run.experiment.seed for run in trained})))
    epochs = ", ".join(map(str, sorted({run.experiment.epochs for run in trained})))
    threads = ", ".join(map(str, sorted({run.environment["threads"] for run in finished})))
    minutes = sum(run.environment["seconds"] for run in finished) / 60
    datasets = " and ".join(dict.fromkeys(Path(run.experiment.dataset).name for run in trained))
    facts = {
        "Command": f"<code>{text(command or machine['command'])}</code>",
        "Experiment": text(f"{datasets}, {first.model}, {epochs} epochs, seeds {seeds}, {first.precision}"),
        "Report made": text(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC at commit {machine['commit']}"),
        "Runs trained at commit": text(commits),
        "Device": text(f"{devices}; {minutes:.1f} minutes of training in all, on {threads} threads"),
        "Versions": text(", ".join(f"{k} {v}" for k, v in machine["versions"].items())),
    }
    parts.append("<h2>What made it</h2><dl>" + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items()) + "</dl>")
    made = [s for s in questions if all((folder / f"{s}.{suffix}").exists() for suffix in ("html", "ipynb"))]
    links = "".join(
        f'<li><a href="{quote(s)}.html">{_words(s)}</a> (<a href="{quote(s)}.ipynb">notebook</a>)</li>' for s in made
    )
    parts.append(f"<h2>Notebooks</h2><ul>{links}</ul>")
    csv = "".join(f'<li><a href="tables/{quote(s)}.csv">{_words(s)}</a></li>' for s in tables)
    parts.append(f"<h2>Tables (CSV)</h2><ul>{csv}</ul>")
    parts.append("<h2>Figures</h2>" + "".join(figure(folder, stem) for stem in figures if stem != lead))
    write(folder / "index.html", page(folder.name, "\n".join(parts)))
    return facts


def slider(curves: pd.DataFrame) -> str:
    """Return a panel whose slider moves over the measured sparsities: accuracies of every method, and a marked curve.

    Nothing is computed or interpolated in the page: it shows the means over seeds that it carries.

    Args:
        curves: columns method, seed, pattern, sparsity, calibrated, accuracy.
    """
    known = curves.dropna(subset=["accuracy"])
    reduced = mean_and_std(known, "accuracy", ["method", "pattern", "sparsity", "calibrated"])
    patterns = [
        p for p in dict.fromkeys(known["pattern"]) if (known.loc[known["pattern"] == p, "sparsity"] > 0).sum() > 0
    ]
    values: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for row in reduced.to_dict("records"):
        for pattern in patterns if row["sparsity"] == 0 else [row["pattern"]]:
            place = values.setdefault(f"{pattern}|{bool(row['calibrated'])}", {}).setdefault(row["method"], {})
            place[f"{row['sparsity']:g}"] = [row["mean"], None if pd.isna(row["std"]) else row["std"]]
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
<label><input type="checkbox" id="tuned" checked> BatchNorm tuned after pruning; the dense model too</label></p>
<svg id="chart" viewBox="0 0 640 260" role="img" aria-label="accuracy against sparsity"></svg>
<table id="numbers"></table></div>
<script>
(() => {
  const data = __DATA__, $ = id => document.getElementById(id);
  $("seeds").textContent = data.seeds + (data.seeds > 1 ? " seeds" : " seed");
  for (const name of data.patterns) $("pattern").add(new Option(name));
  const told = s => s.replace(/[&<>"']/g, c => "&#" + c.charCodeAt(0) + ";");
  const percent = s => s === "0" ? "dense" : +(100 * s).toFixed(2) + " %";
  function chosen() {
    const tuned = $("tuned").checked, all = data.values;
    return all[$("pattern").value + "|" + (tuned ? "True" : "False")] || all[$("pattern").value + "|False"] || {};
  }
  function draw() {
    const curves = chosen(), first = Object.values(curves)[0] || {};
    const levels = Object.keys(first).sort((a, b) => a - b), slider = $("where");
    slider.max = levels.length - 1;
    const at = Math.min(+slider.value, levels.length - 1), level = levels[at];
    $("level").textContent = percent(level);
    slider.setAttribute("aria-valuetext", percent(level));
    const x = i => 44 + i * 580 / Math.max(1, levels.length - 1), y = v => 226 - 210 * v;
    let svg = "", rows = "<tr><th>method</th><th>accuracy, %</th><th>± std</th></tr>";
    for (const v of [0, 0.25, 0.5, 0.75, 1])
      svg += `<line x1="44" x2="624" y1="${y(v)}" y2="${y(v)}" stroke="#e4e4e4"/>` +
        `<text x="38" y="${y(v) + 4}" font-size="11" text-anchor="end">${100 * v}</text>`;
    levels.forEach((l, i) => svg += `<text x="${x(i)}" y="246" font-size="11" text-anchor="middle">${percent(l)}</text>`);
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
