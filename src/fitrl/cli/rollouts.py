"""The `rollout` section: tasks, reward and sampling of a run.

Enters: the section's values. Leaves: the groups of a call, whose tasks and sampling are a function of (seed, number of
the call), so that a run that is resumed goes on with what it would have had; or a `RolloutPipeline`, which keeps what
it needs for that in the run folder.
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
from fitrl.policy.model import TrainableModel
from fitrl.rollout.attempts import OnWeightChange
from fitrl.rollout.pipeline import RolloutPipeline
from fitrl.rollout.rollout import rollout
from fitrl.rollout.sampler import Sampler


class Rollouts:
    """What `fitrl.rollout` is called with, or `fitrl.RolloutPipeline`.

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
        max_exceptions: how many attempts of a step may raise; a fraction as a float. Not beside training.
        max_steps_off_policy: 0: a step's groups are sampled before it. More: beside the training of earlier steps, by a
            RolloutPipeline, at most so many steps behind.
        on_weight_change: of that pipeline: "continue" or "restart".
        max_resamples_of_flat_groups: of that pipeline: how often a group whose rewards are all equal makes way.
        max_retries: of that pipeline: how often an attempt that raises or takes too long is made again.
        attempt_timeout_s: of that pipeline: longest an attempt may take, in seconds; null: forever.

    Raises:
        InvalidArgumentError: a name that leads nowhere, or to something else than is needed, or an option that has no
            effect with this max_steps_off_policy.
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
        max_steps_off_policy: int = 0,
        on_weight_change: OnWeightChange = "continue",
        max_resamples_of_flat_groups: int = 0,
        max_retries: int = 2,
        attempt_timeout_s: float | None = 3600.0,
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
        }
        self._max_exceptions = max_exceptions
        self.max_steps_off_policy = max_steps_off_policy
        self._beside: dict[str, Any] = {
            "on_weight_change": on_weight_change,
            "max_resamples_of_flat_groups": max_resamples_of_flat_groups,
            "max_retries": max_retries,
            "attempt_timeout_s": attempt_timeout_s,
        }
        if max_steps_off_policy < 0:
            raise InvalidArgumentError(f"rollout.max_steps_off_policy must be at least 0, got {max_steps_off_policy}")
        if max_steps_off_policy and max_exceptions:
            raise InvalidArgumentError(
                "rollout.max_exceptions has no effect with rollout.max_steps_off_policy: see rollout.max_retries"
            )
        defaults = inspect.signature(RolloutPipeline).parameters
        given = [name for name, value in self._beside.items() if value != defaults[name].default]
        if given and not max_steps_off_policy:
            raise InvalidArgumentError(
                f"rollout.{given[0]} has no effect with max_steps_off_policy=0: nothing is sampled beside training"
            )

    def draw(self, seed: int, call: int) -> tuple[list[Any], int]:
        """The tasks of a call, and the seed of its sampling."""
        random_numbers = random.Random(f"{seed}/{call}")
        return random_numbers.sample(self.tasks, self.tasks_per_step), random_numbers.getrandbits(31)

    def groups(self, sampler: Sampler, *, seed: int, call: int) -> list[TrajectoryGroup]:
        """Attempt the tasks of a call."""
        tasks, sampling_seed = self.draw(seed, call)
        return rollout(sampler, tasks, seed=sampling_seed, max_exceptions=self._max_exceptions, **self._options)

    def pipeline(self, sampler: Sampler, *, model: TrainableModel, seed: int) -> RolloutPipeline:
        """Attempt the tasks beside training, with a sampler that has weights of its own."""
        return RolloutPipeline(
            sampler,
            self.tasks,
            groups_per_step=self.tasks_per_step,
            max_steps_off_policy=self.max_steps_off_policy,
            model=model,
            seed=seed,
            **self._beside,
            **self._options,
        )


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
