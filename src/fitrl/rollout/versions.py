"""How far tokens are behind the policy: versions of the weights, counted in the steps of a loop.

A step is one round of the loop: a batch is handed out, trained on, and the next one asked for. What the weights went
through between two batches counts once, however many optimizer steps it took.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from fitrl.data.groups import Trajectory, TrajectoryGroup


class Versions:
    """The newest versions of the weights, one for each step.

    Args:
        max_behind: the most steps that are told apart; what is further behind is that, or more.
        seen: versions of earlier steps, oldest first.
    """

    def __init__(self, max_behind: int, seen: Iterable[int] = ()) -> None:
        self._seen = deque(seen, maxlen=max_behind + 1)

    @property
    def seen(self) -> list[int]:
        """Versions, oldest first."""
        return list(self._seen)

    def gives_up(self, version: int) -> bool:
        """Whether this version is an earlier one than was seen: those after it were given up."""
        return bool(self._seen) and version < self._seen[-1]

    def see(self, version: int) -> bool:
        """Note the version at the begin of a step; returns whether it is another one than before."""
        changed = not self._seen or self._seen[-1] != version
        while self._seen and self._seen[-1] >= version:  # the policy went back to a checkpoint
            self._seen.pop()
        self._seen.append(version)
        return changed

    def behind(self, version: int) -> int:
        """Steps between a version and the newest one."""
        return sum(later > version for later in self._seen)

    def are_usable(self, versions: tuple[int, int] | None, max_steps: int) -> bool:
        """Whether tokens of these first and last versions are so near; none are of weights that were given up."""
        return versions is None or (self.behind(versions[0]) <= max_steps and versions[1] <= self._seen[-1])

    def mean_and_max(self, groups: Iterable[TrajectoryGroup]) -> tuple[float, float]:
        """Mean over the sampled tokens of groups of the steps that they are behind, and the most."""
        counts: Counter[int] = Counter()
        for group in groups:
            for trajectory in group:
                counts.update(token_versions(trajectory))
        total = sum(counts.values())
        if not total:
            return 0.0, 0.0
        mean = sum(self.behind(version) * count for version, count in counts.items()) / total
        return mean, float(max(map(self.behind, counts)))


def token_versions(trajectory: Trajectory) -> Counter[int]:
    """How many sampled tokens a trajectory has of each version."""
    counts: Counter[int] = Counter()
    for said in trajectory.completions():
        if said.versions is not None:
            counts.update(said.versions)
        else:
            counts[said.version] += len(said.token_ids or said.token_bytes or ())
    for history in trajectory.token_histories:
        counts.update(history.versions[history.mask].tolist())
    return counts


def group_versions(group: TrajectoryGroup) -> tuple[int, int] | None:
    """First and last version that sampled a token of a group; None when nothing was sampled."""
    found = [versions for trajectory in group if (versions := trajectory.policy_versions) is not None]
    return (min(first for first, _ in found), max(last for _, last in found)) if found else None
