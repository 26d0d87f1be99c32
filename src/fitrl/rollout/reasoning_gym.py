"""`ReasoningGym`: the tasks and verifiers of the package reasoning-gym, as a reward or as environments.

Enters: a data set's name and settings. Leaves: tasks for `rollout`, each with its question as prompt, and their score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fitrl.data.completion import Message, Tool
from fitrl.data.groups import Trajectory
from fitrl.errors import InvalidArgumentError, MissingDependencyError

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def tagged_answer(text: str) -> str:
    """What stands between the last `<answer>` and `</answer>`; the whole text where there are none."""
    found = _TAGGED.findall(text)
    return (found[-1] if found else text).strip()


class ReasoningGym:
    """One data set of reasoning-gym (`pip install 'fitrl[reasoning-gym]'`).

    Args:
        dataset: its name, "chain_sum" say.
        size: how many tasks.
        seed: of the tasks.
        config: the data set's own settings.
        instruction: a system message before each question; None: none.
        answer_of: finds the answer in what the policy said last; None where there is none.

    Raises:
        MissingDependencyError: the package is not installed.
        InvalidArgumentError: it has no such data set, or the data set no such setting.

    Example:
        >>> gym = ReasoningGym("chain_sum", config={"max_terms": 3})  # doctest: +SKIP
        >>> groups = fitrl.rollout(sampler, gym.tasks, reward=gym.reward)  # doctest: +SKIP
        >>> agent = fitrl.EnvironmentAgent(gym.environment)  # or in environments  # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: str,
        *,
        size: int = 1000,
        seed: int = 0,
        config: Mapping[str, Any] = MappingProxyType({}),
        instruction: str | None = None,
        answer_of: Callable[[str], str | None] = tagged_answer,
    ) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise MissingDependencyError("ReasoningGym needs pip install 'fitrl[reasoning-gym]'") from error
        try:
            self.dataset = reasoning_gym.create_dataset(dataset, size=size, seed=seed, **config)
        except (ValueError, TypeError, AssertionError) as error:
            raise InvalidArgumentError(f"reasoning-gym cannot make {dataset!r} with {dict(config)}: {error}") from error
        self.instruction = instruction
        self.answer_of = answer_of
        self.tasks: list[dict[str, Any]] = [
            {"messages": self._messages(entry), "entry": entry} for entry in self.dataset
        ]

    def reward(self, task: dict[str, Any], trajectory: Trajectory) -> float:
        """The verifier's score of the last thing that the policy said, in [0, 1]."""
        return self.score(task, trajectory.completions()[-1].text)

    def score(self, task: dict[str, Any], text: str) -> float:
        """The verifier's score of a text."""
        return float(self.dataset.score_answer(self.answer_of(text), task["entry"]))

    def environment(self) -> Question:
        """An environment for one episode of one turn."""
        return Question(self)

    def _messages(self, entry: dict[str, Any]) -> list[Message]:
        system = [] if self.instruction is None else [{"role": "system", "content": self.instruction}]
        return [*system, {"role": "user", "content": entry["question"]}]


class Question:
    """A question of reasoning-gym and its answer, as an `Environment`."""

    tools: list[Tool] | None = None

    def __init__(self, gym: ReasoningGym) -> None:
        self._gym = gym
        self._task: dict[str, Any] = {}
        self._said = ""

    async def reset(self, task: dict[str, Any]) -> list[Message]:
        """Ask."""
        self._task, self._said = task, ""
        return [dict(message) for message in task["messages"]]

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        """Take the answer."""
        self._said = str(message.get("content") or "")
        return [], True

    async def reward(self) -> float:
        """The verifier's score."""
        return self._gym.score(self._task, self._said)
