"""A whole chat completion as the stream of events that clients with `stream=True` read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def events(answer: Mapping[str, Any], *, with_usage: bool) -> Iterator[str]:
    """Give what each choice says in one event, how it ended in a second, as OpenAI's API does piece by piece.

    Args:
        answer: of `/chat/completions`, without `stream`.
        with_usage: end with an event that counts tokens, as `stream_options={"include_usage": True}` asks.
    """
    common = {name: answer[name] for name in ("id", "created", "model") if name in answer}
    common["object"] = "chat.completion.chunk"
    for choice in answer["choices"]:
        said = {name: value for name, value in choice["message"].items() if value not in (None, [])}
        if "tool_calls" in said:
            said["tool_calls"] = [{"index": index} | call for index, call in enumerate(said["tool_calls"])]
        index = choice.get("index", 0)
        pieces = (
            {"index": index, "delta": said, "logprobs": choice.get("logprobs"), "finish_reason": None},
            {"index": index, "delta": {}, "finish_reason": choice["finish_reason"]},
        )
        for piece in pieces:
            yield _event(common | {"choices": [piece]})
    if with_usage:
        yield _event(common | {"choices": [], "usage": answer.get("usage")})
    yield "data: [DONE]\n\n"


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
