"""Run a worker script of this folder under `torchrun`, on CPU ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(script: str, *arguments: str, ranks: int = 2, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run `tests/distributed/<script>` on so many ranks; its output is shown when it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [*command, str(HERE / script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
