"""`ServerlessTrainer`: learn on another machine, through a service that speaks the training API."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from fitrl import Feed, TrainableModel, TrajectoryGroup
from fitrl.errors import SessionError
from fitrl.objective.objective import ImportanceSamplingLevel
from fitrl.strategies.schedules import stand_at
from fitrl.trainers.asynchronous import asynchronous
from fitrl_serverless.calls import Call, make_call
from fitrl_serverless.client.connection import REQUEST_TIMEOUT_S, RETRY_TIMEOUT_S
from fitrl_serverless.client.errors import JobCancelledError, JobFailedError
from fitrl_serverless.results import ServerlessTrainResult
from fitrl_serverless.run import Run
from fitrl_serverless.session import ServerlessSession
from fitrl_serverless.settings import SAMPLE_TIMEOUT_S, TOTAL_TIMEOUT_S, ServiceSettings
from fitrl_serverless.strategy import PickUp


class ServerlessTrainer(ServerlessSession):
    """Train on another machine; a `lightning.Trainer` whose epochs are the service's training jobs.

    The same class talks to `fitrl serve` and to any other service of this API. One whose mathematics are its own is
    warned of once, and its calls report `objective/exact` 0.

    A job outlives this process. What an earlier one submitted is taken up when its model is opened again: its outcome
    is waited for, kept in `picked_up`, and returned by a `fit_rl` of the same groups and arguments.

    Args:
        url: of the service; None: FITRL_SERVERLESS_URL.
        key: bearer token; None: FITRL_SERVERLESS_KEY. It is sent to this service only, and written nowhere.
        entity: that models belong to; None: the key's owner.
        lr_schedule: factor on the learning rate, by the policy's step.
        request_timeout_s: longest silence of a request.
        retry_timeout_s: how long a request is repeated while the service is busy, failing or away.
        total_timeout_s: longest time of a job, waiting for its turn included; it goes on after that, and is picked up.
        sample_timeout_s: longest silence before a sampled answer.
        ca_file: PEM certificates that the service's is checked by, if a public authority did not sign it; None:
            the file that SSL_CERT_FILE names, or the public authorities.
        **lightning_options: of `lightning.Trainer`: callbacks, logger, max_steps, ...

    Raises:
        InvalidArgumentError: no address or key, or an option of Lightning's that could have no effect on a service.

    Example:
        >>> with ServerlessTrainer(url="http://127.0.0.1:8700") as trainer:
        ...     groups = rollout(trainer.sampler(model), tasks, reward=my_reward)
        ...     result = trainer.fit_rl(model, groups, learning_rate=1e-5)  # doctest: +SKIP
    """

    backend: ClassVar[str] = "serverless"

    def __init__(
        self,
        *,
        url: str | None = None,
        key: str | None = None,
        entity: str | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        retry_timeout_s: float = RETRY_TIMEOUT_S,
        total_timeout_s: float = TOTAL_TIMEOUT_S,
        sample_timeout_s: float = SAMPLE_TIMEOUT_S,
        ca_file: str | Path | None = None,
        **lightning_options: Any,
    ) -> None:
        settings = ServiceSettings.read(
            url=url,
            key=key,
            entity=entity,
            request_timeout_s=request_timeout_s,
            retry_timeout_s=retry_timeout_s,
            total_timeout_s=total_timeout_s,
            sample_timeout_s=sample_timeout_s,
            ca_file=ca_file,
        )
        super().__init__(settings=settings, lr_schedule=lr_schedule, **lightning_options)

    def fit_rl(
        self,
        model: TrainableModel,
        groups: Iterable[TrajectoryGroup],
        *,
        learning_rate: float = 5e-6,
        ppo: bool = False,
        epsilon: float | None = None,
        epsilon_high: float | None = None,
        advantage_balance: float = 0.0,
        scale_rewards: bool = True,
        importance_sampling_level: ImportanceSamplingLevel = "token",
        max_negative_advantage_importance_sampling_weight: float | None = None,
        mask_prob_ratio: bool = False,
        kimi_k2_tau: float | None = None,
        precalculate_logprobs: bool = False,
    ) -> ServerlessTrainResult:
        """Teach the model from groups: one training job, which is one Lightning epoch of one batch.

        Groups that cannot teach (all rewards equal) are not worth a job: when nothing else is left,
        `num_optimizer_steps` is 0, nothing is sent and nothing changes. Ctrl-C cancels the job at the service;
        SIGTERM, like a crash, leaves it there to be picked up.

        Args:
            model: the policy; opened at the service when it is not open yet.
            groups: trajectories with rewards, compared within their group.
            learning_rate: of AdamW, before `lr_schedule`.
            ppo: PPO's pessimistic clip instead of CISPO.
            epsilon: the ratio window starts at 1 - epsilon; None: 0.2 for PPO, 1.0 for CISPO.
            epsilon_high: the window ends at 1 + epsilon_high; None: epsilon for PPO, 4.0 for CISPO.
            advantage_balance: in [-1, 1]; above 0 negative advantages count less, below 0 positive ones.
            scale_rewards: divide advantages by the group's standard deviation.
            importance_sampling_level: ratio per token, sequence, or an average of both.
            max_negative_advantage_importance_sampling_weight: cap of the ratio where the advantage is negative.
            mask_prob_ratio: tokens whose ratio is outside the window teach nothing.
            kimi_k2_tau: subtract tau times the log ratio from the advantage.
            precalculate_logprobs: recompute the old logprobs with the trainer before the first step.

        Raises:
            InvalidArgumentError: a value out of range, or an option that could have no effect.
            UnknownArgumentError: an argument of another backend.
            DataError: groups that cannot be learned from as they are; the message says which.
            JobFailedError: the service could not train them; the model stands where it stood.
            ServiceError: the service cannot be used; see its subclasses.
        """
        call = make_call(
            groups,
            learning_rate=learning_rate,
            ppo=ppo,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            advantage_balance=advantage_balance,
            scale_rewards=scale_rewards,
            importance_sampling_level=importance_sampling_level,
            max_negative_advantage_importance_sampling_weight=max_negative_advantage_importance_sampling_weight,
            mask_prob_ratio=mask_prob_ratio,
            kimi_k2_tau=kimi_k2_tau,
            precalculate_logprobs=precalculate_logprobs,
        )
        return self._heeding_signals(lambda: self._learn(model, call, learning_rate))

    fit_rl_async = asynchronous(fit_rl)

    # -- one call -----------------------------------------------------------------------------------------------

    def _learn(self, model: TrainableModel, call: Call, learning_rate: float) -> ServerlessTrainResult:
        """Everything that `fit_rl` does once its arguments are checked."""
        self._check_limits()
        run = self._open(model)
        if run.pending is not None:
            if run.is_pending(call):
                return self._train(run, PickUp())
            self._pick_up(run)
        if self._picked_up_call is not None:
            is_same, self._picked_up_call = self._picked_up_call == run.fingerprint(call), None
            if is_same and self.picked_up is not None:
                return self.picked_up
        if not call.teaches:
            exact = {"objective/exact": float(run.about.is_exact)}
            return ServerlessTrainResult(
                step=run.step, metrics=call.metrics | exact, num_optimizer_steps=0, dropped=call.dropped
            )
        self._check_max_steps(1)
        self._module_of(run).learning_rate = learning_rate
        return self._train(run, call)

    def _pick_up(self, run: Run) -> None:
        """Wait for the job of an earlier process, and say how it ended."""
        job = run.pending
        assert job is not None  # its callers looked
        print(f"fitrl: waiting for job {job.job_id or '(not confirmed yet)'} of an earlier process", file=sys.stderr)
        try:
            self.picked_up = self._train(run, PickUp())
        except (JobFailedError, JobCancelledError) as error:
            if self._is_cancelled():  # just now, by this process
                raise
            warnings.warn(f"the job of an earlier process failed: {error}", RuntimeWarning, stacklevel=2)
            return
        self._picked_up_call = job.fingerprint
        print(f"fitrl: it ended, {run.artifact(run.step)}", file=sys.stderr)

    def _train(self, run: Run, batch: Call | PickUp) -> ServerlessTrainResult:
        """One Lightning epoch of one batch."""
        module = self._module_of(run)
        strategy = self.service_strategy
        strategy.outcome, strategy.stops = None, self._is_cancelled
        try:
            self._run_epoch(module, Feed([batch]))  # type: ignore[list-item]
        finally:
            stand_at(self, run.step)
            run.model.step = run.step
            if self._served is not None:
                self._served.update((), run.step)
        outcome = strategy.outcome
        if outcome is None:
            raise SessionError("a callback stopped the call before it was submitted: nothing was learned")
        return ServerlessTrainResult(
            step=run.step,
            metrics=module.call_metrics,
            num_optimizer_steps=outcome.num_optimizer_steps,
            dropped=outcome.dropped or {},
            artifact_name=str(run.artifact(run.step)) if outcome.num_optimizer_steps else None,
        )

    def _is_cancelled(self) -> bool:
        """Whether the user wants the job away: by Ctrl-C, or by cancelling `fit_rl_async`."""
        told, cancelled = self._interrupts.received, self._interrupts.cancelled
        if told is not None and told is not signal.SIGINT:
            raise SystemExit(128 + told)  # the job stays, to be picked up
        return told is signal.SIGINT or (cancelled is not None and cancelled.is_set())
