"""Against a real server: `make test-tinker`. It averages over tokens, so what is checked is everything but numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from skyrl_server import PYTHON, SkyRLServer

import fitrl
from fitrl import LoraSettings, TrainableModel
from fitrl.testing import Setup, SupportsFitRLContract
from fitrl_tinker import ServiceError, TinkerTrainer

pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="needs the server's environment: run `make test-tinker`"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the service tells no loss"),
]
TASKS = [{"messages": [{"role": "user", "content": f"{a}+{b}="}]} for a, b in ((1, 2), (3, 4), (2, 2), (0, 5))]
PATIENT_S, SHORT_S = 240.0, 20.0


@pytest.fixture
def nothing_left_behind() -> None:
    """Off: the server is a process of the whole module, and the SDK keeps a thread of its own."""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[SkyRLServer]:
    server = SkyRLServer(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


def reward(task: Any, trajectory: fitrl.Trajectory) -> float:
    """The first character's worth as a digit: rises by little steps, so that groups are seldom flat."""
    first = trajectory.completions()[-1].text[:1]
    return int(first) / 9 if first in "0123456789" and first else 0.0


def open_trainer(server: SkyRLServer, timeout: float = PATIENT_S, **options: Any) -> TinkerTrainer:
    return TinkerTrainer(base_url=server.url, timeout=timeout, enable_model_summary=False, **options)


def make_model(server: SkyRLServer, root: Path, name: str) -> TrainableModel:
    return TrainableModel(name, "real", str(server.base_model), lora=LoraSettings(rank=8), root=root)


def attempt(trainer: TinkerTrainer, model: TrainableModel, seed: int) -> list[fitrl.TrajectoryGroup]:
    sampler = trainer.sampler(model)
    return fitrl.rollout(sampler, TASKS, group_size=4, reward=reward, max_new_tokens=4, seed=seed)


def test_twenty_steps_then_a_crash_then_on(server, tmp_path) -> None:
    model = make_model(server, tmp_path, "learner")
    rewards = []
    with open_trainer(server) as trainer:
        for seed in range(20):
            groups = attempt(trainer, model, seed)
            result = trainer.fit_rl(model, groups, learning_rate=1e-3, deploy_checkpoint=True)
            assert result.num_optimizer_steps == 1 and result.deployed and result.checkpoint_path is not None
            assert abs(result.metrics["mismatch/kl"]) < 1e-4  # sampled with the weights that are trained
            rewards.append(model.log(groups, metrics=result.metrics, step=result.step)["reward/mean"])
        print("rewards", [round(value, 3) for value in rewards])
        assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.15, rewards
        step = trainer.global_step
        assert step == 20
        states = trainer.states(model)
        assert [state.step for state in states if state.kind == "training"] == sorted(
            {state.step for state in states if state.kind == "training"}
        )
        assert {state.uri for state in states} >= {result.checkpoint_path}

        # the server dies in the middle of a step
        trainer.tinker_strategy.service.timeout = SHORT_S
        groups = attempt(trainer, model, 100)
        strategy = trainer.tinker_strategy
        submit = strategy.submit

        def crash(*arguments: Any) -> Any:
            answer = submit(*arguments)
            server.kill()
            return answer

        strategy.submit = crash  # type: ignore[method-assign]
        with pytest.raises(ServiceError):
            trainer.fit_rl(model, groups, learning_rate=4e-3, save_checkpoint=False)
        strategy.submit = submit  # type: ignore[method-assign]
        assert (trainer.global_step, model.step) == (step, step)
        with pytest.raises(ServiceError, match="there is no service at"):
            trainer.fit_rl(model, groups, learning_rate=4e-3)
        assert trainer.global_step == step

        # it comes back, and the same job goes on from the newest state
        server.start()
        trainer.tinker_strategy.service.timeout = PATIENT_S
        result = trainer.fit_rl(model, groups, learning_rate=4e-3)
        assert (result.step, result.num_optimizer_steps) == (step + 1, 1)

    # so does another process
    with open_trainer(server) as again:
        assert again.open(make_model(server, tmp_path, "learner")).get_status().step == step + 1
        sampler = again.sampler(model)
        assert sampler.version == step + 1
        [group] = fitrl.rollout(sampler, TASKS[:1], group_size=4, reward=reward, max_new_tokens=4, seed=7)
        samples = fitrl.build_samples([group], sampler.tokenizer, teaches_without_advantage=True)
        [batch] = fitrl.pack(samples.flat, layout="packed")
        trained = again.tinker_strategy.forward(batch).logprobs
        assert float((trained - batch.loss_inputs.rollout_logprobs).abs().max()) < 1e-4


class Close(dict[str, float]):
    """Metrics that are equal up to rounding: on several threads this server's sums come in another order each time."""

    def __eq__(self, other: object) -> bool:
        return bool(dict(self) == pytest.approx(other, rel=1e-3, abs=1e-4))

    __hash__ = None  # type: ignore[assignment]


class TestFitRL(SupportsFitRLContract):
    backend = "tinker"
    exact = False
    lora = LoraSettings(rank=8)
    restores_random_state = False
    tolerance = 1e-3

    @pytest.fixture(autouse=True)
    def reached(self, server) -> None:
        self.server = server

    def _call(self, *arguments: Any) -> Close:
        return Close(super()._call(*arguments))

    def model(self, setup: Setup, name: str = "policy") -> TrainableModel:
        return make_model(self.server, setup.folder, name)

    def open_subject(self, setup: Setup) -> Any:
        return open_trainer(self.server, lr_schedule=setup.lr_schedule, gradient_clip_val=setup.gradient_clip_val)


def test_several_turns_and_asking_twice_at_once(server, tmp_path) -> None:
    """Turns of one trajectory are one datum; the event loop is free while a call runs."""
    model = make_model(server, tmp_path, "turns")

    async def two_turns(chat: fitrl.Chat, task: Any) -> fitrl.Trajectory:
        messages = list(task["messages"])
        for _ in range(2):
            messages += [await chat(messages), {"role": "user", "content": "again"}]
        return fitrl.Trajectory(messages_and_choices=messages[:-1])

    with open_trainer(server) as trainer:
        groups = fitrl.rollout(
            trainer.sampler(model), TASKS[:2], group_size=4, reward=reward, agent=two_turns, max_new_tokens=4, seed=1
        )
        result = trainer.fit_rl(model, groups, importance_sampling_level="sequence")
        assert result.num_optimizer_steps == 1
        spoken = sum(
            len(item.token_ids or ())
            for group in groups
            for trajectory in group
            for item in trajectory.messages_and_choices
            if isinstance(item, fitrl.Completion)
        )
        assert result.metrics["data/num_tokens"] <= spoken
    assert threading.active_count() < 20 and torch.isfinite(torch.tensor(result.metrics["loss/train"]))
