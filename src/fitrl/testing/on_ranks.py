"""Run the contracts of a pytest file on every rank of a `torchrun` job.

Every rank runs the same checks in the same order and stops at the first that fails, upon which `torchrun` ends the
others: a rank that failed leaves the collectives of a check in its middle, so nothing that follows could be trusted.
One job runs all checks of a file, because a process can make its process group only once.

    class TestMine(TrainsContract):
        __test__ = is_rank()
        ...

    def test_two_ranks() -> None:
        run_on_ranks(f"{__file__}::TestMine")
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from fitrl.testing.opening import FOLDER


def is_rank() -> bool:
    """Say whether this process is a rank of such a job; a class with `__test__` set to it is for the ranks only."""
    return FOLDER in os.environ


def run_on_ranks(target: str, *, ranks: int = 2, timeout: float = 300.0) -> str:
    """Run a file's contracts, or those of one class as `file.py::Class`, on so many ranks of this machine.

    Returns:
        What rank 0's pytest said.

    Raises:
        AssertionError: a check failed on some rank; the message has what each rank said, one that crashed last.
    """
    with tempfile.TemporaryDirectory(prefix="fitrl-ranks-") as scratch:
        logs = Path(scratch) / "logs"
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        launcher += ["--log_dir", str(logs), "--redirects", "3", "--no_python"]
        checks = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", target]
        job = subprocess.Popen(
            [sys.executable, "-m", *launcher, *checks],
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
                "TMPDIR": scratch,
                FOLDER: str(Path(scratch) / "files"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said, _ = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            said = f"no end after {timeout:.0f} s"
        finally:
            _end(job)
        told = {
            number: "".join(path.read_text() for path in sorted(logs.glob(f"**/{number}/std*.log")))
            for number in range(ranks)
        }
    if job.returncode != 0:
        # logs get cut in their middle, and only a rank that crashed says where it did
        order = sorted(told, key=lambda number: "Fatal Python error" in told[number])
        by_rank = "\n".join(f"---- rank {number} ----\n{told[number]}" for number in order)
        raise AssertionError(f"{target} on {ranks} ranks: exit status {job.returncode}\n{said}\n{by_rank}")
    return told[0]


def _end(job: subprocess.Popen[str]) -> None:
    """Let torchrun, if it still runs, end its ranks; it does so when it is told to terminate."""
    if job.poll() is None:
        job.send_signal(signal.SIGTERM)
        try:
            job.communicate(timeout=60.0)
        except subprocess.TimeoutExpired:
            job.kill()
            job.communicate()
