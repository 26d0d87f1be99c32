"""Tasks of reasoning-gym against the package's own verifier."""

from __future__ import annotations

import sys

import pytest
import reasoning_gym

import fitrl
from fitrl.errors import InvalidArgumentError, MissingDependencyError
from fitrl.rollout.environment import Environment, EnvironmentAgent
from fitrl.rollout.reasoning_gym import ReasoningGym, tagged_answer
from helpers import completion


def test_tasks_and_scores_are_the_packages_own() -> None:
    gym = ReasoningGym("chain_sum", size=5, seed=3, config={"max_terms": 3}, instruction="Be brief.")
    own = reasoning_gym.create_dataset("chain_sum", size=5, seed=3, max_terms=3)
    assert [task["entry"] for task in gym.tasks] == list(own)
    for task, entry in zip(gym.tasks, own, strict=True):
        assert [m["role"] for m in task["messages"]] == ["system", "user"]
        assert task["messages"][1]["content"] == entry["question"]
        for text in (entry["answer"], f"so <answer> {entry['answer']} </answer>.", "no idea"):
            said = fitrl.Trajectory(messages_and_choices=[*task["messages"], completion(text)])
            expected = own.score_answer(tagged_answer(text), entry)
            assert gym.reward(task, said) == gym.score(task, text) == expected
        assert gym.score(task, f"<answer>{entry['answer']}</answer>") == 1.0


@pytest.mark.parametrize("in_environments", [False, True])
def test_the_tiny_policy_attempts_them(tiny_policy, in_environments) -> None:
    gym = ReasoningGym("chain_sum", size=2, config={"min_digits": 1, "max_digits": 1})
    agent = EnvironmentAgent(gym.environment)
    assert isinstance(gym.environment(), Environment)
    how = {"agent": agent, "reward": agent.reward} if in_environments else {"reward": gym.reward}
    sampler = fitrl.TransformersSampler(tiny_policy)
    for task, group in zip(
        gym.tasks, fitrl.rollout(sampler, gym.tasks, group_size=3, max_new_tokens=3, seed=1, **how), strict=True
    ):
        assert group.rewards == [gym.score(task, trajectory.completions()[0].text) for trajectory in group]


def test_what_it_cannot_make_is_an_error(monkeypatch) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot make 'nope'"):
        ReasoningGym("nope")
    with pytest.raises(InvalidArgumentError, match="'foo': 1.*foo"):
        ReasoningGym("chain_sum", config={"foo": 1})
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingDependencyError, match=r"fitrl\[reasoning-gym\]"):
        ReasoningGym("chain_sum")
