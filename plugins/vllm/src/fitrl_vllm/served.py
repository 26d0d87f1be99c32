"""`ServedWeights`: which weights an engine answers with, whatever happens to it between two exchanges."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fitrl import LoraSettings
from fitrl.data import ranks
from fitrl.rollout.own_loop import OwnLoop
from fitrl.rollout.sampler import Score
from fitrl_vllm.engine import Engine
from fitrl_vllm.errors import EngineDiedError, EngineError, StaleWeightsError
from fitrl_vllm.probe import Probe, must_have_stayed
from fitrl_vllm.transfer import Way, sender_of
from fitrl_vllm.turns import Turns
from fitrl_vllm.weights import remove, write_adapter, write_model

_T = TypeVar("_T")
_REVIVALS = 3
_PAUSE_S = 1.0


@dataclass(slots=True, kw_only=True)
class _Served:
    """Weights that the engine was handed.

    Attributes:
        folder: where they were written; a restarted engine takes them from there. None: they came without files.
        version: of the policy.
        trainers: [T - 1] float32 logprobs of the probe, by the trainer; None: it was not asked, or did not say yet.
        engines: the same, by the engine; None until it was proven.
    """

    folder: Path | None
    version: int
    trainers: Tensor | None = None
    engines: Tensor | None = None


class ServedWeights:
    """Hand weights to an engine and know which answer; coroutines are for `loop`.

    They are exchanged while no completion is under way, and are the newest once the engine's logprobs of the probe are
    the trainer's. An engine that dies is brought back with them.

    Args:
        engine: what answers.
        loop: where all talk with it happens.
        probe: the fixed text, and how far both may differ.
        lora: of the adapters that are trained; None: all weights are.
        transfer: how all weights come to the engine.
        transfer_dir: where folders with weights are made; None: the temporary directory.
        timeout_s: longest wait of an exchange for completions under way.

    Raises:
        UnsupportedError: a transfer that this system does not have.
    """

    def __init__(
        self,
        engine: Engine,
        loop: OwnLoop,
        probe: Probe,
        *,
        lora: LoraSettings | None,
        transfer: Way,
        transfer_dir: str | Path | None,
        timeout_s: float,
    ) -> None:
        self._engine, self._loop, self._probe, self._lora, self._timeout_s = engine, loop, probe, lora, timeout_s
        self._sender = sender_of(transfer)
        self._folders = tempfile.TemporaryDirectory(prefix="fitrl-vllm-", dir=transfer_dir)
        self._version = 0
        self._served: _Served | None = None
        self._broken: str | None = None
        self._turns = Turns()
        self._reviving = asyncio.Lock()
        self._lost: EngineDiedError | None = None  # until it is brought back
        self._revivals = 0
        self._asleep = False

    @property
    def version(self) -> int:
        """Policy version of the weights that were proven last."""
        return self._version

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter answers, and not the base model."""
        return self._lora is not None and self._served is not None

    @property
    def come_without_files(self) -> bool:
        """Whether all weights go from memory to memory, in the type that the engine holds them in."""
        return self._sender is not None

    @property
    def is_open(self) -> bool:
        """Whether completions start at once, and do not wait for an exchange of weights or for `wake`."""
        return self._turns.is_open

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[int]:
        """The version that answers while the block runs."""
        async with self._turns.completing():
            if self._broken is not None:
                raise StaleWeightsError(self._broken)
            yield self._version

    def close(self) -> None:
        """Free what is kept between exchanges."""
        if self._sender is not None:
            self._sender.close()
        self._folders.cleanup()

    # -- an engine that dies ------------------------------------------------------------------------------------

    async def surviving(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """Ask; an engine that died on it is brought back, with the newest weights, and asked again.

        Nobody asks while it is being brought back: it answers with the base model's weights at first. What is broken
        off or refused meanwhile is made up for by whoever asks next.
        """
        for attempt in range(_REVIVALS):
            seen = self._revivals
            try:
                async with self._reviving:
                    if self._lost is not None:
                        await self._bring_back(self._lost)
                    elif attempt and self._broken is not None:  # another request has seen to it
                        raise StaleWeightsError(self._broken)
                    seen = self._revivals
                return await ask()
            except EngineDiedError as error:
                if self._revivals == seen and not (self._lost is not None and self._lost.is_certain):
                    self._lost = error
        raise EngineError(f"the engine died {_REVIVALS} times on one request")

    async def _bring_back(self, lost: EngineDiedError) -> None:
        try:
            revived = await self._engine.revive(is_dead=lost.is_certain)
            if revived == "gone":
                raise EngineError(f"the engine is gone: {lost}") from lost
            if revived == "perhaps anew" and self._served is not None:
                await self._load_again(self._served)
        except EngineDiedError:
            await asyncio.sleep(_PAUSE_S)  # it was about to die; the next request finds it dead
            raise
        except StaleWeightsError as stale:
            self._broken = str(stale)
            self._is_back()  # once for all who asked it
            raise
        self._is_back()

    def _is_back(self) -> None:
        self._lost = None
        self._revivals += 1

    async def _load_again(self, served: _Served) -> None:
        if await self._answers_with(served):
            return  # the connection was all that was lost
        if served.folder is None:
            raise StaleWeightsError(
                f"the engine died and was started again, version {served.version} of the weights came without files "
                "and is gone: hand over newer ones, which fit_rl does, or take transfer='folder'"
            )
        await self._load(served.folder)
        self._probe.compare(served.trainers, await self._said())

    async def _answers_with(self, served: _Served) -> bool:
        """Whether the engine's logprobs are to the last bit what they were."""
        if served.engines is None:
            return False
        try:
            return torch.equal(await self._said(), served.engines)
        except EngineDiedError:
            raise
        except EngineError:  # a new one does not know the adapter
            return False

    # -- an exchange --------------------------------------------------------------------------------------------

    def exchange(self, weights: Iterable[tuple[str, Tensor]], version: int, score: Score | None) -> None:
        """Have the engine take weights, and prove it; on the trainer's thread, a collective of its ranks.

        Args:
            weights: under transformers' or PEFT's names, drained whatever happens.
            version: of the policy.
            score: the trainer's logprobs of the probe; None: it cannot be asked, and nothing is proven.

        Raises:
            StaleWeightsError: other weights answer.
        """
        folder: Path | None = None
        if self._sender is None:
            here = Path(self._folders.name) / f"{version:06d}-{secrets.token_hex(4)}"
            folder = Path(ranks.first(lambda: str(here)))
        served = _Served(folder=folder, version=version)
        trainers: Future[Tensor | None] = Future()
        taking: Future[None] | None = None
        failure: Exception | None = None
        try:
            try:
                if ranks.rank() == 0:
                    if folder is not None:
                        self._write(folder, weights)
                    taking = self._loop.spawn(self._take(served, trainers))
                    if self._sender is not None:
                        self._sender.send(weights, _check(taking))
            except Exception as error:
                failure = error
            for _ in weights:  # a collective: every rank drains it, whatever happened to the first
                pass
            # the trainer is asked while the engine loads
            trainers.set_result(score(self._probe.token_ids).float().cpu() if score is not None else None)
            if taking is not None and failure is None:
                taking.result()
        except Exception as error:
            failure = failure or error
        finally:
            if taking is not None:  # also after Ctrl-C
                taking.cancel()
        ranks.settle(failure)
        if ranks.rank() != 0:
            served.trainers = trainers.result()
            self._served = served  # the first one's engine is everyone's
        self._version = version

    def _write(self, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self._lora is not None:
            write_adapter(folder, weights, self._lora)
        else:
            write_model(folder, weights)

    async def _take(self, served: _Served, trainers: Future[Tensor | None]) -> None:
        """Load weights while nothing is sampled, and prove them; they are the newest then."""
        self._turns.close()
        before = self._served
        try:
            if self._asleep:
                await self._engine.wake()
                self._asleep = False
            await self._turns.idle(self._timeout_s)
            self._broken = (
                f"version {served.version} of the weights was handed over and not proven; hand over newer ones"
            )
            await self._put_in_place(served, before)
            served.trainers = await asyncio.wrap_future(trainers)
            said = await self.surviving(self._said)
            if before is not None and before.engines is not None and torch.equal(said, before.engines):
                must_have_stayed(before.trainers, served.trainers, served.version)
            self._probe.compare(served.trainers, said)
            served.engines = said
            self._broken = None
            self._version = served.version
        finally:
            self._turns.open()

    async def _put_in_place(self, served: _Served, before: _Served | None) -> None:
        if self._sender is None:
            assert served.folder is not None
            folder = served.folder
            self._served = served  # for an engine that dies on it
            await asyncio.gather(self.surviving(lambda: self._load(folder)), asyncio.to_thread(_forget, before))
            return
        self._served = None  # an engine that has died meanwhile is started again, and needs no old ones
        workers = await self.surviving(self._engine.tell_of_weights)
        self._served = served
        await self._engine.receive(self._sender.prepare(workers, self._revivals))

    async def _load(self, folder: Path) -> None:
        if self._lora is not None:
            await self._engine.load_adapter(folder)
        else:
            await self._engine.load_weights(folder)

    async def _said(self) -> Tensor:
        return await self._probe.score(self._engine, adapter=self.has_adapter)

    # -- a GPU that is shared -----------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Give the device's memory to a trainer that shares it, once no completion is under way."""
        self._turns.close()
        await self._turns.idle()
        await self._engine.sleep()
        self._asleep = True

    async def wake(self) -> None:
        """Take the memory back and go on."""
        await self._engine.wake()
        self._asleep = False
        self._turns.open()


def _forget(served: _Served | None) -> None:
    if served is not None and served.folder is not None:
        remove(served.folder)


def _check(taking: Future[None]) -> Callable[[], None]:
    """What raises once the engine is not taking weights any more."""

    def check() -> None:
        if taking.done():
            taking.result()
            raise EngineError("the engine ended before all weights had come")

    return check
