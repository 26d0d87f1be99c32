"""The base of every wire model: strict about types, silent about keys it does not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class WireModel(BaseModel):
    """JSON of the training API. A type is what it says it is; a key that nobody knows is no error."""

    model_config = ConfigDict(strict=True, extra="ignore", ser_json_inf_nan="strings")


class ClosedModel(WireModel):
    """A request whose every key has an effect, so that an unknown one is an error."""

    model_config = ConfigDict(extra="forbid")


class ErrorBody(WireModel):
    """What comes with a status of 400 or more.

    Attributes:
        detail: what is wrong, which value, what to do.
    """

    detail: str
