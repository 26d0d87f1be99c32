"""The groups that the ranks of a job have, joined: what `fit_rl` trains on with several processes."""

from __future__ import annotations

import hashlib
import marshal  # to compare within one job; nothing is read with it
from collections.abc import Sequence
from typing import Any

from fitrl.data import ranks
from fitrl.data.completion import Completion
from fitrl.data.groups import TrajectoryGroup
from fitrl.errors import DataError


def join_groups(groups: Sequence[TrajectoryGroup]) -> list[TrajectoryGroup]:
    """All ranks' groups, in the order of the ranks; groups that every rank holds alike count once.

    So rollouts may run on rank 0 (the others pass an empty list), or each rank passes those it made, or all pass the
    same list, as `fitrl.rollout` returns it.

    Raises:
        DataError: a group is pending, or is none, or holds a value that JSON cannot hold and has to be sent by it.
        RankError: another rank's groups do.
    """
    if ranks.world_size() == 1:
        _check(groups)
        return list(groups)
    said = set(ranks.exchange(lambda: _digest(groups)))
    if len(said) == 1 and said != {""}:
        return list(groups)  # as nearly always; JSON of many tokens takes longer than all else before the first kernel
    texts = ranks.exchange(lambda: "\n".join(group.to_json() for group in groups))
    if len(set(texts)) == 1:
        return list(groups)
    return [TrajectoryGroup.from_json(line) for text in texts for line in text.splitlines()]


def _digest(groups: Sequence[TrajectoryGroup]) -> str:
    """What groups that are alike have in common; "" where they hold something that only their JSON can compare."""
    _check(groups)
    try:
        content = marshal.dumps(list(map(_content, groups)), 2)  # later formats tell of shared objects too
    except DataError:
        raise
    except ValueError:
        return ""
    return hashlib.sha256(content).hexdigest()


def _content(group: TrajectoryGroup) -> dict[str, Any]:
    """A group's record, but the long columns of what was sampled as bytes."""
    record = group.to_dict()
    for trajectory, told in zip(group, record["trajectories"], strict=True):
        said = [trajectory.messages_and_choices, *(one.messages_and_choices for one in trajectory.additional_histories)]
        for items, record_of in zip(said, [told, *told["additional_histories"]], strict=True):
            for item, line in zip(items, record_of["messages_and_choices"], strict=True):
                if isinstance(item, Completion):
                    line["completion"] |= item.columns.to_bytes()
    return record


def _check(groups: Sequence[TrajectoryGroup]) -> None:
    for index, group in enumerate(groups):
        if not isinstance(group, TrajectoryGroup):
            raise DataError(f"groups[{index}] is a {type(group).__name__}, not a TrajectoryGroup")
