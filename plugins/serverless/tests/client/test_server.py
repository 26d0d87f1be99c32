"""The client against `fitrl serve`, over loopback: what is learned there is what is learned here."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM

import fitrl
from fitrl.demo import TASKS, correct
from fitrl.testing import LightningFitRLContract, Setup, SupportsFitRLContract
from fitrl.testing.opening import step_groups
from fitrl_serverless import ServerlessTrainer
from fitrl_serverless.client import AuthenticationError, InvalidRequestError, JobFailedError, NotFoundError
from helpers import group

MACHINE = ("time/", "throughput/", "memory/")


@contextmanager
def opened(server, **options) -> Iterator[ServerlessTrainer]:
    with ServerlessTrainer(url=server.url, key=server.keys["alice"], **options) as trainer:
        yield trainer


def model_in(folder, name: str | None = None, **options) -> fitrl.TrainableModel:
    """A model of this test's own on the shared server: projects are told apart by the folder."""
    project = "".join(letter if letter.isalnum() else "-" for letter in str(folder))[-100:].strip("-")
    return fitrl.TrainableModel(name or "policy", project, "tiny", **({"lora": None, "root": folder} | options))


class TestFitRL(SupportsFitRLContract):
    backend = "serverless"
    restores_random_state = False
    clips = False

    @pytest.fixture(autouse=True)
    def on(self, server) -> None:
        self.server = server

    def open_subject(self, setup: Setup) -> AbstractContextManager[ServerlessTrainer]:
        return opened(self.server, lr_schedule=setup.lr_schedule)

    def model(self, setup: Setup, name: str = "policy") -> fitrl.TrainableModel:
        return model_in(setup.folder, name)


class TestUnderLightning(LightningFitRLContract):
    microbatches = {}
    validates = False

    @pytest.fixture(autouse=True)
    def on(self, server) -> None:
        self.server = server

    def open_trainer(self, setup: Setup, *callbacks: Callback, **options) -> AbstractContextManager[ServerlessTrainer]:
        return opened(self.server, lr_schedule=setup.lr_schedule, callbacks=list(callbacks), **options)

    def model(self, setup: Setup, name: str = "policy") -> fitrl.TrainableModel:
        return model_in(setup.folder)


ARGUMENTS = [
    {},
    {"ppo": True, "epsilon": 0.1, "importance_sampling_level": "sequence", "precalculate_logprobs": True},
    {"kimi_k2_tau": 0.1, "mask_prob_ratio": True, "advantage_balance": 0.3, "scale_rewards": False},
    {"max_negative_advantage_importance_sampling_weight": 0.9, "epsilon_high": 0.2, "epsilon": 0.2},
]


@pytest.mark.parametrize("lora", [None, fitrl.LoraSettings(rank=4, alpha=8, seed=3)], ids=["full", "lora"])
def test_the_same_groups_give_the_step_of_a_local_trainer(server, tmp_path, lora) -> None:
    here_model = fitrl.TrainableModel("here", "local", "tiny", lora=lora, root=tmp_path)
    there_model = model_in(tmp_path, lora=lora)
    with opened(server) as there, fitrl.LocalTrainer(accelerator="cpu", enable_model_summary=False) as here:
        for number, arguments in enumerate(ARGUMENTS):
            groups = [*step_groups(number), group([1.0, 1.0]), fitrl.TrajectoryGroup()]
            local = here.fit_rl(here_model, groups, learning_rate=1e-3, **arguments)
            remote = there.fit_rl(there_model, groups, learning_rate=1e-3, **arguments)
            assert (remote.step, remote.num_optimizer_steps, remote.dropped) == (number + 1, 1, local.dropped)
            told = {key: value for key, value in remote.metrics.items() if not key.startswith(MACHINE)}
            assert told == {key: value for key, value in local.metrics.items() if not key.startswith(MACHINE)}
            assert told["objective/exact"] == 1.0
        folder = there.download_checkpoint(there_model)
        assert remote.artifact_name.endswith(f"/policy:step{len(ARGUMENTS)}")
    mine, theirs = local.checkpoint_path, folder
    weights = "model.safetensors" if lora is None else "adapter_model.safetensors"
    assert (theirs / weights).read_bytes() == (mine / weights).read_bytes()  # to the last bit
    if lora is None:
        assert AutoModelForCausalLM.from_pretrained(theirs).num_parameters() > 0


@pytest.mark.slow
def test_twenty_steps_raise_the_reward(server, tmp_path) -> None:
    """Sampled over /chat/completions, trained by jobs; the same eight tasks in each step."""
    rewards = []
    with opened(server) as trainer:
        model = model_in(tmp_path, "adder")
        for step in range(20):
            groups = fitrl.rollout(
                trainer.sampler(model), TASKS[3::12][:8], reward=correct, group_size=8, max_new_tokens=4, seed=step
            )
            assert {t.policy_versions for g in groups for t in g} == {(step, step)}
            result = trainer.fit_rl(model, groups, learning_rate=3e-4)
            # the server samples from the very weights that it trains
            assert abs(result.metrics["mismatch/kl"]) < 1e-4 and result.metrics["objective/exact"] == 1.0
            rewards.append(result.metrics["reward/mean"])
        assert [found.step for found in trainer.checkpoints(model)] == list(range(21))
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert last > first + 0.1, rewards


def test_turns_are_one_history_whose_ids_are_never_made_again(server, tmp_path) -> None:
    async def agent(chat: fitrl.Chat, task) -> fitrl.Trajectory:
        messages = [{"role": "user", "content": task}]
        for question in ("Sure?", "Really?"):
            messages.append(await chat(messages))
            messages.append({"role": "user", "content": question})
        return fitrl.Trajectory(messages_and_choices=messages)

    with opened(server) as trainer:
        model = model_in(tmp_path)
        sampler = trainer.sampler(model)
        [rolled] = fitrl.rollout(sampler, ["3+4="], reward=lambda task, t: random.random(), agent=agent, group_size=4)
        for trajectory in rolled:
            first, second = trajectory.completions()
            seen = [*first.prompt_ids, *first.token_ids]
            assert list(second.prompt_ids[: len(seen)]) == seen
        result = trainer.fit_rl(model, [rolled])
        assert result.metrics["data/num_split_histories"] == 0.0
        assert abs(result.metrics["mismatch/kl"]) < 1e-4


def test_seeds_temperatures_and_ids_are_the_embedded_samplers(server, tmp_path) -> None:
    """One policy, two samplers: the same seed gives the same completions."""
    options = {"n": 3, "max_new_tokens": 6, "temperature": 0.7, "top_k": 40, "seed": 11}
    import asyncio

    with opened(server) as there, fitrl.LocalTrainer(accelerator="cpu", enable_model_summary=False) as here:
        mine = here.sampler(fitrl.TrainableModel("here", "local", "tiny", lora=None, root=tmp_path))
        theirs = there.sampler(model_in(tmp_path))
        ids = fitrl.prompt_ids(mine.tokenizer, [{"role": "user", "content": "3+4="}])
        expected = asyncio.run(mine.sample(ids, **options))
        for found in (
            asyncio.run(theirs.sample(ids, **options)),
            asyncio.run(theirs.sample_chat([{"role": "user", "content": "3+4="}], **options)),
        ):
            for a, b in zip(expected, found, strict=True):
                assert (a.token_ids, a.prompt_ids, a.text) == (b.token_ids, b.prompt_ids, b.text)
                assert (a.finish_reason, a.version, a.full_support) == (b.finish_reason, b.version, b.full_support)
                assert b.logprobs == pytest.approx(a.logprobs, abs=1e-6)


def test_refusals(server, tmp_path) -> None:
    with (
        ServerlessTrainer(url=server.url, key="fitrl-wrong", retry_timeout_s=0.1) as trainer,
        pytest.raises(AuthenticationError, match="FITRL_SERVERLESS_KEY") as caught,
    ):
        trainer.open(model_in(tmp_path))
    assert "fitrl-wrong" not in str(caught.value) and caught.value.status == 401 and caught.value.request_id
    with opened(server) as trainer:
        model = model_in(tmp_path)
        said = fitrl.Completion(
            message={"role": "assistant", "content": "b"}, token_ids=(10**6,), logprobs=(-1.0,), temperature=1.0
        )
        foreign_ids = [
            fitrl.Trajectory(reward=reward, messages_and_choices=[{"role": "user", "content": "a"}, said])
            for reward in (0.0, 1.0)
        ]
        with pytest.raises((JobFailedError, InvalidRequestError), match="vocabulary"):
            trainer.fit_rl(model, [fitrl.TrajectoryGroup(foreign_ids)])
        assert trainer.fit_rl(model, step_groups(1)).step == 1
        with pytest.raises(NotFoundError):
            trainer.download_checkpoint(model, 77)


def test_ctrl_c_and_a_second_look(server, tmp_path) -> None:
    """Cancelled or done: the model stands where the service says, and goes on."""

    class Interrupt(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with opened(server, callbacks=[Interrupt()]) as trainer:
        model = model_in(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit_rl(model, step_groups(1))
        assert not (model.run_dir / "job.json").exists()
        stands = model.step
    with opened(server) as trainer:
        assert trainer.fit_rl(model, step_groups(1)).step == stands + 1


def test_logged_groups_arrive(server, tmp_path) -> None:
    with opened(server) as trainer:
        trainer.log(model_in(tmp_path), [group([0.0, math.pi])], split="val")


def test_the_callers_generators_are_left_alone(server, tmp_path) -> None:
    with opened(server) as trainer:
        model = model_in(tmp_path)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        fitrl.rollout(trainer.sampler(model), ["1+1="], reward=correct_or_not, group_size=2)
        trainer.fit_rl(model, step_groups(1))
        assert torch.equal(before, torch.get_rng_state())


def correct_or_not(task, trajectory) -> float:
    return float(len(trajectory.completions()[0].text) > 1)
