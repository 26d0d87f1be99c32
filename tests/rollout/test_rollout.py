"""`rollout`: tasks to groups, with any reward and agent."""

import asyncio

import pytest

import fitrl
from fitrl.data.tokens import tokenize
from fitrl.errors import DataError, GroupError, InvalidArgumentError
from fitrl.rollout.rollout import read_task, run_blocking
from fitrl.rollout.transformers import TransformersSampler


@pytest.fixture(scope="module")
def sampler(tiny_policy) -> TransformersSampler:
    return TransformersSampler(tiny_policy)


def length(task, trajectory) -> float:
    return float(len(trajectory.completions()[-1].token_ids))


def test_groups_of_tasks(sampler) -> None:
    tasks = ["1+1=", {"prompt": "2+2=", "answer": "4"}, [{"role": "user", "content": "3+3="}]]
    groups = fitrl.rollout(sampler, tasks, reward=length, group_size=3, max_new_tokens=5, seed=1)
    assert [len(group) for group in groups] == [3, 3, 3]
    for group, content in zip(groups, ("1+1=", "2+2=", "3+3="), strict=True):
        for trajectory in group:
            assert trajectory.messages()[0] == {"role": "user", "content": content}
            assert trajectory.reward == length(None, trajectory)
    again = fitrl.rollout(sampler, tasks, reward=length, group_size=3, max_new_tokens=5, seed=1)
    assert [t.completions() for g in groups for t in g] == [t.completions() for g in again for t in g]
    assert len({t.completions()[0].token_ids for t in groups[0]}) > 1  # attempts differ


def test_async_rewards_and_the_task_they_see(sampler) -> None:
    seen = []

    async def reward(task, trajectory) -> float:
        await asyncio.sleep(0)
        seen.append(task["id"])
        return task["id"]

    tasks = [{"prompt": "1+1=", "id": 5.0}, {"prompt": "1+1=", "id": 6.0}]
    groups = fitrl.rollout(sampler, tasks, reward=reward, group_size=2, max_new_tokens=2)
    assert sorted(seen) == [5.0, 5.0, 6.0, 6.0] and [group.rewards for group in groups] == [[5.0, 5.0], [6.0, 6.0]]


def test_an_agent_of_several_turns_is_one_history(sampler, tiny_tokenizer) -> None:
    async def agent(chat, task):
        messages = [{"role": "user", "content": task}]
        for _ in range(3):
            messages.append(await chat(messages))
            messages.append({"role": "user", "content": "again"})
        return fitrl.Trajectory(messages_and_choices=messages)

    groups = fitrl.rollout(sampler, ["1+1="], reward=length, group_size=4, agent=agent, max_new_tokens=6, seed=2)
    for trajectory in groups[0]:
        said = trajectory.completions()
        tokenized = tokenize(trajectory, tiny_tokenizer)
        if all(c.finish_reason == "stop" for c in said[:-1]):
            [history] = tokenized.histories
            assert tokenized.num_splits == 0
            assert history.token_ids[history.mask].tolist() == [i for c in said for i in c.token_ids]
        for earlier, later in zip(said, said[1:], strict=False):
            if earlier.finish_reason == "stop":
                seen = (*earlier.prompt_ids, *earlier.token_ids)
                assert later.prompt_ids[: len(seen)] == seen


def test_exceptions_are_counted(sampler) -> None:
    calls = []

    def reward(task, trajectory) -> float:
        calls.append(task)
        if len(calls) <= 2:
            raise ValueError("no reward today")
        return 1.0

    options = {"group_size": 4, "max_new_tokens": 2}
    with pytest.raises(GroupError, match="no reward today"):
        fitrl.rollout(sampler, ["1+1="], reward=reward, max_exceptions=1, **options)
    calls.clear()
    [group] = fitrl.rollout(sampler, ["1+1="], reward=reward, max_exceptions=0.5, **options)
    assert len(group) == 2 and [record.type for record in group.exceptions] == ["ValueError"] * 2


def test_works_where_an_event_loop_runs_already(sampler) -> None:
    async def notebook():
        return fitrl.rollout(sampler, ["1+1="], reward=length, group_size=2, max_new_tokens=2)

    [group] = asyncio.run(notebook())
    assert len(group) == 2

    async def fails() -> None:
        raise KeyError("inside")

    async def notebook_that_fails():
        return run_blocking(fails())

    with pytest.raises(KeyError, match="inside"):
        asyncio.run(notebook_that_fails())


def test_rollout_async(sampler) -> None:
    [group] = asyncio.run(
        fitrl.rollout_async(sampler, ["1+1="], reward=length, group_size=2, max_new_tokens=2, max_concurrency=1)
    )
    assert len(group) == 2


def test_bad_tasks_and_arguments(sampler) -> None:
    for task in (7, [], {"question": "x"}, ["a", "b"]):
        with pytest.raises(DataError, match="pass agent="):
            read_task(task)
    with pytest.raises(InvalidArgumentError, match="group_size"):
        fitrl.rollout(sampler, ["1+1="], reward=length, group_size=0)

    class NoTokenizer:
        version = 0

        async def sample(self, prompt_ids, **options):
            raise AssertionError

    with pytest.raises(GroupError, match="has no tokenizer"):
        fitrl.rollout(NoTokenizer(), ["1+1="], reward=length, group_size=1)
