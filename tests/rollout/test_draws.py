"""Which tasks the groups of a pipeline attempt."""

from __future__ import annotations

import pytest

from fitrl.rollout.draws import Draws


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_a_group_drawn_again_gets_a_task_that_it_has_not_had(num_tasks) -> None:
    draws = Draws(range(num_tasks), groups_per_step=2, group_size=2, seed=3)
    for number in range(40):
        assert {draws.task(number, redraw) for redraw in range(num_tasks)} == set(range(num_tasks))
    assert sorted(draws.task(number) for number in range(num_tasks)) == list(range(num_tasks))
