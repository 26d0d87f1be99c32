"""Learning-rate rules: factors on the learning rate of a call."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def reward_std_factor(history: Sequence[tuple[int, float]]) -> float:
    """How far the rewards' spread has fallen from where its trend began.

    Fits the least-squares line y = m x + b through (step, mean within-group reward standard deviation) of every
    call so far, and returns max(m x_last + b, 0) / b; 1 with fewer than two points, one step only, or b <= 0.
    """
    steps = [float(step) for step, _ in history]
    if len(set(steps)) < 2:
        return 1.0
    line = statistics.linear_regression(steps, [std for _, std in history])
    slope, intercept = float(line.slope), float(line.intercept)
    if intercept <= 0:
        return 1.0
    return float(max(slope * steps[-1] + intercept, 0.0) / intercept)


def num_trajectories_factor(num_trajectories: int, power: float) -> float:
    """(trajectories trained on) ** power; 1 with power 0."""
    return float(float(num_trajectories) ** power)
