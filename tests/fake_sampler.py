"""A sampler that says what a test wants, when the test wants it; nothing waits for a clock."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter
from typing import Any

from helpers import completion

WAIT_S = 60.0  # for something that has to come; never waited for where the tests pass


class FakeSampler:
    """Answers a conversation with its first message; those that are held wait until they are let go.

    Attributes:
        begun: text of each request, as it comes.
        calls: how many requests there were, by text.
        under_way: requests that are being answered.
        most: the most of them at once.
    """

    def __init__(self) -> None:
        self.version = 0
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.calls: Counter[str] = Counter()
        self.cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.fails: Counter[str] = Counter()  # how often a request still fails
        self.under_way = self.most = 0
        self._held: set[str] = set()
        self._waiting: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._lock = threading.Lock()

    def hold(self, *texts: str) -> None:
        """Let requests of these texts wait."""
        with self._lock:
            self._held.update(texts)

    def let_go(self, *texts: str) -> None:
        """Answer those that wait, with the version as it is now, and hold no further ones of these texts."""
        with self._lock:
            self._held.difference_update(texts)
            for text, loop, event in self._waiting:
                if text in texts:
                    loop.call_soon_threadsafe(event.set)

    def wait_for(self, text: str) -> None:
        """Wait until a request of this text has come."""
        while self.begun.get(timeout=WAIT_S) != text:
            pass

    def update(self, weights: Any, version: int) -> None:
        self.version = version

    async def sample(self, prompt_ids: Any, **settings: Any) -> Any:
        raise AssertionError("conversations are sampled by sample_chat")

    async def sample_chat(self, messages: Any, **settings: Any) -> Any:
        text = messages[0]["content"]
        with self._lock:
            self.calls[text] += 1
            held = text in self._held
            event = asyncio.Event()
            if held:
                self._waiting.append((text, asyncio.get_running_loop(), event))
        self.begun.put(text)
        first = self.version
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0)
            if held:
                await event.wait()
        except asyncio.CancelledError:
            self.cancelled.put(text)
            raise
        finally:
            self.under_way -= 1
        if self.fails[text] > 0:
            self.fails[text] -= 1
            raise OSError(f"no answer to {text}")
        said = completion(text, version=first)
        if self.version != first:
            said = completion(text, version=first, versions=(first, *[self.version] * len(text.encode())))
        return [said]
