"""`SamplerActors`: samplers in processes of their own, as one `Sampler`.

Enters: prompts. Leaves: completions, from whichever process has least to do. All are handed the same weights.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from monarch.actor import Actor, concurrent_endpoint
from torch import Tensor

from fitrl import Completion, Sampler
from fitrl.errors import InvalidArgumentError, RankLostError, SamplerError
from fitrl_titan.actors.answers import Answer, failed
from fitrl_titan.actors.mesh import Mesh, gather

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 64 * 2**20
_Weights = Iterable[tuple[str, Tensor]]


class SamplerRank(Actor):
    """One sampler.

    Args:
        making: makes it, in its process.
    """

    def __init__(self, making: Callable[[], Sampler]) -> None:
        self._making = making
        self._sampler: Any = None
        self._weights: list[tuple[str, Tensor]] = []

    @concurrent_endpoint
    async def ask(self, verb: str, arguments: tuple[Any, ...]) -> Answer:
        """Do what is asked; prompts that come while others are sampled are sampled with them, if the sampler can."""
        try:
            match verb:
                case "make":
                    torch.set_num_threads(1)
                    self._sampler = await asyncio.to_thread(self._making)
                    return Answer(value=(self._sampler.version, getattr(self._sampler, "tokenizer", None)))
                case "sample":
                    prompt_ids, options = arguments
                    return Answer(value=await self._sampler.sample(prompt_ids, **options))
                case "take":
                    self._weights += arguments[0]
                    return Answer()
                case "update":
                    weights, self._weights = self._weights, []
                    await asyncio.to_thread(self._sampler.update, weights, arguments[0])
                    return Answer()
                case "forget":
                    self._weights = []
                    return Answer()
            raise SamplerError(f"a sampler has no verb {verb!r}")
        except Exception as error:
            return failed(error)


class SamplerActors:
    """Samplers in processes of this machine; a `Sampler`, and a chat's tokenizer is theirs.

    A process that dies is left out from then on, and what it was sampling is sampled by another.

    Args:
        making: makes a sampler; called in each process.
        count: how many.

    Example:
        >>> def making():  # doctest: +SKIP
        ...     return TransformersSampler(load_policy("Qwen/Qwen3-0.6B"))
        >>> async with SamplerActors(making, count=2) as sampler:  # doctest: +SKIP
        ...     groups = await fitrl.rollout_async(sampler, tasks, reward=reward)
        ...     await sampler.take(trainer.named_weights(), version=step)  # of an AsyncPolicyTrainer
    """

    def __init__(self, making: Callable[[], Sampler], *, count: int = 1) -> None:
        if count < 1:
            raise InvalidArgumentError(f"count must be at least 1, got {count}")
        self._making, self._count = making, count
        self._mesh: Mesh | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._busy: dict[int, int] = {}  # requests of each process that lives
        self._version = 0
        self.tokenizer: Any = None

    @property
    def version(self) -> int:
        """Policy version of the weights that answer."""
        return self._version

    # -- opened and closed --------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Start the processes and make the samplers."""
        if self._mesh is not None:
            raise SamplerError("these actors are running already")
        self._loop = asyncio.get_running_loop()
        self._mesh = Mesh(SamplerRank, self._making, size=self._count, name="sampler", grace_s=0.0)
        self._busy = dict.fromkeys(range(self._count), 0)
        try:
            self._version, self.tokenizer = (await self._mesh.ask("make"))[0]
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """End the processes."""
        mesh, self._mesh = self._mesh, None
        if mesh is not None:
            await mesh.stop()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # -- Sampler ------------------------------------------------------------------------------------------------

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
        """Sample n completions of one prompt, in the process that has least to do; see `Sampler.sample`.

        Raises:
            SamplerError: all processes have died.
        """
        options = {
            "n": n,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": tuple(stop),
            "seed": seed,
        }
        while True:
            mesh, number = self._running(), min(self._busy, key=self._busy.__getitem__)
            self._busy[number] += 1
            try:
                found: list[Completion] = await mesh.ask_one(number, "sample", list(prompt_ids), options)
                return found
            except RankLostError as lost:
                self._leave_out(number, lost)
            finally:
                if number in self._busy:
                    self._busy[number] -= 1

    def update(self, weights: _Weights, version: int) -> None:
        """Answer with these weights from now on; for code that has no event loop, `fit_rl` say.

        Raises:
            SamplerError: called on the event loop that the actors need; await `take` there.
        """
        loop = self._loop
        if loop is None or not loop.is_running():
            raise SamplerError("the event loop that opened these actors has ended")
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is loop:
            raise SamplerError("update() would wait for its own event loop: 'await sampler.take(weights, version)'")
        for chunk in _chunks(weights):
            asyncio.run_coroutine_threadsafe(self._send("take", chunk), loop).result()
        asyncio.run_coroutine_threadsafe(self._finish(version), loop).result()

    async def take(self, weights: AsyncIterable[tuple[str, Tensor]] | _Weights, version: int) -> None:
        """Answer with these weights from now on; what is being sampled ends with the old ones."""
        try:
            if isinstance(weights, AsyncIterable):
                chunk: list[tuple[str, Tensor]] = []
                async for each in weights:
                    chunk.append(each)
                    if sum(tensor.nbytes for _, tensor in chunk) >= _CHUNK_BYTES:
                        await self._send("take", chunk)
                        chunk = []
                await self._send("take", chunk)
            else:
                for chunk in _chunks(weights):
                    await self._send("take", chunk)
        except BaseException:
            await self._send("forget")
            raise
        await self._finish(version)

    async def _finish(self, version: int) -> None:
        await self._send("update", version)
        self._version = version

    async def _send(self, verb: str, *arguments: Any) -> None:
        """Ask all that live."""
        mesh = self._running()

        async def one(number: int) -> None:
            try:
                await mesh.ask_one(number, verb, *arguments)
            except RankLostError as lost:
                self._leave_out(number, lost)

        await gather(*(one(number) for number in list(self._busy)))

    def _running(self) -> Mesh:
        if self._mesh is None:
            raise SamplerError("these actors are not running: call open() first, or use them in an 'async with'")
        if not self._busy:
            raise SamplerError(f"all {self._count} processes of samplers have died")
        return self._mesh

    def _leave_out(self, number: int, lost: RankLostError) -> None:
        if self._busy.pop(number, None) is not None:
            _log.warning("%s; %d are left", lost, len(self._busy))


def _chunks(weights: _Weights) -> Iterable[list[tuple[str, Tensor]]]:
    """Weights on the CPU, so many bytes at once."""
    chunk: list[tuple[str, Tensor]] = []
    for name, tensor in weights:
        chunk.append((name, tensor.detach().cpu()))
        if sum(held.nbytes for _, held in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    yield chunk
