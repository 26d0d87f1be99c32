"""What a service can answer with, as exceptions: each has the status, the request's id and the server's words."""

from __future__ import annotations

from typing import ClassVar

from fitrl.errors import FitRLError

_MOST_WORDS = 2000


class ServiceError(FitRLError):
    """A service refused, failed or could not be reached.

    Attributes:
        status: of the HTTP answer; None: there was none.
        request_id: that the service or this client gave the request; what its operator looks for in logs.
        detail: the server's words, shortened.
        request: method and path.
        retry_after_s: how long the service asked to wait, if it did.
    """

    advice: ClassVar[str] = ""

    def __init__(
        self,
        detail: str,
        *,
        request: str = "",
        status: int | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.status = status
        self.request_id = request_id
        self.detail = detail if len(detail) <= _MOST_WORDS else f"{detail[:_MOST_WORDS]}..."
        self.request = request
        self.retry_after_s = retry_after_s
        answer = "" if status is None else f"{status} "
        named = "" if request_id is None else f" (request {request_id})"
        before = f"{request}: " if request else ""
        super().__init__(f"{before}{answer}{self.detail}{named}{self.advice and f'; {self.advice}'}")


class InvalidRequestError(ServiceError, ValueError):
    """400, 413, 422 and other answers that blame the request: sending it again would not help."""


class AuthenticationError(ServiceError, PermissionError):
    """401: no key, or a wrong one."""

    advice = "pass key=..., or set FITRL_SERVERLESS_KEY"


class PermissionDeniedError(ServiceError, PermissionError):
    """403: the key may not do this."""


class NotFoundError(ServiceError, LookupError):
    """404: there is no such model, job or checkpoint for this key."""


class ConflictError(ServiceError, RuntimeError):
    """409: what is there contradicts the request."""


class BusyError(ServiceError, RuntimeError):
    """429: too many requests, jobs or groups at once, also after waiting."""

    advice = "try again later"


class ServerFaultError(ServiceError, RuntimeError):
    """5xx: the service failed, also when asked again."""


class UnreachableError(ServiceError, ConnectionError):
    """No connection, or one that broke before the answer."""


class UntrustedError(ServiceError, ConnectionError):
    """The service's certificate is not vouched for by any that this client trusts, or is of another name."""

    advice = "if it is the right one, pass ca_file=..., the certificate of the authority that signed it"


class ServiceTimeoutError(ServiceError, TimeoutError):
    """A time limit of this client passed."""


class MalformedAnswerError(ServiceError, ValueError):
    """An answer that is not what the API says."""


class JobFailedError(ServiceError, RuntimeError):
    """The service could not train the job; its words say why. The model stands where it stood."""


class JobCancelledError(ServiceError, RuntimeError):
    """The job was cancelled before it trained; the model stands where it stood."""


def of_status(status: int) -> type[ServiceError]:
    """The exception of an HTTP status of 400 or more."""
    named: dict[int, type[ServiceError]] = {
        401: AuthenticationError,
        403: PermissionDeniedError,
        404: NotFoundError,
        409: ConflictError,
        429: BusyError,
    }
    return named.get(status, ServerFaultError if status >= 500 else InvalidRequestError)
