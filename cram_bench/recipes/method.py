"""What a paper's file says of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A way to train: its label in figures, and its constants by the flat names of settings.

    A new method says its ``step``, and its ``optimizer`` if that is not SGD, among the constants.
    """

    label: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    sentences: Mapping[str, Any] = field(default_factory=dict)
    """What differs where a language model is fine-tuned."""
    imagenet: Mapping[str, Any] = field(default_factory=dict)
    """What differs in the recipe for ImageNet."""
    fixed: tuple[str, ...] = ()
    """Settings that make the method what it is, and may not be changed."""

    def refuse(self, name: str, changes: Mapping[str, Any]) -> None:
        """Refuse to change what the method, called `name`, is."""
        for setting in self.fixed:
            if setting in changes and changes[setting] != self.constants[setting]:
                raise ValueError(
                    f"{setting} of method {name!r} is {self.constants[setting]!r}, not {changes[setting]!r}: "
                    "take another method"
                )
