"""What a call can train on: what is dropped and why, in which order, and what the denominators count."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fitrl.data.groups import Completion, Trajectory, TrajectoryGroup
from fitrl.data.samples import SampleSet, build_samples
from fitrl.errors import DataError, InvalidArgumentError, TokenizationError
from helpers import completion, group, token_history, token_trajectory, trajectory, user


def _of_length(length: int, reward: float, *, sampled: int = 1) -> Trajectory:
    """A trajectory of so many tokens, the last ones sampled."""
    return token_trajectory(
        token_history(range(length), [0] * (length - sampled) + [1] * sampled),
        reward=reward,
    )


def _advantages(samples: SampleSet) -> list[list[float]]:
    return [[sample.advantage for sample in row] for row in samples.groups]


def _z_scores(rewards: Sequence[float]) -> list[float]:
    values = np.asarray(rewards, dtype=np.float64)
    return list((values - values.mean()) / (values.std() + 1e-6))


# -- what is kept ---------------------------------------------------------------------------------------------------


def test_a_group_becomes_samples_with_advantages(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    samples = build_samples([group([1, 0, 0, 1]), group([0, 0.25])], tiny_tokenizer)

    first, second = _advantages(samples)
    assert first == pytest.approx(_z_scores([1, 0, 0, 1]))
    assert second == pytest.approx(_z_scores([0, 0.25]))
    assert samples.dropped == {}
    assert samples.num_trajectories == 6
    assert samples.full_support


def test_options_of_advantages_are_passed_on(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    groups = [group([1, 0, 0, 1])]

    plain = build_samples(groups, tiny_tokenizer, scale_rewards=False)
    balanced = build_samples(groups, tiny_tokenizer, scale_rewards=False, advantage_balance=0.5)

    assert _advantages(plain) == [[0.5, -0.5, -0.5, 0.5]]
    assert _advantages(balanced) == [[0.5, -0.25, -0.25, 0.5]]
    with pytest.raises(InvalidArgumentError, match="advantage_balance"):
        build_samples(groups, tiny_tokenizer, advantage_balance=2.0)


def test_a_sample_holds_the_tokens_and_logprobs_of_all_histories(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    first = token_history([1, 2, 3], [0, 1, 0], logprobs=[0, -0.1, 0])
    nothing_said = token_history([4, 5], [0, 0])
    second = token_history([6, 7, 8, 9], [0, 0, 1, 1], logprobs=[0, 0, -0.2, -0.3])
    groups = [TrajectoryGroup([token_trajectory(first, nothing_said, second, reward=1), _of_length(3, 0)])]

    sample = build_samples(groups, tiny_tokenizer).groups[0][0]

    assert sample.histories == [first, second]  # a history without a token to learn from is left out
    assert sample.old_logprobs.tolist() == pytest.approx([math.nan, -0.1, *[math.nan] * 3, -0.2, -0.3], nan_ok=True)
    assert sample.mask.tolist() == [False, True, False, False, False, True, True]
    assert (sample.num_trainable_tokens, sample.num_input_tokens) == (3, 2 + 3)


def test_a_trajectory_of_average_reward_stays_for_the_denominators(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    samples = build_samples([group([0, 0.5, 1])], tiny_tokenizer)

    assert _advantages(samples)[0][1] == 0.0
    assert samples.metrics["data/num_trajectories"] == 3
    assert samples.metrics["data/num_tokens"] == 6  # a digit and <|end|> each


def test_building_changes_no_group(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    groups = [group([1, 0]), group([1, 1]), TrajectoryGroup()]
    before = [item.to_json() for item in copy.deepcopy(groups)]

    build_samples(groups, tiny_tokenizer, max_history_tokens=3)

    assert [item.to_json() for item in groups] == before


# -- what is dropped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewards", [[1.0], [0.0, 0.0, 0.0], [0.1] * 7])
def test_a_flat_group_is_an_outcome(tiny_tokenizer: PreTrainedTokenizerBase, rewards: list[float]) -> None:
    samples = build_samples([group(rewards)], tiny_tokenizer)

    assert samples.groups == []
    assert samples.dropped == {"flat_groups": 1}
    assert samples.metrics["data/num_groups_submitted"] == 1
    assert samples.metrics["data/num_groups_trainable"] == samples.metrics["data/num_tokens"] == 0
    assert samples.metrics["reward/mean"] == pytest.approx(rewards[0])


def test_a_flat_group_stays_where_something_else_teaches(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    samples = build_samples([group([1.0, 1.0]), group([0.5])], tiny_tokenizer, teaches_without_advantage=True)

    assert _advantages(samples) == [[0.0, 0.0], [0.0]]
    assert samples.dropped == {}


def test_an_empty_group_is_an_outcome(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    samples = build_samples([TrajectoryGroup(), group([0, 1])], tiny_tokenizer)

    assert samples.dropped == {"empty_groups": 1}
    assert len(samples.groups) == 1


def test_a_trajectory_in_which_nothing_was_sampled_is_dropped_and_counts_for_the_mean(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    silent = Trajectory(messages_and_choices=[user("?"), completion("", token_ids=())], reward=0.0)
    groups = [TrajectoryGroup([silent, trajectory(reward=1.0), trajectory(reward=0.5)])]

    samples = build_samples(groups, tiny_tokenizer)

    assert samples.dropped == {"empty_trajectories": 1}
    assert _advantages(samples)[0] == pytest.approx(_z_scores([0, 1, 0.5])[1:])


def test_overlong_trajectories_are_dropped_after_the_advantages(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    groups = [TrajectoryGroup([_of_length(9, 1.0), _of_length(4, 0.0), _of_length(8, 0.5)])]

    samples = build_samples(groups, tiny_tokenizer, max_history_tokens=8)

    assert samples.dropped == {"overlong_trajectories": 1}
    assert _advantages(samples)[0] == pytest.approx(_z_scores([1, 0, 0.5])[1:])
    assert samples.metrics["data/num_dropped_overlong"] == 1
    assert samples.metrics["data/num_trajectories"] == 2


def test_the_context_holds_for_each_history_and_the_microbatch_for_all(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    two = [token_history(range(6), [0] * 5 + [1]) for _ in range(2)]
    groups = [TrajectoryGroup([token_trajectory(*two, reward=1), _of_length(6, 0)])]

    def dropped(**limits: int) -> dict[str, int]:
        return build_samples(groups, tiny_tokenizer, **limits).dropped

    assert dropped(max_history_tokens=6) == {}
    assert dropped(max_history_tokens=5)["overlong_trajectories"] == 2
    assert dropped(max_trajectory_tokens=10) == {}  # 5 + 5 inputs: the last token of a history predicts nothing
    assert dropped(max_trajectory_tokens=9) == {"overlong_trajectories": 1}


def test_a_group_of_which_only_average_trajectories_are_left_is_flat(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    groups = [TrajectoryGroup([_of_length(9, 1.0), _of_length(4, 0.5), _of_length(9, 0.0)])]

    samples = build_samples(groups, tiny_tokenizer, max_history_tokens=8)

    assert samples.groups == []
    assert samples.dropped == {"overlong_trajectories": 2, "flat_groups": 1}


def test_a_group_of_which_nothing_is_left_is_empty(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    samples = build_samples(
        [TrajectoryGroup([_of_length(9, 1), _of_length(9, 0)])], tiny_tokenizer, max_history_tokens=8
    )

    assert samples.dropped == {"overlong_trajectories": 2, "empty_groups": 1}


def test_balance_may_leave_nothing_and_no_nan(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    long_winner = TrajectoryGroup([_of_length(9, 1.0), _of_length(4, 0.0)])

    samples = build_samples([long_winner], tiny_tokenizer, advantage_balance=1.0, max_history_tokens=8)

    assert samples.groups == []
    assert samples.dropped == {"overlong_trajectories": 1, "flat_groups": 1}
    assert all(math.isfinite(value) for value in samples.metrics.values())


def test_what_was_dropped_does_not_limit_the_support(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    truncated = Trajectory(messages_and_choices=[user("?"), completion("7", full_support=False)], reward=1.0)

    assert build_samples([TrajectoryGroup([truncated]), group([0, 1])], tiny_tokenizer).full_support
    assert not build_samples([TrajectoryGroup([truncated, trajectory()])], tiny_tokenizer).full_support


@given(
    st.lists(
        st.lists(st.tuples(st.integers(2, 12), st.sampled_from([0.0, 0.5, 1.0])), max_size=5),
        min_size=1,
        max_size=5,
    ),
    st.integers(2, 12),
)
def test_every_trajectory_and_group_is_kept_or_counted(
    tiny_tokenizer: PreTrainedTokenizerBase, attempts: list[list[tuple[int, float]]], limit: int
) -> None:
    groups = [TrajectoryGroup([_of_length(*attempt) for attempt in row]) for row in attempts]

    samples = build_samples(groups, tiny_tokenizer, max_history_tokens=limit)

    kept_groups = 0
    kept_tokens = kept_trajectories = overlong = 0
    for row in attempts:
        rewards = [reward for _, reward in row]
        if len(set(rewards)) < 2:
            continue
        fitting = [(length, reward) for length, reward in row if length <= limit]
        overlong += len(row) - len(fitting)
        if any(abs(reward - np.mean(rewards)) > 1e-9 for _, reward in fitting):
            kept_groups += 1
            kept_trajectories += len(fitting)
            kept_tokens += len(fitting)
    assert len(samples.groups) == kept_groups
    assert samples.metrics["data/num_trajectories"] == samples.num_trajectories == kept_trajectories
    assert samples.metrics["data/num_tokens"] == kept_tokens
    assert samples.dropped.get("overlong_trajectories", 0) == overlong
    assert samples.dropped.get("flat_groups", 0) + samples.dropped.get("empty_groups", 0) + kept_groups == len(groups)
    assert 0 not in samples.dropped.values()


# -- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_of_a_call(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    rewards = [[1.0, 0.0, 0.0], [0.25, 0.75], [0.5]]

    samples = build_samples([group(row) for row in rewards], tiny_tokenizer)

    stds = [float(np.std(row)) for row in rewards if len(row) > 1]
    assert samples.metrics["reward/mean"] == pytest.approx(float(np.mean(sum(rewards, []))))
    assert samples.metrics["reward/std_within_group"] == pytest.approx(float(np.mean(stds)))
    assert samples.reward_std == samples.metrics["reward/std_within_group"]
    assert samples.metrics["data/num_groups_submitted"] == 3
    assert samples.metrics["data/num_groups_trainable"] == 2
    assert samples.metrics["data/num_trajectories"] == 5
    assert samples.metrics["data/num_tokens"] == 10
    assert samples.metrics["data/num_dropped_overlong"] == 0
    assert samples.metrics["data/num_split_histories"] == 0
    assert samples.metrics["time/tokenize_s"] >= 0
    assert all(type(value) is float for value in samples.metrics.values())


def test_the_mean_advantage_is_that_of_numpy(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    samples = build_samples([group([1, 0, 0]), group([0.25, 0.75])], tiny_tokenizer)

    expected = np.abs(_z_scores([1, 0, 0]) + _z_scores([0.25, 0.75])).mean()
    assert samples.metrics["advantage/abs_mean"] == pytest.approx(float(expected))


def test_splits_are_counted(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """The second turn was sampled after other ids than the first one ended with."""
    apart = Trajectory(
        messages_and_choices=[
            user("?"),
            completion("7", prompt_ids=(1, 2)),
            user("?"),
            completion("8", prompt_ids=(1, 3, 4)),
        ],
        reward=1.0,
    )

    samples = build_samples([TrajectoryGroup([apart, trajectory()])], tiny_tokenizer)

    assert samples.metrics["data/num_split_histories"] == 1
    assert [history.token_ids.tolist() for history in samples.groups[0][0].histories] == [
        [1, 2, ord("7"), 260],
        [1, 3, 4, ord("8"), 260],
    ]


# -- bad input ------------------------------------------------------------------------------------------------------


def test_no_groups(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="groups is empty: pass at least one TrajectoryGroup"):
        build_samples([], tiny_tokenizer)


def test_pending_trajectories(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    async def attempt() -> Trajectory:
        return trajectory()

    pending = attempt()
    try:
        with pytest.raises(DataError, match=r"group 1 has 1 pending trajectories: await fitrl\.gather"):
            build_samples([group([0, 1]), TrajectoryGroup([trajectory(), pending])], tiny_tokenizer)
    finally:
        pending.close()


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_says_where(tiny_tokenizer: PreTrainedTokenizerBase, reward: float) -> None:
    with pytest.raises(DataError, match=rf"group 1: reward {reward} of trajectory 2 is not finite"):
        build_samples([group([0, 1]), group([0, 1, reward])], tiny_tokenizer)


@pytest.mark.parametrize("reward", [None, "1.0"])
def test_a_reward_that_is_no_number_says_where(tiny_tokenizer: PreTrainedTokenizerBase, reward: Any) -> None:
    wrong = group([1.0, 0.0])
    wrong.trajectories[1].reward = reward
    with pytest.raises(DataError, match="group 1: the reward of trajectory 1 must be a number, got"):
        build_samples([group([1.0, 0.0]), wrong], tiny_tokenizer)


@pytest.mark.parametrize("outside", [262, 99_999, -1])
@pytest.mark.parametrize("where", ["completion", "prompt", "choice", "token history"])
def test_a_token_id_outside_the_vocabulary_says_where(
    tiny_tokenizer: PreTrainedTokenizerBase, where: str, outside: int
) -> None:
    wrong = group([1.0, 0.0])
    place = wrong.trajectories[1]
    match where:
        case "completion":
            place.messages_and_choices[1] = completion(token_ids=[55, outside])
        case "prompt":
            place.messages_and_choices[1] = completion(token_ids=[55], prompt_ids=(1, outside))
        case "choice":
            if outside < 0:
                return  # token_id:-1 is a string, not an id
            entry = SimpleNamespace(token=f"token_id:{outside}", logprob=-1.0, bytes=None)
            place.messages_and_choices[1] = Completion.from_choice(
                SimpleNamespace(message={}, finish_reason="stop", logprobs=SimpleNamespace(content=[entry])),
                temperature=1.0,
            )
        case _:
            place.token_histories = [token_history([1, outside, 3], [0, 0, 1])]

    with pytest.raises(DataError, match=f"group 0, trajectory 1: token id {outside} is outside .*, 0 to 261"):
        build_samples([wrong], tiny_tokenizer, vocabulary_size=262)


def test_a_wrong_logprob_says_where(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Also in a flat group: a sampler that gives wrong logprobs is wrong there too."""
    wrong = Trajectory(messages_and_choices=[user("?"), completion("7", logprobs=(0.5, -0.5))])
    with pytest.raises(DataError, match=r"group 1, trajectory 2: 0\.5 is no logprob"):
        build_samples([group([0, 1]), TrajectoryGroup([trajectory(), trajectory(), wrong])], tiny_tokenizer)


def test_an_unreadable_trajectory_says_where_and_keeps_its_type(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    unreadable = Completion(
        message={"role": "assistant", "content": "7"}, token_bytes=(b"seven",), logprobs=(-0.5,), temperature=1.0
    )
    groups = [TrajectoryGroup([trajectory(), Trajectory(messages_and_choices=[user("?"), unreadable])])]
    with pytest.raises(TokenizationError, match="group 0, trajectory 1: the token string b'seven'"):
        build_samples(groups, tiny_tokenizer)


def test_missing_logprobs_can_be_allowed(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    plain = [
        Trajectory(messages_and_choices=[user("3+4="), {"role": "assistant", "content": text}], reward=reward)
        for text, reward in (("7", 1.0), ("8", 0.0))
    ]
    with pytest.raises(DataError, match="group 0, trajectory 0: .*allow_training_without_logprobs=True"):
        build_samples([TrajectoryGroup(plain)], tiny_tokenizer)

    samples = build_samples([TrajectoryGroup(plain)], tiny_tokenizer, train_unsampled=True)

    assert samples.metrics["data/num_tokens"] == 4
    assert torch.cat([sample.old_logprobs for sample in samples.groups[0]]).isnan().all()
