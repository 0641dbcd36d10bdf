"""How stable the loss is around weights: gap, sharpness, curvature."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from cram_bench._checks import columns
from cram_bench.compress import parse
from cram_bench.plots._style import (
    at_even_steps,
    in_order,
    legend,
    log_axis,
    log_axis_of,
    look,
    mean_lines,
    of_runs,
    plain,
    radius_axis,
    style,
)
from cram_bench.probes.over_runs import seeds_left


def gaps(table: pd.DataFrame) -> Figure:
    """Draw the CrAM gap against sparsity.

    Args:
        table: columns method, seed, sparsity, gap (nats), rho.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "sparsity", "gap", "rho")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        mean_lines(axis, at_even_steps(axis, table), "step", "gap")
        if linear := not table["gap"].min() > 0.01:  # a gap may be nothing, or negative
            axis.axhline(0, color="#888888", linewidth=0.8)
        log_axis(axis, 0.01 if linear else 0.0)
        axis.set_xlabel("sparsity, % of prunable weights that are zero")
        axis.set_ylabel("L(C(θ + ρg)) − L(θ), nats\n" + ("(linear to 0.01, then log)" if linear else "(log scale)"))
        axis.set_title(f"CrAM gap at ρ = {table['rho'].dropna().iloc[0]:g}")
        legend(figure, axis, table, "gap", "lowest to highest")
    return figure


def sharpness(table: pd.DataFrame) -> Figure:
    """Draw SAM-sharpness against its radius.

    Args:
        table: columns method, seed, rho, sharpness (nats).
    """
    table = of_runs(table)
    columns(table, "method", "seed", "rho", "sharpness")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        mean_lines(axis, table, "rho", "sharpness")
        log_axis(axis)
        radius_axis(axis, table["rho"])
        axis.set_ylabel("L(θ + ρg/‖g‖) − L(θ), nats (log scale)")
        axis.set_title("SAM-sharpness")
        legend(figure, axis, table, "sharpness", "lowest to highest")
    return figure


_QUANTITIES = {
    "gap": "CrAM gap, nats",
    "pruning_gap": "rise by pruning, nats",
    "sharpness": "SAM-sharpness, nats",
    "eigenvalue": "top Hessian eigenvalue, nats/weight²",
    "trace": "Hessian trace, nats/weight²",
}


def stability(table: pd.DataFrame) -> Figure:
    """Draw what `cram_bench.probes.stability` measures, a panel a quantity: a point per seed, a bar at their mean.

    Thin vertical lines are standard errors over parts of the sample, where the table has them (``QUANTITY_error``).

    Args:
        table: columns method, seed, weights (``dense`` or a compressor's specification), gap, pruning_gap, sharpness,
            eigenvalue, trace; without method and seed, it is that of one model.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "weights", *_QUANTITIES)
    methods = in_order(table)
    step = 0.7 / len(methods)
    with style():
        figure = Figure(figsize=(10.2, 3.6))
        axes = figure.subplots(1, len(_QUANTITIES))
        for axis, (quantity, name) in zip(axes, _QUANTITIES.items(), strict=True):
            shown = table.dropna(subset=["weights", quantity])
            groups = list(dict.fromkeys(shown["weights"]))
            for place, weights in enumerate(groups):
                for number, method in enumerate(methods):
                    part = shown[(shown["weights"] == weights) & (shown["method"] == method)]
                    values, errors = part[quantity], part.get(f"{quantity}_error")
                    _, colour, marker = look(method)
                    x = place + (number - (len(methods) - 1) / 2) * step
                    axis.errorbar(
                        [x] * len(values), values, errors, color=colour, marker=marker, linestyle="", alpha=0.75,
                        elinewidth=0.8, markeredgecolor="white", markeredgewidth=0.5,
                    )  # fmt: skip
                    if len(values) > 1:
                        axis.hlines(values.mean(), x - 0.42 * step, x + 0.42 * step, color=colour)
            if len(shown):
                name += f"\n{log_axis_of(axis, shown[quantity])}"
            axis.set_xticks(range(len(groups)), [_weights(weights) for weights in groups])
            axis.set_xlim(-0.5, max(1, len(groups)) - 0.5)
            axis.tick_params(axis="x", length=0)
            axis.set_xlabel("weights")
            axis.set_ylabel(name)
        figure.suptitle("Lower is more stable", fontsize=10, fontweight="bold", x=0.01, ha="left")
        handles = []
        for method, (left, every) in seeds_left(table, "eigenvalue").items():
            label, colour, marker = look(method)
            failed = "" if left == every else f": {every - left} of {every} failed" if left else ": failed"
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=label + failed))
        if (seeds := table["seed"].nunique()) > 1:
            handles.append(Line2D([], [], color="#888888", label=f"mean of {seeds} seeds"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _weights(name: str) -> str:
    if name == "dense":
        return "dense"
    target = parse(name)
    return f"{target.pattern},\n{100 * target.sparsity:g} % zeros"


def sharpness_over_radii(table: pd.DataFrame) -> Figure:
    """Draw the rise of the loss on spheres around the weights: on average over directions, and at worst.

    Args:
        table: columns kind, rho, direction, rise (nats), of `cram_bench.probes.sharpness_over_radii`.
    """
    columns(table, "kind", "rho", "direction", "rise")
    looks = {"worst": ("black", "o", "worst found"), "average": ("#0072B2", "s", "average over directions")}
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        for kind, (colour, marker, label) in looks.items():
            grouped = table[table["kind"] == kind].groupby("rho")["rise"]
            mean = grouped.mean()
            axis.plot(mean.index, mean.to_numpy(), color=colour, marker=marker, label=label)
            axis.fill_between(mean.index, grouped.min(), grouped.max(), color=colour, alpha=0.2, linewidth=0)
        radius_axis(axis, table["rho"])
        axis.set_ylabel(f"rise of the loss, nats\n{log_axis_of(axis, table['rise'])}")
        axis.set_title("Sharpness over radii (band: lowest to highest)")
        axis.legend(loc="upper left")
    return figure


def spectral_density(table: pd.DataFrame) -> Figure:
    """Draw the density of the curvature's eigenvalues on a log scale.

    Args:
        table: columns method, seed, eigenvalue, density, and perhaps error, which is drawn as a band; without method and
            seed, it is that of one model.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "eigenvalue", "density")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        for method in in_order(table):
            label, colour, _ = look(method)
            for number, (_, part) in enumerate(table[table["method"] == method].groupby("seed")):
                if "error" in part:
                    low, high = part["density"] - part["error"], part["density"] + part["error"]
                    axis.fill_between(
                        part["eigenvalue"], low.clip(lower=1e-12), high, color=colour, alpha=0.2, linewidth=0
                    )
                axis.plot(
                    part["eigenvalue"],
                    part["density"],
                    color=colour,
                    label=(label if part["density"].notna().any() else f"{label}: failed") if number == 0 else None,
                    linewidth=1.3,
                )
        axis.set_yscale("log")
        axis.set_ylim(bottom=1e-9 * float(np.nanmax(table["density"])))
        reach = table.assign(reach=table["eigenvalue"].abs()).groupby(["method", "seed"])["reach"].max().dropna()
        if len(reach) and reach.max() > 5 * reach.min():  # one spectrum would be a needle beside the other
            axis.set_xscale("symlog", linthresh=float(f"{reach.min() / 10:.1g}"))
            axis.xaxis.set_major_formatter(FuncFormatter(plain))
        axis.set_xlabel("eigenvalue of the Hessian, nats per squared weight")
        axis.set_ylabel("density (log scale)")
        axis.set_title("Spectrum of the curvature")
        figure.legend(loc="outside lower center", ncols=3)  # at their ends the lines are anywhere
    return figure
