"""Several nodes: two torchrun agents on this machine, and what a SLURM job sets; against one process."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import fitrl
from distributed.ddp_worker import ACCELERATOR
from distributed.launch import STRATEGIES, outputs, start
from distributed.steps import compare, outcome
from fitrl.errors import InvalidArgumentError

STEPS = "4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Any]:
    """What one process saw."""
    outputs(start([sys.executable], "steps_worker.py", str(folder), "alone", STEPS))
    return outcome(folder, "alone")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_torchrun_agents_are_one_run(strategy, folder, alone) -> None:
    port = free_port()
    where = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *where]
    job = ("steps_worker.py", str(folder), f"agents-{strategy}", STEPS)
    devices = [{"CUDA_VISIBLE_DEVICES": str(node)} if ACCELERATOR == "gpu" else {} for node in range(2)]
    said = outputs(
        *(
            start([*torchrun, "--node_rank", str(node)], *job, variables={"FITRL_TEST_STRATEGY": strategy} | own)
            for node, own in enumerate(devices)
        )
    )
    first, second = (outcome(folder, f"agents-{strategy}", rank) for rank in range(2))
    assert first["size"] == second["size"] == 2
    assert first["gradients"] == second["gradients"]
    compare(first, alone)
    assert "".join(said).count(f"step {STEPS}") == 1
    socket.create_server(("127.0.0.1", port)).close()  # it is free again


def slurm(rank: int) -> dict[str, str]:
    """What `srun` sets for a task of two on this machine."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "learn",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_slurm_tasks_are_one_run(strategy, folder, alone) -> None:
    job = ("steps_worker.py", str(folder), f"tasks-{strategy}", STEPS)
    # by itself Lightning makes a port of the job's number
    own = {"MASTER_PORT": str(free_port()), "FITRL_TEST_STRATEGY": strategy}
    said = outputs(*(start([sys.executable], *job, variables=slurm(rank) | own) for rank in range(2)))
    first, second = (outcome(folder, f"tasks-{strategy}", rank) for rank in range(2))
    assert first["size"] == second["size"] == 2
    assert first["gradients"] == second["gradients"]
    compare(first, alone)
    assert "".join(said).count(f"step {STEPS}") == 1


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
SRUN = slurm(0) | {"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}


@pytest.mark.parametrize("name, started", [("torchrun", TORCHRUN), ("srun", SRUN)])
@pytest.mark.parametrize("options", [{"devices": 2}, {"devices": 4}, {"devices": 1, "num_nodes": 2}])
def test_other_numbers_than_were_started_are_refused(name, started, options, monkeypatch) -> None:
    for variable, value in started.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidArgumentError, match=rf"{name} started 2 .* 2 nodes.* pass devices=2, num_nodes=2"):
        fitrl.LocalTrainer(accelerator="cpu", strategy="fitrl_ddp", **options)
    fitrl.LocalTrainer(accelerator="cpu", strategy="fitrl_ddp", devices=2, num_nodes=2)


@pytest.mark.parametrize("name, started", [("torchrun", TORCHRUN), ("srun", SRUN)])
def test_one_process_among_several_is_refused(name, started, monkeypatch) -> None:
    for variable, value in started.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidArgumentError, match=f"{name} started 4 .*strategy='fitrl_ddp', devices=2, num_nodes=2"):
        fitrl.LocalTrainer(accelerator="cpu", devices=1)


def test_a_batch_script_without_srun_is_one_process(monkeypatch) -> None:
    for variable, value in slurm(0).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("SLURM_STEP_ID")
    assert fitrl.LocalTrainer(accelerator="cpu", devices=1).world_size == 1
    with pytest.raises(InvalidArgumentError, match="has 2 tasks, and this process is none of them: .* 'srun"):
        fitrl.LocalTrainer(accelerator="cpu", strategy="fitrl_ddp", devices=2)


def test_nodes_without_a_launcher_are_refused_with_the_command() -> None:
    with pytest.raises(InvalidArgumentError, match="torchrun --nnodes 2 --nproc_per_node 4"):
        fitrl.LocalTrainer(accelerator="cpu", strategy="fitrl_ddp", devices=4, num_nodes=2)
