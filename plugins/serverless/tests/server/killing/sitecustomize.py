"""Put first on the path of a server, lets a test end it or its worker as `kill -9` does, at a named point.

A file in the folder FITRL_TEST_KILLS, named like the point, is taken away by the first process that gets there, and
that process ends; or, where the file holds "hang", goes no further.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def _end_at(point: str) -> None:
    file = Path(os.environ["FITRL_TEST_KILLS"]) / point
    try:
        says = file.read_text()
        file.unlink()
    except FileNotFoundError:
        return
    if says == "hang":
        threading.Event().wait()
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


def _cut_lines(files: Any) -> None:
    """Die with half of the lines on the disk."""
    whole: Callable[[Path, Sequence[str]], None] = files.append_lines

    def half(path: Path, lines: Sequence[str]) -> None:
        if (Path(os.environ["FITRL_TEST_KILLS"]) / "cut").exists():
            text = "".join(lines)
            whole(path, [text[: len(text) // 2]])
            _end_at("cut")
        whole(path, lines)

    files.append_lines = half


def _install() -> None:
    import shutil

    import fitrl
    from fitrl.policy import checkpoints, trajectories
    from fitrl_serverless.server import chats
    from fitrl_serverless.server.checkpoints import Checkpoints
    from fitrl_serverless.server.logs import Logs
    from fitrl_serverless.server.queue import Queue
    from fitrl_serverless.server.registry import Registry
    from fitrl_serverless.server.training import Training

    _wrap(Training, "read", before="claimed")
    _wrap(Queue, "begin", after="begun")
    _wrap(Queue, "settle", before="trained", after="settled")
    _wrap(checkpoints, "_flush", after="saving")
    _wrap(Queue, "succeed", before="saved", after="ended")
    _wrap(Queue, "submit", before="receiving", after="submitted")
    _wrap(Registry, "create", before="creating", after="created")
    _wrap(Registry, "delete", before="deleting", after="deleted")
    _wrap(Checkpoints, "delete", before="deleting_steps", after="deleted_steps")
    _wrap(shutil, "rmtree", before="emptying")
    _wrap(os, "rmdir", before="half_emptied")
    _wrap(Logs, "keep", before="logging", after="remembered")
    _wrap(fitrl.TrainableModel, "log", before="noted", after="logged")
    _wrap(trajectories, "append_lines", after="half_logged")
    _cut_lines(trajectories)
    _wrap(fitrl.TransformersSampler, "sample", before="sampling")
    _wrap(chats, "_answer", before="answering")


if "FITRL_TEST_KILLS" in os.environ:
    _install()
