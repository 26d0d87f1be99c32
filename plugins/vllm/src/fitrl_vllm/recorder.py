"""`Recorder`: an OpenAI-compatible address for agents that exist already; what they ask becomes trajectories.

An agent is given a base URL of its own, and nothing else. Each chat completion that it asks for goes to the engine as
it is, with token ids and logprobs asked for beside; each is kept with the messages before it. A client that asks for a
stream gets one, once the completion is whole: an engine that dies on it is asked again, which half a stream forbids.
"""

from __future__ import annotations

import secrets
import socket
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fitrl import Completion, History, Trajectory
from fitrl.errors import DataError, FitRLError, InvalidArgumentError, SamplerError
from fitrl_vllm.http import ServerEngine
from fitrl_vllm.sampler import VLLMSampler
from fitrl_vllm.streaming import events

# what an agent leaves out: engines take some of it from the model's folder else
_PLAIN: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# what changes the distribution beside the temperature, unless it is this
_NEUTRAL = _PLAIN | {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "structured_outputs": None,
    "bad_words": [],
    "allowed_token_ids": None,
    "min_tokens": 0,
    "ignore_eos": False,
}


class Recording:
    """What one agent has asked so far.

    Attributes:
        base_url: for `openai.AsyncOpenAI(base_url=..., api_key="-")`; nobody else knows it.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self._asked: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None, Completion]] = []

    def add(self, asked: Mapping[str, Any], prompt_ids: Sequence[int], choice: Mapping[str, Any], version: int) -> None:
        """Keep a choice of the engine's answer with what was asked."""
        told = {name: value for name, value in choice["message"].items() if value not in (None, [])}
        full_support = all(
            asked.get(name) in (None, neutral) for name, neutral in _NEUTRAL.items() if name != "temperature"
        )
        forced = asked.get("tool_choice") not in (None, "auto", "none")
        temperature = asked.get("temperature")
        completion = Completion(
            message={"role": "assistant", "content": "", **told},
            token_ids=tuple(choice["token_ids"]),
            logprobs=tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"]),
            temperature=1.0 if temperature is None else float(temperature),
            prompt_ids=tuple(prompt_ids),
            finish_reason=str(choice["finish_reason"]),
            version=version,
            full_support=full_support and not forced,
        )
        self._asked.append((list(asked["messages"]), asked.get("tools"), completion))

    def __len__(self) -> int:
        return len(self._asked)

    def trajectory(self, reward: float = 0.0) -> Trajectory:
        """Everything that was said, as a trajectory: a conversation that went on is one history, another one a further.

        Raises:
            DataError: nothing was asked.
        """
        histories: list[tuple[list[Any], list[dict[str, Any]] | None]] = []
        for messages, tools, completion in self._asked:
            for index, (history, with_tools) in enumerate(histories):
                if with_tools == tools and _continues(messages, history):
                    said = [*history, *messages[len(history) :], completion]
                    histories[index] = (said, tools)
                    break
            else:
                histories.append(([*messages, completion], tools))
        if not histories:
            raise DataError(f"nothing was asked at {self.base_url}")
        (first, tools), *others = histories
        return Trajectory(
            messages_and_choices=first,
            tools=tools,
            additional_histories=[History(messages_and_choices=items, tools=given) for items, given in others],
            reward=reward,
        )


class Recorder:
    """Serve OpenAI's chat completions on the loopback, over a sampler's engine.

        with Recorder(sampler) as recorder:
            async def attempt(task):
                recording = recorder.record()
                await my_agent(openai.AsyncOpenAI(base_url=recording.base_url, api_key="-"), task)
                return recording.trajectory(reward=...)

    An engine renders earlier turns by the chat template. Where that gives other ids than the policy had sampled, the
    history is split there, and counted, when it is trained on.

    Args:
        sampler: over a server; an engine in this process has no chat API.

    Raises:
        InvalidArgumentError: the sampler's engine is in this process.
    """

    def __init__(self, sampler: VLLMSampler) -> None:
        if not isinstance(sampler.engine, ServerEngine):
            raise InvalidArgumentError(
                "Recorder needs a VLLMSampler over a server: an engine in this process has no chat"
            )
        self._sampler, self._engine = sampler, sampler.engine
        self._recordings: weakref.WeakValueDictionary[str, Recording] = weakref.WeakValueDictionary()
        self._socket: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._serving: Future[None] | None = None

    def record(self) -> Recording:
        """A new address, for one attempt; it answers as long as the recording is held."""
        if self._socket is None:
            raise SamplerError("this recorder does not serve: use it as a context manager")
        key = secrets.token_urlsafe(16)
        recording = Recording(f"http://127.0.0.1:{self._socket.getsockname()[1]}/{key}/v1")
        self._recordings[key] = recording
        return recording

    def __enter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        app = Starlette(routes=[Route("/{key}/v1/chat/completions", self._chat, methods=["POST"])])
        settings = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off")
        self._server = uvicorn.Server(settings)
        self._serving = self._sampler.spawn(self._server.serve(sockets=[self._socket]))
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server is not None and self._serving is not None and self._socket is not None
        self._server.should_exit = True
        self._serving.result()
        self._socket.close()
        self._socket = None

    async def _chat(self, request: Request) -> Response:
        recording = self._recordings.get(request.path_params["key"])
        if recording is None:
            return _refusal(404, "no such recording: its attempt is over")
        try:
            asked = await request.json()
        except ValueError:
            return _refusal(400, "the body is no JSON")
        if not isinstance(asked, dict) or not isinstance(asked.get("messages"), list):
            return _refusal(400, "messages is missing")
        streams, how = asked.pop("stream", None), asked.pop("stream_options", None) or {}
        if not isinstance(how, dict) or (how and not streams):
            return _refusal(400, "stream_options is a stream's, and an object")
        try:
            async with self._sampler.turn() as version:
                if any(asked.get(name) not in (None, plain) for name, plain in _PLAIN.items()):
                    await self._sampler.check_logprobs()
                answer = await self._sampler.surviving(lambda: self._forward(asked))
        except FitRLError as error:
            return _refusal(502, str(error))
        for choice in answer["choices"]:
            recording.add(asked, answer["prompt_token_ids"], choice, version)
        if streams:
            with_usage = bool(how.get("include_usage"))
            return StreamingResponse(events(answer, with_usage=with_usage), media_type="text/event-stream")
        return JSONResponse(answer)

    async def _forward(self, asked: dict[str, Any]) -> Any:
        body = _PLAIN | {name: value for name, value in asked.items() if value is not None}
        body |= {"logprobs": True, "return_token_ids": True}
        body["model"] = await self._engine.model(self._sampler.has_adapter)
        return await self._engine.post("/v1/chat/completions", body)


def _continues(messages: Sequence[dict[str, Any]], history: Sequence[Any]) -> bool:
    """Whether a request goes on after the end of a history."""
    plain = [item.message if isinstance(item, Completion) else item for item in history]
    return len(messages) > len(plain) and [*map(_said, messages[: len(plain)])] == [*map(_said, plain)]


def _said(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what clients add or leave out."""
    return {
        name: value for name, value in message.items() if value and name in ("role", "content", "tool_calls", "name")
    }


def _refusal(status: int, words: str) -> JSONResponse:
    return JSONResponse({"error": {"message": words, "type": "fitrl"}}, status_code=status)
