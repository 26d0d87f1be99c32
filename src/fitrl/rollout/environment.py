"""`Environment`: a task as a conversation with something that answers, and `EnvironmentAgent`, which plays it.

Enters: a factory of environments. Leaves: `agent` and `reward` for `rollout`, `RolloutPipeline` and
`RolloutDataModule`. All turns of an episode are one trajectory; completions keep their token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Protocol, runtime_checkable

from fitrl.data.completion import Completion, Message, Tool
from fitrl.data.groups import Trajectory
from fitrl.errors import InvalidArgumentError
from fitrl.rollout.rollout import Chat


@runtime_checkable
class Environment(Protocol):
    """One episode of a task; each attempt gets one of its own.

    One that holds something open is an async context manager too: it is entered before `reset`, and left however the
    episode ends.
    """

    @property
    def tools(self) -> list[Tool] | None:
        """Tools that are offered, as chat templates take them; None: none."""

    async def reset(self, task: Any) -> list[Message]:
        """Begin the episode; returns the messages that the policy reads first."""

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        """Take what the policy said; returns the messages that answer it, and whether the episode is over."""

    async def reward(self) -> float:
        """How good the episode was; asked once, at its end."""


class EnvironmentAgent:
    """Plays environments: `rollout(sampler, tasks, agent=agent, reward=agent.reward)`.

    Args:
        make: makes an environment, for one episode.
        max_turns: the policy speaks at most so often; then the episode ends as it stands.

    Raises:
        InvalidArgumentError: `max_turns` is below 1.
    """

    def __init__(self, make: Callable[[], Environment], *, max_turns: int = 8) -> None:
        if max_turns < 1:
            raise InvalidArgumentError(f"max_turns must be at least 1, got {max_turns}")
        self.make = make
        self.max_turns = max_turns

    async def __call__(self, chat: Chat, task: Any) -> Trajectory:
        """Play one episode; its trajectory has the environment's reward and the metric `turns`."""
        environment = self.make()
        async with AsyncExitStack() as stack:
            if isinstance(environment, AbstractAsyncContextManager):
                await stack.enter_async_context(environment)
            messages: list[Message | Completion] = [*await environment.reset(task)]
            turns, is_over = 0, False
            while not is_over and turns < self.max_turns:
                said = await chat(messages, tools=environment.tools)
                answers, is_over = await environment.step(said.message)
                messages += [said, *answers]
                turns += 1
            return Trajectory(
                messages_and_choices=messages,
                tools=environment.tools,
                reward=await environment.reward(),
                metrics={"turns": turns},
            )

    @staticmethod
    def reward(task: Any, trajectory: Trajectory) -> float:
        """The reward that the environment gave."""
        return trajectory.reward
