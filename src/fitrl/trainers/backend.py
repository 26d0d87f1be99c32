"""`BackendTrainer`: a `lightning.Trainer` with `fit_rl`; what the calls of every backend share, local or a service's.

A call is one Lightning epoch, and one call runs at a time: on the thread of its caller, or on the trainer's own.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, ClassVar, Self, TypeVar

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.strategies import Strategy

from fitrl import _compat
from fitrl.data import ranks
from fitrl.data.groups import TrajectoryGroup
from fitrl.errors import InvalidArgumentError, SessionError
from fitrl.objective.objective import ImportanceSamplingLevel
from fitrl.policy.model import TrainableModel
from fitrl.protocols.results import TrainResult
from fitrl.trainers.interrupts import Interrupts, Stop
from fitrl.trainers.progress import RewardProgressBar
from fitrl.trainers.settings import naming_the_backend

_R = TypeVar("_R")

# the trainer whose call is under way here, also in the threads and tasks that a callback starts
calling: ContextVar[BackendTrainer | None] = ContextVar("calling", default=None)


class BackendTrainer(lightning.Trainer):
    """A trainer with `fit_rl`, wherever the policy lives; subclasses are backends and add typed arguments.

    The loop around `fit_rl` is the user's, so a callback that asks to stop (EarlyStopping) is heard there: after a call
    `trainer.should_stop` is what callbacks said during that call. Break then; a further call would go on training.

    Args:
        strategy: name or instance of a strategy.
        callbacks: of Lightning or your own.
        enable_model_summary: print Lightning's model summary, once per model; None: yes.
        **lightning_options: of `lightning.Trainer`. Defaults that differ for RL, also in place of None: no logger, no
            checkpoint callback and no progress bar unless asked for, `log_every_n_steps=1`, no sanity validation,
            `max_epochs=-1`, `inference_mode=False`.
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
            "inference_mode": False,  # FSDP2 cannot train on weights that were gathered in it
        }
        # filled in place, so that the command line can follow the options to Lightning's own types and texts
        for name, value in defaults.items():
            if lightning_options.get(name) is None:
                lightning_options[name] = value
        if enable_model_summary is not False and not any(isinstance(callback, ModelSummary) for callback in given):
            given.append(_SummaryOnce())
        max_epochs = lightning_options["max_epochs"]
        super().__init__(strategy=strategy, callbacks=given, enable_model_summary=False, **lightning_options)
        self._user_max_epochs = max_epochs
        self._busy = threading.Lock()
        self._busy_thread: int | None = None
        self._worker: ThreadPoolExecutor | None = None

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

    @abstractmethod
    def _release(self) -> None:
        """Let go of the model that is open, if one is."""

    async def in_worker(self, call: Callable[[], Any]) -> Any:
        """Run a call after those that wait already; a cancelled one stops between two optimizer steps."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fitrl-fit_rl")
        self._interrupts.watch()  # here, on the thread that gets signals
        cancelled = threading.Event()

        def run() -> Any:
            if self.strategy.root_device.type == "cuda":
                torch.cuda.set_device(self.strategy.root_device)  # each thread has a current device of its own
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

    def _one_call(self, work: Callable[[], _R]) -> _R:
        """Run a call, no other beside it; a signal that came meanwhile is raised after it."""
        if not self._busy.acquire(blocking=False):
            raise SessionError("this trainer is in a fit_rl call already; one trainer trains one model at a time")
        self._busy_thread = threading.get_ident()
        before = calling.set(self)
        try:
            with ranks.naming_the_lost(), self._interrupts.listen():
                result = work()
        except Exception as error:
            # with several ranks the others have to agree, in the next call
            if ranks.world_size() == 1 and (told := self._interrupts.take()) is not None:
                raise told from error
            raise
        except BaseException:
            self._interrupts.take()
            raise
        finally:
            calling.reset(before)
            self._busy_thread = None
            self._busy.release()
        if self._interrupts.stop is Stop.SIGNALLED:  # of another rank, where this one got none
            raise self._interrupts.take() or SystemExit(128 + signal.SIGTERM)
        return result

    def _run_epoch(self, module: lightning.LightningModule, feed: Any, *, accumulate: int = 1) -> None:
        """One Lightning epoch over a sized feed, whose every `accumulate` batches are one optimizer step."""
        self.accumulate_grad_batches = accumulate
        _compat.allow_one_more_epoch(self)
        try:
            with (
                ranks.naming_the_lost(),
                _compat.without_epoch_notes(),
                _compat.keeping_device_memory(self),
                _compat.without_sigterm_broadcasts(self),
                _compat.without_first_barriers(self),
            ):
                self.fit(module, train_dataloaders=feed)
        except SystemExit as stop:
            # Lightning answers the second Ctrl-C by ignoring further ones and leaving the process
            if isinstance(stop.__context__, KeyboardInterrupt):
                self._release()
                raise KeyboardInterrupt from None
            raise
        finally:
            self.accumulate_grad_batches = 1
            self.fit_loop.max_epochs = self._user_max_epochs

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

    def __enter__(self) -> Self:
        return self

    def _hold_loggers(self) -> None:
        """Keep the loggers open from call to call; Lightning would finalise them after each."""
        _compat.hold_loggers(self)

    def _close_listeners(self) -> None:
        """Finalise the loggers and give the terminal back."""
        _compat.release_loggers(self)
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, RewardProgressBar):
                callback.close()

    def _end_worker(self) -> None:
        """Stop the call of `fit_rl_async` that runs after its optimizer step, and drop those that wait."""
        if self._worker is None:
            return
        self._worker.shutdown(wait=False, cancel_futures=True)
        if (cancelled := self._interrupts.cancelled) is not None:
            cancelled.set()
        self._worker.shutdown()
        self._worker = None


class _SummaryOnce(ModelSummary):
    """Lightning's model summary, once per model instead of once per call."""

    _summarised: lightning.LightningModule | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if pl_module is not self._summarised:
            self._summarised = pl_module
            super().on_fit_start(trainer, pl_module)
