"""How many steps tokens are behind, and what a completion over a change of weights says of itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fitrl
from fitrl.data.completion import Completion
from fitrl.data.tokens import tokenize
from fitrl.errors import DataError
from fitrl.rollout.versions import Versions, group_versions, token_versions
from helpers import completion, facts, token_history, token_trajectory, user


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 4))
def test_steps_behind_are_versions_seen_since(jumps, limit) -> None:
    versions, seen = Versions(limit + 1), [0]
    versions.see(0)
    for jump in jumps:
        seen.append(seen[-1] + jump)
        assert versions.see(seen[-1]) and not versions.see(seen[-1])
    for version in range(seen[-1] + 1):
        behind = sum(later > version for later in seen)
        assert min(behind, limit + 1) == min(versions.behind(version), limit + 1)
        assert versions.are_usable((version, seen[-1]), limit) == (behind <= limit)


def test_versions_that_were_given_up_do_not_count() -> None:
    versions = Versions(3, [0, 4, 8])
    assert versions.see(4) and versions.seen == [0, 4]
    assert not versions.are_usable((4, 8), 3) and versions.are_usable((0, 4), 1) and versions.are_usable(None, 0)


def test_each_token_keeps_its_version(tiny_tokenizer) -> None:
    said = completion("17", version=2, versions=(2, 3, 3))
    trajectory = fitrl.Trajectory(messages_and_choices=[user("8+9="), said, user("sure?"), completion("7", version=5)])
    [history] = tokenize(trajectory, tiny_tokenizer).histories
    assert history.versions[history.mask].tolist() == [2, 3, 3, 5, 5]
    assert trajectory.policy_versions == (2, 5) and group_versions(fitrl.TrajectoryGroup([trajectory])) == (2, 5)
    assert token_versions(trajectory) == {2: 1, 3: 2, 5: 2}
    again = fitrl.Trajectory.from_json(trajectory.to_json())
    assert facts(again) == facts(trajectory)


def test_histories_of_tokens_count_what_was_sampled() -> None:
    trajectory = token_trajectory(token_history([1, 2, 3, 4], [0, 1, 1, 0]))
    assert token_versions(trajectory) == {0: 2}
    versions = Versions(2, [0, 1])
    assert versions.mean_and_max([fitrl.TrajectoryGroup([trajectory])]) == (1.0, 1.0)
    assert versions.mean_and_max([fitrl.TrajectoryGroup()]) == (0.0, 0.0)


def test_versions_of_another_length_are_an_error(tiny_tokenizer) -> None:
    trajectory = fitrl.Trajectory(messages_and_choices=[user("1+1="), completion("2", versions=(1,))])
    with pytest.raises(DataError, match="2 tokens but 1 versions"):
        tokenize(trajectory, tiny_tokenizer)


def test_completions_written_before_they_had_versions_are_read() -> None:
    data = completion("2", version=4).to_dict()
    del data["versions"]
    assert Completion.from_dict(data) == completion("2", version=4)
    assert torch.equal(torch.tensor(Completion.from_dict(data).policy_versions), torch.tensor([4, 4]))
