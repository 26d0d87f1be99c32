"""Run vLLM's server, and end it with all its processes once whoever started it is gone.

    python fitrl_vllm_launch.py <arguments of vllm.entrypoints.openai.api_server>

It runs in the engine's environment, where fitrl is not installed. Standard input is a pipe whose other end the
starting process holds: the operating system closes it, however that process ends.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":  # vLLM's own processes import this file again
    threading.Thread(target=_watch, name="fitrl-watch", daemon=True).start()
    sys.argv[0] = "vllm"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
