"""Run the pending trajectories of groups: bounded concurrency, counted exceptions, a progress bar."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Coroutine, Iterable

from fitrl.data.groups import ExceptionRecord, Trajectory, TrajectoryGroup
from fitrl.errors import GroupError, InvalidArgumentError


async def gather(
    groups: Iterable[TrajectoryGroup],
    *,
    max_concurrency: int | None = None,
    max_exceptions: int | float = 0,
    progress: bool | str = False,
) -> list[TrajectoryGroup]:
    """Await every pending trajectory of every group and return the groups, in order.

    Args:
        groups: groups made of trajectories or awaitables; changed in place and returned. Also when it raises, every
            trajectory that was finished is in its group, and nothing is pending any more.
        max_concurrency: how many rollouts may run at once; None = all. An awaitable that is a
            coroutine does not start before its turn.
        max_exceptions: how many rollouts may raise: an int is a count, a float in [0, 1] a fraction of
            all pending rollouts. Each one that did is kept in its group's `exceptions`.
        progress: True, or a title, shows a progress bar on standard error.

    Raises:
        GroupError: more rollouts raised than allowed. The others are cancelled first.
        InvalidArgumentError: a limit is out of range, or a group is given twice; nothing has run.
    """
    resolved = list(groups)
    if len({id(group) for group in resolved}) < len(resolved):
        raise InvalidArgumentError("groups holds the same TrajectoryGroup twice: its rollouts can run only once")
    jobs = [(group, job) for group in resolved for job in group.pending]
    allowed = _allowed(max_exceptions, len(jobs))
    if max_concurrency is not None and max_concurrency < 1:
        raise InvalidArgumentError(f"max_concurrency must be at least 1 or None, got {max_concurrency}")
    slots = asyncio.Semaphore(max_concurrency if max_concurrency is not None else max(len(jobs), 1))
    raised: list[BaseException] = []
    results: dict[int, Trajectory] = {}

    with _Bar(progress, len(jobs)) as bar:

        async def run(index: int, group: TrajectoryGroup, job: Awaitable[Trajectory]) -> None:
            try:
                async with slots:
                    result = await job
                if not isinstance(result, Trajectory):
                    raise TypeError(f"a rollout returned {type(result).__name__} instead of a Trajectory")
                results[index] = result
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and is_cancelled():
                    raise
                raised.append(error)
                group.exceptions.append(ExceptionRecord.from_exception(error))
                if len(raised) > allowed:
                    raise GroupError(
                        f"{len(raised)} of {len(jobs)} rollouts raised, max_exceptions={max_exceptions} allows "
                        f"{allowed}; the last: {type(error).__name__}: {error}",
                        raised,
                    ) from error
            finally:
                bar.advance()

        tasks = [asyncio.create_task(run(index, group, job)) for index, (group, job) in enumerate(jobs)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for _, job in jobs:
                if isinstance(job, Coroutine):
                    job.close()  # one that never had its turn would warn that it was never awaited
            for group in resolved:
                group.pending = []
            for index in sorted(results):
                jobs[index][0].trajectories.append(results[index])
    return resolved


def _allowed(max_exceptions: int | float, num_jobs: int) -> int:
    if isinstance(max_exceptions, float):
        if not 0.0 <= max_exceptions <= 1.0:
            raise InvalidArgumentError(
                f"max_exceptions as a float is a fraction in [0, 1], got {max_exceptions}; pass an int for a count"
            )
        return math.floor(max_exceptions * num_jobs + 1e-9)  # 0.29 of 100 is 29
    if max_exceptions < 0:
        raise InvalidArgumentError(f"max_exceptions must not be negative, got {max_exceptions}")
    return max_exceptions


def is_cancelled() -> bool:
    """Whether it is this task that is being cancelled, and not something that it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Bar(contextlib.AbstractContextManager["_Bar"]):
    """A rich progress bar, or nothing."""

    def __init__(self, title: bool | str, total: int) -> None:
        self._progress = None
        if title is not False and total:
            from rich.console import Console
            from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

            columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task(title if isinstance(title, str) else "rollouts", total=total)

    def advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)

    def __enter__(self) -> _Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()
