"""`RLTrainer`: a `lightning.Trainer` that learns from groups; the machinery behind every local `fit_rl`.

One call, in reading order: open the model (resume its newest checkpoint) -> groups to samples -> old and reference
logprobs -> minibatches and microbatches -> one Lightning epoch -> checkpoint -> result. With several ranks every one
makes the same plan and trains its share of it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.strategies import Strategy

from fitrl import _compat
from fitrl.data import ranks
from fitrl.data.batch import Feed
from fitrl.data.groups import TrajectoryGroup
from fitrl.data.join import join_groups
from fitrl.data.samples import SampleSet, build_samples
from fitrl.errors import (
    DataError,
    InvalidArgumentError,
    NonFiniteGradientError,
    SessionError,
)
from fitrl.objective.objective import ImportanceSamplingLevel
from fitrl.policy.checkpoints import tidy
from fitrl.policy.lock import RunLock
from fitrl.policy.model import TrainableModel
from fitrl.policy.module import AdamWSettings, PolicyModule
from fitrl.policy.plots import plot_batches
from fitrl.protocols.results import LocalTrainResult, TrainResult
from fitrl.protocols.verbs import PolicyTrainer
from fitrl.rollout.sampler import Sampler
from fitrl.rollout.transformers import TransformersSampler
from fitrl.strategies.verbs import PolicyVerbs
from fitrl.trainers.interrupts import Interrupts, Stop
from fitrl.trainers.learning_rate import num_trajectories_factor, reward_std_factor
from fitrl.trainers.plan import Plan, plan_call
from fitrl.trainers.progress import RewardProgressBar
from fitrl.trainers.settings import UpdateSettings, naming_the_backend


@dataclass(slots=True)
class _Session:
    """The model that is open."""

    model: TrainableModel
    module: PolicyModule
    sampler: TransformersSampler | None = None


class RLTrainer(lightning.Trainer):
    """A Lightning trainer with `fit_rl`; subclasses are backends and add typed arguments.

    The loop around `fit_rl` is the user's, so a callback that asks to stop (EarlyStopping) is heard there: after a call
    `trainer.should_stop` is what callbacks said during that call. Break then; a further call would go on training.

    Args:
        strategy: name or instance of a fitrl strategy.
        optimizer: AdamW's settings, but for the learning rate.
        lr_schedule: factor on the learning rate, by optimizer steps taken.
        compile: compile each decoder layer.
        activation_checkpointing: keep less for backward, compute more.
        sampler: what `trainer.sampler(model)` returns instead of the embedded one; it is handed the new weights
            after each call.
        callbacks: of Lightning or your own.
        enable_model_summary: print Lightning's model summary, once per model; None: yes.
        **lightning_options: of `lightning.Trainer`. Defaults that differ for RL, also in place of None: no logger, no
            checkpoint callback and no progress bar unless asked for, `log_every_n_steps=1`, no sanity validation,
            `max_epochs=-1`.

    Raises:
        InvalidArgumentError: a strategy without the verbs of `PolicyTrainer`, or one for several processes in a
            script that was not started with `torchrun`.
    """

    backend: ClassVar[str] = "RLTrainer"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "fit_rl" in cls.__dict__:
            cls.fit_rl = naming_the_backend(cls.__dict__["fit_rl"])  # type: ignore[method-assign]

    def __init__(
        self,
        *,
        strategy: str | Strategy,
        optimizer: AdamWSettings = AdamWSettings(),  # noqa: B008 - frozen
        lr_schedule: Callable[[int], float] | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        sampler: Sampler | None = None,
        callbacks: list[Callback] | Callback | None = None,
        enable_model_summary: bool | None = None,
        **lightning_options: Any,
    ) -> None:
        given = list(callbacks) if isinstance(callbacks, Sequence) else [] if callbacks is None else [callbacks]
        self._interrupts = Interrupts()
        given.append(self._interrupts)
        defaults = {
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in given),
            "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in given),
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "max_epochs": -1,
        }
        # filled in place, so that the command line can follow the options to Lightning's own types and texts
        for name, value in defaults.items():
            if lightning_options.get(name) is None:
                lightning_options[name] = value
        if enable_model_summary is not False and not any(isinstance(callback, ModelSummary) for callback in given):
            given.append(_SummaryOnce())
        max_epochs = lightning_options["max_epochs"]
        super().__init__(strategy=strategy, callbacks=given, enable_model_summary=False, **lightning_options)
        if not isinstance(self.strategy, PolicyVerbs):
            raise InvalidArgumentError(
                f"{type(self).__name__} needs a strategy of fitrl, got {type(self.strategy).__name__}: pass "
                "strategy='fitrl_local'"
            )
        self._refuse_other_launchers()
        self._optimizer_settings = optimizer
        self._lr_schedule = lr_schedule
        self._compile = compile
        self._activation_checkpointing = activation_checkpointing
        self._given_sampler = sampler
        self._user_max_epochs = max_epochs
        self._session: _Session | None = None
        self._lock: RunLock | None = None
        self._busy = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None

    # -- the session --------------------------------------------------------------------------------------------

    @abstractmethod
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
    ) -> TrainResult:
        """Teach the model from groups; the arguments that every backend takes."""

    @property
    def verbs(self) -> PolicyVerbs:
        """The strategy, typed."""
        assert isinstance(self.strategy, PolicyVerbs)  # checked at construction
        return self.strategy

    def open(self, model: TrainableModel) -> PolicyTrainer:
        """Set a model up for training and return the verbs; `fit_rl` does it by itself.

        A model that is open already stays as it is. Another one is saved, if it has unsaved steps, and released
        first. A run with checkpoints resumes its newest whole one.

        Raises:
            RunLockedError: another trainer has this run open.
            CheckpointError: the run's checkpoints are of another kind of policy.
        """
        session = self._session
        # a fit of some other module takes the session's place
        is_live = session is not None and self.verbs.is_live and self.lightning_module is session.module
        if session is not None and is_live and session.model.key == model.key:
            if session.model is not model:
                if (session.model.base_model, session.model.lora) != (model.base_model, model.lora):
                    raise SessionError(f"{session.model!r} is open and {model!r} is the same run with other settings")
                model.step = session.model.step
                session.model = session.module.model = model
            return self.verbs
        if session is not None:
            if is_live and self.verbs.has_unsaved_steps:
                self.verbs.save()
            self._release()
        module = PolicyModule(
            model,
            optimizer=self._optimizer_settings,
            lr_schedule=self._lr_schedule,
            compile=self._compile,
            activation_checkpointing=self._activation_checkpointing,
        )
        self.verbs.keep_alive = True
        try:
            self.strategy.setup_environment()
            self._interrupts.watch()
            ranks.first(lambda: self._take(model))
            _compat.attach(self, module)
            _compat.set_global_step(self, 0)
            model.step = 0
            self._session = _Session(model, module)
            if self.verbs.resume() is None:
                self.verbs.saved_step = 0  # the base model can be had again
            self._publish()
        except BaseException:
            self._release()
            raise
        _compat.hold_loggers(self)
        return self.verbs

    def sampler(self, model: TrainableModel) -> Sampler:
        """The sampler of a model's newest policy: the one given at construction, or the embedded one.

        The embedded one shares the trainer's weights and waits while it trains.
        """
        self.open(model)
        session = self._require_session()
        if self._given_sampler is not None:
            return self._given_sampler
        if session.sampler is None:
            session.sampler = TransformersSampler(
                session.module.policy,
                version=self.global_step,
                context=self.strategy.precision_plugin.forward_context,
            )
        return session.sampler

    def validate(
        self,
        model: lightning.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: lightning.LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Lightning's `validate`; without a model it validates the open one as it is now, not a checkpoint of it."""
        if model is None and ckpt_path is None and self._session is not None:
            model = self._session.module
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def close(self) -> None:
        """Tear down and free the device. What was not saved is gone: `fit_rl` saves unless told not to."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        self._release()
        _compat.release_loggers(self)
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, RewardProgressBar):
                callback.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        session = self._session
        interrupted = error is not None and not isinstance(error, Exception)
        # with several ranks the others may not have been interrupted, and saving waits for all of them
        if interrupted and session is not None and self.verbs.has_unsaved_steps and ranks.world_size() == 1:
            self._say_where_to_resume(self._save())
        self.close()

    def _release(self) -> None:
        if self._session is not None and self._session.sampler is not None:
            self._session.sampler.close()
        self._session = None
        self._interrupts.unwatch()
        self.verbs.close()
        _compat.detach(self)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take(self, model: TrainableModel) -> None:
        """Lock the run folder, then clear what a crash left in it."""
        self._lock = RunLock(model.run_dir)
        tidy(model.checkpoints_dir)

    def _refuse_other_launchers(self) -> None:
        """Let only `torchrun`, or a scheduler like it, start several processes.

        Lightning's own launchers run the whole script again on each rank, rollouts and all, from its start.
        """
        environment = getattr(self.strategy, "cluster_environment", None)
        if self.strategy.launcher is None or (environment is not None and environment.creates_processes_externally):
            return
        program = Path(sys.argv[0]).name or "script.py"
        if program in ("fitrl", "__main__.py"):
            program = "-m fitrl fit_rl ..."
        raise InvalidArgumentError(
            f"{type(self.strategy).__name__} trains with several processes, which torchrun starts: run "
            f"'torchrun --nproc_per_node {max(1, self.num_devices)} {program}'"
        )

    def _require_session(self) -> _Session:
        if self._session is None:
            raise SessionError("no model is open: call trainer.open(model) first")
        return self._session

    # -- one call -----------------------------------------------------------------------------------------------

    def _update(
        self, model: TrainableModel, groups: Iterable[TrajectoryGroup], settings: UpdateSettings
    ) -> LocalTrainResult:
        """Everything that `fit_rl` does once its arguments are checked."""
        if not self._busy.acquire(blocking=False):
            raise SessionError("this trainer is in a fit_rl call already; one trainer trains one model at a time")
        try:
            with self._interrupts.listen():
                result = self._update_alone(model, list(groups), settings)
        finally:
            self._busy.release()
        if self._interrupts.stop is Stop.SIGNALLED:
            received, self._interrupts.received = self._interrupts.received, None
            if received is signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + signal.SIGTERM)
        return result

    def _update_alone(
        self, model: TrainableModel, groups: Sequence[TrajectoryGroup], settings: UpdateSettings
    ) -> LocalTrainResult:
        self._check_limits()
        samples = self._collect(model, groups, settings)
        module = self._require_session().module
        history = [*module.reward_history, (self.global_step, samples.reward_std)]
        before = self.global_step
        checkpoint = None
        metrics = samples.metrics | {"objective/exact": 1.0}
        stop = self._interrupts.agree()
        if samples.groups and not stop:
            self._train(samples, settings, history)
            metrics = module.call_metrics
            stop = self._interrupts.stop
            start = time.perf_counter()
            if settings.save_checkpoint and self.global_step > before:
                checkpoint = self._save()
            metrics = metrics | {"time/checkpoint_s": time.perf_counter() - start}
        elif not stop:
            module.reward_history = history
        if stop is Stop.SIGNALLED:
            self._say_where_to_resume(self._save())
        result = LocalTrainResult(
            step=self.global_step,
            metrics=metrics,
            num_optimizer_steps=self.global_step - before,
            dropped=samples.dropped,
            checkpoint_path=checkpoint,
        )
        if settings.verbose and self.is_global_zero:
            print(f"{self.backend} {_line(result)}", file=sys.stderr)
        return result

    def _save(self) -> Path | None:
        """Save the open model's step, unless it is saved already; returns where."""
        if self.verbs.has_unsaved_steps:
            return Path(self.verbs.save())
        folder = self._require_session().model.checkpoints_dir / f"{self.global_step:04d}"
        return folder if folder.is_dir() else None

    def _say_where_to_resume(self, checkpoint: Path | None) -> None:
        if self.is_global_zero:
            where = f"saved {checkpoint}" if checkpoint is not None else "nothing was learned yet"
            print(
                f"fitrl: stopped at step {self.global_step}, {where}; opening the same model again resumes there",
                file=sys.stderr,
                flush=True,
            )

    async def in_worker(self, call: Callable[[], Any]) -> Any:
        """Run a call after those that wait already; a cancelled one stops between two optimizer steps."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fitrl-fit_rl")
        cancelled = threading.Event()

        def run() -> Any:
            self._interrupts.cancelled = cancelled
            try:
                return call()
            finally:
                self._interrupts.cancelled = None

        job = self._worker.submit(run)
        waiting = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError as stop:
            cancelled.set()
            job.cancel()
            while not job.done():
                try:
                    await asyncio.wait([waiting])
                except asyncio.CancelledError:
                    continue  # the step under way is finished all the same
            if not job.cancelled() and (error := job.exception()) is not None:
                raise stop from error
            raise

    def _collect(self, model: TrainableModel, groups: Sequence[TrajectoryGroup], settings: UpdateSettings) -> SampleSet:
        """Open the model, join the ranks' groups and read them; nothing changes before they are known to be sound."""
        for index, group in enumerate(groups):
            if not isinstance(group, TrajectoryGroup):
                raise DataError(f"groups[{index}] is a {type(group).__name__}, not a TrajectoryGroup")
        self.open(model)
        if self.verbs.get_status().accumulated_microbatches:
            raise SessionError("gradients of forward_backward are waiting: call optim_step or clear_gradients first")
        policy = self._require_session().module.policy
        samples = build_samples(
            join_groups(groups),
            policy.tokenizer,
            vocabulary_size=policy.vocabulary_size,
            scale_rewards=settings.scale_rewards,
            advantage_balance=settings.advantage_balance,
            max_history_tokens=policy.context_length,
            max_trajectory_tokens=settings.max_tokens_per_microbatch,
            padded=not policy.can_pack,
            teaches_without_advantage=settings.teaches_without_advantage,
            train_unsampled=settings.allow_training_without_logprobs,
        )
        if not samples.full_support and not settings.precalculate_logprobs:
            raise DataError(
                "tokens were sampled with top_p < 1 or top_k, so their logprobs are of another distribution than the "
                "policy's: pass precalculate_logprobs=True, or sample from all tokens"
            )
        return samples

    def _train(self, samples: SampleSet, settings: UpdateSettings, history: list[tuple[int, float]]) -> None:
        """Plan the call, run it as one epoch, hand the new weights to the sampler; leaves `call_metrics`."""
        session = self._require_session()
        module, sampler, device = session.module, session.sampler, self.strategy.root_device
        with sampler.lock if sampler is not None else nullcontext():
            start = time.perf_counter()
            plan = plan_call(samples, settings, self.verbs)
            self._check_max_steps(plan.num_steps)
            rate = settings.learning_rate * num_trajectories_factor(
                samples.num_trajectories, settings.num_trajectories_learning_rate_multiplier_power
            )
            if settings.scale_learning_rate_by_reward_std_dev:
                rate *= reward_std_factor(history)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            module.host_metrics = samples.metrics | plan.metrics
            module.objective = settings.objective
            module.clock = (start, samples.metrics["data/num_tokens"] * settings.num_epochs)
            self.verbs.set_learning_rate(rate)
            try:
                self._run_epoch(module, plan)
            except NonFiniteGradientError:
                self._release()  # nothing of this may be saved; the next call resumes the newest checkpoint
                raise
            finally:  # also after an exception: the steps before it were taken
                session.model.step = self.global_step
                self._publish()
        module.reward_history = history
        if device.type == "cuda":
            module.call_metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        if settings.plot_tensors:
            path = session.model.run_dir / "plots" / f"{self.global_step:04d}.png"
            plot_batches(plan.batches[: plan.accumulate], path)

    def _publish(self) -> None:
        """Hand the weights as they are to the sampler: the embedded one shares them and takes their version."""
        session = self._session
        if session is None:  # torn down on the way, see `_run_epoch`
            return
        if session.sampler is not None:
            session.sampler.update((), self.global_step)
        if self._given_sampler is not None:
            self._given_sampler.update(self.verbs.named_weights(), self.global_step)

    def _run_epoch(self, module: PolicyModule, plan: Plan) -> None:
        """One Lightning epoch over the microbatches."""
        self.accumulate_grad_batches = plan.accumulate
        _compat.allow_one_more_epoch(self)
        try:
            with _compat.without_epoch_notes():
                self.fit(module, train_dataloaders=Feed(plan.batches))
        except SystemExit as stop:
            # Lightning answers the second Ctrl-C by ignoring further ones and leaving the process
            if isinstance(stop.__context__, KeyboardInterrupt):
                self._release()
                raise KeyboardInterrupt from None
            raise
        finally:
            self.accumulate_grad_batches = 1
            self.fit_loop.max_epochs = self._user_max_epochs
            if self.verbs.is_live:
                self.verbs.clear_gradients()  # of a step that a callback stopped in its middle

    def _check_limits(self) -> None:
        """Refuse what the user fixed at construction and a call cannot honour."""
        if self.accumulate_grad_batches != 1:
            raise InvalidArgumentError(
                f"accumulate_grad_batches={self.accumulate_grad_batches} contradicts fit_rl, which sets it: bound "
                "microbatches with max_tokens_per_microbatch, steps with num_minibatches"
            )
        all_batches = isinstance(self.limit_train_batches, float) and self.limit_train_batches == 1.0
        if not all_batches or self.overfit_batches or self.fast_dev_run:  # type: ignore[attr-defined]
            raise InvalidArgumentError(
                "limit_train_batches, overfit_batches and fast_dev_run would leave out microbatches of a step; pass "
                "fewer groups instead"
            )
        limit = self._user_max_epochs
        if limit is not None and limit >= 0 and _compat.epochs_processed(self) >= limit:
            raise InvalidArgumentError(f"max_epochs={limit} calls of fit_rl are used up; one call is one epoch")

    def _check_max_steps(self, planned: int) -> None:
        if self.max_steps >= 0 and self.global_step + planned > self.max_steps:
            raise InvalidArgumentError(
                f"max_steps={self.max_steps} is exhausted: this call would take {planned} more after {self.global_step}"
            )


class _SummaryOnce(ModelSummary):
    """Lightning's model summary, once per model instead of once per call."""

    _summarised: PolicyModule | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if pl_module is not self._summarised:
            self._summarised = pl_module  # type: ignore[assignment]
            super().on_fit_start(trainer, pl_module)


def _line(result: LocalTrainResult) -> str:
    """What `verbose` prints of a call."""
    shown = ("reward/mean", "loss/train", "loss/grad_norm", "mismatch/kl", "throughput/tokens_per_s")
    numbers = "".join(f"  {key} {result.metrics[key]:.4g}" for key in shown if key in result.metrics)
    return f"step {result.step}{numbers}" + (f"  dropped {result.dropped}" if result.dropped else "")
