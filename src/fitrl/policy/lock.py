"""One trainer per run folder: a lock that the operating system frees when its holder ends, however it ends."""

from __future__ import annotations

import json
import os
import socket
import sys
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fitrl.errors import CheckpointError, RunLockedError


class RunLock:
    """The right to train in a run folder, and a note beside it that says who has it.

    Args:
        run_dir: the run's folder; made if it is not there.

    Raises:
        RunLockedError: another trainer, of this process or another one, holds it; the message names the holder.
        CheckpointError: the folder cannot be made or written in.
    """

    def __init__(self, run_dir: Path) -> None:
        note = run_dir / "holder.json"
        # not thread_local: a trainer may be opened on one thread and closed on another
        self._lock = FileLock(run_dir / "lock", timeout=0, thread_local=False)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            note.write_text(json.dumps(_myself()) + "\n")
        except Timeout as error:
            raise RunLockedError(
                f"another trainer has {run_dir} open ({_read(note)}): close it, or give this model another name"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{run_dir} cannot be a run folder: {error}") from error

    def release(self) -> None:
        """Let the next trainer in; safe to call again."""
        self._lock.release()


def _myself() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "program": Path(sys.argv[0]).name,  # not its arguments, which may hold a key
    }


def _read(note: Path) -> str:
    try:
        holder = json.loads(note.read_text())
        return ", ".join(f"{key} {holder[key]}" for key in ("program", "process", "host", "since"))
    except (OSError, ValueError, KeyError, TypeError):
        return "it left no note of who it is"
