"""Calls that mypy and pyright must refuse, one on each line marked so; `tests/test_types.py` runs them."""

from __future__ import annotations

import fitrl

model = fitrl.TrainableModel(name="a", project="b", base_model="tiny")
groups: list[fitrl.TrajectoryGroup] = []
trainer = fitrl.LocalTrainer(devices=1)
trainer.fit_rl(model, groups, learningrate=1e-5)  # error
trainer.fit_rl(model, groups, deploy_checkpoint=True)  # error
trainer.fit_rl(model, groups, importance_sampling_level="word")  # error
trainer.fit_rl(model, groups, learning_rate="fast")  # error
trainer.fit_rl(model, groups, 1e-5)  # error
trainer.fit_rl(model, groups[0].trajectories)  # error
name = trainer.fit_rl(model, groups).artifact_name  # error
result = trainer.fit_rl(model, groups)
result.step = 3  # error
path: str = result.checkpoint_path  # error
fitrl.Objective(True)  # error
fitrl.Objective(loss_aggregation="mean")  # error


def use(backend: fitrl.SupportsFitRL) -> None:
    backend.fit_rl(model, groups, kl_coef=0.1)  # error


class NotQuite:
    """Takes no learning rate."""

    def fit_rl(self, model: fitrl.TrainableModel, groups: list[fitrl.TrajectoryGroup]) -> fitrl.TrainResult:
        raise NotImplementedError


other: fitrl.SupportsFitRL = NotQuite()  # error
