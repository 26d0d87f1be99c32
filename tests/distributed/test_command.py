"""`torchrun -m fitrl fit_rl`: two ranks on the CPU are one run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fitrl"]


@pytest.mark.slow
def test_two_ranks_are_one_run(tmp_path) -> None:
    config = yaml.safe_load((REPOSITORY / "configs" / "smoke" / "local.yaml").read_text())
    config["trainer"] |= {"strategy": "fitrl_ddp", "devices": 2}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*TORCHRUN, "fit_rl", "--config", "x.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / ".fitrl" / "smoke").iterdir()  # the ranks agreed on the name
    assert done.stdout.count("\n") == 4 and done.stdout.count("reward ") == 1  # rank 0 speaks
    assert done.stderr.count("2/2") == 1
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    groups = (run / "trajectories" / "train" / "0001.jsonl").read_text().splitlines()
    assert len(groups) == config["rollout"]["tasks_per_step"]
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["strategy"] == "fitrl_ddp"
