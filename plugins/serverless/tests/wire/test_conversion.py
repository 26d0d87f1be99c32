"""Groups go over the wire and come back as they were, and a published body without our keys is read."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fitrl
from fitrl.errors import DataError
from fitrl.testing.samples import random_history
from fitrl_serverless import wire
from helpers import completion, group, trajectory, user


def over_the_wire(groups: list[fitrl.TrajectoryGroup]) -> list[fitrl.TrajectoryGroup]:
    bodies = wire.groups_to_wire(groups)
    lines = [body.model_dump_json() for body in bodies]
    assert [json.loads(line) for line in lines] == [body.model_dump(mode="json") for body in bodies]
    assert not any(word in line for line in lines for word in (":NaN", ":Infinity", ":-Infinity"))
    return wire.groups_from_wire([wire.Group.model_validate_json(line) for line in lines])


numbers = st.floats(allow_nan=False, width=32)
completions = st.lists(st.tuples(st.integers(0, 255), st.floats(-50, 0)), min_size=1, max_size=6).flatmap(
    lambda pairs: st.builds(
        fitrl.Completion,
        message=st.fixed_dictionaries({"role": st.just("assistant"), "content": st.text(max_size=9)}),
        token_ids=st.just(tuple(token for token, _ in pairs)),
        logprobs=st.just(tuple(logprob for _, logprob in pairs)),
        temperature=st.one_of(st.none(), st.floats(0.1, 2)),
        prompt_ids=st.one_of(st.none(), st.lists(st.integers(0, 255), max_size=4).map(tuple)),
        finish_reason=st.sampled_from(["stop", "length", "tool_calls"]),
        version=st.integers(0, 9),
        full_support=st.booleans(),
    )
)
messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": st.text(max_size=9)})
histories = st.lists(st.one_of(messages, completions), max_size=4)
tools = st.one_of(st.none(), st.just([{"type": "function", "function": {"name": "f", "parameters": {}}}]))
trajectories = st.builds(
    fitrl.Trajectory,
    messages_and_choices=histories,
    reward=numbers,
    tools=tools,
    temperature=st.one_of(st.none(), st.just(1.0)),
    additional_histories=st.lists(st.builds(fitrl.History, messages_and_choices=histories, tools=tools), max_size=2),
    metrics=st.dictionaries(st.text(max_size=5), numbers, max_size=2),
    metadata=st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(-9, 9), st.text()), max_size=2),
    logs=st.lists(st.text(max_size=5), max_size=2),
)


@given(st.lists(trajectories, max_size=3))
def test_groups_come_back_as_they_were(attempts) -> None:
    sent = fitrl.TrajectoryGroup(attempts, metadata={"task": "3+4"}, logs=["a"])
    (back,) = over_the_wire([sent])
    assert back.to_dict() == sent.to_dict()


def test_token_histories_and_exceptions_come_back() -> None:
    sent = fitrl.TrajectoryGroup(
        [fitrl.Trajectory(token_histories=[random_history(torch.Generator().manual_seed(0))], reward=math.nan)],
        exceptions=[ValueError("no")],
    )
    (back,) = over_the_wire([sent])
    assert back.to_json() == sent.to_json()
    assert math.isnan(back.trajectories[0].reward)


def test_tokens_without_ids_keep_their_bytes() -> None:
    said = fitrl.Completion(
        message={"role": "assistant", "content": "\u00e4"}, token_bytes=(b"\xc3", b"\xa4"), logprobs=(-1.0, -2.0)
    )
    (back,) = over_the_wire([fitrl.TrajectoryGroup([fitrl.Trajectory(messages_and_choices=[user("?"), said])])])
    assert back.trajectories[0].completions() == [said]


def test_first_and_last_version_are_told() -> None:
    attempt = fitrl.Trajectory(messages_and_choices=[user("?"), completion(version=3), completion(version=5)])
    (body,) = wire.groups_to_wire([fitrl.TrajectoryGroup([attempt])])
    assert (body.trajectories[0].initial_policy_version, body.trajectories[0].final_policy_version) == (3, 5)


def test_a_published_body_is_read() -> None:
    body = {
        "trajectories": [
            {
                "messages_and_choices": [
                    {"role": "user", "content": "3+4="},
                    {
                        "finish_reason": "stop",
                        "index": 0,
                        "logprobs": {
                            "content": [{"token": "token_id:55", "logprob": -0.5, "bytes": None, "top_logprobs": []}],
                            "refusal": None,
                        },
                        "message": {"role": "assistant", "content": "7", "refusal": None},
                        "unknown": 1,
                    },
                ],
                "tools": None,
                "additional_histories": [],
                "reward": 1.0,
                "initial_policy_version": 4,
                "final_policy_version": 4,
                "metrics": {"turns": 1},
                "metadata": {},
                "logs": [],
                "start_time": "2026-01-01T00:00:00",
            }
        ],
        "metadata": {},
        "metrics": {},
        "logs": [],
        "exceptions": [],
    }
    (group_read,) = wire.groups_from_wire([wire.Group.model_validate_json(json.dumps(body))])
    (said,) = group_read.trajectories[0].completions()
    assert (said.token_ids, said.logprobs, said.version, said.text) == ((55,), (-0.5,), 4, "7")


def test_what_cannot_be_sent_is_refused_by_name() -> None:
    odd = trajectory(metadata={"when": object()})
    with pytest.raises(DataError, match=r"group 1 .*metadata\.when"):
        wire.groups_to_wire([group([0, 1]), fitrl.TrajectoryGroup([odd])])
    with pytest.raises(DataError, match="2 tokens but 1 logprobs"):
        wire.groups_to_wire(
            [fitrl.TrajectoryGroup([fitrl.Trajectory(messages_and_choices=[completion("7", logprobs=[-1.0])])])]
        )


@pytest.mark.parametrize("name", ["a/b", "../b/c", "a/b/c:step", "a/b/c:7", "a/b/c/d", "a//c", "a/b/.c", "a/b/c\n"])
def test_an_artifact_is_named_in_one_way(name) -> None:
    with pytest.raises(ValueError, match="a trained model is named"):
        wire.Artifact.parse(name)


def test_an_artifact_is_read_back() -> None:
    for step in (None, 0, 12):
        artifact = wire.Artifact(entity="me", project="demo", name="adder-1", step=step)
        assert wire.Artifact.parse(artifact.model) == artifact == wire.Artifact.parse(str(artifact))
