"""A `RolloutPipeline` beside the real engine: run by `make test-vllm`, in the environment that has vLLM."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_cases import CPU

import fitrl
from fitrl_vllm import VLLMSampler, VLLMServer

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.slow

TASKS = [f"{number}" for number in range(40)]
DECOUPLED = {"precalculate_logprobs": True, "truncated_importance_sampling": 2.0, "save_checkpoint": False}


@pytest.fixture(scope="module")
def server(tied, tmp_path_factory) -> Iterator[VLLMServer]:
    arguments = ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "64", "--max-model-len", "256"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("pipeline-log") / "log"
    with VLLMServer(tied, python=sys.executable, arguments=arguments, environment=environment, log=log) as server:
        yield server


def low(task, trajectory) -> float:
    said = [token for item in trajectory.completions() for token in item.token_ids]
    return sum(token < 128 for token in said) / len(said)


async def two_turns(chat: fitrl.Chat, task: str) -> fitrl.Trajectory:
    messages: list[fitrl.Message | fitrl.Completion] = [{"role": "user", "content": task}]
    messages.append(await chat(messages))
    messages.append({"role": "user", "content": "and?"})
    messages.append(await chat(messages))
    return fitrl.Trajectory(messages_and_choices=messages)


def by_version(folder: Path, weights: dict[str, torch.Tensor], item: fitrl.Completion) -> list[float]:
    """Logprobs of what was said, by transformers with the weights of one version."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    network.load_state_dict({name: tensor.double() for name, tensor in weights.items()}, strict=False)
    with torch.no_grad():
        logits = network(torch.tensor([[*item.prompt_ids, *item.token_ids]])).logits[0, len(item.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(item.token_ids)[:, None]).squeeze(1).tolist()


def test_it_trains_a_step_behind_and_each_version_is_the_one_that_answered(tied, server, tmp_path) -> None:
    model = fitrl.TrainableModel("behind", "tests", str(tied), lora=None, root=tmp_path)
    draw = random.Random(0)
    rewards, behind, handed = [], [], []
    with (
        VLLMSampler(model, server, tolerance=1e-4) as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
        fitrl.RolloutPipeline(
            trainer.sampler(model),
            TASKS,
            agent=two_turns,
            reward=low,
            group_size=8,
            groups_per_step=6,
            max_new_tokens=6,
            model=model,
        ) as pipeline,
    ):

        def weights() -> dict[str, torch.Tensor]:
            return {name: tensor.clone() for name, tensor in trainer.open(model).named_weights()}

        served = {0: weights()}
        for step, groups in enumerate(pipeline):
            assert model.step == step
            handed += [group.metadata["number"] for group in groups]
            said = [item for group in groups for trajectory in group for item in trajectory.completions()]
            assert {item.version for item in said} <= {step - 1, step}
            for item in draw.sample(said, 4):
                assert item.logprobs == pytest.approx(by_version(tied, served[item.version], item), abs=1e-4)
            result = trainer.fit_rl(model, groups, learning_rate=2e-3, **DECOUPLED)
            assert sampler.version == result.step == step + 1
            served[result.step] = weights()
            told = result.metrics | pipeline.metrics()
            assert abs(told["mismatch/kl"]) < (0.1 if told["off_policy/steps_max"] else 1e-5)
            behind.append(told["off_policy/steps_max"])
            rewards.append(told["reward/mean"])
            if result.step == 12:
                break
    assert behind[0] == 0.0 and max(behind) == 1.0
    assert len(set(handed)) == len(handed) == 12 * 6 and pipeline.dropped.keys() <= {"stale"}
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05


def kill_engine(server: VLLMServer) -> None:
    """Kill the process that computes; the server notices and ends."""
    for process in psutil.Process(server._process.pid).children(recursive=True):
        if "EngineCore" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)


def test_engines_killed_in_mid_rollout_lose_and_double_nothing(tied, server, tmp_path) -> None:
    model = fitrl.TrainableModel("killed", "tests", str(tied), lora=None, root=tmp_path)
    kills = iter((20, 110))  # in the first batch, and beside training
    attempts = 0
    due, starts = next(kills), server.num_starts

    def deadly(task, trajectory) -> float:
        nonlocal attempts, due
        attempts += 1
        if attempts == due:
            due = next(kills, 0)
            kill_engine(server)
        return low(task, trajectory)

    handed: list[int] = []
    with (
        VLLMSampler(model, server, tolerance=1e-4) as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
        fitrl.RolloutPipeline(
            trainer.sampler(model),
            TASKS,
            reward=deadly,
            group_size=8,
            groups_per_step=4,
            max_new_tokens=16,
            max_concurrency=12,
            model=model,
        ) as pipeline,
    ):
        for step, groups in enumerate(pipeline):
            assert [len(group) for group in groups] == [8] * 4
            handed += [group.metadata["number"] for group in groups]
            said = [item for group in groups for trajectory in group for item in trajectory.completions()]
            assert {item.version for item in said} <= {step - 1, step}
            result = trainer.fit_rl(model, groups, learning_rate=1e-3, **DECOUPLED)
            assert abs(result.metrics["mismatch/kl"]) < 0.1
            if result.step == 6:
                break
        assert server.num_starts == starts + 2 and sampler.version == 6
    server.stop()  # it is this test's own since it was started again
    assert len(set(handed)) == len(handed) == 6 * 4
    assert pipeline.dropped.keys() <= {"stale"}  # nothing failed
    assert max(handed) < len(handed) + pipeline.dropped.get("stale", 0) + 8  # some are under way or wait at the end
