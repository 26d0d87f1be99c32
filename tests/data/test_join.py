"""Groups of several ranks: those that all hold alike count once, whatever they hold."""

from __future__ import annotations

import numpy as np
import pytest

import fitrl
from fitrl.data import ranks
from fitrl.data.join import join_groups
from fitrl.errors import DataError
from samples import make_groups


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch) -> None:
    """The other one always says what this one does."""
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "collect", lambda text, **options: [text, text])


def test_groups_that_are_alike_are_told_so_without_their_json(monkeypatch) -> None:
    groups = make_groups(seed=1)
    monkeypatch.setattr(fitrl.TrajectoryGroup, "to_json", lambda group: pytest.fail("takes too long"))
    assert join_groups(groups) == groups


def test_what_only_json_can_compare_is_compared_by_it() -> None:
    groups = make_groups(seed=1)
    groups[0].metadata["score"] = np.float64(0.5)
    assert join_groups(groups) == groups


def test_other_groups_of_the_other_rank_are_added(monkeypatch) -> None:
    ours, theirs = make_groups(seed=1), make_groups(seed=2)
    lines = "\n".join(group.to_json() for group in theirs)
    monkeypatch.setattr(
        ranks, "collect", lambda text, **options: [text, text if not text else lines if "{" in text else "another"]
    )
    joined = join_groups(ours)
    assert [group.to_json() for group in joined] == [group.to_json() for group in (*ours, *theirs)]


def test_what_json_cannot_hold_is_refused() -> None:
    groups = make_groups(seed=1)
    groups[0].metadata["what"] = object()
    with pytest.raises(DataError, match="metadata.what is <object"):
        join_groups(groups)
    with pytest.raises(DataError, match="is a int"):
        join_groups([1])  # type: ignore[list-item]


def test_a_group_that_is_pending_is_refused() -> None:
    async def later() -> fitrl.Trajectory:
        raise NotImplementedError

    waiting = later()
    with pytest.raises(DataError, match="pending trajectories"):
        join_groups([fitrl.TrajectoryGroup([waiting])])
    waiting.close()
