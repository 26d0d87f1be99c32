"""Calls that mypy and pyright accept; `tests/test_types.py` runs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

import fitrl
from fitrl.objective.objective import ImportanceSamplingLevel
from fitrl.strategies.local import LocalStrategy

model = fitrl.TrainableModel(name="a", project="b", base_model="tiny", lora=fitrl.LoraSettings(rank=4))
groups: list[fitrl.TrajectoryGroup] = []
trainer = fitrl.LocalTrainer(devices=1, precision="bf16-mixed", lr_schedule=lambda step: 1.0)
result = trainer.fit_rl(model, groups, learning_rate=1e-5, importance_sampling_level="sequence")
path: Path | None = result.checkpoint_path
step: int = result.step
trainer.fit_rl(model, (group for group in groups), kl_coef=0.1, reference="base", kl_in="advantage")
trainer.fit_rl(model, groups, reference=12, kl_coef=0.1)

backend: fitrl.SupportsFitRL = trainer
common: fitrl.TrainResult = backend.fit_rl(model, groups, learning_rate=1e-5, ppo=True)
verbs: fitrl.PolicyTrainer = LocalStrategy()
opened: fitrl.Trains = trainer.open(model)
sampler: fitrl.Sampler = trainer.sampler(model)


class ThirdParty:
    """Satisfies `SupportsFitRL` without a base class."""

    def fit_rl(
        self,
        model: fitrl.TrainableModel,
        groups: Iterable[fitrl.TrajectoryGroup],
        *,
        learning_rate: float = 1e-5,
        ppo: bool = False,
        epsilon: float | None = None,
        epsilon_high: float | None = None,
        advantage_balance: float = 0.0,
        scale_rewards: bool = True,
        importance_sampling_level: ImportanceSamplingLevel = "token",
        own_argument: int = 3,
    ) -> fitrl.TrainResult:
        return fitrl.TrainResult(step=1, metrics={}, num_optimizer_steps=1)


class MySampler:
    """Satisfies `Sampler`."""

    version = 0

    async def sample(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[fitrl.Completion]:
        return []

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version


class MyObjective:
    """Satisfies `CustomObjective`."""

    inputs: Literal["logprobs", "logits", "hidden"] = "logprobs"

    def __call__(self, inputs: fitrl.LossInputs, /) -> fitrl.PolicyLoss:
        assert inputs.logprobs is not None
        return fitrl.PolicyLoss(loss=inputs.logprobs.sum() / inputs.num_tokens)


third: fitrl.SupportsFitRL = ThirdParty()
trainer.fit_rl(model, groups, objective=MyObjective())
fitrl.LocalTrainer(sampler=MySampler())
