"""The learning-rate rules against numpy."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitrl.trainers.learning_rate import num_trajectories_factor, reward_std_factor


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0.0, 2.0)), min_size=2, max_size=30))
def test_reward_std_factor_is_the_line_at_its_end_over_its_start(history) -> None:
    steps = [step for step, _ in history]
    if len(set(steps)) < 2:
        assert reward_std_factor(history) == 1.0
        return
    slope, intercept = numpy.polyfit(steps, [std for _, std in history], 1)
    if abs(intercept) < 1e-6:
        return  # on the edge between the two cases
    expected = max(slope * steps[-1] + intercept, 0.0) / intercept if intercept > 0 else 1.0
    assert reward_std_factor(history) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_reward_std_factor_needs_two_points() -> None:
    assert reward_std_factor([]) == reward_std_factor([(3, 0.5)]) == reward_std_factor([(3, 0.5), (3, 0.1)]) == 1.0
    assert reward_std_factor([(0, 1.0), (1, 0.5)]) == pytest.approx(0.5)
    assert reward_std_factor([(0, 1.0), (1, 0.0), (2, 0.0)]) == 0.0  # the line ends below 0


def test_num_trajectories_factor() -> None:
    assert num_trajectories_factor(16, 0.0) == 1.0
    assert num_trajectories_factor(16, 0.5) == 4.0
