"""`VLLMSampler`: fitrl's sampler on a vLLM engine.

All talk with the engine happens on one event loop, on a thread of the sampler's own, whichever loop asks. New weights
wait until no completion is under way, and completions wait until the new weights are proven, so each has one version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, get_args

from torch import Tensor

from fitrl import Completion, TrainableModel, load_tokenizer
from fitrl.errors import InvalidArgumentError, SamplerError
from fitrl.rollout.own_loop import OwnLoop
from fitrl.rollout.sampler import Score, check_sampling
from fitrl_vllm.engine import Answer, Engine, Request
from fitrl_vllm.errors import EngineError
from fitrl_vllm.http import ServerEngine
from fitrl_vllm.probe import Probe
from fitrl_vllm.served import ServedWeights
from fitrl_vllm.server import VLLMServer
from fitrl_vllm.transfer import Way

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")


class VLLMSampler:
    """Sample with vLLM; `LocalTrainer(sampler=VLLMSampler(...))` keeps it at the trainer's weights.

    Adapters are exchanged in place. Full weights are written to a folder in buckets, which the engine loads, or come in
    buckets from memory to memory.
    After each exchange the logprobs of a fixed text are compared with the trainer's, because engines have been seen to
    accept weights and keep old ones: `version` changes only if they agree. Until then, and after an exchange that
    failed, nothing is sampled.

    With several ranks each makes one, for the same engine; rank 0's hands over the weights.

    Args:
        model: what is trained; its base model is what the engine was started with, and gives the tokenizer.
        engine: a server's URL, a server that we run ourselves (and start again, with the newest weights, if it dies),
            or an engine in this process.
        timeout_s: longest wait for one answer of a server, and of an exchange for completions under way.
        tolerance: most that trainer and engine may differ in the mean over the probe's tokens, in nats. 0.05 fits
            bfloat16; float32 on both sides agrees to 1e-4.
        transfer: how all weights come to the engine. "folder" works with any engine that sees `transfer_dir`, and one
            that dies is started again with the newest weights from there. "memory": by memory that the engine opens, of
            the trainer's GPU (CUDA IPC) or on CPUs of the host; both have to be on one machine, with Linux. "nccl":
            between GPUs, of any machines. Without files an engine that dies takes the weights along: completions are
            refused then until newer ones are handed over. Adapters are small, and go by folder.
        transfer_dir: where weights are handed over: the engine has to see the same folder. None: a temporary one. One
            in memory (`/dev/shm`) spares the disk; the system holds what was just written in memory anyway.
        api_key: of the server.

    Raises:
        InvalidArgumentError: an argument out of range, or a transfer that adapters do not have.
        UnsupportedError: a transfer that this system does not have.
    """

    def __init__(
        self,
        model: TrainableModel,
        engine: str | VLLMServer | Engine,
        *,
        timeout_s: float = 600.0,
        tolerance: float = 0.05,
        transfer: Way = "folder",
        transfer_dir: str | Path | None = None,
        api_key: str | None = None,
    ) -> None:
        for name, value in (("timeout_s", timeout_s), ("tolerance", tolerance)):
            if not 0 < value < float("inf"):
                raise InvalidArgumentError(f"{name} must be a positive number, got {value}")
        if api_key is not None and not isinstance(engine, str | VLLMServer):
            raise InvalidArgumentError("api_key is a server's; an engine in this process has none")
        if transfer not in get_args(Way):
            raise InvalidArgumentError(f"transfer must be one of {', '.join(get_args(Way))}, got {transfer!r}")
        if model.lora is not None and transfer != "folder":
            raise InvalidArgumentError(
                f"transfer={transfer!r} is for all weights, and adapters are trained: leave it out"
            )
        self.model = model
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model.base_model)
        self.timeout_s = timeout_s
        self.engine: Engine = (
            ServerEngine(engine, timeout_s=timeout_s, api_key=api_key)
            if isinstance(engine, str | VLLMServer)
            else engine
        )
        self._loop = OwnLoop("fitrl-vllm")
        self._probe = Probe(self.tokenizer, tolerance)
        self._weights = ServedWeights(
            self.engine,
            self._loop,
            self._probe,
            lora=model.lora,
            transfer=transfer,
            transfer_dir=transfer_dir,
            timeout_s=timeout_s,
        )
        self._closed = False
        self._checking = asyncio.Lock()
        self._tells_temperature: bool | None = None

    @property
    def version(self) -> int:
        """Policy version of the weights that were proven last."""
        return self._weights.version

    @property
    def is_open(self) -> bool:
        """Whether completions start at once, and do not wait for an exchange of weights or for `wake`."""
        return self._weights.is_open

    async def sample(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Completion]:
        """Sample n completions of one prompt, see `fitrl.Sampler`.

        Raises:
            InvalidArgumentError: an argument out of range.
            EngineError: the engine refused, is gone, or tells logprobs of another distribution.
            EngineTimeoutError: it did not answer in time.
            StaleWeightsError: the last exchange of weights failed.
        """
        if not len(prompt_ids):
            raise InvalidArgumentError("prompt_ids is empty: a completion needs at least one token before it")
        check_sampling(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop)
        request = Request(
            prompt_ids=tuple(int(token) for token in prompt_ids),
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=tuple(stop),
            seed=None if seed is None else seed % 2**63,
        )
        self._refuse_if_closed()
        return await asyncio.wrap_future(self._loop.spawn(self._sample(request)))

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take weights from a trainer that cannot be asked for scores: that they answer is not proven then."""
        self._refuse_if_closed()
        self._weights.exchange(weights, version, None)

    def update_proven(self, weights: Iterable[tuple[str, Tensor]], version: int, score: Score) -> None:
        """Take weights, and prove that they answer; see `fitrl.rollout.sampler.ProvesWeights`.

        Raises:
            StaleWeightsError: other weights answer.
        """
        self._refuse_if_closed()
        self._weights.exchange(weights, version, score)

    def sleep(self) -> None:
        """Give the device's memory to a trainer that shares it; completions wait until `wake`."""
        self._refuse_if_closed()
        self._loop.wait_for(self._weights.sleep())

    def wake(self) -> None:
        """Take the memory back and go on."""
        self._refuse_if_closed()
        self._loop.wait_for(self._weights.wake())

    def close(self) -> None:
        """End the thread and close connections; a server stays, whoever started it ends it."""
        self._closed = True
        self._loop.close(self.engine.aclose)
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- completions --------------------------------------------------------------------------------------------

    def turn(self) -> AbstractAsyncContextManager[int]:
        """The version that answers while the block runs; on the sampler's loop."""
        return self._weights.turn()

    async def _sample(self, request: Request) -> list[Completion]:
        async with self.turn() as version:
            if request.temperature not in (0.0, 1.0) or request.top_p < 1.0 or request.top_k is not None:
                await self.check_logprobs()
            answers = await self.surviving(lambda: self.engine.complete(request, adapter=self.has_adapter))
        if len(answers) != request.n or any(len(item.token_ids) != len(item.logprobs) for item in answers):
            raise EngineError(
                f"the engine answered with {len(answers)} completions instead of {request.n}, or cut ones"
            )
        return [self._completion(request, answer, version) for answer in answers]

    def _completion(self, request: Request, answer: Answer, version: int) -> Completion:
        greedy = request.temperature == 0.0
        return Completion(
            message={"role": "assistant", "content": answer.text},
            token_ids=answer.token_ids,
            logprobs=tuple(0.0 for _ in answer.logprobs) if greedy else answer.logprobs,  # a greedy choice is certain
            temperature=request.temperature,
            prompt_ids=request.prompt_ids,
            finish_reason=answer.finish_reason,
            version=version,
            full_support=request.top_p == 1.0 and request.top_k is None,
        )

    async def check_logprobs(self) -> None:
        """Find out, once, whether logprobs are of the distribution sampled from; on the sampler's loop.

        At temperature 1, with all tokens, they always are. Elsewhere vLLM's are by default not.

        Raises:
            EngineError: they are of another one.
        """
        async with self._checking:
            if self._tells_temperature is None:
                self._tells_temperature = await self.surviving(lambda: self._probe.tells_temperature(self.engine))
        if not self._tells_temperature:
            raise EngineError(
                "the engine tells logprobs of another distribution than it samples from at this temperature, top_p or "
                "top_k: start it with --logprobs-mode processed_logprobs"
            )

    def spawn(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run something on the sampler's own event loop.

        Raises:
            SamplerError: the sampler was closed.
        """
        self._refuse_if_closed()
        return self._loop.spawn(work)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise SamplerError("this sampler was closed")

    async def surviving(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """Ask; an engine that died on it is brought back, with the newest weights, and asked again."""
        return await self._weights.surviving(ask)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter answers, and not the base model."""
        return self._weights.has_adapter
