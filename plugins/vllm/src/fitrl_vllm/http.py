"""`ServerEngine`: an engine behind vLLM's HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tenacity

from fitrl.errors import InvalidArgumentError
from fitrl_vllm.engine import ADAPTER, Answer, Request, Revived
from fitrl_vllm.errors import EngineDiedError, EngineError, EngineTimeoutError
from fitrl_vllm.server import VLLMServer

RELOAD = "reload_weights_of_all_layers"
TELL = "tell_of_weights"
"""What `fitrl_vllm_engine.worker` adds to the engine's workers."""

_LOOK_S = 2.0
_IDLE_S = 1.0
"""After which a connection is not used again: vLLM closes it after 5 s, which are httpx's default, too, so that a
request could meet the end of its connection."""
_DEAD = "EngineCore"  # the server still answers when its engine is gone: with status 500, and this name


class ServerEngine:
    """Talk to a server.

    Args:
        server: its base URL, or one that we started ourselves and may start again.
        timeout_s: longest wait for one answer.
        api_key: sent as bearer token; None: none.
    """

    def __init__(self, server: str | VLLMServer, *, timeout_s: float, api_key: str | None = None) -> None:
        self._server = server if isinstance(server, VLLMServer) else None
        self._url = server.url if isinstance(server, VLLMServer) else server.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client: httpx.AsyncClient | None = None
        self._base: str | None = None
        self._context = 0
        self._loaded_in: int | None = None  # which start of our own server has taken weights

    async def complete(self, request: Request, *, adapter: bool) -> list[Answer]:
        """Sample n completions by one request."""
        model, room = await self.model(adapter), self._context - len(request.prompt_ids)
        if room < 1:
            raise InvalidArgumentError(
                f"the prompt has {len(request.prompt_ids)} tokens, the engine's context is {self._context}; shorten it"
            )
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(request.prompt_ids),
            "n": request.n,
            "max_tokens": min(request.max_new_tokens, room),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0 if request.top_k is None else request.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop": list(request.stop),
            "seed": request.seed,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        answer = await self.post("/v1/completions", body)
        return [
            Answer(
                token_ids=tuple(choice["token_ids"]),
                logprobs=tuple(choice["logprobs"]["token_logprobs"]),
                text=choice["text"],
                finish_reason=choice["finish_reason"],
            )
            for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        ]

    async def score(self, token_ids: Sequence[int], *, adapter: bool) -> list[float]:
        """Logprobs of a prompt."""
        body = {
            "model": await self.model(adapter),
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        [choice] = (await self.post("/v1/completions", body))["choices"]
        found = zip(token_ids[1:], choice["prompt_logprobs"][1:], strict=True)
        return [float(by_id[str(token)]["logprob"]) for token, by_id in found]

    async def load_adapter(self, folder: Path) -> None:
        """Load it in place. A folder that was not loaded before: cached prompts of an old one would stay in use."""
        body = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
        with self._loading():
            await self._order("/v1/load_lora_adapter", body)

    async def load_weights(self, folder: Path) -> None:
        """Load them by each worker, and forget the prompts that were computed with others."""
        method = RELOAD if self._server is not None else "reload_weights"
        with self._loading():
            await self._order("/collective_rpc", {"method": method, "kwargs": {"weights_path": str(folder)}})
            await self._forget_prompts()

    async def tell_of_weights(self) -> list[dict[str, str]]:
        """Asked of what `fitrl_vllm_engine` adds to the workers."""
        try:
            told: list[dict[str, str]] = (await self._order("/collective_rpc", {"method": TELL}))["results"]
        except EngineDiedError:
            raise
        except EngineError as error:
            raise EngineError(
                "the engine does not know how weights come without files: let VLLMServer start it, or take "
                f"transfer='folder'. {error}"
            ) from error
        return told

    async def receive(self, init_info: dict[str, Any] | None) -> None:
        """By vLLM's weight-transfer API."""
        with self._loading():
            if init_info is not None:
                await self._order("/init_weight_transfer_engine", {"init_info": init_info})
            await self._order("/start_weight_update", None)
            await self._order("/update_weights", {"update_info": {}})
            await self._order("/finish_weight_update", {})
            await self._forget_prompts()

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Remember which start of our own server has taken the weights, once it has."""
        self._loaded_in = None
        started = None if self._server is None else self._server.num_starts  # another sampler may start it meanwhile
        yield
        self._loaded_in = started

    async def _forget_prompts(self) -> None:
        answer = await self._order("/reset_prefix_cache", None)
        if not answer.get("success", True):
            raise EngineError(f"{self._url} could not forget the prompts it computed with the old weights: {answer}")

    async def sleep(self) -> None:
        """Level 1: weights to the host's memory, cached prompts dropped."""
        await self._order("/sleep?level=1&mode=wait", None)

    async def wake(self) -> None:
        """Take weights and cache back to the device."""
        await self._order("/wake_up", None)

    async def revive(self, *, is_dead: bool) -> Revived:
        """Start our own server again, unless it is well; wait for anybody's.

        Where it is well, other completions may be under way over connections that hold.
        """
        if self._server is not None:
            if is_dead or not await self._is_well():
                await self.aclose()
                await asyncio.to_thread(self._server.start)
            return "as it was" if self._server.num_starts == self._loaded_in else "perhaps anew"
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_result(lambda well: not well),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5.0),
            stop=tenacity.stop_after_delay(self._timeout_s),
            retry_error_callback=lambda state: False,
        )
        return "perhaps anew" if await retrying(self._is_well) else "gone"

    async def _is_well(self) -> bool:
        try:
            return (await self._connection().get("/health")).is_success
        except httpx.TransportError:
            return False

    async def aclose(self) -> None:
        """Close the connections; the next request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def post(self, path: str, body: Any) -> Any:
        """Ask by POST; see `_ask`."""
        return await self._ask("POST", path, body)

    async def _order(self, path: str, body: Any) -> Any:
        """Ask by POST for what all workers do; a server whose engine has died has been seen not to answer at all.

        Raises:
            EngineDiedError: also if it is not well before it has answered.
        """
        asking = asyncio.create_task(self.post(path, body))
        try:
            while True:
                await asyncio.wait({asking}, timeout=_LOOK_S)
                if asking.done():
                    return asking.result()
                if not await self._is_well():
                    raise EngineDiedError(f"{self._url} died while it was asked for {path}", is_certain=True)
        finally:
            asking.cancel()

    async def _ask(self, method: str, path: str, body: Any) -> Any:
        """Ask, and read what is answered.

        Raises:
            EngineTimeoutError: no answer in time.
            EngineError: an answer that says no.
            EngineDiedError: no connection, or the server's engine is dead.
        """
        try:
            response = await self._connection().request(method, path, json=body)
        except httpx.PoolTimeout as error:
            raise EngineTimeoutError(f"{self._url}{path}: no connection was free in {self._timeout_s:g} s") from error
        except httpx.ReadTimeout as error:
            raise EngineTimeoutError(f"{self._url}{path} did not answer within {self._timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise EngineDiedError(f"{self._url}{path}: {type(error).__name__} {error}") from error
        if response.is_server_error and (_DEAD in response.text or not await self._is_well()):
            raise EngineDiedError(f"{self._url}{path} answered {response.text[:500]}", is_certain=True)
        if response.is_error:
            raise EngineError(f"{self._url}{path} answered {response.status_code}: {response.text[:500]}")
        return response.json() if "json" in response.headers.get("content-type", "") else {}

    async def model(self, adapter: bool) -> str:
        """Name of the base model, or of the adapter; what the server says of it is asked once."""
        if self._base is None:
            cards = (await self._ask("GET", "/v1/models", None))["data"]
            card = next(card for card in cards if not card.get("parent"))
            self._base, self._context = str(card["id"]), int(card["max_model_len"])
        return ADAPTER if adapter else self._base

    def _connection(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                base_url=self._url,
                headers=self._headers,
                timeout=httpx.Timeout(self._timeout_s, connect=10.0),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=_IDLE_S),
                trust_env=False,
            )
        return self._client
