"""Put first on the path of a server, lets a test end it or its worker as `kill -9` does, at a named point.

A file in the folder FITRL_TEST_KILLS, named like the point, is taken away by the first process that gets there, and
that process ends.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _end_at(point: str) -> None:
    try:
        (Path(os.environ["FITRL_TEST_KILLS"]) / point).unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: Any, name: str, *, before: str | None = None, after: str | None = None) -> None:
    inner: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if before:
            _end_at(before)
        result = inner(*args, **kwargs)
        if after and result is not False:
            _end_at(after)
        return result

    setattr(owner, name, outer)


def _install() -> None:
    from fitrl.policy import checkpoints
    from fitrl_serverless.server.queue import Queue
    from fitrl_serverless.server.training import Training

    _wrap(Training, "read", before="claimed")
    _wrap(Queue, "begin", after="begun")
    _wrap(Queue, "settle", before="trained", after="settled")
    _wrap(checkpoints, "_flush", after="saving")
    _wrap(Queue, "succeed", before="saved", after="ended")
    _wrap(Queue, "submit", before="receiving", after="submitted")


if "FITRL_TEST_KILLS" in os.environ:
    _install()
