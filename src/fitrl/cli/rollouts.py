"""The `rollout` section: tasks, reward and sampling of a run.

Enters: the section's values. Leaves: the groups of a call, whose tasks and sampling are a function of (seed, number of
the call), so that a run that is resumed goes on with what it would have had.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fitrl.cli.imports import Named, find_object
from fitrl.data.groups import TrajectoryGroup
from fitrl.errors import DataError, InvalidArgumentError
from fitrl.rollout.rollout import rollout
from fitrl.rollout.sampler import Sampler


class Rollouts:
    """What `fitrl.rollout` is called with.

    Args:
        tasks: `package.module:name` of a list or of a function that returns one, a mapping with `class_path` and
            `init_args`, or a JSONL file with a task per line.
        reward: `package.module:name` of `reward(task, trajectory) -> float`, sync or async, or a mapping with
            `class_path` and `init_args` of a callable object.
        agent: `package.module:name` of `await agent(chat, task) -> Trajectory`, or such a mapping; null: one turn.
        tasks_per_step: tasks drawn for a step, without repetition; null: all of them.
        group_size: attempts per task.
        max_new_tokens: longest answer, in tokens.
        temperature: sampling temperature.
        top_p: nucleus sampling; below 1 needs fit_rl.precalculate_logprobs.
        top_k: most likely tokens to sample from; null: all.
        stop: strings that end an answer.
        max_concurrency: how many attempts run at once; null: all.
        max_exceptions: how many attempts of a step may raise; a fraction as a float.

    Raises:
        InvalidArgumentError: a name that leads nowhere, or to something else than is needed.
        DataError: a file of tasks that cannot be read.
    """

    def __init__(
        self,
        *,
        tasks: Named,
        reward: Named,
        agent: Named | None = None,
        tasks_per_step: int | None = None,
        group_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: list[str] | None = None,
        max_concurrency: int | None = None,
        max_exceptions: int | float = 0,
    ) -> None:
        self.tasks = read_tasks(tasks)
        self.tasks_per_step = len(self.tasks) if tasks_per_step is None else tasks_per_step
        if not 1 <= self.tasks_per_step <= len(self.tasks):
            raise InvalidArgumentError(
                f"rollout.tasks_per_step={tasks_per_step} must be between 1 and the number of tasks, {len(self.tasks)}"
            )
        self._options: dict[str, Any] = {
            "reward": _callable(reward, "rollout.reward"),
            "agent": None if agent is None else _callable(agent, "rollout.agent"),
            "group_size": group_size,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": stop or (),
            "max_concurrency": max_concurrency,
            "max_exceptions": max_exceptions,
        }

    def draw(self, seed: int, call: int) -> tuple[list[Any], int]:
        """The tasks of a call, and the seed of its sampling."""
        random_numbers = random.Random(f"{seed}/{call}")
        return random_numbers.sample(self.tasks, self.tasks_per_step), random_numbers.getrandbits(31)

    def groups(self, sampler: Sampler, *, seed: int, call: int) -> list[TrajectoryGroup]:
        """Attempt the tasks of a call."""
        tasks, sampling_seed = self.draw(seed, call)
        return rollout(sampler, tasks, seed=sampling_seed, **self._options)


def read_tasks(named: Named) -> list[Any]:
    """Tasks of a JSONL file or of a Python object.

    Raises:
        InvalidArgumentError: the name leads to nothing that has tasks.
        DataError: a file that cannot be read, or no task at all.
    """
    if isinstance(named, str) and named.endswith(".jsonl"):
        tasks = _read_file(Path(named).expanduser())
    else:
        found = find_object(named, "rollout.tasks")
        if callable(found) and not isinstance(found, Iterable):
            try:
                inspect.signature(found).bind()
            except TypeError as error:
                raise InvalidArgumentError(
                    f"rollout.tasks={named!r} cannot be called without arguments: {error}"
                ) from error
            found = found()
        if isinstance(found, str | bytes) or not isinstance(found, Iterable):
            raise InvalidArgumentError(
                f"rollout.tasks={named!r} is a {type(found).__name__}; a list of tasks or a function that returns one "
                "is needed"
            )
        tasks = list(found)
    if not tasks:
        raise DataError(f"rollout.tasks={named!r} holds no task")
    return tasks


def _read_file(path: Path) -> list[Any]:
    if not path.is_file():
        raise DataError(f"rollout.tasks: there is no file {path}")
    tasks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                tasks.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"rollout.tasks: line {number} of {path} is no JSON: {error}") from error
    return tasks


def _callable(named: Named, what: str) -> Any:
    found = find_object(named, what)
    if not callable(found):
        raise InvalidArgumentError(f"{what}={named!r} is a {type(found).__name__}, which cannot be called")
    return found
