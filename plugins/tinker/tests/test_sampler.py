"""`TinkerSampler`: token ids, logprobs, versions; deployed when asked for."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import tinker
import torch
from stand_in import status_error

import fitrl
from fitrl import LoraSettings, Sampler, TrainableModel
from fitrl.errors import DataError, SamplerError, UnsupportedError
from fitrl_tinker import ServiceError, TinkerSampler, TinkerTrainer
from samples import make_groups, true_logprobs

TASKS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(3)]


@pytest.fixture
def trainer(service) -> Any:
    with TinkerTrainer(enable_model_summary=False, timeout=30) as trainer:
        yield trainer


@pytest.fixture
def model(tmp_path) -> TrainableModel:
    return TrainableModel("sampled", "tests", "tiny", lora=LoraSettings(rank=4), root=tmp_path)


def length(task: Any, trajectory: fitrl.Trajectory) -> float:
    return sum(trajectory.completions()[-1].token_ids or ()) / 100


def _text(completion: fitrl.Completion) -> str:
    return bytes(token for token in completion.token_ids or () if token < 256).decode(errors="replace")


def sample(sampler: TinkerSampler, **options: Any) -> list[fitrl.Completion]:
    return asyncio.run(sampler.sample([49, 43, 49, 61], **{"max_new_tokens": 6, "seed": 3} | options))


def test_completions_carry_ids_and_logprobs(trainer, model) -> None:
    sampler = trainer.sampler(model)
    assert isinstance(sampler, Sampler) and sampler.version == 0 and sampler.path is None
    completions = sample(sampler, n=3)
    assert len(completions) == 3 and len({completion.token_ids for completion in completions}) > 1
    for completion in completions:
        assert completion.prompt_ids == (49, 43, 49, 61) and completion.full_support and completion.version == 0
        ids = torch.tensor([*completion.prompt_ids, *(completion.token_ids or ())])
        expected = true_logprobs(ids)[4:]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-6)
        ended = (completion.token_ids or ())[-1] in (260,)
        assert completion.finish_reason == ("stop" if ended else "length")
        assert completion.text == _text(completion)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}])
def test_another_distribution_has_no_logprobs_and_teaches_nothing(options, trainer, model) -> None:
    """The service's logprobs are of temperature 1 over all tokens: they would be wrong here."""
    sampler = trainer.sampler(model)
    [completion] = sample(sampler, **options)
    assert completion.logprobs is None and completion.token_ids
    assert completion.full_support == ("temperature" in options)
    groups = fitrl.rollout(
        sampler, TASKS, group_size=2, reward=lambda task, t: float(t is not None), max_new_tokens=3, **options
    )
    groups[0].trajectories[0].reward = 0.0
    with pytest.raises(DataError):
        trainer.fit_rl(model, groups)


def test_the_sampler_moves_when_it_is_told_to(trainer, model, service) -> None:
    sampler = trainer.sampler(model)
    before = sample(sampler)
    assert not trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-2).deployed
    assert sampler.version == 0 and trainer.sampler(model) is sampler and sample(sampler) == before
    result = trainer.fit_rl(model, make_groups(seed=2), learning_rate=1e-2, deploy_checkpoint=True)
    assert result.deployed and sampler.version == 2 and sampler.path is not None
    after = sample(sampler)
    assert after != before and after[0].version == 2 and sampler.path in service.saved
    trainer.fit_rl(model, make_groups(seed=3), learning_rate=1e-2)
    assert trainer.deploy(model) == sampler.path and sampler.version == 3


def test_what_it_says_are_the_trained_policys_logprobs(trainer, model) -> None:
    trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-2, deploy_checkpoint=True)
    groups = fitrl.rollout(trainer.sampler(model), TASKS, group_size=4, reward=length, max_new_tokens=4, seed=1)
    metrics = trainer.fit_rl(model, groups, learning_rate=1e-2).metrics
    assert abs(metrics["mismatch/kl"]) < 1e-6 and metrics["ratio/max"] == pytest.approx(1.0, abs=1e-5)


def test_another_process_samples_from_the_newest(service, tmp_path, model) -> None:
    with TinkerTrainer(enable_model_summary=False) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-2, deploy_checkpoint=True)
        expected = sample(trainer.sampler(model))
    with TinkerTrainer(enable_model_summary=False) as again:
        sampler = again.sampler(model)
        assert sampler.version == 1 and sample(sampler) == expected


def test_a_session_that_ended_is_begun_again(trainer, model, service) -> None:
    trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-2, deploy_checkpoint=True)
    sampler = trainer.sampler(model)
    expected = sample(sampler)
    service.fail_next("optim_step", status_error(tinker.NotFoundError, 404))
    with pytest.raises(ServiceError):
        trainer.fit_rl(model, make_groups(seed=2))
    assert sample(sampler) == expected  # in another session, from the same weights
    trainer.fit_rl(model, make_groups(seed=2), save_checkpoint=False, deploy_checkpoint=True)
    service.fail_next("optim_step", "lost")
    with pytest.raises(ServiceError):
        trainer.fit_rl(model, make_groups(seed=3))
    assert (sampler.version, trainer.global_step) == (2, 1)
    assert trainer.sampler(model).version == 1  # no version that is not there any more


def test_bad_requests_and_failures_are_named(trainer, model, service) -> None:
    sampler = trainer.sampler(model)
    wrong_ones = {"n": 0, "max_new_tokens": 0, "temperature": math.inf, "top_p": 0.0, "top_k": 0, "stop": "a"}
    for wrong in ({name: value} for name, value in wrong_ones.items()):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample(sampler, **wrong)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        asyncio.run(sampler.sample([]))
    with pytest.raises(UnsupportedError, match="deploy"):
        sampler.update([], 3)
    for fault, told in ((status_error(tinker.RateLimitError, 429), "429"), (TimeoutError(), "within 30 s")):
        service.fail_next("sample", fault)
        with pytest.raises(ServiceError, match=told):
            sample(sampler)
    trainer.close()
    with pytest.raises(SamplerError):
        sample(sampler)


def test_stop_strings_end_with_the_endings_of_the_model(trainer, model, monkeypatch) -> None:
    sampler = trainer.sampler(model)
    asked: list[Any] = []
    real = tinker.SamplingParams
    monkeypatch.setattr(tinker, "SamplingParams", lambda **options: asked.append(options) or real(**options))
    sample(sampler)
    sample(sampler, stop=["\n"])
    assert asked[0]["stop"] == [260] and asked[1]["stop"] == ["\n", "<|end|>"]
