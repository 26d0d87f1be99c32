"""kill -9 of the client in every phase of a call: each step is trained once, bit for bit, whoever finishes it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fitrl
from fitrl.testing.opening import step_groups


@pytest.mark.slow
def test_a_client_killed_in_every_phase_trains_nothing_twice(server, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kills.py")), str(tmp_path)],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "FITRL_SERVERLESS_URL": server.url,
            "FITRL_SERVERLESS_KEY": server.keys["alice"],
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert all(seen["killed"].values()) and seen["finished"], (seen, done.stderr)
    number = len(seen["killed"])
    assert seen["steps"] == list(range(number + 1))
    assert seen["left at the end"] == []
    # every phase was met where it should be: what lay in the run folder then
    nothing, body, job = [], ["job"], ["job", "job.json"]
    assert list(seen["left"].values()) == [nothing, body, body, *[job] * 7, nothing]
    assert server.keys["alice"] not in done.stdout + done.stderr
    with fitrl.LocalTrainer(accelerator="cpu", enable_model_summary=False) as trainer:
        model = fitrl.TrainableModel("undisturbed", "kills", "tiny", lora=None, root=tmp_path)
        for step in range(number):
            result = trainer.fit_rl(model, step_groups(step), learning_rate=1e-3)
        weights = (result.checkpoint_path / "model.safetensors").read_bytes()
    assert seen["weights"] == hashlib.sha256(weights).hexdigest()
