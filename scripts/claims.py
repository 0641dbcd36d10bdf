"""What CrAM's abstract claims (arXiv 2207.14200), and what the committed reports have of it.

A loss is of the mean over seeds, in points. A claim is shown where the loss is at most what is allowed, contradicted
where it is more than twice that, and else not shown; the allowances are ours, for "almost no" and "about 1 %" are no
numbers.
"""

from pathlib import Path

import pandas as pd

from cram_bench.report.findings import counted, listed, signed


def verdict(losses: dict[float, float], allowed: dict[float, float]) -> str:
    """Return the word for losses in points at sparsities, against what is allowed at each.

    >>> verdict({0.7: 0.4, 0.8: 1.0}, {0.7: 0.5, 0.8: 1.0})
    'shown'
    >>> verdict({0.7: 0.6}, {0.7: 0.5}), verdict({0.9: 3.3}, {0.9: 1.5})
    ('not shown', 'contradicted')
    """
    if any(losses[level] != losses[level] for level in allowed):
        raise ValueError(f"the report lacks a sparsity of {list(allowed)}")
    if all(losses[level] <= most for level, most in allowed.items()):
        return "shown"
    return "contradicted" if any(losses[level] > 2 * most for level, most in allowed.items()) else "not shown"


def claims(reports: Path, up: str) -> str:
    """Return the table of claims, as Markdown."""
    images = pd.read_csv(reports / "cifar10-resnet20-15-epochs/tables/accuracy_vs_sparsity.csv")
    language = pd.read_csv(reports / "sst2-minilm/tables/language_curves.csv")
    priced = pd.read_csv(reports / "digits-gradual/tables/gradual.csv")
    moved = pd.read_csv(reports / "cifar10-transfer/tables/transfer.csv")
    rows = [
        (
            "70–80 % in one shot, almost no loss",
            *own_losses(images, {0.7: 0.5, 0.8: 1.0}),
            "cifar10-resnet20-15-epochs",
        ),
        ("90 % in one shot, about 1 %", *own_losses(images, {0.9: 1.5}), "cifar10-resnet20-15-epochs"),
        ("2:4, of a network trained without it", *own_losses(images, {0.5: 1.0}, "2:4"), "cifar10-resnet20-15-epochs"),
        ("BERT, 70 %", *own_losses(language, {0.7: 1.0}, tuned=False), "sst2-minilm"),
        ("sparse transfer, 70–90 %, against SGD", *transfer(moved, {0.7: 0.5, 0.8: 0.5, 0.9: 0.5}), "cifar10-transfer"),
        ("competitive with gradual pruning, 80 and 90 %", *gradual(priced, {0.8: 1.0, 0.9: 1.0}), "digits-gradual"),
        ("quantization", "not measured", "", ""),
    ]
    lines = ["| claim | here | CrAM+-Multi, points | report |", "| --- | --- | --- | --- |"]
    for claim, word, numbers, report in rows:
        link = f"[{report}]({up}reports/{report}/)" if report else ""
        lines.append(f"| {claim} | {word} | {numbers} | {link} |")
    return "\n".join(lines)


def own_losses(
    table: pd.DataFrame, allowed: dict[float, float], pattern: str = "global", *, tuned: bool = True
) -> tuple[str, str]:
    """Return verdict and losses of CrAM+-Multi against its own dense accuracy, BatchNorm tuned where pruned."""
    own = table[table["method"] == "cram+-multi"]
    dense = own[(own["sparsity"] == 0) & ~own["calibrated"]]["accuracy"].mean()
    pruned = own[(own["pattern"] == pattern) & (own["calibrated"] == tuned)]
    near = {
        level: pruned[(pruned["sparsity"] - level).abs() < 0.01]["accuracy"] for level in allowed
    }  # 2:4 leaves a rest
    losses = {level: 100 * (dense - accuracies.mean()) for level, accuracies in near.items()}
    return verdict(losses, allowed), described(losses, allowed, own["seed"].nunique())


def transfer(table: pd.DataFrame, allowed: dict[float, float]) -> tuple[str, str]:
    """Return verdict and losses of CrAM+-Multi against SGD on new data, both pruned to the same sparsity."""
    means = table.groupby(["method", "sparsity"])["accuracy"].mean()
    losses = {level: 100 * (means["sgd", level] - means["cram+-multi", level]) for level in allowed}
    return verdict(losses, allowed), described(losses, allowed, table["seed"].nunique())


def gradual(table: pd.DataFrame, allowed: dict[float, float]) -> tuple[str, str]:
    """Return verdict and losses of CrAM+-Multi, pruned in one shot, against GMP*, trained for each sparsity."""
    means = table.groupby(["method", "sparsity"])["accuracy"].mean()
    losses = {level: 100 * (means["gmp*", level] - means["cram+-multi", level]) for level in allowed}
    return verdict(losses, allowed), f"{described(losses, allowed, table['seed'].nunique())}, digits alone"


def described(losses: dict[float, float], allowed: dict[float, float], seeds: int) -> str:
    """Return the losses as they are, what was allowed, and of how many seeds.

    >>> described({0.7: 0.714, 0.8: -1.29}, {0.7: 0.5, 0.8: 1.0}, 3)
    '−0.7 at 70 % and +1.3 at 80 % (allowed 0.5 and 1), 3 seeds'
    """
    texts = [f"{signed(-loss)} at {100 * level:g} %" for level, loss in losses.items()]
    return f"{listed(texts)} (allowed {listed([f'{allowed[level]:g}' for level in losses])}), {counted(seeds, 'seed')}"
