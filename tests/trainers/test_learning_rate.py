"""The learning-rate rules, against numpy's least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fitrl.trainers.learning_rate import num_trajectories_factor, reward_std_factor

many = settings(max_examples=200, deadline=None, derandomize=True, database=None)
histories = st.lists(
    st.tuples(st.integers(0, 1000), st.floats(0.0, 10.0)), min_size=2, max_size=20, unique_by=lambda pair: pair[0]
)


@many
@given(histories)
def test_factor_is_the_fitted_line_now_over_at_the_start(history: list[tuple[int, float]]) -> None:
    steps, stds = zip(*history, strict=True)
    slope, intercept = np.polyfit(steps, stds, 1)
    assume(abs(intercept) > 1e-6)
    expected = max(slope * steps[-1] + intercept, 0.0) / intercept if intercept > 0 else 1.0
    assert reward_std_factor(history) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@many
@given(st.lists(st.tuples(st.integers(-5, 1000), st.floats(0.0, 10.0)), max_size=8))
def test_factor_is_finite_and_never_negative(history: list[tuple[int, float]]) -> None:
    factor = reward_std_factor(history)
    assert isinstance(factor, float)
    assert 0.0 <= factor < float("inf")


@pytest.mark.parametrize(
    ("history", "factor"),
    [
        # fewer than two points, or no line through them
        ([], 1.0),
        ([(0, 0.5)], 1.0),
        ([(7, 0.0)], 1.0),
        ([(3, 0.5), (3, 0.25)], 1.0),
        # a level spread, a halved one, a doubled one
        ([(0, 0.5), (1, 0.5), (2, 0.5)], 1.0),
        ([(0, 1.0), (10, 0.5)], 0.5),
        ([(0, 0.5), (10, 1.0)], 2.0),
        # the line starts at step 0, not at the first call
        ([(10, 0.9), (20, 0.8)], 0.8),
        # x_last is the last call's step, not the largest one
        ([(10, 0.5), (0, 1.0)], 1.0),
        # the line, not the last point: y = 1 - x / 4 fits these
        ([(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)], 0.25),
        ([(0, 0.9), (1, 1.1), (2, 0.9), (3, 1.1)], 1.06 / 0.94),
        # a line that falls below 0 stops there
        ([(0, 1.0), (1, 0.1), (2, 0.0), (3, 0.0)], 0.0),
        # a line that starts at or below 0
        ([(1, 0.0), (2, 1.0)], 1.0),
        ([(0, 0.0), (1, 1.0)], 1.0),
        ([(0, 0.0), (1, 0.0)], 1.0),
    ],
)
def test_factor_by_hand(history: list[tuple[int, float]], factor: float) -> None:
    assert reward_std_factor(history) == pytest.approx(factor)


def test_history_is_left_as_it_is() -> None:
    history = [(0, 1.0), (2, 0.5), (4, 0.6)]
    reward_std_factor(history)
    assert history == [(0, 1.0), (2, 0.5), (4, 0.6)]
    assert reward_std_factor(tuple(history)) == reward_std_factor(history)


@pytest.mark.parametrize(
    ("trajectories", "power", "factor"),
    [(1, 0.7, 1.0), (8, 0.0, 1.0), (8, 1.0, 8.0), (16, 0.5, 4.0), (16, -0.5, 0.25), (10, 2.0, 100.0), (0, 0.0, 1.0)],
)
def test_number_of_trajectories_to_a_power(trajectories: int, power: float, factor: float) -> None:
    assert num_trajectories_factor(trajectories, power) == pytest.approx(factor)


@many
@given(st.integers(1, 10**6), st.floats(-2.0, 2.0))
def test_number_of_trajectories_is_numpys_power(trajectories: int, power: float) -> None:
    assert num_trajectories_factor(trajectories, power) == pytest.approx(np.power(float(trajectories), power))
