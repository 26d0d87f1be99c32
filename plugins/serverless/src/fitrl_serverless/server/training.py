"""One job on the worker: open the model, train, remember what came of it, save, end the job.

All ranks run it. Rank 0 reads the groups and writes to the database; the others pass no groups, and their part of the
computing is dealt to them by `fit_rl`.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import Any

import fitrl
from fitrl.data.json_lines import number_to_json
from fitrl.errors import (
    DataError,
    FitRLError,
    InvalidArgumentError,
    NonFiniteGradientError,
    OutOfMemoryError,
    RankLostError,
    UnsupportedError,
)
from fitrl_serverless import wire
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.job import Job, Outcome
from fitrl_serverless.server.orders import Orders
from fitrl_serverless.server.queue import Queue
from fitrl_serverless.server.registry import Registry, StoredModel

_log = logging.getLogger(__name__)
# whose words are of the request, not of this machine and its folders
_OWNERS_ERRORS = (DataError, InvalidArgumentError, NonFiniteGradientError, OutOfMemoryError, UnsupportedError)


class Training:
    """Trains jobs with one trainer.

    Args:
        trainer: of this rank.
        database: of the server.
        registry: of the server.
        queue: of the server.
        orders: of the worker.
    """

    def __init__(
        self, trainer: fitrl.LocalTrainer, database: Database, registry: Registry, queue: Queue, orders: Orders
    ) -> None:
        self._trainer = trainer
        self._database = database
        self._registry = registry
        self._queue = queue
        self._orders = orders
        self.open_model: str | None = None

    def read(self, job: Job) -> list[fitrl.TrajectoryGroup]:
        """The groups of a job."""
        return wire.groups_from_wire(self._queue.groups_body(job.id).trajectory_groups)

    def train(self, job: Job, groups: Sequence[fitrl.TrajectoryGroup]) -> None:
        """Train a job to its end; one that cannot be trained is failed with a reason.

        Raises:
            RankLostError: another rank has died; the job is left to the next worker.
            Exception: what nobody foresaw; the job is failed, and this process should end.
        """
        try:
            self._train(job, groups)
        except RankLostError:
            raise  # the next worker takes the job
        except FitRLError as error:
            self._give_up(job, reason(error))
            _log.warning("%s failed: %s %s", job.id, type(error).__name__, where(error))
        except Exception as error:
            self._give_up(job, reason(error))
            raise

    def _train(self, job: Job, groups: Sequence[fitrl.TrajectoryGroup]) -> None:
        row = self._database.row("SELECT * FROM models WHERE id = ?", job.model_id)
        assert row is not None  # a model with jobs that are not at their end is not deleted
        model = self._registry.run(StoredModel.of(row))
        policy = self._trainer.open(model)
        self.open_model = job.model_id
        if self._orders.is_first:
            self._queue.begin(job, policy.get_status().step)
        result = self._trainer.fit_rl(model, groups, save_checkpoint=False, **job.config)
        outcome = outcome_of(result)
        if not outcome.num_optimizer_steps:
            if self._orders.is_first:
                self._queue.succeed(job, outcome)
            return
        if self._decide(job, outcome) == "save":
            policy.save()
            if self._orders.is_first:
                self._queue.succeed(job, outcome)
        else:
            self._close()  # the step was taken in memory; opening the model again resumes without it
            if self._orders.is_first:
                self._queue.end_cancelled(job)

    def _decide(self, job: Job, outcome: Outcome) -> str:
        if not self._orders.is_first:
            return self._orders.take().what
        what = "save" if self._queue.settle(job, outcome) else "drop"
        return self._orders.give(what).what

    def _give_up(self, job: Job, message: str) -> None:
        self._close()
        if self._orders.is_first:
            self._queue.fail(job, message)

    def _close(self) -> None:
        """Drop the session, and with it any step that is not saved."""
        self.open_model = None
        self._trainer.close()


def outcome_of(result: fitrl.LocalTrainResult) -> Outcome:
    """What a call came to, as the database keeps it."""
    return Outcome(
        step=result.step,
        num_optimizer_steps=result.num_optimizer_steps,
        dropped=dict(result.dropped),
        metrics={name: number_to_json(float(value)) for name, value in result.metrics.items()},
    )


def reason(error: Exception) -> str:
    """Why a job failed, for its owner: nothing of this machine's folders."""
    if isinstance(error, _OWNERS_ERRORS):
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__} on the server; its log says where"


def where(error: BaseException) -> str:
    """Where an error was raised, without its words, which may be of a prompt."""
    frames: Any = traceback.extract_tb(error.__traceback__)
    return f"at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
