"""The real engine on a CPU: run by `make test-vllm`, in the environment that has vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_cases import CPU, PROMPT, by_transformers, check_tool_use, learn, low, model_of, use_tool

import fitrl
from fitrl_vllm import EngineError, InProcessEngine, Recorder, StaleWeightsError, VLLMSampler, VLLMServer
from fitrl_vllm.transfer import BUCKET_BYTES

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.slow

LORA = fitrl.LoraSettings(rank=8)
SMALL = ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "64", "--max-model-len", "256"]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(folder: Path, log: Path, lora: fitrl.LoraSettings | None = None, *further: str) -> Iterator[VLLMServer]:
    arguments = [*SMALL, *further]
    server = VLLMServer(folder, lora=lora, python=sys.executable, arguments=arguments, environment=ENVIRONMENT, log=log)
    with server:
        yield server


@pytest.fixture(scope="module")
def tied_server(tied, tmp_path_factory) -> Iterator[VLLMServer]:
    with serving(tied, tmp_path_factory.mktemp("tied-log") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def lora_server(untied, tmp_path_factory) -> Iterator[VLLMServer]:
    with serving(untied, tmp_path_factory.mktemp("lora-log") / "log", LORA) as server:
        yield server


def test_logprobs_are_transformers(untied, lora_server, tmp_path) -> None:
    with VLLMSampler(model_of(untied, tmp_path, LORA), lora_server, tolerance=1e-4) as sampler:
        said = asyncio.run(sampler.sample(PROMPT, n=4, max_new_tokens=12, temperature=0.7, seed=3))
        cut = asyncio.run(sampler.sample(PROMPT, n=2, max_new_tokens=12, top_k=4, top_p=0.9, seed=3))
        assert said == asyncio.run(sampler.sample(PROMPT, n=4, max_new_tokens=12, temperature=0.7, seed=3))
    assert len({item.token_ids for item in said}) == 4
    for item in said:
        expected = by_transformers(untied, PROMPT, list(item.token_ids), 0.7)
        assert item.logprobs == pytest.approx(expected, abs=1e-4)
    assert not any(item.full_support for item in cut)


def test_adapters_learn_and_are_exchanged_at_each_step(untied, lora_server, tmp_path) -> None:
    model = model_of(untied, tmp_path, LORA)
    with (
        VLLMSampler(model, lora_server, tolerance=1e-4) as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
    ):
        rewards = learn(trainer, model, 20, 1e-2)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_an_openai_agent_is_recorded(untied, lora_server, tmp_path) -> None:
    async def attempt() -> fitrl.Trajectory:
        recording = recorder.record()
        async with openai.AsyncOpenAI(base_url=recording.base_url, api_key="-", max_retries=0) as client:
            messages = [{"role": "user", "content": "hello"}]
            for _ in range(2):
                answer = await client.chat.completions.create(model="m", messages=messages, max_tokens=5)
                messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
        return recording.trajectory()

    model = model_of(untied, tmp_path, LORA)
    with VLLMSampler(model, lora_server, tolerance=1e-4) as sampler, Recorder(sampler) as recorder:
        trajectory = asyncio.run(attempt())
    assert len(trajectory.completions()) == 2
    for item in trajectory.completions():
        expected = by_transformers(untied, item.prompt_ids, list(item.token_ids))
        assert item.logprobs == pytest.approx(expected, abs=1e-4)


def test_tool_calls_are_parsed_by_vllm_and_kept_as_they_were_sampled(calling, tmp_path) -> None:
    parser = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    model = model_of(calling, tmp_path)
    with (
        serving(calling, tmp_path / "log", None, *parser) as server,
        VLLMSampler(model, server, tolerance=1e-4) as sampler,
        Recorder(sampler) as recorder,
    ):
        for stream in (False, True):
            recording = recorder.record()
            messages = asyncio.run(use_tool(recording.base_url, stream=stream))
            check_tool_use(messages, recording.trajectory(), sampler.tokenizer, calling)


@pytest.mark.parametrize("transfer", ["folder", "memory"])
def test_full_weights_with_tied_embeddings(transfer, tied, tied_server, tmp_path) -> None:
    model = model_of(tied, tmp_path)
    with (
        VLLMSampler(model, tied_server, tolerance=1e-4, transfer=transfer) as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
    ):
        rewards = learn(trainer, model, 8, 3e-3)
    assert rewards[-1] > rewards[0]


def test_a_transfer_that_breaks_off_can_be_made_again(tied, tied_server, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(BUCKET_BYTES, "cpu", 4096)  # many
    network = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    weights = [(name, weight.detach() + 0.01) for name, weight in network.named_parameters()]
    network.load_state_dict(dict(weights), strict=False)
    network.save_pretrained(tmp_path / "changed")

    def some(number: int):
        yield from weights[:number]
        raise ArithmeticError("no more")

    with VLLMSampler(model_of(tied, tmp_path), tied_server, tolerance=1e-4, transfer="memory") as sampler:
        for number in (1, 3, 4, 9, len(weights)):  # after q_proj and k_proj, and gate_proj
            with pytest.raises(ArithmeticError):
                sampler.update(some(number), 1)
            with pytest.raises(StaleWeightsError):
                asyncio.run(sampler.sample(PROMPT, max_new_tokens=1))
        sampler.update(iter(weights), 1)
        [said] = asyncio.run(sampler.sample(PROMPT, max_new_tokens=8))
    assert said.version == 1
    expected = by_transformers(tmp_path / "changed", PROMPT, list(said.token_ids))
    assert said.logprobs == pytest.approx(expected, abs=1e-4)


def test_an_engine_killed_in_mid_rollout_comes_back_with_the_newest_weights(tied, tmp_path) -> None:
    model = model_of(tied, tmp_path)

    def kill_once(task, trajectory) -> float:
        if not killed:
            killed.append(True)
            kill_engine(server)
        return low(task, trajectory)

    killed: list[bool] = []
    with (
        serving(tied, tmp_path / "log") as server,
        VLLMSampler(model, server, tolerance=1e-4) as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
    ):
        learn(trainer, model, 1, 3e-3)
        groups = fitrl.rollout(
            trainer.sampler(model),
            list("abcdefgh"),
            reward=kill_once,
            group_size=8,
            max_new_tokens=12,
            max_concurrency=8,
        )
        assert killed and server.num_starts == 2
        assert [len(group.trajectories) for group in groups] == [8] * 8  # none lost, none doubled
        assert {item.version for group in groups for one in group.trajectories for item in one.completions()} == {1}
        result = trainer.fit_rl(model, groups, save_checkpoint=False)
        assert abs(result.metrics["mismatch/kl"]) < 1e-5  # also of those from before the kill


def test_an_engine_that_dies_takes_along_weights_that_came_without_files(tied, tmp_path) -> None:
    model = model_of(tied, tmp_path)
    with (
        serving(tied, tmp_path / "log") as server,
        VLLMSampler(model, server, tolerance=1e-4, transfer="memory") as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
    ):
        learn(trainer, model, 1, 3e-3)
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=low, group_size=8, max_new_tokens=6, seed=1)
        kill_engine(server)
        for _ in range(2):
            with pytest.raises(StaleWeightsError, match="version 1 of the weights came without files and is gone"):
                asyncio.run(sampler.sample(PROMPT, max_new_tokens=2))
        assert server.num_starts == 2
        trainer.fit_rl(model, groups, learning_rate=3e-3, save_checkpoint=False)  # hands over newer ones
        assert sampler.version == 2
        kill_engine(server)  # and while nobody asks
        trainer.fit_rl(model, groups, learning_rate=3e-3, save_checkpoint=False)
        assert sampler.version == 3 and server.num_starts == 3
        assert asyncio.run(sampler.sample(PROMPT, max_new_tokens=2))[0].version == 3


def kill_engine(server: VLLMServer) -> None:
    children = psutil.Process(server._process.pid).children(recursive=True)
    [engine] = [process for process in children if "EngineCore" in " ".join(process.cmdline())]
    os.kill(engine.pid, signal.SIGKILL)


def test_a_server_that_cannot_start_says_why(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    server = VLLMServer(tmp_path / "empty", arguments=SMALL, environment=ENVIRONMENT, log=tmp_path / "log")
    with pytest.raises(EngineError, match="ended with status"):
        server.start()


@pytest.fixture
def own_environment(monkeypatch, tmp_path_factory) -> Iterator[None]:
    """vLLM sets variables as it likes when it starts in this process, and leaves its sockets."""
    before = dict(os.environ)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("v")))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("transfer", ["folder", "memory"])
def test_an_engine_in_this_process(transfer, untied, tmp_path, own_environment) -> None:
    import vllm

    llm = vllm.LLM(
        str(untied),
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=64,
        logprobs_mode="processed_logprobs",
        **(InProcessEngine.TRANSFER if transfer == "memory" else {}),
    )
    model = model_of(untied, tmp_path)
    try:
        with (
            VLLMSampler(model, InProcessEngine(llm), tolerance=1e-4, transfer=transfer) as sampler,
            fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
        ):
            learn(trainer, model, 3, 3e-3)

            async def while_another_is_given_up() -> list[fitrl.Completion]:
                long = asyncio.create_task(sampler.sample(PROMPT, n=4, max_new_tokens=200))
                kept = asyncio.create_task(sampler.sample(PROMPT, n=4, max_new_tokens=32, seed=1))
                while not sampler.engine._under_way:
                    await asyncio.sleep(0)
                long.cancel()
                return await kept

            kept = asyncio.run(while_another_is_given_up())
            assert kept == asyncio.run(sampler.sample(PROMPT, n=4, max_new_tokens=32, seed=1))
            # with a string to stop at vLLM makes the texts itself; of a character that was cut off it says nothing
            theirs = asyncio.run(sampler.sample(PROMPT, n=4, max_new_tokens=32, seed=1, stop=["never said"]))
            assert [item.token_ids for item in kept] == [item.token_ids for item in theirs]
            texts, others = ([item.message["content"] for item in items] for items in (kept, theirs))
            assert [text.rstrip("\ufffd") for text in texts] == others
    finally:
        llm.llm_engine.engine_core.shutdown()
