"""YAML 1.2 as people write settings: no key twice, nothing but plain values, and not more of them than stand there."""

from __future__ import annotations

import math
import re
from typing import Any

MOST = 2**22
"""Characters that a document may have, and that it may stand for once its aliases are written out."""


def load(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        ValueError: it is not YAML, a key stands twice, or it asks for an object; the message gives the line. Or it is
            longer than `MOST`, or its aliases are.

    >>> load("{lr: 1e-3, pattern: 2:4}")
    {'lr': 0.001, 'pattern': '2:4'}
    """
    from ruamel.yaml import YAML, YAMLError
    from ruamel.yaml.error import MarkedYAMLError

    if len(text) > MOST:
        raise ValueError(f"it has {len(text):,} characters, and may have {MOST:,}")
    try:
        if "*" in text and _written_out(YAML(typ="safe", pure=True).compose(text), {}) > MOST:
            raise ValueError(f"its aliases stand for more than {MOST:,} characters")
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = error.problem or error.context or "it is not YAML"
        twice = re.match(r'found duplicate key "(.*?)" with value', problem)
        raise ValueError(f"{line}{f'{twice[1]} stands twice' if twice else problem}") from error
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _written_out(node: Any, known: dict[int, float]) -> float:
    """Return how many characters a node stands for; one that holds itself stands for infinitely many."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known
        inner = getattr(node, "value", "")
        flat = [each for one in inner for each in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + (
            len(inner) if isinstance(inner, str) else sum(_written_out(each, known) for each in flat)
        )
    return known[id(node)]
