"""The queue of training jobs: what a job may go through, each change in one transaction.

    queued -> running -> succeeded | failed | cancelled

A worker that dies leaves its job running. The next worker reads the step the job started from and the newest checkpoint
on disk. A newer checkpoint is the job's own, so the job is at its end; otherwise nothing of it is left, and it waits
again. A job that took its worker down too often, or ran for too long, is failed. So no job is trained twice and none is
lost.
"""

from __future__ import annotations

import gzip
import json
import secrets
import sqlite3
import time
from typing import Any

from fitrl_serverless import wire
from fitrl_serverless.server.answers import Once, do_once
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.errors import RefusedError, not_found
from fitrl_serverless.server.job import Job, Outcome
from fitrl_serverless.server.paging import Page, cut

_FAST = 1  # gzip's level: a payload lives for one job


class Queue:
    """The jobs of all owners.

    Args:
        database: of the server.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    # what owners ask for

    def submit(self, owner: str, body: wire.CreateTrainingJob, text: bytes, once: Once, most: int) -> str:
        """Put a job into the queue; returns its id.

        Args:
            owner: of the model.
            body: of the request.
            text: the same, as it came.
            once: the request's idempotency key.
            most: jobs of this owner that may wait or run.

        Raises:
            RefusedError: 404, no such model; 429, the owner has as many jobs as it may have.
        """
        payload = gzip.compress(text, _FAST)
        config = {} if body.experimental_config is None else body.experimental_config.arguments()
        num_sequences = sum(len(group.trajectories) for group in body.trajectory_groups)

        def work(connection: sqlite3.Connection) -> Any:
            known = connection.execute("SELECT 1 FROM models WHERE id = ? AND owner = ?", (body.model_id, owner))
            if known.fetchone() is None:
                raise not_found("model of this id")
            (count,) = connection.execute(
                "SELECT count(*) FROM jobs JOIN models ON models.id = jobs.model_id "
                "WHERE models.owner = ? AND jobs.status IN ('queued', 'running')",
                (owner,),
            ).fetchone()
            if count >= most:
                raise RefusedError(
                    429, f"{count} jobs are waiting or running: wait for one of them", {"retry-after": "1"}
                )
            identity = f"job-{secrets.token_hex(12)}"
            connection.execute(
                "INSERT INTO jobs (id, model_id, config, num_sequences, status, created) "
                "VALUES (?, ?, ?, ?, 'queued', ?)",
                (identity, body.model_id, json.dumps(config), num_sequences, time.time()),
            )
            connection.execute("INSERT INTO payloads (job_id, body) VALUES (?, ?)", (identity, payload))
            return identity

        return str(do_once(self._database, once, work))

    def get(self, owner: str, job_id: str) -> wire.TrainingJob:
        """Where a job stands.

        Raises:
            RefusedError: 404.
        """
        row = self._database.row(
            "SELECT jobs.* FROM jobs JOIN models ON models.id = jobs.model_id WHERE jobs.id = ? AND models.owner = ?",
            job_id,
            owner,
        )
        if row is None:
            raise not_found("training job of this id")
        return wire.TrainingJob(
            id=row["id"],
            status=row["status"],
            model_id=row["model_id"],
            step=row["step"],
            error_message=row["error_message"],
        )

    def events(self, owner: str, job_id: str, page: Page) -> wire.EventPage:
        """Some of what happened in a job.

        Raises:
            RefusedError: 404.
        """
        self.get(owner, job_id)
        rows = self._database.rows("SELECT * FROM events WHERE job_id = ? ORDER BY number", job_id)
        found = [
            wire.Event(id=f"{job_id}.{row['number']}", type=row["type"], data=json.loads(row["data"])) for row in rows
        ]
        return wire.EventPage.model_validate(cut(found, page))

    def cancel(self, owner: str, job_id: str) -> wire.TrainingJob:
        """Ask for a job's end; one that is at its end already stays as it is.

        Raises:
            RefusedError: 404.
        """
        self.get(owner, job_id)
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE jobs SET cancel_requested = 1 WHERE id = ? AND status IN ('queued', 'running')", (job_id,)
            )
            row = connection.execute("SELECT status FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is not None and row["status"] == "queued":
                _end(connection, job_id, "cancelled", "training_cancelled", {})
        return self.get(owner, job_id)

    # what the worker does

    def claim(self, open_model: str | None, patience_s: float) -> Job | None:
        """Take the next job, the oldest or the open model's; None without any.

        Args:
            open_model: whose jobs need no loading.
            patience_s: how long the oldest job lets them go first.
        """
        with self._database.transaction() as connection:
            oldest = connection.execute(
                "SELECT * FROM jobs WHERE status = 'queued' ORDER BY sequence LIMIT 1"
            ).fetchone()
            if oldest is None:
                return None
            chosen = oldest
            if open_model is not None and oldest["created"] > time.time() - patience_s:
                same = connection.execute(
                    "SELECT * FROM jobs WHERE status = 'queued' AND model_id = ? ORDER BY sequence LIMIT 1",
                    (open_model,),
                ).fetchone()
                chosen = same if same is not None else oldest
            connection.execute(
                "UPDATE jobs SET status = 'running', attempts = attempts + 1, started = ? WHERE id = ?",
                (time.time(), chosen["id"]),
            )
            if chosen["attempts"] == 0:
                _tell(connection, chosen["id"], "training_started", {"num_sequences": chosen["num_sequences"]})
            return Job.of(connection.execute("SELECT * FROM jobs WHERE id = ?", (chosen["id"],)).fetchone())

    def job(self, job_id: str) -> Job | None:
        """A job, as the worker takes it."""
        row = self._database.row("SELECT * FROM jobs WHERE id = ?", job_id)
        return None if row is None else Job.of(row)

    def has_work(self) -> bool:
        """Whether a job waits; cheaper than to claim one."""
        return self._database.row("SELECT 1 FROM jobs WHERE status = 'queued' LIMIT 1") is not None

    def groups_body(self, job_id: str) -> wire.CreateTrainingJob:
        """A job's request, as it came."""
        row = self._database.row("SELECT body FROM payloads WHERE job_id = ?", job_id)
        assert row is not None  # written with the job, deleted at its end
        return wire.CreateTrainingJob.model_validate_json(gzip.decompress(row["body"]))

    def begin(self, job: Job, step: int) -> None:
        """Remember the step that a job starts from, before anything changes."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE jobs SET start_step = ?, outcome = NULL WHERE id = ?", (step, job.id))

    def settle(self, job: Job, outcome: Outcome) -> bool:
        """Remember what training came to, before its checkpoint is written; False if the owner wants it no more."""
        with self._database.transaction() as connection:
            row = connection.execute("SELECT cancel_requested FROM jobs WHERE id = ?", (job.id,)).fetchone()
            if row["cancel_requested"]:
                return False
            text = json.dumps(
                {
                    "step": outcome.step,
                    "num_optimizer_steps": outcome.num_optimizer_steps,
                    "dropped": outcome.dropped,
                    "metrics": outcome.metrics,
                }
            )
            connection.execute("UPDATE jobs SET outcome = ? WHERE id = ?", (text, job.id))
            return True

    def succeed(self, job: Job, outcome: Outcome) -> None:
        """End a job whose checkpoint is on the disk, or that had nothing to learn from."""
        with self._database.transaction() as connection:
            if outcome.num_optimizer_steps:
                _tell(connection, job.id, "gradient_step", outcome.metrics)
                connection.execute(
                    "INSERT OR REPLACE INTO checkpoints (model_id, step, metrics) VALUES (?, ?, ?)",
                    (job.model_id, outcome.step, json.dumps(outcome.metrics)),
                )
            told = {
                "step": outcome.step,
                "num_optimizer_steps": outcome.num_optimizer_steps,
                "dropped": outcome.dropped,
            }
            _end(connection, job.id, "succeeded", "training_ended", told, step=outcome.step)

    def fail(self, job: Job, message: str) -> None:
        """End a job that cannot be trained."""
        with self._database.transaction() as connection:
            _end(connection, job.id, "failed", "training_failed", {"error_message": message}, error_message=message)

    def end_cancelled(self, job: Job) -> None:
        """End a running job that its owner wants no more."""
        with self._database.transaction() as connection:
            _end(connection, job.id, "cancelled", "training_cancelled", {})

    def running(self) -> list[Job]:
        """Jobs that a worker has taken, oldest first."""
        return [
            Job.of(row) for row in self._database.rows("SELECT * FROM jobs WHERE status = 'running' ORDER BY sequence")
        ]

    def requeue(self, job: Job) -> None:
        """Let a job wait again, in its old place: its worker has died and nothing of it is left."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE jobs SET status = 'queued', start_step = NULL, outcome = NULL WHERE id = ?", (job.id,)
            )

    def condemn(self, limit_s: float) -> bool:
        """Say of a job that has been running for longer than it may that it is to be failed; False without any.

        The next worker fails it, after it has seen that the job is not saved.
        """
        late = time.time() - limit_s
        if self._database.row("SELECT 1 FROM jobs WHERE status = 'running' AND started < ?", late) is None:
            return False  # without a lock: it is asked all the time
        with self._database.transaction() as connection:
            done = connection.execute(
                "UPDATE jobs SET error_message = ? WHERE status = 'running' AND started < ?",
                (f"the job ran for longer than {limit_s:g} s, which is the longest here: send fewer groups", late),
            )
        return done.rowcount > 0


def _tell(connection: sqlite3.Connection, job_id: str, kind: str, data: dict[str, Any]) -> None:
    (number,) = connection.execute(
        "SELECT coalesce(max(number), 0) + 1 FROM events WHERE job_id = ?", (job_id,)
    ).fetchone()
    connection.execute(
        "INSERT INTO events (job_id, number, type, data) VALUES (?, ?, ?, ?)", (job_id, number, kind, json.dumps(data))
    )


def _end(
    connection: sqlite3.Connection,
    job_id: str,
    status: str,
    kind: str,
    data: dict[str, Any],
    *,
    step: int | None = None,
    error_message: str | None = None,
) -> None:
    """Close a job: its last event, its status, its payload gone."""
    _tell(connection, job_id, kind, data)
    connection.execute(
        "UPDATE jobs SET status = ?, ended = ?, step = ?, error_message = ? WHERE id = ?",
        (status, time.time(), step, error_message, job_id),
    )
    connection.execute("DELETE FROM payloads WHERE job_id = ?", (job_id,))
