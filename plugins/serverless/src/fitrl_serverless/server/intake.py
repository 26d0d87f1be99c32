"""The way in: a body is bounded in size and time and unpacked while it arrives; every request is logged and named.

Logged are method, address, status and duration. Bodies, queries and headers are not, so neither prompts nor keys are.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException

from fitrl_serverless.server.settings import Limits
from fitrl_serverless.server.training import where

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_log = logging.getLogger("fitrl_serverless.server.requests")
_GZIP = 31  # zlib's window bits for gzip's format


class Intake:
    """ASGI middleware around everything else.

    Args:
        app: what answers.
        limits: of the server.
    """

    def __init__(self, app: App, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        status: list[int] = []
        start = time.perf_counter()
        body = _Body(scope, receive, self._limits)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if body.is_left:
                    message["headers"].append((b"connection", b"close"))
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not is_last or not body.is_left:
                await send(message)
                return
            # a connection that is closed on a client that still writes loses the answer: most read it afterwards
            await send({**message, "more_body": True})
            await body.discard()
            await send({"type": "http.response.body", "body": b""})

        try:
            await self._app(scope, body.receive, send_named)
        except Exception as error:
            _log.error("request %s: %s %s", request_id, type(error).__name__, where(error))
            if not status:
                busy = isinstance(error, sqlite3.OperationalError)
                await _send_error(send_named, 503 if busy else 500, f"request {request_id} failed on the server")
        raw = scope.get("raw_path") or b""
        _log.info(
            "%s %s %s %.1f ms %s",
            scope["method"],
            raw.decode("ascii", "replace")[:200],
            status[0] if status else "-",
            1000 * (time.perf_counter() - start),
            request_id,
        )


class _Body:
    """Receives a body: bounded, unpacked."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, limits: Limits) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        self._receive = receive
        self._limits = limits
        self._encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        length = headers.get(b"content-length", b"0")
        self._announced = int(length) if length.isdigit() else 0
        self._unpacker = zlib.decompressobj(_GZIP) if self._encoding == "gzip" else None
        self._arrived = self._unpacked = 0
        self._deadline: float | None = None
        self._is_whole = self._announced == 0 and b"transfer-encoding" not in headers

    @property
    def is_left(self) -> bool:
        """Whether a part of the body has not been read."""
        return not self._is_whole

    async def discard(self) -> None:
        """Take in the rest of the body and keep nothing of it, for as long as a body may take to arrive."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._until()):
                while not self._is_whole:
                    message = await self._receive()
                    self._is_whole = message["type"] != "http.request" or not message.get("more_body", False)

    async def receive(self) -> Message:
        """The next part of the body.

        Raises:
            HTTPException: 408, 413, 415, or 400 for a body that is no gzip.
        """
        if self._is_whole:
            return await self._receive()  # what is left to come is that the client has gone
        self._check()
        try:
            async with asyncio.timeout_at(self._until()):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not arrive within {self._limits.body_s:g} s") from error
        if message["type"] != "http.request":
            return message
        self._is_whole = not message.get("more_body", False)
        message["body"] = self._take(message.get("body", b""))
        return message

    def _until(self) -> float:
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._limits.body_s
        return self._deadline

    def _check(self) -> None:
        if self._encoding not in ("identity", "gzip", ""):
            raise HTTPException(415, "Content-Encoding may be gzip, or left out")
        if self._announced > self._limits.body_bytes:
            raise self._too_large()

    def _take(self, part: bytes) -> bytes:
        self._arrived += len(part)
        if self._arrived > self._limits.body_bytes:
            raise self._too_large()
        if self._unpacker is None:
            return part
        try:
            unpacked = self._unpacker.decompress(part, self._limits.body_bytes - self._unpacked + 1)
        except zlib.error as error:
            raise HTTPException(400, "the body is no gzip, as its Content-Encoding says") from error
        self._unpacked += len(unpacked)
        if self._unpacked > self._limits.body_bytes:
            raise self._too_large()
        if self._is_whole and self._arrived and not self._unpacker.eof:
            raise HTTPException(400, "the gzip of the body is cut off")
        return unpacked

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"a body may have {self._limits.body_bytes} bytes, unpacked: send fewer groups")


async def _send_error(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
