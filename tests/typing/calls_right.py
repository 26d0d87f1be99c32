"""Calls that mypy and pyright accept, with the types they give; `tests/test_types.py` runs the checkers on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, assert_type

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from openai.types.chat.chat_completion import Choice
from torch import Tensor

import fitrl
from fitrl.data.batch import Batch
from fitrl.objective.objective import ImportanceSamplingLevel
from fitrl.protocols.results import (
    ForwardBackwardResult,
    OptimStepResult,
    TokenLogprobs,
    TrainerConfig,
    TrainerStatus,
)
from fitrl.strategies.local import LocalStrategy

# -- construction
model = fitrl.TrainableModel(name="a", project="b", base_model="tiny", lora=fitrl.LoraSettings(rank=4))
fitrl.TrainableModel("a", "b", "tiny", lora=None, root=Path("x"), loggers=[CSVLogger("logs")])
trainer = fitrl.LocalTrainer(devices=1, precision="bf16-mixed", lr_schedule=lambda step: 1.0)
fitrl.LocalTrainer(strategy=LocalStrategy(), optimizer=fitrl.AdamWSettings(betas=(0.9, 0.95)), compile=True)
fitrl.LocalTrainer(callbacks=[ModelCheckpoint()], gradient_clip_val=1.0, logger=CSVLogger("logs"))
groups: list[fitrl.TrajectoryGroup] = []

# -- fit_rl and its result
result = trainer.fit_rl(model, groups, learning_rate=1e-5, importance_sampling_level="sequence")
assert_type(result, fitrl.LocalTrainResult)
assert_type(result.checkpoint_path, Path | None)
assert_type(result.step, int)
assert_type(result.num_optimizer_steps, int)
assert_type(result.metrics, dict[str, float])
assert_type(result.dropped, dict[str, int])
plain: fitrl.TrainResult = result
trainer.fit_rl(model=model, groups=tuple(groups), ppo=True, epsilon=0.2, epsilon_high=None, dual_clip=3)
trainer.fit_rl(model, (group for group in groups), kl_coef=0.1, reference="base", kl_in="advantage")
trainer.fit_rl(model, groups, reference=12, kl_coef=0.1, kl_estimator="k3")
trainer.fit_rl(model, groups, reference=result.checkpoint_path, kl_coef=0.1)
trainer.fit_rl(model, groups, loss_aggregation="seq_mean_token_sum_norm", norm_length=256, save_checkpoint=False)
assert_type(model.log(groups, metrics=result.metrics, step=result.step), dict[str, float])
model.log(groups, split="val")

# -- rollouts beside it
with fitrl.RolloutPipeline(trainer.sampler(model, own_weights=True), ["1+1="], reward=lambda task, t: 1.0) as pipeline:
    assert_type(next(pipeline), list[fitrl.TrajectoryGroup])
    for batch in pipeline:
        assert_type(batch, list[fitrl.TrajectoryGroup])
    assert_type(pipeline.metrics(), dict[str, float])
    assert_type(pipeline.dropped, dict[str, int])


async def beside_rollouts(pipeline: fitrl.RolloutPipeline) -> None:
    async for groups in pipeline:
        assert_type(await trainer.fit_rl_async(model, groups), fitrl.LocalTrainResult)


# -- a Lightning trainer all the same
lightning_trainer: Trainer = trainer
with fitrl.LocalTrainer() as entered:
    assert_type(entered, fitrl.LocalTrainer)
    assert_type(entered.global_step, int)

# -- protocols
backend: fitrl.SupportsFitRL = trainer
common: fitrl.TrainResult = backend.fit_rl(model, groups, learning_rate=1e-5, ppo=True)
verbs: fitrl.PolicyTrainer = LocalStrategy()
opened = trainer.open(model)
assert_type(opened, fitrl.PolicyTrainer)
trains: fitrl.Trains = opened
scores: fitrl.Scores = opened
exports: fitrl.ExportsWeights = opened
sampler = trainer.sampler(model)
assert_type(sampler, fitrl.Sampler)


def verbs_by_hand(batch: Batch) -> None:
    loss = opened.forward_backward(batch)
    assert_type(loss.loss, float)
    opened.forward_backward(batch, fitrl.Objective(ppo=True))
    assert_type(opened.optim_step(learning_rate=1e-4).grad_norm, float)
    assert_type(opened.save(name="best", weights_only=True), str)
    assert_type(opened.load(), str)
    assert_type(opened.forward(batch).logprobs, Tensor)
    assert_type(opened.get_status().step, int)
    assert_type(opened.get_config().lora_rank, int | None)
    names = [name for name, tensor in opened.named_weights() if tensor.ndim == 2]
    assert_type(names, list[str])


async def an_episode() -> None:
    gathered = await fitrl.gather([fitrl.TrajectoryGroup([attempt() for _ in range(8)])], max_exceptions=0.1)
    assert_type(gathered, list[fitrl.TrajectoryGroup])
    sampled = await sampler.sample([1, 2, 3], n=4, temperature=0.7, stop=["\n"])
    assert_type(sampled, list[fitrl.Completion])


async def attempt() -> fitrl.Trajectory:
    return fitrl.Trajectory(messages_and_choices=[{"role": "user", "content": "3+4="}], reward=1.0)


def reward(task: str, trajectory: fitrl.Trajectory) -> float:
    return float(task == "3+4=")


assert_type(fitrl.rollout(sampler, ["3+4="], reward=reward, group_size=4), list[fitrl.TrajectoryGroup])


# -- third parties: no base class


class ThirdParty:
    """Satisfies `SupportsFitRL`, with an argument of its own and a result of its own."""

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
    ) -> fitrl.LocalTrainResult:
        return fitrl.LocalTrainResult(step=1, metrics={}, num_optimizer_steps=1)


class OwnVerbs:
    """Satisfies `PolicyTrainer`."""

    def forward_backward(
        self, batch: Batch, objective: fitrl.Objective | fitrl.CustomObjective | None = None
    ) -> ForwardBackwardResult:
        return ForwardBackwardResult(0.0, {})

    def optim_step(self, *, learning_rate: float | None = None) -> OptimStepResult:
        return OptimStepResult(step=1, learning_rate=0.1, grad_norm=1.0, accumulated_microbatches=1)

    def clear_gradients(self) -> None: ...

    def save(self, name: str | None = None, path: str | None = None, weights_only: bool = False) -> str:
        return ""

    def load(self, path: str | None = None) -> str:
        return ""

    def get_config(self) -> TrainerConfig:
        raise NotImplementedError

    def get_status(self) -> TrainerStatus:
        return TrainerStatus(step=1, accumulated_microbatches=0, learning_rate=0.1)

    def forward(self, batch: Batch) -> TokenLogprobs:
        raise NotImplementedError

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ()


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
        assert_type(inputs.logprobs, Tensor)  # asked for, so it is there
        assert_type(inputs.hidden, Tensor)
        return fitrl.PolicyLoss(loss=inputs.logprobs.sum() / inputs.num_tokens)


class Fixed:
    """Asks for one thing only."""

    inputs: Literal["logits"] = "logits"

    def __call__(self, inputs: fitrl.LossInputs) -> fitrl.PolicyLoss:
        return fitrl.PolicyLoss(loss=inputs.logits.sum())


def rollouts_of_your_own(choice: Choice, answer: fitrl.Completion, error: ValueError) -> None:
    messages = [{"role": "user", "content": "3+4="}]
    fitrl.Trajectory(messages_and_choices=[*messages, choice], temperature=1.0, reward=np.float32(1))
    fitrl.Trajectory(messages_and_choices=messages, additional_histories=[fitrl.History(messages_and_choices=[answer])])
    conversation: list[fitrl.Message | fitrl.Completion] = [*messages, answer]
    attempt = fitrl.Trajectory(messages_and_choices=conversation, exceptions=[error])
    attempt.messages_and_choices.append(choice)
    assert_type(attempt.reward, float)
    fitrl.TrajectoryGroup([attempt], exceptions=[error])


class MyTrainer(fitrl.RLTrainer):
    """A backend of one's own: its arguments stay typed behind the wrapper that names it."""

    backend = "mine"

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
    ) -> fitrl.LocalTrainResult:
        return fitrl.LocalTrainResult(step=1, metrics={}, num_optimizer_steps=1)


third: fitrl.SupportsFitRL = ThirdParty()
assert_type(ThirdParty().fit_rl(model, groups, own_argument=4).checkpoint_path, Path | None)
mine = MyTrainer(strategy="fitrl_local", devices=1)
assert_type(mine.fit_rl(model, groups, own_argument=4), fitrl.LocalTrainResult)
backends: list[fitrl.SupportsFitRL] = [trainer, third, mine]
own_verbs: fitrl.PolicyTrainer = OwnVerbs()
objective: fitrl.CustomObjective = MyObjective()
trainer.fit_rl(model, groups, objective=MyObjective())
trainer.fit_rl(model, groups, objective=Fixed())
fitrl.LocalTrainer(sampler=MySampler())
