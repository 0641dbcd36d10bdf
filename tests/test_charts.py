"""Charts: every number that they carry against a hand calculation, and what the drawing library makes of them."""

import json
import re

import pandas as pd
import pytest

import cram_bench as cb
from cram_bench import charts
from cram_bench.charts.accuracy import points, widest
from cram_bench.report.chart import library

vl_convert = pytest.importorskip("vl_convert")


def table_of(method, seed, cells):
    rows = [
        (method, seed, pattern, sparsity, calibrated, accuracy)
        for (pattern, sparsity, calibrated), accuracy in cells.items()
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "pattern", "sparsity", "calibrated", "accuracy"])


CELLS = {("global", 0.0, False): 0.88, ("global", 0.0, True): 0.5, ("global", 0.9, False): 0.1,
         ("global", 0.9, True): 0.54, ("2:4", 0.5, False): 0.2, ("2:4", 0.5, True): 0.85}  # fmt: skip


def curves():
    tables = [table_of("sgd", 0, CELLS), table_of("sgd", 1, {key: value + 0.02 for key, value in CELLS.items()})]
    tables += [table_of("sam", 0, {key: value + 0.1 for key, value in CELLS.items()})]
    tables += [pd.DataFrame([{"method": "sam", "seed": 1}]), pd.DataFrame([{"method": "cram", "seed": 0}])]  # failed
    return pd.concat(tables, ignore_index=True)


def rows_of(table, **chosen):
    for name, value in chosen.items():
        table = table[table[name] == value]
    return table


def test_every_number_is_a_mean_of_the_table():
    drawn = points(curves())
    std = 100 * 0.02 / 2**0.5
    expected = {  # (tuned, level): mean of SGD's two seeds, SAM's only one
        (False, "dense"): (89, 98), (True, "dense"): (89, 98),  # the dense model is untuned in both
        (False, "90 %"): (11, 20), (True, "90 %"): (55, 64), (False, "2:4"): (21, 30), (True, "2:4"): (86, 95),
    }  # fmt: skip
    assert len(drawn) == 2 * len(expected) + 6
    for (tuned, level), (sgd, sam) in expected.items():
        (row,) = rows_of(drawn, method="SGD", tuned=tuned, level=level).to_dict("records")
        assert (row["mean"], row["std"]) == (pytest.approx(sgd), pytest.approx(std))
        assert (row["low"], row["high"]) == (pytest.approx(sgd - std), pytest.approx(sgd + std))
        assert (row["seeds"], row["told"]) == (2, f"{sgd:.1f} ± {std:.1f}")
        (row,) = rows_of(drawn, method="SAM (1 of 2 seeds)", tuned=tuned, level=level).to_dict("records")
        assert (row["mean"], row["seeds"], row["told"]) == (pytest.approx(sam), 1, f"{sam:.1f}")
        assert pd.isna(row["std"])
        assert pd.isna(row["low"])
        (row,) = rows_of(drawn, method="CrAM", tuned=tuned, level=level).to_dict("records")
        assert (row["told"], row["seeds"]) == ("failed", 0)
        assert pd.isna(row["mean"])
    places = drawn.drop_duplicates("level").set_index("level")["place"].to_dict()
    assert places == {"dense": 0, "90 %": 1, "2:4": 2}
    assert drawn.loc[drawn["level"] == "2:4", "apart"].sum() == 4
    assert not drawn.loc[drawn["level"] != "2:4", "apart"].any()
    assert set(drawn["last"]) == {2}


def test_a_band_stays_between_0_and_100():
    cells = {("global", 0.0, False): 1.0, ("global", 0.9, False): 0.0}
    drawn = points(
        pd.concat([table_of("sgd", 0, cells), table_of("sgd", 1, {k: 0.9 if v else 0.1 for k, v in cells.items()})])
    )
    assert drawn["high"].max() == 100
    assert drawn["low"].min() == 0


def test_every_pattern_has_a_curve_and_quantized_weights_a_place():
    cells = {**CELLS, ("uniform", 0.8, True): 0.6, ("int8", 0.0, True): 0.75, ("global+int4", 0.0, True): 0.3,
             ("global+int4", 0.9, True): 0.2}  # fmt: skip
    drawn = points(table_of("sgd", 0, cells))
    tuned = rows_of(drawn, tuned=True)
    shown = {p: rows.set_index("level")["mean"].to_dict() for p, rows in tuned.groupby("pattern", sort=False)}
    apart = {"2:4": 85, "int8": 75, "global+int4": 30}
    assert shown == {
        "global": pytest.approx({"dense": 88, "90 %": 54} | apart),
        "uniform": pytest.approx({"dense": 88, "80 %": 60} | apart),
        "global+int4": pytest.approx({"dense": 88, "90 %": 20} | apart),
    }


def test_patterns_come_as_in_the_table_and_may_all_have_places_of_their_own():
    cells = {("uniform", 0.8, True): 0.6, **CELLS}
    assert list(dict.fromkeys(points(table_of("sgd", 0, cells))["pattern"])) == ["uniform", "global"]
    drawn = points(table_of("sgd", 0, {("global", 0.0, False): 0.9, ("2:4", 0.5, True): 0.8}))
    assert drawn[["level", "mean", "tuned"]].to_numpy().tolist() == [["dense", 90.0, True], ["2:4", 80.0, True]]


def test_where_nothing_pruned_is_tuned_there_is_no_tuning():
    """The dense model alone is evaluated after tuning too."""
    cells = {("global", 0.0, False): 0.9, ("global", 0.0, True): 0.8, ("global", 0.9, False): 0.5}
    assert points(table_of("sgd", 0, cells))[["level", "mean", "tuned"]].to_numpy().tolist() == [
        ["dense", 90.0, False], ["90 %", 50.0, False]
    ]  # fmt: skip


def test_it_starts_where_methods_differ_most_after_tuning():
    near = {("global", s, flag): 0.8 for s in (0.0, 0.5, 0.9, 0.95) for flag in (False, True)}
    far = {**near, ("global", 0.5, False): 0.1, ("global", 0.9, True): 0.3, ("global", 0.95, True): 0.7}
    both = pd.concat([table_of("sgd", 0, near), table_of("sam", 0, far)])
    assert widest(points(both)) == 2
    spec = charts.accuracy_vs_sparsity(both).to_dict()
    assert next(p["value"] for p in spec["params"] if p["name"] == "at") == 2
    assert spec["usermeta"]["levels"] == {"global": ["dense", "50 %", "90 %", "95 %"]}
    assert widest(points(table_of("sgd", 0, near))) == 0
    apart = [table_of(m, 0, {**own, ("2:4", 0.5, True): a}) for m, own, a in (("sgd", near, 0.9), ("sam", far, 0.1))]
    assert widest(points(pd.concat(apart))) == 2  # on the curve


@pytest.fixture(scope="module")
def spec():
    return charts.accuracy_vs_sparsity(curves()).to_dict()


def test_the_library_draws_it(spec):
    here = [{**param, "value": 1} if param["name"] == "at" else param for param in spec["params"]]
    picture = vl_convert.vegalite_to_svg(json.dumps({**spec, "params": here}))
    texts = re.findall(r">([^<>]+)</text>", picture)
    for text in ("SGD", "SAM (1 of 2 seeds)", "CrAM", "dense", "2:4", "55.0 ± 1.4", "64.0", "failed"):
        assert text in texts, text
    assert "accuracy, %" in " ".join(texts)
    assert "sparsity, % of prunable weights" in " ".join(texts)


def marks(spec, **values):
    """What the library draws where the controls say so: the labels that it gives marks, and the texts."""
    params = [{**param, "value": values.get(param["name"], param.get("value"))} if "bind" in param
              and param["name"] in ("at", "pattern", "tuned") else param for param in spec["params"]]  # fmt: skip
    picture = vl_convert.vegalite_to_svg(json.dumps({**spec, "params": params}))
    return re.findall(r'aria-label="([^"]+)"', picture), re.findall(r">([^<>]+)</text>", picture)


@pytest.fixture(scope="module")
def both():
    """Two patterns: the second has a level more, and another order of its names than their numbers."""
    own = {("uniform", 0.8, True): 0.6, ("uniform", 0.8, False): 0.3, ("uniform", 0.975, True): 0.41,
           ("uniform", 0.975, False): 0.2}  # fmt: skip
    return charts.accuracy_vs_sparsity(pd.concat([curves(), table_of("sgd", 0, own)])).to_dict()


def test_what_is_chosen_at_first(both):
    values = {param["name"]: param.get("value") for param in both["params"]}
    assert (values["pattern"], values["tuned"]) == ("global", True)
    bound = {param["name"]: param["bind"] for param in both["params"] if "bind" in param}
    assert bound["pattern"]["options"] == ["global", "uniform"]
    assert (bound["at"]["min"], bound["at"]["max"], bound["at"]["step"]) == (0, 3, 1)
    assert (bound["method"], bound["zoom"]) == ("legend", "scales")
    zoom = next(param for param in both["params"] if param["name"] == "zoom")
    assert zoom["select"]["encodings"] == ["y"]


def test_a_curve_is_of_the_pattern_and_tuning_that_are_chosen(both):
    for pattern, tuned, expected in (
        ("global", True, ["dense 89.0 ± 1.4", "90 % 55.0 ± 1.4", "2:4 86.0 ± 1.4"]),
        ("global", False, ["dense 89.0 ± 1.4", "90 % 11.0 ± 1.4", "2:4 21.0 ± 1.4"]),
        ("uniform", True, ["dense 89.0 ± 1.4", "80 % 60.0", "97.5 % 41.0", "2:4 86.0 ± 1.4"]),
        ("uniform", False, ["dense 89.0 ± 1.4", "80 % 30.0", "97.5 % 20.0", "2:4 21.0 ± 1.4"]),
    ):
        labels, texts = marks(both, pattern=pattern, tuned=tuned, at=0)
        points = [
            re.search(r"; sparsity: (.*); accuracy, %: (.*); n: \d$", label) for label in labels if "SGD" in label
        ]
        points = [f"{found[1]} {found[2]}" for found in points if found and not found.string.startswith("test")]
        assert sorted(points) == sorted(expected)
        levels = [point.split(" ")[0] for point in expected]
        assert texts[: len(levels)] == levels  # the axis has them in this order


def test_below_stands_what_every_method_has_at_the_chosen_place(spec, both):
    """The numbers, a bar from 0 for each, and ± one standard deviation; past the end of a curve, its end."""
    labels, texts = marks(spec, at=1)
    assert "test accuracy there, %: 55; method: SGD; sparsity: 90 %; accuracy, %: 55.0 ± 1.4; n: 2" in labels
    assert "low: 53.5857864376; method: SGD; high: 56.4142135624" in labels
    assert "end: 56.4142135624; method: SGD; told: 55.0 ± 1.4" in labels
    assert "end: 64; method: SAM (1 of 2 seeds); told: 64.0" in labels
    assert "end: 0; method: CrAM; told: failed" in labels
    assert "level: 90 %" in labels
    assert "X-axis titled 'test accuracy there, %' for a linear scale with values from 0 to 100" in labels
    assert "Y-axis for a discrete scale with 3 values: SGD, SAM (1 of 2 seeds), CrAM" in labels
    assert [text for text in texts if "±" in text or text == "failed"] == ["55.0 ± 1.4", "failed"]
    past, _ = marks(both, pattern="global", at=3)
    assert "level: 2:4" in past
    assert "end: 95; method: SAM (1 of 2 seeds); told: 95.0" in past


def test_lines_and_bands_join_sparsities_and_patterns_of_their_own_have_bars(spec):
    """The axis of accuracy need not begin at 0; the chosen place is a rule and has the larger marks."""
    labels, _ = marks(spec, at=1)
    x = "sparsity, % of prunable weights that are zero"
    assert f"{x}: dense; low: 87.5857864376; high: 90.4142135624; method: SGD" in labels
    assert f"{x}: 2:4; low: 84.5857864376; high: 87.4142135624; method: SGD" in labels
    assert labels.count(f"{x}: 90 %") == 3  # one a method
    assert "Y-axis titled 'test accuracy, %' for a linear scale with values from 50 to 100" in labels
    picture = vl_convert.vegalite_to_svg(json.dumps(spec))
    area, line = (
        re.search(rf'd="([^"]+)"[^>]*roledescription="{kind}"|roledescription="{kind}"[^>]*d="([^"]+)"', picture)
        for kind in ("area mark", "line mark")
    )
    path = line[1] or line[2]
    assert len(re.findall("[ML]", path)) == 2  # dense and 90 %, and not on to 2:4
    assert len(re.findall("[ML]", area[1] or area[2])) == 4
    here = [{**param, "value": 1} if param["name"] == "at" else param for param in spec["params"]]
    sizes = {}
    for at, drawn in ((0, spec), (1, {**spec, "params": here})):
        picture = vl_convert.vegalite_to_svg(json.dumps(drawn))
        found = re.findall(r'<path aria-label="[^"]*n: 2"[^>]*roledescription="point"[^>]*d="M([\d.]+)', picture)
        sizes[at] = [float(radius) for radius in found]
    assert sizes[0][0] == sizes[1][1] > sizes[0][1] == sizes[1][0] == sizes[0][2] == sizes[1][2]


def test_marks_and_dashes_are_those_of_the_figures():
    """By their names in the two libraries, for every method; a cross of its own where Vega has none."""
    from cram_bench.charts import look
    from cram_bench.plots._style import dashes

    named = {method: f"{method}!" for method in ("sgd", "sam", "cram+-multi", "cram-single", "safe")}
    found = look.encodings(named)
    kinds = {"o": "circle", "s": "square", "v": "triangle-down", "^": "triangle-up", "D": "diamond", "P": "cross",
             "<": "triangle-left", "p": "triangle-right", "*": "wedge"}  # fmt: skip
    assert {mark: shape for mark, shape in look._SHAPES.items() if mark != "X"} == kinds
    shapes = found["shape"].to_dict()["scale"]
    assert shapes["domain"] == list(named.values())
    assert shapes["range"] == [look._SHAPES[cb.plots.look(method)[2]] for method in named]
    assert found["dash"].to_dict()["scale"]["range"] == [look._DASHES[dashes(method)] for method in named]
    assert len({tuple(own) for own in look._DASHES.values()}) == 4


def test_letters_are_of_the_colour_of_the_page_and_the_ground_is_its_own(spec):
    config = spec["config"]
    assert config["background"] == "transparent"
    assert config["text"]["color"] == config["title"]["color"] == "currentColor"
    assert {config["axis"][part] for part in ("labelColor", "titleColor", "domainColor", "tickColor")} == {
        "currentColor"
    }
    assert config["legend"]["labelColor"] == "currentColor"


def test_controls_are_those_that_change_something(spec):
    def bound(table):
        return {p["name"] for p in charts.accuracy_vs_sparsity(table).to_dict()["params"] if "bind" in p}

    assert bound(curves()) >= {"at", "tuned"}
    untuned = curves()[lambda t: t["calibrated"] != True]  # noqa: E712
    assert "tuned" not in bound(untuned)
    uniform = table_of("sgd", 0, {("uniform", 0.8, True): 0.6})
    assert "pattern" in bound(pd.concat([curves(), uniform]))
    assert "pattern" not in bound(curves())


def test_methods_keep_their_colours_of_the_figures(spec):
    layer = spec["vconcat"][0]["layer"]
    scales = [part["encoding"]["color"]["scale"] for part in layer if "scale" in part["encoding"].get("color", {})]
    for scale in scales:
        look = dict(zip(scale["domain"], scale["range"], strict=True))
        assert look["SGD"] == "currentColor"  # black, or white on a dark page
        assert look["SAM (1 of 2 seeds)"] == cb.plots.look("sam")[1]
        assert len(set(look.values())) == len(look)
    assert scales


def test_what_cannot_be_drawn_is_one_line():
    failed = curves().assign(accuracy=float("nan"))
    with pytest.raises(ValueError, match="every run of it failed"):
        charts.accuracy_vs_sparsity(failed)
    with pytest.raises(ValueError, match="column"):
        charts.accuracy_vs_sparsity(pd.DataFrame({"method": ["sgd"], "seed": [0]}))


def test_the_library_is_whole_and_the_same_every_time():
    import base64
    import gzip

    script = gzip.decompress(base64.b64decode(library())).decode()
    assert "vegaEmbed" in script
    assert len(library()) < 2**20
    library.cache_clear()
    assert library() == library()


RUNS = {"SGD, seed 0": "sgd", "SGD, seed 1": "sgd", "CrAM": "cram+-multi"}


def drawn_with(chart, rows):
    """The texts of a chart over named data."""
    picture = vl_convert.vegalite_to_svg(json.dumps({**chart.to_dict(), "datasets": rows}))
    return re.findall(r">([^<>]+)</text>", picture), picture


def test_the_explorers_curve_tells_accuracy_with_its_error_and_count():
    table = pd.DataFrame({"sparsity": [0.8, 0.0], "accuracy": [0.5, 0.9], "count": [100, 1000]})
    rows = charts.explorer.curve_rows(dict.fromkeys(RUNS, table), 0.8, 0.1)
    first, second = rows["curve"][:2]
    assert (first["sparsity"], first["told"], first["n"], first["here"]) == (0, "90.0 ± 0.9", 1000, False)
    assert (second["sparsity"], second["told"], second["n"], second["here"]) == (80, "50.0 ± 5.0", 100, True)
    assert (second["low"], second["high"]) == (45, 55)
    assert rows["here"] == [{"sparsity": 80}]
    texts, _ = drawn_with(charts.explorer.curve(RUNS), rows)
    assert {*RUNS, "guessing", "Accuracy against sparsity"} <= set(texts)


def test_runs_of_one_method_have_lines_of_their_own():
    encoding = charts.explorer.curve(RUNS).to_dict()["layer"][4]["encoding"]
    domain, dashes = (encoding["strokeDash"]["scale"][name] for name in ("domain", "range"))
    assert domain == list(RUNS)
    assert len({json.dumps(each) for each in dashes[:2]}) == 2


def layer_table(rise=(0.5, -0.25), error=(0.1, float("nan"))):
    return pd.DataFrame({"layer": ["a.weight", "b"], "weights": [10, 20], "zeros": [5, 18], "sparsity": [0.5, 0.9],
                         "rise": rise, "error": error})  # fmt: skip


def test_layers_are_categories_and_nothing_joins_them():
    rows = charts.explorer.layer_rows(dict.fromkeys(RUNS, layer_table()), 100)
    first, second = rows["layers"][:2]
    assert (first["told"], first["share"], first["n"]) == ("+0.5 ± 0.1", 50, 100)
    assert (first["low"], first["high"]) == (pytest.approx(0.4), pytest.approx(0.6))
    assert (second["told"], second["low"]) == ("−0.25", None)
    chart = charts.explorer.layers(RUNS, ["a.weight", "b"])
    marks = [part["mark"]["type"] for side in chart.to_dict()["hconcat"] for part in side["layer"]]
    assert set(marks) == {"rect", "point", "rule"}
    texts, picture = drawn_with(chart, rows)
    assert {"a", "b", *RUNS} <= set(texts)
    assert "NaN" not in picture
    unmeasured = charts.explorer.layer_rows({"CrAM": layer_table().drop(columns=["rise", "error"])}, 100)
    assert [row["told"] for row in unmeasured["layers"]] == ["being measured"] * 2
    with pytest.raises(ValueError, match="same layers, and that of 'other'"):
        charts.explorer.layer_rows({"one": layer_table(), "other": layer_table()[:1]}, 100)


def test_one_layer_is_drawn_with_its_name():
    alone = pd.DataFrame({"sparsity": [0.0, 0.5], "rise": [0.0, 0.2], "error": [0.0, 0.05]})
    spread = pd.DataFrame(
        {"state": ["dense", "compressed"], "low": [0.0, 0.0], "high": [1.0, 1.0], "share": [1.0, 0.5]}
    )
    rows = charts.explorer.layer_detail_rows({"CrAM": alone}, {"CrAM": spread}, 100)
    assert rows["alone"][1]["told"] == "+0.2 ± 0.05"
    assert [row["share"] for row in rows["spread"]] == [100, 50]
    texts, picture = drawn_with(charts.explorer.layer_detail({"CrAM": "cram"}, "fc.weight"), rows)
    assert ">fc.weight</tspan>" in picture
    assert "rise of the loss, nats" in texts
