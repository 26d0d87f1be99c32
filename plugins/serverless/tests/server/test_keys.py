"""Every address with no key, a wrong key, a revoked key and another owner's key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from asking import ended, job_body, make_model, steps, submit

from fitrl_serverless import wire
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.keys import add_key, list_keys, owner_of, revoke_key
from helpers import group

PUBLIC = {("GET", "/health"), ("GET", "/openapi.json")}


@pytest.fixture(scope="module")
def alices(server) -> dict[str, str]:
    """What is in alice's addresses."""
    with server.client("alice") as alice:
        model = make_model(alice, "private")
        job = submit(alice, job_body(model))
        assert ended(alice, job)["status"] == "succeeded"
    return {"model_id": model, "job_id": job, "step": "1", "name": "tokenizer.json"}


def requests(server, places: dict[str, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, address and body of every operation that the OpenAPI document has, aimed at alice's things."""
    groups = [body.model_dump(mode="json") for body in wire.groups_to_wire([group([0, 1])])]
    bodies: dict[str, Any] = {
        "CreateModel": {"project": "tests", "name": "private", "base_model": "tiny", "entity": "alice"},
        "DeleteCheckpoints": {"steps": [0]},
        "LogGroups": {"model_id": places["model_id"], "trajectory_groups": groups},
        "CreateTrainingJob": {"model_id": places["model_id"], "trajectory_groups": groups},
        "ChatRequest": {
            "model": "wandb-artifact:///alice/tests/private",
            "messages": [{"role": "user", "content": "3+4="}],
        },
    }
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            address = re.sub(r"\{(\w+)\}", lambda found: places[found[1]], path)
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            body = {"json": bodies[schema["$ref"].rpartition("/")[2]]} if schema else {}
            yield method.upper(), address, body


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer fitrl-0123456789abcdef-" + "x" * 43},
        {"authorization": "Bearer"},
        {"authorization": "Bearer x"},
        {"authorization": "Basic YWxpY2U6"},
        {"authorization": "Bearer \u00e9".encode("latin-1").decode("latin-1")},
    ],
)
def test_no_key_and_a_wrong_key_reach_nothing(server, alices, headers) -> None:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    with httpx.Client(base_url=server.url, headers=encoded, timeout=60) as client:
        seen = [
            (method, address, client.request(method, address, **body))
            for method, address, body in requests(server, alices)
        ]
    assert len(seen) >= 13
    for method, address, answer in seen:
        assert answer.status_code == (200 if (method, address) in PUBLIC else 401), (method, address, answer.text)
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert set(answer.json()) == {"detail"}


def test_another_owners_key_reaches_nothing(server, alices) -> None:
    with server.client("bob") as bob, server.client("alice") as alice:
        for method, address, body in requests(server, alices):
            answer = bob.request(method, address, **body)
            if (method, address) in PUBLIC:
                continue
            expected = 403 if address == "/preview/models" else 404
            assert answer.status_code == expected, (method, address, answer.text)
            assert alices["model_id"] not in answer.text and alices["job_id"] not in answer.text
        assert steps(alice, alices["model_id"]) == [0, 1]
        run = server.state / "models" / alices["model_id"]
        assert not (run / "trajectories").exists()


def test_what_is_anothers_looks_like_what_is_not_there(server, alices) -> None:
    with server.client("bob") as bob:
        for theirs, nobodys in (
            (f"/preview/models/{alices['model_id']}/checkpoints", "/preview/models/model-0/checkpoints"),
            (f"/preview/training-jobs/{alices['job_id']}", "/preview/training-jobs/job-0"),
        ):
            answers = [bob.get(address) for address in (theirs, nobodys)]
            assert answers[0].status_code == answers[1].status_code == 404
            assert answers[0].json() == answers[1].json()


def test_a_revoked_key_reaches_nothing_from_now_on(server) -> None:
    database = Database(server.state / "serve.sqlite")
    try:
        key = add_key(database, "carol")
        headers = {"authorization": f"Bearer {key}"}
        body = {"project": "tests", "name": "m", "base_model": "tiny"}
        assert httpx.post(f"{server.url}/preview/models", json=body, headers=headers).status_code == 200
        (entry,) = [entry for entry in list_keys(database) if entry.owner == "carol"]
        revoke_key(database, entry.id)
        assert httpx.post(f"{server.url}/preview/models", json=body, headers=headers).status_code == 401
        with pytest.raises(ValueError, match="no key in use"):
            revoke_key(database, entry.id)
    finally:
        database.close()


def test_keys_are_stored_as_digests(tmp_path) -> None:
    database = Database(tmp_path / "serve.sqlite")
    try:
        keys = [add_key(database, owner) for owner in ("alice", "alice", "bob")]
        assert [owner_of(database, key) for key in keys] == ["alice", "alice", "bob"]
        for key in keys:
            assert owner_of(database, key[:-1]) is None
            assert owner_of(database, key + "x") is None
            assert owner_of(database, key[:-1] + ("A" if key[-1] != "A" else "B")) is None
        mixed = "-".join([*keys[0].split("-")[:2], keys[2].split("-", 2)[2]])
        assert owner_of(database, mixed) is None
        for bad in ("a/b", "", "a\n", ".."):
            with pytest.raises(ValueError, match="the owner of a key"):
                add_key(database, bad)
    finally:
        database.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for key in keys:
        assert key.split("-", 2)[2].encode() not in stored
