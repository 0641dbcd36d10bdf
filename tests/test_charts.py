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


def test_it_starts_where_methods_differ_most_after_tuning():
    near = {("global", s, flag): 0.8 for s in (0.0, 0.5, 0.9, 0.95) for flag in (False, True)}
    far = {**near, ("global", 0.5, False): 0.1, ("global", 0.9, True): 0.3, ("global", 0.95, True): 0.7}
    both = pd.concat([table_of("sgd", 0, near), table_of("sam", 0, far)])
    assert widest(points(both)) == 2
    spec = charts.accuracy_vs_sparsity(both).to_dict()
    assert next(p["value"] for p in spec["params"] if p["name"] == "at") == 2
    assert spec["usermeta"]["levels"] == {"global": ["dense", "50 %", "90 %", "95 %"]}
    assert widest(points(table_of("sgd", 0, near))) == 0


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
