"""Learning-rate schedules put where a loaded state left them."""

from __future__ import annotations

from typing import Any


def fast_forward(scheduler: Any, step: int) -> None:
    """Put a schedule where `step` optimizer steps would have brought it."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    for group, base, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(step)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
