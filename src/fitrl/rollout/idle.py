"""`IdleTime`: which part of the time somebody had nothing to do."""

from __future__ import annotations

import time


class IdleTime:
    """Counts from its making, or from the last question, to the next; idle at first."""

    def __init__(self) -> None:
        self._since = self._asked = time.perf_counter()
        self._is_idle = True
        self._seconds = 0.0

    def set(self, is_idle: bool) -> None:
        """Note that it is idle from now on, or busy."""
        now = time.perf_counter()
        if self._is_idle:
            self._seconds += now - self._since
        self._since, self._is_idle = now, is_idle

    def fraction(self) -> float:
        """The idle part of the time since this was last asked, in [0, 1]."""
        self.set(self._is_idle)
        total = self._since - self._asked
        fraction = self._seconds / total if total > 0 else 0.0
        self._asked, self._seconds = self._since, 0.0
        return min(max(fraction, 0.0), 1.0)
