"""`rollout`: tasks to groups, with any sampler, reward and agent."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import contextvars
import dataclasses
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from fitrl.data import ranks
from fitrl.data.completion import Completion, Message, Tool
from fitrl.data.gather import gather
from fitrl.data.groups import Trajectory, TrajectoryGroup
from fitrl.data.tokens import render_prompt
from fitrl.errors import DataError, InvalidArgumentError
from fitrl.rollout.sampler import ChatSampler, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Task: TypeAlias = Any
Reward: TypeAlias = Callable[[Any, Trajectory], "float | Awaitable[float]"]
_T = TypeVar("_T")
_LISTEN_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A sampler with its settings, as agents see it: messages in, a completion out.

    Attributes:
        sampler: what answers.
        max_new_tokens: longest answer, in tokens.
        temperature: sampling temperature.
        top_p: see `Sampler.sample`.
        top_k: see `Sampler.sample`.
        stop: see `Sampler.sample`.
        seed: of this rollout; None: fresh.
    """

    sampler: Sampler
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    async def __call__(
        self, messages: Sequence[Message | Completion], *, tools: list[Tool] | None = None
    ) -> Completion:
        """Sample the assistant's next message.

        Earlier completions keep their token ids: where the chat template extends them, the prompt is the ids that
        the policy has seen and said, plus the new messages, so that all turns are one history.
        """
        turns = sum(isinstance(item, Completion) for item in messages)
        settings: dict[str, Any] = {
            "n": 1,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop,
            "seed": None if self.seed is None else self.seed + turns,
        }
        if isinstance(self.sampler, ChatSampler):
            [completion] = await self.sampler.sample_chat(messages, tools=tools, **settings)
        else:
            ids = prompt_ids(_tokenizer(self.sampler), messages, tools)
            [completion] = await self.sampler.sample(ids, **settings)
        return completion


Agent: TypeAlias = Callable[[Chat, Any], Awaitable[Trajectory]]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message | Completion],
    tools: list[Tool] | None = None,
) -> list[int]:
    """Token ids to sample the next message after; the last completion's own ids are kept if they can be.

    They can be where the template renders that completion as its prompt, its text, and something that follows; special
    tokens that were said, and that its text leaves out, count as text.
    """
    plain = [item.message if isinstance(item, Completion) else item for item in messages]
    rendered = render_prompt(tokenizer, plain, tools)
    said = {index: item for index, item in enumerate(messages) if isinstance(item, Completion)}
    if not said:
        return rendered
    last = said[max(said)]
    if last.token_ids is None or last.prompt_ids is None:
        return rendered
    seen: list[int] = [*last.prompt_ids, *last.token_ids]
    found = _extended(tokenizer, seen, rendered)
    if found is None:
        verbatim = [_as_said(tokenizer, said[n]) if n in said else message for n, message in enumerate(plain)]
        found = _extended(tokenizer, seen, render_prompt(tokenizer, verbatim, tools)) if verbatim != plain else None
    return rendered if found is None else found


def _extended(tokenizer: PreTrainedTokenizerBase, seen: list[int], rendered: list[int]) -> list[int] | None:
    """What was seen, and what a rendered conversation has behind it; None where that begins with something else."""

    def length(count: int) -> int:
        return len(str(tokenizer.decode(rendered[:count])))

    before, start = str(tokenizer.decode(seen)), len(seen)
    # of a character that was cut off, the ids that stand for it in a text come one by one: the last place counts
    if rendered[:start] != seen or length(start + 1) == len(before):
        start = bisect.bisect_right(range(len(rendered) + 1), len(before), key=length) - 1
        if str(tokenizer.decode(rendered[:start])) != before:
            return None
    return seen + rendered[start:]


def _as_said(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> Message:
    """A completion's message with all of its tokens as text, but for the one that ended it."""
    ids = list(completion.token_ids or ())
    if completion.message.get("tool_calls") or not set(ids) & set(tokenizer.all_special_ids):
        return completion.message
    ended = completion.finish_reason == "stop" and ids[-1] in tokenizer.all_special_ids
    return completion.message | {"content": str(tokenizer.decode(ids[:-1] if ended else ids))}


def rollout(
    sampler: Sampler,
    tasks: Iterable[Task],
    *,
    reward: Reward,
    group_size: int = 8,
    agent: Agent | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    max_concurrency: int | None = None,
    max_exceptions: int | float = 0,
    progress: bool | str = False,
) -> list[TrajectoryGroup]:
    """Attempt each task `group_size` times and return one group per task.

    With several ranks, once a trainer has connected them, each attempts its share of the tasks and all return all
    groups; they have to be given the same tasks.

    Args:
        sampler: what answers, `trainer.sampler(model)` say.
        tasks: each a prompt string, a list of chat messages, a mapping with "messages" or "prompt", or anything
            your `agent` understands.
        reward: `reward(task, trajectory) -> float`, sync or async.
        group_size: attempts per task.
        agent: `await agent(chat, task) -> Trajectory`, for several turns, tools, environments; `chat(messages)`
            samples the next message. None: one turn. The reward is set afterwards.
        max_new_tokens: longest answer, in tokens.
        temperature: sampling temperature.
        top_p: see `Sampler.sample`.
        top_k: see `Sampler.sample`.
        stop: see `Sampler.sample`.
        seed: makes the rollouts repeatable; None: fresh ones, from torch's global RNG.
        max_concurrency: how many attempts run at once; None: all.
        max_exceptions: how many attempts may raise, see `gather`.
        progress: show a progress bar.

    Raises:
        GroupError: too many attempts raised.
        DataError: a task that needs an agent.
    """
    return run_blocking(
        rollout_async(
            sampler,
            tasks,
            reward=reward,
            group_size=group_size,
            agent=agent,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop,
            seed=seed,
            max_concurrency=max_concurrency,
            max_exceptions=max_exceptions,
            progress=progress,
        )
    )


async def rollout_async(
    sampler: Sampler,
    tasks: Iterable[Task],
    *,
    reward: Reward,
    group_size: int = 8,
    agent: Agent | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    max_concurrency: int | None = None,
    max_exceptions: int | float = 0,
    progress: bool | str = False,
) -> list[TrajectoryGroup]:
    """`rollout` for code that has an event loop."""
    if group_size < 1:
        raise InvalidArgumentError(f"group_size must be at least 1, got {group_size}")
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise InvalidArgumentError(f"stop must be a list of strings, got {stop!r}")

    tasks = list(tasks)
    if seed is None and ranks.world_size() > 1:
        seed = int(
            ranks.collect(str(int(torch.randint(2**40, ()))), of_rollouts=True)[0]
        )  # ranks may have drawn the same numbers so far

    chat = Chat(
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=tuple(stop),
    )

    def start(task: Task, number: int) -> Coroutine[Any, Any, Trajectory]:
        seeded = dataclasses.replace(chat, seed=None if seed is None else attempt_seed(seed, number))
        return attempt(seeded, task, reward=reward, agent=agent)

    groups = [
        TrajectoryGroup([start(task, index * group_size + i) for i in range(group_size)])
        for index, task in ranks.share_of(list(enumerate(tasks)), of_rollouts=True)
    ]
    attempts = gather(groups, max_concurrency=max_concurrency, max_exceptions=max_exceptions, progress=progress)
    return await attempts if ranks.world_size() == 1 else await _exchanged(attempts, len(tasks))


async def attempt(chat: Chat, task: Task, *, reward: Reward, agent: Agent | None = None) -> Trajectory:
    """Make one attempt at a task and reward it."""
    trajectory = await (agent or one_turn)(chat, task)
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"a rollout returned {type(trajectory).__name__} instead of a Trajectory")
    value = reward(task, trajectory)
    trajectory.reward = float(await value if inspect.isawaitable(value) else value)
    return trajectory


def attempt_seed(seed: int, number: int) -> int:
    """Seed of an attempt, by its number in a call of `rollout`; each turn adds one."""
    return seed * 1_000_003 + number * 1_009


async def _exchanged(attempts: Awaitable[list[TrajectoryGroup]], num_groups: int) -> list[TrajectoryGroup]:
    """Every rank's groups, in the order of the tasks."""
    text = ""
    failure: Exception | None = None
    try:
        text = "\n".join(group.to_json() for group in await attempts)
    except Exception as error:
        failure = error
    ranks.settle(failure, of_rollouts=True)
    by_rank = [said.splitlines() for said in ranks.collect(text, of_rollouts=True)]
    size = ranks.world_size()
    return [TrajectoryGroup.from_json(by_rank[index % size][index // size]) for index in range(num_groups)]


async def one_turn(chat: Chat, task: Task) -> Trajectory:
    """The agent that answers once."""
    messages, tools = read_task(task)
    completion = await chat(messages, tools=tools)
    return Trajectory(messages_and_choices=[*messages, completion], tools=tools)


def read_task(task: Task) -> tuple[list[Message], list[Tool] | None]:
    """The messages and tools of a task that comes with its own prompt.

    Raises:
        DataError: it does not.
    """
    tools = None
    if isinstance(task, Mapping):
        tools = task.get("tools")
        task = task.get("messages", task.get("prompt"))
    if isinstance(task, str):
        return [{"role": "user", "content": task}], tools
    if isinstance(task, Sequence) and task and all(isinstance(item, Mapping) for item in task):
        return [dict(item) for item in task], tools
    raise DataError(
        f"a task must be a prompt, a list of messages, or a mapping with 'messages' or 'prompt', got {task!r:.80}; "
        "pass agent= for tasks of another kind"
    )


def run_blocking(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end; in a thread of its own where this one already runs an event loop (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    caller = asyncio.current_task()
    outcome: list[_T] = []
    failure: list[BaseException] = []
    inner: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[_T]]] = []

    async def tracked() -> _T:
        task = asyncio.create_task(work)
        inner.append((asyncio.get_running_loop(), task))
        return await task

    def target() -> None:
        try:
            outcome.append(asyncio.run(tracked()))
        except BaseException as error:
            failure.append(error)

    # in this one's context: who samples in the middle of a call of fit_rl is told so
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(target,), name="fitrl-rollout")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_LISTEN_S)
            if caller is not None and caller.cancelling():  # Ctrl-C under asyncio.run, which this thread holds up
                raise asyncio.CancelledError
    except BaseException:
        for loop, task in inner:
            with contextlib.suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    if failure:
        raise failure[0]
    return outcome[0]


def _tokenizer(sampler: Sampler) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase | None = getattr(sampler, "tokenizer", None)
    if tokenizer is None:
        raise DataError(
            f"{type(sampler).__name__} has no tokenizer, which chat messages need; give it one as .tokenizer"
        )
    return tokenizer
