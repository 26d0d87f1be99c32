"""`Draws`: which task the groups of a pipeline attempt, and with which seeds: a function of their numbers.

Groups are numbered from 0 in the order in which they are begun. What a number means depends on nothing that happens,
so a pipeline that was killed begins the same groups again.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

from fitrl.rollout.rollout import attempt_seed

_FRESH = 15_485_863  # between the seeds of attempts that are made once more


class Draws:
    """An endless order of tasks: all of them, shuffled, then all of them again.

    Args:
        tasks: to attempt.
        groups_per_step: groups of a step; the number of a step is a part of its groups' seeds.
        group_size: attempts of a group.
        seed: of the order and of the sampling.
    """

    def __init__(self, tasks: Sequence[Any], *, groups_per_step: int, group_size: int, seed: int) -> None:
        self._tasks = list(tasks)
        self._groups_per_step = groups_per_step
        self._group_size = group_size
        self._seed = seed
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def task(self, number: int, redraw: int = 0) -> Any:
        """The task of a group; of one drawn again, because its rewards were all equal, another, where there are any."""
        epoch, place = divmod(number, len(self._tasks))
        if redraw and (others := len(self._tasks) - 1):
            place += 1 + (random.Random(f"{self._seed}/{number}").randrange(others) + redraw) % others
        return self._tasks[self._order(epoch)[place % len(self._tasks)]]

    def of_step(self, step: int) -> list[Any]:
        """The tasks of a step's groups, where none is drawn again, dropped or late."""
        first = step * self._groups_per_step
        return [self.task(number) for number in range(first, first + self._groups_per_step)]

    def seed(self, number: int, attempt: int, *, redraw: int = 0, retry: int = 0) -> int:
        """The seed of one attempt: that of `rollout(tasks of the step, seed=seed + step)`, or a fresh one."""
        step, place = divmod(number, self._groups_per_step)
        usual = attempt_seed(self._seed + step, place * self._group_size + attempt)
        return usual + (1_000 * redraw + retry) * _FRESH

    def _shuffled(self, epoch: int) -> list[int]:
        return random.Random(f"{self._seed}/{epoch}").sample(range(len(self._tasks)), len(self._tasks))
