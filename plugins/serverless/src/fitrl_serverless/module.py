"""`ServerlessModule`: the LightningModule of a policy that lives on a service.

It holds one parameter that is never trained. Its optimizer carries the learning rate, so that schedules,
LearningRateMonitor and callbacks work as they do elsewhere. What the service tells of each gradient step goes to
progress bar, `trainer.callback_metrics` and loggers as it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from fitrl import RewardProgressBar, TrainableModel

_SHOWN = ("reward/mean", "loss/train", "mismatch/kl", "throughput/tokens_per_s")


class ServerlessModule(lightning.LightningModule):
    """A policy on a service.

    Args:
        model: which one.
        learning_rate: of each job, before the schedule.
        lr_schedule: factor on it, by the policy's step.
    """

    def __init__(
        self,
        model: TrainableModel,
        *,
        learning_rate: float = 5e-6,
        lr_schedule: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.lr_schedule = lr_schedule
        self.placeholder = nn.Parameter(torch.zeros(()))
        self.call_metrics: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def hear(self, metrics: Mapping[str, float]) -> None:
        """Pass on what a gradient step was told with, while its job is under way."""
        trainer = self.trainer
        self._told |= metrics
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        trainer.progress_bar_metrics.update({name: metrics[name] for name in _SHOWN if name in metrics})
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step + 1)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, RewardProgressBar):
                callback.show(metrics)

    # -- Lightning's hooks --------------------------------------------------------------------------------------

    @override
    def training_step(self, call: Any, batch_idx: int = 0) -> Tensor:
        """Nothing: the strategy submits the call at the optimizer's step."""
        return torch.zeros(())

    @override
    def on_train_epoch_start(self) -> None:
        """Forget the last call."""
        self.call_metrics, self._told = {}, {}

    @override
    def on_train_epoch_end(self) -> None:
        """Give callbacks, progress bar and loggers the call's metrics; loggers, what they were not told yet."""
        trainer, metrics = self.trainer, self.call_metrics
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        trainer.progress_bar_metrics.update({name: metrics[name] for name in _SHOWN if name in metrics})
        # repr: a NaN that was told is told
        news = {name: value for name, value in metrics.items() if repr(self._told.get(name)) != repr(value)}
        for logger in trainer.loggers:
            logger.log_metrics(news, step=trainer.global_step)
        self.model.told.note(trainer.loggers, metrics, trainer.global_step)

    @override
    def configure_optimizers(self) -> Any:
        """AdamW, as the service has it, and the schedule as a factor on its learning rate."""
        optimizer = torch.optim.AdamW([self.placeholder], lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_schedule or _constant)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _constant(step: int) -> float:
    return 1.0
