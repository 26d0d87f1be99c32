"""Agents that know nothing but an OpenAI address: what they ask becomes trajectories."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from vllm_cases import CPU, by_transformers, check_tool_use, use_tool
from vllm_stand_in import StandIn

import fitrl
from fitrl.data.tokens import tokenize
from fitrl.errors import DataError, InvalidArgumentError, SamplerError
from fitrl_vllm import InProcessEngine, Recorder, VLLMSampler


@pytest.fixture
def sampler(untied, server, tmp_path):
    model = fitrl.TrainableModel("small", "tests", str(untied), lora=None, root=tmp_path)
    with VLLMSampler(model, server.url, tolerance=1e-4, timeout_s=20) as sampler:
        yield sampler


async def two_turns(client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": "hello"}]
    for question in ("and?", None):
        answer = await client.chat.completions.create(model="whatever", messages=messages, max_tokens=5)
        messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": question}]


def test_an_agents_turns_are_one_history_with_ids_and_logprobs(sampler, server, untied) -> None:
    async def attempt() -> fitrl.Trajectory:
        recording = recorder.record()
        async with openai.AsyncOpenAI(base_url=recording.base_url, api_key="-", max_retries=0) as client:
            await two_turns(client)
        assert len(recording) == 2
        return recording.trajectory(reward=0.5)

    with Recorder(sampler) as recorder:
        trajectory = asyncio.run(attempt())
    first, second = trajectory.completions()
    assert trajectory.reward == 0.5 and len(trajectory.histories()) == 1
    assert [message["role"] for message in trajectory.messages()] == ["user", "assistant", "user", "assistant"]
    for item in (first, second):
        expected = by_transformers(untied, item.prompt_ids, list(item.token_ids))
        assert item.logprobs == pytest.approx(expected, abs=1e-6) and item.full_support and item.temperature == 1.0
    asked = server.asked("/v1/chat/completions")[0]
    assert asked["model"] == "the-base" and asked["top_p"] == 1.0 and asked["max_tokens"] == 5
    trained = tokenize(trajectory, sampler.tokenizer)
    assert sum(int(history.mask.sum()) for history in trained.histories) == len(first.token_ids) + len(second.token_ids)


def test_another_conversation_is_a_further_history(sampler) -> None:
    async def attempt() -> fitrl.Trajectory:
        recording = recorder.record()
        async with openai.AsyncOpenAI(base_url=recording.base_url, api_key="-", max_retries=0) as client:
            for text in ("one", "two"):
                messages = [{"role": "user", "content": text}]
                await client.chat.completions.create(model="m", messages=messages, max_tokens=3, temperature=0.5)
        return recording.trajectory()

    with Recorder(sampler) as recorder:
        trajectory = asyncio.run(attempt())
    assert [history.messages()[0]["content"] for history in trajectory.histories()] == ["one", "two"]
    assert {item.temperature for item in trajectory.completions()} == {0.5}


@pytest.mark.parametrize("changed", [{"top_p": 0.5}, {"presence_penalty": 1.0}, {"extra_body": {"top_k": 3}}], ids=str)
def test_what_changes_the_distribution_is_said(changed, sampler) -> None:
    async def attempt() -> fitrl.Trajectory:
        recording = recorder.record()
        async with openai.AsyncOpenAI(base_url=recording.base_url, api_key="-", max_retries=0) as client:
            messages = [{"role": "user", "content": "x"}]
            await client.chat.completions.create(model="m", messages=messages, max_tokens=3, **changed)
        return recording.trajectory()

    with Recorder(sampler) as recorder:
        assert not asyncio.run(attempt()).completions()[0].full_support


def test_logprobs_from_before_the_temperature_are_refused(sampler, server) -> None:
    server.tells_raw_logprobs = True
    messages = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    with Recorder(sampler) as recorder, httpx.Client(trust_env=False) as client:
        recording = recorder.record()
        address = recording.base_url + "/chat/completions"
        refused = client.post(address, json=messages | {"temperature": 0.5})
        assert refused.status_code == 502 and "processed_logprobs" in refused.text and len(recording) == 0
        assert client.post(address, json=messages).status_code == 200  # the same at temperature 1


def test_agents_are_trained_on_what_they_said(sampler) -> None:
    async def attempt(number: int) -> fitrl.Trajectory:
        recording = recorder.record()
        async with openai.AsyncOpenAI(base_url=recording.base_url, api_key="-", max_retries=0) as client:
            await two_turns(client)
        return recording.trajectory(reward=number % 2)

    async def attempts() -> list[fitrl.TrajectoryGroup]:
        return await fitrl.gather([fitrl.TrajectoryGroup([attempt(number) for number in range(4)])])

    with Recorder(sampler) as recorder, fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer:
        trainer.open(sampler.model)
        result = trainer.fit_rl(sampler.model, asyncio.run(attempts()), save_checkpoint=False)
    assert result.step == 1 and abs(result.metrics["mismatch/kl"]) < 1e-6


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_tool_calls_are_kept_as_they_were_sampled(stream, calling, tmp_path) -> None:
    model = fitrl.TrainableModel("calling", "tests", str(calling), lora=None, root=tmp_path)
    with (
        StandIn(calling) as server,
        VLLMSampler(model, server.url, tolerance=1e-4, timeout_s=20) as sampler,
        Recorder(sampler) as recorder,
    ):
        recording = recorder.record()
        messages = asyncio.run(use_tool(recording.base_url, stream=stream))
        trajectory = recording.trajectory()
    check_tool_use(messages, trajectory, sampler.tokenizer, calling)


def test_a_stream_ends_with_how_it_ended_and_what_it_cost(sampler, untied) -> None:
    async def attempt(**further):
        async with openai.AsyncOpenAI(base_url=recording.base_url, api_key="-", max_retries=0) as client:
            messages = [{"role": "user", "content": "hello"}]
            stream = await client.chat.completions.create(
                model="m", messages=messages, max_tokens=5, seed=3, stream=True, **further
            )
            return [event async for event in stream]

    with Recorder(sampler) as recorder:
        recording = recorder.record()
        first, last = asyncio.run(attempt())
        *_, usage = asyncio.run(attempt(stream_options={"include_usage": True}))
        [item, again] = recording.trajectory().completions()
    assert first.choices[0].delta.content == item.message["content"] and first.choices[0].finish_reason is None
    assert last.choices[0].finish_reason == "stop" and not usage.choices
    assert usage.usage.completion_tokens == len(item.token_ids) and usage.usage.prompt_tokens == len(item.prompt_ids)
    assert again.token_ids == item.token_ids
    assert item.logprobs == pytest.approx(by_transformers(untied, item.prompt_ids, list(item.token_ids)), abs=1e-6)


def test_an_engine_that_fails_is_an_error_of_the_stream_too(sampler, server) -> None:
    server.tells_raw_logprobs = True

    async def attempt() -> None:
        async with openai.AsyncOpenAI(base_url=recording.base_url, api_key="-", max_retries=0) as client:
            messages = [{"role": "user", "content": "hello"}]
            await client.chat.completions.create(model="m", messages=messages, temperature=0.5, stream=True)

    with Recorder(sampler) as recorder:
        recording = recorder.record()
        with pytest.raises(openai.APIStatusError, match="processed_logprobs"):
            asyncio.run(attempt())
        assert len(recording) == 0


def test_strangers_and_bodies_that_are_wrong_are_refused(sampler) -> None:
    with Recorder(sampler) as recorder:
        recording = recorder.record()
        address = recording.base_url + "/chat/completions"
        messages = {"messages": [{"role": "user", "content": "x"}]}
        with httpx.Client(trust_env=False) as client:
            refused = client.post(address, json=messages | {"stream_options": {"include_usage": True}})
            assert refused.status_code == 400 and "stream" in refused.text
            assert client.post(address, json=messages | {"stream": True, "stream_options": 1}).status_code == 400
            assert client.post(address, json={}).status_code == 400
            assert client.post(address, content=b"{").status_code == 400
            assert len(recording) == 0
            with pytest.raises(DataError, match="nothing was asked"):
                recording.trajectory()
            del recording
            assert client.post(address, json=messages).status_code == 404
    with pytest.raises(SamplerError, match="context manager"):
        recorder.record()


def test_an_engine_in_this_process_has_no_chat(untied, tmp_path) -> None:
    model = fitrl.TrainableModel("small", "tests", str(untied), lora=None, root=tmp_path)
    with VLLMSampler(model, InProcessEngine(None)) as sampler, pytest.raises(InvalidArgumentError, match="server"):
        Recorder(sampler)
