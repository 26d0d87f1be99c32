"""A stand-in for vLLM's server: its HTTP API, as 0.32 answers, over transformers. It can be told to misbehave."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from peft import PeftModel
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer

from fitrl_vllm.engine_side.fitrl_vllm_engine.channels import MemoryChannel
from fitrl_vllm.engine_side.fitrl_vllm_engine.pieces import Assembly


class StandIn:
    """Serves a folder's model on the loopback.

    Attributes:
        keeps_old_weights: answers that it took new ones, and did not; as some engines do.
        tells_raw_logprobs: of the distribution before temperature, which is vLLM's default.
        lives: while it is cleared it is not well, and does not answer what needs its engine.
        knows_transfer: has what `VLLMServer` adds, for weights without files.
        fails_receiving: stops in the middle of these.
        holds: completions wait while it is cleared.
        drops: so many next completions end with the connection.
        requests: every path and body that was asked, in order.
    """

    context = 512

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.adapter: Any = None
        self.keeps_old_weights = False
        self.tells_raw_logprobs = False
        self.lives = asyncio.Event()
        self.lives.set()
        self.knows_transfer = True
        self.fails_receiving = False
        self.holds = asyncio.Event()
        self.holds.set()
        self.drops = 0
        self.requests: list[tuple[str, Any]] = []
        self._socket: socket.socket | None = None

    def __enter__(self) -> StandIn:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        paths = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
            "/v1/load_lora_adapter": self._load_adapter,
            "/collective_rpc": self._rpc,
            "/init_weight_transfer_engine": self._join,
            "/start_weight_update": self._done,
            "/update_weights": self._receive,
            "/finish_weight_update": self._done,
            "/reset_prefix_cache": self._done,
            "/sleep": self._done,
            "/wake_up": self._done,
        }
        routes = [Route(path, self._kept(answer), methods=["POST"]) for path, answer in paths.items()]
        routes += [Route("/v1/models", self._models), Route("/health", self._health)]
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: self._server.run(sockets=[self._socket]), name="stand-in")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.holds.set()
        self.lives.set()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def asked(self, path: str) -> list[Any]:
        """Bodies of what was asked there."""
        return [body for asked, body in self.requests if asked == path]

    def _kept(self, answer: Any) -> Any:
        async def keep(request: Request) -> Any:
            await self.lives.wait()
            body = await request.json() if await request.body() else None
            self.requests.append((request.url.path, body))
            return await answer(body)

        return keep

    async def _models(self, request: Request) -> JSONResponse:
        cards = [{"id": "the-base", "parent": None, "max_model_len": self.context}]
        return JSONResponse({"data": cards + [{"id": "policy", "parent": "the-base"}] * (self.adapter is not None)})

    async def _health(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("", status_code=200 if self.lives.is_set() else 503)

    async def _done(self, body: Any) -> JSONResponse:
        return JSONResponse({"success": True})

    async def _load_adapter(self, body: Any) -> Any:
        assert body["load_inplace"] and body["lora_name"] == "policy"
        if not self.keeps_old_weights:
            base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float64)
            self.adapter = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        return PlainTextResponse("Success")  # as vLLM: no JSON

    async def _rpc(self, body: Any) -> JSONResponse:
        if body["method"] == "tell_of_weights":
            if not self.knows_transfer:
                return JSONResponse({"error": {"message": "no such method"}}, status_code=500)
            return JSONResponse({"results": [{"dtype": "float64", "device": "cpu"}]})
        assert body["method"] in ("reload_weights", "reload_weights_of_all_layers")
        if not self.keeps_old_weights:
            state: dict[str, Any] = {}
            for file in sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors")):
                state |= load_file(file)
            self.base.load_state_dict(state, strict=False)
        return JSONResponse({"results": [None]})

    async def _join(self, body: Any) -> JSONResponse:
        self._channel = MemoryChannel(body["init_info"]["socket"], torch.device("cpu"))
        return JSONResponse({})

    async def _receive(self, body: Any) -> JSONResponse:
        def read() -> dict[str, Any]:
            assembly = Assembly(torch.device("cpu"))
            state = {}
            for table, buffer in self._channel:
                state |= dict(assembly.take(table, buffer))
                if self.fails_receiving:
                    raise MemoryError
            return state

        assert body == {"update_info": {}}
        try:
            state = await asyncio.to_thread(read)
        except MemoryError:
            return JSONResponse({"error": {"message": "out of memory"}}, status_code=500)
        if not self.keeps_old_weights:
            self.base.load_state_dict(state, strict=False)
        return JSONResponse({})

    @torch.no_grad()
    def _logits(self, model: str, ids: list[int]) -> torch.Tensor:
        network = self.base if model == "the-base" else self.adapter
        return network(torch.tensor([ids])).logits[0]

    def _sample(
        self, body: dict[str, Any], ids: list[int], seed: int | None, most: int
    ) -> tuple[list[int], list[float]]:
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        said: list[int] = []
        logprobs: list[float] = []
        while len(said) < most and (not said or said[-1] != self.tokenizer.eos_token_id):
            raw = self._logits(body["model"], ids + said)[-1]
            logits = raw / body["temperature"] if body["temperature"] else raw
            if body["top_k"]:
                logits = logits.masked_fill(logits < logits.topk(body["top_k"]).values[-1], -torch.inf)
            likely = logits.softmax(-1)
            token = int(torch.multinomial(likely, 1, generator=generator) if body["temperature"] else likely.argmax())
            said.append(token)
            logprobs.append(float((raw if self.tells_raw_logprobs else logits).log_softmax(-1)[token]))
        return said, logprobs

    async def _completions(self, body: dict[str, Any]) -> Response:
        await self.holds.wait()
        ids = body["prompt"]
        if self.drops and "prompt_logprobs" not in body:
            self.drops -= 1
            return StreamingResponse(_cut_off(), headers={"content-length": "100"})
        if len(ids) + body["max_tokens"] > self.context:
            return JSONResponse({"error": {"message": "too long"}}, status_code=400)
        if "prompt_logprobs" in body:
            logprobs = self._logits(body["model"], ids).log_softmax(-1)
            found = [
                {str(token): {"logprob": float(row[token])}} for token, row in zip(ids[1:], logprobs, strict=False)
            ]
            return JSONResponse({"choices": [{"index": 0, "prompt_logprobs": [None, *found]}]})
        choices = []
        for index in range(body["n"]):
            seed = None if body["seed"] is None else body["seed"] + index
            said, logprobs = self._sample(body, ids, seed, body["max_tokens"])
            text, reason = self.tokenizer.decode(said, skip_special_tokens=True), "length"
            if said[-1] == self.tokenizer.eos_token_id:
                reason = "stop"
            choices.append(
                {
                    "index": index,
                    "text": text,
                    "finish_reason": reason,
                    "token_ids": said,
                    "logprobs": {"token_logprobs": logprobs},
                }
            )
        return JSONResponse({"choices": choices[::-1]})

    async def _chat(self, body: dict[str, Any]) -> JSONResponse:
        ids = self.tokenizer.apply_chat_template(
            [_with_objects(message) for message in body["messages"]],
            tools=body.get("tools"),
            add_generation_prompt=True,
            return_dict=False,
        )
        said, logprobs = self._sample(body, list(ids), body.get("seed"), body.get("max_tokens", 8))
        text = self.tokenizer.decode(said, skip_special_tokens=True)
        content = [{"token": f"token_id:{token}", "logprob": p} for token, p in zip(said, logprobs, strict=True)]
        message, reason = {"role": "assistant", "content": text, "tool_calls": [], "refusal": None}, "stop"
        calls = [json.loads(call) for call in _CALL.findall(text)]
        if calls:
            reason = "tool_calls"
            message |= {"content": None, "tool_calls": [_call(number, call) for number, call in enumerate(calls)]}
        return JSONResponse(
            {
                "id": "chat",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "prompt_token_ids": list(ids),
                "usage": {
                    "prompt_tokens": len(ids),
                    "completion_tokens": len(said),
                    "total_tokens": len(ids) + len(said),
                },
                "choices": [
                    {
                        "index": 0,
                        "message": message,
                        "finish_reason": reason,
                        "token_ids": said,
                        "logprobs": {"content": content},
                    }
                ],
            }
        )


_CALL = re.compile("<tool_call>(.*?)</tool_call>")


def _call(number: int, call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
    return {"id": f"call-{number}", "type": "function", "function": function}


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message as vLLM hands it to chat templates: arguments of calls are objects."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or []
    ]
    return message | ({"tool_calls": calls} if calls else {})


async def _cut_off() -> Any:
    yield b"{"
    raise ConnectionAbortedError
