"""`VLLMServer`: vLLM's server as a child process, in an environment of its own."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx

from fitrl.errors import InvalidArgumentError
from fitrl.policy.loading import LoraSettings
from fitrl_vllm.errors import EngineError

_SIDE = Path(__file__).parent / "engine_side"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has kernels for
_TAKEN = [
    "--model",
    "--host",
    "--port",
    "--logprobs-mode",
    "--worker-extension-cls",
    "--weight-transfer-config",
    "--enable-lora",
    "--max-lora-rank",
    "--served-model-name",
    "--api-key",
]
_ASK_S = 0.2


class VLLMServer:
    """Start vLLM's server on this machine's loopback, watch over it, and end it with this process.

    It serves what a `VLLMSampler` needs: logprobs of the distribution that was sampled from, adapters and weights that
    can be exchanged. The endpoints for that take orders from whoever reaches them, so the port is open on the loopback
    alone.

    Args:
        base_model: folder or hub id, as vLLM loads it.
        lora: of the model that is trained; None: all weights are.
        python: interpreter of the environment that vLLM is installed in. vLLM pins torch and transformers, so that is
            rarely this one.
        arguments: further ones of vLLM's server, `["--gpu-memory-utilization", "0.5"]` say.
        environment: further variables, `{"VLLM_CPU_KVCACHE_SPACE": "1"}` say.
        port: None: one that is free.
        log: file that what the server prints is appended to; errors quote its end. None: it is thrown away.
        start_s: longest wait until it answers; a large model takes minutes to load.

    Raises:
        InvalidArgumentError: an argument that is set here already, or no such interpreter.
    """

    def __init__(
        self,
        base_model: str | Path,
        *,
        lora: LoraSettings | None = None,
        python: str | Path = sys.executable,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
        log: str | Path | None = None,
        start_s: float = 600.0,
    ) -> None:
        for argument in arguments:
            name = argument.split("=", 1)[0]
            if name in _TAKEN:
                raise InvalidArgumentError(f"arguments holds {name}, which VLLMServer sets itself")
        if lora is not None and lora.rank > _RANKS[-1]:
            raise InvalidArgumentError(f"vLLM serves adapters of rank {_RANKS[-1]} at most, got {lora.rank}")
        if not Path(python).is_file():
            raise InvalidArgumentError(f"python={str(python)!r} is no file: pass the interpreter that has vLLM")
        self.port = _free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.num_starts = 0
        self._command = [
            str(python),
            str(_SIDE / "fitrl_vllm_launch.py"),
            *("--model", str(base_model), "--served-model-name", "base"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--logprobs-mode", "processed_logprobs"),
            *("--worker-extension-cls", "fitrl_vllm_engine.worker.Worker"),
            *(
                ["--weight-transfer-config", '{"backend": "fitrl"}']
                if lora is None
                else ["--enable-lora", "--max-lora-rank", str(min(r for r in _RANKS if r >= lora.rank))]
            ),
            *arguments,
        ]
        self._environment = {
            **os.environ,
            **(environment or {}),
            "PYTHONPATH": str(_SIDE),  # and nothing of this environment's
            "VLLM_SERVER_DEV_MODE": "1",  # serves /collective_rpc, /sleep, /reset_prefix_cache
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        }
        self._log = None if log is None else Path(log)
        self._start_s = start_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers; what is left of one that died is ended first.

        Raises:
            EngineError: it ended, or did not answer in time; the message quotes its last words.
        """
        self.stop()
        self.num_starts += 1
        with contextlib.ExitStack() as files:
            said = files.enter_context(self._log.open("ab")) if self._log is not None else subprocess.DEVNULL
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,  # see `fitrl_vllm_launch`
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.stop)
        end = time.monotonic() + self._start_s
        with httpx.Client(trust_env=False) as client:
            while time.monotonic() < end:
                if not self.is_alive():
                    raise EngineError(f"vLLM's server ended with status {self._process.returncode}{self._last_words()}")
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.url}/health").is_success:
                        return
                time.sleep(_ASK_S)
        self.stop()
        raise EngineError(f"vLLM's server did not answer within {self._start_s:g} s{self._last_words()}")

    def is_alive(self) -> bool:
        """Whether its process runs; an engine that died takes it along."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it and all its processes; again at no cost."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        for number, wait_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # its own session, so its own group
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
        if process.stdin is not None:
            process.stdin.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _last_words(self) -> str:
        if self._log is None:
            return "; pass log= to see what it says"
        lines = self._log.read_text(errors="replace").splitlines()[-12:]
        return f"; {self._log} ends with\n" + "\n".join(lines)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
