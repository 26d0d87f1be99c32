"""Uvicorn, as this server runs it: says where it listens, and closes connections that ask for nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class AnnouncingServer(uvicorn.Server):
    """Prints its address on standard output once it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if not self.should_exit:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            print(f"fitrl: serving on {scheme}://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def bounded(header_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol with a time limit on the head of a request, which uvicorn lacks.

    Args:
        header_s: seconds from the first byte, or from the connection's start, to the end of the head.
    """

    class Bounded(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._start()
            elif self.conn.their_state is not h11.IDLE:
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _start(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(header_s, self.transport.close)

        def _stop(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Bounded
