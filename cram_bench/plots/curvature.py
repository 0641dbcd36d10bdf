"""How stable the loss is around weights: gap, sharpness, curvature."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from cram_bench.checks import columns, unknown
from cram_bench.plots._style import (
    Figure,
    at_even_steps,
    below,
    in_order,
    legend,
    log_axis,
    log_axis_of,
    look,
    losses,
    mean_lines,
    of_runs,
    plain,
    radius_axis,
    step_axis,
    strip,
    style,
    visible,
)
from cram_bench.probes.over_runs import seeds_left
from cram_bench.prune import parse

_NO_LOSS = "the loss itself is not in the table"


def gaps(table: pd.DataFrame, pattern: str | None = None) -> Figure:
    """Draw the CrAM gap against sparsity, and beside it the loss and the parts of the gap.

    The panels, left to right: the loss L(θ); what the ascent alone does, L(θ + ρg) − L(θ), nothing pruned; what pruning
    alone does, L(C(θ)) − L(θ), ρ = 0; and both, the CrAM gap L(C(θ + ρg)) − L(θ). The rises share one axis. What the
    table does not have is named below.

    Args:
        table: columns method, seed, sparsity, gap (nats), rho, and perhaps pattern, loss, pruning_gap and ascent_gap;
            without method and seed, it is that of one model.
        pattern: which sparsity pattern the lines are of, as in `accuracy_vs_sparsity`.

    Raises:
        ValueError: the table mixes several ρ, or has no such pattern.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "sparsity", "gap", "rho")
    if len(radii := sorted(table["rho"].dropna().unique())) > 1:
        raise ValueError(f"the table must be of one rho, and holds {', '.join(f'{rho:g}' for rho in radii)}")
    shown, labels, drawn, notes = at_even_steps(table, pattern)
    parts = [name for name in ("ascent_gap", "pruning_gap") if name in table and table[name].notna().any()]
    named = {"ascent_gap": "the ascent's part", "pruning_gap": "pruning's part"}
    if missing := [words for name, words in named.items() if name not in parts]:
        notes.append(f"not in the table: {' and '.join(missing)}")
    widths = [1.0] * ("loss" in table) + [1.0 if name == "ascent_gap" else 2.0 for name in parts] + [2.4]
    with style():
        figure = Figure(figsize=(1.35 * sum(widths) + 2.2, 4.1))
        every = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        if "loss" in table:
            losses(every[0], table)
        else:
            notes.append(_NO_LOSS)
        axes = dict(zip((*parts, "gap"), every[len(every) - len(parts) - 1 :], strict=True))
        first = next(iter(axes.values()))
        for axis in axes.values():
            if axis is not first:
                axis.sharey(first)
                axis.tick_params(labelleft=False)
        if "ascent_gap" in axes:
            strip(axes["ascent_gap"], table, "ascent_gap")
            axes["ascent_gap"].set_title("Ascent alone\nL(θ + ρg) − L(θ)")
        lowest = float(table[list(axes)].min().min())
        for name, title in {
            "pruning_gap": "Pruning alone (ρ = 0)\nL(C(θ)) − L(θ)",
            "gap": f"CrAM gap at ρ = {radii[0]:g}\nL(C(θ + ρg)) − L(θ)" if radii else "CrAM gap",
        }.items():
            if name in axes:
                mean_lines(axes[name], shown, "step", name)
                step_axis(axes[name], shown, labels)
                axes[name].set_title(title)
                axes[name].set_xlabel(f"zeros, % of prunable weights\n({drawn})" + _or_pattern(shown))
        if linear := not lowest > 0.01:  # a gap may be nothing, or negative
            for axis in axes.values():
                axis.axhline(0, color="#888888", linewidth=0.8)
        log_axis(first, 0.01 if linear else 0.0)
        first.set_ylabel("rise of the loss, nats\n" + ("(linear to 0.01, then log)" if linear else "(log scale)"))
        legend(figure, axes["gap"], table, "gap", "lowest to highest", notes)
    return figure


def _or_pattern(shown: pd.DataFrame) -> str:
    return ", or pattern" if shown["apart"].any() else ""


def sharpness(table: pd.DataFrame) -> Figure:
    """Draw SAM-sharpness against its radius, and beside it the loss.

    Args:
        table: columns method, seed, rho, sharpness (nats), and perhaps loss; without method and seed, it is that of one
            model.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "rho", "sharpness")
    with style():
        figure = Figure(figsize=(7.0, 3.8) if "loss" in table else (5.6, 3.8))
        widths = [1.0, 3.2] if "loss" in table else [1.0]
        every = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        if "loss" in table:
            losses(every[0], table)
        axis = every[-1]
        mean_lines(axis, table, "rho", "sharpness")
        scale = log_axis_of(axis, table["sharpness"])
        radius_axis(axis, table["rho"])
        axis.set_ylabel(f"L(θ + ρg/‖g‖) − L(θ), nats\n{scale}")
        axis.set_title("SAM-sharpness")
        legend(figure, axis, table, "sharpness", "lowest to highest", () if "loss" in table else (_NO_LOSS,))
    return figure


_QUANTITIES = {
    "loss": ("loss: how well it fits", "nats"),
    "gap": ("CrAM gap", "nats"),
    "ascent_gap": ("rise by the ascent", "nats"),
    "pruning_gap": ("rise by pruning", "nats"),
    "sharpness": ("SAM-sharpness", "nats"),
    "eigenvalue": ("top Hessian eigenvalue", "nats/weight²"),
    "trace": ("Hessian trace", "nats/weight²"),
}


def stability(table: pd.DataFrame) -> Figure:
    """Draw what `cram_bench.probes.stability` measures, a panel a quantity: a point per seed, a bar at their mean.

    Thin vertical lines are standard errors over parts of the sample, where the table has them (``QUANTITY_error``). The
    loss, which comes first, is no matter of stability: it says how well a network fits.

    Args:
        table: columns method, seed, weights (``dense`` or a compressor's specification), gap, pruning_gap, sharpness,
            eigenvalue, trace, and perhaps loss and ascent_gap; without method and seed, it is that of one model.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "weights", *(name for name in _QUANTITIES if name not in ("loss", "ascent_gap")))
    quantities = {name: words for name, words in _QUANTITIES.items() if name in table}
    methods = in_order(table)
    step = 0.7 / len(methods)
    with style():
        figure = Figure(figsize=(2.04 * len(quantities), 3.6))
        axes = figure.subplots(1, len(quantities))
        for axis, (quantity, (name, unit)) in zip(axes, quantities.items(), strict=True):
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
            scale = log_axis_of(axis, shown[quantity]) if len(shown) else ""
            axis.set_xticks(range(len(groups)), [_weights(weights) for weights in groups])
            axis.set_xlim(-0.5, max(1, len(groups)) - 0.5)
            axis.tick_params(axis="x", length=0)
            axis.set_xlabel("weights")
            axis.set_ylabel(f"{name}\n{unit} {scale}")
        title = "Lower is more stable" + (", where the loss on the left is alike" if "loss" in quantities else "")
        figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
        handles = []
        for method, (left, every) in seeds_left(table, "eigenvalue").items():
            label, colour, marker = look(method)
            failed = "" if left == every else f": {every - left} of {every} failed" if left else ": failed"
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=visible(label + failed)))
        if (seeds := table["seed"].nunique()) > 1:
            handles.append(Line2D([], [], color="#888888", label=f"mean of {seeds} seeds"))
        below(figure, handles, () if "loss" in quantities else (_NO_LOSS,))
    return figure


def _weights(name: str) -> str:
    if name == "dense":
        return "dense"
    target = parse(name)
    return f"{target.pattern},\n{100 * target.sparsity:g} % zeros"


def sharpness_over_radii(table: pd.DataFrame) -> Figure:
    """Draw the rise of the loss on spheres around the weights: on average over directions, and at worst.

    Args:
        table: columns kind, rho, direction, rise (nats), and perhaps loss, of `cram_bench.probes.sharpness_over_radii`.

    Raises:
        ValueError: a kind is neither ``average`` nor ``worst``.
    """
    columns(table, "kind", "rho", "direction", "rise")
    if other := sorted(set(table["kind"]) - {"average", "worst"}):
        raise ValueError(unknown("kind", other[0], ["average", "worst"]))
    looks = {"worst": ("black", "o", "worst found"), "average": ("#0072B2", "s", "average over directions")}
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        for kind, (colour, marker, label) in looks.items():
            if not (table["kind"] == kind).any():
                continue
            grouped = table[table["kind"] == kind].groupby("rho")["rise"]
            mean = grouped.mean()
            axis.plot(mean.index, mean.to_numpy(), color=colour, marker=marker, label=label)
            axis.fill_between(mean.index, grouped.min(), grouped.max(), color=colour, alpha=0.2, linewidth=0)
        radius_axis(axis, table["rho"])
        axis.set_ylabel(f"rise of the loss, nats\n{log_axis_of(axis, table['rise'])}")
        axis.set_title("Sharpness over radii (band: lowest to highest)")
        loss = "" if "loss" not in table else plain(float(f"{table['loss'].iloc[0]:.3g}"))
        centre = f"loss at the centre: {loss} nats" if loss else _NO_LOSS
        axis.legend(loc="upper left", title=centre, alignment="left")
    return figure


def spectral_density(table: pd.DataFrame) -> Figure:
    """Draw the density of the curvature's eigenvalues on a log scale.

    Args:
        table: columns method, seed, eigenvalue, density, and perhaps error, which is drawn as a band; without method
            and seed, it is that of one model.
    """
    table = of_runs(table)
    columns(table, "method", "seed", "eigenvalue", "density")
    with style():
        figure = Figure(figsize=(5.6, 3.8))
        axis = figure.subplots()
        for method in in_order(table):
            label, colour, _ = look(method)
            known = table.loc[table["method"] == method, "density"].notna().any()
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
                    label=visible(label if known else f"{label}: failed") if number == 0 else None,
                    linewidth=1.3,
                )
        axis.set_yscale("log")
        axis.set_ylim(bottom=1e-9 * float(np.nanmax(table["density"])))
        axis.yaxis.set_major_formatter(FuncFormatter(plain))
        reach = table.assign(reach=table["eigenvalue"].abs()).groupby(["method", "seed"])["reach"].max().dropna()
        if len(reach) and reach.max() > 5 * reach.min():  # one spectrum would be a needle beside the other
            axis.set_xscale("symlog", linthresh=float(f"{reach.min() / 10:.1g}"))
            axis.xaxis.set_major_formatter(FuncFormatter(plain))
        axis.set_xlabel("eigenvalue of the Hessian, nats per squared weight")
        axis.set_ylabel("density (log scale)")
        axis.set_title("Spectrum of the curvature")
        figure.legend(loc="outside lower center", ncols=3)  # at their ends the lines are anywhere
    return figure
