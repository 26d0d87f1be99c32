"""`rollout`: tasks to groups, with any reward and agent."""

import asyncio
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fitrl
from fitrl.data.tokens import tokenize
from fitrl.errors import DataError, GroupError, InvalidArgumentError
from fitrl.rollout.rollout import prompt_ids, read_task, run_blocking
from fitrl.rollout.sampler import Sampler
from fitrl.rollout.transformers import TransformersSampler
from helpers import END, completion, decode, user


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


@given(turns=st.lists(st.lists(st.integers(0, 261).filter(lambda token: token != END), max_size=6), max_size=3))
@example(turns=[[258], [54, 257, 258]])  # special tokens, which texts leave out
@example(turns=[[0xE2, 258, 0x82], []])  # and a character that is none
@example(turns=[[55], [0xE2, 0x82]])  # or is cut off
@example(turns=[[], [0xEF]])  # as that which stands for it begins
def test_whatever_was_said_is_kept_by_its_ids(tiny_tokenizer, turns) -> None:
    messages = [user("3+4=")]
    for number, said in enumerate(turns):
        ids = said if number % 2 else [*said, END]  # every second one was cut off
        before = prompt_ids(tiny_tokenizer, messages)
        text = tiny_tokenizer.decode(ids, skip_special_tokens=True)
        reason = "length" if number % 2 else "stop"
        messages.append(completion(text, token_ids=ids, prompt_ids=before, finish_reason=reason))
        messages.append(user("more"))
        behind = [257, *b"more", END, 258]
        assert prompt_ids(tiny_tokenizer, messages) == [*before, *said, END, *behind]


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


# -- with a sampler that says what it is told to --------------------------------------------------------------------


class Scripted:
    """Answers in order, and keeps what it was asked."""

    version = 4

    def __init__(self, tokenizer, answers) -> None:
        self.tokenizer = tokenizer
        self.answers = iter(answers)
        self.asked: list[dict] = []

    async def sample(self, prompt_ids, **options):
        self.asked.append({"prompt": decode(self.tokenizer, prompt_ids), **options})
        text = next(self.answers)
        ids = (*text.encode(), 260)
        return [
            fitrl.Completion(
                message={"role": "assistant", "content": text},
                token_ids=ids,
                logprobs=(-0.5,) * len(ids),
                temperature=options["temperature"],
                prompt_ids=tuple(prompt_ids),
                version=self.version,
            )
        ]

    def update(self, weights, version) -> None:
        raise AssertionError("nobody trains here")


def is_seven(task, trajectory) -> float:
    return float(trajectory.completions()[-1].text == "7")


def test_any_sampler_will_do_and_gets_every_setting(tiny_tokenizer) -> None:
    scripted = Scripted(tiny_tokenizer, ["7", "8"])
    assert isinstance(scripted, Sampler)
    settings = {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    [group] = fitrl.rollout(
        scripted, ["3+4="], reward=is_seven, group_size=2, stop=["\n"], max_concurrency=1, **settings
    )
    assert group.rewards == [1.0, 0.0]
    assert [completion.version for trajectory in group for completion in trajectory.completions()] == [4, 4]
    for asked in scripted.asked:
        assert asked == {
            "prompt": "<|user|>3+4=<|end|><|assistant|>",
            "n": 1,
            "stop": ("\n",),
            "seed": None,
            **settings,
        }


def test_tools_of_a_task_are_rendered_and_kept(tiny_tokenizer) -> None:
    scripted = Scripted(tiny_tokenizer, ["7"])
    tools = [{"type": "function", "function": {"name": "add"}}]
    task = {"messages": [{"role": "user", "content": "3+4="}], "tools": tools}
    [group] = fitrl.rollout(scripted, [task], reward=is_seven, group_size=1)
    assert '"name": "add"' in scripted.asked[0]["prompt"]
    assert group.trajectories[0].tools == tools
    [history] = tokenize(group.trajectories[0], tiny_tokenizer).histories
    assert decode(tiny_tokenizer, history.token_ids) == scripted.asked[0]["prompt"] + "7<|end|>"


def test_tasks_may_come_from_a_generator_and_are_not_changed(tiny_tokenizer) -> None:
    scripted = Scripted(tiny_tokenizer, "abcd")
    messages = [{"role": "user", "content": "?"}]
    groups = fitrl.rollout(scripted, (messages for _ in range(2)), reward=is_seven, group_size=2, max_concurrency=1)
    assert [[t.completions()[0].text for t in group] for group in groups] == [["a", "b"], ["c", "d"]]
    assert messages == [{"role": "user", "content": "?"}]
    assert fitrl.rollout(scripted, [], reward=is_seven) == []


def test_every_attempt_and_every_turn_has_a_seed_of_its_own(tiny_tokenizer) -> None:
    async def agent(chat, task):
        messages = [{"role": "user", "content": task}]
        for _ in range(3):
            messages += [await chat(messages), {"role": "user", "content": "again"}]
        return fitrl.Trajectory(messages_and_choices=messages)

    def seeds(seed) -> list[int]:
        scripted = Scripted(tiny_tokenizer, ["7"] * 24)
        fitrl.rollout(scripted, ["a", "b"], reward=is_seven, group_size=4, agent=agent, seed=seed, max_concurrency=1)
        return [asked["seed"] for asked in scripted.asked]

    assert seeds(3) == seeds(3)
    assert len(set(seeds(3)) | set(seeds(4)) | set(seeds(0))) == 3 * 24
    assert seeds(None) == [None] * 24


def test_a_large_seed(sampler) -> None:
    runs = [
        fitrl.rollout(sampler, ["1+1="], reward=length, group_size=2, max_new_tokens=3, seed=2**62) for _ in range(2)
    ]
    assert [t.completions() for g in runs[0] for t in g] == [t.completions() for g in runs[1] for t in g]


def test_the_agent_sees_the_task_as_it_is_and_sets_what_it_likes(tiny_tokenizer) -> None:
    task = object()

    async def agent(chat, seen):
        assert seen is task
        said = await chat([{"role": "user", "content": "3+4="}])
        helper = await chat([{"role": "user", "content": "check"}])
        return fitrl.Trajectory(
            messages_and_choices=[{"role": "user", "content": "3+4="}, said],
            additional_histories=[fitrl.History(messages_and_choices=[{"role": "user", "content": "check"}, helper])],
            metrics={"turns": 2.0},
        )

    [group] = fitrl.rollout(
        Scripted(tiny_tokenizer, ["7", "ok"]),
        [task],
        reward=lambda seen, trajectory: float(seen is task and len(trajectory.completions()) == 2),
        agent=agent,
        group_size=1,
    )
    assert group.rewards == [1.0]
    assert group.trajectories[0].metrics == {"turns": 2.0}


def test_an_agent_that_calls_tools_is_one_history(tiny_tokenizer) -> None:
    async def agent(chat, task):
        messages = [{"role": "user", "content": task}]
        messages.append(await chat(messages))
        messages.append({"role": "tool", "content": "7"})
        messages.append(await chat(messages))
        return fitrl.Trajectory(messages_and_choices=messages)

    [group] = fitrl.rollout(
        Scripted(tiny_tokenizer, ["add(3,4)", "7"]), ["3+4="], reward=is_seven, agent=agent, group_size=1
    )
    [history] = tokenize(group.trajectories[0], tiny_tokenizer).histories
    assert decode(tiny_tokenizer, history.token_ids) == (
        "<|user|>3+4=<|end|><|assistant|>add(3,4)<|end|><|tool|>7<|end|><|assistant|>7<|end|>"
    )
    assert decode(tiny_tokenizer, history.token_ids[history.mask]) == "add(3,4)<|end|>7<|end|>"


def test_an_agent_that_returns_nothing_is_told_so(tiny_tokenizer) -> None:
    """And not by an AttributeError inside the reward function."""

    async def forgetful(chat, task):
        await chat([{"role": "user", "content": task}])

    with pytest.raises(GroupError, match="NoneType instead of a Trajectory"):
        fitrl.rollout(Scripted(tiny_tokenizer, ["7"]), ["3+4="], reward=is_seven, agent=forgetful, group_size=1)


def test_no_more_attempts_run_at_once_than_allowed(tiny_tokenizer) -> None:
    running: list[int] = []
    most: list[int] = []

    async def agent(chat, task):
        running.append(1)
        most.append(len(running))
        said = await chat([{"role": "user", "content": task}])
        await asyncio.sleep(0)
        running.pop()
        return fitrl.Trajectory(messages_and_choices=[{"role": "user", "content": task}, said])

    fitrl.rollout(
        Scripted(tiny_tokenizer, ["7"] * 8), ["a", "b"], reward=is_seven, agent=agent, group_size=4, max_concurrency=3
    )
    assert max(most) == 3


def test_a_blocking_rollout_is_answered_while_the_outer_loop_has_a_request_waiting(sampler) -> None:
    """In a notebook, both use one sampler; the outer loop stands still until the rollout has ended."""

    async def agent(chat, task):
        said = await asyncio.wait_for(chat([{"role": "user", "content": task}]), 5)
        return fitrl.Trajectory(messages_and_choices=[{"role": "user", "content": task}, said])

    async def notebook():
        outer = asyncio.create_task(sampler.sample([7], max_new_tokens=2))

        async def blocks():
            return fitrl.rollout(sampler, ["1+1="], reward=length, agent=agent, group_size=1, max_new_tokens=2)

        inner = asyncio.create_task(blocks())  # runs in the same turn of the loop as the request before it
        return await inner, await outer

    [group], outer = asyncio.run(notebook())
    assert len(group) == len(outer) == 1


def test_a_cancelled_caller_ends_its_rollouts() -> None:
    """As Ctrl-C does under asyncio.run, while the caller's thread waits for rollouts on another."""
    ended = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(threading.current_thread().name)

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        run_blocking(endless())

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert ended == ["fitrl-rollout"]


class TakesConversations:
    """A sampler of a service that renders chat templates itself; it has no tokenizer."""

    version = 3

    def __init__(self) -> None:
        self.asked: list[tuple[list, dict]] = []

    async def sample(self, prompt_ids, **settings):
        raise AssertionError("it was asked for ids")

    async def sample_chat(self, messages, *, tools=None, **settings):
        self.asked.append((list(messages), {"tools": tools} | settings))
        return [completion("7")]

    def update(self, weights, version) -> None: ...


def test_a_sampler_that_takes_conversations_is_given_them() -> None:
    sampler = TakesConversations()
    assert isinstance(sampler, fitrl.ChatSampler) and isinstance(sampler, fitrl.Sampler)
    tasks = [{"prompt": "3+4=", "tools": [{"name": "add"}]}]
    [rolled] = fitrl.rollout(
        sampler, tasks, reward=lambda task, t: 1.0, group_size=1, temperature=0.5, top_k=3, stop=["x"], seed=1
    )
    [(messages, settings)] = sampler.asked
    assert messages == [user("3+4=")] and settings["tools"] == [{"name": "add"}]
    assert (settings["n"], settings["temperature"], settings["top_k"], settings["stop"]) == (1, 0.5, 3, ("x",))
    assert rolled.trajectories[0].completions()[0].text == "7"
