"""Advantages against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fitrl.data.advantages import balance, group_advantages, is_flat, reward_std
from fitrl.errors import DataError, InvalidArgumentError

REWARDS = st.lists(st.floats(-1e3, 1e3).map(lambda value: round(value, 3)), min_size=2, max_size=12)
ADVANTAGES = st.lists(st.floats(-10, 10), max_size=8)


def _numpy_advantages(rewards: list[float], *, scale_rewards: bool) -> np.ndarray:
    values = np.asarray(rewards, dtype=np.float64)
    return (values - values.mean()) / (values.std(ddof=0) + 1e-6 if scale_rewards else 1.0)


@given(REWARDS, st.booleans())
def test_advantages_are_what_numpy_says(rewards: list[float], scale_rewards: bool) -> None:
    assume(len(set(rewards)) > 1)

    advantages = group_advantages(rewards, scale_rewards=scale_rewards)

    expected = _numpy_advantages(rewards, scale_rewards=scale_rewards)
    np.testing.assert_allclose(advantages, expected, rtol=1e-9, atol=1e-9)


def test_a_worked_example() -> None:
    advantages = group_advantages([1, 0, 0, 1])

    assert advantages == pytest.approx([1.0, -1.0, -1.0, 1.0], abs=3e-6)
    assert group_advantages([1, 0, 0, 1], scale_rewards=False) == [0.5, -0.5, -0.5, 0.5]


@given(st.floats(-1e6, 1e6), st.integers(0, 9), st.booleans())
def test_a_flat_group_has_exact_zeros(reward: float, size: int, scale_rewards: bool) -> None:
    """0.1 + 0.1 + 0.1 is not 0.3: a mean in floating point would leave crumbs that the scale blows up."""
    assert group_advantages([reward] * size, scale_rewards=scale_rewards) == [0.0] * size
    assert is_flat([reward] * size)
    assert reward_std([reward] * size) == 0.0


def test_one_better_attempt_makes_a_group_teach() -> None:
    assert not is_flat([0.0, 0.0, 1e-12])
    assert all(group_advantages([0.0, 0.0, 1e-12], scale_rewards=False))


@given(REWARDS)
def test_reward_std_is_the_populations(rewards: list[float]) -> None:
    assert reward_std(rewards) == pytest.approx(float(np.std(np.asarray(rewards, dtype=np.float64))), abs=1e-9)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rewards", [[0.0, 1.0], [0.5], [2.0, 2.0, 2.0]])
def test_a_reward_that_is_not_finite_says_whose(wrong: float, rewards: list[float]) -> None:
    with pytest.raises(DataError, match=rf"reward {wrong} of trajectory {len(rewards)} is not finite"):
        group_advantages([*rewards, wrong])


@given(ADVANTAGES, st.floats(-1, 1))
def test_balance_scales_one_sign_and_leaves_the_other(advantages: list[float], b: float) -> None:
    values = np.asarray(advantages, dtype=np.float64)
    expected = np.where(values < 0, values * (1 - max(b, 0.0)), values * (1 + min(b, 0.0)))

    np.testing.assert_array_equal(balance(advantages, b), expected)


@given(ADVANTAGES)
def test_the_ends_of_balance_silence_one_sign(advantages: list[float]) -> None:
    assert min(balance(advantages, 1.0), default=0.0) >= 0.0
    assert max(balance(advantages, -1.0), default=0.0) <= 0.0
    assert balance(advantages, 0.0) == advantages


@pytest.mark.parametrize("b", [1.0001, -1.0001, math.nan, math.inf])
def test_balance_out_of_range(b: float) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"advantage_balance must be in \[-1, 1\], got {b}"):
        balance([1.0, -1.0], b)
