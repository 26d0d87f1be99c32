"""Histories: one conversation as messages and completions, or as the tokens that the policy saw.

The words are those of `groups.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fitrl.data.completion import Completion, Message, OpenAIChoice, Tool
from fitrl.data.json_lines import number_from_json, number_to_json
from fitrl.errors import DataError


@dataclass(slots=True, kw_only=True, eq=False)
class TokenHistory:
    """One history as the policy saw it, token by token; shifting to predictions happens in packing.

    Attributes:
        token_ids: [T] int64.
        mask: [T] bool; True where the policy predicted the token and learns from it.
        logprobs: [T] float32 rollout logprobs; NaN where there is none.
        temperature: [T] float32 sampling temperature; 1 where nothing was sampled.
        versions: [T] int64 policy version that sampled the token; -1 where nothing was sampled.
        full_support: False if any token was sampled with top_p < 1 or top_k.
    """

    token_ids: Tensor
    mask: Tensor
    logprobs: Tensor
    temperature: Tensor
    versions: Tensor
    full_support: bool = True

    def __post_init__(self) -> None:
        for name in ("mask", "logprobs", "temperature", "versions"):
            shape = getattr(self, name).shape
            if shape != self.token_ids.shape or len(shape) != 1:
                raise DataError(
                    f"{name} has shape {tuple(shape)}, token_ids {tuple(self.token_ids.shape)}; both must be [T]"
                )
        if self.mask.dtype != torch.bool or self.token_ids.dtype != torch.int64:
            raise DataError(f"mask must be bool and token_ids int64, got {self.mask.dtype} and {self.token_ids.dtype}")

    def __len__(self) -> int:
        return self.token_ids.numel()

    @classmethod
    def all_trained(cls, token_ids: Sequence[int]) -> TokenHistory:
        """Token ids that nobody sampled, all but the first to be predicted at temperature 1: to score them, say."""
        tokens = torch.tensor(list(token_ids))
        return cls(
            token_ids=tokens,
            mask=torch.arange(len(tokens)) > 0,
            logprobs=torch.zeros(len(tokens)),
            temperature=torch.ones(len(tokens)),
            versions=torch.zeros_like(tokens),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "token_ids": self.token_ids.tolist(),
            "mask": self.mask.tolist(),
            "logprobs": [number_to_json(value) for value in self.logprobs.tolist()],
            "temperature": [number_to_json(value) for value in self.temperature.tolist()],
            "versions": self.versions.tolist(),
            "full_support": self.full_support,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TokenHistory:
        """Inverse of `to_dict`."""
        return cls(
            token_ids=torch.tensor(data["token_ids"], dtype=torch.int64),
            mask=torch.tensor(data["mask"], dtype=torch.bool),
            logprobs=_column(data["logprobs"]),
            temperature=_column(data["temperature"]),
            versions=torch.tensor(data["versions"], dtype=torch.int64),
            full_support=data["full_support"],
        )


@dataclass(slots=True, init=False)
class History:
    """One conversation: messages and completions in order, and the tools that were offered."""

    messages_and_choices: list[Message | Completion | OpenAIChoice]
    tools: list[Tool] | None
    temperature: float | None

    def __init__(
        self,
        *,
        messages_and_choices: Sequence[Message | Completion | OpenAIChoice] = (),
        tools: list[Tool] | None = None,
        temperature: float | None = None,
    ) -> None:
        self.messages_and_choices = [*read_messages(messages_and_choices, temperature)]
        self.tools = tools
        self.temperature = temperature

    def items(self) -> list[Message | Completion]:
        """Messages and completions; choices that were appended since are read."""
        return read_messages(self.messages_and_choices, self.temperature)

    def messages(self) -> list[Message]:
        """The conversation as plain chat messages."""
        return [item.message if isinstance(item, Completion) else item for item in self.items()]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "messages_and_choices": [message_to_json(item) for item in self.items()],
            "tools": self.tools,
            "temperature": self.temperature,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """Inverse of `to_dict`."""
        return cls(
            messages_and_choices=[message_from_json(item) for item in data["messages_and_choices"]],
            tools=data["tools"],
            temperature=data["temperature"],
        )


def read_messages(items: Sequence[Any], temperature: float | None) -> list[Message | Completion]:
    """Read OpenAI choices into completions; keep dicts and completions."""
    read: list[Message | Completion] = []
    for item in items:
        if isinstance(item, dict | Completion):
            read.append(item)
        elif isinstance(item, OpenAIChoice):
            read.append(Completion.from_choice(item, temperature=temperature))
        else:
            raise DataError(
                f"a history takes message dicts, Completion or OpenAI Choice objects, got {type(item).__name__}"
            )
    return read


def message_to_json(item: Message | Completion) -> dict[str, Any]:
    """JSON-ready form, which says which of the two it is."""
    return {"completion": item.to_dict()} if isinstance(item, Completion) else {"message": item}


def message_from_json(item: dict[str, Any]) -> Message | Completion:
    """Inverse of `message_to_json`."""
    if "completion" in item:
        return Completion.from_dict(item["completion"])
    message: Message = item["message"]
    return message


def _column(values: Sequence[float | str]) -> Tensor:
    return torch.tensor([number_from_json(value) for value in values], dtype=torch.float32)
