"""What rank 0 of the worker tells the other ranks, by the database: they wait for it without a collective.

A collective has a time limit, and a queue may be empty for days.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from fitrl_serverless.server.database import Database

POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """`train` a job, `save` or `drop` what it came to, or `stop`."""

    what: str
    job_id: str | None


class Orders:
    """The orders of one worker, in order; each rank reads all of them.

    Args:
        database: of the server.
        worker: id of the worker.
        is_first: whether this is rank 0, which gives the orders.
    """

    def __init__(self, database: Database, worker: str, *, is_first: bool) -> None:
        self._database = database
        self._worker = worker
        self._number = 0
        self.is_first = is_first

    def give(self, what: str, job_id: str | None = None) -> Order:
        """Tell the others."""
        self._number += 1
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO orders (worker, number, what, job_id) VALUES (?, ?, ?, ?)",
                (self._worker, self._number, what, job_id),
            )
            connection.execute("DELETE FROM orders WHERE worker = ? AND number < ?", (self._worker, self._number - 100))
        return Order(what=what, job_id=job_id)

    def take(self) -> Order:
        """Wait for the next order of rank 0."""
        self._number += 1
        while True:
            row = self._database.row(
                "SELECT what, job_id FROM orders WHERE worker = ? AND number = ?", self._worker, self._number
            )
            if row is not None:
                return Order(what=row["what"], job_id=row["job_id"])
            time.sleep(POLL_S)
