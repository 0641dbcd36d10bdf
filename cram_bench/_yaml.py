"""YAML as people write settings: numbers of YAML 1.2, no key twice, nothing but plain values."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any


def load(text: str) -> Any:
    """Return the value of a YAML document.

    PyYAML alone follows YAML 1.1, which takes 1e-3 for a string and 2:4 for the sexagesimal 124, and lets the last of two
    equal keys win.

    Raises:
        ValueError: it is not YAML, a key stands twice, or it asks for an object; the message gives the line.

    >>> load("{lr: 1e-3, pattern: 2:4}")
    {'lr': 0.001, 'pattern': '2:4'}
    """
    import yaml

    class Strict(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    signs = list("-+.0123456789")
    Strict.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), signs)
    fraction = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$")
    Strict.add_implicit_resolver("tag:yaml.org,2002:float", fraction, signs)
    try:
        return yaml.load(text, Strict)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
