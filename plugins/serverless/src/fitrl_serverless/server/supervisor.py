"""Keeps one worker running: starts it, starts another when it ends, and stops it with the server."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import uuid

from fitrl_serverless.server.database import Database
from fitrl_serverless.server.queue import Queue
from fitrl_serverless.server.settings import Settings
from fitrl_serverless.server.worker import WORKER

_POLL_S = 0.05
_SHORT_LIFE_S = 30.0
_LONGEST_PAUSE_S = 30.0
_log = logging.getLogger(__name__)


class Supervisor:
    """Runs the worker in a session of its own: Ctrl-C in the server's terminal is the server's to answer.

    Args:
        settings: of the server.
        database: of the server.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._queue = Queue(database)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fitrl-serve-supervisor")
        self._worker = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the first worker."""
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Let the job that runs come to its end, then end the worker.

        Args:
            grace_s: how long to wait; a job that takes longer is taken up at the server's next start.
        """
        self._ending.set()
        with self._database.transaction() as connection:
            has_work = connection.execute("SELECT 1 FROM workers WHERE state = 'ready'").fetchone() is not None
            connection.execute("UPDATE workers SET state = 'stopping'")
        if has_work:  # else it has taken no job yet, and takes none any more
            self._thread.join(grace_s)
        self._kill()
        self._thread.join()

    @property
    def state(self) -> str:
        """`starting` or `ready`; `stopping` once the server ends."""
        row = self._database.row("SELECT state FROM workers WHERE id = ?", self._worker)
        return str(row["state"]) if row is not None else "starting"

    def _run(self) -> None:
        pause = 0.1
        while not self._ending.is_set():
            started = time.monotonic()
            process = self._process = self._spawn()
            while process.poll() is None:
                limit = self._settings.limits.job_s
                # a job that runs before the worker is ready is of an earlier one, which left it
                if self.state == "ready" and self._queue.condemn(limit):
                    _log.warning("a job has been running for more than %.0f s: its worker is killed", limit)
                    self._kill()
                time.sleep(_POLL_S)
            self._kill()  # ranks that outlived their launcher
            if self._ending.is_set():
                return
            pause = 0.1 if time.monotonic() - started > _SHORT_LIFE_S else min(2 * pause, _LONGEST_PAUSE_S)
            _log.warning("the worker ended with status %s; another starts in %.1f s", process.returncode, pause)
            self._ending.wait(pause)

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._worker = uuid.uuid4().hex
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM workers")
            connection.execute("DELETE FROM orders")
            state = "stopping" if self._ending.is_set() else "starting"
            connection.execute("INSERT INTO workers (id, state) VALUES (?, ?)", (self._worker, state))
        module = ["-m", "fitrl_serverless.server.worker", self._settings.dump()]
        ranks = self._settings.ranks
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        return subprocess.Popen(
            [sys.executable, *launcher, *module],
            stdin=subprocess.PIPE,  # never written to; its end is what the worker listens for
            stdout=2,  # standard output is the server's: where it listens
            env=os.environ | {WORKER: self._worker},
            start_new_session=True,
        )

    def _kill(self) -> None:
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # every rank ends at this, whoever started it
        process.kill()
        process.wait()
