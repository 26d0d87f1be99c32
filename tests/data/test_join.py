"""Groups of several ranks: those that all hold alike count once, whatever they hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import fitrl
from fitrl.data import ranks
from fitrl.data.completion import Completion
from fitrl.data.join import join_groups
from fitrl.errors import DataError
from samples import make_groups


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch) -> None:
    """The other one always says what this one does."""
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "collect", lambda text, **options: [text, text])


def test_groups_that_are_alike_are_told_so_without_their_json(monkeypatch) -> None:
    groups = make_groups(seed=1)
    monkeypatch.setattr(fitrl.TrajectoryGroup, "to_json", lambda group: pytest.fail("takes too long"))
    assert join_groups(groups) == groups


def test_what_only_json_can_compare_is_compared_by_it() -> None:
    groups = make_groups(seed=1)
    groups[0].metadata["score"] = np.float64(0.5)
    assert join_groups(groups) == groups


def test_other_groups_of_the_other_rank_are_added(monkeypatch) -> None:
    ours, theirs = make_groups(seed=1), make_groups(seed=2)
    lines = "\n".join(group.to_json() for group in theirs)
    monkeypatch.setattr(ranks, "collect", lambda text, **options: [text, f"={lines}" if "{" in text else "=another"])
    joined = join_groups(ours)
    assert [group.to_json() for group in joined] == [group.to_json() for group in (*ours, *theirs)]


def test_what_json_cannot_hold_is_refused() -> None:
    groups = make_groups(seed=1)
    groups[0].metadata["what"] = object()
    with pytest.raises(DataError, match="metadata.what is <object"):
        join_groups(groups)
    with pytest.raises(DataError, match="is a int"):
        join_groups([1])  # type: ignore[list-item]


def test_a_group_that_is_pending_is_refused() -> None:
    async def later() -> fitrl.Trajectory:
        raise NotImplementedError

    waiting = later()
    with pytest.raises(DataError, match="pending trajectories"):
        join_groups([fitrl.TrajectoryGroup([waiting])])
    waiting.close()


@pytest.mark.parametrize("what", ["token_ids", "logprobs", "prompt_ids", "version", "reward", "appended"])
def test_one_number_that_differs_is_noticed(what, monkeypatch) -> None:
    """What the ranks say of their groups decides; here only what this one says is looked at."""

    def said(changed: bool) -> set[str]:
        completion = Completion(
            message={"role": "assistant", "content": "7"}, token_ids=(5, 6), logprobs=(-0.5, -1.0), prompt_ids=(1, 2)
        )
        reward, history = 1.0, [{"role": "user", "content": "3+4"}, completion]
        if changed and what == "reward":
            reward = 0.5
        elif changed and what == "appended":
            history.append({"role": "user", "content": "and?"})
        elif changed:
            values = {"token_ids": (5, 7), "logprobs": (-0.5, -1.1), "prompt_ids": (2, 1), "version": 3}
            history[1] = dataclasses.replace(completion, **{what: values[what]})
        extra = fitrl.History(messages_and_choices=history)
        texts: list[str] = []
        monkeypatch.setattr(ranks, "collect", lambda text, **options: [texts.append(text) or text] * 2)
        join_groups([fitrl.TrajectoryGroup([fitrl.Trajectory(additional_histories=[extra], reward=reward)])])
        return set(filter(None, texts))

    assert said(changed=False) == said(changed=False)
    assert said(changed=False).isdisjoint(said(changed=True))
