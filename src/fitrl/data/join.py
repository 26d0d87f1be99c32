"""The groups that the ranks of a job have, joined: what `fit_rl` trains on with several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fitrl.data import ranks
from fitrl.data.groups import TrajectoryGroup
from fitrl.errors import DataError


def join_groups(groups: Sequence[TrajectoryGroup]) -> list[TrajectoryGroup]:
    """All ranks' groups, in the order of the ranks; groups that every rank holds alike count once.

    So rollouts may run on rank 0 (the others pass an empty list), or each rank passes those it made, or all pass the
    same list, as `fitrl.rollout` returns it.

    Raises:
        DataError: a group holds a value that JSON cannot hold, is pending, or is none.
        RankError: another rank's groups do.
    """
    ranks.together(lambda: _check(groups))
    if ranks.world_size() == 1:
        return list(groups)
    text = ranks.together(lambda: "\n".join(group.to_json() for group in groups))
    if len(set(ranks.collect(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return list(groups)
    return [TrajectoryGroup.from_json(line) for said in ranks.collect(text) for line in said.splitlines()]


def _check(groups: Sequence[TrajectoryGroup]) -> None:
    for index, group in enumerate(groups):
        if not isinstance(group, TrajectoryGroup):
            raise DataError(f"groups[{index}] is a {type(group).__name__}, not a TrajectoryGroup")
