"""From groups to what one call submits: checked, counted, in the wire's form.

Enters: groups and the checked arguments. Leaves: a `Call`, which Lightning takes for one batch, or the finding that
there is nothing to learn from. Nothing is tokenized here: the service has the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fitrl import Objective, TrajectoryGroup
from fitrl.data.advantages import balance, group_advantages, reward_std
from fitrl.errors import DataError
from fitrl.objective.objective import ImportanceSamplingLevel, teaches_without_advantage
from fitrl.trainers.settings import DEFAULT_CHUNK_SIZE, UpdateSettings
from fitrl_serverless import wire


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """What one call of `fit_rl` learns from.

    Attributes:
        groups: those with trajectories.
        config: the arguments; the learning rate before any schedule, None: the module's.
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


def make_call(
    groups: Iterable[TrajectoryGroup],
    *,
    learning_rate: float | None = None,
    ppo: bool = False,
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    advantage_balance: float = 0.0,
    scale_rewards: bool = True,
    importance_sampling_level: ImportanceSamplingLevel = "token",
    max_negative_advantage_importance_sampling_weight: float | None = None,
    mask_prob_ratio: bool = False,
    kimi_k2_tau: float | None = None,
    precalculate_logprobs: bool = False,
) -> Call:
    """Check groups and arguments, see `ServerlessTrainer.fit_rl`.

    Args:
        groups: to learn from.
        learning_rate: before any schedule; None: the module's.
        ppo: see `fit_rl`, as the others.
        epsilon: see `fit_rl`.
        epsilon_high: see `fit_rl`.
        advantage_balance: see `fit_rl`.
        scale_rewards: see `fit_rl`.
        importance_sampling_level: see `fit_rl`.
        max_negative_advantage_importance_sampling_weight: see `fit_rl`.
        mask_prob_ratio: see `fit_rl`.
        kimi_k2_tau: see `fit_rl`.
        precalculate_logprobs: see `fit_rl`.

    Raises:
        InvalidArgumentError: a value out of range, or an option that could have no effect.
        DataError: no groups, one that is pending or cannot be sent, or a reward that is not finite; it says which.
    """
    objective = Objective(
        ppo=ppo,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        importance_sampling_level=importance_sampling_level,
        max_negative_advantage_importance_sampling_weight=max_negative_advantage_importance_sampling_weight,
        mask_prob_ratio=mask_prob_ratio,
        kimi_k2_tau=kimi_k2_tau,
    )
    # checked as every backend checks them; what the service does not take stands at its default
    UpdateSettings(
        learning_rate=0.0 if learning_rate is None else learning_rate,
        objective=objective,
        advantage_balance=advantage_balance,
        scale_rewards=scale_rewards,
        precalculate_logprobs=precalculate_logprobs,
        allow_training_without_logprobs=False,
        plot_tensors=False,
        scale_learning_rate_by_reward_std_dev=False,
        logprob_calculation_chunk_size=DEFAULT_CHUNK_SIZE,
        save_checkpoint=True,
        verbose=False,
        num_minibatches=1,
        num_epochs=1,
        seed=0,
        reference=None,
        max_tokens_per_microbatch=None,
        num_trajectories_learning_rate_multiplier_power=0.0,
    )
    config = wire.ExperimentalConfig(
        advantage_balance=float(advantage_balance),
        epsilon=_float(epsilon),
        epsilon_high=_float(epsilon_high),
        importance_sampling_level=importance_sampling_level,
        kimi_k2_tau=_float(kimi_k2_tau),
        learning_rate=_float(learning_rate),
        mask_prob_ratio=mask_prob_ratio,
        max_negative_advantage_importance_sampling_weight=_float(max_negative_advantage_importance_sampling_weight),
        ppo=ppo,
        precalculate_logprobs=precalculate_logprobs,
        scale_rewards=scale_rewards,
    )
    return _collect(list(groups), config, scale_rewards, advantage_balance, teaches_without_advantage(objective))


def _collect(
    groups: Sequence[TrajectoryGroup],
    config: wire.ExperimentalConfig,
    scale_rewards: bool,
    advantage_balance: float,
    always_teaches: bool,
) -> Call:
    """Read and count the groups."""
    if not groups:
        raise DataError("groups is empty: pass at least one TrajectoryGroup")
    sent = wire.groups_to_wire(groups)
    dropped = {"flat_groups": 0, "empty_groups": 0}
    absolutes: list[float] = []
    num_trainable = 0
    for index, group in enumerate(groups):
        try:
            advantages = balance(group_advantages(group.rewards, scale_rewards=scale_rewards), advantage_balance)
        except DataError as error:
            raise DataError(f"group {index}: {error}") from error
        absolutes += map(abs, advantages)
        if not len(group):
            dropped["empty_groups"] += 1
        elif any(advantages) or always_teaches:
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


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
