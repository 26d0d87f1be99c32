"""What the service can fail with; the message names the request."""

from __future__ import annotations

from fitrl.errors import FitRLError


class ServiceError(FitRLError, RuntimeError):
    """A request to the service failed.

    Attributes:
        status: of the HTTP answer; None if there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServiceTimeoutError(ServiceError, TimeoutError):
    """The service did not answer within the time limit; it may have done what it was asked all the same."""
