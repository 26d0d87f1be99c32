"""Environments: turns, tools, an end, and what they hold open."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fitrl
from fake_sampler import FakeSampler
from fitrl.errors import GroupError, InvalidArgumentError
from fitrl.rollout.environment import Environment, EnvironmentAgent
from helpers import user


class Counter:
    """Over when the policy has spoken `task` times; better the sooner."""

    tools = [{"type": "function", "function": {"name": "count"}}]
    open: list[str] = []

    def __init__(self) -> None:
        self.spoken = 0

    async def __aenter__(self) -> Counter:
        self.open.append("entered")
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.open.append("left")

    async def reset(self, task: dict[str, Any]) -> list[fitrl.Message]:
        self.task = task
        return [user(task["text"])]

    async def step(self, message: fitrl.Message) -> tuple[list[fitrl.Message], bool]:
        await asyncio.sleep(0)
        assert message["role"] == "assistant"
        self.spoken += 1
        if self.task.get("breaks"):
            raise OSError("the environment broke")
        return [{"role": "tool", "content": str(self.spoken)}], self.spoken == self.task["turns"]

    async def reward(self) -> float:
        return 1.0 / self.spoken


def play(task: dict[str, Any], **options: Any) -> fitrl.TrajectoryGroup:
    agent = EnvironmentAgent(Counter, **options)
    [group] = fitrl.rollout(FakeSampler(), [task], agent=agent, reward=agent.reward, group_size=2)
    return group


def test_an_episode_is_one_trajectory_of_all_turns() -> None:
    assert isinstance(Counter(), Environment)
    for trajectory in play({"text": "go", "turns": 3}):
        roles = [message["role"] for message in trajectory.messages()]
        assert roles == ["user", *["assistant", "tool"] * 3]
        assert trajectory.reward == pytest.approx(1 / 3) and trajectory.metrics == {"turns": 3}
        assert trajectory.tools == Counter.tools and len(trajectory.completions()) == 3


def test_it_ends_after_the_most_turns() -> None:
    for trajectory in play({"text": "go", "turns": 100}, max_turns=2):
        assert len(trajectory.completions()) == 2 and trajectory.reward == 0.5
    with pytest.raises(InvalidArgumentError, match="max_turns must be at least 1, got 0"):
        EnvironmentAgent(Counter, max_turns=0)


def test_what_it_holds_open_is_closed_however_it_ends() -> None:
    Counter.open.clear()
    with pytest.raises(GroupError, match="the environment broke"):
        play({"text": "go", "turns": 1, "breaks": True})
    assert Counter.open.count("entered") == Counter.open.count("left") > 0


def test_it_is_closed_when_its_group_is_stopped() -> None:
    sampler, agent = FakeSampler(), EnvironmentAgent(Counter)
    Counter.open.clear()
    sampler.hold("slow")
    options = {"agent": agent, "reward": agent.reward, "group_size": 1, "groups_per_step": 1}
    with fitrl.RolloutPipeline(sampler, [{"text": "slow", "turns": 1}], **options) as pipeline:
        asking = pipeline._loop.spawn(pipeline._next())
        sampler.wait_for("slow")
        asking.cancel()
    assert Counter.open.count("entered") == Counter.open.count("left") > 0
