"""The only file that uses private Lightning names; `tests/test_compat.py` holds each one to its contract."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loops import utilities
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn

# Strategy hook that connects Lightning's accelerator connector to a strategy's device
registry = StrategyRegistry


def attach(trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
    """Set a module up for training without running an epoch: what `Trainer.fit` does before its loop."""
    trainer.strategy._lightning_module = module
    trainer.state.fn = TrainerFn.FITTING
    trainer.training = True
    trainer._data_connector.attach_data(module)
    trainer.strategy.connect(module)
    trainer._callback_connector._attach_model_logging_functions()
    trainer.strategy.setup_environment()
    call._call_configure_model(trainer)
    trainer.strategy.setup(trainer)
    trainer.training = False
    trainer.state.fn = None


def announce(trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
    """Tell the strategy its module before its environment is set up; one that makes a device mesh hands it over."""
    trainer.strategy._lightning_module = module


def set_data_parallel_size(strategy: Any, tensor_parallel_size: int) -> None:
    """Let all processes of a `ModelParallelStrategy` share the data, so many at a time the same.

    By default it would share it over nodes.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes // tensor_parallel_size


def detach(trainer: lightning.Trainer) -> None:
    """Forget the module that was attached."""
    trainer.strategy._lightning_module = None
    trainer.strategy.model = None
    trainer.strategy._reset_optimizers_and_schedulers()
    trainer.fit_loop._combined_loader = None
    trainer._data_connector._datahook_selector = None
    for loop in (
        trainer.fit_loop,
        trainer.fit_loop.epoch_loop.val_loop,
        trainer.validate_loop,
        trainer.test_loop,
        trainer.predict_loop,
    ):
        loop._data_source.instance = None


def set_global_step(trainer: lightning.Trainer, step: int) -> None:
    """Make `trainer.global_step`, and the step that loggers see, `step`."""
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    progress.total.ready = step
    progress.total.completed = step
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def advance_global_step(trainer: lightning.Trainer) -> None:
    """Count one optimizer step that was taken outside of `fit`."""
    set_global_step(trainer, trainer.global_step + 1)


def allow_one_more_epoch(trainer: lightning.Trainer) -> None:
    """Let the next `fit` run exactly one epoch, also after one that was cut short."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.ready = progress.started = progress.completed = progress.processed
    trainer.fit_loop.max_epochs = progress.processed + 1


@contextmanager
def without_epoch_notes() -> Iterator[None]:
    """Keep Lightning from noting, after every call, that its one epoch is over."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_is_no_epoch_note)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_epoch_note)


@contextmanager
def keeping_device_memory(trainer: lightning.Trainer) -> Iterator[None]:
    """Keep `fit` from handing the allocator's free memory back to the device, which it does before every run.

    It does so to free a checkpoint that was restored, and here none is; each call would allocate everything again.
    """
    connector: Any = trainer._checkpoint_connector
    connector.resume_end = _nothing
    try:
        yield
    finally:
        del connector.resume_end


@contextmanager
def without_sigterm_broadcasts(trainer: lightning.Trainer) -> Iterator[None]:
    """Keep `fit` from asking rank 0, before every batch, whether it was told to end: each time waits for the device.

    Nobody tells Lightning: during a call the trainer has taken the signal over, and the ranks agree after each step.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = _nothing
    try:
        yield
    finally:
        del loop._broadcast_sigterm_tensor


@contextmanager
def without_first_barriers(trainer: lightning.Trainer) -> Iterator[None]:
    """Keep `fit` from having all ranks wait for each other four times before its first batch, while devices do nothing.

    They have just compared their groups, and there is no data module that one of them prepares for the others.
    """
    strategy: Any = trainer.strategy
    wait = strategy.barrier

    def barrier(name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if name not in ("pre_setup", "post_setup", "run-stage", "train_dataloader()"):
            wait(name, *args, **kwargs)

    strategy.barrier = barrier
    try:
        yield
    finally:
        del strategy.barrier


def _nothing() -> None:
    """In place of a method that has nothing to do."""


def _is_no_epoch_note(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("`Trainer.fit` stopped: `max_epochs=")


# fit_rl validates when its caller says so
warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")


@contextmanager
def evaluating_as_with_nccl() -> Iterator[None]:
    """Let Lightning evaluate in inference mode under gloo, too, where it takes `torch.no_grad` instead."""
    asking: Any = utilities
    asked = asking._distributed_is_initialized
    asking._distributed_is_initialized = lambda: False
    try:
        yield
    finally:
        asking._distributed_is_initialized = asked


def epochs_processed(trainer: lightning.Trainer) -> int:
    """Epochs that `fit` has run so far."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def take_requeue_signal(trainer: lightning.Trainer) -> signal.Signals | None:
    """Take over the signal that SLURM sends before a job's time is up; None if Lightning does not listen for it.

    Lightning would answer it with a checkpoint of its own, which every later `fit` in that folder loads again: each
    call of `fit_rl` would start from there.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    environment.auto_requeue = False
    return environment.requeue_signal


def hold_loggers(trainer: lightning.Trainer) -> None:
    """Keep loggers open between calls: Lightning finalises them after each `fit`, which starts new event files."""
    for logger in trainer.loggers:
        if "finalize" not in vars(logger):
            held: Any = logger
            held.finalize = _Flush(logger)


def release_loggers(trainer: lightning.Trainer) -> None:
    """Finalise the loggers that were held."""
    for logger in trainer.loggers:
        if isinstance(vars(logger).get("finalize"), _Flush):
            del vars(logger)["finalize"]
            logger.finalize("success")


class _Flush:
    """Stands in for `finalize` while a session is open: writes what is pending, closes nothing."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def __call__(self, status: str) -> None:
        if not isinstance(self._logger, CSVLogger) or self._logger._experiment is not None:
            self._logger.save()


def raw_optimizer(strategy: Any) -> Any:
    """The strategy's only optimizer."""
    return strategy.optimizers[0]


def step_schedulers(strategy: Any) -> None:
    """Advance the strategy's learning-rate schedules by one optimizer step."""
    for config in strategy.lr_scheduler_configs:
        config.scheduler.step()
