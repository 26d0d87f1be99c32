"""When a request is repeated, and how long to wait before: backoff with jitter, or as the service says."""

from __future__ import annotations

import email.utils
import logging
import random
import time

import tenacity

from fitrl_serverless.client.errors import ServiceError, ServiceTimeoutError, UnreachableError

_log = logging.getLogger(__name__)
_FIRST_WAIT_S = 0.2
_BACKOFF = tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_S, max=20.0)
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # a later request may be answered


def repeating(timeout_s: float) -> tenacity.AsyncRetrying:
    """Attempts until one succeeds, fails for good, or the time is up; then the last error is raised."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=wait_as_told,
        stop=tenacity.stop_before_delay(timeout_s),
        before_sleep=_say,
        reraise=True,
    )


def retry_after(value: str | None) -> float | None:
    """Seconds to wait, from the header's number or date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, ServiceTimeoutError | UnreachableError):
        return True
    return isinstance(error, ServiceError) and error.status in _BUSY


def wait_as_told(state: tenacity.RetryCallState) -> float:
    """As long as the service asked, and a little more; else anything up to a window that doubles each time."""
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, ServiceError) and error.retry_after_s is not None:
        return error.retry_after_s + random.uniform(0, _FIRST_WAIT_S)
    return _BACKOFF(state)


def _say(state: tenacity.RetryCallState) -> None:
    """Tell from the second failure on, so that nobody waits for a wrong address without knowing."""
    error = state.outcome.exception() if state.outcome is not None else None
    if state.attempt_number >= 2:
        _log.warning("attempt %d failed and is repeated: %s", state.attempt_number, error)
