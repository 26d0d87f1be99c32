"""The sampler, against a stand-in for vLLM's server."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import CancelledError

import pytest
import torch
from vllm_cases import CPU, by_transformers

import fitrl
from fitrl.errors import InvalidArgumentError, SamplerError, UnsupportedError
from fitrl.rollout.sampler import ProvesWeights
from fitrl_vllm import EngineError, EngineTimeoutError, StaleWeightsError, VLLMSampler, VLLMServer
from fitrl_vllm.errors import EngineDiedError
from fitrl_vllm.transfer import MemorySender

PROMPT = [72, 101, 108, 108, 111]
LORA = fitrl.LoraSettings(rank=4)
TASKS = ["1+1=", "2+2=", "3+4=", "5+5=", "6+7="]


def reward(task, trajectory) -> float:
    return float(trajectory.completions()[-1].token_ids[0] % 2)


@pytest.fixture
def model(untied, tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("small", "tests", str(untied), lora=None, root=tmp_path)


@pytest.fixture
def base(server) -> dict[str, torch.Tensor]:
    """The weights that the server starts with."""
    return {name: tensor.clone() for name, tensor in server.base.state_dict().items()}


@pytest.fixture
def ours(server, untied, base, monkeypatch) -> VLLMServer:
    """The server as one of ours, which starts anew with the weights that it began with."""
    found = VLLMServer(untied, port=int(server.url.rsplit(":", 1)[1]))

    def start() -> None:
        found.num_starts += 1
        server.base.load_state_dict(base)

    monkeypatch.setattr(found, "start", start)
    return found


@pytest.fixture
def sampler(model, server):
    with VLLMSampler(model, server.url, tolerance=1e-4, timeout_s=20) as sampler:
        yield sampler


def test_is_a_sampler_that_proves_its_weights(sampler) -> None:
    assert isinstance(sampler, fitrl.Sampler) and isinstance(sampler, ProvesWeights)
    assert fitrl.discovery.sampler_class("vllm") is VLLMSampler


def test_completions_have_the_ids_and_logprobs_of_what_was_sampled(sampler, server, untied) -> None:
    said = asyncio.run(sampler.sample(PROMPT, n=3, max_new_tokens=6, temperature=0.7, seed=5))
    again = asyncio.run(sampler.sample(PROMPT, n=3, max_new_tokens=6, temperature=0.7, seed=5))
    assert [item.token_ids for item in said] == [item.token_ids for item in again]
    assert len({item.token_ids for item in said}) == 3
    for item in said:
        assert item.prompt_ids == tuple(PROMPT) and item.temperature == 0.7 and item.version == 0 and item.full_support
        expected = by_transformers(untied, PROMPT, list(item.token_ids), 0.7)
        assert item.logprobs == pytest.approx(expected, abs=1e-6)
    asked = [body for body in server.asked("/v1/completions") if body.get("n") == 3]
    assert len(asked) == 2 and asked[0]["prompt"] == PROMPT  # one request for n completions, by ids


def test_what_changes_the_support_is_said(sampler) -> None:
    [item] = asyncio.run(sampler.sample(PROMPT, max_new_tokens=2, top_k=3))
    assert not item.full_support
    [item] = asyncio.run(sampler.sample(PROMPT, max_new_tokens=2, temperature=0.0))
    assert item.logprobs == (0.0,) * len(item.token_ids)


def test_a_completion_ends_where_the_context_does(sampler, server) -> None:
    [item] = asyncio.run(sampler.sample(PROMPT * 102, max_new_tokens=50))
    assert len(item.token_ids) <= 2
    with pytest.raises(InvalidArgumentError, match="515 tokens, the engine's context is 512"):
        asyncio.run(sampler.sample(PROMPT * 103))


@pytest.mark.parametrize(
    "wrong",
    [{"n": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_k": 0}]
    + [{"stop": "x"}, {"stop": [""]}],
)
def test_arguments_out_of_range(wrong, sampler) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        asyncio.run(sampler.sample(PROMPT, **wrong))


@pytest.mark.parametrize("settings", [{"temperature": 0.5}, {"top_k": 2}])
def test_logprobs_from_before_the_temperature_are_refused(settings, sampler, server) -> None:
    server.tells_raw_logprobs = True
    with pytest.raises(EngineError, match="processed_logprobs"):
        asyncio.run(sampler.sample(PROMPT, max_new_tokens=2, **settings))
    asyncio.run(sampler.sample(PROMPT, max_new_tokens=2))  # the same at temperature 1


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_training_and_sampling_agree_over_steps(lora, untied, server, tmp_path) -> None:
    model = fitrl.TrainableModel("small", "tests", str(untied), lora=lora, root=tmp_path)
    with (
        VLLMSampler(model, server.url, tolerance=1e-4) as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
    ):
        for step in range(3):
            groups = fitrl.rollout(
                trainer.sampler(model), ["a", "b"], reward=reward, group_size=6, max_new_tokens=6, seed=step
            )
            result = trainer.fit_rl(model, groups, learning_rate=1e-2, save_checkpoint=False)
            assert result.step == sampler.version == step + 1
            assert abs(result.metrics["mismatch/kl"]) < 1e-6
            assert {item.version for group in groups for item in group.trajectories[0].completions()} == {step}
    folders = [body["lora_path"] for body in server.asked("/v1/load_lora_adapter")]
    assert len(set(folders)) == len(folders) == (4 if lora else 0)  # never twice: prompts may be cached under a path
    assert len(server.asked("/reset_prefix_cache")) == (0 if lora else 4)


def test_an_engine_that_keeps_old_weights_is_noticed(model, sampler, server) -> None:
    with fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer:
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=reward, group_size=8, max_new_tokens=8, seed=1)
        server.keeps_old_weights = True
        with pytest.raises(StaleWeightsError, match="the engine's did not at all"):
            trainer.fit_rl(model, groups, learning_rate=1e-2, save_checkpoint=False)
        assert sampler.version == 0
        with pytest.raises(StaleWeightsError, match="version 1 of the weights was handed over and not proven"):
            asyncio.run(sampler.sample(PROMPT))
        server.keeps_old_weights = False
        groups = [fitrl.TrajectoryGroup(group.trajectories) for group in groups]
        trainer.fit_rl(model, groups, learning_rate=1e-2, save_checkpoint=False)
        assert sampler.version == 2
        [item] = asyncio.run(sampler.sample(PROMPT))
        assert item.version == 2


def test_an_engine_with_other_weights_is_noticed_when_the_model_is_opened(model, sampler, server) -> None:
    with torch.no_grad():
        server.base.lm_head.weight += 0.01 * torch.randn_like(server.base.lm_head.weight)
    server.keeps_old_weights = True
    with (
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
        pytest.raises(StaleWeightsError, match="differ from the trainer's by"),
    ):
        trainer.open(model)


def test_a_connection_that_breaks_is_survived(sampler, server) -> None:
    server.drops = 2
    said = asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1))
    assert said == asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1))
    server.drops = 3
    with pytest.raises(EngineError, match="3 times"):
        asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1))


def test_an_engine_that_came_back_is_handed_the_newest_weights(model, sampler, server, base) -> None:
    """Somebody's server that was started anew has the base model's."""
    with fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer:
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=reward, group_size=8, max_new_tokens=8, seed=1)
        trainer.fit_rl(model, groups, learning_rate=1e-2, save_checkpoint=False)
        before = asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1))
        server.base.load_state_dict(base)
        server.drops = 1
        assert asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1)) == before
        server.base.load_state_dict(base)
        server.keeps_old_weights, server.drops = True, 1
        with pytest.raises(StaleWeightsError):
            asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1))
        with pytest.raises(StaleWeightsError):  # and nothing is sampled from it afterwards
            asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1))


@pytest.mark.parametrize("transfer", ["folder", "memory"])
def test_a_connection_that_is_lost_takes_nothing_from_an_engine_that_was_not_started_again(
    transfer, model, server, ours, monkeypatch
) -> None:
    start = ours.start
    monkeypatch.setattr(ours, "start", lambda: pytest.fail("it was well"))
    with (
        VLLMSampler(model, ours, tolerance=1e-4, transfer=transfer) as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
    ):
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=reward, group_size=8, max_new_tokens=8, seed=1)
        trainer.fit_rl(model, groups, learning_rate=1e-2, save_checkpoint=False)
        before = asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1))
        orders = server.asked("/collective_rpc"), server.asked("/reset_prefix_cache")
        server.drops = 1
        assert asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1)) == before
        assert (server.asked("/collective_rpc"), server.asked("/reset_prefix_cache")) == orders
        start()  # by another sampler of this server
        server.drops = 1
        if transfer == "memory":
            with pytest.raises(StaleWeightsError, match="came without files and is gone"):
                asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1))
        else:
            assert asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1)) == before
            assert len(server.asked("/reset_prefix_cache")) == len(orders[1]) + 1


@pytest.mark.parametrize("transfer", ["folder", "memory"])
def test_somebodys_server_that_answers_as_before_is_handed_nothing(transfer, model, server) -> None:
    with (
        VLLMSampler(model, server.url, tolerance=1e-4, transfer=transfer) as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
    ):
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=reward, group_size=8, max_new_tokens=8, seed=1)
        trainer.fit_rl(model, groups, learning_rate=1e-2, save_checkpoint=False)
        before = asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1))
        orders = server.asked("/reset_prefix_cache")
        server.drops = 1
        assert asyncio.run(sampler.sample(PROMPT, max_new_tokens=4, seed=1)) == before
        assert server.asked("/reset_prefix_cache") == orders


@pytest.mark.parametrize("whose", ["ours", "somebody's"])
def test_a_connection_that_is_lost_cuts_off_no_other(whose, model, server, ours) -> None:
    async def beside(sampler: VLLMSampler) -> None:
        server.holds.clear()
        waiting = asyncio.create_task(sampler.sample(PROMPT, max_new_tokens=2, seed=1))
        while len(server.asked("/v1/completions")) < 1:
            await asyncio.sleep(0.01)
        for _ in range(3):
            lost = iter([EngineDiedError("lost")])

            async def ask(lost=lost) -> None:
                for error in lost:
                    raise error

            await asyncio.wrap_future(sampler.spawn(sampler.surviving(ask)))
        server.holds.set()
        assert len((await waiting)[0].token_ids) <= 2

    with VLLMSampler(model, ours if whose == "ours" else server.url, tolerance=1e-4) as sampler:
        asyncio.run(beside(sampler))
    assert len(server.asked("/v1/completions")) == 1


def test_an_engine_that_dies_is_started_once_for_all_that_asked_it(model, ours, monkeypatch) -> None:
    """Also where its weights are gone with it; and what sends newer ones is told that it is another engine."""
    with (
        VLLMSampler(model, ours, tolerance=1e-4, transfer="memory") as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
    ):
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=reward, group_size=8, max_new_tokens=8, seed=1)
        trainer.fit_rl(model, groups, learning_rate=1e-2, save_checkpoint=False)
        complete, under_way, all_are, revivals = sampler.engine.complete, iter(range(5)), asyncio.Event(), []

        async def die(*arguments, **options):
            for number in under_way:
                if number == 4:
                    all_are.set()
                await all_are.wait()
                raise EngineDiedError("dead", is_certain=True)
            return await complete(*arguments, **options)

        async def five() -> list[object]:
            asked = [sampler.sample(PROMPT, max_new_tokens=2) for _ in range(5)]
            return await asyncio.gather(*asked, return_exceptions=True)

        monkeypatch.setattr(sampler.engine, "complete", die)
        assert {type(said) for said in asyncio.run(five())} == {StaleWeightsError}
        assert ours.num_starts == 1
        sender = MemorySender.prepare
        monkeypatch.setattr(
            MemorySender, "prepare", lambda self, workers, num: revivals.append(num) or sender(self, workers, num)
        )
        groups = [fitrl.TrajectoryGroup(group.trajectories) for group in groups]
        trainer.fit_rl(model, groups, learning_rate=1e-2, save_checkpoint=False)
        assert revivals == [1]
        assert asyncio.run(sampler.sample(PROMPT, max_new_tokens=2))[0].version == 2


@pytest.fixture
def dying(model, ours):
    """A sampler with version 1 on a server that starts anew with the base model's weights, and what it says."""
    with (
        VLLMSampler(model, ours, tolerance=1e-4) as sampler,
        fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer,
    ):
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=reward, group_size=8, max_new_tokens=8, seed=1)
        trainer.fit_rl(model, groups, learning_rate=1e-2, save_checkpoint=False)
        yield sampler, asyncio.run(sampler.sample(PROMPT, max_new_tokens=8, seed=1))


def die_once(sampler: VLLMSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    complete, deaths = sampler.engine.complete, iter([EngineDiedError("dead", is_certain=True)])

    async def die(*arguments, **options):
        for error in deaths:
            raise error
        return await complete(*arguments, **options)

    monkeypatch.setattr(sampler.engine, "complete", die)


def test_nobody_asks_an_engine_that_has_no_weights_yet(dying, server, monkeypatch) -> None:
    sampler, before = dying
    loading, may_load, load = threading.Event(), threading.Event(), sampler.engine.load_weights

    async def slow(folder):
        loading.set()
        await asyncio.to_thread(may_load.wait)
        await load(folder)

    async def both() -> None:
        first = asyncio.create_task(sampler.sample(PROMPT, max_new_tokens=8, seed=1))
        await asyncio.to_thread(loading.wait)
        asked = len(server.asked("/v1/completions"))
        second = asyncio.create_task(sampler.sample(PROMPT, max_new_tokens=8, seed=1))
        for _ in range(20):  # requests, before which its own would be there if it did not wait
            await asyncio.wrap_future(sampler.spawn(sampler.engine._is_well()))
        seen = len(server.asked("/v1/completions"))
        may_load.set()
        assert seen == asked
        assert await first == await second == before

    die_once(sampler, monkeypatch)
    monkeypatch.setattr(sampler.engine, "load_weights", slow)
    asyncio.run(both())


@pytest.mark.parametrize("how", ["refused", "cancelled"])
def test_weights_that_an_engine_did_not_take_again_are_handed_over_at_the_next_request(how, dying, monkeypatch) -> None:
    sampler, before = dying
    load, fails = sampler.engine.load_weights, iter([EngineError("no room")])

    async def fail_once(folder):
        for error in fails:
            if how == "cancelled":
                raise asyncio.CancelledError
            raise error
        await load(folder)

    die_once(sampler, monkeypatch)
    monkeypatch.setattr(sampler.engine, "load_weights", fail_once)
    with pytest.raises(EngineError if how == "refused" else (asyncio.CancelledError, CancelledError)):
        asyncio.run(sampler.sample(PROMPT, max_new_tokens=8, seed=1))
    assert asyncio.run(sampler.sample(PROMPT, max_new_tokens=8, seed=1)) == before


def test_other_ranks_sample_with_what_the_first_handed_over(untied, server, tmp_path, monkeypatch) -> None:
    model = fitrl.TrainableModel("small", "tests", str(untied), lora=LORA, root=tmp_path)
    with VLLMSampler(model, server.url, tolerance=1e-4) as first, VLLMSampler(model, server.url) as second:
        with fitrl.LocalTrainer(**CPU, sampler=first) as trainer:
            trainer.open(model)
            given = list(trainer.verbs.named_weights())
        loads = len(server.asked("/v1/load_lora_adapter"))
        monkeypatch.setattr("fitrl.data.ranks.rank", lambda: 1)
        drained = iter(given)
        second.update(drained, 1)
        assert second.version == 1 and not list(drained)
        assert len(server.asked("/v1/load_lora_adapter")) == loads == 1
        asyncio.run(second.sample(PROMPT, max_new_tokens=2))
    assert server.asked("/v1/completions")[-1]["model"] == "policy"


def test_weights_that_cannot_be_handed_over_are_drained_all_the_same(untied, server, tmp_path) -> None:
    model = fitrl.TrainableModel("small", "tests", str(untied), lora=LORA, root=tmp_path)
    weights = iter([("lm_head.weight", torch.zeros(1)), ("another", torch.zeros(1))])
    with VLLMSampler(model, server.url) as sampler, pytest.raises(UnsupportedError, match="no adapter"):
        sampler.update(weights, 1)
    assert not list(weights)


def test_a_slow_engine_is_a_timeout_that_says_so(model, server) -> None:
    with VLLMSampler(model, server.url, timeout_s=0.3) as sampler:
        server.holds.clear()
        with pytest.raises(EngineTimeoutError, match="/v1/completions did not answer within 0.3 s"):
            asyncio.run(sampler.sample(PROMPT))
        server.holds.set()


def test_no_engine_at_all_is_an_error(model) -> None:
    with (
        VLLMSampler(model, "http://127.0.0.1:9", timeout_s=0.3) as sampler,
        pytest.raises(EngineError, match="is gone"),
    ):
        asyncio.run(sampler.sample(PROMPT))


def test_new_weights_wait_for_completions_under_way(model, sampler, server) -> None:
    """So each completion has one version."""
    with fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer:
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=reward, group_size=8, max_new_tokens=8, seed=1)

        async def meanwhile() -> list[fitrl.Completion]:
            server.holds.clear()
            asked = len(server.requests)
            under_way = asyncio.create_task(sampler.sample(PROMPT, max_new_tokens=4))
            while len(server.requests) == asked:
                await asyncio.sleep(0)
            training = asyncio.create_task(trainer.fit_rl_async(model, groups, save_checkpoint=False))
            while sampler.is_open:
                await asyncio.sleep(0)
            later = asyncio.create_task(sampler.sample(PROMPT, max_new_tokens=4))
            assert not server.asked("/collective_rpc")[1:] and sampler.version == 0
            server.holds.set()
            await training
            return [*await under_way, *await later]

        assert [item.version for item in asyncio.run(meanwhile())] == [0, 1]


def test_a_closed_sampler_says_so(model, server) -> None:
    sampler = VLLMSampler(model, server.url)
    sampler.close()
    sampler.close()
    with pytest.raises(SamplerError, match="closed"):
        asyncio.run(sampler.sample(PROMPT))


def test_sleeping_engines_wake_for_new_weights(model, sampler, server) -> None:
    with fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer:
        groups = fitrl.rollout(trainer.sampler(model), ["a"], reward=reward, group_size=8, max_new_tokens=8, seed=1)
        sampler.sleep()
        trainer.fit_rl(model, groups, save_checkpoint=False)
        asyncio.run(sampler.sample(PROMPT))
        paths = [path for path, _ in server.requests]
        assert paths.index("/sleep") < paths.index("/wake_up") < len(paths) - paths[::-1].index("/collective_rpc")
        sampler.sleep()
        sampler.wake()
        asyncio.run(sampler.sample(PROMPT))


@pytest.mark.parametrize("how", ["continue", "restart"])
def test_a_pipeline_samples_while_the_trainer_trains(model, sampler, how) -> None:
    behind, steps = [], 4
    with fitrl.LocalTrainer(**CPU, sampler=sampler) as trainer:
        options = {"reward": reward, "group_size": 6, "groups_per_step": 3, "max_new_tokens": 4}
        with fitrl.RolloutPipeline(
            trainer.sampler(model, own_weights=True), TASKS, on_weight_change=how, model=model, **options
        ) as pipeline:
            for groups in pipeline:
                for group in groups:
                    for trajectory in group:
                        first, last = trajectory.policy_versions
                        assert first == last and model.step - 1 <= first <= model.step
                trainer.fit_rl(model, groups, learning_rate=1e-3, precalculate_logprobs=True)
                behind.append(pipeline.metrics()["off_policy/steps_max"])
                if len(behind) == steps:
                    break
        assert sampler.version == model.step > 1
    assert behind[0] == 0.0 and max(behind) <= 1.0
