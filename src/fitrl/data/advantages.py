"""Rewards to advantages: compared within a group, balanced, never NaN.

Enters: the rewards of each group. Leaves: one advantage per trajectory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fitrl.errors import DataError, InvalidArgumentError

_STD_FLOOR = 1e-6


def group_advantages(rewards: Sequence[float], *, scale_rewards: bool = True) -> list[float]:
    """Advantages of one group: reward minus mean, divided by the population standard deviation.

    `A_i = (r_i - mean) / (std_pop + 1e-6)` with `scale_rewards`, else `r_i - mean` (GRPO, Shao et al. 2024;
    without the scale: Dr. GRPO, Liu et al. 2025). A flat group and a group of one give exact zeros.

    Raises:
        DataError: a reward is NaN or infinite.
    """
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise DataError(
                f"reward {reward} of trajectory {index} is not finite; drop the trajectory or mend the reward"
            )
    if is_flat(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = reward_std(rewards) + _STD_FLOOR if scale_rewards else 1.0
    return [(reward - mean) / scale for reward in rewards]


def is_flat(rewards: Sequence[float]) -> bool:
    """Whether no trajectory is better than another: all rewards equal, or fewer than two of them."""
    return len(set(rewards)) < 2


def reward_std(rewards: Sequence[float]) -> float:
    """Population standard deviation of a group's rewards; 0 for a flat group."""
    if is_flat(rewards):
        return 0.0
    mean = statistics.fmean(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))


def balance(advantages: Sequence[float], advantage_balance: float) -> list[float]:
    """Weigh good against bad attempts: b > 0 scales negative advantages by 1 - b, b < 0 positive ones by 1 + b.

    Raises:
        InvalidArgumentError: b outside [-1, 1].
    """
    if not -1.0 <= advantage_balance <= 1.0:
        raise InvalidArgumentError(f"advantage_balance must be in [-1, 1], got {advantage_balance}")
    if advantage_balance >= 0:
        return [a * (1.0 - advantage_balance) if a < 0 else a for a in advantages]
    return [a * (1.0 + advantage_balance) if a > 0 else a for a in advantages]
