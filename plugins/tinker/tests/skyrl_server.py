"""A real server that speaks the service's protocol, on this machine's CPU: SkyRL's, in an environment of its own."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

PYTHON = os.environ.get("FITRL_TINKER_SERVER_PYTHON")  # of the environment that `make test-tinker` makes
_READY_S = 300.0
# one shape for each kind of pass, so that each is compiled once; many adapters, because every session begins a new run
_SETTINGS = {"max_lora_adapters": 48, "max_lora_rank": 8, "train_micro_batch_size": 1, "sample_max_num_sequences": 16}
# on Python 3.11 the server's own models need the newer TypedDict
_SITE = "import typing, typing_extensions\ntyping.TypedDict = typing_extensions.TypedDict\n"


class SkyRLServer:
    """Starts the server on loopback, kills it, starts it again with everything that it had saved.

    Args:
        folder: for its base model, database, checkpoints and log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base_model = folder / "tiny-qwen3"
        with importlib.resources.as_file(importlib.resources.files("fitrl.assets") / "tiny") as tiny:
            shutil.copytree(tiny, self.base_model)
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(_SITE)
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert PYTHON is not None
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("TINKER_", "PYTHON"))}
        environment |= {
            "VIRTUAL_ENV": str(Path(PYTHON).parent.parent),
            "PYTHONPATH": str(self.folder / "site"),
            "JAX_PLATFORMS": "cpu",
        }
        command = [str(Path(PYTHON).parent / "uv"), "run", "--no-project", "--active", "-m", "skyrl.tinker.api"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--base-model", str(self.base_model)]
        command += ["--backend", "jax", "--backend-config", json.dumps(_SETTINGS)]
        command += ["--checkpoints-base", str(self.folder / "checkpoints")]
        command += ["--database-url", f"sqlite:///{self.folder / 'server.db'}"]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        deadline = time.monotonic() + _READY_S
        while not self._answers():
            assert self._process.poll() is None, f"the server ended:\n{self.tail()}"
            assert time.monotonic() < deadline, f"the server does not answer:\n{self.tail()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)

    def kill(self) -> None:
        """End it and its workers at once, as a crash would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def tail(self) -> str:
        """The end of its log."""
        return (self.folder / "server.log").read_text(errors="replace")[-3000:]

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/api/v1/healthz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":  # python skyrl_server.py FOLDER: for trying things by hand
    server = SkyRLServer(Path(sys.argv[1]))
    server.start()
    print(server.url, server.base_model, flush=True)
    signal.pause()
