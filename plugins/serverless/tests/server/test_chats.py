"""Chats with trained models: which weights answer, and that their logprobs are true."""

from __future__ import annotations

import pytest
import torch
from asking import ended, job_body, make_model, submit
from openai.types.chat import ChatCompletion

import fitrl
from fitrl.testing.samples import true_logprobs
from fitrl_serverless import wire

ASK = {"messages": [{"role": "user", "content": "3+4="}], "logprobs": True, "max_tokens": 4, "seed": 3}


@pytest.fixture(scope="module")
def trained(server) -> str:
    """A model with three steps, large enough to tell them apart."""
    with server.client() as client:
        model = make_model(client, "chatty")
        for _ in range(3):
            assert ended(client, submit(client, job_body(model, learning_rate=1e-2)))["status"] == "succeeded"
    return model


def name(step: int | None = None) -> str:
    return wire.Artifact(entity="alice", project="tests", name="chatty", step=step).model


def scored(step: int, server, model: str, ids: list[int], num_prompt: int) -> list[float]:
    """Float64 logprobs of a checkpoint's weights, by transformers and PEFT alone."""
    if step == 0:
        return true_logprobs(torch.tensor(ids))[num_prompt:].tolist()
    import copy

    from peft import PeftModel

    from fitrl.testing.samples import reference_network

    network = PeftModel.from_pretrained(
        copy.deepcopy(reference_network()), str(server.state / "models" / model / "checkpoints" / f"{step:04d}")
    ).double()
    with torch.no_grad():
        logits = network(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids)[1:, None]).squeeze(1)[num_prompt - 1 :].tolist()


@pytest.mark.parametrize("step", [0, 1, 3, None])
def test_the_step_that_is_asked_for_answers(server, trained, step) -> None:
    with server.client() as client:
        answer = client.post("/chat/completions", json=ASK | {"model": name(step), "n": 3})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    newest = 3 if step is None else step
    assert body["model"] == name(newest) and body["policy_version"] == newest
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    for index, choice in enumerate(wire.ChatCompletion.model_validate_json(answer.content).choices):
        said = wire.choice_from_wire(choice)
        assert (choice.index, said.version, said.temperature, said.full_support) == (index, newest, 1.0, True)
        assert said.prompt_ids is not None and said.token_ids is not None and said.logprobs is not None
        ids = [*said.prompt_ids, *said.token_ids]
        assert said.logprobs == pytest.approx(scored(newest, server, trained, ids, len(said.prompt_ids)), abs=2e-4)


def test_the_newest_step_is_the_newest_after_each_job(server) -> None:
    with server.client() as client:
        model = make_model(client, "moving")
        asked = ASK | {"model": "wandb-artifact:///alice/tests/moving", "temperature": 1.0}
        seen = []
        for step in range(3):
            body = client.post("/chat/completions", json=asked).json()
            assert body["policy_version"] == step
            pinned = client.post("/chat/completions", json=asked | {"model": body["model"]}).json()
            assert pinned["choices"] == body["choices"]
            seen.append(body["choices"][0]["logprobs"]["content"][0]["logprob"])
            ended(client, submit(client, job_body(model, learning_rate=1e-2)))
    assert len(set(seen)) == 3


def test_an_openai_client_reads_the_answer(server, trained) -> None:
    with server.client() as client:
        body = client.post("/chat/completions", json=ASK | {"model": name()}).json()
    completion = fitrl.Completion.from_choice(ChatCompletion.model_validate(body).choices[0], temperature=1.0)
    assert completion.token_ids is not None and completion.logprobs is not None
    assert len(completion.token_ids) == len(completion.logprobs) == body["usage"]["completion_tokens"]


def test_prompt_ids_take_the_place_of_messages(server, trained) -> None:
    with server.client() as client:
        by_text = client.post("/chat/completions", json=ASK | {"model": name(2)}).json()
        ids = by_text["choices"][0]["prompt_token_ids"]
        asked = {key: value for key, value in ASK.items() if key != "messages"}
        by_ids = client.post("/chat/completions", json=asked | {"model": name(2), "prompt_token_ids": ids}).json()
    assert by_ids["choices"] == by_text["choices"]


def test_settings_of_sampling_have_their_effect(server, trained) -> None:
    with server.client() as client:

        def ask(**settings: object) -> dict:
            answer = client.post("/chat/completions", json=ASK | {"model": name(1)} | settings)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]

        assert ask(temperature=0)["logprobs"]["content"][0]["logprob"] == 0.0
        assert ask(top_k=1)["full_support"] is False
        assert ask(top_p=0.5)["full_support"] is False
        assert ask(logprobs=False)["logprobs"] is None
        assert len(ask(max_tokens=None, max_completion_tokens=1)["logprobs"]["content"]) == 1
        assert ask(seed=1) == ask(seed=1)
        first = ask(temperature=0)["message"]["content"]
        assert ask(temperature=0, stop=first)["message"]["content"] == ""


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "gpt-5"}, 422, "a trained model is named"),
        ({"model": "wandb-artifact:///alice/tests/chatty:step77"}, 404, "no step 77"),
        ({"model": "wandb-artifact:///alice/tests/nobody"}, 404, "no model"),
        ({"model": "wandb-artifact:///bob/tests/chatty"}, 404, "no model"),
        ({"stream": True}, 422, "stream"),
        ({"frequency_penalty": 1.0}, 422, "frequency_penalty"),
        ({"messages": []}, 422, "pass messages"),
        ({"prompt_token_ids": [1]}, 422, "in their place"),
        ({"messages": None, "prompt_token_ids": [999999]}, 422, ""),
        ({"max_tokens": 1, "max_completion_tokens": 2}, 422, "two names"),
        ({"temperature": -1.0}, 422, "temperature"),
        ({"n": 1000}, 422, "128 at most"),
    ],
)
def test_what_cannot_be_honoured_is_refused(server, trained, change, status, words) -> None:
    body = {key: value for key, value in (ASK | {"model": name()} | change).items() if value is not None}
    with server.client() as client:
        answer = client.post("/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]
