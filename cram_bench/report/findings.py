"""What a report found, in a sentence or two computed from its tables: what speaks for a claim, and what against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cram_bench import untrusted
from cram_bench.probes.over_runs import apart, half_width
from cram_bench.probes.pruners import chosen_by_loss
from cram_bench.probes.speeds import KINDS
from cram_bench.probes.stability import QUANTITIES
from cram_bench.recipes import label

Tables = Mapping[str, pd.DataFrame]


def findings(folder: Path, questions: Sequence[str]) -> list[str]:
    """Return the result of a report, a text of one or two sentences for each of its notebooks that has one.

    Args:
        folder: of the report; its ``tables/*.csv`` are read.
        questions: names of notebooks. One whose tables are missing or empty has no result.
    """
    said: list[str] = []
    for question in questions:
        if question in _FINDINGS:
            names, tell = _FINDINGS[question]
            files = [folder / "tables" / f"{name}.csv" for name in names]
            if all(file.is_file() for file in files):
                tables = {file.stem: pd.read_csv(untrusted.table(file)) for file in files}
                said += filter(None, [tell(tables)])
    return said


def listed(things: Sequence[Any], word: str = "and") -> str:
    """Return ``a, b and c``.

    >>> listed([0, 1, 2]), listed(["a"]), listed([1, 2], "or")
    ('0, 1 and 2', 'a', '1 or 2')
    """
    texts = [str(thing) for thing in things]
    return f" {word} ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def counted(number: int, word: str) -> str:
    """Return a number and a noun in its number.

    >>> counted(1, "thread"), counted(3, "seed")
    ('1 thread', '3 seeds')
    """
    return f"{number} {word}{'' if number == 1 else 's'}"


def percents(specs: Sequence[str]) -> str:
    """Say what a method is trained at: sparsities in per cent, and what else there is as it is called.

    >>> many, few = [f"global@{s / 10:g}" for s in range(3, 10)], ["global@0.7", "global@0.95", "2:4"]
    >>> percents(many), percents(few), percents([])
    ('30, 40 … 90 %', '70 and 95 %, 2:4', 'dense')
    """
    shares = [round(100 * float(spec.partition("@")[2]), 6) for spec in specs if spec.startswith("global@")]
    others = [spec for spec in specs if not spec.startswith("global@")]
    names, start = [], 0
    while start < len(shares):
        end = start
        while end + 1 < len(shares) and round(shares[end + 1] - shares[end], 6) == 10:
            end += 1
        run = [f"{share:g}" for share in shares[start : end + 1]]
        names += run if len(run) < 4 else [f"{run[0]}, {run[1]} … {run[-1]}"]
        start = end + 1
    parts = [f"{listed(names)} %"] if names else []
    return ", ".join([*parts, *others]) or "dense"


def seeds_and_epochs(seeds: Sequence[int], epochs: Sequence[int]) -> str:
    """Say how much stands behind a number.

    >>> seeds_and_epochs([0, 1, 2], [15]), seeds_and_epochs([0], [8])
    ('Means of seeds 0, 1 and 2, 15 epochs.', 'One seed, 8 epochs: what one training gives.')
    """
    trained = f"{listed(epochs)} {'epoch' if list(epochs) == [1] else 'epochs'}"
    if len(seeds) == 1:
        return f"One seed, {trained}: what one training gives."
    return f"Means of seeds {listed(seeds)}, {trained}."


def trained_at(identities: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return label of a method → the compressions it was trained at, ``dense`` where none; fine-tunings do not count.

    Args:
        identities: the runs of a report as ``report.json`` has them.
    """
    found: dict[str, list[str]] = {}
    for settings in (identity["settings"] for identity in identities):
        if not settings.get("start"):
            texts = found.setdefault(label(settings["method"]), [])
            aims = [settings[name] for name in ("pruning.final", "step.sparsity") if name in settings]
            text = percents(settings.get("compressors") or [f"global@{aim!r}" for aim in aims])
            texts += [text] * (text not in texts)
    return {label: " or ".join(texts) for label, texts in found.items()}


# ---------------------------------------------------------------- differences in points


def difference(ours: float, theirs: float) -> float:
    """Return ours − theirs in points, accuracies being fractions, to a decimal: their means are not rounded before.

    >>> difference(0.9106, 0.9184), difference(0.9106, 0.9179)  # 91.1 and 91.8 both times
    (-0.8, -0.7)
    """
    return _to_a_decimal(100 * (ours - theirs))


def _to_a_decimal(points: float) -> float:
    return round(points + math.copysign(1e-9, points), 1)  # a tie goes away from zero, however it was computed


def signed(points: float) -> str:
    """Return points with their sign, a true minus, and no sign before zero.

    >>> signed(2.04), signed(-0.25), signed(-0.01)
    ('+2.0', '−0.3', '0.0')
    """
    return f"{_to_a_decimal(points):+.1f}".replace("-", "−") if _to_a_decimal(points) else "0.0"


def _at(level: float) -> str:
    return "dense" if level == 0 else f"{100 * level:g} %"


def _levels(levels: Sequence[float]) -> str:
    """Return ``dense``, ``at 70 and 80 %``, or both."""
    shares = [f"{100 * level:g}" for level in levels if level]
    return listed([*(["dense"] if 0 in levels else []), *([f"at {listed(shares)} %"] if shares else [])])


def means(curves: pd.DataFrame) -> dict[str, dict[float, float]]:
    """Return method → sparsity → mean accuracy, a fraction.

    Dense untuned; pruned with BatchNorm tuning where there is one. Only the pattern ``global``.

    Args:
        curves: columns method, sparsity, accuracy, and perhaps pattern and calibrated.
    """
    shown = curves.dropna(subset=["accuracy"])
    if "pattern" in shown:
        shown = shown[((shown["pattern"] == "global") | (shown["sparsity"] == 0)) & ~apart(shown)]
    if "calibrated" in shown:
        tuned = shown["calibrated"].astype(bool)
        pruned = shown["sparsity"] > 0
        shown = shown[tuned == pruned] if tuned[pruned].any() else shown[~tuned]
    found: dict[str, dict[float, float]] = {}
    reduced = shown.groupby(["method", "sparsity"], sort=False)["accuracy"].mean().reset_index()
    for method, sparsity, accuracy in reduced.to_numpy().tolist():
        found.setdefault(str(method), {})[float(sparsity)] = accuracy
    return found


def _differences(ours: Mapping[float, float], theirs: Mapping[float, float]) -> dict[float, float]:
    return {level: difference(ours[level], theirs[level]) for level in sorted(ours.keys() & theirs.keys())}


def _across(table: Mapping[str, Mapping[float, float]], baseline: str, level: float) -> str:
    """Compare every method with the baseline at one sparsity."""
    differences = {
        label(method): _differences(own, table[baseline])[level]
        for method, own in table.items()
        if method != baseline and level in own
    }
    texts: list[str] = []
    name = f"{label(baseline)} ({100 * table[baseline][level]:.1f} %)"
    for sign, word in ((-1, "below"), (1, "above")):
        sizes = {label: abs(value) for label, value in differences.items() if value * sign > 0}
        if sizes:
            first, *rest = [
                f"{label} {'is ' * (not place)}{size:.1f}" for place, (label, size) in enumerate(sizes.items())
            ]
            texts.append(f"{listed([first, *rest])} points {word} {'it' if texts else name}")
    if equal := [label for label, value in differences.items() if value == 0]:
        texts.append(f"{listed(equal)} {'is' if len(equal) == 1 else 'are'} level with {'it' if texts else name}")
    return f"{'dense' if level == 0 else f'at {_at(level)}'}, {listed(texts)}" if texts else ""


def _along(table: Mapping[str, Mapping[float, float]], method: str, baseline: str, name: str = "") -> str:
    """Compare one method with the baseline at every sparsity: where it is below and where above, and by how much."""
    differences = _differences(table[method], table[baseline])
    texts: list[str] = []
    for sign, word in ((-1, "below"), (1, "above")):
        sizes = {level: f"{abs(value):.1f}" for level, value in differences.items() if value * sign > 0}
        if sizes:
            other = "it" if texts else label(baseline)
            texts.append(f"{word} {other} {_levels(list(sizes))} (by {listed(list(sizes.values()))} points)")
    return f"{name or label(method)} is {listed(texts) or f'level with {label(baseline)} everywhere'}"


def _sentence(*texts: str) -> str:
    joined = "; ".join(filter(None, texts))
    return f"{joined[0].upper()}{joined[1:]}." if joined else ""


def _behind(runs: pd.DataFrame) -> str:
    return seeds_and_epochs(sorted(set(runs["seed"])), sorted(set(runs["epochs"])))


# ---------------------------------------------------------------- a function a notebook


def _accuracy(tables: Tables) -> str:
    runs, curves = tables.values()
    table, baseline = means(curves), str(runs["method"].iloc[0])
    if baseline not in table or len(table) < 2 or len(table[baseline]) < 2:
        return ""
    high = 0.9 if 0.9 in table[baseline] else max(table[baseline])
    return f"{_sentence(_across(table, baseline, 0.0), _across(table, baseline, high))} {_behind(runs)}"


def _equal_cost(tables: Tables) -> str:
    runs, curves = tables.values()
    baseline = str(runs["method"].iloc[0])
    spent: dict[str, set[float]] = {}
    for method, gradients in zip(runs["method"], runs["gradients"], strict=True):
        spent.setdefault(str(method), set()).add(float(gradients))

    def nearest(method: str, cost: float) -> float:
        return min(sorted(spent[method]), key=lambda gradients: abs(gradients - cost))

    # The cost that all have: the one from which the farthest method's nearest training is least far.
    every = sorted(set().union(*spent.values()))
    cost = min(every, key=lambda at: max(abs(nearest(method, at) - at) for method in spent))
    at_cost = {method: nearest(method, cost) for method in spent}
    table = means(curves[curves["gradients"] == curves["method"].map(at_cost)])
    if baseline not in table or len(table) < 2:
        return ""
    costs = listed([f"{gradients:g}" for gradients in sorted(set(at_cost.values()))], "or")
    first, *rest = [_along(table, method, baseline) for method in table if method != baseline]
    return f"{_sentence(f'at equal cost, {costs} gradients an image, {first}', *rest)} {_behind(runs)}"


def _ablations(tables: Tables) -> str:
    runs, curves = tables.values()
    table, whole = means(curves.assign(method=curves["changed"])), str(runs["changed"].iloc[0])
    entries = [
        ("ρ = 0", "with ρ = 0, compression without ascent, accuracy"),
        ("without +", "without +, plain CrAM, it"),
    ]
    texts = [_along(table, change, whole, name) for change, name in entries if change in table and whole in table]
    return f"{_sentence(*texts)} {_behind(runs)}" if texts else ""


def _transfer(tables: Tables) -> str:
    runs, accuracy = tables.values()
    table, baseline = means(accuracy), str(accuracy["method"].iloc[0])
    if baseline not in table or len(table) < 2:
        return ""
    *rest, last = [_along(table, method, baseline) for method in table if method != baseline]
    return f"{_sentence(f'on the new data, {last}', *rest)} {_behind(runs)}"


def _stability(tables: Tables) -> str:
    found, measured = tables.values()
    if found.empty:
        return ""
    baseline = label(str(found["baseline"].iloc[0]))
    texts = []
    for weights in dict.fromkeys(found["weights"].astype(str)):
        part = found[found["weights"] == weights]
        pruned = f"to {_at(float(weights[7:]))}" if weights.startswith("global@") else f"by {weights}"
        where = "at the dense weights" if weights == "dense" else f"at weights pruned {pruned}"
        each = [_verdicts_of(label(str(method)), own) for method, own in part.groupby("method", sort=False)]
        if (part["verdict"] == "not comparable").all():
            losses = [f"{value:.2f}" for value in (part["loss"].min(), part["loss"].max())]
            theirs = f"{part['baseline_loss'].iloc[0]:.2f}"
            texts.append(
                f"{where} nothing can be compared: the loss of {baseline} is {theirs} nats there, that of the others "
                f"{' to '.join(dict.fromkeys(losses))}"
            )
        elif (part["verdict"] == "undecided").all():
            texts.append(f"{where} no difference to {baseline} is decided")
        else:
            texts.append(f"{where}, against {baseline}, {listed(each)}")
    seeds = int(max(found["seeds"].max(), found["baseline_seeds"].max()))
    missing = [name for name in QUANTITIES if name not in measured or measured[name].isna().all()]
    notes = [
        "One seed decides nothing."
        if seeds == 1
        else f"Welch's test over {seeds} seeds, p ≤ 0.05 after Holm's correction."
    ]
    notes += [f"Not measured in this report: {listed(missing)}."] if missing else []
    return " ".join([_sentence(*texts), *notes])


def _verdicts_of(label: str, own: pd.DataFrame) -> str:
    texts: list[str] = []
    for verdict, word in (("supports", "more stable"), ("contradicts", "less stable")):
        quantities = list(own.loc[own["verdict"] == verdict, "quantity"])
        if quantities:
            texts.append(f"{word} in {len(quantities)} of {len(own)} quantities ({', '.join(quantities)})")
    if unlike := int((own["verdict"] == "not comparable").sum()):
        texts.append(f"not comparable in {unlike}")
    return f"{label} is {listed(texts) if texts else f'more stable in 0 of {len(own)} quantities'}"


def _pruners(tables: Tables) -> str:
    """Say what the pruner that each run chooses by its held-out loss brings, what is left of the training's part then,
    and which part of it masks and values have.
    """
    runs, table = tables.values()
    pruned = table[(table["sparsity"] > 0) & (table["pattern"] != "chosen")].dropna(subset=["accuracy"])
    if pruned.empty:
        return ""
    best = chosen_by_loss(pruned).assign(pattern=lambda rows: rows["chosen"].str.rsplit(", ", n=1).str[0])
    usual = "batchnorm" if (pruned["correction"] == "batchnorm").any() else "none"  # of a model without BatchNorm
    tuned = "BatchNorm tuned" if usual == "batchnorm" else "nothing tuned"
    blind = pruned[(pruned["pattern"] == "global") & (pruned["correction"] == usual)]
    ours, theirs = (100 * rows.groupby(["sparsity", "method"])["accuracy"].mean() for rows in (best, blind))
    first, *others = dict.fromkeys(runs["method"])
    brought, added = [], []
    for level in sorted(set(ours.index) & set(theirs.index)):
        sparsity, method = level
        names = best.loc[(best["sparsity"] == sparsity) & (best["method"] == method), "pattern"].value_counts()
        who = ", ".join(name if len(names) == 1 else f"{name} {count}" for name, count in names.items())
        brought.append((sparsity, method, f"{label(method)} {theirs[level]:.1f} → {ours[level]:.1f} ({who})"))
        if method in others and (base := (sparsity, first)) in ours.index and base in theirs.index:
            before, after = theirs[level] - theirs[base], ours[level] - ours[base]
            added.append((sparsity, method, f"{label(method)} {signed(before)} → {signed(after)}"))
    texts = []
    for rows, said in (
        (brought, f"magnitude with {tuned} → the pruner of least held-out loss of each run, test accuracy in %"),
        (added, f"what training adds to {label(first)}, in points, under magnitude → under the pruner chosen"),
        (_masks_and_values(pruned, usual), f"masks alone → values updated too, {tuned}, in %"),
    ):
        parts = []
        for level in sorted({row[0] for row in rows}):
            own = [text for name in (first, *others) for at, of, text in rows if (at, of) == (level, name)]
            parts.append(f"at {_at(float(level))}, {listed(own)}")
        texts += [_sentence(f"{said}: {'; '.join(parts)}")] if parts else []
    return f"{' '.join(texts)} {_behind(runs)}" if texts else ""


def _masks_and_values(pruned: pd.DataFrame, correction: str) -> list[tuple[float, str, str]]:
    """Return sparsity, method and accuracies of the same selection, without and with the update of what stays."""
    rows = []
    tuned = pruned[pruned["correction"] == correction]
    means: dict[tuple[float, str], dict[str, float]] = {}
    for row in tuned.groupby(["sparsity", "method", "pattern"])["accuracy"].mean().reset_index().to_dict("records"):
        means.setdefault((float(row["sparsity"]), str(row["method"])), {})[row["pattern"]] = 100 * row["accuracy"]
    for (sparsity, method), found in means.items():
        pairs = [("magnitude", "global", "global+obs"), ("greedy", "greedy(update=none)", "greedy")]
        parts = [
            f"{name} {found[alone]:.1f} → {found[updated]:.1f}"
            for name, alone, updated in pairs
            if alone in found and updated in found
        ]
        rows += [(sparsity, method, f"{label(method)} {', '.join(parts)}")] if parts else []
    return rows


def _specialist(tables: Tables) -> str:
    """Say what is left of the task's accuracy, and how much of it each awareness of the task brings."""
    runs, table = tables.values()
    looking = table[table["looked"].notna() & (table["looked"] != "") & (table["sparsity"] > 0)]
    dense = table[table["sparsity"] == 0]["accuracy"]
    if looking.empty or dense.empty:
        return ""
    level = float(looking["sparsity"].max())
    texts = [f"dense, accuracy on the task is {100 * dense.mean():.1f} %; at {_at(level)}"]
    by = ["pattern", "correction", "looked", "corrected", "draw"]
    values = ["accuracy", "task_accuracy"]
    means = 100 * looking[looking["sparsity"] == level].groupby(by, sort=False)[values].mean()
    for (pattern, correction), own in means.groupby(level=[0, 1], sort=False):
        crossed = {key: each.droplevel([0, 1]) for key, each in own.droplevel([0, 1]).groupby(level=[0, 1])}
        if len(crossed) < 4:
            continue
        aware = crossed["task", "task"]  # a row a draw
        parts = []
        for other, what in ((("random", "task"), "what the pruner looks at"), (("task", "random"), "the correction")):
            effect = aware - crossed[other]
            every, among = (f"{signed(effect[name].mean())} ± {half_width(effect[name]):.1f}" for name in values)
            parts.append(f"{every} by {what} ({among})")
        texts.append(f"{pattern}, {correction}, {aware['accuracy'].mean():.1f}: {listed(parts)}")
    if len(texts) == 1:
        return ""
    draws = int(looking["draw"].nunique())
    first, *rest = texts
    brings = "what that brings over as many of all classes (in brackets: to accuracy among the task's classes alone)"
    said = f"{first}, all from examples of the task, and {brings}: {'; '.join(rest)}"
    return f"{_sentence(said)} 95 % intervals over {counted(draws, 'draw')}. {_behind(runs)}"


def _prices(tables: Tables) -> str:
    """Say from how many sparsities on CrAM costs less than what trains anew for each, and where it is not below it."""
    runs, table = tables.values()
    accuracies, ours = means(table), next((m for m in table["method"] if str(m).startswith("cram")), None)
    if ours not in accuracies:
        return ""
    costs = table.groupby("method", sort=False)[["own", "shared", "one"]].mean()
    price = float(costs.loc[ours, "one"])
    texts = []
    for method in dict.fromkeys(table.loc[table["one"] < table["curve"], "method"]):
        if method in accuracies and float(costs.loc[method, "own"]) > 0:
            own, shared = (float(costs.loc[method, name]) for name in ("own", "shared"))
            count = max(1, math.floor((price - shared) / own + 1e-9) + 1)  # the first n with shared + n · own > price
            texts.append(
                f"from {count} {'sparsity' if count == 1 else 'sparsities'} on it costs less than {label(method)} "
                f"({shared:.0f} + {own:.0f} for each): it is {_along(accuracies, ours, method).partition(' is ')[2]}"
            )
    said = f"{label(str(ours))} costs {price:.0f} gradients an image for all sparsities"
    return f"{_sentence(said, *texts)} {_behind(runs)}" if texts else ""


def _speeds(tables: Tables) -> str:
    """Say what is the fastest way within a point of dense float32, and how fast the others are there."""
    runs, table = tables.values()
    means = table.groupby(["kind", "asked"], sort=False)[["speedup", "accuracy"]].mean().reset_index()
    dense = means.loc[means["kind"] == "float32", "accuracy"]
    if not len(dense):
        return ""
    near = means[(means["accuracy"] >= float(dense.iloc[0]) - 0.01) & (means["kind"] != "float32")]
    best = near.sort_values("speedup").groupby("kind").tail(1).sort_values("speedup", ascending=False)
    parts = [
        f"{KINDS[kind]} is {speedup:.2f} times as fast ({accuracy:.1%})".replace("%)", " %)")
        for kind, speedup, accuracy in best[["kind", "speedup", "accuracy"]].itertuples(index=False)
    ]
    lost = [KINDS[kind] for kind in dict.fromkeys(means["kind"]) if kind not in {"float32", *best["kind"]}]
    first = table.iloc[0]
    where = f"in batches of {first['batch']:g} on {counted(int(first['threads']), 'thread')}"
    dense_at = f"{float(dense.iloc[0]):.1%}".replace("%", " %")
    said = f"Within a point of dense float32 ({dense_at}), {where}: {listed(parts) if parts else 'nothing else'}"
    return f"{_sentence(said, *([f'not there: {listed(lost)}'] if lost else []))} {_behind(runs)}"


def _preconditioners(tables: Tables) -> str:
    """Say what compression and its error feedback cost, what methods take beside the first, what pruning leaves, and
    where flatness is decided.
    """
    runs, costs, curves, decided, measured = tables.values()
    reached = {str(row["changed"]): row for row in costs.dropna(subset=["accuracy"]).to_dict("records")}
    sparse, dense = label("s-m-fac"), label("m-fac")
    texts = [_feedback(reached, sparse, dense)] if sparse in reached and dense in reached else []
    first = str(runs["method"].iloc[0])
    others = [label(str(method)) for method in dict.fromkeys(runs["method"]) if method != first]
    if base := reached.get(label(first)):
        each = [
            f"{name} {_per_cent(reached[name])} in {reached[name]['seconds'] / base['seconds']:.1f} times the time and"
            f" {_size(reached[name]['megabytes'])}"
            for name in others
            if name in reached
        ]
        said = f"beside {label(first)} ({_per_cent(base)} in {_size(base['megabytes'])}) stand"
        texts += [f"{said} {listed(each)}"] if each else []
    table = means(curves)
    if first in table and len(table) > 1 and len(table[first]) > 1:
        texts.append(_across(table, first, 0.9 if 0.9 in table[first] else max(table[first])))
    if not any(texts):
        return ""
    several = decided[(decided["seeds"] > 1) & (decided["baseline_seeds"] > 1)]
    flat = _stability({"verdicts": several, "stability": measured}) or "Flatness is undecided: one seed."
    seeds = runs.groupby("method", sort=False)["seed"].nunique()
    single = [label(str(method)) for method, count in seeds.items() if count == 1 < seeds.max()]
    behind = f"{_behind(runs)} Of one seed: {listed(single)}." if single else _behind(runs)
    return f"{' '.join(_sentence(text) for text in texts if text)} {flat} {behind}"


def _feedback(reached: Mapping[str, Mapping[Any, Any]], sparse: str, dense: str) -> str:
    """Compare S-M-FAC with M-FAC, with and without error feedback, at every density that was trained."""
    ours, theirs = reached[sparse], reached[dense]
    points = difference(ours["accuracy"], theirs["accuracy"])
    word = "level with" if points == 0 else f"{abs(points):.1f} points {'below' if points < 0 else 'above'}"
    said = f"{sparse} is {word} {dense} ({_per_cent(theirs)})"
    if math.isfinite(ours["std"]):
        within = "within" if abs(ours["accuracy"] - theirs["accuracy"]) <= ours["std"] else "beyond"
        said += f", {within} the ± {100 * ours['std']:.1f} of its seeds"
    said += f", in 1/{theirs['megabytes'] / ours['megabytes']:.0f} of the memory"
    pairs = [
        f"{'as published' if name == sparse else name.removeprefix(f'{sparse}, ')}"
        f" {100 * reached[name]['accuracy']:.1f} → {_per_cent(reached[control])}"
        for name in reached
        if (control := f"{name}, no feedback") in reached
    ]
    return f"{said}; with → without error feedback, {', '.join(pairs)}" if pairs else said


def _per_cent(row: Mapping[Any, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} %"


def _size(megabytes: float) -> str:
    """Return megabytes as they are read.

    >>> _size(0.0962), _size(106.93), _size(1080.2)
    ('0.0962 MB', '107 MB', '1.08 GB')
    """
    return f"{megabytes:.3g} MB" if megabytes < 999.5 else f"{megabytes / 1000:.3g} GB"


_FINDINGS: dict[str, tuple[tuple[str, ...], Callable[[Tables], str]]] = {
    "accuracy_vs_sparsity": (("runs", "accuracy_vs_sparsity"), _accuracy),
    "loss_stability": (("verdicts", "stability"), _stability),
    "equal_cost": (("equal_cost_runs", "accuracy_by_cost"), _equal_cost),
    "ablations": (("ablations_runs", "ablations"), _ablations),
    "transfer": (("transfer_runs", "transfer"), _transfer),
    "better_pruner": (("better_pruner_runs", "better_pruner"), _pruners),
    "second_order": (("second_order_runs", "second_order"), _pruners),
    "preconditioners": (
        (
            "preconditioners_runs",
            "preconditioners_costs",
            "preconditioners_pruned",
            "preconditioners_verdicts",
            "preconditioners_stability",
        ),
        _preconditioners,
    ),
    "specialist": (("specialist_runs", "specialist"), _specialist),
    "gradual": (("gradual_runs", "gradual"), _prices),
    "speed": (("speed_runs", "speed"), _speeds),
    "language": (("language_runs", "language_curves"), _accuracy),
}
