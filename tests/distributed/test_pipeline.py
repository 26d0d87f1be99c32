"""A pipeline on two ranks: the first one makes the rollouts, both train on them and fail together."""

from __future__ import annotations

import json

import pytest

from distributed.launch import torchrun

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["fitrl_ddp", "fitrl_fsdp2"])
def test_rank_0_makes_the_rollouts_of_all(tmp_path, strategy) -> None:
    done = torchrun("pipeline_worker.py", str(tmp_path / "seen"), strategy)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in (0, 1))
    assert first["fit_rl"]["batches"] == [12, 12, 12] and second["fit_rl"]["batches"] == [0, 0, 0]
    behind = [metrics["off_policy/steps_max"] for metrics in first["fit_rl"]["metrics"]]
    assert behind[0] == 0.0 and max(behind) == 1.0
    assert second["fit_rl"]["metrics"] == [{}, {}, {}]
    assert first["fit_rl"]["weights"] == second["fit_rl"]["weights"]
    assert first["fit_rl"]["same"] and second["fit_rl"]["same"]  # the copies have the newest weights on both
    assert first["fit_rl"]["failure"].startswith("GroupError: 1 groups in a row")
    assert second["fit_rl"]["failure"].startswith("RankError: rank 0: GroupError: 1 groups in a row")
    assert first["fit_rl"]["folder"] == ["groups", "queue.json"]
    assert first["fit"] == second["fit"] == {"steps": 3, "num_groups": 12.0}
