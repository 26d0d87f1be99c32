"""`fitrl_ddp` and `fitrl_fsdp2` on two gloo ranks against one process: the same gradients, one log, one checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fitrl
from distributed.ddp_worker import AFTER_A_STEP, CASES
from distributed.launch import HERE, command, environment, torchrun
from fitrl.errors import InvalidArgumentError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process saw."""
    folder = tmp_path_factory.mktemp("one")
    alone = subprocess.run(
        [sys.executable, str(HERE / "ddp_worker.py"), str(folder / "one")],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    return folder / "one"


@pytest.fixture(scope="module", params=["fitrl_ddp", "fitrl_fsdp2"])
def seen(request, tmp_path_factory, alone) -> dict[str, Any]:
    """What one process and each of two ranks saw."""
    folder = tmp_path_factory.mktemp("two")
    ranks = torchrun(
        "ddp_worker.py", str(folder / "two"), variables=environment() | {"FITRL_TEST_STRATEGY": request.param}
    )
    assert ranks.returncode == 0, ranks.stderr
    files = {"one": alone, "two.0": folder / "two.0", "two.1": folder / "two.1"}
    told = {name: json.loads(path.read_text()) for name, path in files.items()}
    return told | {"folder": folder, "in pieces": request.param == "fitrl_fsdp2"}


def test_a_call_waits_for_other_ranks_a_few_times_only(seen) -> None:
    """For groups, metrics, and signals before and after; the rest is Lightning's, which asks how long the data is."""
    assert seen["one"]["collectives"] == []
    lightnings = Counter(barrier=2, all_reduce=2, broadcast_object_list=1)
    norm = Counter(all_reduce=int(seen["in pieces"]))
    for name in ("two.0", "two.1"):
        assert Counter(seen[name]["collectives"]) == lightnings + norm + Counter(all_gather=1, all_reduce=4)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_process(seen, case) -> None:
    one, first, second = (seen[name]["train"][case] for name in ("one", "two.0", "two.1"))
    assert first["steps"] == second["steps"] == one["steps"]
    assert len(one["gradients"]) == one["steps"][-1] >= 2
    assert first["gradients"] == second["gradients"]
    for step, (ours, expected) in enumerate(zip(first["gradients"], one["gradients"], strict=True)):
        rel = AFTER_A_STEP if step else 1e-8
        assert ours == pytest.approx(expected, rel=rel, abs=rel * expected[0] if rel > 1e-8 else 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_one_process_on_every_rank(seen, case) -> None:
    one, first, second = (seen[name]["train"][case] for name in ("one", "two.0", "two.1"))
    for ours, others, expected in zip(first["metrics"], second["metrics"], one["metrics"], strict=True):
        assert ours == others
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            assert ours[key] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), key


def test_groups_may_lie_anywhere(seen) -> None:
    """Held by all ranks, by rank 0 alone, or in parts: the same step."""
    one = seen["one"]["groups"]["all"]
    for name in ("two.0", "two.1"):
        for way, (gradients, submitted, _) in seen[name]["groups"].items():
            assert gradients[0] == pytest.approx(one[0][0], rel=1e-8), way
            assert submitted == 4
    assert seen["two.0"]["groups"] == seen["two.1"]["groups"]


def test_rollouts_are_shared_out_and_the_same_on_every_rank(seen) -> None:
    one, first, second = (seen[name]["rollouts"] for name in ("one", "two.0", "two.1"))
    assert first["groups"] == second["groups"] and first["unseeded"] == second["unseeded"]
    sampled = [
        [
            [item["messages_and_choices"][-1]["completion"]["token_ids"] for item in json.loads(text)["trajectories"]]
            for text in who["groups"]
        ]
        for who in (first, one)
    ]
    assert sampled[0] == sampled[1]
    assert len(first["groups"]) == 5 and len(first["unseeded"]) == 3


def test_a_failed_rollout_fails_everywhere(seen) -> None:
    first, second = (seen[name]["rollouts"]["failed rollout"] for name in ("two.0", "two.1"))
    assert first.startswith("GroupError") and second.startswith("RankError: rank 0: GroupError")
    assert {seen[name]["rollouts"]["usable"] for name in ("two.0", "two.1")} == {3}


def test_one_log_and_one_checkpoint(seen) -> None:
    first, second = seen["two.0"]["rollouts"], seen["two.1"]["rollouts"]
    assert first["connected"] and first["logged"] == second["logged"] and first["step"] == 2
    run = Path(seen["folder"]) / "two.runs" / "ddp" / "rollouts"
    assert len((run / "history.jsonl").read_text().splitlines()) == 1
    assert len((run / "trajectories" / "train" / "0001.jsonl").read_text().splitlines()) == 5
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0001", "0002"]


def test_resumed_on_every_rank(seen) -> None:
    for name in ("two.0", "two.1"):
        seen_there = seen[name]["rollouts"]
        assert seen_there["resumed"] == 2
        assert seen_there["resumed weights"] == seen_there["weights"] == seen["two.0"]["rollouts"]["weights"]


def test_a_second_trainer_is_refused_on_every_rank(seen) -> None:
    first, second = (seen[name]["rollouts"]["second trainer"] for name in ("two.0", "two.1"))
    assert first.startswith("RunLockedError") and "process" in first
    assert second.startswith("RankError: rank 0: RunLockedError")


def test_under_a_stock_trainer(seen) -> None:
    one, first, second = (seen[name]["stock"] for name in ("one", "two.0", "two.1"))
    assert first == second and first["steps"] == one["steps"] == 2
    assert all(norm > 0 for norm in first["norms"])


def test_sigterm_stops_all_ranks_after_the_same_step_and_saves(tmp_path) -> None:
    job = subprocess.Popen(
        command("endless_worker.py", str(tmp_path)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    while "step 4" not in (line := job.stdout.readline()):
        assert line, job.communicate()[1]
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=120)
    assert job.returncode != 0
    assert said.count("fitrl: stopped at step") == 1
    model = fitrl.TrainableModel("endless", "ddp", "tiny", lora=None, root=tmp_path)
    [checkpoint] = model.checkpoints()
    assert str(checkpoint) in said and model.step >= 4
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.open(model)  # one process goes on from what two saved
        assert trainer.global_step == model.step == int(checkpoint.name)


@pytest.mark.parametrize("options", [{"devices": 2}, {"devices": 1}])
def test_other_launchers_are_refused_with_the_right_command(options) -> None:
    with pytest.raises(InvalidArgumentError, match=f"torchrun --nproc_per_node {options['devices']}"):
        fitrl.LocalTrainer(accelerator="cpu", strategy="fitrl_ddp", **options)
