"""`gather`: order, concurrency, exceptions, cancellation. Events decide who runs when; nothing sleeps."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitrl.data.gather import gather
from fitrl.data.groups import Trajectory, TrajectoryGroup
from fitrl.errors import GroupError, InvalidArgumentError
from helpers import trajectory


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """Fail on any warning, those of forgotten coroutines included."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(warning.message) for warning in seen] == []


async def _fails(error: BaseException | None = None) -> Trajectory:
    raise error or ValueError("broken")


async def _works(reward: float = 0.0) -> Trajectory:
    return trajectory(reward=reward)


def _rewards(groups: list[TrajectoryGroup]) -> list[list[float]]:
    return [group.rewards for group in groups]


async def _turns(count: int = 20) -> None:
    """Let every task that can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_groups_and_trajectories_keep_their_order_whoever_ends_first() -> None:
    async def main() -> list[TrajectoryGroup]:
        done = [asyncio.Event() for _ in range(7)]

        async def attempt(number: int) -> Trajectory:
            """End after the attempt that comes next: the last one ends first."""
            if number + 1 < len(done) - 1:
                await done[number + 1].wait()
            done[number].set()
            return trajectory(reward=number)

        groups = [TrajectoryGroup([attempt(0), attempt(1), attempt(2)]), TrajectoryGroup(map(attempt, (3, 4, 5)))]
        gathered = await gather(groups)
        assert all(left is right for left, right in zip(gathered, groups, strict=True))
        return gathered

    groups = asyncio.run(main())

    assert _rewards(groups) == [[0, 1, 2], [3, 4, 5]]
    assert all(not group.pending for group in groups)


def test_groups_may_come_from_a_generator_and_hold_finished_trajectories() -> None:
    async def main() -> list[TrajectoryGroup]:
        return await gather(TrajectoryGroup([trajectory(reward=i), _works(i + 0.5)]) for i in range(2))

    assert _rewards(asyncio.run(main())) == [[0, 0.5], [1, 1.5]]


def test_nothing_pending_is_fine() -> None:
    assert asyncio.run(gather([])) == []
    assert _rewards(asyncio.run(gather([TrajectoryGroup([trajectory(reward=1)]), TrajectoryGroup()]))) == [[1], []]


@given(st.integers(1, 9), st.integers(1, 5))
def test_no_more_than_max_concurrency_run_and_no_fewer(num_jobs: int, limit: int) -> None:
    running: set[int] = set()
    most: list[int] = []

    async def main() -> None:
        gates = [asyncio.Event() for _ in range(num_jobs)]

        async def attempt(number: int) -> Trajectory:
            running.add(number)
            await gates[number].wait()
            running.remove(number)
            return trajectory()

        work = asyncio.create_task(gather([TrajectoryGroup(map(attempt, range(num_jobs)))], max_concurrency=limit))
        for number in range(num_jobs):
            await _turns()
            most.append(len(running))
            gates[number].set()
        await work

    asyncio.run(main())

    assert most == [min(limit, num_jobs - done) for done in range(num_jobs)]


def test_all_run_at_once_by_default() -> None:
    async def main() -> list[TrajectoryGroup]:
        barrier = asyncio.Barrier(50)

        async def attempt() -> Trajectory:
            await barrier.wait()
            return trajectory()

        return await gather([TrajectoryGroup(attempt() for _ in range(50))])

    assert len(asyncio.run(main())[0]) == 50


@pytest.mark.parametrize(
    ("num_failures", "num_jobs", "max_exceptions"), [(1, 2, 1), (3, 4, 10), (2, 4, 0.5), (1, 4, 0.25), (4, 4, 1.0)]
)
def test_allowed_exceptions_are_kept_with_their_group(
    num_failures: int, num_jobs: int, max_exceptions: int | float
) -> None:
    async def main() -> list[TrajectoryGroup]:
        bad = [_fails(KeyError(i)) for i in range(num_failures)]
        good = [_works(i) for i in range(num_jobs - num_failures)]
        return await gather([TrajectoryGroup(bad), TrajectoryGroup(good)], max_exceptions=max_exceptions)

    failed, fine = asyncio.run(main())

    assert [(record.type, record.message) for record in failed.exceptions] == [
        ("KeyError", str(i)) for i in range(num_failures)
    ]
    assert "in _fails" in failed.exceptions[0].traceback
    assert (len(failed), len(fine), fine.exceptions) == (0, num_jobs - num_failures, [])
    assert failed.pending == []


@pytest.mark.parametrize(
    ("num_failures", "num_jobs", "max_exceptions"), [(1, 1, 0), (3, 9, 2), (3, 4, 0.5), (1, 4, 0.24), (1, 4, 0.0)]
)
def test_more_exceptions_than_allowed_raise_one_error_with_all_of_them(
    num_failures: int, num_jobs: int, max_exceptions: int | float, no_warnings: None
) -> None:
    async def main() -> None:
        jobs: list[Awaitable[Trajectory]] = [_works() for _ in range(num_jobs - num_failures)]
        await gather(
            [TrajectoryGroup(jobs + [_fails(KeyError(i)) for i in range(num_failures)])], max_exceptions=max_exceptions
        )

    with pytest.raises(GroupError, match=rf"of {num_jobs} rollouts raised.*max_exceptions={max_exceptions}") as caught:
        asyncio.run(main())

    assert all(isinstance(error, KeyError) for error in caught.value.exceptions)
    assert f"{len(caught.value.exceptions)} of" in str(caught.value)
    assert "KeyError" in str(caught.value)


def test_the_error_shows_where_the_last_rollout_raised() -> None:
    async def main() -> None:
        await gather([TrajectoryGroup([_fails()])])

    with pytest.raises(GroupError) as caught:
        asyncio.run(main())

    assert caught.value.__cause__ is caught.value.exceptions[-1]


@given(st.integers(0, 100), st.integers(1, 60))
def test_a_fraction_of_rollouts_may_raise_exactly(percent: int, num_jobs: int) -> None:
    allowed = percent * num_jobs // 100  # in whole numbers, which do not round

    async def failing(count: int) -> list[TrajectoryGroup]:
        jobs = [_fails() for _ in range(count)] + [_works() for _ in range(num_jobs - count)]
        return await gather([TrajectoryGroup(jobs)], max_exceptions=percent / 100)

    assert len(asyncio.run(failing(allowed))[0].exceptions) == allowed
    if allowed < num_jobs:
        with pytest.raises(GroupError):
            asyncio.run(failing(allowed + 1))


def test_a_fraction_that_floats_cannot_hold_is_meant_as_written() -> None:
    """0.29 * 100 is 28.999999999999996."""

    async def main() -> list[TrajectoryGroup]:
        jobs = [_fails() for _ in range(29)] + [_works() for _ in range(71)]
        return await gather([TrajectoryGroup(jobs)], max_exceptions=0.29)

    assert len(asyncio.run(main())[0].exceptions) == 29


def test_a_rollout_must_return_a_trajectory() -> None:
    async def nothing() -> Any:
        return None

    with pytest.raises(GroupError, match="returned NoneType instead of a Trajectory"):
        asyncio.run(gather([TrajectoryGroup([nothing()])]))


@pytest.mark.parametrize("arguments", [{"max_concurrency": 0}, {"max_exceptions": -1}, {"max_exceptions": 1.5}])
def test_limits_out_of_range(arguments: dict[str, Any]) -> None:
    [name] = arguments
    with pytest.raises(InvalidArgumentError, match=name):
        asyncio.run(gather([TrajectoryGroup([trajectory()])], **arguments))


def test_the_same_group_twice_is_refused_before_anything_runs() -> None:
    async def main() -> list[TrajectoryGroup]:
        group = TrajectoryGroup([_works(1)])
        with pytest.raises(InvalidArgumentError, match="the same TrajectoryGroup twice"):
            await gather([group, group])
        return await gather([group])

    assert _rewards(asyncio.run(main())) == [[1]]


def test_finished_rollouts_survive_the_one_that_was_too_much(no_warnings: None) -> None:
    """Rollouts are expensive: those that are done are in their groups, and the groups can be used."""
    groups: list[TrajectoryGroup] = []

    async def main() -> None:
        done = asyncio.Event()

        async def second() -> Trajectory:
            done.set()
            return trajectory(reward=2)

        async def fails() -> Trajectory:
            await done.wait()
            raise ValueError("broken")

        async def never() -> Trajectory:
            await asyncio.Event().wait()
            raise AssertionError

        groups.extend([TrajectoryGroup([never(), _works(1)]), TrajectoryGroup([fails(), second(), never()])])
        with pytest.raises(GroupError):
            await gather(groups)

    asyncio.run(main())

    assert _rewards(groups) == [[1], [2]]
    assert [len(group.exceptions) for group in groups] == [0, 1]
    assert all(group.to_json() for group in groups)  # nothing is pending


def test_a_bad_limit_leaves_the_groups_to_be_gathered_again(no_warnings: None) -> None:
    async def main() -> list[TrajectoryGroup]:
        groups = [TrajectoryGroup([_works(1)])]
        with pytest.raises(InvalidArgumentError):
            await gather(groups, max_exceptions=-1)
        return await gather(groups)

    assert _rewards(asyncio.run(main())) == [[1]]


# -- cancellation ---------------------------------------------------------------------------------------------------


class _Attempts:
    """Attempts that wait for ever, and who of them started, was cancelled."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []

    async def attempt(self, number: int) -> Trajectory:
        self.started.append(number)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        return trajectory()


def test_cancelling_gather_stops_the_running_and_never_starts_the_others(no_warnings: None) -> None:
    attempts = _Attempts()

    async def main() -> None:
        work = asyncio.create_task(gather([TrajectoryGroup(map(attempts.attempt, range(5)))], max_concurrency=2))
        await _turns()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(main())

    assert attempts.started == attempts.cancelled == [0, 1]


def test_cancelling_gather_before_its_first_step(no_warnings: None) -> None:
    attempts = _Attempts()

    async def main() -> None:
        groups = [TrajectoryGroup([attempts.attempt(0)])]
        work = asyncio.create_task(gather(groups))
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        for job in groups[0].pending:
            job.close()  # type: ignore[attr-defined]  # gather never had them

    asyncio.run(main())

    assert attempts.started == []


def test_one_exception_too_many_stops_the_running_and_never_starts_the_others(no_warnings: None) -> None:
    attempts = _Attempts()

    async def main() -> None:
        jobs: list[Awaitable[Trajectory]] = [attempts.attempt(0), _fails(), attempts.attempt(2), attempts.attempt(3)]
        await gather([TrajectoryGroup(jobs)], max_concurrency=2)

    with pytest.raises(GroupError, match="ValueError: broken"):
        asyncio.run(main())

    assert attempts.cancelled == attempts.started
    assert 3 not in attempts.started


@pytest.mark.parametrize("as_awaitable", [asyncio.ensure_future, lambda job: job], ids=["task", "coroutine"])
def test_a_rollout_cancelled_by_somebody_else_is_not_lost(
    as_awaitable: Callable[[Any], Awaitable[Trajectory]],
) -> None:
    """A client that cancels its own request must not make a trajectory disappear without a trace."""

    async def main() -> list[TrajectoryGroup]:
        jobs = [as_awaitable(_fails(asyncio.CancelledError())), _works(1)]
        return await gather([TrajectoryGroup(jobs)], max_exceptions=1)

    [group] = asyncio.run(main())

    assert group.rewards == [1]
    assert [record.type for record in group.exceptions] == ["CancelledError"]


def test_an_exception_that_is_no_error_passes_through(no_warnings: None) -> None:
    class Stop(BaseException):
        pass

    async def main() -> None:
        await gather([TrajectoryGroup([_works(), _fails(Stop())])], max_exceptions=2)

    with pytest.raises(Stop):
        asyncio.run(main())


# -- progress -------------------------------------------------------------------------------------------------------


def test_a_progress_bar_counts_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        await gather([TrajectoryGroup([_works(), _fails(), _works()])], max_exceptions=1, progress="adding")

    asyncio.run(main())
    shown = capsys.readouterr()

    assert "adding" in shown.err
    assert "3/3" in shown.err
    assert shown.out == ""


def test_no_progress_bar_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(gather([TrajectoryGroup([_works()])]))

    assert capsys.readouterr() == ("", "")
