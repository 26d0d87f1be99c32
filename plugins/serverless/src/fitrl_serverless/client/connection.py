"""`Connection`: requests to one service, with time limits, and repeated where a repetition cannot do harm.

Enters: method, path, body. Leaves: the answer, or a `ServiceError`. One event loop on a thread of its own serves
synchronous calls and the rollouts' event loops alike, over one pool of connections.
"""

from __future__ import annotations

import json
import ssl
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from fitrl.errors import InvalidArgumentError
from fitrl.rollout.own_loop import OwnLoop
from fitrl_serverless.client.address import check_url, trust_of
from fitrl_serverless.client.bodies import Body, FileBody, PartsBody
from fitrl_serverless.client.errors import (
    MalformedAnswerError,
    ServiceError,
    ServiceTimeoutError,
    UnreachableError,
    UntrustedError,
    of_status,
)
from fitrl_serverless.client.repetition import repeating, retry_after

_T = TypeVar("_T")
REQUEST_TIMEOUT_S = 60.0
RETRY_TIMEOUT_S = 300.0
_CHUNK = 1 << 16
_MOST_ERROR_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a service said, with a status below 300.

    Attributes:
        status: of HTTP.
        content: the body's bytes.
        request_id: that the service or this client gave the request.
    """

    status: int
    content: bytes
    request_id: str


class Connection:
    """Requests to one service.

    Args:
        url: of the service, path prefix included.
        key: sent as a bearer token; never logged, shown or written to disk.
        request_timeout_s: longest silence of a request: without a connection, or without a byte.
        retry_timeout_s: how long a request is repeated while the service is busy, failing or away.
        ca_file: PEM certificates to trust, in place of the usual ones.
        transport: in place of the network.

    Raises:
        InvalidArgumentError: no http or https address, a key that cannot be a header, a key that would go to another
            machine unencrypted, a limit that is not above 0, or certificates that cannot be read or have no use.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        retry_timeout_s: float = RETRY_TIMEOUT_S,
        ca_file: str | Path | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = check_url(url)
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InvalidArgumentError("the key must be printable ASCII without spaces")
        for name, value in (("request_timeout_s", request_timeout_s), ("retry_timeout_s", retry_timeout_s)):
            if not value > 0:
                raise InvalidArgumentError(f"{name} must be above 0, got {value}")
        self._key = key
        self._request_timeout_s = request_timeout_s
        self._retry_timeout_s = retry_timeout_s
        self._trust: ssl.SSLContext | bool = trust_of(self.url, ca_file)
        self._transport = transport
        self._loop = OwnLoop("fitrl-serverless")
        self._client: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    # -- from synchronous code, and from other event loops -----------------------------------------------------

    def start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run a coroutine that uses this connection on its own event loop."""
        return self._loop.spawn(work)

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to its end; an exception that interrupts the wait cancels it."""
        return self._loop.wait_for(work)

    def close(self) -> None:
        """End what is under way and close the connections; a later request opens them anew."""
        self._loop.close(self._end)

    async def _end(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    # -- requests -----------------------------------------------------------------------------------------------

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Body | FileBody | PartsBody | None = None,
        query: Mapping[str, str | int] | None = None,
        idempotency_key: str | None = None,
        repeatable: bool | None = None,
        silence_s: float | None = None,
    ) -> Answer:
        """Send a request and read its answer.

        Args:
            method: of HTTP.
            path: behind the service's address.
            body: JSON.
            query: parameters.
            idempotency_key: by which the service knows a repetition of the same POST.
            repeatable: whether to repeat the request; None: if it is no POST, or has an idempotency key.
            silence_s: instead of `request_timeout_s`.

        Raises:
            ServiceError: see its subclasses.
        """
        headers = {"X-Request-Id": uuid.uuid4().hex} | ({} if body is None else body.headers)
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        if repeatable is None:
            repeatable = method != "POST" or idempotency_key is not None

        async def attempt() -> Answer:
            built = self._open_client().build_request(
                method,
                self.url + path,
                params=query,
                headers=headers,
                content=None if body is None else body.content(),
                timeout=self._limits(silence_s),
            )
            async with self._answer(built) as response:
                told = response.headers.get("X-Request-Id") or headers["X-Request-Id"]
                return Answer(status=response.status_code, content=await response.aread(), request_id=told)

        return await self._repeat(attempt, repeatable)

    async def download(self, path: str, take: Callable[[bytes], object], restart: Callable[[], object]) -> None:
        """Stream an answer's bytes; `restart` is called before each attempt.

        Raises:
            ServiceError: see its subclasses.
        """

        async def attempt() -> None:
            restart()
            built = self._open_client().build_request(
                "GET", self.url + path, headers={"X-Request-Id": uuid.uuid4().hex}, timeout=self._limits(None)
            )
            async with self._answer(built) as response:
                async for chunk in response.aiter_bytes(_CHUNK):
                    take(chunk)

        await self._repeat(attempt, True)

    async def _repeat(self, attempt: Callable[[], Coroutine[Any, Any, _T]], repeatable: bool) -> _T:
        """Make attempts until one succeeds, fails for good, or the time is up."""
        if not repeatable:
            return await attempt()
        return await repeating(self._retry_timeout_s)(attempt)

    def _limits(self, silence_s: float | None) -> httpx.Timeout:
        return httpx.Timeout(self._request_timeout_s if silence_s is None else silence_s, pool=None)

    def _open_client(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self._key}", "User-Agent": "fitrl-serverless"},
                # no redirects: the key goes nowhere else
                follow_redirects=False,
                verify=self._trust,
                # nor through the proxy that the environment names, which would read it where there is no TLS
                trust_env=self.url.startswith("https:"),
                limits=httpx.Limits(max_connections=256, max_keepalive_connections=32),
                transport=self._transport,
            )
        return self._client

    @asynccontextmanager
    async def _answer(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        """An answer with a status below 300, not read yet; anything else is an exception of ours."""
        what = f"{request.method} {request.url.path}"
        about: dict[str, Any] = {"request": what, "request_id": request.headers["X-Request-Id"]}
        try:
            response = await self._open_client().send(request, stream=True)
            try:
                about["request_id"] = response.headers.get("X-Request-Id") or about["request_id"]
                if response.status_code >= 300:
                    raise await self._refusal(response, what, about["request_id"])
                yield response
            finally:
                await response.aclose()
        except httpx.TimeoutException as error:
            words = f"{self.url} was silent for longer than the limit ({type(error).__name__})"
            raise ServiceTimeoutError(words, **about) from error
        except httpx.DecodingError as error:
            raise MalformedAnswerError(f"the answer cannot be unpacked: {error}", **about) from error
        except httpx.TransportError as error:
            if (doubt := _doubt(error)) is not None:
                raise UntrustedError(f"the certificate of {self.url} is not trusted: {doubt}", **about) from error
            words = f"{self.url} cannot be reached ({type(error).__name__}: {self._without_key(str(error))})"
            raise UnreachableError(words, **about) from error

    async def _refusal(self, response: httpx.Response, what: str, request_id: str) -> ServiceError:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > _MOST_ERROR_BYTES:
                break
        status = response.status_code
        if status < 400:
            words = f"{self.url} answers with a redirect, which is not followed: pass the address that it leads to"
            return MalformedAnswerError(words, request=what, status=status, request_id=request_id)
        words = self._without_key(_words(bytes(body)) or response.reason_phrase or "no reason given")
        return of_status(status)(
            words,
            request=what,
            status=status,
            request_id=request_id,
            retry_after_s=retry_after(response.headers.get("Retry-After")),
        )

    def _without_key(self, words: str) -> str:
        return words.replace(self._key, "***")


def _doubt(error: BaseException | None) -> str | None:
    """What is wrong with the service's certificate, if that is what is wrong."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


def _words(body: bytes) -> str:
    """The server's words: of {"detail": ...} or {"error": ...}, else the body's text."""
    text = body.decode(errors="replace").strip()
    try:
        said = json.loads(text)
    except ValueError:
        return text
    for name in ("detail", "error", "message"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    return said if isinstance(said, str) else json.dumps(said)
