"""Fixtures of the plugin's tests: those of the core's own, and real servers on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from isolation import nothing_left_behind, one_thread  # of the core's tests, whose folder is on the path

sys.path.insert(0, str(Path(__file__).parent / "server"))  # for asking, which the server tests share

from fitrl_serverless.server.database import Database
from fitrl_serverless.server.keys import add_key

__all__ = ["nothing_left_behind", "one_thread"]


class Server:
    """`fitrl serve` in a process of its own, with keys for alice and bob.

    Attributes:
        state: its folder.
        keys: by owner.
        url: where it listens; another one after each start.
        process: of the server; its worker is a child of it.
    """

    def __init__(self, state: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.state = state
        self.url = ""
        self.process: subprocess.Popen[str] | None = None
        self._options = options
        self._environment = environment or {}
        state.mkdir(parents=True, exist_ok=True)
        self.log_path = state.parent / f"{state.name}.log"
        database = Database(state / "serve.sqlite")
        self.keys = {owner: add_key(database, owner) for owner in ("alice", "bob")}
        database.close()

    @property
    def log(self) -> str:
        """What server and worker have logged so far."""
        return self.log_path.read_text()

    def start(self) -> None:
        """Start it and wait until it listens; its worker may still be starting."""
        command = [sys.executable, "-m", "fitrl", "serve", "--state", str(self.state), "--port", "0"]
        command += ["--accelerator", "cpu", *self._options]
        with self.log_path.open("a") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "serving on" in line, self.log
        self.url = line.split()[-1]

    def client(self, owner: str = "alice", **options: Any) -> httpx.Client:
        """A client with an owner's key; close it."""
        headers = {"authorization": f"Bearer {self.keys[owner]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120.0, **options)

    def workers(self) -> list[psutil.Process]:
        """The processes of its worker, the launcher of ranks first."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """End it as `kill -9` does, and wait until its worker has noticed."""
        assert self.process is not None
        workers = self.workers()
        self.process.kill()
        self._reap()
        _, alive = psutil.wait_procs(workers, timeout=60.0)
        assert not alive, f"workers outlived their server: {alive}"

    def wait_for_kill(self) -> None:
        """Wait until somebody has killed it, and until its worker has noticed."""
        assert self.process is not None
        workers = self.workers()
        self._reap()
        _, alive = psutil.wait_procs(workers, timeout=60.0)
        assert not alive, f"workers outlived their server: {alive}"

    def stop(self) -> int:
        """End it gracefully; returns the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        status = self.process.wait(120.0)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that all tests share: use a model name of your own, and leave the server running."""
    server = Server(tmp_path_factory.mktemp("serve") / "state")
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server of one's own with further options of the command, and `environment`; ended after the test."""
    servers: list[Server] = []

    def start(*options: str, **settings: Any) -> Server:
        server = Server(tmp_path / f"state{len(servers)}", *options, **settings)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        if server.process is not None and server.process.poll() is None:
            server.kill()
