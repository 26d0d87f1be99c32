"""The real engine on GPUs, in the environment that has vLLM: `python -m pytest plugins/vllm/tests/test_gpu.py`.

Trainer and engine share the first GPU; by NCCL the engine is on the second.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_cases import PROMPT, by_transformers, learn, low, model_of, small_policy

import fitrl
from fitrl_vllm import VLLMSampler, VLLMServer

pytest.importorskip("vllm", reason="needs vLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LORA = fitrl.LoraSettings(rank=8)
SMALL = ["--enforce-eager", "--max-num-seqs", "64", "--max-model-len", "256", "--gpu-memory-utilization", "0.15"]
GPU = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "enable_model_summary": False}
BFLOAT16 = 0.02  # nats, in the mean over tokens
MANY = 128  # completions, so that bfloat16's 0.01 nats a token leave the mean of o - p far below 1e-3


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """A policy that vLLM's GPU kernels take, with tied embeddings."""
    return small_policy(tmp_path_factory.mktemp("policy"), tied=True, head_dim=64)


@contextmanager
def serving(
    policy: Path, log: Path, lora: fitrl.LoraSettings | None = None, *further: str, **environment: str
) -> Iterator[VLLMServer]:
    arguments = [*SMALL, *further]
    server = VLLMServer(policy, lora=lora, python=sys.executable, arguments=arguments, environment=environment, log=log)
    with server:
        yield server


@pytest.fixture(scope="module")
def server(policy, tmp_path_factory) -> Iterator[VLLMServer]:
    with serving(policy, tmp_path_factory.mktemp("log") / "log", None, "--enable-sleep-mode") as server:
        yield server


def assert_transformers(said: list[fitrl.Completion], policy: Path, temperature: float) -> None:
    for item in said:
        expected = torch.tensor(by_transformers(policy, PROMPT, list(item.token_ids), temperature))
        assert (torch.tensor(item.logprobs) - expected).abs().mean() < BFLOAT16


def test_logprobs_are_transformers(policy, server, tmp_path) -> None:
    with VLLMSampler(model_of(policy, tmp_path), server) as sampler:
        said = asyncio.run(sampler.sample(PROMPT, n=4, max_new_tokens=12, temperature=0.7, seed=3))
    assert len({item.token_ids for item in said}) == 4
    assert_transformers(said, policy, 0.7)


@pytest.mark.parametrize("transfer", ["folder", "memory", "nccl"])
def test_all_weights_are_exchanged_at_each_step(transfer, policy, request, tmp_path) -> None:
    model = model_of(policy, tmp_path)
    if transfer != "nccl":
        check_exchanges(model, request.getfixturevalue("server"), transfer)
        return
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    with serving(policy, tmp_path / "log", CUDA_VISIBLE_DEVICES=visible[1]) as other:
        check_exchanges(model, other, transfer)


def check_exchanges(model: fitrl.TrainableModel, server: VLLMServer, transfer: Any) -> None:
    with (
        VLLMSampler(model, server, tolerance=BFLOAT16, transfer=transfer) as sampler,
        fitrl.LocalTrainer(**GPU, sampler=sampler) as trainer,
    ):
        rewards = learn(trainer, model, 6, 3e-3, most_kl=1e-3, group_size=MANY)
        assert rewards[-1] > rewards[0]
        # what it says now is what the trainer's own weights say
        said = asyncio.run(sampler.sample(PROMPT, n=2, max_new_tokens=12, seed=5))
        saved = trainer.verbs.save(path=str(model.run_dir / "saved"), weights_only=True)
    assert_transformers(said, Path(saved), 1.0)


def test_adapters_learn_and_are_exchanged_at_each_step(policy, tmp_path) -> None:
    model = model_of(policy, tmp_path, LORA)
    with (
        serving(policy, tmp_path / "log", LORA) as server,
        VLLMSampler(model, server, tolerance=BFLOAT16) as sampler,
        fitrl.LocalTrainer(**GPU, sampler=sampler) as trainer,
    ):
        rewards = learn(trainer, model, 20, 1e-2, most_kl=1e-3, group_size=MANY)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


@pytest.mark.parametrize("transfer", ["folder", "memory"])
def test_a_sleeping_engine_leaves_its_memory_to_the_trainer(transfer, policy, server, tmp_path) -> None:
    model = model_of(policy, tmp_path)
    with (
        VLLMSampler(model, server, tolerance=BFLOAT16, transfer=transfer) as sampler,
        fitrl.LocalTrainer(**GPU, sampler=sampler) as trainer,
    ):
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=low, group_size=8, max_new_tokens=12, seed=0)
        awake = torch.cuda.mem_get_info()[0]
        sampler.sleep()
        asleep = torch.cuda.mem_get_info()[0]
        assert asleep - awake > 0.1 * torch.cuda.mem_get_info()[1]  # of the 0.15 that it may take
        trainer.fit_rl(model, groups, learning_rate=1e-3, save_checkpoint=False)  # wakes it for the new weights
        assert sampler.version == 1
        learn_more = fitrl.rollout(trainer.sampler(model), ["a"], reward=low, group_size=8, max_new_tokens=12, seed=1)
        result = trainer.fit_rl(model, learn_more, learning_rate=1e-3, save_checkpoint=False)
    assert abs(result.metrics["mismatch/kl"]) < 1e-3
