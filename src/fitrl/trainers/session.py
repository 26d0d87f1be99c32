"""`SessionTrainer`: a `lightning.Trainer` with one live model: opened, resumed, sampled from, saved, released.

Enters: a `TrainableModel`. Leaves: a session, whose strategy, optimizer and sampler outlive each `fit`. A trainer has
one at most, and a run folder one trainer.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from fitrl import _compat
from fitrl.data import ranks
from fitrl.data.histories import TokenHistory
from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.errors import InvalidArgumentError, SamplerError, SessionError
from fitrl.policy.checkpoints import tidy
from fitrl.policy.lock import RunLock
from fitrl.policy.model import TrainableModel
from fitrl.policy.module import PolicyModule
from fitrl.policy.optimizers import AdamWSettings
from fitrl.protocols.verbs import Trains
from fitrl.rollout.sampler import ProvesWeights, Sampler
from fitrl.rollout.transformers import TransformersSampler
from fitrl.strategies.session import SessionStrategy
from fitrl.strategies.verbs import PolicyVerbs
from fitrl.trainers.backend import BackendTrainer, calling
from fitrl.trainers.launched import check_processes


@dataclass(slots=True)
class _Session:
    """The model that is open."""

    model: TrainableModel
    module: PolicyModule
    sampler: TransformersSampler | None = None
    copy: TransformersSampler | None = None  # with weights of its own
    lock: threading.RLock = field(default_factory=threading.RLock)  # of the weights: training, or sampling


class SessionTrainer(BackendTrainer):
    """A Lightning trainer that keeps one model open between calls, saves it, and hands its weights to a sampler.

    Args:
        strategy: name or instance of a fitrl strategy.
        optimizer: AdamW's settings, but for the learning rate.
        lr_schedule: factor on the learning rate, by optimizer steps taken.
        compile: compile each decoder layer.
        activation_checkpointing: keep less for backward, compute more.
        sampler: what `trainer.sampler(model)` returns instead of the embedded one; it is handed the new weights
            after each call.
        callbacks: of Lightning or your own.
        enable_model_summary: see `BackendTrainer`.
        **lightning_options: of `lightning.Trainer`, see `BackendTrainer`.

    Raises:
        InvalidArgumentError: a strategy without the verbs of `PolicyTrainer`, one for several processes in a script
            that was not started with `torchrun` or `srun`, or other `devices` and `num_nodes` than were started.
    """

    strategy_kind: ClassVar[type[Any]] = PolicyVerbs  # what the strategy has to be

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
        super().__init__(
            strategy=strategy, callbacks=callbacks, enable_model_summary=enable_model_summary, **lightning_options
        )
        if not isinstance(self.strategy, self.strategy_kind):
            raise InvalidArgumentError(
                f"{type(self).__name__} needs a strategy of fitrl, a {self.strategy_kind.__name__}, got "
                f"{type(self.strategy).__name__}: leave it out, or LocalTrainer(strategy='fitrl_local')"
            )
        check_processes(self)
        if (requeue := _compat.take_requeue_signal(self)) is not None:
            self._interrupts.signals.append(requeue)
        self._optimizer_settings = optimizer
        self._lr_schedule = lr_schedule
        self._compile = compile
        self._activation_checkpointing = activation_checkpointing
        self._given_sampler = sampler
        self._session: _Session | None = None
        self._lock: RunLock | None = None

    @property
    def verbs(self) -> SessionStrategy:
        """The strategy, typed."""
        assert isinstance(self.strategy, SessionStrategy)  # checked at construction
        return self.strategy

    @property
    def local_verbs(self) -> PolicyVerbs:
        """The strategy of a trainer whose weights are in this process."""
        assert isinstance(self.strategy, PolicyVerbs)  # checked at construction
        return self.strategy

    def open(self, model: TrainableModel) -> Trains:
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
        if self._busy.locked() and self._busy_thread != threading.get_ident():
            raise SessionError(f"a call of fit_rl is under way, {model!r} cannot be opened before it ends")
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
            _compat.announce(self, module)
            self.strategy.setup_environment()
            ranks.connect()
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
        self._hold_loggers()
        return self.verbs

    def sampler(self, model: TrainableModel, *, own_weights: bool = False) -> Sampler:
        """The sampler of a model's newest policy: the one given at construction, or the embedded one.

        Args:
            model: whose.
            own_weights: give the embedded one a copy of the trained weights, so that it samples while the trainer
                trains, and takes the new ones at the end of each call between two tokens. Without, it shares the
                trainer's weights and waits while it trains. A given sampler has weights of its own in any case.

        Raises:
            SamplerError: a callback asks for the embedded one in the middle of a call, which would wait for itself.
        """
        self.open(model)
        session = self._require_session()
        if self._given_sampler is not None:
            return self._given_sampler
        if (reason := self._why_not_sample()) is not None:
            raise SamplerError(reason)
        if own_weights:
            if session.copy is None:
                with session.lock:  # not in the middle of a call that another thread makes
                    session.copy = TransformersSampler(
                        self.local_verbs.copied_policy(),
                        context=self.strategy.precision_plugin.forward_context,
                        own_weights=True,
                    )
                    session.copy.update(self.local_verbs.named_weights(), self.global_step)
                    if session.sampler is not None:
                        self.verbs.lend_weights()  # again, for naming them took them back
            return session.copy
        if session.sampler is None:
            session.sampler = TransformersSampler(
                self.local_verbs.lent_policy,
                version=self.global_step,
                context=self.strategy.precision_plugin.forward_context,
                lock=session.lock,
                refuses=self._why_not_sample,
            )
        if self._busy_thread is None:  # else the call that is under way lends them at its end
            self.verbs.lend_weights()
        return session.sampler

    def _why_not_sample(self) -> str | None:
        """Whether this is code of a call under way, a callback's: its weights change, and may lie in pieces."""
        if calling.get() is not self:
            return None
        return (
            "the embedded sampler waits for the call of fit_rl that this callback is a part of: sample between calls, "
            f"or give {type(self).__name__}(sampler=...) one with weights of its own"
        )

    def validate(
        self,
        model: lightning.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: lightning.LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Lightning's `validate`; without a model it validates the open one as it is now, not a checkpoint of it.

        What it reports can be monitored (EarlyStopping, ModelCheckpoint) at the end of the next call, until it is
        validated again; a callback that monitors it needs a validation before the first call.
        """
        if model is None and ckpt_path is None and self._session is not None:
            model = self._session.module
        found = super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)
        if self._session is not None and self.lightning_module is self._session.module:
            self._session.module.validated = dict(self.callback_metrics)
        return found

    def close(self) -> None:
        """Tear down and free the device. What was not saved is gone: `fit_rl` saves unless told not to."""
        self._end_worker()
        self._release()
        self._close_listeners()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_worker()
        session = self._session
        interrupted = error is not None and not isinstance(error, Exception)
        # with several ranks the others may not have been interrupted, and saving waits for all of them
        if interrupted and session is not None and self.verbs.has_unsaved_steps and ranks.world_size() == 1:
            self._say_where_to_resume(self._save())
        self.close()

    def _release(self) -> None:
        for sampler in () if self._session is None else (self._session.sampler, self._session.copy):
            if sampler is not None:
                sampler.close()
        self._session = None
        self._interrupts.unwatch()
        self.verbs.close()
        _compat.detach(self)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _give_up(self) -> None:
        """Release weights of which nothing may be saved.

        The next call resumes the newest checkpoint. A copy of them that is sampled from meanwhile is not left without a
        trainer: then the checkpoint is resumed at once, and the copy takes its weights between two tokens.
        """
        session = self._require_session()
        copy, session.copy = session.copy, None
        self._release()
        if copy is None:
            return
        try:
            self.open(session.model)
            with copy.lock:  # no forward pass is under way
                copy.policy = self.local_verbs.copied_policy()
                copy.update(self.local_verbs.named_weights(), self.global_step)
            self._require_session().copy = copy
        except BaseException:
            copy.close()
            raise

    def _take(self, model: TrainableModel) -> None:
        """Lock the run folder, then clear what a crash left in it."""
        self._lock = RunLock(model.run_dir)
        tidy(model.checkpoints_dir)

    def _require_session(self) -> _Session:
        if self._session is None:
            raise SessionError("no model is open: call trainer.open(model) first")
        return self._session

    def _publish(self) -> None:
        """Hand the weights as they are to the sampler: the embedded one shares them and takes their version."""
        session = self._session
        if session is None:  # torn down on the way, see `_run_epoch`
            return
        if session.copy is not None:
            session.copy.update(self.local_verbs.named_weights(), self.global_step)
        if session.sampler is not None:
            self.verbs.lend_weights()
            session.sampler.update((), self.global_step)
        given = self._given_sampler
        if isinstance(given, ProvesWeights):
            given.update_proven(self.local_verbs.named_weights(), self.global_step, self._score)
        elif given is not None:
            given.update(self.local_verbs.named_weights(), self.global_step)

    def _score(self, token_ids: Sequence[int]) -> Tensor:
        """Logprobs [T - 1] of token ids [T], as they are trained on."""
        history = TokenHistory.all_trained(token_ids)
        can_pack = self._require_session().module.policy.can_pack
        [batch] = pack([Sample(histories=[history], advantage=0.0)], layout="packed" if can_pack else "padded")
        return self.local_verbs.forward(batch).logprobs

    def _save(self) -> str | None:
        """Save the open model's step, unless it is saved already; returns where."""
        return self.verbs.save() if self.verbs.has_unsaved_steps else self._saved()

    def _saved(self) -> str | None:
        """Where the open model's step was saved; None if it was not."""
        folder = self._require_session().model.checkpoints_dir / f"{self.global_step:04d}"
        return str(folder) if folder.is_dir() else None

    def _resumes_at(self, model: TrainableModel) -> int:
        """The step that a model whose weights were given up goes on from."""
        return model.saved_step

    def _say_where_to_resume(self, checkpoint: str | None) -> None:
        if self.is_global_zero:
            where = f"saved {checkpoint}" if checkpoint is not None else "nothing was learned yet"
            print(
                f"fitrl: stopped at step {self.global_step}, {where}; opening the same model again resumes there",
                file=sys.stderr,
                flush=True,
            )
