"""Records as lines of standard JSON, without loss: what JSON cannot hold is refused by name, never bent.

Numbers that JSON lacks are strings in fields that hold numbers: "NaN", "Infinity", "-Infinity", which Python's `float`
and other readers of JSON understand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from fitrl.errors import DataError

_T = TypeVar("_T")


def number_to_json(value: float) -> float | str:
    """A number as JSON can hold it."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def numbers_to_json(values: Sequence[float]) -> list[float | str]:
    """Many numbers, of which most often all are finite."""
    return list(values) if math.isfinite(sum(values)) else [number_to_json(value) for value in values]


def number_from_json(value: float | str) -> float:
    """Inverse of `number_to_json`."""
    return float(value) if isinstance(value, str) else value


def dump(data: dict[str, Any], what: str) -> str:
    """Write a record as one line.

    Raises:
        DataError: reading the line would give something else; the message says which value.
    """
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
        if json.loads(text) == data:
            return text
        reason = ""
    except (TypeError, ValueError, RecursionError) as error:
        reason = f" ({error})"
    lost = next(_lost(data, ""), "one of its values")
    raise DataError(f"this {what} holds a value that JSON cannot hold: {lost}{reason}")


def load(text: str, read: Callable[[Any], _T], what: str) -> _T:
    """Read a line that `dump` wrote.

    Raises:
        DataError: it is no JSON, or no such record.
    """
    try:
        return read(json.loads(text))
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise DataError(f"{text[:80]!r} is no {what}: {type(error).__name__}: {error}") from error


def _lost(value: Any, path: str, depth: int = 0) -> Iterator[str]:
    """Places of values that JSON cannot hold, each with what is there."""
    if depth > 100:
        yield f"{path[:80]}... is nested too deeply"
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _lost(item, f"{path}.{key}" if path else key, depth + 1)
            else:
                yield f"{path} has the key {key!r}, of type {type(key).__name__}; keys are strings"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _lost(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}"
    elif value is not None and not isinstance(value, str | int | float):
        yield f"{path} is {value!r:.80}, of type {type(value).__name__}"
