"""`OwnLoop`: an event loop on a thread of its own, for connections that outlive the loops of those who ask."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from fitrl.errors import SamplerError

_T = TypeVar("_T")


class OwnLoop:
    """Starts when it is first asked for something.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None

    def spawn(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run something on it.

        Raises:
            SamplerError: it was closed.
        """
        if self._loop.is_closed():
            work.close()
            raise SamplerError("this sampler was closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait_for(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run something on it, and wait; Ctrl-C cancels it."""
        waiting = self.spawn(work)
        try:
            return waiting.result()
        except BaseException:
            waiting.cancel()
            raise

    def close(self, first: Callable[[], Awaitable[None]]) -> None:
        """End the thread, after a last call on it; again at no cost."""
        if self._loop.is_closed():
            return
        if self._thread is not None:

            async def last() -> None:
                await first()

            self.wait_for(last())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
