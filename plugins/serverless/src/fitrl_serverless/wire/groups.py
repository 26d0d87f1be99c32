"""Groups on the wire: chat messages and OpenAI choices, whose logprobs name their token as `token_id:N`.

The keys of the published API come first in each model. The others are fitrl's own and keep what training needs to be
exact (temperature, version and prompt ids of each completion); a service that does not know them loses nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import ConfigDict, Field, JsonValue

from fitrl_serverless.wire.base import WireModel
from fitrl_serverless.wire.numbers import Number, TokenId


class Message(WireModel):
    """A chat message; further keys (`tool_calls`, `name`, ...) are kept."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    role: str = Field(min_length=1)
    content: JsonValue = None


class TokenLogprob(WireModel):
    """A sampled token: `token_id:N`, or its text with `bytes`; the logprob is of the distribution sampled from."""

    token: str
    logprob: Number
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    top_logprobs: list[JsonValue] = []


class ChoiceLogprobs(WireModel):
    """OpenAI's `ChoiceLogprobs`."""

    content: list[TokenLogprob] | None = None
    refusal: list[JsonValue] | None = None


class Choice(WireModel):
    """OpenAI's `Choice`: something that the policy said.

    Attributes:
        finish_reason: why sampling ended.
        index: place among the choices of one request.
        logprobs: of the sampled tokens.
        message: the assistant's message.
        token_ids: [T] sampled ids, where there are no logprobs to name them.
        prompt_token_ids: ids that it was sampled after; None: the chat template says.
        temperature: it was sampled with; None: the history's.
        policy_version: that sampled it; None: the trajectory's.
        full_support: False after top_p < 1 or top_k.
    """

    finish_reason: str
    index: int = 0
    logprobs: ChoiceLogprobs | None = None
    message: dict[str, JsonValue]
    token_ids: list[TokenId] | None = None
    prompt_token_ids: list[TokenId] | None = None
    temperature: Number | None = None
    policy_version: Annotated[int, Field(ge=-1, le=2**53)] | None = None
    full_support: bool = True


Item = Annotated[Choice | Message, Field(union_mode="left_to_right")]


class History(WireModel):
    """A further conversation of the same attempt."""

    messages_and_choices: list[Item]
    tools: list[dict[str, JsonValue]] | None = None
    temperature: Number | None = None


class TokenHistory(WireModel):
    """An attempt as token ids; columns of one length, see `fitrl.TokenHistory`."""

    token_ids: list[TokenId]
    mask: list[bool]
    logprobs: list[Number]
    temperature: list[Number]
    versions: list[Annotated[int, Field(ge=-1, le=2**53)]]
    full_support: bool = True


class ExceptionRecord(WireModel):
    """A rollout that raised."""

    type: str
    message: str
    traceback: str = ""


class Trajectory(WireModel):
    """One attempt with its reward."""

    messages_and_choices: list[Item] = []
    tools: list[dict[str, JsonValue]] | None = None
    additional_histories: list[History] = []
    reward: Number
    initial_policy_version: Annotated[int, Field(ge=-1, le=2**53)] | None = None
    final_policy_version: Annotated[int, Field(ge=-1, le=2**53)] | None = None
    metrics: dict[str, Number | bool] = {}
    metadata: dict[str, JsonValue] = {}
    logs: list[str] = []
    temperature: Number | None = None
    token_histories: list[TokenHistory] = []
    exceptions: list[ExceptionRecord] = []


class Group(WireModel):
    """Attempts at one task."""

    trajectories: list[Trajectory]
    metadata: dict[str, JsonValue] = {}
    metrics: dict[str, Number | bool] = {}
    logs: list[str] = []
    exceptions: list[ExceptionRecord] = []


def groups_json(groups: Iterable[Group]) -> Iterator[bytes]:
    """The JSON of a list of groups, group by group."""
    yield b"["
    for index, group in enumerate(groups):
        yield (b"," if index else b"") + group.model_dump_json().encode()
    yield b"]"


def plain(message: Message) -> dict[str, Any]:
    """The message as it came."""
    return message.model_dump(exclude_unset=True)
