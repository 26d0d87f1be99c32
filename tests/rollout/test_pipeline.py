"""`RolloutPipeline`: how far it goes ahead, what it drops, what it makes again, how it ends."""

from __future__ import annotations

import asyncio
import random
import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fitrl
from fake_sampler import WAIT_S, FakeSampler
from fitrl.demo import TASKS, correct
from fitrl.errors import (
    DataError,
    GroupError,
    InvalidArgumentError,
    NonFiniteGradientError,
    SamplerError,
    SessionError,
)
from fitrl.rollout.versions import group_versions

NUMBERED = [f"{number}" for number in range(1000)]


class Rising:
    """A reward that differs within each group."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self, task, trajectory) -> float:
        self.value += 1.0
        return self.value


def make(sampler, tasks=None, **options) -> fitrl.RolloutPipeline:
    defaults = {"reward": Rising(), "group_size": 2, "groups_per_step": 2}
    return fitrl.RolloutPipeline(sampler, NUMBERED if tasks is None else tasks, **(defaults | options))


def numbers(groups) -> list[int]:
    return [group.metadata["number"] for group in groups]


def text_of(pipeline, number: int) -> str:
    step, place = divmod(number, pipeline.groups_per_step)
    return pipeline.tasks_of_step(step)[place]


# -- staleness 0 is the synchronous loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("own_weights", [False, True])
def test_with_staleness_0_it_is_rollout_in_a_loop_to_the_last_bit(tmp_path, own_weights) -> None:
    sampling = {"reward": correct, "group_size": 8, "max_new_tokens": 4, "temperature": 1.1}
    steps, trained = 3, {}
    for how in ("pipeline", "loop"):
        model = fitrl.TrainableModel(how, "equal", "tiny", lora=None, root=tmp_path)
        with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
            if how == "pipeline":
                sampler = trainer.sampler(model, own_weights=own_weights)
                pipeline = fitrl.RolloutPipeline(
                    sampler, TASKS, groups_per_step=6, max_steps_off_policy=0, seed=3, model=model, **sampling
                )
                with pipeline:
                    for groups in pipeline:
                        trainer.fit_rl(model, groups, learning_rate=1e-3, num_minibatches=2)
                        steps -= 1
                        if not steps:
                            break
            else:
                for step in range(3):
                    groups = fitrl.rollout(
                        trainer.sampler(model), pipeline.tasks_of_step(step), seed=pipeline.seed + step, **sampling
                    )
                    trainer.fit_rl(model, groups, learning_rate=1e-3, num_minibatches=2)
            trained[how] = {name: tensor.clone() for name, tensor in trainer.open(model).named_weights()}
            assert model.step > 3
    assert all(torch.equal(trained["loop"][name], tensor) for name, tensor in trained["pipeline"].items())


def test_with_staleness_0_nothing_is_sampled_while_a_batch_is_trained_on() -> None:
    sampler = FakeSampler()
    with make(sampler, max_steps_off_policy=0) as pipeline:
        for step in range(3):
            assert numbers(next(pipeline)) == [2 * step, 2 * step + 1]
            assert sampler.under_way == 0 and sum(sampler.calls.values()) == 4 * (step + 1)
            sampler.version += 1


# -- how far it goes ahead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 3])
def test_so_many_steps_are_under_way_beside_training(ahead) -> None:
    sampler = FakeSampler()
    with make(sampler, max_steps_off_policy=ahead) as pipeline:
        held = [text_of(pipeline, number) for number in range(2, 100)]
        sampler.hold(*held)
        assert numbers(next(pipeline)) == [0, 1]
        later = [text_of(pipeline, number) for number in range(2, 2 + 2 * ahead)]
        for text in later:
            sampler.wait_for(text)
        assert set(sampler.calls) == {text_of(pipeline, 0), text_of(pipeline, 1), *later}
        assert pipeline.metrics()["pipeline/groups_under_way"] == 2 * ahead
        sampler.version = 1
        sampler.let_go(*held)
        assert numbers(next(pipeline)) == [2, 3]


def test_slow_attempts_hold_up_their_own_group_only() -> None:
    sampler = FakeSampler()
    with make(sampler) as pipeline:
        slow = text_of(pipeline, 1)
        sampler.hold(slow)
        assert numbers(next(pipeline)) == [0, 2]
        sampler.version = 1
        sampler.let_go(slow)  # one step late, which is not too late
        sampler.hold(text_of(pipeline, 3))
        assert 1 in numbers(next(pipeline)) + numbers(next(pipeline))


def test_groups_too_far_behind_are_dropped_stopped_and_counted() -> None:
    sampler = FakeSampler()
    with make(sampler) as pipeline:
        hangs = text_of(pipeline, 0)
        sampler.hold(hangs)
        seen = []
        for step in range(4):
            seen += numbers(next(pipeline))
            sampler.version = step + 1
        assert sampler.cancelled.get(timeout=WAIT_S) == hangs and 0 not in seen
        assert seen == [1, 2, 3, 4, 5, 6, 7, 8] and pipeline.dropped == {"stale": 1}
        assert pipeline.metrics()["off_policy/steps_max"] == 1.0


def test_several_steps_of_an_optimizer_are_one_step_of_the_loop() -> None:
    sampler = FakeSampler()
    with make(sampler) as pipeline:
        for step in range(4):
            next(pipeline)
            for number in range(2 * step + 2, 2 * step + 4):
                sampler.wait_for(text_of(pipeline, number))
            sampler.version += 16
        assert pipeline.dropped == {} and pipeline.metrics()["off_policy/steps_max"] == 1.0


def test_weights_that_were_given_up_leave_no_tokens() -> None:
    sampler = FakeSampler()
    sampler.version = 7
    with make(sampler) as pipeline:
        finished, under_way = text_of(pipeline, 2), text_of(pipeline, 3)
        sampler.hold(under_way)
        assert numbers(next(pipeline)) == [0, 1]
        sampler.wait_for(finished)
        sampler.wait_for(under_way)
        sampler.version = 3  # back to a checkpoint
        assert all(group_versions(group) == (3, 3) for group in next(pipeline))
        assert pipeline.dropped == {"stale": 2}
        assert under_way in [sampler.cancelled.get_nowait() for _ in range(sampler.cancelled.qsize())]


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.3]))
def test_whatever_the_order_of_things_nothing_doubles_or_is_too_old(ahead, per_step, size, seed, failing) -> None:
    draw = random.Random(seed)
    begun: set[str] = set()
    handed: list[int] = []
    sampler = FakeSampler()

    async def agent(chat, task):
        begun.add(task)
        for _ in range(draw.randrange(30)):
            await asyncio.sleep(0)
        if draw.random() < failing:
            raise OSError("broken")
        trajectory = fitrl.Trajectory(messages_and_choices=[{"role": "user", "content": task}])
        trajectory.messages_and_choices.append(await chat([{"role": "user", "content": task}]))
        return trajectory

    options = {"agent": agent, "max_retries": 1, "max_failed_groups": 10**6, "max_concurrency": draw.choice([None, 3])}
    with make(sampler, group_size=size, groups_per_step=per_step, max_steps_off_policy=ahead, **options) as pipeline:
        for step in range(6):
            groups = next(pipeline)
            assert len(groups) == per_step and all(len(group) == size for group in groups)
            for group in groups:
                first, last = group_versions(group)
                assert step - ahead <= first <= last <= step
            handed += numbers(groups)
            in_all = len(handed) + sum(pipeline.dropped.values()) + (ahead + 1) * per_step
            assert len(begun) <= in_all
            sampler.version = step + 1
        assert len(set(handed)) == len(handed)
        if not failing and ahead == 0:
            assert handed == list(range(6 * per_step))


def test_no_more_attempts_at_once_than_allowed() -> None:
    sampler = FakeSampler()
    with make(sampler, group_size=4, groups_per_step=4, max_concurrency=3, max_steps_off_policy=2) as pipeline:
        for step in range(3):
            next(pipeline)
            sampler.version = step + 1
    assert sampler.most == 3


# -- flat groups, failures, time --------------------------------------------------------------------------------------


def test_flat_groups_make_way_for_other_tasks_up_to_the_limit() -> None:
    draws: dict[str, int] = {}

    def reward(task, trajectory) -> float:
        draws[task] = draws.get(task, 0) + 1
        return float(draws[task]) if task in lively else 0.0

    lively: set[str] = set()
    with make(FakeSampler(), max_steps_off_policy=0, reward=reward, max_resamples_of_flat_groups=2) as pipeline:
        lively.add(text_of(pipeline, 0))
        groups = next(pipeline)
        assert pipeline.metrics()["pipeline/flat_groups_resampled"] == 2
        assert len(set(groups[0].rewards)) == 2 and groups[1].rewards == [0.0, 0.0]
        assert len(draws) == 4 and numbers(groups) == [0, 1]
        lively.update(NUMBERED)
        next(pipeline)
        assert pipeline.metrics()["pipeline/flat_groups_resampled"] == 0


def test_an_attempt_that_fails_is_made_again_with_another_seed() -> None:
    sampler = FakeSampler()
    seeds = []

    async def agent(chat, task):
        seeds.append(chat.seed)
        said = await chat([{"role": "user", "content": task}])
        return fitrl.Trajectory(messages_and_choices=[{"role": "user", "content": task}, said])

    with make(sampler, agent=agent, group_size=1, groups_per_step=1, max_steps_off_policy=0) as pipeline:
        sampler.fails[text_of(pipeline, 0)] = 2
        assert numbers(next(pipeline)) == [0] and len(set(seeds)) == 3
        assert pipeline.metrics()["pipeline/attempts_retried"] == 2 and pipeline.dropped == {}


def test_an_attempt_that_is_made_again_is_as_old_as_its_own_tokens() -> None:
    sampler, seen = FakeSampler(), set()

    async def agent(chat, task):
        text = f"{task} again" if task in seen else task
        seen.add(task)
        return fitrl.Trajectory(messages_and_choices=[await chat([{"role": "user", "content": text}])])

    with make(sampler, agent=agent, group_size=1, groups_per_step=1) as pipeline:
        slow = text_of(pipeline, 0)
        sampler.hold(slow, f"{slow} again")
        sampler.fails[slow] = 1
        assert numbers(next(pipeline)) == [1]
        sampler.version = 1
        assert numbers(next(pipeline)) == [2]
        sampler.let_go(slow)
        sampler.wait_for(f"{slow} again")
        sampler.version = 2  # two steps behind is what the first try said, and not the second
        assert numbers(next(pipeline)) == [3] and pipeline.dropped == {}


def test_a_group_that_fails_for_good_is_dropped_and_many_in_a_row_are_an_error() -> None:
    sampler = FakeSampler()
    with make(sampler, max_retries=1, max_failed_groups=2, max_steps_off_policy=0) as pipeline:
        sampler.fails[text_of(pipeline, 1)] = 10**6
        assert numbers(next(pipeline)) == [0, 2] and pipeline.dropped == {"failed": 1}
        assert pipeline.metrics()["pipeline/groups_dropped_failed"] == 1
        for text in NUMBERED:
            sampler.fails[text] = 10**6
        with pytest.raises(GroupError, match="3 groups in a row.*max_failed_groups=2.*OSError: no answer") as error:
            next(pipeline)
        assert len(error.value.exceptions) == 3
        with pytest.raises(GroupError):  # and it stays so
            next(pipeline)


def test_an_attempt_that_hangs_has_failed_after_its_time() -> None:
    sampler = FakeSampler()
    with make(sampler, max_steps_off_policy=0, attempt_timeout_s=0.05, max_retries=0) as pipeline:
        sampler.hold(text_of(pipeline, 0))
        assert numbers(next(pipeline)) == [1, 2] and pipeline.dropped == {"failed": 1}


def test_why_a_group_was_dropped_is_logged(caplog) -> None:
    sampler = FakeSampler()
    with make(sampler, max_steps_off_policy=0, attempt_timeout_s=0.05, max_retries=0) as pipeline:
        hangs, fails = text_of(pipeline, 0), text_of(pipeline, 1)
        sampler.hold(hangs)
        sampler.fails[fails] = 1
        assert numbers(next(pipeline)) == [2, 3]
    told = sorted(record.getMessage() for record in caplog.records if record.name == "fitrl.rollout.supply")
    assert len(told) == 2 and told[0].endswith(f"OSError: no answer to {fails}")
    assert told[1].endswith("TimeoutError: an attempt took longer than attempt_timeout_s=0.05")


def test_what_an_agent_waits_for_and_was_cancelled_is_a_failure() -> None:
    async def agent(chat, task):
        raise asyncio.CancelledError

    with make(FakeSampler(), agent=agent, max_failed_groups=0) as pipeline, pytest.raises(GroupError):
        next(pipeline)


@pytest.mark.parametrize("in_a_task", [False, True])
def test_what_asks_the_process_to_end_is_a_failure(in_a_task) -> None:
    async def leave() -> None:
        raise SystemExit(3)  # as sampled code does that a reward runs

    async def reward(task, trajectory) -> float:
        await (asyncio.create_task(leave()) if in_a_task else leave())
        raise AssertionError

    options = {"reward": reward, "max_retries": 0, "max_failed_groups": 0}
    with make(FakeSampler(), **options) as pipeline, pytest.raises(GroupError, match="end: SystemExit"):
        next(pipeline)


def test_an_attempt_that_raises_while_it_is_stopped_is_not_made_again() -> None:
    sampler = FakeSampler()

    async def agent(chat, task):
        messages = [{"role": "user", "content": task}]
        try:
            return fitrl.Trajectory(messages_and_choices=[*messages, await chat(messages)])
        except asyncio.CancelledError:
            raise ConnectionError("its connection could not be closed") from None

    with make(sampler, agent=agent, group_size=1, max_steps_off_policy=1) as pipeline:
        hangs, last = text_of(pipeline, 0), text_of(pipeline, 9)
        sampler.hold(hangs, last)
        for step in range(4):
            assert numbers(next(pipeline)) == [2 * step + 1, 2 * step + 2]
            sampler.version = step + 1
        assert pipeline.dropped == {"stale": 1} and sampler.calls[hangs] == 1
        sampler.wait_for(last)
    assert sampler.under_way == 0 and sampler.calls[last] == 1


# -- weights change ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["continue", "restart"])
def test_attempts_under_way_go_on_or_begin_again_when_weights_change(how) -> None:
    sampler = FakeSampler()
    with make(sampler, group_size=1, groups_per_step=1, on_weight_change=how) as pipeline:
        first, second = text_of(pipeline, 0), text_of(pipeline, 1)
        sampler.hold(second)
        next(pipeline)
        sampler.wait_for(second)
        sampler.version = 1
        if how == "continue":
            sampler.let_go(second)
            [group] = next(pipeline)
            [said] = group.trajectories[0].completions()
            assert said.policy_versions == (0, 1) and said.versions == (0, *[1] * len(second))
            assert pipeline.metrics()["pipeline/attempts_restarted"] == 0
            mean = pipeline.metrics()["off_policy/steps_mean"]
            assert mean == pytest.approx(1 / (1 + len(second)))
        else:
            threading.Thread(target=lambda: (sampler.cancelled.get(timeout=WAIT_S), sampler.let_go(second))).start()
            groups = [*next(pipeline), *next(pipeline)]
            assert {group_versions(group) for group in groups} == {(1, 1)}
            assert sampler.calls[second] >= 2 and sampler.calls[first] == 1


def test_with_restart_an_attempt_whose_turns_have_two_versions_is_made_again() -> None:
    sampler = FakeSampler()
    turns = []

    async def agent(chat, task):
        messages = [{"role": "user", "content": task}]
        for _ in range(2):
            messages.append(await chat(messages))
            turns.append(task)
            if len(turns) == 1:
                sampler.version = 1  # between its turns
        return fitrl.Trajectory(messages_and_choices=messages)

    options = {"agent": agent, "group_size": 1, "groups_per_step": 1, "on_weight_change": "restart"}
    with make(sampler, max_steps_off_policy=0, **options) as pipeline:
        [group] = next(pipeline)
        assert group_versions(group) == (1, 1) and len(turns) == 4
        assert pipeline.metrics()["pipeline/attempts_restarted"] == 1


# -- how it is asked, and how it ends ---------------------------------------------------------------------------------


def test_it_is_an_async_iterator_too_beside_fit_rl_async(tmp_path) -> None:
    model = fitrl.TrainableModel("asynchronous", "p", "tiny", root=tmp_path)

    async def learn() -> list[dict[str, float]]:
        told = []
        with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
            sampler = trainer.sampler(model, own_weights=True)
            options = {"reward": correct, "group_size": 4, "groups_per_step": 6, "max_new_tokens": 3}
            async with fitrl.RolloutPipeline(sampler, TASKS, model=model, **options) as pipeline:
                async for groups in pipeline:
                    result = await trainer.fit_rl_async(model, groups, learning_rate=1e-3)
                    told.append(model.log(groups, metrics=result.metrics | pipeline.metrics(), step=result.step))
                    if len(told) == 4:
                        break
        return told

    told = asyncio.run(learn())
    behind = [metrics["off_policy/steps_max"] for metrics in told]
    assert behind[0] == 0.0 and max(behind) == 1.0
    assert all(0.0 <= metrics["pipeline/sampler_idle_fraction"] <= 1.0 for metrics in told)
    assert all(0.0 <= metrics["pipeline/trainer_idle_fraction"] <= 1.0 for metrics in told)


def test_a_question_that_is_cancelled_loses_no_group() -> None:
    sampler = FakeSampler()

    async def ask() -> list[int]:
        async with make(sampler, max_steps_off_policy=0) as pipeline:
            text = text_of(pipeline, 0)
            sampler.hold(text)
            asked = asyncio.ensure_future(anext(pipeline))
            await asyncio.to_thread(sampler.wait_for, text)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            sampler.let_go(text)
            return numbers(await anext(pipeline))

    assert asyncio.run(ask()) == [0, 1]


def test_two_questions_at_once_are_refused() -> None:
    sampler = FakeSampler()

    async def ask() -> None:
        async with make(sampler, max_steps_off_policy=0) as pipeline:
            text = text_of(pipeline, 0)
            sampler.hold(text)
            asked = asyncio.ensure_future(anext(pipeline))
            await asyncio.to_thread(sampler.wait_for, text)
            with pytest.raises(SessionError, match="one at a time"):
                await anext(pipeline)
            sampler.let_go(text)
            assert numbers(await asked) == [0, 1] and numbers(await anext(pipeline)) == [2, 3]

    asyncio.run(ask())


def test_ctrl_c_while_it_waits_ends_it_cleanly() -> None:
    sampler = FakeSampler()

    def interrupt() -> None:
        sampler.wait_for(text)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), make(sampler, max_steps_off_policy=0) as pipeline:
        text = text_of(pipeline, 0)
        sampler.hold(text)
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        next(pipeline)
    interrupter.join()
    assert sampler.under_way == 0
    with pytest.raises(SessionError, match="closed"):
        next(pipeline)


def test_weights_that_were_given_up_leave_the_step_of_the_checkpoint(tmp_path) -> None:
    model = fitrl.TrainableModel("given-up", "p", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        groups = fitrl.rollout(trainer.sampler(model), TASKS[:6], reward=Rising(), max_new_tokens=3, seed=1)
        assert trainer.fit_rl(model, groups).step == 1
        with torch.no_grad():
            next(trainer.lightning_module.parameters()).fill_(torch.nan)
        with pytest.raises(NonFiniteGradientError):
            trainer.fit_rl(model, groups)
        assert model.step == 1  # by which the next batch is noted


def test_what_the_run_folder_cannot_hold_is_an_error(tmp_path) -> None:
    model = fitrl.TrainableModel("odd", "p", "tiny", root=tmp_path)

    async def agent(chat, task):
        return fitrl.Trajectory(
            messages_and_choices=[await chat([{"role": "user", "content": task}])], metadata={"a": {1}}
        )

    with make(FakeSampler(), agent=agent, model=model) as pipeline, pytest.raises(DataError, match="metadata.a"):
        next(pipeline)


@pytest.mark.parametrize("lora", [None, fitrl.LoraSettings(rank=4)])
@pytest.mark.parametrize("every", [1, 3])
def test_after_a_gradient_that_was_not_finite_it_goes_on_from_the_checkpoint(tmp_path, lora, every) -> None:
    model = fitrl.TrainableModel("not-finite", "p", "tiny", lora=lora, root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        sampler = trainer.sampler(model, own_weights=True)
        options = {
            "reward": Rising(),
            "group_size": 2,
            "groups_per_step": 3,
            "max_new_tokens": 3,
            "max_failed_groups": 0,
        }
        trained: dict[int, list[int]] = {}
        spoiled = 0
        with fitrl.RolloutPipeline(sampler, TASKS, model=model, **options) as pipeline:
            for groups in pipeline:
                step = model.step
                if step == 4 and not spoiled:
                    spoiled = 1
                    with torch.no_grad():
                        next(p for p in trainer.lightning_module.parameters() if p.requires_grad).fill_(torch.nan)
                    with pytest.raises(NonFiniteGradientError):
                        trainer.fit_rl(model, groups)
                    assert sampler.version == model.step == (4 if every == 1 else 3)
                    same = trainer.sampler(model)
                    said = [
                        asyncio.run(s.sample(list(b"3+4="), n=4, seed=1, max_new_tokens=4)) for s in (sampler, same)
                    ]
                    assert said[0] == said[1]  # the weights of the checkpoint, on both sides
                    continue
                trained[step] = numbers(groups)
                trainer.fit_rl(model, groups, learning_rate=1e-4, save_checkpoint=model.step % every == every - 1)
                if model.step == 7:
                    break
        assert trainer.sampler(model, own_weights=True) is sampler
        assert pipeline.dropped.keys() <= {"stale"}
    handed = [number for step in range(7) for number in trained[step]]
    assert len(set(handed)) == len(handed) == 21


def test_a_sampler_that_was_not_given_the_newest_weights_is_noticed(tmp_path) -> None:
    model = fitrl.TrainableModel("behind", "p", "tiny", root=tmp_path)
    with make(FakeSampler(), model=model) as pipeline:
        next(pipeline)
        model.step = 1  # and nobody told the sampler
        with pytest.raises(SamplerError, match="version 0 of the weights, the policy is at step 1"):
            next(pipeline)


def test_a_new_one_goes_on_with_the_groups_that_were_not_handed_out() -> None:
    handed = []
    state: dict = {}
    for _ in range(3):
        sampler = FakeSampler()
        with make(sampler) as pipeline:
            assert pipeline.state_dict() == {}
            pipeline.load_state_dict(state)
            slow = pipeline.state_dict().get("floor", 0)
            sampler.hold(text_of(pipeline, slow))
            handed += numbers(next(pipeline)) + numbers(next(pipeline))
            state = pipeline.state_dict()
            with pytest.raises(SessionError, match="a new pipeline"):
                pipeline.load_state_dict(state)
    assert state["floor"] == 0 and handed == list(range(1, 13))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": iter(["1"])}, "tasks must be a list, .*got list_iterator"),
        ({"tasks": {"prompt": "1"}}, "tasks must be a list, .*got dict"),
        ({"max_steps_off_policy": 0.5}, "max_steps_off_policy must be a whole number, got 0.5"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"groups_per_step": 0}, "groups_per_step"),
        ({"max_steps_off_policy": -1}, "max_steps_off_policy must be at least 0"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_failed_groups": -1}, "max_failed_groups"),
        ({"attempt_timeout_s": 0.0}, "attempt_timeout_s must be positive"),
        ({"on_weight_change": "wait"}, "'continue' or 'restart', got 'wait'"),
        ({"group_size": 1, "max_resamples_of_flat_groups": 1}, "always flat"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_arguments(options, says) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        make(FakeSampler(), **options)


def test_a_sampler_that_waits_while_its_trainer_trains_is_refused(tiny_policy) -> None:
    with pytest.raises(InvalidArgumentError, match="own_weights=True"):
        make(fitrl.TransformersSampler(tiny_policy))
