"""Learning-rate schedules: their base rate, and where a state that was loaded or reported puts them."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.strategies import Strategy

from fitrl import _compat


def set_base_rate(strategy: Strategy, learning_rate: float) -> None:
    """Set the rate that the schedules multiply; Lightning's scheduler would overwrite a plain `lr`."""
    for config in strategy.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = learning_rate
            group["lr"] = rate


def stand_at(trainer: lightning.Trainer, step: int) -> None:
    """Put a trainer's step and its schedules where `step` optimizer steps would have brought them."""
    for config in trainer.strategy.lr_scheduler_configs:
        fast_forward(config.scheduler, step)
    _compat.set_global_step(trainer, step)


def fast_forward(scheduler: Any, step: int) -> None:
    """Put a schedule where `step` optimizer steps would have brought it."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    for group, base, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(step)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
