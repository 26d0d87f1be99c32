"""`ServerlessSampler`: rollouts over /chat/completions keep the ids and logprobs that came."""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections import deque

import pytest
import torch

import fitrl
from fitrl.discovery import sampler_class
from fitrl.errors import InvalidArgumentError, SamplerError, UnsupportedError
from fitrl_serverless import ServerlessSampler, ServerlessTrainer
from fitrl_serverless.client import ServerFaultError
from helpers import group


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("policy", "sampler", "tiny", root=tmp_path)


@pytest.fixture
def trainer(foreign, key):
    with warnings.catch_warnings(), ServerlessTrainer(url=foreign.url, key=key, retry_timeout_s=0.5) as trainer:
        warnings.filterwarnings("ignore", message="the service at .* is not fitrl's")
        yield trainer


def asked(foreign) -> list[dict]:
    return [body for _, path, _, body in foreign.seen if path == "/chat/completions"]


def test_rollouts_are_sent_as_messages(foreign, trainer, model) -> None:
    """Nothing is rendered or tokenized here: a laptop needs no tokenizer."""
    sampler = trainer.sampler(model)
    assert isinstance(sampler, fitrl.ChatSampler) and sampler_class("serverless") is ServerlessSampler
    tools = [{"type": "function", "function": {"name": "add"}}]
    tasks = [{"prompt": "3+4=", "tools": tools}]
    [rolled] = fitrl.rollout(
        sampler, tasks, reward=lambda task, t: 1.0, group_size=2, temperature=0.5, stop=["x"], seed=7, max_new_tokens=9
    )
    first, second = asked(foreign)
    assert first["messages"] == [{"role": "user", "content": "3+4="}] and first["tools"] == tools
    settings = {"n": 1, "max_tokens": 9, "temperature": 0.5, "top_p": 1.0, "stop": ["x"], "logprobs": True}
    assert settings.items() <= first.items() and first["return_tokens_as_token_ids"] is True
    assert "top_k" not in first and "prompt_token_ids" not in first and first["seed"] != second["seed"]
    assert first["model"] == "wandb-artifact:///me/sampler/policy"  # of no step: nothing is trained yet
    [said, _] = [trajectory.completions()[0] for trajectory in rolled]
    assert (said.token_ids, said.logprobs, said.temperature, said.text) == ((55,), (-0.25,), 0.5, "7")
    assert (said.version, said.full_support, said.prompt_ids, said.finish_reason) == (0, True, None, "stop")
    assert sampler._tokenizer is None


def test_versions_follow_the_training(foreign, trainer, model) -> None:
    sampler = trainer.sampler(model)
    trainer.fit_rl(model, [group([0, 1])])
    assert sampler.version == 1 and trainer.sampler(model) is sampler
    [completion] = asyncio.run(sampler.sample_chat([{"role": "user", "content": "a"}], top_p=0.9))
    assert asked(foreign)[-1]["model"] == "wandb-artifact:///me/sampler/policy:step1"
    assert completion.version == 1 and not completion.full_support
    with pytest.raises(UnsupportedError, match="takes no weights, got 'w'"):
        sampler.update([("w", torch.zeros(1))], 5)
    assert sampler.version == 1


def test_what_this_service_cannot_do(foreign, trainer, model) -> None:
    sampler = trainer.sampler(model)
    with pytest.raises(UnsupportedError, match="messages, not token ids"):
        asyncio.run(sampler.sample([1, 2]))
    with pytest.raises(InvalidArgumentError, match="stop must be a list"):
        asyncio.run(sampler.sample_chat([{"role": "user", "content": "a"}], stop="x"))


@pytest.mark.parametrize("missing", ["logprobs", "content", "choices"])
def test_answers_that_cannot_be_learned_from(foreign, trainer, model, missing) -> None:
    answer = foreign.chat({"model": "m"})
    if missing == "choices":
        answer["choices"] = []
    else:
        answer["choices"][0]["logprobs"] = None if missing == "logprobs" else {"content": []}
    foreign.faults["/completions"] = deque([(200, answer, {})])
    with pytest.raises(SamplerError):
        asyncio.run(trainer.sampler(model).sample_chat([{"role": "user", "content": "a"}]))


def test_tokens_that_are_text_keep_their_bytes(foreign, trainer, model) -> None:
    answer = json.loads(json.dumps(foreign.chat({"model": "m"})))
    answer["choices"][0]["logprobs"]["content"] = [{"token": "\ufffd", "logprob": -1.0, "bytes": [0xC3]}]
    foreign.faults["/completions"] = deque([(200, answer, {})])
    [said] = asyncio.run(trainer.sampler(model).sample_chat([{"role": "user", "content": "a"}]))
    assert said.token_ids is None and said.token_bytes == (b"\xc3",)


def test_sampling_is_repeated_like_a_get(foreign, trainer, model) -> None:
    sampler = trainer.sampler(model)
    foreign.faults["/completions"] = deque(["drop-after"])
    assert len(asyncio.run(sampler.sample_chat([{"role": "user", "content": "a"}], n=3))) == 3
    foreign.faults["/completions"] = deque([500] * 100)
    with pytest.raises(ServerFaultError):
        asyncio.run(sampler.sample_chat([{"role": "user", "content": "a"}]))


def test_many_rollouts_at_once(foreign, trainer, model) -> None:
    [rolled] = fitrl.rollout(trainer.sampler(model), ["3+4="], reward=lambda task, t: 1.0, group_size=200)
    assert len(rolled) == 200 == len(asked(foreign))


def test_a_rollout_that_is_cancelled_cancels_its_request(foreign, trainer, model, monkeypatch) -> None:
    sampler = trainer.sampler(model)
    arrived, leave = threading.Event(), threading.Event()
    chat = foreign.chat
    monkeypatch.setattr(foreign, "chat", lambda body: (arrived.set(), leave.wait(10), chat(body))[2])

    async def work() -> None:
        task = asyncio.create_task(sampler.sample_chat([{"role": "user", "content": "a"}]))
        await asyncio.to_thread(arrived.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    leave.set()


def test_a_sampler_of_a_closed_trainer_says_so(foreign, key, model, trainer) -> None:
    sampler = trainer.sampler(model)
    trainer.open(fitrl.TrainableModel("another", "sampler", "tiny", root=model.root))
    with pytest.raises(SamplerError, match="closed, or has another model open"):
        asyncio.run(sampler.sample_chat([{"role": "user", "content": "a"}]))
