"""Every figure against its table: where lines, bands, ticks, colours and texts must be is worked out here."""

import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgba

import cram_bench as cb
from cram_bench.recipes import METHODS

PAIR = ("sgd", "cram+-multi")
NAMES = {"sgd": "SGD", "cram+-multi": "CrAM+-Multi"}


def table(methods=PAIR, seeds=(0, 1, 2), **axes) -> pd.DataFrame:
    """Return a row for each combination, and values without symmetry: mean, median, lowest and highest differ."""
    rows = list(itertools.product(methods, seeds, *axes.values()))
    frame = pd.DataFrame(rows, columns=["method", "seed", *axes])
    draw = np.random.default_rng(len(rows))
    values = {name: draw.lognormal(-1, 0.7, len(frame)) for name in ("loss", "gap", "sharpness", "pruning_gap")}
    return frame.assign(accuracy=draw.uniform(0.2, 0.9, len(frame)), **values)


# ---------------------------------------------------------------- what is looked at in a figure


def rendered(figure, dpi=80) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].astype(int)


def colour_at(figure, axis, a, b) -> np.ndarray:
    """Return the colour at data coordinates; a point on the frame is looked at just inside."""
    if not hasattr(figure, "seen"):
        figure.seen = rendered(figure)  # once a figure
    x, y = axis.transData.transform((a, b))
    box = axis.get_window_extent()
    x, y = np.clip(x, box.x0 + 3, box.x1 - 4), np.clip(y, box.y0 + 3, box.y1 - 4)
    return figure.seen[figure.seen.shape[0] - 1 - round(y), round(x)]


def ticks(axis) -> dict[float, str]:
    """Return the ticks inside the view with their texts."""
    axis.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    places = zip(axis.get_majorticklocs(), (label.get_text() for label in axis.get_majorticklabels()), strict=True)
    return {float(place): text for place, text in places if low - 1e-9 <= place <= high + 1e-9}


def tick_texts(axis) -> list[str]:
    return [label.get_text() for label in axis.get_majorticklabels()]


def check_per_cent(axis) -> None:
    found = ticks(axis)
    assert len(found) > 1
    assert [float(text) for text in found.values()] == pytest.approx([100 * place for place in found])


def check_numbers(axis) -> None:
    """The ticks of an axis are at least two, and say in plain numbers where they are."""
    found = ticks(axis)
    assert len(found) > 1
    assert [as_number(text) for text in found.values()] == pytest.approx(list(found), rel=0.01)


def as_number(text: str) -> float:
    power = re.fullmatch(r"(?:(−?[\d.]+)·)?10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", text)
    if power:
        return float((power[1] or "1").replace("−", "-")) * 10.0 ** int(
            power[2].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
        )
    return float(text.replace("−", "-"))


def brightness(figure, axis, a, b) -> float:
    """Return the luma at data coordinates: over the colour maps of the house it rises or falls all the way."""
    return float(colour_at(figure, axis, a, b) @ [0.299, 0.587, 0.114])


def line(axis, label):
    (found,) = [each for each in axis.get_lines() if each.get_label() == label]
    return found


def bands(axis, colour) -> list[dict[float, tuple[float, float]]]:
    """Return the filled bands of a colour: x → (low, high)."""
    found = []
    for collection in axis.collections:
        filled = type(collection).__name__.startswith(("FillBetween", "PolyCollection"))
        if filled and to_hex(collection.get_facecolor()[0]) == to_hex(colour):
            ends = {}
            for x, y in collection.get_paths()[0].vertices:
                low, high = ends.get(round(x, 9), (y, y))
                ends[round(x, 9)] = (min(low, y), max(high, y))
            found.append(ends)
    return found


def by_place(frame, method, x, y) -> dict[float, list[float]]:
    part = frame[frame["method"] == method]
    return {place: part.loc[part[x] == place, y].tolist() for place in sorted(part[x].unique())}


def check_means(axis, frame, x, y, band, places=None) -> None:
    """A line a method through its means, in its look, and a band: std, or range from lowest to highest."""
    for method in dict.fromkeys(frame["method"]):
        label, colour, marker = cb.plots.look(method)
        drawn, expected = line(axis, label), by_place(frame, method, x, y)
        at = [places[place] if places else place for place in expected]
        assert list(drawn.get_xdata()) == pytest.approx(at)
        assert list(drawn.get_ydata()) == pytest.approx([sum(v) / len(v) for v in expected.values()])
        assert (drawn.get_color(), drawn.get_marker(), drawn.get_linestyle()) == (colour, marker, "-")
        (found,) = bands(axis, colour)
        assert sorted(found) == pytest.approx(at)
        for place, values in zip(at, expected.values(), strict=True):
            mean, spread = statistics.mean(values), statistics.stdev(values)
            low, high = (mean - spread, mean + spread) if band == "std" else (min(values), max(values))
            assert found[round(place, 9)] == pytest.approx((low, high))


def check_strip(axis, frame, value) -> None:
    """A point a seed and a bar at their mean, a place a method."""
    methods = list(dict.fromkeys(frame["method"]))
    assert tick_texts(axis.xaxis) == [cb.plots.look(method)[0] for method in methods]
    bars = [segment for collection in axis.collections for segment in collection.get_segments()]
    points = [each for each in axis.get_lines() if each.get_linestyle() == "None"]
    for place, (method, drawn, bar) in enumerate(zip(methods, points, bars, strict=True)):
        values = frame[frame["method"] == method].groupby("seed")[value].first().tolist()
        assert sorted(drawn.get_ydata()) == pytest.approx(sorted(values))
        assert set(drawn.get_xdata()) == {place}
        assert (drawn.get_color(), drawn.get_marker()) == cb.plots.look(method)[1:]
        assert bar[:, 1] == pytest.approx(statistics.mean(values))
        assert bar[0, 0] < place < bar[1, 0]


def below(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def at_the_ends(axis) -> dict[str, str]:
    """Return the labels at the ends of lines: text → colour."""
    return {text.get_text(): to_hex(text.get_color()) for text in axis.texts if text.get_text() in NAMES.values()}


OF_PAIR = {name: cb.plots.look(method)[1].lower() for method, name in NAMES.items()}


# ---------------------------------------------------------------- one oracle a function


def accuracy_vs_sparsity():
    rows = table(pattern=["global"], sparsity=[0.0, 0.5, 0.95], calibrated=[False, True])
    rows = pd.concat([rows, table(pattern=["2:4"], sparsity=[0.5], calibrated=[False, True])])
    figure = cb.plots.accuracy_vs_sparsity(rows, chance=0.15)
    left, right = figure.axes
    for axis, flag, title in (
        (left, False, "Pruned in one shot"),
        (right, True, "Pruned in one shot, then BatchNorm tuned"),
    ):
        part = rows[rows["calibrated"] == flag]
        check_means(axis, part[part["pattern"] == "global"], "sparsity", "accuracy", "std", {0.0: 0, 0.5: 1, 0.95: 2})
        assert tick_texts(axis.xaxis) == ["dense", "50", "95", "2:4"]
        assert axis.get_title(loc="left") == title
        assert axis.get_xlabel() == "sparsity, % of prunable weights (global), or pattern"
        assert any(set(each.get_ydata()) == {0.15} for each in axis.get_lines())
        assert "guessing" in [text.get_text() for text in axis.texts]
        bars = [c for c in axis.collections if hasattr(c, "get_segments")]
        alone = [each for each in axis.get_lines() if each.get_linestyle() == "None"]
        for method, drawn, bar in zip(PAIR, alone, bars, strict=True):
            values = part[(part["pattern"] == "2:4") & (part["method"] == method)]["accuracy"].tolist()
            mean, spread = statistics.mean(values), statistics.stdev(values)
            assert list(drawn.get_ydata()) == pytest.approx([mean])
            assert abs(drawn.get_xdata()[0] - 3) < 0.3
            assert (drawn.get_color(), drawn.get_marker()) == cb.plots.look(method)[1:]
            assert sorted(bar.get_segments()[0][:, 1]) == pytest.approx([mean - spread, mean + spread])
            assert to_hex(bar.get_color()[0]) == cb.plots.look(method)[1].lower()
    assert left.get_ylabel() == "test accuracy, %"
    check_per_cent(left.yaxis)
    assert left.get_ylim() == (0, 1.02) == right.get_ylim()
    assert at_the_ends(right) == OF_PAIR
    assert below(figure) == ["mean ± std, 3 seeds"]
    return figure


def equal_cost():
    def cost(epochs, gradients):
        rows = table(pattern=["global"], sparsity=[0.0, 0.5, 0.9], calibrated=[False, True])
        return rows.assign(
            accuracy=rows["accuracy"] * gradients / 9,
            epochs=rows["method"].map(dict(zip(PAIR, epochs, strict=True))),
            gradients=gradients,
        )

    epochs, gradients = cost((5, 5), 7), cost((8, 3), 9)
    figure = cb.plots.equal_cost(epochs, gradients)
    for axis, rows, title in zip(
        figure.axes, (epochs, gradients), ("Equal epochs: 5", "Equal cost: 9 gradients an image"), strict=True
    ):
        check_means(axis, rows[rows["calibrated"]], "sparsity", "accuracy", "std", {0.0: 0, 0.5: 1, 0.9: 2})
        assert tick_texts(axis.xaxis) == ["dense", "50", "90"]
        assert axis.get_title(loc="left") == title
        assert axis.get_xlabel() == "sparsity, % of prunable weights (global)"
    check_per_cent(figure.axes[0].yaxis)
    assert figure.axes[0].get_ylabel() == "test accuracy after BatchNorm tuning, %"
    assert at_the_ends(figure.axes[1]) == OF_PAIR
    assert below(figure) == ["mean ± std, 3 seeds"]
    return figure


def ablations():
    means = pd.DataFrame(
        {"dense": [0.9, 0.88, 0.8996, np.nan], "90": [0.5, 0.623, 0.45, np.nan]},
        index=["CrAM+", "b_b", "$c$", "broken"],
    )
    figure = cb.plots.ablations(means)
    axis, bar = figure.axes
    texts = {(text.get_position()): text.get_text() for text in axis.texts}
    assert texts == {
        (0, 0): "90.0", (1, 0): "50.0", (0, 1): "−2.0", (1, 1): "+12.3",
        (0, 2): "0.0", (1, 2): "−5.0", (0, 3): "failed", (1, 3): "failed",
    }  # fmt: skip
    assert tick_texts(axis.yaxis) == list(means.index)
    assert tick_texts(axis.xaxis) == ["dense", "90"]
    assert axis.get_xlabel() == "sparsity, % of prunable weights (global)"
    image = axis.images[0]
    assert np.ma.filled(image.get_array(), np.nan)[:3].tolist() == [
        [0, 0],
        pytest.approx([-2, 12.3]),
        pytest.approx([-0.04, -5]),
    ]
    assert (image.norm.vmin, image.norm.vmax) == pytest.approx((-12.3, 12.3))
    better, worse = (image.cmap(image.norm(value)) for value in (10, -10))
    assert better[2] > better[0]  # purple
    assert worse[0] > worse[2]  # orange
    assert bar.get_ylabel() == "points of accuracy"
    assert tick_texts(bar.yaxis) == ["−12.3", "−1", "0", "+1", "+12.3"]
    assert bar.get_yticks() == pytest.approx([-12.3, -1, 0, 1, 12.3])
    return figure


def transfer():
    rows = table(sparsity=[0.0, 0.7, 0.95])
    figure = cb.plots.transfer(rows, "icons", chance=0.12)
    (axis,) = figure.axes
    check_means(axis, rows, "sparsity", "accuracy", "std", {0.0: 0, 0.7: 1, 0.95: 2})
    assert tick_texts(axis.xaxis) == ["dense", "70", "95"]
    assert axis.get_ylabel() == "test accuracy on icons, %"
    assert axis.get_xlabel() == "sparsity held while fine-tuning, %"
    assert any(set(each.get_ydata()) == {0.12} for each in axis.get_lines())
    check_per_cent(axis.yaxis)
    assert at_the_ends(axis) == OF_PAIR
    assert below(figure) == ["mean ± std, 3 seeds"]
    return figure


def training():
    rows = table(epoch=[1, 2, 4]).assign(seconds=lambda t: 10.0 * t["epoch"] + t["seed"] + 30 * (t["method"] == "sgd"))
    figure = cb.plots.training(rows)
    by_steps, by_time = figure.axes
    check_means(by_steps, rows, "epoch", "accuracy", "std")
    timed = rows.assign(seconds=rows["seconds"] - rows["seed"] + 1)  # means over seeds 0, 1, 2
    check_means(by_time, timed, "seconds", "accuracy", "std")
    assert (by_steps.get_title(loc="left"), by_time.get_title(loc="left")) == ("By steps", "By time")
    assert (by_steps.get_xlabel(), by_time.get_xlabel()) == ("epochs", "seconds, training and evaluation")
    assert by_steps.get_ylabel() == "test accuracy, %"
    check_per_cent(by_steps.yaxis)
    assert at_the_ends(by_time) == OF_PAIR
    assert below(figure) == ["mean ± std, 3 seeds"]
    assert [tick for tick in by_steps.get_xticks() if tick != round(tick)] == []
    held = rows.assign(megabytes=rows["method"].map({"sgd": 1.0, "cram+-multi": 100.0}))
    weighed = cb.plots.training(held)
    by_steps, by_bytes, by_time = weighed.axes
    assert (by_bytes.get_title(loc="left"), by_bytes.get_xscale()) == ("By memory, at the end", "log")
    assert by_bytes.get_xlabel() == "MB that the optimizer holds (log scale)"
    assert list(ticks(by_bytes.xaxis).values()) == ["1", "10", "100"]
    for container, method in zip(by_bytes.containers, ("sgd", "cram+-multi"), strict=True):
        point, _, (bar,) = container
        last = rows.loc[(rows["method"] == method) & (rows["epoch"] == 4), "accuracy"]
        assert point.get_xdata() == [{"sgd": 1.0, "cram+-multi": 100.0}[method]]
        assert point.get_ydata() == pytest.approx([last.mean()])
        assert to_hex(point.get_color()) == cb.plots.look(method)[1].lower()
        low, high = bar.get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((last.mean() - last.std(), last.mean() + last.std()))
    assert at_the_ends(by_time) == OF_PAIR
    nothing = cb.plots.training(held.assign(megabytes=held["megabytes"].where(held["method"] != "sgd", 0.0)))
    assert nothing.axes[1].get_xscale() == "symlog"
    return weighed


def density():
    rows = pd.DataFrame(
        [
            (0.01, True, 0, 0.8),
            (0.01, True, 1, 0.9),
            (0.001, True, 0, 0.6),
            (0.01, False, 0, 0.5),
            (0.1, False, 0, None),
        ],
        columns=["density", "feedback", "seed", "accuracy"],
    )
    figure = cb.plots.density(rows, dense=0.95)
    (axis,) = figure.axes
    fed, plain = line(axis, "with error feedback"), line(axis, "without error feedback")
    assert (list(fed.get_xdata()), list(fed.get_ydata())) == ([0.001, 0.01], pytest.approx([0.6, 0.85]))
    assert (list(plain.get_xdata()), list(plain.get_ydata())) == ([0.01], [0.5])
    assert fed.get_color() != plain.get_color()
    points = [each for each in axis.get_lines() if each.get_linestyle() == "None"]
    assert sorted(points[0].get_ydata()) == [0.6, 0.8, 0.9]
    assert list(line(axis, "whole gradients").get_ydata()) == [0.95, 0.95]
    assert axis.get_xscale() == "log"
    assert tick_texts(axis.xaxis) == ["0.1", "1"]
    assert axis.get_xlabel() == "entries of a gradient that are kept, %"
    assert axis.get_ylabel() == "test accuracy, %"
    check_per_cent(axis.yaxis)
    texts = below(figure)
    notes = ["1 of 5 runs failed", "lines: means of up to 2 seeds"]
    assert texts == ["with error feedback", "without error feedback", "whole gradients", *notes]
    return figure


def calibration_curve():
    sizes = pd.DataFrame(
        {"size": [0, 10, 10, 10, 1000, 1000, 1000], "draw": [0, 0, 1, 2, 0, 1, 2],
         "accuracy": [0.3, 0.5, 0.7, 0.75, 0.8, 0.9, 0.82]}
    )  # fmt: skip
    figure = cb.plots.calibration_curve(sizes)
    (axis,) = figure.axes
    curve, untuned = axis.get_lines()
    assert list(curve.get_xdata()) == [10, 1000]
    assert list(curve.get_ydata()) == pytest.approx([0.65, 0.84])
    assert list(untuned.get_ydata()) == [0.3, 0.3]
    assert "untuned" in [text.get_text() for text in axis.texts]
    (band,) = bands(axis, "black")
    for place, values in ((10, (0.5, 0.7, 0.75)), (1000, (0.8, 0.9, 0.82))):
        mean, spread = statistics.mean(values), statistics.stdev(values)
        assert band[place] == pytest.approx((mean - spread, mean + spread))
    assert axis.get_xscale() == "log"
    assert tick_texts(axis.xaxis) == ["10", "1,000"]
    check_per_cent(axis.yaxis)
    assert axis.get_ylabel() == "accuracy, %"
    assert axis.get_title(loc="left") == "How much tuning needs (mean ± std, 3 draws)"
    return figure


def gaps():
    rows = table(pattern=["global"], sparsity=[0.5, 0.9]).assign(rho=0.2, gap=lambda t: 1 + t["gap"])
    rows["ascent_gap"] = rows["seed"] ** 2 + rows["method"].map({"sgd": 0.3, "cram+-multi": 0.17})  # one a model
    rows["loss"] = rows["seed"] ** 2 * rows["method"].map({"sgd": 0.21, "cram+-multi": 0.4}) + 0.1
    figure = cb.plots.gaps(rows)
    loss, ascent, pruning, gap = figure.axes
    check_strip(loss, rows, "loss")
    check_strip(ascent, rows, "ascent_gap")
    check_means(pruning, rows, "sparsity", "pruning_gap", "range", {0.5: 0, 0.9: 1})
    check_means(gap, rows, "sparsity", "gap", "range", {0.5: 0, 0.9: 1})
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "Loss", "Ascent alone\nL(θ + ρg) − L(θ)", "Pruning alone (ρ = 0)\nL(C(θ)) − L(θ)",
        "CrAM gap at ρ = 0.2\nL(C(θ + ρg)) − L(θ)",
    ]  # fmt: skip
    assert loss.get_ylabel() == "L(θ), nats"
    assert loss.get_ylim()[0] == 0
    assert ascent.get_ylabel() == "rise of the loss, nats\n(log scale)"
    assert {axis.get_yscale() for axis in figure.axes[1:]} == {"log"}
    assert len({axis.get_ylim() for axis in figure.axes[1:]}) == 1
    for axis in (pruning, gap):
        assert tick_texts(axis.xaxis) == ["50", "90"]
        assert axis.get_xlabel() == "zeros, % of prunable weights\n(global)"
    check_numbers(loss.yaxis)
    check_numbers(ascent.yaxis)
    assert at_the_ends(gap) == OF_PAIR
    assert below(figure) == ["lowest to highest, 3 seeds"]
    return figure


def sharpness():
    rows = table(rho=[0.02, 0.1, 0.2])
    rows["loss"] = rows["seed"] ** 2 * rows["method"].map({"sgd": 0.21, "cram+-multi": 0.4}) + 0.1
    figure = cb.plots.sharpness(rows)
    loss, axis = figure.axes
    check_strip(loss, rows, "loss")
    check_means(axis, rows, "rho", "sharpness", "range")
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert tick_texts(axis.xaxis) == ["0.02", "0.1", "0.2"]
    assert axis.get_ylabel() == "L(θ + ρg/‖g‖) − L(θ), nats\n(log scale)"
    assert axis.get_xlabel() == "radius ρ, Euclidean distance in weights (log scale)"
    assert [each.get_title(loc="left") for each in (loss, axis)] == ["Loss", "SAM-sharpness"]
    check_numbers(axis.yaxis)
    assert at_the_ends(axis) == OF_PAIR
    assert below(figure) == ["lowest to highest, 3 seeds"]
    return figure


def stability():
    rows = table(weights=["dense", "global@0.9"])
    draw = np.random.default_rng(5)
    names = ["loss", "gap", "ascent_gap", "pruning_gap", "sharpness", "eigenvalue", "trace"]
    rows = rows.assign(**{name: draw.lognormal(0, 0.5, len(rows)) for name in names})
    rows = rows.assign(
        eigenvalue_error=draw.uniform(0.01, 0.1, len(rows)), trace_error=draw.uniform(0.01, 0.1, len(rows))
    )
    figure = cb.plots.stability(rows)
    titles = [axis.get_ylabel().split("\n") for axis in figure.axes]
    assert [title for title, _ in titles] == [
        "loss: how well it fits", "CrAM gap", "rise by the ascent", "rise by pruning", "SAM-sharpness",
        "top Hessian eigenvalue", "Hessian trace",
    ]  # fmt: skip
    assert [unit for _, unit in titles] == ["nats (log scale)"] * 5 + ["nats/weight² (log scale)"] * 2
    for axis, name in zip(figure.axes, names, strict=True):
        assert tick_texts(axis.xaxis) == ["dense", "global,\n90 % zeros"]
        points = [each for each in axis.get_lines() if len(each.get_xdata())]
        bars = [c for c in axis.collections if len(c.get_segments()) == 1]
        errors = [c for c in axis.collections if len(c.get_segments()) == 3]
        assert len(errors) == (4 if f"{name}_error" in rows else 0)
        for number, (weights, method) in enumerate(itertools.product(["dense", "global@0.9"], PAIR)):
            part = rows[(rows["weights"] == weights) & (rows["method"] == method)]
            assert list(points[number].get_ydata()) == pytest.approx(part[name].tolist())
            (place,) = set(points[number].get_xdata())
            assert round(place) == number // 2
            assert (place < number // 2) == (method == "sgd")
            assert (points[number].get_color(), points[number].get_marker()) == cb.plots.look(method)[1:]
            assert bars[number].get_segments()[0][:, 1] == pytest.approx(part[name].mean())
            if errors:
                found = [tuple(segment[:, 1]) for segment in errors[number].get_segments()]
                wide = part[f"{name}_error"]
                assert found == [pytest.approx(e) for e in zip(part[name] - wide, part[name] + wide, strict=True)]
        check_numbers(axis.yaxis)
    handles = figure.legends[0].legend_handles
    looks = {
        text: (handle.get_color(), handle.get_marker()) for text, handle in zip(below(figure), handles, strict=True)
    }
    assert {NAMES[method]: cb.plots.look(method)[1:] for method in PAIR}.items() <= looks.items()
    assert list(looks)[2:] == ["mean of 3 seeds"]
    assert figure.get_suptitle() == "Lower is more stable, where the loss on the left is alike"
    return figure


def sharpness_over_radii():
    rows = [("average", rho, d, rho * (d + 1) ** 2) for rho, d in itertools.product((0.1, 0.2), range(3))]
    rows += [("worst", 0.1, 0, 5.0), ("worst", 0.2, 0, 7.0)]
    figure = cb.plots.sharpness_over_radii(
        pd.DataFrame(rows, columns=["kind", "rho", "direction", "rise"]).assign(loss=0.123456)
    )
    (axis,) = figure.axes
    worst, average = line(axis, "worst found"), line(axis, "average over directions")
    assert list(worst.get_xdata()) == list(average.get_xdata()) == [0.1, 0.2]
    assert list(worst.get_ydata()) == [5, 7]
    assert list(average.get_ydata()) == pytest.approx([0.1 * 14 / 3, 0.2 * 14 / 3])
    assert bands(axis, average.get_color()) == [{0.1: pytest.approx((0.1, 0.9)), 0.2: pytest.approx((0.2, 1.8))}]
    assert worst.get_color() != average.get_color()
    assert tick_texts(axis.xaxis) == ["0.1", "0.2"]
    assert axis.get_ylabel() == "rise of the loss, nats\n(log scale)"
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    check_numbers(axis.yaxis)
    legend = axis.get_legend()
    assert legend.get_title().get_text() == "loss at the centre: 0.123 nats"
    shown = zip(legend.get_texts(), legend.legend_handles, strict=True)
    assert {text.get_text(): handle.get_color() for text, handle in shown} == {
        each.get_label(): each.get_color() for each in (worst, average)
    }
    return figure


def spectral_density():
    rows = table(seeds=[0], eigenvalue=[-1.0, 0.0, 1.0, 4.0]).assign(
        density=lambda t: t["loss"], error=lambda t: t["gap"] / 9
    )
    figure = cb.plots.spectral_density(rows)
    (axis,) = figure.axes
    for method in PAIR:
        label, colour, _ = cb.plots.look(method)
        part = rows[rows["method"] == method]
        drawn = line(axis, label)
        assert drawn.get_color() == colour
        assert list(drawn.get_xdata()) == [-1, 0, 1, 4]
        assert list(drawn.get_ydata()) == part["density"].tolist()
        (band,) = bands(axis, colour)
        for x, density, error in part[["eigenvalue", "density", "error"]].itertuples(index=False):
            assert band[x] == pytest.approx((max(density - error, 1e-12), density + error))
    assert (axis.get_xscale(), axis.get_yscale()) == ("linear", "log")
    assert axis.get_xlabel() == "eigenvalue of the Hessian, nats per squared weight"
    assert axis.get_ylabel() == "density (log scale)"
    check_numbers(axis.yaxis)
    assert below(figure) == ["SGD", "CrAM+-Multi"]
    return figure


def loss_in_ball():
    rows = table(direction=[0, 1], a=[-1.0, 0.0, 1.5])
    figure = cb.plots.loss_in_ball(rows)
    (axis,) = figure.axes
    check_means(axis, rows, "a", "loss", "range")
    assert axis.get_yscale() == "log"
    assert axis.get_xlabel() == "distance from the trained weights, in filter norms"
    assert axis.get_ylabel() == "loss, nats (log scale)"
    check_numbers(axis.yaxis)
    assert at_the_ends(axis) == OF_PAIR
    assert below(figure) == ["lowest to highest, 3 seeds × 2 directions"]
    return figure


def loss_along_compression():
    rows = table(compressor=["global@0.5", "2:4"], t=[0.0, 0.4, 1.0])
    rows = rows.assign(loss=lambda t: t["loss"] * (1 + 3 * (t["compressor"] == "2:4")))
    figure = cb.plots.loss_along_compression(rows)
    for axis, compressor, title in zip(
        figure.axes, ("global@0.5", "2:4"), ("to global, 50 % zeros", "to 2:4, 50 % zeros"), strict=True
    ):
        check_means(axis, rows[rows["compressor"] == compressor], "t", "loss", "range")
        assert axis.get_title(loc="left") == title
        assert axis.get_xlabel() == "t:  0 dense,  1 pruned"
        assert axis.get_yscale() == "log"
    assert figure.axes[0].get_ylabel() == "loss, nats (log scale)"
    check_numbers(figure.axes[0].yaxis)
    assert at_the_ends(figure.axes[1]) == OF_PAIR
    assert below(figure) == ["lowest to highest, 3 seeds"]
    return figure


def check_plane(figure, axis, rows) -> None:
    """The colours rise with the loss, at each of the measured points: a to the right, b upwards."""
    assert (axis.get_xlim(), axis.get_ylim()) == tuple((rows[c].min(), rows[c].max()) for c in "ab")
    around = rows[(rows["a"].abs() + rows["b"].abs()) > 0].sort_values("loss")  # other things are drawn at the origin
    picture = [brightness(figure, axis, row.a, row.b) for row in around.itertuples()]
    assert picture == sorted(picture)
    assert picture[0] < picture[-1] - 60


def check_loss_bar(bar, rows) -> None:
    assert bar.get_ylabel() == "loss, nats (log scale)"
    logs = np.log10([rows["loss"].min(), rows["loss"].max()])
    assert bar.get_yticks() == pytest.approx(np.linspace(*logs, 5))
    assert [as_number(text) for text in tick_texts(bar.yaxis)] == pytest.approx(10.0 ** np.linspace(*logs, 5), rel=0.05)


def plane(order, shift=0.0) -> pd.DataFrame:
    points = itertools.product([-1.0, 0.0, 2.0], [-1.0, 0.0, 1.0, 3.0])
    return pd.DataFrame(points, columns=["a", "b"]).assign(loss=[10.0 ** (0.25 * each + shift) for each in order])


def loss_planes():
    first, second = plane([4, 0, 2, 11, 7, 1, 3, 9, 5, 10, 6, 8]), plane([9, 3, 10, 0, 5, 4, 8, 2, 11, 7, 1, 6])
    rows = pd.concat([first.assign(method="sgd"), second.assign(method="cram+-multi")], ignore_index=True).assign(
        seed=0
    )
    figure = cb.plots.loss_planes(rows.sample(frac=1, random_state=0).sort_values("method", ascending=False))
    left, right, bar = figure.axes
    assert [axis.get_title(loc="left") for axis in (left, right)] == ["SGD", "CrAM+-Multi"]
    check_plane(figure, left, first)
    check_plane(figure, right, second)
    check_loss_bar(bar, rows)
    higher = rows.assign(loss=rows["loss"].where(rows["method"] == "sgd", 1.5 * rows["loss"]))
    check_loss_bar(cb.plots.loss_planes(higher).axes[-1], higher)  # of all planes, not of one
    assert [axis.get_xlabel() for axis in (left, right)] == ["direction 1, filter norms"] * 2
    assert left.get_ylabel() == "direction 2, filter norms"
    assert all(list(zip(*axis.get_lines()[0].get_data(), strict=True)) == [(0, 0)] for axis in (left, right))
    assert left.get_aspect() == 1
    return figure


def loss_on_plane():
    rows = plane([4, 0, 2, 11, 7, 1, 3, 9, 5, 10, 6, 8])
    corners = pd.DataFrame({"a": [0.0, 1.5, 1.0], "b": [0.0, 0.0, 2.0]})
    figure = cb.plots.loss_on_plane(rows, corners)
    axis, bar = figure.axes
    check_plane(figure, axis, rows)
    check_loss_bar(bar, rows)
    assert [list(values) for values in axis.get_lines()[0].get_data()] == [[0, 1.5, 1], [0, 0, 2]]
    assert {text.get_text(): text.xy for text in axis.texts} == {
        "dense": (0, 0),
        "pruned": (1.5, 0),
        "fine-tuned": (1, 2),
    }
    assert axis.get_xlabel() == "along the first step, distance between weights"
    assert axis.get_ylabel() == "orthogonal to it"
    return figure


def loss_along_path():
    rows = table(t=[-0.2, 0.5, 1.0])
    figure = cb.plots.loss_along_path(rows, ("here", "there"))
    (axis,) = figure.axes
    check_means(axis, rows, "t", "loss", "range")
    assert axis.get_xlabel() == "t:  0 here,  1 there"
    assert axis.get_ylabel() == "loss, nats (log scale)"
    assert axis.get_yscale() == "log"
    check_numbers(axis.yaxis)
    assert at_the_ends(axis) == OF_PAIR
    assert below(figure) == ["lowest to highest, 3 seeds"]
    return figure


RUNS = {"SGD, seed 0": "sgd", "SGD, seed 1": "sgd", "multi": "cram+-multi"}
DASHES = {"SGD, seed 0": "-", "SGD, seed 1": "--", "multi": "-"}


def check_looks(axis, x, y, tables) -> None:
    for label, method in RUNS.items():
        drawn = line(axis, label)
        assert list(drawn.get_xdata()) == pytest.approx(list(tables[label][x]))
        assert list(drawn.get_ydata()) == pytest.approx(list(tables[label][y]))
        colour, marker = cb.plots.look(method)[1:]
        assert to_hex(drawn.get_markerfacecolor()) == to_hex(drawn.get_color()) == colour.lower()
        assert (drawn.get_marker(), drawn.get_linestyle()) == (marker, DASHES[label])


def loss_slice():
    tables = {
        label: pd.DataFrame({"t": [0.0, 0.5, 1.0, 1.2], "loss": [0.1, 0.3, 0.9 + place, 2.0]})
        for place, label in enumerate(RUNS)
    }
    figure = cb.plots.loss_slice(tables, RUNS)
    (axis,) = figure.axes
    check_looks(axis, "t", "loss", tables)
    marked = [each for each in axis.get_lines() if len(each.get_xdata()) == 1]
    assert [(each.get_xdata()[0], each.get_ydata()[0]) for each in marked] == [(1, 0.9), (1, 1.9), (1, 2.9)]
    assert [(each.get_color(), each.get_marker()) for each in marked] == [cb.plots.look(m)[1:] for m in RUNS.values()]
    assert axis.get_xlabel() == "t:  0 dense,  1 compressed"
    assert axis.get_ylabel() == "loss, nats (log scale)"
    assert axis.get_title(loc="left") == "Loss on the way there (untuned)"
    assert axis.get_yscale() == "log"
    check_numbers(axis.yaxis)
    assert below(figure) == list(RUNS)
    return figure


def layer_profile():
    tables = {
        label: pd.DataFrame(
            {"layer": ["conv.weight", "fc.weight"], "sparsity": [0.2, 0.7 + place / 10], "rise": [0.5, -0.02 * place]}
        )
        for place, label in enumerate(RUNS)
    }  # fmt: skip
    figure = cb.plots.layer_profile(tables, RUNS)
    left, right = figure.axes
    rowed = {label: each.assign(row=[0, 1]) for label, each in tables.items()}
    check_looks(left, "sparsity", "row", rowed)
    check_looks(right, "rise", "row", rowed)
    assert tick_texts(left.yaxis) == ["conv.weight", "fc.weight"]
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first layer on top
    check_per_cent(left.xaxis)
    assert left.get_xlabel() == "zeros in the layer, %"
    assert right.get_xscale() == "symlog"
    assert right.get_xlabel() == "rise of the loss by this layer alone, nats\n(linear to 0.01, then log)"
    assert [axis.get_title(loc="left") for axis in (left, right)] == [
        "Where the zeros are",
        "Which layer breaks it (untuned)",
    ]
    check_numbers(right.xaxis)
    assert below(figure) == list(RUNS)
    return figure


def layer_sensitivity():
    rows = pd.DataFrame(
        itertools.product(["conv.weight", "fc.weight", "a.weight"], [0.9, 0.5]), columns=["layer", "sparsity"]
    )
    rows = rows.assign(weights=[432] * 2 + [12345] * 2 + [7] * 2, rise=[3.0, 0.002, 0.5, -0.1, np.nan, 0.03])
    figure = cb.plots.layer_sensitivity(rows)
    axis, bar = figure.axes
    image = axis.images[0]
    values = np.ma.filled(image.get_array().astype(float), np.nan)
    assert values[:2].tolist() == [[0.002, 3.0], [0.0, 0.5]]
    assert values[2, 0] == 0.03
    assert np.isnan(values[2, 1])
    assert [text.get_text() for text in axis.texts] == ["failed"]
    assert tick_texts(axis.yaxis) == ["conv.weight (432)", "fc.weight (12,345)", "a.weight (7)"]
    assert tick_texts(axis.xaxis) == ["50", "90"]
    assert axis.get_xlabel() == "sparsity of this layer alone, %"
    assert bar.get_ylabel() == "rise of the loss, nats, falls as 0\n(linear to 0.01, then log)"
    assert (image.norm.vmin, image.norm.vmax) == (0, 3)
    assert brightness(figure, axis, 1, 0) < brightness(figure, axis, 1, 1) < brightness(figure, axis, 0, 1)
    check_numbers(bar.yaxis)
    return figure


def weight_histogram():
    counts = {"conv.weight": [1, 0, 3], "fc.weight": [0, 60, 40]}
    rows = [
        (layer, low, low + 0.5, n)
        for layer, each in counts.items()
        for low, n in zip((-0.5, 0.0, 0.5), each, strict=True)
    ]
    figure = cb.plots.weight_histogram(pd.DataFrame(rows, columns=["layer", "low", "high", "count"]))
    axis, bar = figure.axes
    mesh = axis.collections[0]
    shares = np.ma.filled(mesh.get_array().astype(float), 0).reshape(2, 3)
    assert shares.tolist() == [[0.25, 0, 0.75], [0, 0.6, 0.4]]
    assert sorted({x for x, _ in mesh.get_coordinates().reshape(-1, 2)}) == [-0.5, 0, 0.5, 1]
    assert tick_texts(axis.yaxis) == ["conv.weight", "fc.weight"]
    assert list(axis.get_yticks()) == [0.5, 1.5]
    assert axis.get_ylim() == (2, 0)
    assert axis.get_xlabel() == "value of the weight"
    assert bar.get_ylabel() == "share of the layer,\n% (log scale)"
    assert brightness(figure, axis, 0.75, 0.5) < brightness(figure, axis, -0.25, 0.5)
    check_per_cent(bar.yaxis)
    return figure


def examples():
    images = torch.randint(0, 255, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    captions = ["a → b", "$x^2$", "_c", "d_1", "e"]
    figure = cb.plots.examples(images, captions, "5 of 7", columns=3)
    assert figure.get_suptitle() == "5 of 7"
    assert len(figure.axes) == 6
    for index, axis in enumerate(figure.axes[:5]):
        assert axis.get_title() == captions[index]
        assert axis.images[0].get_array().tolist() == images[index].permute(1, 2, 0).tolist()
        top, bottom = (colour_at(figure, axis, 1, y) for y in (0, 3))
        assert top.tolist() == images[index, :, 0, 1].tolist()
        assert bottom.tolist() == images[index, :, 3, 1].tolist()
    assert not figure.axes[5].images
    grey = cb.plots.examples(images[:1, :1], ["x"], "t")
    assert grey.axes[0].images[0].get_array().tolist() == images[0, 0].tolist()
    assert grey.axes[0].images[0].get_clim() == (0, 255)  # a faint image stays faint
    return figure


def pruner_rows():
    rows = []
    for method, shift in (("sgd", 0.0), ("cram+-multi", 0.2)):
        for seed in (0, 1):
            for pattern, accuracy in (("global", 0.3), ("greedy(gradients=128)", 0.5)):
                for sparsity in (0.8, 0.95):
                    value = accuracy + shift + seed / 20 - sparsity / 10
                    rows.append((method, seed, pattern, sparsity, "batchnorm", value))
    return pd.DataFrame(rows, columns=["method", "seed", "pattern", "sparsity", "correction", "accuracy"])


def pruners():
    rows = pruner_rows()
    figure = cb.plots.pruners(rows)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["80 % zeros", "95 % zeros"]
    assert tick_texts(figure.axes[0].yaxis) == ["global", "greedy(gradients=128)"]
    for axis, level in zip(figure.axes, (0.8, 0.95), strict=True):
        for number, method in enumerate(("sgd", "cram+-multi")):
            points = [each for each in axis.lines if to_hex(each.get_color()) == cb.plots.look(method)[1].lower()]
            own = rows[(rows["method"] == method) & (rows["sparsity"] == level)].groupby("pattern")["accuracy"]
            assert list(points[0].get_xdata()) == pytest.approx(own.mean().tolist())
            assert [round(float(y)) for y in points[0].get_ydata()] == [0, 1]
            bars = axis.collections[number].get_segments()
            assert [bar[1][0] - bar[0][0] for bar in bars] == pytest.approx((2 * own.std()).tolist())
        check_per_cent(axis.xaxis)
    assert below(figure) == ["SGD", "CrAM+-Multi", "mean ± std of 2 seeds"] or "mean ± std of 2 seeds" in below(figure)
    return figure


def test_patterns_with_a_sparsity_of_their_own_stand_in_a_block_of_their_own():
    rows = pd.concat([pruner_rows(), pruner_rows().assign(pattern=lambda t: t["pattern"] + "2")])
    alone = rows[(rows["pattern"] == "global")].assign(pattern="2:4", sparsity=0.5)
    figure = cb.plots.pruners(pd.concat([rows, alone]))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["80 % zeros", "95 % zeros", "50 % zeros"]
    assert tick_texts(figure.axes[2].yaxis) == ["2:4"]
    assert "2:4" not in tick_texts(figure.axes[0].yaxis)
    assert len(tick_texts(figure.axes[0].yaxis)) == 4
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "test accuracy, %", "test accuracy, %"]
    upper, lower = figure.axes[0].get_subplotspec().rowspan.start, figure.axes[2].get_subplotspec().rowspan.start
    assert (upper, lower) == (0, 1)


def prices():
    rows = [
        (method, seed, sparsity, accuracy + seed / 20 - sparsity / 10, one, curve)
        for method, accuracy, one, curve in (
            ("sgd", 0.5, 30.0, 30.0),
            ("gmp*", 0.8, 40.0, 80.0),
            ("gmp*, distilled", 0.7, 80.0, 120.0),
        )
        for seed in (0, 1)
        for sparsity in (0.9, 0.98)
    ]
    rows = pd.DataFrame(rows, columns=["method", "seed", "sparsity", "accuracy", "one", "curve"])
    figure = cb.plots.prices(rows)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["90 % zeros", "98 % zeros", "", ""]
    for axis, (cost, level) in zip(figure.axes, [(c, s) for c in ("one", "curve") for s in (0.9, 0.98)], strict=True):
        assert axis.get_xscale() == "log"
        assert tick_texts(axis.xaxis) == ["30", "40", "80", "120"]
        words = {"one": "cost of one sparsity", "curve": "cost of the whole curve"}[cost]
        assert axis.get_xlabel() == f"{words},\ngradients an image (log scale)"
        for number, method in enumerate(("sgd", "gmp*", "gmp*, distilled")):
            own = rows[(rows["method"] == method) & (rows["sparsity"] == level)]
            _, colour, marker = cb.plots.look(method.partition(",")[0])
            line = axis.lines[number]
            assert (to_hex(line.get_color()), line.get_marker()) == (colour.lower(), marker)
            assert (to_hex(line.get_markerfacecolor()) == "#ffffff") == ("," in method)  # hollow
            assert line.get_xdata().tolist() == [own[cost].iloc[0]]
            assert line.get_ydata().tolist() == pytest.approx([own["accuracy"].mean()])
            (bar,) = axis.collections[number].get_segments()
            assert bar[1][1] - bar[0][1] == pytest.approx(2 * own["accuracy"].std())
        check_per_cent(axis.yaxis)
    assert below(figure)[:3] == ["SGD", "GMP*", "GMP*, distilled"]
    assert "mean ± std of 2 seeds" in below(figure)
    alone = rows[rows["seed"] == 0].replace({"curve": {80.0: 33.0}})
    alone = pd.concat([alone, alone[:1].assign(method="safe", accuracy=float("nan"), one=500.0)])
    other = cb.plots.prices(alone)
    assert tick_texts(other.axes[0].xaxis) == ["30", "40", "80", "120"]  # 33 would lie over 30; a failed run has none
    assert below(other) == ["SGD", "GMP*", "GMP*, distilled"]  # nothing of seeds
    return figure


def specialist():
    rows = [
        (pattern, 0.9, draw, looked, "task", "statistics", 0.5 + draw / 10, 0.7 + draw / 10)
        for pattern, looked in (("global", ""), ("exactobs", "task"), ("exactobs", "random"))
        for draw in (0, 1)
    ]
    names = ["pattern", "sparsity", "draw", "looked", "corrected", "correction", "accuracy", "task_accuracy"]
    found = pd.DataFrame([("dense", 0.0, 0, "", "", "none", 0.9, 0.95), *rows], columns=names)
    figure = cb.plots.specialist(found)
    (axis,) = figure.axes
    assert tick_texts(axis.yaxis) == [
        "global; statistics on task", "exactobs, looked at task; statistics on task",
        "exactobs, looked at random; statistics on task",
    ]  # fmt: skip
    blue = [each for each in axis.lines if to_hex(each.get_color()) == "#0072b2"]
    assert list(blue[0].get_xdata()) == [0.5, 0.6]
    assert set(blue[1].get_xdata()) == {0.55}
    assert set(blue[-1].get_xdata()) == {0.9}  # the dense model
    check_per_cent(axis.xaxis)
    return figure


def step_times():
    rows = [
        (level, layer, seed * 0.2 + level * (4 if layer == "conv1" else 2), 1.5 if layer == "network" else float("nan"))
        for layer in ("conv1", "network")
        for level in (0.95, 0.8)
        for seed in (0, 1, 2)
    ]
    figure = cb.plots.step_times(pd.DataFrame(rows, columns=["sparsity", "layer", "speedup", "bfloat16_speedup"]))
    (axis,) = figure.axes
    layer, sparse, half, one = axis.lines
    assert list(layer.get_xdata()) == list(sparse.get_xdata()) == list(half.get_xdata()) == [80, 95]
    assert list(layer.get_ydata()) == pytest.approx([3.4, 4.0])  # medians of three
    assert list(sparse.get_ydata()) == pytest.approx([1.8, 2.1])
    assert list(half.get_ydata()) == [1.5, 1.5]
    assert set(one.get_ydata()) == {1.0}
    colours = {to_hex(each.get_color()) for each in (layer, sparse, half)}
    handles = {to_hex(each.get_color()) for each in figure.legends[0].get_lines()}
    assert len(colours) == 3
    assert handles == colours
    assert below(figure) == ["sparse step of the network", "dense step in bfloat16", "a layer alone, sparse"]
    assert axis.get_ylim()[0] == 0
    return figure


def speeds():
    rows = [
        ("float32", 0.0, 1.0, 0.9), ("bfloat16", 0.0, 1.6, 0.89), ("sparse", 0.95, 1.4, 0.6),
        ("sparse", 0.8, 0.8, 0.88), ("ziplm", 2.0, 2.1, 0.87), ("ziplm", 2.0, 1.9, 0.85), ("ziplm", 1.5, 1.5, 0.88),
    ]  # fmt: skip
    figure = cb.plots.speeds(pd.DataFrame(rows, columns=["kind", "asked", "speedup", "accuracy"]))
    (axis,) = figure.axes
    dense, half, sparse, ziplm, one = axis.lines
    assert (dense.get_xdata().tolist(), dense.get_ydata().tolist()) == ([1.0], [0.9])
    assert (half.get_xdata().tolist(), half.get_ydata().tolist()) == ([1.6], [0.89])
    assert sparse.get_xdata().tolist() == [0.8, 1.4]  # by what was asked
    assert ziplm.get_xdata().tolist() == pytest.approx([1.5, 2.0])  # means
    assert ziplm.get_ydata().tolist() == pytest.approx([0.88, 0.86])
    assert set(one.get_xdata()) == {1.0}
    assert axis.get_xscale() == "log"
    assert tick_texts(axis.xaxis) == ["1", "1.5", "2"]
    assert below(figure) == ["dense float32", "dense bfloat16", "single zeros with sparse kernels", "ZipLM"]
    assert len({to_hex(each.get_color()) for each in (dense, half, sparse, ziplm)}) == 4
    handles = [to_hex(each.get_color()) for each in figure.legends[0].get_lines()]
    assert handles == [to_hex(each.get_color()) for each in (dense, half, sparse, ziplm)]
    check_per_cent(axis.yaxis)
    return figure


ORACLES = {
    each.__name__: each
    for each in (
        ablations, accuracy_vs_sparsity, calibration_curve, density, equal_cost, examples, gaps, layer_profile,
        layer_sensitivity, loss_along_compression, loss_along_path, loss_in_ball, loss_on_plane,
        loss_planes, loss_slice, prices, pruners, sharpness, sharpness_over_radii, specialist, spectral_density,
        speeds, stability, step_times, training, transfer, weight_histogram,
    )
}  # fmt: skip
oracle = pytest.mark.parametrize("check", ORACLES.values(), ids=ORACLES.keys())


def test_every_function_has_an_oracle():
    assert set(ORACLES) == set(cb.plots.__all__) - {"STYLE", "look", "style"}


@oracle
def test_a_figure_shows_its_table(check):
    check()


@oracle
def test_no_picture_is_blank_and_no_text_is_cut_off(check):
    figure = check()
    full = rendered(figure)
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 > -0.03
    assert drawn.y0 > -0.03
    assert drawn.x1 < width + 0.03
    assert drawn.y1 < height + 0.03
    axes = [axis for axis in figure.axes if axis.has_data()]
    boxes = [axis.get_window_extent().frozen() for axis in axes]
    assert axes
    for axis in axes:
        for artist in (*axis.lines, *axis.collections, *axis.images, *axis.texts):
            artist.set_visible(False)
    figure.set_layout_engine("none")
    without, height = rendered(figure), full.shape[0]
    for box in boxes:
        rows, columns = slice(round(height - box.y1), round(height - box.y0)), slice(round(box.x0), round(box.x1))
        assert (full[rows, columns] != without[rows, columns]).any(axis=-1).sum() > 60


# ---------------------------------------------------------------- independent of everybody's settings


HOSTILE = """
font.size: 30
font.family: monospace
font.weight: bold
text.usetex: True
text.color: red
text.antialiased: False
text.hinting: none
mathtext.fontset: cm
axes.prop_cycle: cycler('color', ['ff0000', '00ff00'])
axes.grid: True
axes.grid.which: both
axes.facecolor: black
axes.edgecolor: yellow
axes.linewidth: 5
axes.labelcolor: red
axes.labelsize: 30
axes.titlesize: 40
axes.titlelocation: right
axes.titlepad: 40
axes.spines.left: False
axes.spines.top: True
axes.xmargin: 0.4
axes.ymargin: 0.4
axes.autolimit_mode: round_numbers
axes.axisbelow: False
axes.unicode_minus: False
axes.formatter.use_locale: True
axes.formatter.useoffset: True
axes.formatter.limits: 0, 0
axes.formatter.use_mathtext: True
lines.linewidth: 9
lines.linestyle: :
lines.marker: *
lines.markersize: 20
lines.antialiased: False
lines.dashed_pattern: 9, 9
patch.force_edgecolor: True
patch.linewidth: 6
errorbar.capsize: 9
contour.negative_linestyle: dotted
contour.linewidth: 5
grid.color: red
grid.linewidth: 4
grid.linestyle: :
xtick.direction: in
xtick.labelsize: 30
xtick.color: red
xtick.minor.visible: True
xtick.top: True
xtick.labeltop: True
ytick.major.size: 20
ytick.right: True
ytick.minor.visible: True
legend.frameon: True
legend.facecolor: black
legend.fontsize: 30
legend.loc: center
legend.numpoints: 3
legend.handlelength: 9
image.origin: lower
image.cmap: jet
image.interpolation: bilinear
image.aspect: auto
pcolor.shading: gouraud
figure.facecolor: green
figure.autolayout: True
figure.constrained_layout.use: False
figure.subplot.left: 0.4
figure.dpi: 31
figure.titlesize: 40
figure.figsize: 1, 1
savefig.dpi: 37
savefig.transparent: True
savefig.bbox: tight
savefig.facecolor: blue
savefig.format: pdf
savefig.pad_inches: 2
path.simplify: True
path.simplify_threshold: 0.9
path.sketch: 5, 50, 5
path.snap: False
agg.path.chunksize: 10
svg.fonttype: none
svg.image_inline: False
svg.hashsalt: theirs
timezone: Asia/Tokyo
"""


def pictures() -> dict[str, str]:
    """Return a checksum of every figure, as PNG and as SVG."""
    import hashlib

    found = {}
    for name, check in ORACLES.items():
        figure = check()
        for suffix, options in (("png", {}), ("svg", {"format": "svg", "metadata": {"Date": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, **options)  # PNG is what a figure of the house is by default
            found[f"{name}.{suffix}"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    return found


def test_a_users_matplotlibrc_changes_no_figure(tmp_path):
    (tmp_path / "matplotlibrc").write_text(HOSTILE)
    tests = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {tests!r}); import json, test_plots, matplotlib as mpl; "
        "assert mpl.rcParams['font.size'] == 30 and mpl.rcParams['text.usetex']; "
        "print(json.dumps(test_plots.pictures()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "MATPLOTLIBRC": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == pictures()


def test_a_figure_that_is_drawn_in_another_thread_changes_no_setting_of_this_one():
    before, kind = dict(mpl.rcParams), type(mpl.rcParams)
    stop, failures, drawn = threading.Event(), [], []

    def draw():
        while not stop.is_set():
            try:
                with cb.plots.style():
                    figure = layer_sensitivity()
                    for suffix in ("png", "svg", "jpg"):  # matplotlib itself enters an rc_context for JPEG
                        figure.savefig(io.BytesIO(), format=suffix)
                    mpl.rcParams["lines.linewidth"] = 99
                drawn.append(1)
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(drawn) < 4 and not failures:
        assert dict(mpl.rcParams) == before
        assert mpl.rcParams.copy() == before
        assert mpl.figure.Figure().get_dpi() == before["figure.dpi"]
        with mpl.rc_context({"font.size": 31}):
            assert mpl.figure.Figure().text(0, 0, "x").get_fontsize() == 31
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert dict(mpl.rcParams) == before
    assert type(mpl.rcParams) is kind


def test_plots_leave_matplotlibs_settings_alone():
    before, kind = dict(mpl.rcParams), type(mpl.rcParams)
    loss_planes()
    with pytest.raises(ValueError, match="columns|column"):
        cb.plots.gaps(pd.DataFrame({"method": ["sgd"], "seed": [0]}))
    with cb.plots.style():
        assert mpl.rcParams["font.size"] == cb.plots.STYLE["font.size"] != before["font.size"]
        with mpl.rc_context({"font.size": 5}), cb.plots.style():
            assert mpl.rcParams["font.size"] == cb.plots.STYLE["font.size"]
        assert mpl.rcParams["font.size"] == cb.plots.STYLE["font.size"]
        mpl.rcParams["font.size"] = 40
    assert dict(mpl.rcParams) == before
    assert type(mpl.rcParams) is kind


def test_names_are_no_formulas_and_none_is_hidden():
    rows = table(methods=("$x^$", "_hidden"), seeds=[0], a=[-1.0, 1.0]).assign(direction=0)
    figure = cb.plots.loss_in_ball(rows)
    texts = {text.get_text().removeprefix("\u200b") for text in figure.axes[0].texts}
    assert {"$x^$", "_hidden"} <= texts
    rendered(figure)
    curves = {"$\\frac{$": pd.DataFrame({"t": [0.0, 1.0], "loss": [1.0, 2.0]})}
    figure = cb.plots.loss_slice(curves | {"_b": curves["$\\frac{$"]})
    assert [text.removeprefix("\u200b") for text in below(figure)] == ["$\\frac{$", "_b"]
    rendered(figure)


# ---------------------------------------------------------------- what is left out is named


def test_the_readmes_table_is_drawn_whole():
    rows = [("global", 0.0), ("global", 0.5), ("global", 0.9), ("2:4", 0.5)]
    curve = pd.DataFrame(
        [(*row, flag) for row in rows for flag in (False, True)], columns=["pattern", "sparsity", "calibrated"]
    )
    curve = curve.assign(accuracy=np.linspace(0.9, 0.2, len(curve)))
    figure = cb.plots.accuracy_vs_sparsity(curve)
    for axis, flag in zip(figure.axes, (False, True), strict=True):
        drawn = [y for each in axis.get_lines() if each.get_label() != "_child0" for y in each.get_ydata()]
        expected = curve.loc[curve["calibrated"] == flag, "accuracy"].tolist()
        assert [y for y in expected if y in drawn] == expected
        assert tick_texts(axis.xaxis) == ["dense", "50", "90", "2:4"]


def test_a_pattern_that_is_not_drawn_is_named():
    rows = table(pattern=["global", "uniform"], sparsity=[0.5, 0.9], calibrated=[True])
    assert "not drawn: uniform (12 rows)" in below(cb.plots.accuracy_vs_sparsity(rows))
    figure = cb.plots.accuracy_vs_sparsity(rows.iloc[::-1])  # wherever it stands in the table
    assert figure.axes[0].get_xlabel().endswith("(global)")
    assert "not drawn: uniform (12 rows)" in below(figure)
    figure = cb.plots.accuracy_vs_sparsity(rows, "uniform")
    assert "not drawn: global (12 rows)" in below(figure)
    check_means(figure.axes[0], rows[rows["pattern"] == "uniform"], "sparsity", "accuracy", "std", {0.5: 0, 0.9: 1})
    with pytest.raises(ValueError, match="^unknown pattern 'unifrom'; did you mean 'uniform'"):
        cb.plots.accuracy_vs_sparsity(rows, "unifrom")
    two = table(pattern=["uniform", "global+int8"], sparsity=[0.5], calibrated=[True])
    figure = cb.plots.accuracy_vs_sparsity(two)  # the first of them
    assert figure.axes[0].get_xlabel().endswith("(uniform)")
    assert "not drawn: global+int8 (6 rows)" in below(figure)
    only = rows[rows["pattern"] == "uniform"]
    assert cb.plots.accuracy_vs_sparsity(only).axes[0].get_xlabel().endswith("(uniform)")
    cost = rows.assign(epochs=1, gradients=1)
    assert "not drawn: uniform (12 rows)" in below(cb.plots.equal_cost(cost, cost))
    assert "not drawn: uniform (12 rows)" in below(cb.plots.gaps(rows.assign(rho=0.2)))


def test_quantized_weights_are_not_the_dense_ones():
    rows = table(methods=["sgd"], pattern=["global"], sparsity=[0.0, 0.5], calibrated=[False])
    coarse = table(methods=["sgd"], pattern=["int8", "global+int4"], sparsity=[0.0], calibrated=[False])
    axis = cb.plots.accuracy_vs_sparsity(pd.concat([rows, coarse.assign(accuracy=0.01)])).axes[0]
    check_means(axis, rows, "sparsity", "accuracy", "std", {0.0: 0, 0.5: 1})
    assert tick_texts(axis.xaxis) == ["dense", "50", "int8", "global+int4"]


def test_gaps_of_several_patterns_are_not_averaged():
    rows = table(pattern=["global", "2:4"], sparsity=[0.5]).assign(rho=0.2)
    axis = cb.plots.gaps(rows).axes[-1]
    check_means(axis, rows[rows["pattern"] == "global"], "sparsity", "gap", "range", {0.5: 0})
    assert tick_texts(axis.xaxis) == ["50", "2:4"]
    with pytest.raises(ValueError, match="of one rho, and holds 0.1, 0.2"):
        cb.plots.gaps(pd.concat([rows, rows.assign(rho=0.1)]))


def test_a_table_of_two_patterns_of_their_own_names_its_method():
    rows = table(pattern=["2:4", "4:8"], sparsity=[0.5], calibrated=[True])
    figure = cb.plots.accuracy_vs_sparsity(rows)
    assert at_the_ends(figure.axes[0]) == OF_PAIR
    assert tick_texts(figure.axes[0].xaxis) == ["2:4", "4:8"]


def test_what_a_table_of_gaps_does_not_have_is_named():
    rows = table(sparsity=[0.5]).assign(rho=0.2).drop(columns=["loss", "pruning_gap"])
    figure = cb.plots.gaps(rows)
    assert len(figure.axes) == 1
    assert {"not in the table: the ascent's part and pruning's part", "the loss itself is not in the table"} <= set(
        below(figure)
    )
    assert "the loss itself is not in the table" in below(cb.plots.sharpness(table(rho=[0.1]).drop(columns="loss")))
    alone = pd.DataFrame({"kind": ["worst"], "rho": [0.1], "direction": [0], "rise": [1.0]})
    legend = cb.plots.sharpness_over_radii(alone).axes[0].get_legend()
    assert legend.get_title().get_text() == "the loss itself is not in the table"
    with pytest.raises(ValueError, match="unknown kind 'wrost'; did you mean 'worst'"):
        cb.plots.sharpness_over_radii(alone.assign(kind="wrost"))


def test_several_planes_are_not_averaged():
    rows = table(a=[-1.0, 1.0], b=[-1.0, 1.0])
    with pytest.raises(ValueError, match="one loss for each b and a: it holds several seeds"):
        cb.plots.loss_planes(rows)
    layers = pd.DataFrame(
        {"layer": ["a", "a"], "sparsity": 0.5, "weights": 3, "rise": [1.0, 2.0], "method": ["x", "y"]}
    )
    with pytest.raises(ValueError, match="one rise for each layer and sparsity: it holds several methods"):
        cb.plots.layer_sensitivity(layers)


def test_layers_of_other_networks_are_refused_and_a_missing_rise_is_named():
    one = pd.DataFrame({"layer": ["a", "b"], "sparsity": [0.1, 0.2], "rise": [1.0, 2.0]})
    with pytest.raises(ValueError, match="of the same layers, and that of 'other' is of others"):
        cb.plots.layer_profile({"this": one, "other": one.assign(layer=["a", "c"])})
    figure = cb.plots.layer_profile({"this": one, "other": one.drop(columns="rise")})
    assert len(figure.axes) == 2
    assert "rise not measured: other" in below(figure)


def test_nothing_tuned_is_no_equal_cost():
    rows = table(pattern=["global"], sparsity=[0.5], calibrated=[False]).assign(epochs=1, gradients=1)
    with pytest.raises(ValueError, match="after BatchNorm tuning: give sparsity_curve a calibration"):
        cb.plots.equal_cost(rows, rows)


def test_a_value_that_is_missing_is_counted():
    rows = table(a=[-1.0, 0.0, 1.0]).assign(direction=0)
    rows.loc[(rows["method"] == "sgd") & (rows["seed"] == 1) & (rows["a"] == 1), "loss"] = np.nan
    assert "SGD: 1 value missing" in below(cb.plots.loss_in_ball(rows))
    lost = pd.DataFrame([{"method": "sgd", "seed": 9}])  # a seed of which nothing is left is told of once, as failed
    text = below(cb.plots.loss_in_ball(pd.concat([rows, lost], ignore_index=True)))
    assert "SGD: 1 value missing" in text
    assert "SGD: 1 of 4 seeds failed" in text


def test_methods_of_different_numbers_of_seeds_say_so():
    rows = table(a=[-1.0, 1.0]).assign(direction=0)
    assert "lowest to highest, 2 to 3 seeds" in below(cb.plots.loss_in_ball(rows.query("method == 'sgd' or seed < 2")))


def test_ablations_say_where_the_first_row_failed():
    means = pd.DataFrame({"90": [np.nan, 0.5]}, index=["base", "other"])
    assert [text.get_text() for text in cb.plots.ablations(means).axes[0].texts] == ["failed", "no first row"]


def test_a_long_legend_stays_within_the_figure():
    rows = table(methods=list(METHODS)[:6], a=[-1.0, 1.0]).assign(direction=0)
    lost = pd.DataFrame([{"method": method, "seed": 9} for method in list(METHODS)[:6]])
    figure = cb.plots.loss_in_ball(pd.concat([rows, lost], ignore_index=True))
    rendered(figure)
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_stability_leaves_no_failed_method_out():
    rows = table(weights=["dense", "global@0.9"]).assign(
        eigenvalue=lambda t: t["loss"], trace=lambda t: -t["loss"], pruning_gap=lambda t: t["loss"]
    )
    rows.loc[rows["weights"] != "dense", "pruning_gap"] = np.nan
    failed = pd.DataFrame([{"method": "sam", "seed": 0}])
    figure = cb.plots.stability(pd.concat([rows, failed], ignore_index=True))
    assert [len(axis.get_xticks()) for axis in figure.axes] == [2, 2, 1, 2, 2, 2]  # what is pruned is not pruned again
    assert [axis.get_yscale() for axis in figure.axes] == ["log"] * 5 + ["symlog"]
    assert "SAM: failed" in below(figure)
    assert "the loss itself is not in the table" in below(cb.plots.stability(rows.drop(columns="loss")))


def test_a_method_that_failed_is_named():
    frame = table(sparsity=[0.5, 0.9]).assign(rho=0.2)
    frame.loc[frame["method"] == "sgd", ["gap", "sparsity"]] = np.nan
    assert "SGD: failed" in below(cb.plots.gaps(frame))


def test_seeds_that_failed_are_counted_where_a_mean_is_drawn():
    frame = table(seeds=[0, 1], sparsity=[0.0, 0.5], calibrated=[True]).assign(pattern="global")
    lost = pd.DataFrame([{"method": "sgd", "seed": seed} for seed in (2, 3)])
    figure = cb.plots.accuracy_vs_sparsity(pd.concat([frame, lost], ignore_index=True))
    assert "SGD: 2 of 4 seeds failed" in below(figure)
    summary = cb.probes.accuracy_table(pd.concat([frame, lost], ignore_index=True))
    cost = frame.assign(epochs=1, gradients=1)
    both = pd.concat([cost, lost], ignore_index=True)
    for tables in ((cost, both), (both, cost)):  # failed at equal cost alone, or at equal epochs
        assert "SGD: 2 of 4 seeds failed" in below(cb.plots.equal_cost(*tables))
    assert "SGD (2 of 4 seeds)" in summary.index
    assert "CrAM+-Multi" in summary.index


# ---------------------------------------------------------------- scales


def test_the_axis_of_gaps_is_logarithmic_where_they_are_positive_and_shows_zero_where_not():
    positive = table(sparsity=[0.5, 0.9]).assign(rho=0.2, gap=lambda t: 0.5 + t["sparsity"], pruning_gap=0.6)
    axis = cb.plots.gaps(positive).axes[1]
    assert axis.get_yscale() == "log"
    assert axis.get_ylim()[0] > 0.5
    check_numbers(axis.yaxis)
    mixed = cb.plots.gaps(positive.assign(gap=lambda t: t["gap"] - 1.2)).axes[1]
    assert mixed.get_yscale() == "symlog"
    assert mixed.get_ylim()[0] < 0 < mixed.get_ylim()[1]
    assert mixed.get_ylabel() == "rise of the loss, nats\n(linear to 0.01, then log)"
    falls = cb.plots.gaps(positive.assign(pruning_gap=-0.3)).axes[1]  # a part falls where the gap does not
    assert falls.get_yscale() == "symlog"
    assert falls.get_ylim()[0] < -0.3


def test_losses_that_are_alike_lie_below_the_frame_of_an_axis_from_zero():
    rows = table(rho=[0.1], seeds=[0]).assign(loss=[0.34, 0.33])
    low, high = cb.plots.sharpness(rows).axes[0].get_ylim()
    assert low == 0
    assert high > 1.04 * 0.34


def test_no_point_lies_on_the_frame_of_a_symlog_axis():
    rises = pd.DataFrame(
        {"kind": ["worst"] * 3 + ["average"] * 3, "rho": [0.1, 0.2, 0.3] * 2, "direction": -1,
         "rise": [0.1, 1.0, 100.0, 0.0, -0.01, 0.0]}
    )  # fmt: skip
    axis = cb.plots.sharpness_over_radii(rises).axes[0]
    assert axis.get_yscale() == "symlog"
    low, top, highest = axis.transData.transform([(0.1, axis.get_ylim()[0]), (0.1, axis.get_ylim()[1]), (0.1, 100.0)])[
        :, 1
    ]
    assert highest < top - 0.03 * (top - low)


def test_spectra_of_very_different_reach_share_an_axis_that_shows_both():
    rows = [(method, reach * x) for method, reach in (("dense", 1.0), ("pruned", 100.0)) for x in (-0.1, 0.0, 1.0)]
    spectra = pd.DataFrame(rows, columns=["method", "eigenvalue"]).assign(seed=0, density=0.5, error=0.1)
    axis = cb.plots.spectral_density(spectra).axes[0]
    assert axis.get_xscale() == "symlog"
    check_numbers(axis.xaxis)
    assert cb.plots.spectral_density(spectra[spectra["method"] == "dense"]).axes[0].get_xscale() == "linear"
    below_zero = spectra.assign(eigenvalue=[-1.0, 0.0, 0.9, -100.0, 0.0, 0.95])  # far apart on that side alone
    assert cb.plots.spectral_density(below_zero).axes[0].get_xscale() == "symlog"


def test_spectra_of_several_seeds_have_one_label_a_method():
    rows = [(method, seed, x) for method in ("sgd", "sam") for seed in (0, 1, 2) for x in (-0.1, 0.0, 1.0)]
    spectra = pd.DataFrame(rows, columns=["method", "seed", "eigenvalue"]).assign(density=0.5)
    figure = cb.plots.spectral_density(spectra)
    assert len(figure.axes[0].get_lines()) == 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SGD", "SAM"]


@pytest.mark.parametrize(("lowest", "highest"), [(0.3, 300.0), (0.004, 100.0)])
def test_a_loss_of_astronomers_leaves_the_colours_to_the_others(lowest, highest):
    losses = lowest * np.array([1.0, 3.0, 20.0, 1e30])
    grid = pd.DataFrame({"a": [0.0, 1.0, 0.0, 1.0], "b": [0.0, 0.0, 1.0, 1.0], "loss": losses})
    figure = cb.plots.loss_on_plane(grid, grid[["a", "b"]].head(3))
    bar = figure.axes[1]
    assert [as_number(tick_texts(bar.yaxis)[end]) for end in (0, -1)] == pytest.approx([lowest, highest], rel=0.05)
    low, middle, high = (
        brightness(figure, figure.axes[0], *where) for where in ((0.1, 0.15), (0.15, 0.75), (0.9, 0.9))
    )
    assert low + 10 < middle < high - 60


@pytest.mark.parametrize("step", [1.0, 0.15])
def test_names_on_a_plane_lie_apart(step):
    """Also where the step from the first to the second model is short."""
    grid = plane(range(12))
    corners = pd.DataFrame({"a": [0.0, step, step / 2], "b": [0.0, 0.0, 2.0]})
    figure = cb.plots.loss_on_plane(grid, corners)
    rendered(figure)
    axis = figure.axes[0]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    inside = axis.get_window_extent()
    assert all(inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1 for box in boxes)


def test_a_narrow_axis_of_per_cent_has_no_two_equal_ticks():
    rows = table(sparsity=[0.0, 0.5]).assign(accuracy=lambda t: 0.85 + 0.01 * t["accuracy"])
    texts = list(ticks(cb.plots.transfer(rows, "x").axes[0].yaxis).values())
    assert len(set(texts)) == len(texts) > 2


# ---------------------------------------------------------------- looks, and tables of one model


def test_no_two_methods_look_alike():
    looks = {method: cb.plots.look(method)[1:] for method in METHODS}
    assert len(set(looks.values())) == len(METHODS)
    assert len({colour for colour, _ in looks.values()}) == min(len(METHODS), len(cb.plots._style._PALETTE))
    assert all(to_rgba(colour) for colour, _ in looks.values())
    assert [cb.plots.look(method)[1:] for method in ("sgd", "sam", "cram+-multi")] == [
        ("#000000", "o"),
        ("#0072B2", "s"),
        ("#D55E00", "D"),
    ]  # as in the reports that were made


def test_a_table_straight_from_a_probe_is_drawn_as_one_model():
    one = {"method": "sgd", "seed": 0}
    for draw, rows in (
        (cb.plots.loss_in_ball, table(direction=[0], a=[-1.0, 0.0, 1.0])),
        (cb.plots.gaps, table(sparsity=[0.5, 0.9]).assign(rho=0.2)),
        (cb.plots.sharpness, table(rho=[0.05, 0.1])),
        (cb.plots.loss_planes, table(a=[-1.0, 0.0, 1.0], b=[-1.0, 0.0, 1.0])),
        (cb.plots.loss_along_path, table(t=[0.0, 0.5, 1.0])),
    ):
        alone = rows[(rows[list(one)] == pd.Series(one)).all(axis=1)].drop(columns=list(one))
        figure = draw(alone)
        rendered(figure)
        titles = {axis.get_title(loc="left") for axis in figure.axes}
        assert "model" in titles | {text.get_text() for axis in figure.axes for text in axis.texts}


@pytest.mark.parametrize(
    "compared",
    [
        ["sgd", "adamw", "m-fac", "s-m-fac", "lowrank-m-fac", "ggt", "s-ggt"],
        ["sgd", "cram+-multi", "cram-single", "gmp*", "obert", "safe"],
    ],
)
def test_what_a_notebook_compares_has_a_colour_each(compared):
    assert len({cb.plots.look(method)[1] for method in compared}) == len(compared)


def test_a_long_line_has_markers_few_enough_to_be_seen():
    for epochs, most in ((60, 12), (8, 8)):
        rows = [("sgd", 0, epoch, float(epoch), 0.5 + 0.001 * epoch) for epoch in range(1, epochs + 1)]
        table = pd.DataFrame(rows, columns=["method", "seed", "epoch", "seconds", "accuracy"])
        (line,) = [line for line in cb.plots.training(table).axes[0].lines if len(line.get_xdata()) == epochs]
        assert len(range(0, epochs, line.get_markevery())) == most
