"""`RolloutPipeline`: rollouts that go on while the trainer trains, never further behind it than asked.

Enters: tasks, and a sampler with weights of its own. Leaves: batches of groups, one for each turn of the user's loop.
All of it runs on one event loop, on a thread of the pipeline's own.

A step is a turn of that loop: a batch is handed out, trained on, and the next one asked for.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from fitrl.data import ranks
from fitrl.data.groups import TrajectoryGroup
from fitrl.errors import InvalidArgumentError, SessionError
from fitrl.policy.model import TrainableModel
from fitrl.rollout.attempts import Attempts, OnWeightChange
from fitrl.rollout.draws import Draws
from fitrl.rollout.idle import IdleTime
from fitrl.rollout.own_loop import OwnLoop
from fitrl.rollout.rollout import Agent, Chat, Reward, Task
from fitrl.rollout.sampler import Sampler, check_sampling
from fitrl.rollout.supply import Supply
from fitrl.rollout.transformers import TransformersSampler


class RolloutPipeline:
    """Groups for one step after the other, sampled while earlier ones are trained on.

    It is an iterator, for `for` and for `async for`; asking for the next batch says that the one before is done with.
    Rewards and agents run on an event loop of the pipeline's own, whichever way it is asked. With several ranks the
    first one makes the rollouts and the others get empty lists, which `fit_rl` joins.

    Args:
        sampler: what answers, with weights of its own: `trainer.sampler(model, own_weights=True)`, or vLLM's.
        tasks: to attempt, again and again, each time in another order; see `rollout` for what a task is.
        reward: see `rollout`. All attempts share one event loop: what computes long belongs in `asyncio.to_thread`.
        group_size: attempts per task.
        groups_per_step: groups in a batch.
        max_steps_off_policy: how many steps the oldest token of a group may be behind the policy that is trained on
            it. 0 samples only while nothing trains, and is `rollout` in a loop; to the last bit, where the embedded
            sampler answers all attempts of a step as one batch (max_concurrency=None).
        agent: see `rollout`. Completions of a client of its own have to say their `version`.
        model: whose run folder keeps what was finished and handed out, so that a run that was killed goes on with it:
            no group is lost or trained twice. Open it (`trainer.open`) before the first batch. What no checkpoint
            holds yet is kept, so save now and then. A batch that cannot be trained on is handed out again by each next
            process: `<run>/pipeline` may be deleted to begin anew. None: in memory.
        max_concurrency: how many attempts run at once; None: all.
        max_resamples_of_flat_groups: how often a group whose rewards are all equal makes way for another task; after
            that it is handed out as it is, and `fit_rl` drops it.
        on_weight_change: "continue": attempts that are under way when the weights change go on with the new ones;
            each token has its version. "restart": they begin again, and all tokens of a trajectory have one version.
        max_retries: how often an attempt that raises or takes too long is made again.
        max_failed_groups: how many groups in a row may be dropped because an attempt failed for good.
        attempt_timeout_s: longest an attempt may take, in seconds, its wait for the sampler included; then it has
            failed. The default, an hour, is longer than an attempt should take, and ends one that hangs. None: forever.
        max_new_tokens: longest answer, in tokens.
        temperature: sampling temperature.
        top_p: see `Sampler.sample`.
        top_k: see `Sampler.sample`.
        stop: see `Sampler.sample`.
        seed: of the order of the tasks and of the sampling.

    Raises:
        InvalidArgumentError: a value out of range, or a sampler that cannot sample while its trainer trains.

    Example:
        >>> with fitrl.RolloutPipeline(
        ...     trainer.sampler(model, own_weights=True), tasks, reward=reward, model=model
        ... ) as pipeline:  # doctest: +SKIP
        ...     for groups in pipeline:
        ...         result = trainer.fit_rl(model, groups)
        ...         model.log(groups, metrics={**result.metrics, **pipeline.metrics()}, step=result.step)
        ...         if result.step >= 200:
        ...             break
    """

    def __init__(
        self,
        sampler: Sampler,
        tasks: Sequence[Task],
        *,
        reward: Reward,
        group_size: int = 8,
        groups_per_step: int = 8,
        max_steps_off_policy: int = 1,
        agent: Agent | None = None,
        model: TrainableModel | None = None,
        max_concurrency: int | None = None,
        max_resamples_of_flat_groups: int = 0,
        on_weight_change: OnWeightChange = "continue",
        max_retries: int = 2,
        max_failed_groups: int = 8,
        attempt_timeout_s: float | None = 3600.0,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if isinstance(tasks, str | Mapping) or not hasattr(tasks, "__len__"):
            raise InvalidArgumentError(
                f"tasks must be a list, to be attempted again and again, got {type(tasks).__name__}"
            )
        if not len(tasks):
            raise InvalidArgumentError("tasks is empty: there is nothing to attempt")
        for name, value, least in (
            ("group_size", group_size, 1),
            ("groups_per_step", groups_per_step, 1),
            ("max_steps_off_policy", max_steps_off_policy, 0),
            ("max_concurrency", 1 if max_concurrency is None else max_concurrency, 1),
            ("max_resamples_of_flat_groups", max_resamples_of_flat_groups, 0),
            ("max_retries", max_retries, 0),
            ("max_failed_groups", max_failed_groups, 0),
        ):
            if not isinstance(value, int):
                raise InvalidArgumentError(f"{name} must be a whole number, got {value!r}")
            if value < least:
                raise InvalidArgumentError(f"{name} must be at least {least}, got {value}")
        if attempt_timeout_s is not None and not attempt_timeout_s > 0:
            raise InvalidArgumentError(f"attempt_timeout_s must be positive or None, got {attempt_timeout_s}")
        if on_weight_change not in ("continue", "restart"):
            raise InvalidArgumentError(f"on_weight_change must be 'continue' or 'restart', got {on_weight_change!r}")
        if group_size == 1 and max_resamples_of_flat_groups:
            raise InvalidArgumentError("a group of one attempt is always flat: max_resamples_of_flat_groups needs more")
        if max_steps_off_policy and isinstance(sampler, TransformersSampler) and not sampler.own_weights:
            raise InvalidArgumentError(
                "this embedded sampler shares the trainer's weights and waits while it trains, so nothing would run "
                "beside it: pass trainer.sampler(model, own_weights=True), or max_steps_off_policy=0"
            )
        check_sampling(n=1, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop)
        self.sampler = sampler
        self.groups_per_step = groups_per_step
        self.seed = seed
        self._draws = Draws(tasks, groups_per_step=groups_per_step, group_size=group_size, seed=seed)
        self._counts: Counter[str] = Counter()
        attempts = Attempts(
            chat=Chat(
                sampler=sampler,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                stop=tuple(stop),
            ),
            draws=self._draws,
            reward=reward,
            agent=agent,
            group_size=group_size,
            free=asyncio.Semaphore(max_concurrency or 2**62),
            on_weight_change=on_weight_change,
            max_retries=max_retries,
            max_resamples_of_flat_groups=max_resamples_of_flat_groups,
            attempt_timeout_s=attempt_timeout_s,
            counts=self._counts,
            idle=IdleTime(),
        )
        self._loop = OwnLoop("fitrl-pipeline")
        self._open = functools.partial(
            Supply,
            sampler,
            attempts,
            model=model,
            groups_per_step=groups_per_step,
            max_steps_off_policy=max_steps_off_policy,
            max_failed_groups=max_failed_groups,
            counts=self._counts,
        )
        self._supply: Supply | None = None  # opened when the first batch is asked for
        self._stands: dict[str, Any] = {}
        self._asked = threading.Lock()
        self._closed = False

    # -- what the user's loop sees ------------------------------------------------------------------------------

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        return self

    def __next__(self) -> list[TrajectoryGroup]:
        """The next batch, once it is there.

        Raises:
            GroupError: more than `max_failed_groups` groups in a row were dropped because an attempt failed for good.
            CheckpointError: the queue in the run folder cannot be read or written.
            DataError: a group that the run folder cannot hold.
            SamplerError: with `model=`: the sampler was not given the newest weights.
            SessionError: the pipeline was closed, or is being asked already.
        """
        failure: Exception | None = None
        groups: list[TrajectoryGroup] = []
        try:
            if ranks.rank() == 0:
                with self._asking():
                    groups = self._loop.wait_for(self._next())
                    self._received()
        except Exception as error:
            failure = error
        ranks.settle(failure, of_rollouts=True)
        return groups

    async def __anext__(self) -> list[TrajectoryGroup]:
        """`__next__` without blocking the event loop."""
        failure: Exception | None = None
        groups: list[TrajectoryGroup] = []
        try:
            if ranks.rank() == 0:
                with self._asking():
                    groups = await asyncio.wrap_future(self._loop.spawn(self._next()))
                    self._received()
        except Exception as error:
            failure = error
        if ranks.world_size() > 1:
            await asyncio.to_thread(ranks.settle, failure, of_rollouts=True)
        elif failure is not None:
            raise failure
        return groups

    def metrics(self) -> dict[str, float]:
        """What happened since the batch before the last one, as of when the last one was handed out.

        Returns:
            `off_policy/steps_mean` and `off_policy/steps_max` over the batch's tokens, `pipeline/queue_depth` (groups
            that wait), `pipeline/groups_under_way`, `pipeline/sampler_idle_fraction` and
            `pipeline/trainer_idle_fraction` (time that the loop waited for groups), and counts:
            `pipeline/groups_dropped_stale`, `_dropped_failed`, `pipeline/flat_groups_resampled`,
            `pipeline/attempts_retried` and `_restarted`. Empty before the first batch, and on ranks without rollouts.
        """
        return {} if self._supply is None else dict(self._supply.metrics)

    @property
    def dropped(self) -> dict[str, int]:
        """Why groups were dropped and how many, in all.

        "stale": too far behind, or of weights that were given up. "failed": an attempt failed for good, or the run went
        back to a checkpoint twice from the same batch.
        """
        counts = {"stale": self._counts["groups_dropped_stale"], "failed": self._counts["groups_dropped_failed"]}
        return {reason: count for reason, count in counts.items() if count}

    def tasks_of_step(self, step: int) -> list[Task]:
        """What `rollout(sampler, tasks, seed=pipeline.seed + step)` has to attempt to do what step number `step` does.

        Exactly so with `max_steps_off_policy=0`, where no group is dropped or drawn again.
        """
        return self._draws.of_step(step)

    def state_dict(self) -> dict[str, Any]:
        """Which groups were handed out or dropped, for a checkpoint of the training that they are for.

        With `model=` the run folder keeps that, and more. Empty before the first batch, and on ranks without rollouts.
        """
        return dict(self._stands) if self._supply is None else self._loop.wait_for(self._supply.state())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Begin with the first group that was not; the others are sampled anew.

        Raises:
            SessionError: a batch was handed out already, or the run folder says where the pipeline stands.
        """
        if not state_dict:
            return
        if self._supply is not None or self._open.keywords["model"] is not None:
            raise SessionError("load_state_dict is for a new pipeline without model=")
        self._stands = dict(state_dict)

    def close(self) -> None:
        """Stop what is under way and end the thread; a run folder keeps what was finished."""
        self._closed = True
        self._loop.close(_end_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # -- on the pipeline's event loop ---------------------------------------------------------------------------

    async def _next(self) -> list[TrajectoryGroup]:
        if self._supply is None:
            self._supply = self._open()
            self._supply.load(self._stands)
        return await self._supply.next_batch()

    def _received(self) -> None:
        assert self._supply is not None  # it has just handed out a batch
        self._supply.received()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """One question at a time: two at once would say that a batch is done with which nobody has seen."""
        if self._closed:
            raise SessionError("this pipeline was closed: make another one, which goes on where its run folder is")
        if not self._asked.acquire(blocking=False):
            raise SessionError("the next batch is being asked for already: take batches in one loop, one at a time")
        try:
            yield
        finally:
            self._asked.release()


async def _end_workers() -> None:
    """Wait for the threads of the embedded sampler, whose rows nobody waits for any more."""
    await asyncio.get_running_loop().shutdown_default_executor()
