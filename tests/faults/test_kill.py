"""kill -9 at any moment, in mid-save too, and resume: bit for bit the undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("nursery.py")), str(tmp_path), "150", "50", "1"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert sum(seen["killed"].values()) == 50
    assert min(seen["killed"].values()) >= 10  # both kinds of moments were met
    assert seen["disturbed"] == seen["undisturbed"]
    assert seen["disturbed"]["step"] >= 150
