"""`Supply`: the groups of a pipeline that are under way or wait, and what becomes of them.

Enters: what `Attempts` makes. Leaves: one batch after the other. All of it runs on the pipeline's event loop.

While a batch is trained on, groups of the `max_steps_off_policy` steps after it may be under way or wait; when it is
done, those of one more. So nothing is begun that could only be stale, and what a slow attempt delays is its own group.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fitrl.data.groups import TrajectoryGroup
from fitrl.errors import GroupError, SamplerError
from fitrl.policy.model import TrainableModel
from fitrl.rollout.attempts import Attempts, GaveUp, Slot
from fitrl.rollout.idle import IdleTime
from fitrl.rollout.ledger import Ledger
from fitrl.rollout.sampler import Sampler
from fitrl.rollout.versions import Versions, group_versions

_log = logging.getLogger(__name__)
_COUNTED = (
    "groups_dropped_stale",
    "groups_dropped_failed",
    "flat_groups_resampled",
    "attempts_retried",
    "attempts_restarted",
)


class Supply:
    """Begins groups, keeps those that are finished, drops those that are too old, and hands them out.

    Args:
        sampler: whose version is the policy's.
        attempts: makes the groups.
        model: whose run folder keeps the books, see `Ledger`.
        groups_per_step: groups in a batch.
        max_steps_off_policy: see `RolloutPipeline`.
        max_failed_groups: see `RolloutPipeline`.
        counts: what happened, also in the attempts.

    Attributes:
        metrics: of the batch that was handed out last.
    """

    def __init__(
        self,
        sampler: Sampler,
        attempts: Attempts,
        *,
        model: TrainableModel | None,
        groups_per_step: int,
        max_steps_off_policy: int,
        max_failed_groups: int,
        counts: Counter[str],
    ) -> None:
        self.metrics: dict[str, float] = {}
        self._sampler = sampler
        self._model = model
        self._attempts = attempts
        self._groups_per_step = groups_per_step
        self._max_steps_off_policy = max_steps_off_policy
        self._max_failed_groups = max_failed_groups
        self._counts = counts
        self._told: Counter[str] = Counter()
        self._trainer_idle = IdleTime()
        self._asking = asyncio.Lock()
        self._changed = asyncio.Event()  # something was finished, dropped, or went wrong
        self._ledger = Ledger(model, keeps_waiting=max_steps_off_policy > 0)
        self._versions = Versions(max_steps_off_policy + 1, self._ledger.versions)
        self._ready: dict[int, TrajectoryGroup] = self._ledger.waiting
        self._slots: dict[int, Slot] = {}
        self._is_training = False  # the batch that was handed out
        self._owed: list[TrajectoryGroup] | None = None  # handed out in the books, and not received
        self._failed_in_a_row: list[BaseException] = []
        self._broken: BaseException | None = None

    async def next_batch(self) -> list[TrajectoryGroup]:
        """The next batch, once it is there; the same again until it is received, which `received` says.

        Raises:
            GroupError: too many groups in a row were dropped because an attempt failed for good.
            CheckpointError: the books cannot be written.
            DataError: a group that they cannot hold.
            SamplerError: the sampler was not given the newest weights.
        """
        async with self._asking:
            if self._owed is None:
                self._trainer_idle.set(True)
                try:
                    self._owed = await self._batch()
                finally:
                    self._trainer_idle.set(False)
                self._is_training = True
                self._tell(self._owed)
                self._begin_groups()
            return self._owed

    async def state(self) -> dict[str, Any]:
        """What `Ledger.state` says, of a moment."""
        return self._ledger.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Begin where another one stood; nothing: anew."""
        if state:
            self._ledger.load_state(state)
            self._versions = Versions(self._max_steps_off_policy + 1, self._ledger.versions)

    def received(self) -> None:
        """Note that the batch has come to whoever asked."""
        self._owed = None

    async def _batch(self) -> list[TrajectoryGroup]:
        """The next batch: one that a killed process was handed and did not train, or the oldest that are finished."""
        self._is_training = False
        self._look()
        self._counts["groups_dropped_failed"] += self._ledger.look_back()
        if self._ledger.replays:
            return self._ledger.hand_out_again()
        self._drop_stale()
        while len(self._ready) < self._groups_per_step:
            if self._broken is not None:
                raise self._broken
            self._changed.clear()
            await self._changed.wait()
            self._look()  # weights may change while a batch is waited for, where the user has it so
            self._drop_stale()
        numbers = sorted(self._ready)[: self._groups_per_step]
        self._ledger.hand_out({number: self._ready[number] for number in numbers}, self._versions.seen)
        return [self._ready.pop(number) for number in numbers]

    def _look(self) -> None:
        """See which weights answer; where the policy went back, what is under way has tokens of the ones given up."""
        version = self._sampler.version
        if self._model is not None and version < self._model.step:
            raise SamplerError(
                f"the sampler answers with version {version} of the weights, the policy is at step {self._model.step}: "
                "it has to take the new ones after each step; a service's does when trainer.sampler(model) is asked for"
            )
        if self._versions.gives_up(version):
            for slot in list(self._slots.values()):
                if slot.oldest is not None:
                    self._stop(slot)
        if self._versions.see(version):
            self._attempts.weights_changed()

    def _begin_groups(self) -> None:
        """Begin as many groups as may be under way or wait."""
        steps = self._max_steps_off_policy + 1 - self._is_training - len(self._ledger.replays)
        while self._broken is None and len(self._slots) + len(self._ready) < steps * self._groups_per_step:
            number = self._ledger.next_number(self._slots.keys() | self._ready.keys())
            slot = self._slots[number] = Slot(number=number)
            slot.job = asyncio.create_task(self._fill(slot))

    async def _fill(self, slot: Slot) -> None:
        """Make one group, and keep it."""
        try:
            group = await self._attempts.group(slot)
            if self._max_steps_off_policy:
                await asyncio.to_thread(self._ledger.keep, slot.number, group)
            self._ready[slot.number] = group
            self._failed_in_a_row.clear()
        except GaveUp as error:
            self._drop(slot.number, "failed")
            why = error.__cause__ or error
            _log.warning("a group was dropped, because an attempt failed for good: %s: %s", type(why).__name__, why)
            self._failed_in_a_row.append(why)
            if self._broken is None and len(self._failed_in_a_row) > self._max_failed_groups:
                last = self._failed_in_a_row[-1]
                self._broken = GroupError(
                    f"{len(self._failed_in_a_row)} groups in a row were dropped because an attempt failed for good, "
                    f"max_failed_groups={self._max_failed_groups}; the last: {type(last).__name__}: {last}",
                    list(self._failed_in_a_row),
                )
        except Exception as error:  # told to whoever asks for a batch
            self._broken = self._broken or error
        finally:
            if self._slots.get(slot.number) is slot:
                del self._slots[slot.number]
        self._begin_groups()
        self._changed.set()

    def _drop_stale(self) -> None:
        """Drop groups that would be trained on too late, also those under way that could only become so."""
        limit = self._max_steps_off_policy
        for number, group in list(self._ready.items()):
            if not self._versions.are_usable(group_versions(group), limit):
                del self._ready[number]
                self._drop(number, "stale")
        for slot in list(self._slots.values()):
            if slot.oldest is not None and self._versions.behind(slot.oldest) > limit:
                self._stop(slot)
        self._begin_groups()

    def _stop(self, slot: Slot) -> None:
        """Drop a group that is under way."""
        assert slot.job is not None  # it was begun
        slot.job.cancel()
        del self._slots[slot.number]
        self._drop(slot.number, "stale")

    def _drop(self, number: int, why: str) -> None:
        self._counts[f"groups_dropped_{why}"] += 1
        self._ledger.drop(number)

    def _tell(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Take down the metrics of a batch."""
        mean, most = self._versions.mean_and_max(groups)
        since = self._counts - self._told
        self._told = self._counts.copy()
        self.metrics = {
            "off_policy/steps_mean": mean,
            "off_policy/steps_max": most,
            "pipeline/queue_depth": float(len(self._ready)),
            "pipeline/groups_under_way": float(len(self._slots)),
            "pipeline/sampler_idle_fraction": self._attempts.idle.fraction(),
            "pipeline/trainer_idle_fraction": self._trainer_idle.fraction(),
        } | {f"pipeline/{name}": float(since[name]) for name in _COUNTED}
