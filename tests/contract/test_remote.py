"""A strategy whose policy lives on a service keeps the contracts of what it can do: `Trains`, and Lightning's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning
from in_memory import InMemoryService, InMemoryStrategy

import fitrl
from fitrl import _compat
from fitrl.testing import Setup, TrainsContract


class TestVerbs(TrainsContract):
    loss_known_at_once = False
    restores_random_state = False

    @contextmanager
    def open_subject(self, setup: Setup) -> Iterator[InMemoryStrategy]:
        strategy = InMemoryStrategy(InMemoryService.at(setup.folder))
        trainer = lightning.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=setup.gradient_clip_val,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        strategy.keep_alive = True
        model = fitrl.TrainableModel("remote", "contract", "tiny", lora=None, root=setup.folder)
        _compat.attach(
            trainer, fitrl.PolicyModule(model, learning_rate=setup.learning_rate, lr_schedule=setup.lr_schedule)
        )
        yield strategy
        strategy.close()
