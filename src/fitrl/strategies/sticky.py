"""Sticky strategies: set up once per model, however often `fit` is called.

A mixin in front of a Lightning strategy. While `keep_alive` is on, `setup_environment`, `connect` and `setup` do their
work once per model and `teardown` does nothing, so optimizer moments, schedules, wrappers and the process group
survive from one `fit` to the next. Off by default: under a stock `lightning.Trainer` nothing changes.
"""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override


class Sticky(Strategy):
    """Put in front of a Lightning strategy: `class MyStrategy(Sticky, DDPStrategy)`."""

    keep_alive: bool = False
    _live: lightning.LightningModule | None = None
    _environment_is_set_up: bool = False

    @property
    def is_live(self) -> bool:
        """Whether a module is set up and kept."""
        return self._live is not None

    @override
    def setup_environment(self) -> None:
        if self.keep_alive and self._environment_is_set_up:
            return
        super().setup_environment()
        self._environment_is_set_up = True

    @override
    def connect(self, model: lightning.LightningModule) -> None:
        if model is not self._live:
            self._live = None
            super().connect(model)

    @override
    def setup(self, trainer: lightning.Trainer) -> None:
        if self._live is not None and self._live is self.lightning_module:
            if trainer.state.fn == TrainerFn.FITTING and not self.optimizers:
                self.setup_optimizers(trainer)
            return
        super().setup(trainer)
        if self.keep_alive:
            self._live = self.lightning_module

    @override
    def teardown(self) -> None:
        if not self.keep_alive:
            self._live = None
            self._environment_is_set_up = False
            super().teardown()

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Clear gradients and keep the session; after Ctrl-C or a failed collective let the teardown happen."""
        super().on_exception(exception)
        if not self.keep_alive:
            return
        if isinstance(exception, KeyboardInterrupt | torch.distributed.DistError):
            self.keep_alive = False
            return
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Tear down for real; the process group stays until the process ends, because ranks can make it once only."""
        self.keep_alive = False
        if self._live is not None or self._environment_is_set_up:
            self.teardown()
