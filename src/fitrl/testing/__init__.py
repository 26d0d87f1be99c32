"""Contracts as pytest classes: what a backend promises, for whoever writes one. See `fitrl.testing.opening`."""

import fitrl.testing.asserting  # noqa: F401 - before the others
from fitrl.testing.exports_weights import ExportsWeightsContract
from fitrl.testing.lightning_fit_rl import LightningFitRLContract
from fitrl.testing.lightning_stock import LightningContract
from fitrl.testing.on_ranks import is_rank, run_on_ranks
from fitrl.testing.opening import Contract, Setup
from fitrl.testing.scores import ScoresContract
from fitrl.testing.supports_fit_rl import SupportsFitRLContract
from fitrl.testing.trains import TrainsContract

__all__ = [
    "Contract",
    "ExportsWeightsContract",
    "LightningContract",
    "LightningFitRLContract",
    "ScoresContract",
    "Setup",
    "SupportsFitRLContract",
    "TrainsContract",
    "is_rank",
    "run_on_ranks",
]
