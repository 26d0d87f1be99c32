"""Following a job: submitted once, its events told as they come, stopped if the user says so.

Enters: a `PendingJob`. Leaves: a `JobOutcome`. The waiting is done on the connection's event loop; events are told on
the thread that asked, where Lightning's callbacks and loggers live.
"""

from __future__ import annotations

import asyncio
import queue
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fitrl.data.json_lines import number_from_json
from fitrl_serverless import wire
from fitrl_serverless.client.errors import (
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    MalformedAnswerError,
    NotFoundError,
    ServiceTimeoutError,
)
from fitrl_serverless.client.pending import PendingJob
from fitrl_serverless.client.service import Service

_LISTEN_S = 0.1  # how soon a stop is noticed
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 2.0
_PAUSE_GROWTH = 1.2  # so that an end is noticed late by a small part of the time that was waited


@dataclass(slots=True, kw_only=True)
class JobOutcome:
    """How a job ended.

    Attributes:
        gradient_steps: metrics of each, in order.
        step: the model's step after it, where the service says so.
        num_optimizer_steps: taken.
        dropped: groups and trajectories, by reason; None: the service does not say.
        known: metrics that the client had when it submitted the job.
    """

    gradient_steps: list[dict[str, float]] = field(default_factory=list)
    step: int | None = None
    num_optimizer_steps: int = 0
    dropped: dict[str, int] | None = None
    known: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the gradient steps, maxima of what is a maximum; and what the client knows itself."""
        columns: dict[str, list[float]] = {}
        for metrics in self.gradient_steps:
            for name, value in metrics.items():
                columns.setdefault(name, []).append(value)
        told = {
            name: max(values) if name.endswith("max") else sum(values) / len(values) for name, values in columns.items()
        }
        return told | self.known


class Jobs:
    """The jobs of one service.

    Args:
        service: that trains.
        total_timeout_s: longest time from submission to end; a job that takes longer goes on, and can be picked up.
    """

    def __init__(self, service: Service, *, total_timeout_s: float) -> None:
        self.service = service
        self.total_timeout_s = total_timeout_s

    def run(
        self,
        record: PendingJob,
        run_dir: Path,
        *,
        tell: Callable[[dict[str, float]], object],
        stops: Callable[[], bool],
    ) -> JobOutcome:
        """Submit the job if that was not done yet, wait for its end, and forget it then.

        Args:
            record: the run's job, saved.
            run_dir: where.
            tell: called with each gradient step's metrics as they arrive.
            stops: asked every now and then whether to cancel the job.

        Raises:
            JobFailedError: the service could not train it.
            JobCancelledError: it was cancelled before it trained.
            ServiceTimeoutError: it did not end in time.
            ServiceError: the service cannot be used.
        """
        news: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        following = self.service.connection.start(self._follow(record, run_dir, news.put))
        following.add_done_callback(lambda _: news.put(None))
        stopping = None
        try:
            while not (following.done() and news.empty()):
                try:
                    metrics = news.get(timeout=_LISTEN_S)
                except queue.Empty:
                    metrics = None
                if metrics is not None:
                    tell(metrics)
                if stopping is None and record.job_id is not None and stops():
                    stopping = self.service.connection.start(self.service.cancel(record.job_id))
                if stopping is not None and stopping.done() and not following.done() and not stopping.result():
                    raise JobCancelledError(
                        f"job {record.job_id} cannot be cancelled, {record.url} has no such call: it goes on there, "
                        "and is picked up when this model is opened again"
                    )
            return following.result()
        finally:
            following.cancel()
            if stopping is not None:
                stopping.cancel()

    async def _follow(
        self, record: PendingJob, run_dir: Path, tell: Callable[[dict[str, float]], object]
    ) -> JobOutcome:
        try:
            async with asyncio.timeout(self.total_timeout_s):
                if record.job_id is None:
                    await self._submit(record, run_dir)
                outcome = await self._watch_known(str(record.job_id), tell)
        except TimeoutError as error:
            if isinstance(error, ServiceTimeoutError):
                raise
            raise ServiceTimeoutError(
                f"job {record.job_id} did not end within {self.total_timeout_s:g} s; it goes on at {record.url}, and "
                "is picked up when this model is opened again"
            ) from error
        except (JobFailedError, JobCancelledError):
            record.discard(run_dir)
            raise
        return outcome

    async def _submit(self, record: PendingJob, run_dir: Path) -> None:
        try:
            record.job_id = await self.service.submit(record.body(run_dir), record.key)
        except (InvalidRequestError, NotFoundError):
            record.discard(run_dir)  # it is refused for good: nothing was trained, and nothing will be
            raise
        record.save(run_dir)

    async def _watch_known(self, job_id: str, tell: Callable[[dict[str, float]], object]) -> JobOutcome:
        try:
            return await self._watch(job_id, tell)
        except NotFoundError as error:
            raise NotFoundError(
                f"the service does not know job {job_id}, or this key may not see it ({error.detail}); if it is "
                "lost for good, trainer.forget(model) drops it",
                request=error.request,
                status=error.status,
                request_id=error.request_id,
            ) from error

    async def _watch(self, job_id: str, tell: Callable[[dict[str, float]], object]) -> JobOutcome:
        outcome = JobOutcome()
        after: str | None = None
        pause = _SHORTEST_PAUSE_S
        ended: wire.TrainingJob | None = None
        while True:
            quiet = True
            async for event in self.service.events(job_id, after=after):
                after, quiet = event.id, False
                if _take(event, outcome, tell):
                    return outcome
            if quiet and ended is not None:  # its last event is lost, but not its end
                return _of_status(ended, outcome)
            if quiet:
                job = await self.service.job(job_id)
                ended = job if job.status.lower() in wire.ENDED else None
            pause = min(pause * _PAUSE_GROWTH, _LONGEST_PAUSE_S) if quiet else _SHORTEST_PAUSE_S
            if ended is None:
                await asyncio.sleep(random.uniform(0.5, 1.0) * pause)


def _take(event: wire.Event, outcome: JobOutcome, tell: Callable[[dict[str, float]], object]) -> bool:
    """Take an event in; True if it is the last one."""
    if event.type == "gradient_step":
        metrics = _numbers(event.data)
        outcome.gradient_steps.append(metrics)
        outcome.num_optimizer_steps = len(outcome.gradient_steps)
        tell(metrics)
    elif event.type == "training_failed":
        raise JobFailedError(str(event.data.get("error_message") or "the service does not say why"))
    elif event.type == "training_cancelled":
        raise JobCancelledError("the job was cancelled")
    elif event.type == "training_ended":
        try:
            step = event.data.get("step")
            outcome.step = None if step is None else _count(step)
            outcome.num_optimizer_steps = _count(event.data.get("num_optimizer_steps", outcome.num_optimizer_steps))
            if "dropped" in event.data:
                outcome.dropped = {name: _count(count) for name, count in _mapping(event.data["dropped"]).items()}
        except (TypeError, ValueError) as error:
            raise MalformedAnswerError(f"training_ended holds something else than the API says: {error}") from error
        return True
    return False


def _of_status(job: wire.TrainingJob, outcome: JobOutcome) -> JobOutcome:
    status = job.status.lower()
    if status == "failed":
        raise JobFailedError(job.error_message or "the service does not say why")
    if status == "cancelled":
        raise JobCancelledError("the job was cancelled")
    outcome.step = job.step
    return outcome


def _numbers(data: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event; JSON's strings for NaN and the infinities are numbers."""
    numbers: dict[str, float] = {}
    for name, value in data.items():
        special = isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity")
        if special or (isinstance(value, int | float) and not isinstance(value, bool)):
            numbers[name] = float(number_from_json(value))
    return numbers


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.80} is no count")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.80} is no object")
    return value
