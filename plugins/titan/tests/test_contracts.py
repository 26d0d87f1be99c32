"""`fitrl_titan`, on gloo ranks, keeps every contract: alone, by data, matrices or rows, or with whole weights.

Each way and each kind of contract once; with FITRL_TITAN_ALL=1 each way every contract.
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
from fitrl_titan import TitanStrategy, TitanTrainer

WAYS: dict[str, dict[str, Any]] = {
    "Data": {},
    "Tensor": {"tensor_parallel_size": 2},
    "Context": {"context_parallel_size": 2},
    "Whole": {"reshard_after_forward": False, "sync_every_microbatch": False},
}
EVERYTHING = os.environ.get("FITRL_TITAN_ALL") == "1"
ACCELERATOR = os.environ.get("FITRL_TEST_ACCELERATOR", "cpu")
CHOSEN = ("TestFitRLContext", "TestUnderLightningData", "TestVerbsTensor", "TestVerbsWhole")


def new_trainer(way: str, setup: Setup, **options: Any) -> TitanTrainer:
    return TitanTrainer(
        **WAYS[way],
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
    way: str

    @contextmanager
    def open_subject(self, setup: Setup) -> Iterator[fitrl.PolicyTrainer]:
        with new_trainer(self.way, setup) as trainer:
            trainer.open(fitrl.TrainableModel("verbs", "contract", "tiny", lora=None, root=setup.folder))
            trainer.verbs.set_learning_rate(setup.learning_rate)
            yield trainer.verbs


class FitRL(SupportsFitRLContract):
    backend = "titan"
    way: str

    def open_subject(self, setup: Setup) -> AbstractContextManager[TitanTrainer]:
        return new_trainer(self.way, setup)


class UnderLightning(LightningContract, LightningFitRLContract):
    accelerator = ACCELERATOR
    way: str

    def strategy(self, folder: Path) -> TitanStrategy:
        return TitanStrategy(**WAYS[self.way])

    def open_trainer(self, setup: Setup, *callbacks: Callback, **options: Any) -> AbstractContextManager[TitanTrainer]:
        return new_trainer(self.way, setup, callbacks=list(callbacks), **options)


def classes() -> Iterator[tuple[str, type]]:
    """One class for each contract and way, which pytest collects on the ranks."""
    for contract in (Verbs, FitRL, UnderLightning):
        for way in WAYS:
            name = f"Test{contract.__name__}{way}"
            alone = os.environ.get("WORLD_SIZE") == "1"  # asked for by name, below
            collected = is_rank() and (EVERYTHING or alone or name in CHOSEN)
            yield name, type(name, (contract,), {"__test__": collected, "__module__": __name__, "way": way})


globals().update(classes())


@pytest.mark.slow
@pytest.mark.skipif(is_rank(), reason="it starts the ranks")
def test_two_ranks_keep_every_contract() -> None:
    assert " passed" in run_on_ranks(__file__, timeout=1800.0 if EVERYTHING else 600.0)


@pytest.mark.slow
@pytest.mark.skipif(is_rank(), reason="it starts the rank")
def test_one_rank_keeps_the_verbs() -> None:
    assert " passed" in run_on_ranks(f"{__file__}::TestVerbsData", ranks=1)
