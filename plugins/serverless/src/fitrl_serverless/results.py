"""What the calls of this backend return."""

from __future__ import annotations

from dataclasses import dataclass

from fitrl import TrainResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerlessTrainResult(TrainResult):
    """Result of `ServerlessTrainer.fit_rl`; `step` is the service's checkpoint number.

    Attributes:
        artifact_name: `entity/project/name:step<N>`; None when there was nothing to learn from.
    """

    artifact_name: str | None = None
