"""`fitrl_deepspeed`, on two gloo ranks, keeps every contract, in every stage of ZeRO.

Each stage and each kind of contract once; with FITRL_DEEPSPEED_ALL=1 each stage every contract.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

import fitrl
from fitrl.testing import (
    ExportsWeightsContract,
    LightningContract,
    LightningFitRLContract,
    ScoresContract,
    Setup,
    SupportsFitRLContract,
    TrainsContract,
    is_rank,
    run_on_ranks,
)
from fitrl_deepspeed import DeepSpeedRLStrategy, DeepSpeedTrainer

STAGES = (1, 2, 3)
EVERYTHING = os.environ.get("FITRL_DEEPSPEED_ALL") == "1"
ACCELERATOR = os.environ.get("FITRL_TEST_ACCELERATOR", "cpu")
CHOSEN = ("TestFitRL1", "TestUnderLightning2", "TestVerbs3")


def settings(stage: int) -> dict[str, Any]:
    """Of so small a policy stage 3 would leave most weights whole."""
    return {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}


def new_trainer(stage: int, setup: Setup, **options: Any) -> DeepSpeedTrainer:
    return DeepSpeedTrainer(
        zero_stage=stage,
        settings=settings(stage),
        accelerator=ACCELERATOR,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        lr_schedule=setup.lr_schedule,
        gradient_clip_val=setup.gradient_clip_val,
        precision=setup.precision,
        enable_model_summary=False,
        **options,
    )


class Verbs(TrainsContract, ScoresContract, ExportsWeightsContract):
    precisions = ("32-true", "bf16-mixed")
    stage: int

    @contextmanager
    def open_subject(self, setup: Setup) -> Iterator[fitrl.PolicyTrainer]:
        with new_trainer(self.stage, setup) as trainer:
            trainer.open(fitrl.TrainableModel("verbs", "contract", "tiny", lora=None, root=setup.folder))
            trainer.verbs.set_learning_rate(setup.learning_rate)
            yield trainer.verbs


class FitRL(SupportsFitRLContract):
    backend = "deepspeed"
    stage: int

    def open_subject(self, setup: Setup) -> AbstractContextManager[DeepSpeedTrainer]:
        return new_trainer(self.stage, setup)


class UnderLightning(LightningContract, LightningFitRLContract):
    accelerator = ACCELERATOR
    stage: int

    def strategy(self, folder: Path) -> DeepSpeedRLStrategy:
        return DeepSpeedRLStrategy(zero_stage=self.stage, settings=settings(self.stage))

    def open_trainer(
        self, setup: Setup, *callbacks: Callback, **options: Any
    ) -> AbstractContextManager[DeepSpeedTrainer]:
        return new_trainer(self.stage, setup, callbacks=list(callbacks), **options)


def classes() -> Iterator[tuple[str, type]]:
    """One class for each contract and stage, which pytest collects on the ranks."""
    for contract in (Verbs, FitRL, UnderLightning):
        for stage in STAGES:
            name = f"Test{contract.__name__}{stage}"
            collected = is_rank() and (EVERYTHING or name in CHOSEN)
            yield name, type(name, (contract,), {"__test__": collected, "__module__": __name__, "stage": stage})


globals().update(classes())


@pytest.mark.slow
@pytest.mark.skipif(is_rank(), reason="it starts the ranks")
def test_two_ranks_keep_every_contract() -> None:
    assert " passed" in run_on_ranks(__file__, timeout=1800.0 if EVERYTHING else 600.0)
