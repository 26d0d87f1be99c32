"""From groups to samples: tokens and advantages of every trajectory that can teach something.

Enters: groups. Leaves: groups of `Sample`, what was dropped and why, and the host-side metrics of the call.
Trajectories are dropped after the advantages are computed, so a dropped one still counts for its group's mean.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fitrl.data.advantages import balance, group_advantages, is_flat, reward_std
from fitrl.data.groups import TrajectoryGroup
from fitrl.data.histories import TokenHistory
from fitrl.data.tokens import Draft, Tokenized, check, finish, read_tokens
from fitrl.errors import DataError

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
    old_logprobs: Tensor = field(init=False)
    reference_logprobs: Tensor | None = None
    num_input_tokens: int = field(init=False)
    num_trainable_tokens: int = field(init=False)

    @property
    def mask(self) -> Tensor:
        """[T] bool over the histories' tokens in order."""
        return torch.cat([history.mask for history in self.histories])

    def __post_init__(self) -> None:
        self.old_logprobs = torch.cat([history.logprobs for history in self.histories])
        self.num_input_tokens = num_positions(self.histories, padded=False)
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
        full_support: whether every token was sampled from the full distribution.
        reward_std: mean within-group reward standard deviation, over groups with two trajectories or more.
    """

    groups: list[list[Sample]]
    dropped: dict[str, int]
    metrics: dict[str, float]
    full_support: bool
    reward_std: float

    @property
    def flat(self) -> list[Sample]:
        """The samples of all groups, in order; what `pack` takes."""
        return [sample for samples in self.groups for sample in samples]

    @property
    def num_trajectories(self) -> int:
        """Trajectories in the trainable groups."""
        return sum(map(len, self.groups))


def build_samples(
    groups: Sequence[TrajectoryGroup],
    tokenizer: PreTrainedTokenizerBase,
    *,
    scale_rewards: bool = True,
    advantage_balance: float = 0.0,
    max_history_tokens: int | None = None,
    max_trajectory_tokens: int | None = None,
    padded: bool = False,
    teaches_without_advantage: bool = False,
    train_unsampled: bool = False,
    vocabulary_size: int | None = None,
) -> SampleSet:
    """Tokenize groups, compute advantages, drop what cannot teach.

    Args:
        groups: what rollouts left behind.
        tokenizer: the policy's.
        scale_rewards: divide by the group's standard deviation.
        advantage_balance: in [-1, 1], see `balance`.
        max_history_tokens: the policy's context; a trajectory with a longer history is dropped.
        max_trajectory_tokens: all histories together; a longer trajectory is dropped.
        padded: count a trajectory as it is when each history is filled up to its longest.
        teaches_without_advantage: keep flat groups, for objectives with a term that needs no advantage.
        train_unsampled: see `tokenize`.
        vocabulary_size: the policy's; token ids have to be below it. None: not checked.

    Raises:
        DataError: no groups, a reward that is not finite, a token id outside the vocabulary, or a trajectory that
            cannot be read; the message says which.
    """
    start = time.perf_counter()
    if not groups:
        raise DataError("groups is empty: pass at least one TrajectoryGroup")
    tokenized = _read(groups, tokenizer, train_unsampled, vocabulary_size)
    dropped = dict.fromkeys(("flat_groups", "empty_groups", "overlong_trajectories", "empty_trajectories"), 0)
    kept: list[list[Sample]] = []
    absolutes: list[float] = []
    for index, group in enumerate(groups):
        try:
            rewards = group.rewards
            advantages = balance(group_advantages(rewards, scale_rewards=scale_rewards), advantage_balance)
        except DataError as error:
            raise DataError(f"group {index}: {error}") from error
        absolutes += map(abs, advantages)
        if not rewards:
            dropped["empty_groups"] += 1
            continue
        if is_flat(rewards) and not teaches_without_advantage:
            dropped["flat_groups"] += 1
            continue
        samples: list[Sample] = []
        for tokens, advantage in zip(tokenized[index], advantages, strict=True):
            histories = [history for history in tokens.histories if bool(history.mask.any())]
            if not histories:
                dropped["empty_trajectories"] += 1
            elif _is_overlong(histories, max_history_tokens, max_trajectory_tokens, padded):
                dropped["overlong_trajectories"] += 1
            else:
                samples.append(Sample(histories=histories, advantage=advantage))
        if any(sample.advantage for sample in samples) or (samples and teaches_without_advantage):
            kept.append(samples)
        else:
            dropped["flat_groups" if samples else "empty_groups"] += 1
    flat = [sample for samples in kept for sample in samples]
    stds = [reward_std(group.rewards) for group in groups if len(group) > 1]
    return SampleSet(
        groups=kept,
        dropped={reason: count for reason, count in dropped.items() if count},
        metrics={
            "reward/mean": _mean([reward for group in groups for reward in group.rewards]),
            "reward/std_within_group": _mean(stds),
            "advantage/abs_mean": _mean(absolutes),
            "data/num_groups_submitted": float(len(groups)),
            "data/num_groups_trainable": float(len(kept)),
            "data/num_trajectories": float(len(flat)),
            "data/num_tokens": float(sum(sample.num_trainable_tokens for sample in flat)),
            "data/num_dropped_overlong": float(dropped["overlong_trajectories"]),
            "data/num_split_histories": float(sum(tokens.num_splits for row in tokenized for tokens in row)),
            "time/tokenize_s": time.perf_counter() - start,
        },
        full_support=all(history.full_support for sample in flat for history in sample.histories),
        reward_std=_mean(stds),
    )


def _read(
    groups: Sequence[TrajectoryGroup],
    tokenizer: PreTrainedTokenizerBase,
    train_unsampled: bool,
    vocabulary_size: int | None,
) -> list[list[Tokenized]]:
    """Token histories of every trajectory, checked; an error says whose."""
    drafts: list[Draft] = []
    for index, group in enumerate(groups):
        if group.pending:
            raise DataError(f"group {index} has {len(group.pending)} pending trajectories: await fitrl.gather(groups)")
        for place, trajectory in enumerate(group):
            with _naming(index, place):
                drafts.append(read_tokens(trajectory, tokenizer, train_unsampled=train_unsampled))
    finished = iter(finish(drafts))
    rows = [list(islice(finished, len(group))) for group in groups]

    def check_all(histories: Sequence[TokenHistory]) -> None:
        check(histories, need_logprobs=not train_unsampled, vocabulary_size=vocabulary_size)

    try:
        check_all([history for row in rows for tokens in row for history in tokens.histories])
    except DataError:
        for index, row in enumerate(rows):
            for place, tokens in enumerate(row):
                with _naming(index, place):
                    check_all(tokens.histories)
        raise
    return rows


@contextmanager
def _naming(group: int, trajectory: int) -> Iterator[None]:
    """Say in an error which trajectory is meant."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"group {group}, trajectory {trajectory}: {error}") from error


def num_positions(histories: Sequence[TokenHistory], *, padded: bool) -> int:
    """Positions that histories take as model inputs: the last token of each predicts nothing and is none."""
    lengths = [len(history) - 1 for history in histories]
    return len(lengths) * max(lengths) if padded else sum(lengths)


def _is_overlong(
    histories: Sequence[TokenHistory],
    max_history_tokens: int | None,
    max_trajectory_tokens: int | None,
    padded: bool,
) -> bool:
    return (max_history_tokens is not None and max(map(len, histories)) > max_history_tokens) or (
        max_trajectory_tokens is not None and num_positions(histories, padded=padded) > max_trajectory_tokens
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
