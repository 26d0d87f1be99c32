"""From groups to samples: tokens and advantages of every trajectory that can teach something.

Enters: groups. Leaves: groups of `Sample`, what was dropped and why, and the host-side metrics of the call.
Trajectories are dropped after the advantages are computed, so a dropped one still counts for its group's mean.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fitrl.data.advantages import balance, group_advantages, is_flat, reward_std
from fitrl.data.groups import TokenHistory, TrajectoryGroup
from fitrl.data.tokens import Tokenized, tokenize
from fitrl.errors import DataError, FitRLError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True, kw_only=True, eq=False)
class Sample:
    """One trajectory to train on.

    Attributes:
        histories: those with at least one token to learn from.
        advantage: of the trajectory.
        old_logprobs: [T] float32 over the histories' tokens in order; the rollout's unless recomputed.
        reference_logprobs: the same of the reference policy, once computed.
    """

    histories: list[TokenHistory]
    advantage: float
    old_logprobs: Tensor
    reference_logprobs: Tensor | None = None
    num_input_tokens: int = field(init=False)
    num_trainable_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        # the last token of a history predicts nothing, so it is not an input
        self.num_input_tokens = sum(len(history) - 1 for history in self.histories)
        self.num_trainable_tokens = sum(int(history.mask.sum()) for history in self.histories)


@dataclass(slots=True, kw_only=True)
class SampleSet:
    """What one call can train on.

    Attributes:
        groups: the trainable groups; each keeps all its trainable trajectories, also those whose advantage
            is 0, because they count in the denominators.
        dropped: why and how many: "flat_groups", "empty_groups", "overlong_trajectories",
            "empty_trajectories" (nothing sampled in them).
        metrics: host-side metrics of the call, `area/name`.
        num_splits: histories that had to be split because a later turn did not extend the earlier ids.
        full_support: whether every token was sampled from the full distribution.
        reward_std: mean within-group reward standard deviation, over groups with two trajectories or more.
    """

    groups: list[list[Sample]]
    dropped: dict[str, int]
    metrics: dict[str, float]
    num_splits: int
    full_support: bool
    reward_std: float


def build_samples(
    groups: Sequence[TrajectoryGroup],
    tokenizer: PreTrainedTokenizerBase,
    *,
    scale_rewards: bool = True,
    advantage_balance: float = 0.0,
    max_history_tokens: int | None = None,
    max_trajectory_tokens: int | None = None,
    teaches_without_advantage: bool = False,
    train_unsampled: bool = False,
) -> SampleSet:
    """Tokenize groups, compute advantages, drop what cannot teach.

    Args:
        groups: what rollouts left behind.
        tokenizer: the policy's.
        scale_rewards: divide by the group's standard deviation.
        advantage_balance: in [-1, 1], see `balance`.
        max_history_tokens: the policy's context; a trajectory with a longer history is dropped.
        max_trajectory_tokens: all histories together; a longer trajectory is dropped.
        teaches_without_advantage: keep flat groups, for objectives with a term that needs no advantage.
        train_unsampled: see `tokenize`.

    Raises:
        DataError: no groups, a reward that is not finite, or a trajectory that cannot be read; the message
            says which.
    """
    start = time.perf_counter()
    if not groups:
        raise DataError("groups is empty: pass at least one TrajectoryGroup")
    dropped = dict.fromkeys(("flat_groups", "empty_groups", "overlong_trajectories", "empty_trajectories"), 0)
    kept: list[list[Sample]] = []
    rewards: list[float] = []
    stds: list[float] = []
    absolutes: list[float] = []
    num_splits, full_support = 0, True
    for group_index, group in enumerate(groups):
        if group.pending:
            raise DataError(f"group {group_index} has {len(group.pending)} pending trajectories: await fitrl.gather(groups)")
        if not len(group):
            dropped["empty_groups"] += 1
            continue
        group_rewards = group.rewards
        tokenized: list[Tokenized] = []
        try:
            advantages = group_advantages(group_rewards, scale_rewards=scale_rewards)
        except FitRLError as error:
            raise type(error)(f"group {group_index}: {error}") from error
        for index, trajectory in enumerate(group):
            try:
                tokenized.append(tokenize(trajectory, tokenizer, train_unsampled=train_unsampled))
            except FitRLError as error:
                raise type(error)(f"group {group_index}, trajectory {index}: {error}") from error
        rewards += group_rewards
        if len(group_rewards) > 1:
            stds.append(reward_std(group_rewards))
        if is_flat(group_rewards) and not teaches_without_advantage:
            dropped["flat_groups"] += 1
            continue
        samples: list[Sample] = []
        for tokens, advantage in zip(tokenized, balance(advantages, advantage_balance), strict=True):
            num_splits += max(tokens.num_splits, 0)
            absolutes.append(abs(advantage))
            histories = [history for history in tokens.histories if bool(history.mask.any())]
            if not histories:
                dropped["empty_trajectories"] += 1
                continue
            sample = Sample(
                histories=histories,
                advantage=advantage,
                old_logprobs=torch.cat([history.logprobs for history in histories]),
            )
            if _overlong(sample, max_history_tokens, max_trajectory_tokens):
                dropped["overlong_trajectories"] += 1
                continue
            full_support &= all(history.full_support for history in histories)
            samples.append(sample)
        if any(sample.advantage for sample in samples) or (samples and teaches_without_advantage):
            kept.append(samples)
        elif samples:
            dropped["flat_groups"] += 1
        else:
            dropped["empty_groups"] += 1
    flat = [sample for samples in kept for sample in samples]
    return SampleSet(
        groups=kept,
        dropped={reason: count for reason, count in dropped.items() if count},
        metrics={
            "reward/mean": sum(rewards) / max(len(rewards), 1),
            "reward/std_within_group": sum(stds) / max(len(stds), 1),
            "advantage/abs_mean": sum(absolutes) / max(len(absolutes), 1),
            "data/num_groups_submitted": float(len(groups)),
            "data/num_groups_trainable": float(len(kept)),
            "data/num_trajectories": float(len(flat)),
            "data/num_tokens": float(sum(sample.num_trainable_tokens for sample in flat)),
            "data/num_dropped_overlong": float(dropped["overlong_trajectories"]),
            "data/num_split_histories": float(num_splits),
            "time/tokenize_s": time.perf_counter() - start,
        },
        num_splits=num_splits,
        full_support=full_support,
        reward_std=sum(stds) / max(len(stds), 1),
    )


def _overlong(sample: Sample, max_history_tokens: int | None, max_trajectory_tokens: int | None) -> bool:
    longest = max(len(history) for history in sample.histories)
    return (max_history_tokens is not None and longest > max_history_tokens) or (
        max_trajectory_tokens is not None and sample.num_input_tokens > max_trajectory_tokens
    )
