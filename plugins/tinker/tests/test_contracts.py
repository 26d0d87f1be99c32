"""The backend keeps the contracts: `Trains`, `Scores`, `SupportsFitRL`, and Lightning's, stock and with `fit_rl`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from stand_in import StandIn

from fitrl import LoraSettings
from fitrl.testing import (
    LightningContract,
    LightningFitRLContract,
    ScoresContract,
    Setup,
    SupportsFitRLContract,
    TrainsContract,
)
from fitrl_tinker import TinkerStrategy, TinkerTrainer


@pytest.fixture(autouse=True)
def installed(tmp_path) -> Iterator[None]:
    with StandIn.at(tmp_path).installed():
        yield


@contextmanager
def open_trainer(setup: Setup, *callbacks: Any, **options: Any) -> Iterator[TinkerTrainer]:
    with TinkerTrainer(
        lr_schedule=setup.lr_schedule,
        gradient_clip_val=setup.gradient_clip_val,
        callbacks=list(callbacks),
        enable_model_summary=False,
        **options,
    ) as trainer:
        yield trainer


class TestFitRL(SupportsFitRLContract, LightningFitRLContract):
    backend = "tinker"
    lora = LoraSettings(rank=4)
    restores_random_state = False
    microbatches = {}  # the service cuts a step as it likes

    def open_subject(self, setup: Setup) -> Any:
        return open_trainer(setup)

    def open_trainer(self, setup: Setup, *callbacks: Any, **options: Any) -> Any:
        return open_trainer(setup, *callbacks, **options)


class TestVerbs(TrainsContract, ScoresContract):
    lora = LoraSettings(rank=4)
    loss_known_at_once = False
    restores_random_state = False
    precisions = ("32-true",)
    temperatures = (1.0,)

    @contextmanager
    def open_subject(self, setup: Setup) -> Iterator[TinkerStrategy]:
        with open_trainer(setup) as trainer:
            verbs: Any = trainer.open(self.model(setup))
            verbs.set_learning_rate(setup.learning_rate)
            yield verbs


class TestUnderLightning(LightningContract):
    lora = LoraSettings(rank=4)

    def strategy(self, folder: Path) -> str:
        return "fitrl_tinker"
