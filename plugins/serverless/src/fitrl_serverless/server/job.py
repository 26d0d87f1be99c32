"""A job as the worker takes it, and what became of it."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a call of `fit_rl` came to; metrics as JSON can hold them."""

    step: int
    num_optimizer_steps: int
    dropped: dict[str, int]
    metrics: dict[str, float | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the worker takes it.

    Attributes:
        id: of the job.
        model_id: of the model that it trains.
        config: keyword arguments of `fit_rl`.
        attempts: how often a worker has taken it, this time included.
        start_step: the model's step before it, once that is known.
        outcome: what training it came to, from before its checkpoint was written.
        cancel_requested: whether its owner wants it no more.
        verdict: why it is to be failed, if it has to end.
    """

    id: str
    model_id: str
    config: dict[str, Any]
    attempts: int
    start_step: int | None
    outcome: Outcome | None
    cancel_requested: bool
    verdict: str | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> Job:
        """Read a row."""
        return cls(
            id=row["id"],
            model_id=row["model_id"],
            config=json.loads(row["config"]),
            attempts=row["attempts"],
            start_step=row["start_step"],
            outcome=None if row["outcome"] is None else Outcome(**json.loads(row["outcome"])),
            cancel_requested=bool(row["cancel_requested"]),
            verdict=row["error_message"],
        )
