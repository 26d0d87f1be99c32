"""fitrl's groups to those of the wire and back, without loss: ids, logprobs, temperatures and versions are kept.

Enters and leaves: `fitrl.TrajectoryGroup` and `Group`. Both directions go through fitrl's own JSON form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import ValidationError

import fitrl
from fitrl.errors import DataError
from fitrl_serverless.wire import groups as wire

_TOKEN_ID = "token_id:"


def groups_to_wire(groups: Iterable[fitrl.TrajectoryGroup]) -> list[wire.Group]:
    """Put groups into the wire's form.

    Raises:
        DataError: a group is none or is pending, or holds a value that JSON cannot hold; the message says which.
    """
    return [_group_to_wire(index, group) for index, group in enumerate(groups)]


def groups_from_wire(groups: Sequence[wire.Group]) -> list[fitrl.TrajectoryGroup]:
    """Read groups of the wire.

    Raises:
        DataError: token histories whose columns have several lengths; the message says whose.
    """
    return [_group_from_wire(index, group) for index, group in enumerate(groups)]


def choice_to_wire(completion: fitrl.Completion, index: int = 0) -> wire.Choice:
    """Put what the policy said into the wire's form.

    Raises:
        DataError: tokens without logprobs that the wire has no place for, or another number of logprobs than tokens.
    """
    return wire.Choice.model_validate(_item_to_wire({"completion": completion.to_dict()}) | {"index": index})


def choice_from_wire(choice: wire.Choice, *, version: int = 0) -> fitrl.Completion:
    """Read something that the policy said.

    Args:
        choice: of a trajectory or of a chat's answer.
        version: policy version of a choice that does not tell its own.
    """
    ids = choice.token_ids
    raw: list[bytes] | None = None
    logprobs: list[float] | None = None
    if choice.logprobs is not None and choice.logprobs.content is not None:
        entries = choice.logprobs.content
        logprobs = [entry.logprob for entry in entries]
        if all(_is_token_id(entry.token) for entry in entries):
            ids = [int(entry.token.removeprefix(_TOKEN_ID)) for entry in entries]
        else:
            raw = [bytes(entry.bytes) if entry.bytes is not None else entry.token.encode() for entry in entries]
    return fitrl.Completion(
        message=choice.message,
        token_ids=None if ids is None else tuple(ids),
        token_bytes=None if raw is None else tuple(raw),
        logprobs=None if logprobs is None else tuple(logprobs),
        temperature=choice.temperature,
        prompt_ids=None if choice.prompt_token_ids is None else tuple(choice.prompt_token_ids),
        finish_reason=choice.finish_reason,
        version=choice.policy_version if choice.policy_version is not None else version,
        full_support=choice.full_support,
    )


def explain(error: ValidationError, most: int = 3) -> str:
    """What pydantic complains of, as one line that repeats no value: values may be prompts."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details[:most]]
    return "; ".join(lines) + (f"; and {len(details) - most} more" if len(details) > most else "")


def _group_to_wire(index: int, group: fitrl.TrajectoryGroup) -> wire.Group:
    if not isinstance(group, fitrl.TrajectoryGroup):
        raise DataError(f"groups[{index}] is a {type(group).__name__}, not a TrajectoryGroup")
    data = group.to_dict()
    data["trajectories"] = [
        _trajectory_to_wire(form, trajectory.policy_versions)
        for form, trajectory in zip(data["trajectories"], group.trajectories, strict=True)
    ]
    try:
        return wire.Group.model_validate(data)
    except ValidationError as error:
        raise DataError(f"group {index} cannot be sent: {explain(error)}") from error


def _trajectory_to_wire(data: dict[str, Any], versions: tuple[int, int] | None) -> dict[str, Any]:
    first, last = versions or (None, None)
    return data | {
        "messages_and_choices": [_item_to_wire(item) for item in data["messages_and_choices"]],
        "additional_histories": [
            history | {"messages_and_choices": [_item_to_wire(item) for item in history["messages_and_choices"]]}
            for history in data["additional_histories"]
        ],
        "initial_policy_version": first,
        "final_policy_version": last,
    }


def _item_to_wire(item: dict[str, Any]) -> dict[str, Any]:
    if "message" in item:
        message: dict[str, Any] = item["message"]
        return message
    said = item["completion"]
    ids, raw, logprobs = said["token_ids"], said["token_bytes"], said["logprobs"]
    content: list[dict[str, Any]] | None = None
    if logprobs is not None:
        # a wrong number of ids or logprobs is the trainer's to refuse: it must not be lost on the way
        if ids is not None and len(ids) == len(logprobs):
            content = [
                {"token": f"{_TOKEN_ID}{token}", "logprob": logprob}
                for token, logprob in zip(ids, logprobs, strict=True)
            ]
        elif ids is None and raw is not None and len(raw) == len(logprobs):
            content = [
                {"token": bytes(token).decode(errors="replace"), "bytes": token, "logprob": logprob}
                for token, logprob in zip(raw, logprobs, strict=True)
            ]
        else:
            count = len(ids if ids is not None else raw or ())
            raise DataError(f"a completion has {count} tokens but {len(logprobs)} logprobs; give one of each per token")
    elif raw is not None and ids is None:
        raise DataError("a completion has the strings of its tokens but no logprobs: ask the sampler for them")
    return {
        "finish_reason": said["finish_reason"],
        "logprobs": None if content is None else {"content": content},
        "message": said["message"],
        "token_ids": ids if content is None else None,
        "prompt_token_ids": said["prompt_ids"],
        "temperature": said["temperature"],
        "policy_version": said["version"],
        "full_support": said["full_support"],
    }


def _group_from_wire(index: int, group: wire.Group) -> fitrl.TrajectoryGroup:
    return fitrl.TrajectoryGroup(
        [_trajectory_from_wire(f"group {index}, trajectory {i}", item) for i, item in enumerate(group.trajectories)],
        metadata=group.metadata,
        metrics=group.metrics,
        logs=group.logs,
        exceptions=_records(group.exceptions),
    )


def _trajectory_from_wire(name: str, trajectory: wire.Trajectory) -> fitrl.Trajectory:
    first = trajectory.initial_policy_version
    version = first if first is not None else 0

    def read(items: Sequence[wire.Choice | wire.Message]) -> list[Any]:
        return [
            choice_from_wire(item, version=version) if isinstance(item, wire.Choice) else wire.plain(item)
            for item in items
        ]

    return fitrl.Trajectory(
        messages_and_choices=read(trajectory.messages_and_choices),
        reward=trajectory.reward,
        tools=trajectory.tools,
        temperature=trajectory.temperature,
        additional_histories=[_history(history, read) for history in trajectory.additional_histories],
        token_histories=[_token_history(name, history) for history in trajectory.token_histories],
        metrics=trajectory.metrics,
        metadata=trajectory.metadata,
        logs=trajectory.logs,
        exceptions=_records(trajectory.exceptions),
    )


def _history(history: wire.History, read: Callable[[Sequence[wire.Choice | wire.Message]], list[Any]]) -> fitrl.History:
    return fitrl.History(
        messages_and_choices=read(history.messages_and_choices), tools=history.tools, temperature=history.temperature
    )


def _token_history(name: str, history: wire.TokenHistory) -> fitrl.TokenHistory:
    lengths = {len(getattr(history, column)) for column in ("token_ids", "mask", "logprobs", "temperature", "versions")}
    if len(lengths) != 1:
        raise DataError(f"{name}: the columns of a token history have several lengths, {sorted(lengths)}")
    return fitrl.TokenHistory.from_dict(history.model_dump())


def _is_token_id(token: str) -> bool:
    digits = token.removeprefix(_TOKEN_ID)
    return token.startswith(_TOKEN_ID) and digits.isascii() and digits.isdecimal() and len(digits) < 11


def _records(records: Iterable[wire.ExceptionRecord]) -> list[fitrl.ExceptionRecord]:
    return [fitrl.ExceptionRecord(type=r.type, message=r.message, traceback=r.traceback) for r in records]
