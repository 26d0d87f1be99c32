"""Numbers on the wire: JSON has no NaN and no infinities, so those three are strings, as in fitrl's own files."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

_SPECIAL = ("NaN", "Infinity", "-Infinity")


def _read(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in _SPECIAL else value


def _write(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


Number: TypeAlias = Annotated[
    float,
    BeforeValidator(_read),
    PlainSerializer(_write, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": list(_SPECIAL)}]}),
]
# what a 64-bit column and a JSON number of any reader can hold
Count: TypeAlias = Annotated[int, Field(ge=0, le=2**53)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=2**31)]
