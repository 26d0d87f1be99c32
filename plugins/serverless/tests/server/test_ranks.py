"""A worker of two ranks, started by torchrun: the same step as one process, and its faults."""

from __future__ import annotations

import math

import psutil
import pytest
import torch
from asking import ended, events, job_body, make_model, steps, submit
from safetensors.torch import load, load_file

import fitrl
from helpers import group

GROUPS = [group([0, 1, 0, 1]), group([1, 0, 0.5, 0])]


def running_ranks(server) -> list[psutil.Process]:
    """The ranks of the worker, without their launcher."""
    found = []
    for process in server.workers():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if "fitrl_serverless.server.worker" in line and "torch.distributed.run" not in line:
            found.append(process)
    return found


@pytest.mark.slow
def test_two_ranks_train_as_one_does_and_survive_kills(serve, tmp_path) -> None:
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        model = fitrl.TrainableModel("alone", "tests", "tiny", root=tmp_path / "alone")
        for _ in range(2):
            result = trainer.fit_rl(model, GROUPS, learning_rate=1e-3)
    assert result.checkpoint_path is not None
    alone = load_file(result.checkpoint_path / "adapter_model.safetensors")
    server = serve("--nproc-per-node", "2")
    with server.client() as client:
        remote = make_model(client, "ranks")
        assert ended(client, submit(client, job_body(remote, GROUPS)))["status"] == "succeeded"
        assert len(running_ranks(server)) == 2

        bad = ended(client, submit(client, job_body(remote, [group([0, math.nan])])))
        assert bad["status"] == "failed" and "reward" in bad["error_message"]
        job = submit(client, job_body(remote, GROUPS))
        assert ended(client, job)["step"] == 2
        weights = load(client.get(f"/preview/models/{remote}/checkpoints/2/files/adapter_model.safetensors").content)
        # Adam turns differences of 1e-10 in a gradient near 0 into some of a step; the gradient's norm is exact
        assert events(client, job)[1]["data"]["loss/grad_norm"] == pytest.approx(
            result.metrics["loss/grad_norm"], rel=1e-4
        )
        for name, tensor in alone.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-4)

        for number, victim in enumerate((-1, 0)):  # a rank; then the launcher, whose ranks have to go with it
            job = submit(client, job_body(remote, GROUPS))
            ranks = running_ranks(server)
            (server.workers()[0] if victim == 0 else ranks[victim]).kill()
            assert ended(client, job)["status"] == "succeeded"
            _, alive = psutil.wait_procs(ranks, timeout=60)
            assert not alive
            assert steps(client, remote) == [*range(4 + number)]
    server.kill()
