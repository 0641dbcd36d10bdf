"""How pruning is written: ``greedy@0.9``, ``obertx16@0.9``, ``obs(block=32)@0.8+int8``, ``2:4+obs``."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cram_bench.checks import instance, shown, suggestion, unknown
from cram_bench.compress import Compressor, Quantize, zeros_for
from cram_bench.compress import parse as blind
from cram_bench.prune.base import Pruner


@dataclass(frozen=True)
class Specification:
    """A pruner, and what it is asked for; `cram_bench.prune.fitted` makes it a compressor by a look at a model.

    Attributes:
        pruner: who ranks and corrects.
        sparsity: how many of the prunable weights go, a fraction.
        steps: in how many steps, each with new gradients at what is left.
        geometric: whether the density, rather than the sparsity, changes alike from step to step: by a factor.
        masks: a compressor that chooses in the pruner's place, which then only corrects.
        quantize: what becomes of the weights that stay.
    """

    pruner: Pruner
    sparsity: float
    steps: int = 1
    geometric: bool = False
    masks: Compressor | None = None
    quantize: Quantize | None = None

    @property
    def pattern(self) -> str:
        """Name in tables: the specification without its sparsity."""
        return self._written("")

    def __str__(self) -> str:
        return self._written(f"@{self.sparsity!r}".removesuffix(".0"))

    def _written(self, sparsity: str) -> str:
        times = f"x{self.steps}{'g' if self.geometric else ''}" if self.steps > 1 else ""
        text = f"{self.pruner}{times}{sparsity}" if self.masks is None else f"{self.masks}+{self.pruner}"
        if self.masks is not None and not sparsity:
            text = f"{self.masks.pattern}+{self.pruner}"
        return text if self.quantize is None else f"{text}+{self.quantize}"

    def levels(self) -> list[float]:
        """Return the sparsity after every step: s·i/n, or 1 − (1 − s)^(i/n) where it is geometric.

        >>> from cram_bench.prune import parse
        >>> [round(level, 3) for level in parse("obertx4@0.8").levels()]
        [0.2, 0.4, 0.6, 0.8]
        >>> [round(level, 3) for level in parse("obertx4g@0.9375").levels()]
        [0.5, 0.75, 0.875, 0.938]
        """
        shares = [step / self.steps for step in range(1, self.steps)]
        before = [1 - (1 - self.sparsity) ** share if self.geometric else self.sparsity * share for share in shares]
        return [*before, self.sparsity]


_FORM = re.compile(
    r"(?:(?P<masks>[0-9]+:[0-9]+(?:-reference)?|(?:global|uniform)(?:-reference)?@[0-9.e-]+)\+)?"
    r"(?P<kind>[a-z][a-z0-9-]*?)(?:\((?P<settings>[^()]*)\))?(?:x(?P<steps>[0-9]{1,4})(?P<spacing>g)?)?"
    r"(?:@(?P<sparsity>[0-9]*\.?[0-9]+(?:e-?[0-9]+)?))?(?:\+int(?P<bits>[0-9]{1,2}))?"
)


def parse(spec: str | Compressor | Specification, pruners: Mapping[str, type[Pruner]]) -> Compressor | Specification:
    """Read a specification of a pruner that looks, or of a compressor.

    ``NAME@sparsity``, with settings in parentheses (``greedy(block=32,damping=0.1)@0.9``), in n steps
    (``obertx16@0.9``; with ``x16g`` the density falls by a factor each), with masks chosen by somebody else
    (``2:4+obs``, ``global@0.9+obs``), and quantized after (``greedy@0.9+int8``).

    Raises:
        ValueError: it is none of these, or a setting is not allowed.
        TypeError: it is neither a text nor a compressor.
    """
    if isinstance(spec, (Compressor, Specification)):
        return spec
    instance("a compressor or pruner", spec, str, "a text such as 'global@0.9' or 'greedy@0.9'")
    match = _FORM.fullmatch(spec) if len(spec) < 500 else None
    if match is None or match["kind"] not in pruners:
        kind = re.split(r"x[0-9]|[(@+]", spec[:500], maxsplit=1)[0]
        if kind in pruners:
            ways = f"{kind}@0.9, {kind}(damping=0.1)@0.9, {kind}(damping=0.1)x16@0.9, {kind}@0.9+int8 or 2:4+{kind}"
            raise ValueError(f"{shown(spec)} is not understood: write {ways}, with a sparsity in [0, 1]")
        try:
            return blind(spec)
        except ValueError as error:
            if not str(error).startswith("unknown"):
                raise
            hint = suggestion(kind, [*pruners, "global", "uniform"])
            raise ValueError(
                f"{error}; or a pruner ({', '.join(pruners)}), as in greedy@0.9 or 2:4+obs{hint}"
            ) from None
    pruner = pruners[match["kind"]](**_settings(match["kind"], match["settings"] or "", pruners))
    steps = int(match["steps"] or 1)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, as in {match['kind']}x16@0.9, not {steps}")
    quantize = Quantize(int(match["bits"])) if match["bits"] else None
    if match["masks"]:
        if match["sparsity"] or steps > 1:
            raise ValueError(f"{shown(spec)}: the masks of {match['masks']} decide the sparsity, in one step")
        masks = blind(match["masks"])
        return Specification(pruner, masks.sparsity, masks=masks, quantize=quantize)
    if not match["sparsity"]:
        raise ValueError(f"{shown(spec)} needs a sparsity, such as {match['kind']}@0.9")
    sparsity = float(match["sparsity"])
    zeros_for(sparsity, 1)
    return Specification(pruner, sparsity, steps, bool(match["spacing"]), quantize=quantize)


def is_name(text: str, pruners: Mapping[str, type[Pruner]]) -> bool:
    """Tell whether a text is a pruner without a sparsity, with settings and steps or not."""
    match = _FORM.fullmatch(text)
    return match is not None and match["kind"] in pruners and not (match["masks"] or match["sparsity"] or match["bits"])


def _settings(kind: str, text: str, pruners: Mapping[str, type[Pruner]]) -> dict[str, Any]:
    """Read ``name=value,…``, the pruner's settings; also ``name:value``, as papermill reads no "=" in parameters."""
    known = [field.name for field in fields(pruners[kind])]
    found: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, _, value = (part.strip() for part in re.sub("[:=]", "\0", item, count=1).partition("\0"))
        if name not in known:
            raise ValueError(unknown(f"setting of {kind}", name, known))
        if name in found:
            raise ValueError(f"{name} is given twice in {kind}({shown(text)[1:-1]})")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = value
    return found
