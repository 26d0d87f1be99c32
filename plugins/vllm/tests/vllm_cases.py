"""What the plugin's tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import fitrl
from fitrl.data.tokens import tokenize

PROMPT = [72, 101, 108, 108, 111]
CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}


def small_policy(folder: Path, *, tied: bool, head_dim: int = 32) -> Path:
    """A random Qwen3 with the bundled policy's tokenizer; vLLM has no attention for that one's head size."""
    tokenizer = fitrl.load_tokenizer("tiny")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_of(folder: Path, root: Path, lora: fitrl.LoraSettings | None = None) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("small", "tests", str(folder), lora=lora, root=root)


def low(task: str, trajectory: fitrl.Trajectory) -> float:
    """The share of small token ids."""
    said = trajectory.completions()[-1].token_ids
    return sum(token < 128 for token in said) / len(said)


def learn(
    trainer: fitrl.LocalTrainer,
    model: fitrl.TrainableModel,
    steps: int,
    rate: float,
    most_kl: float = 1e-5,
    group_size: int = 16,
) -> list[float]:
    """Rewards of so many steps, each with what the sampler says after the one before."""
    rewards = []
    for step in range(steps):
        groups = fitrl.rollout(
            trainer.sampler(model), ["a", "b"], reward=low, group_size=group_size, max_new_tokens=6, seed=step
        )
        result = trainer.fit_rl(model, groups, learning_rate=rate, save_checkpoint=False)
        assert trainer.sampler(model).version == result.step == step + 1
        assert abs(result.metrics["mismatch/kl"]) < most_kl
        rewards.append(result.metrics["reward/mean"])
    return rewards


def by_transformers(folder, prompt, said, temperature=1.0) -> list[float]:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(said)[:, None]).squeeze(1).tolist()


# -- a policy that calls a tool -------------------------------------------------------------------------------------

# the bundled policy's turns, with tools and calls written as Hermes models write them
HERMES = """{%- if tools %}{{- '<|system|>' ~ (tools | length) ~ ' tool<|end|>' }}{%- endif %}
{%- for message in messages %}
    {{- '<|' ~ message['role'] ~ '|>' ~ (message['content'] or '') }}
    {%- for call in message['tool_calls'] or [] %}
        {{- '<tool_call>' ~ ({'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson) }}
        {{- '</tool_call>' }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "a + b",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
CALL, ANSWER = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>', "It is 3."
_ASKED = {"role": "user", "content": "1+2?"}
_CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
}


def teach_calling(folder: Path) -> None:
    """Teach a folder's policy to answer one question by a call, and the call's result by a sentence."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = HERMES
    tokenizer.save_pretrained(folder)
    prompt = tokenizer.apply_chat_template([_ASKED], tools=TOOLS, add_generation_prompt=True, tokenize=False)
    told = [_ASKED, _CALLED, {"role": "tool", "content": "3"}]
    again = tokenizer.apply_chat_template(told, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert again.startswith(prompt + CALL + "<|end|>")
    ids = torch.tensor([tokenizer(again + ANSWER + "<|end|>", add_special_tokens=False)["input_ids"]])
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(150):
        loss = network(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.save_pretrained(folder)


async def use_tool(base_url: str, *, stream: bool) -> list[dict[str, Any]]:
    """An agent as users have it: it calls what it is told to call, until it is told something."""
    messages: list[dict[str, Any]] = [dict(_ASKED)]
    async with openai.AsyncOpenAI(base_url=base_url, api_key="-", max_retries=0) as client:
        for _ in range(3):
            common = {"model": "m", "messages": messages, "tools": TOOLS, "max_tokens": 80, "temperature": 0.5}
            if stream:
                said = await _assembled(await client.chat.completions.create(**common, stream=True))
            else:
                answer = await client.chat.completions.create(**common)
                said = answer.choices[0].message.model_dump(exclude_none=True)
            messages.append(said)
            if not said.get("tool_calls"):
                return messages
            for call in said["tool_calls"]:
                given = json.loads(call["function"]["arguments"])
                result = str(given["a"] + given["b"])
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    raise AssertionError(f"the policy called its tool again and again: {messages}")


def check_tool_use(messages: list[dict[str, Any]], trajectory: fitrl.Trajectory, tokenizer: Any, folder: Path) -> None:
    """What the agent saw, and what was kept of it: one history, of the ids that were sampled."""
    asked, called, result, told = messages
    assert [call["function"]["name"] for call in called["tool_calls"]] == ["add"] and result["content"] == "3"
    assert told["content"] == ANSWER
    [history] = trajectory.histories()
    assert history.tools == TOOLS
    first, second = trajectory.completions()
    assert first.finish_reason == "tool_calls" and first.message["tool_calls"] == called["tool_calls"]
    for item, text in ((first, CALL), (second, ANSWER)):
        assert tokenizer.decode(item.token_ids) == text + "<|end|>" and item.full_support
        assert item.logprobs == pytest.approx(
            by_transformers(folder, item.prompt_ids, list(item.token_ids), 0.5), abs=1e-4
        )
    before = [*first.prompt_ids, *first.token_ids]
    assert list(second.prompt_ids[: len(before)]) == before
    [trained] = tokenize(trajectory, tokenizer).histories
    assert int(trained.mask.sum()) == len(first.token_ids) + len(second.token_ids)


async def _assembled(stream: Any) -> dict[str, Any]:
    """A message from the pieces of a stream."""
    said: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    async for event in stream:
        for choice in event.choices:
            said["content"] += choice.delta.content or ""
            for piece in choice.delta.tool_calls or []:
                call = calls.setdefault(
                    piece.index, {"id": piece.id, "type": "function", "function": {"name": "", "arguments": ""}}
                )
                call["function"]["name"] += piece.function.name or ""
                call["function"]["arguments"] += piece.function.arguments or ""
    return said | ({"tool_calls": list(calls.values())} if calls else {})
