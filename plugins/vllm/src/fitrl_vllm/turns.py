"""`Turns`: completions and exchanges of weights by turns, so that each completion has one version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fitrl_vllm.errors import EngineError


class Turns:
    """Let completions start, or wait until none is under way. It belongs to one event loop."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._under_way = 0

    @property
    def is_open(self) -> bool:
        """Whether completions start at once."""
        return self._open.is_set()

    @asynccontextmanager
    async def completing(self) -> AsyncIterator[None]:
        """Have a completion under way while the block runs, once they may start."""
        await self._open.wait()
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    def close(self) -> None:
        """Have no further completion start before `open`."""
        self._open.clear()

    def open(self) -> None:
        """Let them start."""
        self._open.set()

    async def idle(self, timeout_s: float | None = None) -> None:
        """Wait until none is under way.

        Raises:
            EngineError: one still was after so many seconds.
        """
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError as error:
            raise EngineError(f"{self._under_way} completions were still under way after {timeout_s:g} s") from error
