"""`Attempts`: the attempts of one group of a pipeline, each made again when it fails or when the weights change.

Enters: a group's number. Leaves: its trajectories, or `GaveUp`. An attempt that waits, hangs or fails holds up its own
group only.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fitrl.data.advantages import is_flat
from fitrl.data.gather import is_cancelled
from fitrl.data.groups import Trajectory, TrajectoryGroup
from fitrl.rollout.draws import Draws
from fitrl.rollout.idle import IdleTime
from fitrl.rollout.rollout import Agent, Chat, Reward, attempt

OnWeightChange: TypeAlias = Literal["continue", "restart"]


class GaveUp(Exception):  # noqa: N818 - an outcome, told to the pipeline alone
    """An attempt failed too often; raised from its last error."""


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """A group that is under way.

    Attributes:
        number: of the group.
        since: the policy version of the oldest token that an attempt may have, by its index.
        job: what fills it.
    """

    number: int
    since: dict[int, int] = field(default_factory=dict)
    job: asyncio.Task[None] | None = None

    @property
    def oldest(self) -> int | None:
        """The policy version of the oldest token that the group may have; None before there is one."""
        return min(self.since.values(), default=None)


@dataclass(slots=True, kw_only=True)
class Attempts:
    """How groups are made; on one event loop.

    Attributes:
        chat: the sampler and its settings.
        draws: tasks and seeds.
        reward: see `rollout`.
        agent: see `rollout`.
        group_size: attempts of a group.
        free: places for attempts that run at once.
        on_weight_change: what becomes of attempts that are under way.
        max_retries: how often an attempt that fails is made again.
        max_resamples_of_flat_groups: how often a group whose rewards are all equal makes way for another task.
        attempt_timeout_s: an attempt that takes longer has failed; None: it may take forever.
        counts: what happened, see `RolloutPipeline.metrics`.
        idle: of the sampler.
    """

    chat: Chat
    draws: Draws
    reward: Reward
    agent: Agent | None
    group_size: int
    free: asyncio.Semaphore
    on_weight_change: OnWeightChange
    max_retries: int
    max_resamples_of_flat_groups: int
    attempt_timeout_s: float | None
    counts: Counter[str]
    idle: IdleTime
    _under_way: set[asyncio.Task[Trajectory]] = field(default_factory=set)
    _stopped: set[asyncio.Task[Trajectory]] = field(default_factory=set)

    async def group(self, slot: Slot) -> TrajectoryGroup:
        """Make a group.

        Raises:
            GaveUp: one of its attempts failed too often.
        """
        redraw = 0
        while True:
            group = TrajectoryGroup(await self._all(slot, redraw), metadata={"number": slot.number})
            if redraw == self.max_resamples_of_flat_groups or not is_flat(group.rewards):
                return group
            redraw += 1
            self.counts["flat_groups_resampled"] += 1
            slot.since.clear()

    def weights_changed(self) -> None:
        """Begin attempts that are under way again, if that was asked for."""
        if self.on_weight_change == "restart":
            self._stopped |= self._under_way
            for work in self._under_way:
                work.cancel()

    async def _all(self, slot: Slot, redraw: int) -> list[Trajectory]:
        try:
            async with asyncio.TaskGroup() as together:
                jobs = [together.create_task(self._one(slot, index, redraw)) for index in range(self.group_size)]
        except* GaveUp as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__
        return [job.result() for job in jobs]

    async def _one(self, slot: Slot, index: int, redraw: int) -> Trajectory:
        """One attempt, made until it succeeds."""
        task = self.draws.task(slot.number, redraw)
        failures = 0
        async with self.free:
            while True:
                if self.on_weight_change == "continue":
                    slot.since[index] = self.chat.sampler.version
                seed = self.draws.seed(slot.number, index, redraw=redraw, retry=failures)
                try:
                    trajectory = await self._once(dataclasses.replace(self.chat, seed=seed), task)
                except _Restarted:
                    self.counts["attempts_restarted"] += 1
                    continue
                except (Exception, asyncio.CancelledError) as error:
                    if is_cancelled():  # whatever it raises on its way out, it is not made again
                        raise asyncio.CancelledError from error
                    failures += 1
                    if failures > self.max_retries:
                        raise GaveUp from error
                    self.counts["attempts_retried"] += 1
                    continue
                versions = trajectory.policy_versions
                if self.on_weight_change == "restart" and versions is not None and versions[0] != versions[1]:
                    self.counts["attempts_restarted"] += 1
                    continue
                if versions is not None:
                    slot.since[index] = versions[0]
                return trajectory

    async def _once(self, chat: Chat, task: Any) -> Trajectory:
        work = asyncio.create_task(self._within_time(chat, task))
        self._under_way.add(work)
        self.idle.set(False)
        try:
            return await work
        except (Exception, asyncio.CancelledError) as error:
            if work in self._stopped and not is_cancelled():
                raise _Restarted from error
            raise
        finally:
            self._under_way.discard(work)
            self._stopped.discard(work)
            self.idle.set(not self._under_way)

    async def _within_time(self, chat: Chat, task: Any) -> Trajectory:
        limit = asyncio.timeout(self.attempt_timeout_s)
        try:
            async with limit:
                return await attempt(chat, task, reward=self.reward, agent=self.agent)
        except (SystemExit, KeyboardInterrupt) as error:  # of code that was sampled and run, say
            raise RuntimeError(f"an attempt asked the process to end: {error!r}") from error
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(
                    f"an attempt took longer than attempt_timeout_s={self.attempt_timeout_s:g}"
                ) from error
            raise


class _Restarted(Exception):  # noqa: N818 - an outcome
    """An attempt was stopped because the weights changed."""
