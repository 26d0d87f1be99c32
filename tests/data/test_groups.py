"""Trajectories and groups: what they take, and that JSON loses nothing."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.chat_completion import ChatCompletion, Choice
from transformers import PreTrainedTokenizerBase

from fitrl.data.completion import Completion
from fitrl.data.groups import ExceptionRecord, Trajectory, TrajectoryGroup
from fitrl.data.histories import History, TokenHistory
from fitrl.data.tokens import tokenize
from fitrl.errors import DataError, FitRLError
from helpers import completion, facts, group, token_history, trajectory, user

# -- any trajectory at all ------------------------------------------------------------------------------------------

TEXT = st.text(max_size=12)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXT, JSON_VALUES, max_size=3)
LOGPROBS = st.floats(max_value=0.0, width=32) | st.just(math.nan)


def _messages() -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda role, content, extra: {**extra, "role": role, "content": content},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.none() | TEXT,
        OBJECTS,
    )


def _tuples(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...] | None]:
    return st.none() | st.lists(values, max_size=5).map(tuple)


def _completions() -> st.SearchStrategy[Completion]:
    return st.builds(
        Completion,
        message=_messages(),
        token_ids=_tuples(st.integers(0, 2**31 - 1)),
        token_bytes=_tuples(st.binary(max_size=5)),
        logprobs=_tuples(LOGPROBS),
        temperature=st.none() | st.floats(0.0, 5.0),
        prompt_ids=_tuples(st.integers(0, 2**31 - 1)),
        finish_reason=st.sampled_from(["stop", "length", "tool_calls"]),
        version=st.integers(0, 10**6),
        full_support=st.booleans(),
    )


def _histories() -> st.SearchStrategy[History]:
    return st.builds(
        History,
        messages_and_choices=st.lists(_messages() | _completions(), max_size=3),
        tools=st.none() | st.lists(OBJECTS, max_size=2),
        temperature=st.none() | st.floats(0.0, 5.0),
    )


@st.composite
def _token_histories(draw: st.DrawFn) -> TokenHistory:
    length = draw(st.integers(0, 6))

    def column(values: st.SearchStrategy[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(draw(st.lists(values, min_size=length, max_size=length)), dtype=dtype)

    return TokenHistory(
        token_ids=column(st.integers(0, 2**62), torch.int64),
        mask=column(st.booleans(), torch.bool),
        logprobs=column(LOGPROBS, torch.float32),
        temperature=column(st.floats(0.0, 5.0, width=32), torch.float32),
        versions=column(st.integers(-1, 2**62), torch.int64),
        full_support=draw(st.booleans()),
    )


RECORDS = st.builds(ExceptionRecord, type=TEXT, message=TEXT, traceback=TEXT)
METRICS = st.dictionaries(TEXT, st.floats() | st.integers(), max_size=3)
TRAJECTORIES = st.builds(
    Trajectory,
    messages_and_choices=st.lists(_messages() | _completions(), max_size=4),
    reward=st.floats(),
    tools=st.none() | st.lists(OBJECTS, max_size=2),
    temperature=st.none() | st.floats(0.0, 5.0),
    additional_histories=st.lists(_histories(), max_size=2),
    token_histories=st.lists(_token_histories(), max_size=2),
    metrics=METRICS,
    metadata=OBJECTS,
    logs=st.lists(TEXT, max_size=2),
    exceptions=st.lists(RECORDS, max_size=2),
)


@given(TRAJECTORIES)
def test_a_trajectory_survives_json_without_loss(original: Trajectory) -> None:
    text = original.to_json()

    assert "\n" not in text
    assert facts(Trajectory.from_json(text)) == facts(original)


@given(st.lists(TRAJECTORIES, max_size=2), OBJECTS, METRICS, st.lists(TEXT, max_size=2), st.lists(RECORDS, max_size=2))
def test_a_group_survives_json_without_loss(
    trajectories: list[Trajectory],
    metadata: dict[str, Any],
    metrics: dict[str, float],
    logs: list[str],
    exceptions: list[ExceptionRecord],
) -> None:
    original = TrajectoryGroup(trajectories, metadata=metadata, metrics=metrics, logs=logs, exceptions=exceptions)

    assert facts(TrajectoryGroup.from_json(original.to_json())) == facts(original)


def test_numbers_that_json_lacks_are_standard_json_and_come_back() -> None:
    """Other tools read the logged trajectories, and JSON has neither NaN nor Infinity."""
    unknown = completion("7", logprobs=(math.nan, -math.inf))
    history = token_history([1, 2, 3], [0, 1, 1])
    original = TrajectoryGroup(
        [
            Trajectory(
                messages_and_choices=[unknown],
                token_histories=[history],
                additional_histories=[History()],
                reward=math.inf,
                metrics={"a": math.nan, "b": -math.inf, "c": 3},
            )
        ],
        metrics={"d": math.inf},
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    plain = json.loads(original.to_json(), parse_constant=refuse)

    assert plain["metrics"] == {"d": "Infinity"}
    assert plain["trajectories"][0]["metrics"] == {"a": "NaN", "b": "-Infinity", "c": 3}
    assert facts(TrajectoryGroup.from_json(original.to_json())) == facts(original)


def test_the_traceback_of_an_exception_survives_json() -> None:
    def fails() -> None:
        raise ValueError("the tool did not answer")

    try:
        fails()
    except ValueError as error:
        record = ExceptionRecord.from_exception(error)
    restored = TrajectoryGroup.from_json(TrajectoryGroup([], exceptions=[record]).to_json()).exceptions[0]

    assert (restored.type, restored.message) == ("ValueError", "the tool did not answer")
    assert "in fails" in restored.traceback
    assert 'raise ValueError("the tool did not answer")' in restored.traceback


LOOPED: dict[str, Any] = {}
LOOPED["again"] = LOOPED


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"environment": object()}, r"metadata\.environment is <object object at .*>, of type object"),
        ({1: "a"}, "metadata has the key 1, of type int"),
        ({"x": [{"y": (1, 2)}]}, r"metadata\.x\[0\]\.y is \(1, 2\), of type tuple"),
        ({"x": b"1"}, r"metadata\.x is b'1', of type bytes"),
        ({"score": math.nan}, r"metadata\.score is nan"),
        ({"score": np.float32(1)}, r"metadata\.score is .*, of type float32"),
        (LOOPED, r"metadata\.again.* is nested too deeply"),
    ],
)
def test_a_value_that_json_would_lose_is_an_error_that_names_it(metadata: dict[Any, Any], named: str) -> None:
    with pytest.raises(DataError, match=f"trajectory holds a value that JSON cannot hold: {named}"):
        trajectory(metadata=metadata).to_json()
    with pytest.raises(DataError, match=f"group holds a value that JSON cannot hold: {named}"):
        group([1.0], metadata=metadata).to_json()


def test_keys_of_metrics_are_strings() -> None:
    with pytest.raises(DataError, match="metrics has the key 3, of type int"):
        trajectory(metrics={3: 1.0}).to_json()
    with pytest.raises(DataError, match=r"metrics\.x is \(1,\), of type tuple"):
        trajectory(metrics={"x": (1,)}).to_json()


@pytest.mark.parametrize("text", ["{", "{}", "[]", "3", "", '{"reward": 1.0}'])
def test_text_that_is_no_record(text: str) -> None:
    with pytest.raises(DataError, match="is no trajectory"):
        Trajectory.from_json(text)
    with pytest.raises(DataError, match="is no group"):
        TrajectoryGroup.from_json(text)


@pytest.mark.parametrize("reward", [np.float32(0.5), np.int64(1), torch.tensor(0.5), torch.tensor([1]), True])
def test_scalars_of_any_kind_are_rewards(reward: Any) -> None:
    held = Trajectory(reward=reward)

    assert type(held.reward) is float and held.reward == float(reward)
    assert Trajectory.from_json(held.to_json()).reward == held.reward


@pytest.mark.parametrize("reward", [None, "1.0", [1.0], torch.zeros(2)])
def test_a_reward_is_a_number(reward: Any) -> None:
    with pytest.raises(DataError, match="the reward must be a number, got"):
        Trajectory(reward=reward)
    later = group([1.0, 0.0])
    later.trajectories[1].reward = reward
    with pytest.raises(DataError, match="the reward of trajectory 1 must be a number, got"):
        _ = later.rewards
    with pytest.raises(DataError, match="must be a number"):
        later.to_json()


def test_exceptions_become_records() -> None:
    error = ValueError("the tool did not answer")
    held = Trajectory(exceptions=[error])
    held.exceptions.append(error)  # type: ignore[arg-type]
    both = TrajectoryGroup([held], exceptions=[error])

    restored = TrajectoryGroup.from_json(both.to_json())

    assert isinstance(held.exceptions[0], ExceptionRecord)
    for record in (*restored.exceptions, *restored.trajectories[0].exceptions):
        assert (record.type, record.message) == ("ValueError", "the tool did not answer")


# -- OpenAI choices -------------------------------------------------------------------------------------------------


def _choice(message: dict[str, Any], logprobs: list[dict[str, Any]] | None, finish_reason: str = "stop") -> Choice:
    """A choice as the openai client parses it from a server's answer."""
    answer = ChatCompletion.model_validate(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": "demo",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": finish_reason,
                    "message": {"role": "assistant", **message},
                    "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
                }
            ],
        }
    )
    return answer.choices[0]


def _entry(token: str, logprob: float, raw: list[int] | None = None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": raw, "top_logprobs": []}


def test_a_choice_with_token_ids_is_read_at_construction() -> None:
    choice = _choice({"content": "7"}, [_entry("token_id:55", -0.25), _entry("token_id:260", -0.5)])

    held = Trajectory(messages_and_choices=[user("3+4="), choice], temperature=0.7, reward=1.0)

    said = held.completions()[0]
    assert said.token_ids == (55, 260)
    assert said.logprobs == (-0.25, -0.5)
    assert said.token_bytes is None
    assert said.temperature == 0.7
    assert said.finish_reason == "stop"
    assert held.messages() == [user("3+4="), {"role": "assistant", "content": "7"}]


def test_a_choice_with_token_strings_keeps_their_bytes() -> None:
    """A token may be half a character: then only its bytes tell which one it is."""
    choice = _choice({"content": "é"}, [_entry("\\xc3", -0.1, [0xC3]), _entry("\\xa9", -0.2, [0xA9]), _entry("x", -1)])

    said = Completion.from_choice(choice, temperature=1.0, version=4, full_support=False)

    assert said.token_ids is None
    assert said.token_bytes == (b"\xc3", b"\xa9", b"x")
    assert (said.version, said.full_support) == (4, False)


def test_a_choice_keeps_tool_calls_and_a_servers_own_fields() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}
    choice = _choice({"content": None, "tool_calls": [call], "reasoning_content": "3+4"}, [], "tool_calls")

    said = Completion.from_choice(choice)

    assert said.message["tool_calls"] == [call]
    assert said.message["reasoning_content"] == "3+4"
    assert said.finish_reason == "tool_calls"
    assert said.text == ""
    assert facts(Completion.from_dict(json.loads(json.dumps(said.to_dict())))) == facts(said)


def test_a_choice_without_logprobs_has_none() -> None:
    said = Completion.from_choice(_choice({"content": "7"}, None))

    assert (said.token_ids, said.token_bytes, said.logprobs) == (None, None, None)


def test_choices_in_additional_histories_are_read() -> None:
    choice = _choice({"content": "7"}, [_entry("token_id:55", -0.25)])

    held = Trajectory(additional_histories=[History(messages_and_choices=[user("?"), choice], temperature=0.5)])

    assert [said.temperature for said in held.completions()] == [0.5]


def test_a_choice_appended_later_is_read_like_the_others() -> None:
    """Agents append to `messages_and_choices` while they run, and send `messages()` to the server again."""
    held = Trajectory(messages_and_choices=[user("3+4=")], temperature=1.0)
    held.messages_and_choices.append(_choice({"content": "7"}, [_entry("token_id:55", -0.25)]))

    assert held.messages() == [user("3+4="), {"role": "assistant", "content": "7"}]
    assert held.completions()[0].token_ids == (55,)
    assert Trajectory.from_json(held.to_json()).completions()[0].token_ids == (55,)


def test_a_choice_appended_to_an_additional_history_is_read_like_the_others(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    history = History(messages_and_choices=[user("3+4=")], temperature=1.0)
    held = Trajectory(additional_histories=[history])
    history.messages_and_choices.append(_choice({"content": "7"}, [_entry("token_id:55", -0.25)]))

    assert [said.token_ids for said in held.completions()] == [(55,)]
    [tokens] = tokenize(held, tiny_tokenizer).histories
    assert tokens.token_ids[tokens.mask].tolist() == [55]


def test_other_things_in_a_history_are_refused() -> None:
    with pytest.raises(DataError, match="got str"):
        Trajectory(messages_and_choices=["3+4="])  # type: ignore[list-item]
    with pytest.raises(DataError, match="got int"):
        History(messages_and_choices=[user("?"), 7])  # type: ignore[list-item]


# -- trajectories and groups ----------------------------------------------------------------------------------------


def test_histories_are_the_main_one_and_the_additional_ones() -> None:
    extra = History(messages_and_choices=[user("summarise"), completion("ok")])
    both = trajectory("7", additional_histories=[extra], tools=[{"name": "add"}])

    assert [history.messages()[0]["content"] for history in both.histories()] == ["3+4=", "summarise"]
    assert both.histories()[0].tools == [{"name": "add"}]
    assert [said.text for said in both.completions()] == ["7", "ok"]
    assert len(Trajectory(additional_histories=[extra]).histories()) == 1


def test_policy_versions_span_messages_and_token_histories() -> None:
    messages = Trajectory(messages_and_choices=[completion(version=3), user("?"), completion(version=5)])
    history = token_history([1, 2, 3], [0, 1, 1])
    history.versions = torch.tensor([-1, 2, 9])

    assert messages.policy_versions == (3, 5)
    assert Trajectory(token_histories=[history]).policy_versions == (2, 9)
    assert Trajectory(messages_and_choices=[user("?")]).policy_versions is None


@pytest.mark.parametrize("column", ["mask", "logprobs", "temperature", "versions"])
def test_columns_of_a_token_history_have_one_length(column: str) -> None:
    whole = token_history([1, 2, 3], [0, 1, 1])
    columns = {name: getattr(whole, name) for name in ("token_ids", "mask", "logprobs", "temperature", "versions")}

    with pytest.raises(DataError, match=rf"{column} has shape \(2,\), token_ids \(3,\)"):
        TokenHistory(**{**columns, column: columns[column][:2]})
    with pytest.raises(DataError, match=r"must be \[T\]"):
        TokenHistory(**{name: value[None] for name, value in columns.items()})


def test_a_group_is_a_collection_of_trajectories() -> None:
    of_two = group([1, 0.5], metadata={"task": 3})

    assert len(of_two) == 2
    assert [item.reward for item in of_two] == of_two.rewards == [1.0, 0.5]
    assert repr(of_two) == "TrajectoryGroup(2 trajectories)"


def test_a_group_refuses_what_is_neither_trajectory_nor_awaitable() -> None:
    with pytest.raises(DataError, match=r"trajectories or awaitables of them, got dict"):
        TrajectoryGroup([{"reward": 1.0}])  # type: ignore[list-item]


def test_a_pending_group_has_no_json() -> None:
    async def attempt() -> Trajectory:
        return trajectory()

    pending = attempt()
    waiting = TrajectoryGroup([pending])
    try:
        with pytest.raises(DataError, match=r"pending.*await fitrl\.gather"):
            waiting.to_json()
    finally:
        pending.close()
    assert "1 pending" in repr(waiting)


def test_errors_are_typed_and_standard() -> None:
    with pytest.raises(FitRLError) as caught:
        TrajectoryGroup([1])  # type: ignore[list-item]
    assert isinstance(caught.value, ValueError)


def test_only_gather_resolves_awaitables() -> None:
    async def main() -> TrajectoryGroup:
        future: asyncio.Future[Trajectory] = asyncio.get_running_loop().create_future()
        future.set_result(trajectory())
        return TrajectoryGroup([future, trajectory()])

    mixed = asyncio.run(main())

    assert (len(mixed), len(mixed.pending)) == (1, 1)
