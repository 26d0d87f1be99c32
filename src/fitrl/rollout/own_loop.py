"""`OwnLoop`: an event loop on a thread of its own, for connections that outlive the loops of those who ask."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")


class OwnLoop:
    """Starts when it is first asked for something; again after `close`, as another loop.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def spawn(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run something on it."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name=self._name, daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait_for(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run something on it to its end; an exception that interrupts the wait, Ctrl-C say, cancels it."""
        waiting = self.spawn(work)
        try:
            return waiting.result()
        except BaseException:
            waiting.cancel()
            raise

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Cancel what is under way, make a last call, and end the thread; again at no cost."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(_end(last), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run until it is stopped; what asks the process to end is told to whoever waits for it, and ends nothing here."""
    while True:
        try:
            return loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue


async def _end(last: Callable[[], Awaitable[None]]) -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await last()
