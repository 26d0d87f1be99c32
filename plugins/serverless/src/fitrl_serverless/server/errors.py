"""What a request is refused with: a status and a sentence."""

from __future__ import annotations

from fitrl.errors import FitRLError


class RefusedError(FitRLError, ValueError):
    """A request that cannot be answered as asked.

    Attributes:
        status: of HTTP.
        headers: further headers of the answer.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers


def not_found(what: str) -> RefusedError:
    """404, the same for what is not there and for what is another owner's."""
    return RefusedError(404, f"there is no {what}")
