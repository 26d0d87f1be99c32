"""Calls that mypy and pyright must refuse, one on each line marked so; `tests/test_types.py` runs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import fitrl
from fitrl.data.batch import Batch
from fitrl.objective.objective import ImportanceSamplingLevel
from fitrl.strategies.local import LocalStrategy

model = fitrl.TrainableModel(name="a", project="b", base_model="tiny")
groups: list[fitrl.TrajectoryGroup] = []
trainer = fitrl.LocalTrainer(devices=1)

# -- construction
fitrl.TrainableModel("a", "b")  # error
fitrl.TrainableModel("a", "b", "tiny", lora=8)  # error
fitrl.TrainableModel("a", "b", "tiny", learning_rate=1e-5)  # error
fitrl.TrainableModel("a", "b", "tiny", None)  # error
fitrl.LoraSettings(8)  # error
fitrl.LoraSettings(r=8)  # error
fitrl.LocalTrainer("fitrl_local")  # error
fitrl.LocalTrainer(optimizer="adam")  # error
fitrl.LocalTrainer(lr_schedule=0.5)  # error
fitrl.Objective(True)  # error
fitrl.Objective(loss_aggregation="mean")  # error

# -- keywords that fit_rl does not take: misspelt, of other backends, of the constructor, of a configuration
trainer.fit_rl(model, groups, learningrate=1e-5)  # error
trainer.fit_rl(model, groups, deploy_checkpoint=True)  # error
trainer.fit_rl(model, groups, train_mlp=True)  # error
trainer.fit_rl(model, groups, optimizer=fitrl.AdamWSettings())  # error
trainer.fit_rl(model, groups, config={"learning_rate": 1e-5})  # error

# -- values of the wrong type
trainer.fit_rl(model, groups, importance_sampling_level="word")  # error
trainer.fit_rl(model, groups, loss_aggregation="mean")  # error
trainer.fit_rl(model, groups, kl_in="reward")  # error
trainer.fit_rl(model, groups, kl_estimator="k4")  # error
trainer.fit_rl(model, groups, reference=1.5)  # error
trainer.fit_rl(model, groups, learning_rate="fast")  # error
trainer.fit_rl(model, groups, learning_rate=None)  # error
trainer.fit_rl(model, groups, num_minibatches=2.0)  # error
trainer.fit_rl(model, groups, ppo="yes")  # error
trainer.fit_rl(model, groups, objective=fitrl.Objective(ppo=True))  # error
trainer.fit_rl(model, groups, 1e-5)  # error
trainer.fit_rl(model)  # error
trainer.fit_rl("tiny", groups)  # error
trainer.fit_rl(model, groups[0].trajectories)  # error
trainer.open("tiny")  # error

# -- results
result = trainer.fit_rl(model, groups)
name = result.artifact_name  # error
deployed = result.deployed  # error
result.step = 3  # error
path: str = result.checkpoint_path  # error
parent = result.checkpoint_path.parent  # error
model.log(groups, "val")  # error
model.log(groups, metrics={"a": "b"})  # error
fitrl.TrainResult(1, {}, 1)  # error

# -- verbs
trainer.open(model).optim_step(1e-4)  # error
trainer.open(model).forward_backward(groups)  # error
trainer.open(model).fit_rl(model, groups)  # error


def use(backend: fitrl.SupportsFitRL) -> None:
    backend.fit_rl(model, groups, kl_coef=0.1)  # error
    print(backend.fit_rl(model, groups, learning_rate=1e-5).checkpoint_path)  # error


# -- classes that miss a protocol


class NoLearningRate:
    """Takes none of the common arguments."""

    def fit_rl(self, model: fitrl.TrainableModel, groups: list[fitrl.TrajectoryGroup]) -> fitrl.TrainResult:
        raise NotImplementedError


class NoResult(fitrl.LocalTrainer):
    """Returns something else."""

    def fit_rl(self, model: fitrl.TrainableModel, groups: Iterable[fitrl.TrajectoryGroup]) -> None:  # error
        raise NotImplementedError


class MyTrainer(fitrl.RLTrainer):
    """A sound backend of one's own, called wrongly below."""

    def fit_rl(
        self,
        model: fitrl.TrainableModel,
        groups: Iterable[fitrl.TrajectoryGroup],
        *,
        learning_rate: float = 5e-6,
        ppo: bool = False,
        epsilon: float | None = None,
        epsilon_high: float | None = None,
        advantage_balance: float = 0.0,
        scale_rewards: bool = True,
        importance_sampling_level: ImportanceSamplingLevel = "token",
        own_argument: int = 3,
    ) -> fitrl.TrainResult:
        raise NotImplementedError


class OnlyTrains:
    """Lacks the other verbs."""

    def forward_backward(self, batch: Batch) -> None:
        raise NotImplementedError


class NoUpdate:
    """A sampler that cannot be handed new weights."""

    version = 0

    async def sample(self, prompt_ids: Sequence[int]) -> list[fitrl.Completion]:
        raise NotImplementedError


class WrongInputs:
    """An objective over something that there is not."""

    inputs = "probabilities"

    def __call__(self, inputs: fitrl.LossInputs, /) -> fitrl.PolicyLoss:
        raise NotImplementedError


class WrongLoss:
    """An objective that returns a number."""

    inputs = "logprobs"

    def __call__(self, inputs: fitrl.LossInputs, /) -> float:
        raise NotImplementedError


MyTrainer(strategy="fitrl_local").fit_rl(model, groups, kl_coef=0.1)  # error
MyTrainer(strategy="fitrl_local").fit_rl(model, groups, own_argument="x")  # error
a: fitrl.SupportsFitRL = NoLearningRate()  # error
b: fitrl.SupportsFitRL = LocalStrategy()  # error
c: fitrl.PolicyTrainer = trainer  # error
d: fitrl.PolicyTrainer = OnlyTrains()  # error
e: fitrl.Trains = OnlyTrains()  # error
f: fitrl.Sampler = NoUpdate()  # error
fitrl.LocalTrainer(sampler=NoUpdate())  # error
trainer.fit_rl(model, groups, objective=WrongInputs())  # error
trainer.fit_rl(model, groups, objective=WrongLoss())  # error
