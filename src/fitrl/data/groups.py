"""Trajectories and groups: what rollouts leave behind and `fit_rl` learns from.

Glossary
    message      a chat message as a dict: `{"role": ..., "content": ...}`, perhaps with `tool_calls`.
    completion   one message sampled from the policy, with its token ids, logprobs and temperature.
    history      one conversation: messages and completions in order.
    trajectory   one attempt at a task: a main history, perhaps additional ones, and one reward.
    group        trajectories of the same task, compared with each other.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from fitrl.data.completion import Completion, Message, OpenAIChoice, Tool
from fitrl.data.histories import History, TokenHistory, message_from_json, message_to_json, read_messages
from fitrl.data.json_lines import dump, load, number_from_json, number_to_json
from fitrl.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExceptionRecord:
    """A rollout that raised, kept with its group instead of lost."""

    type: str
    message: str
    traceback: str

    @classmethod
    def from_exception(cls, exception: BaseException) -> ExceptionRecord:
        """Record `exception` with its traceback as text."""
        lines = traceback.format_exception(type(exception), exception, exception.__traceback__)
        return cls(type=type(exception).__qualname__, message=str(exception), traceback="".join(lines))

    def to_dict(self) -> dict[str, str]:
        """JSON-ready form."""
        return {"type": self.type, "message": self.message, "traceback": self.traceback}


@dataclass(slots=True, init=False)
class Trajectory:
    """One attempt at a task, with its reward.

    Attributes:
        messages_and_choices: the main history: chat messages as dicts, and what the policy said as
            `Completion` or OpenAI `Choice` objects (read into completions at construction). Only
            completions are trained on, unless `allow_training_without_logprobs=True`.
        reward: how good the attempt was, as a float; compared within its group.
        tools: tools offered to the model, as chat templates take them.
        temperature: sampling temperature of the OpenAI choices, which do not carry it themselves.
        additional_histories: further conversations of the same attempt (sub-agents, a compacted
            context); trained with the same reward.
        token_histories: the attempt as token ids, when it was made without chat messages; takes the
            place of the conversations.
        metrics: numbers to log; averaged over trajectories by `model.log`.
        metadata: JSON values to keep.
        logs: lines to keep.
        exceptions: errors that the attempt survived; kept as records.

    Raises:
        DataError: a reward that is no number, or something else than messages and what the policy said.

    Example:
        >>> Trajectory(
        ...     messages_and_choices=[{"role": "user", "content": "3+4="}, completion],
        ...     reward=float(completion.text == "7"),
        ... )  # doctest: +SKIP
    """

    messages_and_choices: list[Message | Completion | OpenAIChoice]
    reward: float
    tools: list[Tool] | None
    temperature: float | None
    additional_histories: list[History]
    token_histories: list[TokenHistory]
    metrics: dict[str, float]
    metadata: dict[str, Any]
    logs: list[str]
    exceptions: list[ExceptionRecord]

    def __init__(
        self,
        *,
        messages_and_choices: Sequence[Message | Completion | OpenAIChoice] = (),
        reward: SupportsFloat = 0.0,
        tools: list[Tool] | None = None,
        temperature: float | None = None,
        additional_histories: Iterable[History] = (),
        token_histories: Iterable[TokenHistory] = (),
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        logs: Iterable[str] = (),
        exceptions: Iterable[ExceptionRecord | BaseException] = (),
    ) -> None:
        self.messages_and_choices = [*read_messages(messages_and_choices, temperature)]
        self.reward = _number(reward)
        self.tools = tools
        self.temperature = temperature
        self.additional_histories = list(additional_histories)
        self.token_histories = list(token_histories)
        self.metrics = dict(metrics or {})
        self.metadata = dict(metadata or {})
        self.logs = list(logs)
        self.exceptions = _records(exceptions)

    def histories(self) -> list[History]:
        """The main history and the additional ones."""
        return [self._main(), *self.additional_histories] if self.messages_and_choices else [*self.additional_histories]

    def _main(self) -> History:
        return History(messages_and_choices=self.messages_and_choices, tools=self.tools, temperature=self.temperature)

    def messages(self) -> list[Message]:
        """The main history as plain chat messages, ready to be sent to a model again."""
        return self._main().messages()

    def completions(self) -> list[Completion]:
        """Everything that the policy said, over all histories."""
        return [item for history in self.histories() for item in history.items() if isinstance(item, Completion)]

    @property
    def policy_versions(self) -> tuple[int, int] | None:
        """First and last policy version that sampled a token; None when nothing was sampled."""
        versions = [version for completion in self.completions() for version in completion.policy_versions]
        for history in self.token_histories:
            versions += history.versions[history.versions >= 0].tolist()
        return (min(versions), max(versions)) if versions else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "messages_and_choices": [message_to_json(item) for item in self._main().items()],
            "reward": number_to_json(_number(self.reward)),
            "tools": self.tools,
            "temperature": self.temperature,
            "additional_histories": [history.to_dict() for history in self.additional_histories],
            "token_histories": [history.to_dict() for history in self.token_histories],
            "metrics": _metrics_to_json(self.metrics),
            "metadata": self.metadata,
            "logs": self.logs,
            "exceptions": [record.to_dict() for record in _records(self.exceptions)],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trajectory:
        """Inverse of `to_dict`."""
        return cls(
            messages_and_choices=[message_from_json(item) for item in data["messages_and_choices"]],
            reward=number_from_json(data["reward"]),
            tools=data["tools"],
            temperature=data["temperature"],
            additional_histories=[History.from_dict(item) for item in data["additional_histories"]],
            token_histories=[TokenHistory.from_dict(item) for item in data["token_histories"]],
            metrics=_metrics_from_json(data["metrics"]),
            metadata=data["metadata"],
            logs=data["logs"],
            exceptions=[ExceptionRecord(**item) for item in data["exceptions"]],
        )

    def to_json(self) -> str:
        """One line of JSON, without loss.

        Raises:
            DataError: a value that JSON cannot hold; the message says which.
        """
        return dump(self.to_dict(), "trajectory")

    @classmethod
    def from_json(cls, text: str) -> Trajectory:
        """Inverse of `to_json`.

        Raises:
            DataError: the text is no JSON of a trajectory.
        """
        return load(text, cls.from_dict, "trajectory")


class TrajectoryGroup:
    """Trajectories of one task; advantages compare them with each other.

    Args:
        trajectories: the group's trajectories, or awaitables of them, which only `fitrl.gather` resolves.
        metadata: JSON values to keep with the group.
        metrics: numbers to log with the group.
        logs: lines to keep.
        exceptions: rollouts of the group that raised; kept as records.
    """

    __slots__ = ("exceptions", "logs", "metadata", "metrics", "pending", "trajectories")

    def __init__(
        self,
        trajectories: Iterable[Trajectory | Awaitable[Trajectory]] = (),
        /,
        *,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        logs: Iterable[str] = (),
        exceptions: Iterable[ExceptionRecord | BaseException] = (),
    ) -> None:
        self.trajectories: list[Trajectory] = []
        self.pending: list[Awaitable[Trajectory]] = []
        for item in trajectories:
            if isinstance(item, Trajectory):
                self.trajectories.append(item)
            elif isinstance(item, Awaitable):
                self.pending.append(item)
            else:
                raise DataError(
                    f"a group takes trajectories or awaitables of them, got {type(item).__name__}: {item!r:.80}"
                )
        self.metadata = dict(metadata or {})
        self.metrics = dict(metrics or {})
        self.logs = list(logs)
        self.exceptions = _records(exceptions)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    def __len__(self) -> int:
        return len(self.trajectories)

    def __repr__(self) -> str:
        waiting = f", {len(self.pending)} pending" if self.pending else ""
        failed = f", {len(self.exceptions)} exceptions" if self.exceptions else ""
        return f"TrajectoryGroup({len(self.trajectories)} trajectories{waiting}{failed})"

    @property
    def rewards(self) -> list[float]:
        """One reward per trajectory.

        Raises:
            DataError: one is no number; the message says whose.
        """
        return [_number(trajectory.reward, f" of trajectory {i}") for i, trajectory in enumerate(self.trajectories)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; a group with pending trajectories has none."""
        if self.pending:
            raise DataError(f"{self!r} still has pending trajectories: await fitrl.gather([group]) first")
        return {
            "trajectories": [trajectory.to_dict() for trajectory in self.trajectories],
            "metadata": self.metadata,
            "metrics": _metrics_to_json(self.metrics),
            "logs": self.logs,
            "exceptions": [record.to_dict() for record in _records(self.exceptions)],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrajectoryGroup:
        """Inverse of `to_dict`."""
        return cls(
            [Trajectory.from_dict(item) for item in data["trajectories"]],
            metadata=data["metadata"],
            metrics=_metrics_from_json(data["metrics"]),
            logs=data["logs"],
            exceptions=[ExceptionRecord(**item) for item in data["exceptions"]],
        )

    def to_json(self) -> str:
        """One line of JSON, without loss; exceptions included. Raises as a trajectory's does."""
        return dump(self.to_dict(), "group")

    @classmethod
    def from_json(cls, text: str) -> TrajectoryGroup:
        """Inverse of `to_json`.

        Raises:
            DataError: the text is no JSON of a group.
        """
        return load(text, cls.from_dict, "group")


def _number(reward: Any, whose: str = "") -> float:
    """A reward as a float; numpy's and torch's scalars are numbers too."""
    try:
        if not isinstance(reward, str):
            return float(reward)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise DataError(f"the reward{whose} must be a number, got {reward!r:.80}")


def _records(exceptions: Iterable[ExceptionRecord | BaseException]) -> list[ExceptionRecord]:
    return [ExceptionRecord.from_exception(item) if isinstance(item, BaseException) else item for item in exceptions]


def _metrics_to_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as floats and ints that JSON can hold; scalars of numpy and torch become floats."""
    return {
        key: number_to_json(float(value)) if isinstance(value, SupportsFloat) and not isinstance(value, int) else value
        for key, value in metrics.items()
    }


def _metrics_from_json(metrics: Mapping[str, float | str]) -> dict[str, float]:
    return {key: number_from_json(value) for key, value in metrics.items()}
