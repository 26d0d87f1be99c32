"""Bodies of `/chat/completions`: OpenAI's, as far as a trained model can honour them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from fitrl_serverless.wire.base import ClosedModel, WireModel
from fitrl_serverless.wire.groups import Choice, Message
from fitrl_serverless.wire.numbers import Count, TokenId


class ChatRequest(ClosedModel):
    """POST /chat/completions. A key that is not here would have no effect, and is an error.

    Attributes:
        model: `wandb-artifact:///entity/project/name[:stepN]`; without a step, the newest.
        messages: the conversation, rendered by the model's chat template.
        prompt_token_ids: the rendered conversation itself, in place of `messages`. fitrl's own key.
        tools: offered to the model, as chat templates take them.
        n: completions.
        max_tokens: longest completion; `max_completion_tokens` is its newer name.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens with this probability.
        top_k: keep so many tokens. vLLM's key.
        stop: strings that end a completion.
        seed: makes the completions repeatable.
        logprobs: whether choices carry logprobs; their tokens are `token_id:N`.
        return_tokens_as_token_ids: vLLM's key; tokens are `token_id:N` here in any case.
        stream: only false.
        user: an end user's name, for the caller's own records; read by nobody here.
    """

    model: Annotated[str, Field(min_length=1, max_length=600)]
    messages: list[Message] = []
    prompt_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    tools: list[dict[str, JsonValue]] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: Literal[False] | None = None
    user: str | None = None


class Usage(WireModel):
    """Tokens read and sampled."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class ChatCompletion(WireModel):
    """The answer, as OpenAI's clients read it.

    Attributes:
        id: of the answer.
        object: always this word.
        created: seconds since 1970.
        model: the artifact that answered, with its step.
        choices: each with logprobs, if asked for, and with the prompt's ids, temperature and policy version.
        usage: tokens.
        policy_version: step of the weights that answered. fitrl's own key.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    policy_version: int | None = None
