"""How the contracts open strategies that train here; a strategy's file says its name, and on how many ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy

import fitrl
from fitrl.testing import (
    ExportsWeightsContract,
    LightningContract,
    LightningFitRLContract,
    ScoresContract,
    Setup,
    SupportsFitRLContract,
    TrainsContract,
)


def new_trainer(strategy: str | Strategy, setup: Setup, **options: Any) -> fitrl.LocalTrainer:
    return fitrl.LocalTrainer(
        strategy=strategy,
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        lr_schedule=setup.lr_schedule,
        gradient_clip_val=setup.gradient_clip_val,
        precision=setup.precision,
        enable_model_summary=False,
        **options,
    )


class Verbs(TrainsContract, ScoresContract, ExportsWeightsContract):
    name: str

    def strategy(self) -> str | Strategy:
        return self.name

    @contextmanager
    def open_subject(self, setup: Setup) -> Iterator[fitrl.PolicyTrainer]:
        with new_trainer(self.strategy(), setup) as trainer:
            trainer.open(fitrl.TrainableModel("verbs", "contract", "tiny", lora=None, root=setup.folder))
            trainer.verbs.set_learning_rate(setup.learning_rate)
            yield trainer.verbs


class FitRL(SupportsFitRLContract):
    backend = "local"
    name: str

    def open_subject(self, setup: Setup) -> AbstractContextManager[fitrl.LocalTrainer]:
        return new_trainer(self.name, setup)


class UnderLightning(LightningContract, LightningFitRLContract):
    name: str

    def strategy(self, folder: Path) -> str:
        return self.name

    def open_trainer(
        self, setup: Setup, *callbacks: Callback, **options: Any
    ) -> AbstractContextManager[fitrl.LocalTrainer]:
        return new_trainer(self.name, setup, callbacks=list(callbacks), **options)
