"""Types of settings: what is annotated as a bool, a whole number or a number is one."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from fitrl.errors import InvalidArgumentError

_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "True or False"),
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
}


def check_types(settings: Any) -> None:
    """Hold each bool, int and float of a settings dataclass to its annotation.

    Raises:
        InvalidArgumentError: one is of another type; the message names it.
    """
    for item in dataclasses.fields(settings):
        annotation, _, optional = str(item.type).partition(" | ")
        value = getattr(settings, item.name)
        if annotation not in _KINDS or (optional and value is None):
            continue
        kind, words = _KINDS[annotation]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InvalidArgumentError(f"{item.name} must be {words}, got {value!r}")
