"""Run a worker script of this folder under `torchrun`, on CPU ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STRATEGIES = ("fitrl_ddp",)
"""Strategies of several ranks that the tests of nodes and of faults run with; `FITRL_TEST_STRATEGY` tells workers."""


def command(script: str, *arguments: str, ranks: int = 2) -> list[str]:
    """The command that runs `tests/distributed/<script>` on so many ranks."""
    return [*standalone(ranks), str(HERE / script), *arguments]


def standalone(ranks: int) -> list[str]:
    """The launcher of so many ranks on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


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


def start(
    launcher: list[str], script: str, *arguments: str, variables: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a script of this folder by a launcher, its standard error on its standard output."""
    return subprocess.Popen(
        [*launcher, str(HERE / script), *arguments],
        env=environment() | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",  # a rank that is killed may be in the middle of a character
    )


def outputs(*jobs: subprocess.Popen[str], timeout: float = 200.0, succeed: bool = True) -> list[str]:
    """Wait for jobs that were started; returns what each one said."""
    said = []
    try:
        for job in jobs:
            said.append(job.communicate(timeout=timeout)[0])
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.communicate()
    assert not succeed or all(job.returncode == 0 for job in jobs), "\n".join(said)
    return said
