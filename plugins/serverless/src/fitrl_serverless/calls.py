"""From groups to what one call submits: checked, counted, in the wire's form.

Enters: groups and the checked arguments. Leaves: a `Call`, which Lightning takes for one batch, or the finding that
there is nothing to learn from. Nothing is tokenized here: the service has the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fitrl import TrajectoryGroup
from fitrl.data.advantages import balance, group_advantages, reward_std
from fitrl.errors import DataError
from fitrl.objective.objective import teaches_without_advantage
from fitrl.trainers.settings import UpdateSettings
from fitrl_serverless import wire


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """What one call of `fit_rl` learns from.

    Attributes:
        groups: those with trajectories.
        config: the arguments, the learning rate before any schedule.
        metrics: host-side, of all groups that were given.
        dropped: all that the client can know, by reason.
        num_empty: groups without trajectories, which are not sent.
        teaches: whether any group can.
    """

    groups: list[wire.Group]
    config: wire.ExperimentalConfig
    metrics: dict[str, float]
    dropped: dict[str, int]
    num_empty: int
    teaches: bool


def collect(groups: Sequence[TrajectoryGroup], settings: UpdateSettings, config: wire.ExperimentalConfig) -> Call:
    """Read the groups.

    Raises:
        DataError: none, one that is pending or cannot be sent, or a reward that is not finite; the message says which.
    """
    if not groups:
        raise DataError("groups is empty: pass at least one TrajectoryGroup")
    sent = wire.groups_to_wire(groups)
    dropped = {"flat_groups": 0, "empty_groups": 0}
    absolutes: list[float] = []
    num_trainable = 0
    for index, group in enumerate(groups):
        try:
            advantages = balance(
                group_advantages(group.rewards, scale_rewards=settings.scale_rewards), settings.advantage_balance
            )
        except DataError as error:
            raise DataError(f"group {index}: {error}") from error
        absolutes += map(abs, advantages)
        if not len(group):
            dropped["empty_groups"] += 1
        elif any(advantages) or teaches_without_advantage(settings.objective):
            num_trainable += 1
        else:
            dropped["flat_groups"] += 1
    rewards = [reward for group in groups for reward in group.rewards]
    return Call(
        groups=[group for group in sent if group.trajectories],
        config=config,
        metrics={
            "reward/mean": _mean(rewards),
            "reward/std_within_group": _mean([reward_std(group.rewards) for group in groups if len(group) > 1]),
            "advantage/abs_mean": _mean(absolutes),
            "data/num_groups_submitted": float(len(groups)),
        },
        dropped={reason: count for reason, count in dropped.items() if count},
        num_empty=dropped["empty_groups"],
        teaches=num_trainable > 0,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
