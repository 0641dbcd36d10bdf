"""The pages of a report: what is escaped in them, and whether their numbers are those of the tables."""

import ast
import base64
import html
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pandas as pd
import pytest

from cram_bench import report
from cram_bench.report import pages
from cram_bench.report.page import render

EVIL = """<b>&"x'</script><!-- <script>alert(1)"""


class _Read(HTMLParser):
    """The tags, attributes and cells that a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.names, self.values, self.cells, self.sources, self.text = [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.names += [name for name, _ in attrs]
        self.values += [value for _, value in attrs]
        self.sources += [value for name, value in attrs if name == "src"]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        self.text.append(data)
        if self.cells and self.tags[-1] in ("td", "th"):
            self.cells[-1] += data


def curves(method="sgd", pattern="global") -> pd.DataFrame:
    rows = [(method, seed, pattern, level, flag) for seed in (0, 1) for level in (0.0, 0.9) for flag in (False, True)]
    table = pd.DataFrame(rows, columns=["method", "seed", "pattern", "sparsity", "calibrated"])
    return table.assign(accuracy=[0.91, 0.93, 0.11, 0.52, 0.95, 0.9, 0.14, 0.63])


def told(page: str) -> dict:
    return json.loads(re.search(r"^draw\((\{.*\}), document.currentScript", page, re.MULTILINE)[1])


def test_no_name_ends_the_script_of_the_chart_or_becomes_markup():
    chart = pages.touched(curves(EVIL, EVIL))
    found = _Read(chart)
    assert found.tags.count("script") == chart.count("</script>") == 2  # the library, and the chart
    assert "<!--" not in chart
    spec = told(chart)
    (rows,) = spec["datasets"].values()
    assert {row["method"] for row in rows} == {row["pattern"] for row in rows} == {EVIL}
    assert EVIL not in json.dumps([part for part in spec["vconcat"]])  # no expression is made of a name
    assert "innerHTML" not in chart


def test_titles_names_and_alternative_texts_are_escaped(tmp_path):
    name = EVIL.replace("/", "")
    (tmp_path / "figures").mkdir()
    picture = f"<svg><metadata><dc:title>{html.escape(EVIL)}</dc:title></metadata></svg>"
    (tmp_path / "figures" / f"{name}.svg").write_text(picture)
    found = _Read(pages.figure(tmp_path, name))
    assert found.tags == ["figure", "img", "figcaption", "a", "a"]
    assert EVIL in found.values
    assert _Read(render("page.html", title=EVIL)).tags.count("script") == 0
    folder = tmp_path / name.replace("<", "").replace(">", "")
    (folder / "tables").mkdir(parents=True)
    facts = {"Experiment": html.escape(EVIL)}
    (folder / "report.json").write_text(json.dumps({"title": EVIL, "facts": facts}))
    table = pd.DataFrame({"accuracy, %": [EVIL], "90 %": ["12.3 ± 0.4"]})
    table.to_csv(folder / "tables" / "accuracy_summary.csv", index=False)
    pages.shelf(tmp_path)
    found = _Read((tmp_path / "index.html").read_text())
    assert not {"script", "b"} & set(found.tags)
    (link,) = {value for value in found.values if value and value.endswith("/index.html")}
    assert unquote(link) == f"{folder.name}/index.html"
    assert not set(link) & set("&\"' #?%") - {"%"}
    assert [cell.strip() for cell in found.cells] == ["accuracy, %", "90 %", EVIL, "12.3 ± 0.4"]


SCRIPTS = {"index.html": 2, "page": 0, "shelf": 0}
"""Scripts that a page has: the drawing library, and the chart."""


def test_no_text_of_anybody_becomes_markup_or_script_on_any_page(hostile, counted):
    text, folder = hostile
    places = {"index.html": folder / "index.html", "shelf": folder.parent / "index.html"}
    places["page"] = folder / f"{folder.name}.html"
    texts = 0
    for name, place in places.items():
        page = place.read_text()
        found = _Read(page)
        assert found.tags.count("figure") == 2 * (name == "index.html"), (
            name
        )  # each once, and the first is not repeated
        assert "svg" not in found.tags, name
        assert not [value for value in found.names if value.startswith("on")], name
        assert found.tags.count("script") == SCRIPTS[name], name
        assert "<!--" not in page, name
        assert page.count("</script") == SCRIPTS[name], name
        for source in found.sources:
            assert source.startswith("data:image/svg+xml;base64,") or source.endswith(".svg"), source
        plain = "".join(found.text)
        assert plain.count(text) >= {"index.html": 16, "page": 5, "shelf": 7}[name], (name, plain.count(text))
        texts += plain.count(text)
    data = told(places["index.html"].read_text())
    (rows,) = data["datasets"].values()
    assert {row["method"] for row in rows} >= {text}
    assert {row["pattern"] for row in rows} >= {f"{text}+int8"}
    counted("texts of others: on pages", texts)


def test_letters_of_corrections_are_explained_where_they_stand(tmp_path):
    (tmp_path / "tables").mkdir()
    table = pd.DataFrame({"method": ["SGD"], "pruner": ["global"], "90 %": ["97.6 s"]})
    for lead, explained in (("second_order", True), ("language", False)):
        shown = table if explained else table.drop(columns="pruner")
        shown.to_csv(tmp_path / "tables" / f"{lead}_summary.csv", index=False)
        pages.index(tmp_path, [lead], [], {}, {})
        text = (tmp_path / "index.html").read_text()
        assert "97.6 s" in text
        assert ("<i>s</i> statistics corrected" in text) == explained


@pytest.mark.parametrize("damage", ['{"title": 5, "facts": {"Experiment": ""}}', "[" * 100_000, "5", "\x00", "{}"])
def test_a_damaged_neighbour_is_named_once_and_hides_no_report(damage, tmp_path, counted):
    for name in ("a {report} $x^$", "b", "c"):
        (tmp_path / name / "tables").mkdir(parents=True)
        (tmp_path / name / "report.json").write_text(json.dumps({"title": "t", "facts": {"Experiment": name}}))
    (tmp_path / "b" / "report.json").write_text(damage)
    (tmp_path / "d.bak").mkdir()
    with pytest.warns(UserWarning, match="left out of ") as caught:
        pages.shelf(tmp_path)
    assert len(caught) == 1
    assert str(tmp_path / "b" / "report.json") in str(caught[0].message)
    cells = (tmp_path / "index.html").read_text()
    assert re.findall(r"<dd>(.*?)</dd>", cells) == ["a {report} $x^$", "c"]
    counted(f"damaged reports: {damage[:9]}", 1)


ELSEWHERE = {"equal_cost": "accuracy_by_cost", "language": "language_curves"}
"""Figures whose table has another name."""


def test_a_figure_is_drawn_from_the_table_of_its_name():
    checked = 0
    for path in sorted(report.notebooks_folder().glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        tree = ast.parse(source)
        comes_from: dict[str, set[str]] = {}
        tables: dict[str, set[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in (t for each in node.targets for t in ast.walk(each) if isinstance(t, ast.Name)):
                    comes_from.setdefault(target.id, set()).update(_names(node.value))
                    if isinstance(node.value, ast.Call) and getattr(node.value.func, "attr", "") == "measured":
                        tables[node.value.args[0].value] = {target.id}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        for call in calls:
            if call.func.attr == "table" and isinstance(call.args[1], ast.Constant):
                tables[call.args[1].value] = _names(call.args[0])
        for call in calls:
            if call.func.attr == "figure" and len(call.args) > 1:
                name = call.args[1].value
                table = tables[ELSEWHERE.get(name, name)]
                assert table & _all(_names(call.args[0]), comes_from), f"{path.name}: {name} is not of its table"
                checked += 1
    assert checked >= 20


SHOWS = {
    "ablations": "differences to it for each change",
    "accuracy_vs_sparsity": "accuracy against sparsity, a line",
    "better_pruner": "by pruner and correction",
    "calibration_curve": "images BatchNorm is tuned on",
    "cram_gap": "CrAM gap by method",
    "equal_cost": "at equal gradient evaluations",
    "flips": "predicted class pruning changes",
    "gradual": "cost of one sparsity and of the whole curve",
    "language": "sentence classifier",
    "layer_blame": "Zeros and rise of the loss",
    "layer_sensitivity": "one layer alone is pruned",
    "loss_along_compression": "from dense to pruned weights",
    "loss_in_ball": "in random directions",
    "loss_in_plane": "on a random plane",
    "path": "between two trainings",
    "plane_through_three": "dense, pruned and fine-tuned network",
    "planes": "around the dense and around the pruned weights",
    "preconditioners": "by epoch",
    "preconditioners_density": "share of a gradient",
    "preconditioners_pruned": "before and after BatchNorm tuning",
    "preconditioners_stability": "eigenvalue",
    "sam_sharpness": "SAM-sharpness against radius",
    "second_order": "a mark per correction",
    "sharpness_over_radii": "on spheres",
    "sparse_training": "Speed of a step",
    "spectral_density": "Hessian's eigenvalues",
    "specialist": "what the pruner looked at",
    "speed": "measured speed-up",
    "stability": "a point per method and seed",
    "transfer": "on the new data",
    "weight_histogram": "weights by value",
}
"""What is said of each figure to those who do not see it, and of no neighbour."""


def _sources():
    """Return the name of every notebook, its texts as one line, and its code."""
    for path in sorted(report.notebooks_folder().glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        kinds = {kind: ["".join(c["source"]) for c in cells if c["cell_type"] == kind] for kind in ("markdown", "code")}
        yield path.stem, " ".join(" ".join(kinds["markdown"]).split()), "\n".join(kinds["code"])


def test_what_is_said_of_a_figure_is_true_of_it_and_of_no_neighbour():
    known = set()
    for stem, _, source in _sources():
        calls = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.Call)]
        drawn = [each for each in calls if getattr(each.func, "attr", "") == "figure" and len(each.args) > 1]
        alts = {each.args[1].value: each.keywords[0].value.value for each in drawn}
        assert len(alts) == len(drawn)
        assert alts.keys() <= SHOWS.keys(), f"{stem} draws what SHOWS does not know"
        for name in alts:
            assert [other for other, alt in alts.items() if SHOWS[name] in alt] == [name], (stem, name)
        known |= alts.keys()
    assert known == SHOWS.keys()


def test_accuracies_are_called_by_the_examples_that_they_are_of():
    """Reports evaluate on the test set; what is held out of training chooses, and is never called a result."""
    measured = 0
    for stem, text, source in _sources():
        assert "validation" not in f"{text} {source}".lower(), stem
        assert not re.search(r"(chosen|choose|chosen by|least)[^.]{0,60}\btest (images|loss|accuracy)", text), stem
        assert ("held-out" in text) == ("held_out: int" in source), stem
        if re.search(r"sparsity_curve,\s+test\b|probes\.pruners,\s+test\b|probes\.prices,\s+runs,\s+test\b", source):
            measured += 1
            assert re.search("[Tt]est accuracy|test images|pruned network is tested", f"{text} {source}"), stem
    assert measured >= 7
    texts = dict((stem, text) for stem, text, _ in _sources())
    for stem in ("accuracy_vs_sparsity", "better_pruner", "equal_cost", "gradual", "language", "second_order"):
        assert "Test accuracy in per cent" in texts[stem], stem
    assert "by the loss on **other** training images, which neither looked at" in texts["better_pruner"]


def test_the_pages_words_say_on_which_examples(tmp_path):
    (tmp_path / "tables").mkdir()
    usual, pruned = "Test accuracy in per cent after one-shot pruning", "of least loss on held-out training images"
    for name, lead, words, other in (
        ("accuracy_summary", "accuracy_vs_sparsity", usual, pruned),
        ("second_order_summary", "second_order", pruned, usual),
    ):
        table = pd.DataFrame({"method": ["SGD"], "pruner": ["global"], "90 %": ["97.6"]})
        shown = table if lead == "second_order" else table.drop(columns="pruner")
        shown.to_csv(tmp_path / "tables" / f"{name}.csv", index=False)
        pages.index(tmp_path, [lead], [], {}, {})
        text = " ".join((tmp_path / "index.html").read_text().split())
        assert words in text
        assert other not in text
        assert "validation" not in text.lower()
        (tmp_path / "tables" / f"{name}.csv").unlink()
    assert "Test accuracy in per cent after pruning, with the correction" in text
    titles = re.findall('"title": "([^"]*accuracy[^"]*)"', pages.touched(curves()))
    assert {"test accuracy, %", "test accuracy there, %"} < set(titles)
    assert "validation" not in " ".join(titles)


def test_each_figure_has_its_own_picture_text_name_and_downloads(tmp_path):
    (tmp_path / "r" / "figures").mkdir(parents=True)
    for name in ("b_lead", "a_first", "c last"):
        drawn = f"<svg><metadata><dc:title>alt of {name}</dc:title></metadata></svg>"
        (tmp_path / "r" / "figures" / f"{name}.svg").write_text(drawn)
    pages.index(tmp_path / "r", ["b_lead"], [], {}, {})
    page = (tmp_path / "r" / "index.html").read_text()
    found = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    assert [re.search('alt="alt of (.*?)"', each)[1] for each in found] == ["b_lead", "a_first", "c last"]
    for each in found:
        name = re.search('alt="alt of (.*?)"', each)[1]
        picture = base64.b64decode(re.search('base64,(.*?)"', each)[1]).decode()
        assert picture == (tmp_path / "r" / "figures" / f"{name}.svg").read_text()
        assert [unquote(link) for link in re.findall('href="(.*?)"', each)] == [
            f"figures/{name}.svg",
            f"figures/{name}.png",
        ]
        assert re.search(r"<figcaption>(.*?) \(", each)[1] == name.replace("_", " ")
    (tmp_path / "r" / "report.json").write_text(json.dumps({"title": "b lead", "facts": {"Experiment": "E"}}))
    pages.shelf(tmp_path)
    assert _Read((tmp_path / "index.html").read_text()).sources == ["r/figures/b_lead.svg"]


def test_a_report_is_headed_by_its_question_and_says_its_result_as_a_list(tmp_path):
    folder = tmp_path / "some-name"
    (folder / "tables").mkdir(parents=True)
    rows = {"method": ["SGD", "SAM"], "pruner": ["global", "greedy"], "80 %": ["81.1 ± 1.0 b", ""], "n": ["x", "3"]}
    pd.DataFrame(rows).to_csv(folder / "tables" / "better_pruner_summary.csv", index=False)
    facts = {"Experiment": "digits, 3 epochs"}
    pages.index(folder, ["better_pruner"], [], {}, facts, question="Does it pay?")
    page = (folder / "index.html").read_text()
    assert re.findall("<title>(.*?)</title>|<h1>(.*?)</h1>", page) == [("Does it pay?", ""), ("", "Does it pay?")]
    assert '<p class="about">some-name: digits, 3 epochs</p>' in page
    heads = re.findall(r"<th( class=\"text\")?>(.*?)</th>", page)
    assert [(head, bool(text)) for text, head in heads] == [
        ("method", True), ("pruner", True), ("80 %", False), ("n", True),
    ]  # fmt: skip
    cells = re.findall(r"<td( class=\"text\")?>(.*?)</td>", page)
    assert [cell for _, cell in cells] == ["SGD", "global", "81.1 ± 1.0 b", "x", "SAM", "greedy", "", "3"]
    assert [bool(text) for text, _ in cells] == [True, True, False, True] * 2
    pages.index(folder, ["better_pruner"], [], {}, facts)
    assert "<h1>some-name: better pruner</h1>" in (folder / "index.html").read_text()
    said = pages.said(["SGD (a: b): at 80 %, 1; at 90 %, 2. Two <b>seeds</b>."])
    assert re.findall("<(?:p|li)[^>]*>(.*?)</", said) == [
        "SGD (a: b):", "at 80 %, 1", "at 90 %, 2.", "Two &lt;b&gt;seeds&lt;/b&gt;.",
    ]  # fmt: skip
    assert pages.said([]) == ""


def test_the_shelf_says_questions_and_results_and_survives_a_table_that_is_none(tmp_path):
    curves = {"method": ["sgd", "cram+"], "sparsity": [0.9, 0.9], "accuracy": [0.5, 0.75], "seed": [0, 0]}
    for name in ("good", "poor"):
        (tmp_path / name / "tables").mkdir(parents=True)
        about = {"title": "transfer", "question": f"Is it {name}?", "facts": {"Experiment": name}}
        (tmp_path / name / "report.json").write_text(json.dumps(about))
        table = pd.DataFrame(curves) if name == "good" else pd.DataFrame({"other": [1]})
        table.to_csv(tmp_path / name / "tables" / "transfer.csv", index=False)
        pd.DataFrame({"seed": [0], "epochs": [1]}).to_csv(tmp_path / name / "tables" / "transfer_runs.csv", index=False)
    pages.shelf(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert re.findall(r'<h2><a href="(.*?)">(.*?)</a></h2>', page) == [
        ("good/index.html", "Is it good?"), ("poor/index.html", "Is it poor?"),
    ]  # fmt: skip
    (result,) = re.findall(r'<p class="result">(On the new data.*?)</p>', page)
    assert "CrAM+ is above SGD at 90 % (by 25.0 points)" in result


def test_only_verdicts_that_were_given_can_be_others_on_raw_values(tmp_path):
    (tmp_path / "tables").mkdir()
    rows = [("supports", 0.01, 0.2), ("undecided", 0.2, 0.01), ("undecided", 0.2, 0.3), ("not comparable", 0.01, 0.2)]
    table = pd.DataFrame(rows, columns=["verdict", "p", "raw_p"])
    table.to_csv(tmp_path / "tables" / "verdicts.csv", index=False)
    assert pages._other_on_raw_values(tmp_path) == ": by it 2 of the 3 verdicts would be other"


def test_a_notebook_tunes_on_its_training_images_augmented_as_they_were():
    tuned = 0
    for stem, _, source in _sources():
        for call in re.findall(r"(\w+)\.calibration\(([^()]*)\)", source):
            tuned += 1
            assert call[0] == ("looked_at" if "held_out: int" in source else "train"), stem
            assert re.search(r"augment=[\w.\[\]\"+-]+\.data\.augment$", call[1].strip().rstrip(",")), (stem, call)
    assert tuned >= 8


def _names(node) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} - {"cb", "out", "pd"}


def _all(names: set[str], comes_from: dict[str, set[str]], depth: int = 2) -> set[str]:
    """Add what the names were made of, two steps back: the figure, and what was reduced for it."""
    for _ in range(depth):
        names = names | {source for name in names for source in comes_from.get(name, ())}
    return names


def test_a_page_of_somebody_elses_is_not_written_over(tmp_path):
    (tmp_path / "index.html").write_text("<h1>my page</h1>")
    pages.shelf(tmp_path)
    assert (tmp_path / "index.html").read_text() == "<h1>my page</h1>"
    (tmp_path / "index.html").unlink()
    pages.shelf(tmp_path)
    pages.shelf(tmp_path)
    assert "Reports" in (tmp_path / "index.html").read_text()
