"""Run a worker script of this folder under `torchrun`, on CPU ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def command(script: str, *arguments: str, ranks: int = 2) -> list[str]:
    """The command that runs `tests/distributed/<script>` on so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(HERE / script), *arguments]


def environment() -> dict[str, str]:
    """The environment of workers: one thread each, and these tests' helpers."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}


def torchrun(
    script: str, *arguments: str, ranks: int = 2, timeout: float = 300.0, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script and wait for it; in this environment, or in `variables`."""
    return subprocess.run(
        command(script, *arguments, ranks=ranks),
        env=environment() if variables is None else variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
