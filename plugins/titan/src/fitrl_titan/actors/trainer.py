"""`TrainerActors`: a trainer whose ranks are actors, as an `AsyncPolicyTrainer`.

Enters: microbatches, for whichever rank. Leaves: results over all ranks. A rank that dies is reported and all of them
are started again from the newest checkpoint.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fitrl import Batch, CustomObjective, Objective, PolicyTrainer
from fitrl.errors import InvalidArgumentError, RankError, RankLostError, SessionError
from fitrl.protocols.results import (
    ForwardBackwardResult,
    OptimStepResult,
    TokenLogprobs,
    TrainerConfig,
    TrainerStatus,
)
from fitrl_titan.actors.mesh import Mesh, StuckError
from fitrl_titan.actors.rank import TrainerRank

_CHUNK_BYTES = 64 * 2**20


class TrainerActors:
    """Ranks of a trainer in processes of this machine, called from one program.

    The verbs are those of `PolicyTrainer`, to be awaited. Calls are done one after the other, in their order, by all
    ranks. `forward_backward` and `forward` take one batch, or one for each group of ranks that has data of its own
    (`num_data_ranks`): the gradient is that of all of them, wherever they are computed. What every rank raises is
    raised as it is; what some raise is a `RankError` that names the first.

    When a rank's process dies, or one fails and leaves the others in the middle of a collective, all are ended and
    started again, and load the newest checkpoint; the call under way raises an error that says so. What was accumulated
    since is gone, and is to be sent again.

    Args:
        opening: makes a trainer and opens its model: called in each rank's process, where `devices=ranks` is what
            `torchrun` would have started.
        ranks: how many processes.
        most_restarts: start again so often at most, a trainer that cannot run is not to be tried forever.
        grace_s: how long the others may still work once a rank has failed.

    Example:
        >>> @contextmanager  # doctest: +SKIP
        ... def opening():
        ...     with TitanTrainer(devices=2) as trainer:
        ...         yield trainer.open(fitrl.TrainableModel("adder", "demo", "Qwen/Qwen3-0.6B", lora=None))
        >>> async with TrainerActors(opening, ranks=2) as trainer:  # doctest: +SKIP
        ...     await trainer.forward_backward(fitrl.pack(samples, num_batches=trainer.num_data_ranks))
        ...     await trainer.optim_step(learning_rate=1e-5)
    """

    def __init__(
        self,
        opening: Callable[[], AbstractContextManager[PolicyTrainer]],
        *,
        ranks: int = 1,
        most_restarts: int = 3,
        grace_s: float = 30.0,
    ) -> None:
        if ranks < 1:
            raise InvalidArgumentError(f"ranks must be at least 1, got {ranks}")
        if most_restarts < 0 or grace_s < 0:
            raise InvalidArgumentError(
                f"most_restarts and grace_s must be at least 0, got {most_restarts} and {grace_s}"
            )
        self._opening = opening
        self._size = ranks
        self._restarts_left = most_restarts
        self._grace = grace_s
        self._mesh: Mesh | None = None
        self._turn = asyncio.Lock()
        self._data_ranks = 1
        self._sent = 0

    @property
    def num_data_ranks(self) -> int:
        """Ranks, or groups of ranks, that each take a batch of their own."""
        return self._data_ranks

    # -- opened and closed --------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Start the processes and open the trainer in each.

        Raises:
            SessionError: it is open.
        """
        async with self._turn:
            if self._mesh is not None:
                raise SessionError("these actors are running already")
            await self._start(resumes=False)
        return self

    async def close(self) -> None:
        """Close the trainer and end the processes."""
        async with self._turn:
            if self._mesh is None:
                return
            try:
                await self._mesh.ask("close")
            except RankError:
                pass  # the processes end all the same
            finally:
                await self._stop()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _start(self, *, resumes: bool) -> None:
        self._mesh = Mesh(TrainerRank, self._opening, self._size, size=self._size, name="rank", grace_s=self._grace)
        try:
            port = await self._mesh.ask_one(0, "find_port")
            self._data_ranks = (await self._mesh.ask("open", [(port, resumes)] * self._size))[0]
        except BaseException:
            await self._stop()
            raise
        self._sent = 0

    async def _stop(self) -> None:
        mesh, self._mesh = self._mesh, None
        if mesh is not None:
            await mesh.stop()

    async def _start_again(self) -> str:
        """End what is left and start anew; returns what to tell of it."""
        await self._stop()
        if not self._restarts_left:
            return "it was started again as often as most_restarts allows: open it anew"
        self._restarts_left -= 1
        await self._start(resumes=True)
        assert self._mesh is not None  # it was started
        step = (await self._mesh.ask("get_status", self._alike()))[0].step
        return f"all {self._size} were started again and stand at step {step}, send what came after it again"

    # -- verbs --------------------------------------------------------------------------------------------------

    async def forward_backward(
        self, batch: Batch | Sequence[Batch], objective: Objective | CustomObjective | None = None
    ) -> ForwardBackwardResult:
        """Add the gradient of a microbatch, or of one for each data rank; losses and metrics are those of all."""
        batches = [batch] if isinstance(batch, Batch) else list(batch)
        results = await self._call("forward_backward", self._shared_out(batches, objective))
        self._sent += len(batches)
        each = results[:: self._size // self._data_ranks]
        return ForwardBackwardResult(
            loss=sum(one.loss for one in each), metrics=_reduced([one.metrics for one in each])
        )

    async def optim_step(self, *, learning_rate: float | None = None) -> OptimStepResult:
        """Clip, step, advance the schedule, clear."""
        found: OptimStepResult = (await self._call("optim_step", self._alike(learning_rate=learning_rate)))[0]
        sent, self._sent = self._sent, 0
        return dataclasses.replace(found, accumulated_microbatches=sent)

    async def clear_gradients(self) -> None:
        """Forget what was accumulated."""
        await self._call("clear_gradients", self._alike())
        self._sent = 0

    async def save(self, name: str | None = None, path: str | None = None, weights_only: bool = False) -> str:
        """Save; returns where."""
        return str((await self._call("save", self._alike(name=name, path=path, weights_only=weights_only)))[0])

    async def load(self, path: str | None = None) -> str:
        """Load a save, None: the newest."""
        found = str((await self._call("load", self._alike(path=path)))[0])
        self._sent = 0
        return found

    async def get_config(self) -> TrainerConfig:
        """What does not change."""
        found: TrainerConfig = (await self._call("get_config", self._alike()))[0]
        return found

    async def get_status(self) -> TrainerStatus:
        """What does."""
        found: TrainerStatus = (await self._call("get_status", self._alike()))[0]
        return dataclasses.replace(found, accumulated_microbatches=self._sent)

    async def forward(self, batch: Batch | Sequence[Batch]) -> TokenLogprobs:
        """Logprobs of the targets of a batch, or of several in their order, without a gradient."""
        batches = [batch] if isinstance(batch, Batch) else list(batch)
        results = await self._call("forward", self._shared_out(batches))
        each = results[:: self._size // self._data_ranks][: len(batches)]
        return TokenLogprobs(logprobs=torch.cat([one.logprobs for one in each]))

    async def named_weights(self) -> AsyncIterator[tuple[str, Tensor]]:
        """Full tensors under the names of a saved checkpoint, on the CPU; no step may be taken before it ends."""
        await self._call("begin_export", [()] * self._size)
        while chunk := (await self._call("next_weights", [(_CHUNK_BYTES,)] * self._size))[0]:
            for name, tensor in chunk:
                yield name, tensor

    # -- calls --------------------------------------------------------------------------------------------------

    def _alike(self, **named: Any) -> list[tuple[Any, ...]]:
        """The same arguments for every rank."""
        return [((), named)] * self._size

    def _shared_out(self, batches: Sequence[Batch], *further: Any) -> list[tuple[Any, ...]]:
        """A batch for every rank: its data rank's, or one of no weight where there are fewer."""
        if not 1 <= len(batches) <= self._data_ranks:
            raise InvalidArgumentError(
                f"{len(batches)} batches for {self._data_ranks} data ranks: send one, or at most one for each"
            )
        given = [*batches, *(batches[0].filler() for _ in range(self._data_ranks - len(batches)))]
        together = self._size // self._data_ranks
        return [((given[rank // together], *further), {}) for rank in range(self._size)]

    async def _call(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        async with self._turn:
            if self._mesh is None:
                raise SessionError("these actors are not running: call open() first, or use them in an 'async with'")
            try:
                return await self._mesh.ask(verb, arguments)
            except (RankLostError, StuckError) as error:
                told = await self._start_again()
                kind = RankLostError if isinstance(error, RankLostError) else RankError
                raise kind(f"{error}; {told}") from error
            except RankError:
                if verb == "forward_backward":  # some ranks have added to their gradient, and some have not
                    await self._mesh.ask("clear_gradients", self._alike())
                    self._sent = 0
                raise
            except Exception:
                if verb == "forward_backward":  # every rank's has cleared its own
                    self._sent = 0
                raise


def _reduced(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Raw metrics of several ranks as those of one: a name that ends in `_max` by maximum, others by sum."""
    return {
        name: max(one[name] for one in metrics) if name.endswith("_max") else sum(one[name] for one in metrics)
        for name in metrics[0]
    }
