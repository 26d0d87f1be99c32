"""`VLLMSampler`: fitrl's sampler on a vLLM engine.

All talk with the engine happens on one event loop, on a thread of the sampler's own, whichever loop asks. New weights
wait until no completion is under way, and completions wait until the new weights are proven, so each has one version.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

from fitrl import Completion, TrainableModel, load_tokenizer
from fitrl.data import ranks
from fitrl.errors import InvalidArgumentError, SamplerError
from fitrl.rollout.own_loop import OwnLoop
from fitrl.rollout.sampler import Score, check_sampling
from fitrl_vllm.engine import Answer, Engine, Request
from fitrl_vllm.errors import EngineDiedError, EngineError, StaleWeightsError
from fitrl_vllm.http import ServerEngine
from fitrl_vllm.probe import Probe, must_have_stayed
from fitrl_vllm.server import VLLMServer
from fitrl_vllm.turns import Turns
from fitrl_vllm.weights import remove, write_adapter, write_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
_REVIVALS = 3
_PAUSE_S = 1.0


@dataclass(slots=True, kw_only=True)
class _Served:
    """Weights that the engine was handed.

    Attributes:
        folder: where they were written; a restarted engine takes them from there.
        trainers: [T - 1] float32 logprobs of the probe, by the trainer; None: it was not asked, or did not say yet.
        engines: the same, by the engine; None until it was proven.
    """

    folder: Path
    trainers: Tensor | None = None
    engines: Tensor | None = None


class VLLMSampler:
    """Sample with vLLM; `LocalTrainer(sampler=VLLMSampler(...))` keeps it at the trainer's weights.

    Adapters are exchanged in place. Full weights are written to a folder in buckets, which the engine loads.
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
        transfer_dir: where weights are handed over: the engine has to see the same folder. None: a temporary one. One
            in memory (`/dev/shm`) spares the disk; the system holds what was just written in memory anyway.
        api_key: of the server.

    Raises:
        InvalidArgumentError: an argument out of range.
    """

    def __init__(
        self,
        model: TrainableModel,
        engine: str | VLLMServer | Engine,
        *,
        timeout_s: float = 600.0,
        tolerance: float = 0.05,
        transfer_dir: str | Path | None = None,
        api_key: str | None = None,
    ) -> None:
        for name, value in (("timeout_s", timeout_s), ("tolerance", tolerance)):
            if not 0 < value < float("inf"):
                raise InvalidArgumentError(f"{name} must be a positive number, got {value}")
        if api_key is not None and not isinstance(engine, str | VLLMServer):
            raise InvalidArgumentError("api_key is a server's; an engine in this process has none")
        self.model = model
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model.base_model)
        self.timeout_s = timeout_s
        self.engine: Engine = (
            ServerEngine(engine, timeout_s=timeout_s, api_key=api_key)
            if isinstance(engine, str | VLLMServer)
            else engine
        )
        self._probe = Probe(self.tokenizer, tolerance)
        self._folders = tempfile.TemporaryDirectory(prefix="fitrl-vllm-", dir=transfer_dir)
        self._version = 0
        self._served: _Served | None = None
        self._broken: str | None = None
        self._loop = OwnLoop("fitrl-vllm")
        self._closed = False
        self._turns = Turns()
        self._reviving = asyncio.Lock()
        self._checking = asyncio.Lock()
        self._revivals = 0
        self._tells_temperature: bool | None = None
        self._asleep = False

    @property
    def version(self) -> int:
        """Policy version of the weights that were proven last."""
        return self._version

    @property
    def is_open(self) -> bool:
        """Whether completions start at once, and do not wait for an exchange of weights or for `wake`."""
        return self._turns.is_open

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
        self._exchange(weights, version, None)

    def update_proven(self, weights: Iterable[tuple[str, Tensor]], version: int, score: Score) -> None:
        """Take weights, and prove that they answer; see `fitrl.rollout.sampler.ProvesWeights`.

        Raises:
            StaleWeightsError: other weights answer.
        """
        self._exchange(weights, version, score)

    def sleep(self) -> None:
        """Give the device's memory to a trainer that shares it; completions wait until `wake`."""
        self._refuse_if_closed()
        self._loop.wait_for(self._sleep())

    def wake(self) -> None:
        """Take the memory back and go on."""
        self._refuse_if_closed()
        self._loop.wait_for(self._wake())

    def close(self) -> None:
        """End the thread and close connections; a server stays, whoever started it ends it."""
        self._closed = True
        self._loop.close(self.engine.aclose)
        self._folders.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- completions --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[int]:
        """The version that answers while the block runs; on the sampler's loop."""
        async with self._turns.completing():
            if self._broken is not None:
                raise StaleWeightsError(self._broken)
            yield self._version

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
        for _ in range(_REVIVALS):
            seen = self._revivals
            try:
                return await ask()
            except EngineDiedError as error:
                await self._revive(seen, error)
        raise EngineError(f"the engine died {_REVIVALS} times on one request")

    async def _revive(self, seen: int, error: EngineDiedError) -> None:
        async with self._reviving:
            if self._revivals == seen:
                try:
                    if not await self.engine.revive(is_dead=error.is_certain):
                        raise EngineError(f"the engine is gone: {error}") from error
                    if self._served is not None:
                        await self._load(self._served.folder)
                        self._probe.compare(self._served.trainers, await self._said())
                except EngineDiedError:
                    await asyncio.sleep(_PAUSE_S)  # it was about to die; the next request finds it dead
                except StaleWeightsError as stale:
                    self._broken = str(stale)
                    raise
                else:
                    self._revivals += 1
            elif self._broken is not None:  # another request has seen to it
                raise StaleWeightsError(self._broken)

    # -- weights ------------------------------------------------------------------------------------------------

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter answers, and not the base model."""
        return self.model.lora is not None and self._served is not None

    def _exchange(self, weights: Iterable[tuple[str, Tensor]], version: int, score: Score | None) -> None:
        self._refuse_if_closed()
        here = Path(self._folders.name) / f"{version:06d}-{secrets.token_hex(4)}"
        folder = Path(ranks.first(lambda: str(here)))
        failure: Exception | None = None
        try:
            if ranks.rank() == 0:
                self._write(folder, weights)
        except Exception as error:
            failure = error
        for _ in weights:  # a collective: every rank drains it, whatever happened to the first
            pass
        trainers: Future[Tensor | None] = Future()
        takes = ranks.rank() == 0 and failure is None
        taking = self._loop.spawn(self._take(folder, trainers, version)) if takes else None
        try:
            # the trainer is asked while the engine loads
            trainers.set_result(score(self._probe.token_ids).float().cpu() if score is not None else None)
            if taking is not None:
                taking.result()
        except Exception as error:
            failure = error
            if taking is not None:
                taking.cancel()
        except BaseException:  # Ctrl-C
            if taking is not None:
                taking.cancel()
            raise
        ranks.settle(failure)
        if ranks.rank() != 0:
            self._served = _Served(folder=folder, trainers=trainers.result())  # the first one's engine is everyone's
        self._version = version

    def _write(self, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.model.lora is not None:
            write_adapter(folder, weights, self.model.lora)
        else:
            write_model(folder, weights)

    async def _take(self, folder: Path, trainers: Future[Tensor | None], version: int) -> None:
        """Load weights while nothing is sampled, and prove them; they are the newest then."""
        self._turns.close()
        before = self._served
        try:
            if self._asleep:
                await self.engine.wake()
                self._asleep = False
            await self._turns.idle(self.timeout_s)
            self._broken = f"version {version} of the weights was handed over and not proven; hand over newer ones"
            self._served = _Served(folder=folder)  # for an engine that dies on it
            loading = self.surviving(lambda: self._load(folder))
            await asyncio.gather(loading, asyncio.to_thread(_forget, before))
            self._served.trainers = await asyncio.wrap_future(trainers)
            said = await self.surviving(self._said)
            if before is not None and before.engines is not None and torch.equal(said, before.engines):
                must_have_stayed(before.trainers, self._served.trainers, version)
            self._probe.compare(self._served.trainers, said)
            self._served.engines = said
            self._broken = None
            self._version = version
        finally:
            self._turns.open()

    async def _load(self, folder: Path) -> None:
        if self.model.lora is not None:
            await self.engine.load_adapter(folder)
        else:
            await self.engine.load_weights(folder)

    async def _said(self) -> Tensor:
        return await self._probe.score(self.engine, adapter=self.has_adapter)

    async def _sleep(self) -> None:
        self._turns.close()
        await self._turns.idle()
        await self.engine.sleep()
        self._asleep = True

    async def _wake(self) -> None:
        await self.engine.wake()
        self._asleep = False
        self._turns.open()


def _forget(served: _Served | None) -> None:
    if served is not None:
        remove(served.folder)
