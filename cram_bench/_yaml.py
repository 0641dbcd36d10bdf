"""YAML 1.2 as people write settings: no key twice, nothing but plain values."""

from __future__ import annotations

import re
from typing import Any


def load(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        ValueError: it is not YAML, a key stands twice, or it asks for an object; the message gives the line.

    >>> load("{lr: 1e-3, pattern: 2:4}")
    {'lr': 0.001, 'pattern': '2:4'}
    """
    from ruamel.yaml import YAML, YAMLError
    from ruamel.yaml.error import MarkedYAMLError

    try:
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
