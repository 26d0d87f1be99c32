"""What can go wrong with an engine."""

from __future__ import annotations

from fitrl.errors import SamplerError


class EngineError(SamplerError):
    """The engine refused a request, or is gone and did not come back."""


class EngineDiedError(EngineError):
    """The connection to the engine is lost, or it says itself that it is dead.

    Attributes:
        is_certain: it says so itself.
    """

    def __init__(self, message: str, *, is_certain: bool = False) -> None:
        super().__init__(message)
        self.is_certain = is_certain


class EngineTimeoutError(EngineError, TimeoutError):
    """The engine did not answer in time."""


class StaleWeightsError(SamplerError):
    """The engine was handed new weights and answers with other ones."""
