"""`fitrl_fsdp2`, on two gloo ranks, keeps every contract."""

from __future__ import annotations

import pytest

from contract import local
from fitrl.strategies.fsdp2 import FSDP2Strategy
from fitrl.testing import is_rank, run_on_ranks


class TestVerbs(local.Verbs):
    __test__ = is_rank()
    name = "fitrl_fsdp2"


class TestVerbsWhole(local.Verbs):
    """With weights that stay whole within a step, of which a later pass may read none."""

    __test__ = is_rank()
    precisions = ("32-true", "bf16-mixed")  # Lightning takes float64 with a strategy's name only

    def strategy(self) -> FSDP2Strategy:
        return FSDP2Strategy(reshard_after_forward=False, sync_every_microbatch=False)


class TestFitRL(local.FitRL):
    __test__ = is_rank()
    name = "fitrl_fsdp2"


class TestUnderLightning(local.UnderLightning):
    __test__ = is_rank()
    name = "fitrl_fsdp2"


@pytest.mark.slow
@pytest.mark.skipif(is_rank(), reason="it starts the ranks")
def test_two_ranks_keep_every_contract() -> None:
    assert " passed" in run_on_ranks(__file__)
