"""Small builders of trajectories and groups, without a model, and comparisons that see everything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fitrl.data.completion import Completion
from fitrl.data.groups import Trajectory, TrajectoryGroup
from fitrl.data.histories import TokenHistory
from fitrl.data.samples import Sample

END = 260  # <|end|> of the bundled tokenizer


def user(content: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def completion(
    text: str = "7",
    *,
    token_ids: Sequence[int] | None = None,
    logprobs: Sequence[float] | None = None,
    temperature: float | None = 1.0,
    **fields: Any,
) -> Completion:
    """What the bundled policy would say: a byte is a token, and <|end|> ends it."""
    ids = (*text.encode(), END) if token_ids is None else tuple(token_ids)
    told = tuple(-0.1 * (i + 1) for i in range(len(ids))) if logprobs is None else tuple(logprobs)
    return Completion(
        message={"role": "assistant", "content": text},
        token_ids=ids,
        logprobs=told,
        temperature=temperature,
        **fields,
    )


def trajectory(text: str = "7", *, reward: float = 0.0, prompt: str = "3+4=", **fields: Any) -> Trajectory:
    """One question, one answer."""
    return Trajectory(messages_and_choices=[user(prompt), completion(text)], reward=reward, **fields)


def group(rewards: Iterable[float], **fields: Any) -> TrajectoryGroup:
    """Attempts at the same question, one per reward."""
    return TrajectoryGroup([trajectory(str(i), reward=reward) for i, reward in enumerate(rewards)], **fields)


def token_history(
    ids: Sequence[int],
    mask: Sequence[bool | int],
    *,
    logprobs: Sequence[float] | None = None,
    temperature: float = 1.0,
    full_support: bool = True,
) -> TokenHistory:
    """A history of token ids; logprobs -0.5 where sampled unless given per token."""
    sampled = torch.tensor([bool(flag) for flag in mask])
    told = torch.tensor(logprobs) if logprobs is not None else torch.full((len(ids),), -0.5)
    return TokenHistory(
        token_ids=torch.tensor(ids, dtype=torch.int64),
        mask=sampled,
        logprobs=told.float().masked_fill(~sampled, math.nan),
        temperature=torch.where(sampled, torch.tensor(temperature), torch.tensor(1.0)),
        versions=torch.where(sampled, 0, -1),
        full_support=full_support,
    )


def sample(*histories: TokenHistory, advantage: float = 1.0, reference: bool = False) -> Sample:
    """Histories as one sample; old logprobs are the rollout's, reference logprobs a little lower."""
    built = Sample(histories=list(histories), advantage=advantage)
    if reference:
        built.reference_logprobs = built.old_logprobs - 0.25
    return built


def token_trajectory(*histories: TokenHistory, reward: float = 0.0) -> Trajectory:
    """An attempt made without chat messages."""
    return Trajectory(token_histories=list(histories), reward=reward)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor) -> str:
    """Text of ids, special tokens shown."""
    return str(tokenizer.decode(list(map(int, ids)), skip_special_tokens=False))


def facts(value: Any) -> Any:
    """All that a value holds, comparable with ==: NaN equals NaN, 1 differs from 1.0, (1,) from [1]."""
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), tuple(value.shape), [repr(item) for item in value.flatten().tolist()])
    if isinstance(value, TrajectoryGroup):
        return ("group", {name: facts(getattr(value, name)) for name in TrajectoryGroup.__slots__})
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return (type(value).__name__, {field.name: facts(getattr(value, field.name)) for field in fields})
    if isinstance(value, dict):
        return {key: facts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (type(value).__name__, [facts(item) for item in value])
    return (type(value).__name__, repr(value))
