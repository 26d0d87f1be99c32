"""A strategy whose policy lives on a service keeps the contracts of what it can do: `Trains`, and Lightning's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from in_memory import InMemoryService, InMemoryStrategy

from fitrl import _compat
from fitrl.testing import LightningContract, Setup, TrainsContract


class TestUnderLightning(LightningContract):
    validates = False

    def strategy(self, folder: Path) -> InMemoryStrategy:
        return InMemoryStrategy(InMemoryService.at(folder))


class TestVerbs(TrainsContract):
    loss_known_at_once = False
    restores_random_state = False

    @contextmanager
    def open_subject(self, setup: Setup) -> Iterator[InMemoryStrategy]:
        lightning = TestUnderLightning()
        trainer = lightning.trainer(setup)
        strategy = trainer.strategy
        strategy.keep_alive = True
        _compat.attach(trainer, lightning.module(setup))
        yield strategy
        strategy.close()
