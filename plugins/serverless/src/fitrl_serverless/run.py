"""`Run`: one model at one service, and its folder here; opened, picked up, trained call by call, let go.

A run folder has one trainer, as everywhere in fitrl. It holds the job under way and what `model.log` writes; weights,
optimizer and checkpoints are the service's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fitrl import LoraSettings, TrainableModel
from fitrl.errors import InvalidArgumentError, SessionError, UnsupportedError
from fitrl.policy.lock import RunLock
from fitrl_serverless import wire
from fitrl_serverless.calls import Call
from fitrl_serverless.client.jobs import JobOutcome, Jobs
from fitrl_serverless.client.pending import PendingJob, fingerprint
from fitrl_serverless.client.service import About, Service


class Run:
    """A model that is open at a service.

    Args:
        service: that trains it.
        model: which one.
        entity: that it belongs to; None: the key's owner.
        total_timeout_s: longest time of a job.

    Raises:
        RunLockedError: another trainer has this run open.
        UnsupportedError: the service cannot be told which weights to train.
        SessionError: the run has a job at another service, or of another model.
        ServiceError: the service cannot be used, or refuses the model.
    """

    def __init__(self, service: Service, model: TrainableModel, entity: str | None, total_timeout_s: float) -> None:
        self.service = service
        self.model = model
        self._jobs = Jobs(service, total_timeout_s=total_timeout_s)
        self._lock = RunLock(model.run_dir)
        try:
            self.pending = PendingJob.load(model.run_dir)
            if self.pending is not None and self.pending.url != service.connection.url:
                raise SessionError(
                    f"{model.run_dir} has a job at {self.pending.url}, and this trainer talks to "
                    f"{service.connection.url}: open the model there, or drop the job with trainer.forget(model)"
                )
            wait = service.connection.wait
            self.about: About = wait(service.about())
            self.remote: wire.Model = wait(service.open_model(_request(model, entity, self.about)))
            if self.pending is not None and self.pending.model_id != self.remote.id:
                raise SessionError(
                    f"{model.run_dir} has a job of the model {self.pending.model_id}, and this one is "
                    f"{self.remote.id}: take the entity and key that it was submitted with, or drop the job with "
                    "trainer.forget(model)"
                )
            newest = wait(service.newest_checkpoint(self.remote.id))
        except BaseException:
            self._lock.release()
            raise
        self.step = 0 if newest is None else newest.step
        model.step = self.step

    @property
    def folder(self) -> Path:
        """The run's folder here."""
        return self.model.run_dir

    def artifact(self, step: int | None) -> wire.Artifact:
        """The model at a step, None: the newest."""
        remote = self.remote
        return wire.Artifact(entity=remote.entity, project=remote.project, name=remote.name, step=step)

    def is_pending(self, call: Call) -> bool:
        """Whether the job under way is of these groups and arguments."""
        return self.pending is not None and self.pending.fingerprint == self.fingerprint(call)

    def fingerprint(self, call: Call) -> str:
        """Tells the same groups and arguments from others."""
        return fingerprint(self.remote.id, call.groups, call.config)

    def train(
        self,
        call: Call | None,
        learning_rate: float,
        *,
        tell: Callable[[dict[str, float]], object],
        stops: Callable[[], bool],
    ) -> JobOutcome:
        """Submit a call's job, or take up the one under way (None), and wait for its end.

        Args:
            call: what to learn from; None: what an earlier process submitted.
            learning_rate: of this job.
            tell: called with each gradient step's metrics as they arrive.
            stops: asked every now and then whether to cancel the job.

        Raises:
            ServiceError: see `Jobs.run`.
        """
        if call is not None:
            self.pending = PendingJob.create(
                self.folder,
                url=self.service.connection.url,
                model_id=self.remote.id,
                groups=call.groups,
                config=call.config,
                learning_rate=learning_rate,
                metrics=call.metrics,
                dropped=call.dropped,
                num_empty=call.num_empty,
            )
            self.pending.save(self.folder)
        if self.pending is None:
            raise SessionError("there is no job to take up")
        job = self.pending
        try:
            outcome = self._jobs.run(job, self.folder, tell=tell, stops=stops)
            if outcome.step is None:
                newest = self.service.connection.wait(self.service.newest_checkpoint(self.remote.id))
                outcome.step = 0 if newest is None else newest.step
        finally:
            self.pending = PendingJob.load(self.folder)
        outcome.dropped, outcome.known = _merged(outcome.dropped, job), dict(job.metrics)
        self.step = outcome.step
        job.discard(self.folder)
        self.pending = None
        return outcome

    def forget(self) -> None:
        """Drop the job under way, whatever becomes of it at the service."""
        if self.pending is not None:
            self.pending.discard(self.folder)
            self.pending = None

    @staticmethod
    def forget_in(model: TrainableModel) -> None:
        """`forget` for a model that is not open."""
        lock = RunLock(model.run_dir)
        try:
            job = PendingJob.load(model.run_dir)
            if job is not None:
                job.discard(model.run_dir)
        finally:
            lock.release()

    def close(self) -> None:
        """Let the next trainer in; safe to call again."""
        self._lock.release()


def _merged(told: dict[str, int] | None, job: PendingJob) -> dict[str, int]:
    """What was left out: by the service, where it says so, and here."""
    if told is None:
        return dict(job.dropped)
    counts = dict(told)
    if job.num_empty:
        counts["empty_groups"] = counts.get("empty_groups", 0) + job.num_empty
    return {reason: count for reason, count in counts.items() if count}


def _request(model: TrainableModel, entity: str | None, about: About) -> wire.CreateModel:
    lora: wire.Lora | bool | None = None
    if about.knows_fitrl:
        lora = False if model.lora is None else _lora(model.lora)
    elif model.lora != LoraSettings():
        raise UnsupportedError(
            f"lora={model.lora!r}: this service decides itself which weights it trains, so leave lora out; "
            "LocalTrainer and `fitrl serve` take it"
        )
    try:
        return wire.CreateModel(
            entity=entity,
            project=model.project,
            name=model.name,
            base_model=model.base_model,
            return_existing=True,
            lora=lora,  # type: ignore[arg-type]
        )
    except ValueError as error:  # pydantic's, whose text would repeat the values
        raise InvalidArgumentError(f"{model!r} cannot be a model of the service: {wire.explain(error)}") from error  # type: ignore[arg-type]


def _lora(settings: LoraSettings) -> wire.Lora:
    layers = settings.target_modules
    if isinstance(layers, str) and layers != "all-linear":
        raise UnsupportedError(
            f"target_modules={layers!r} is a pattern, which services do not take: name the layers one by one"
        )
    return wire.Lora(
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules="all-linear" if isinstance(layers, str) else list(layers),
        seed=settings.seed,
    )
