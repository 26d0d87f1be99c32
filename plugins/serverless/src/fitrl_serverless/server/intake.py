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
_CLOSE = {"connection": "close"}  # the rest of the body is not read


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

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, _Body(scope, receive, self._limits).receive, send_named)
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
        self._is_whole = False

    async def receive(self) -> Message:
        """The next part of the body.

        Raises:
            HTTPException: 408, 413, 415, or 400 for a body that is no gzip.
        """
        if self._is_whole:
            return await self._receive()  # what is left to come is that the client has gone
        self._check()
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._limits.body_s
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - loop.time())
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not arrive within {self._limits.body_s:g} s", _CLOSE) from error
        if message["type"] != "http.request":
            return message
        self._is_whole = not message.get("more_body", False)
        message["body"] = self._take(message.get("body", b""))
        return message

    def _check(self) -> None:
        if self._encoding not in ("identity", "gzip", ""):
            raise HTTPException(415, "Content-Encoding may be gzip, or left out", _CLOSE)
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
            raise HTTPException(400, "the body is no gzip, as its Content-Encoding says", _CLOSE) from error
        self._unpacked += len(unpacked)
        if self._unpacked > self._limits.body_bytes:
            raise self._too_large()
        if self._is_whole and self._arrived and not self._unpacker.eof:
            raise HTTPException(400, "the gzip of the body is cut off", _CLOSE)
        return unpacked

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413, f"a body may have {self._limits.body_bytes} bytes, unpacked: send fewer groups", _CLOSE
        )


async def _send_error(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
