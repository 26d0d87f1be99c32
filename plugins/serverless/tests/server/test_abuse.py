"""Slow, oversized and malformed requests; and that the server answers others all the while."""

from __future__ import annotations

import gzip
import json
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from asking import JSON, job_body, make_model

import fitrl
from fitrl_serverless import ServerlessTrainer
from fitrl_serverless.client import InvalidRequestError
from helpers import group

LIMIT = 60_000


@pytest.fixture(scope="module")
def tight(tmp_path_factory, request) -> Iterator[object]:
    """A server with narrow limits."""
    make = type(request.getfixturevalue("server"))
    options = {
        "body-bytes": LIMIT,
        "body-s": 1.0,
        "header-s": 1.0,
        "groups": 3,
        "trajectories": 8,
        "jobs": 2,
        "models": 4,
        "completions": 2,
        "completion-tokens": 8,
    }
    server = make(
        tmp_path_factory.mktemp("tight") / "state", *[f"--max-{name}={value}" for name, value in options.items()]
    )
    server.start()
    yield server
    server.stop()


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def rest_of(connection: socket.socket) -> bytes:
    """What the server says until it closes."""
    said = b""
    while part := connection.recv(65536):
        said += part
    return said


@pytest.mark.parametrize("first", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: "])
def test_a_slow_head_is_hung_up_on(tight, first) -> None:
    with connect(tight) as connection:
        connection.sendall(first)
        start = time.monotonic()
        assert rest_of(connection) == b""
        assert time.monotonic() - start < 20


def test_a_second_slow_head_is_hung_up_on_too(tight) -> None:
    with connect(tight) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HT")
        said = rest_of(connection)
        assert said.count(b"HTTP/1.1 200 OK") == 1


def test_a_slow_body_times_out(tight) -> None:
    with connect(tight) as connection:
        head = (
            "POST /preview/models HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {tight.keys['alice']}\r\nContent-Length: 1000\r\n\r\n{{"
        )
        connection.sendall(head.encode())
        assert rest_of(connection).startswith(b"HTTP/1.1 408 ")


def test_a_slow_body_without_a_key_is_hung_up_on_too(tight) -> None:
    with connect(tight) as connection:
        connection.sendall(b"POST /preview/models HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        said = rest_of(connection)
        assert said.startswith(b"HTTP/1.1 401 ") and b"connection: close" in said


def test_others_are_answered_meanwhile(tight) -> None:
    sleepers = [connect(tight) for _ in range(50)]
    try:
        for sleeper in sleepers:
            sleeper.sendall(b"POST /preview/models HTTP/1.1\r\nHost: x\r\n")
        assert httpx.get(f"{tight.url}/health", timeout=20).json()["status"] == "ok"
    finally:
        for sleeper in sleepers:
            sleeper.close()


def test_a_large_body_is_refused_before_it_is_read(tight) -> None:
    with tight.client() as client:
        body = job_body("model-1")
        padded = body[:-1] + ',"padding":"' + "x" * LIMIT + '"}'
        answer = client.post("/preview/training-jobs", content=padded, headers=JSON)
        assert answer.status_code == 413 and str(LIMIT) in answer.json()["detail"]

        def parts() -> Iterator[bytes]:
            for start in range(0, len(padded), 1000):
                yield padded[start : start + 1000].encode()

        assert client.post("/preview/training-jobs", content=parts(), headers=JSON).status_code == 413  # no length told


@pytest.mark.parametrize("length_is_told", [True, False])
@pytest.mark.parametrize(("headers", "status"), [({}, 401), (None, 413)])
def test_a_client_that_writes_all_of_it_first_reads_the_refusal(tight, length_is_told, headers, status) -> None:
    """More than the buffers between the two hold: closing at once would reset the connection, and lose the answer."""
    chunk = b"x" * 1_000_000
    content = chunk * 30 if length_is_told else (chunk for _ in range(30))
    with tight.client() if headers is None else httpx.Client(base_url=tight.url, timeout=60) as client:
        answer = client.post("/preview/training-jobs", content=content, headers=JSON)
        assert answer.status_code == status and set(answer.json()) == {"detail"}
        assert client.get("/health").status_code == 200


def test_our_client_is_told_that_its_groups_are_too_large(tight, tmp_path) -> None:
    large = group([0, 1])
    # hardly shrinks; more than sockets hold, and packed well within the second that a body may take
    large.logs.append(secrets.token_hex(5_000_000))
    model = fitrl.TrainableModel("counted", "tests", "tiny", root=tmp_path)
    with ServerlessTrainer(url=tight.url, key=tight.keys["alice"]) as trainer:
        for work in (lambda: trainer.fit_rl(model, [large]), lambda: trainer.log(model, [large])):
            with pytest.raises(InvalidRequestError, match=f"413 a body may have {LIMIT} bytes.*send fewer groups"):
                work()
        assert not [path.name for path in model.run_dir.glob("job*")]


def test_a_body_that_unpacks_to_too_much_is_refused(tight) -> None:
    bomb = gzip.compress(b'{"padding":"' + b"x" * 50_000_000 + b'"}')
    assert len(bomb) < LIMIT
    with tight.client() as client:
        answer = client.post("/preview/models", content=bomb, headers=JSON | {"content-encoding": "gzip"})
        assert answer.status_code == 413


def test_a_packed_body_is_read(tight) -> None:
    body = gzip.compress(json.dumps({"project": "tests", "name": "packed", "base_model": "tiny"}).encode())
    packed = JSON | {"content-encoding": "gzip"}
    with tight.client() as client:
        assert client.post("/preview/models", content=body, headers=packed).status_code == 200
        for wrong, status in ((body[:-9], 400), (b"no gzip", 400), (b"", 422)):
            assert client.post("/preview/models", content=wrong, headers=packed).status_code == status
        assert (
            client.post("/preview/models", content=body, headers=JSON | {"content-encoding": "br"}).status_code == 415
        )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"project":"tests","name":"a","base_model":NaN}',
        b'{"project":"tests","name":"\\ud800","base_model":"tiny"}',
        b'{"project":"tests","name":"a","base_model":"tiny\\u0000"}',
        b"[" * 50_000,
        b'{"project":' + b'{"a":' * 9_000,
        b'{"project":"tests","name":1e400,"base_model":"tiny"}',
    ],
)
def test_a_malformed_body_is_an_error_of_the_client(tight, body) -> None:
    with tight.client() as client:
        answer = client.post("/preview/models", content=body, headers=JSON)
    assert answer.status_code in (403, 422), answer.text
    assert set(answer.json()) == {"detail"} and len(answer.text) < 1000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-pickle", "application/octet-stream", ""])
def test_a_body_is_json(tight, kind) -> None:
    body = b'{"project":"tests","name":"a","base_model":"tiny"}'
    with tight.client() as client:
        headers = {"content-type": kind} if kind else {}
        assert client.post("/preview/models", content=body, headers=headers).status_code == 415


def test_counts_are_bounded(tight) -> None:
    with tight.client() as client:
        model = make_model(client, "counted", return_existing=True)
        for groups, what in (([group([0, 1])] * 4, "3 groups"), ([group([0] * 9)], "8 trajectories")):
            answer = client.post("/preview/training-jobs", content=job_body(model, groups), headers=JSON)
            assert answer.status_code == 413 and what in answer.json()["detail"]
        chat = {"model": "wandb-artifact:///alice/tests/counted", "messages": [{"role": "user", "content": "1+1="}]}
        assert client.post("/chat/completions", json=chat | {"n": 3}).status_code == 422
        assert client.post("/chat/completions", json=chat | {"max_tokens": 9}).status_code == 422
        answers = [
            client.post("/preview/models", json={"project": "tests", "name": f"m{i}", "base_model": "tiny"})
            for i in range(5)
        ]
        assert answers[-1].status_code == 429 and "delete one" in answers[-1].json()["detail"]


def test_jobs_of_one_owner_are_bounded_and_anothers_are_not_kept_waiting(tight) -> None:
    with tight.client() as client, tight.client("bob") as bob:
        body = job_body(make_model(client, "counted", return_existing=True))

        def send(_: int) -> httpx.Response:
            return client.post("/preview/training-jobs", content=body, headers=JSON)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(send, range(16)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and all(answer.headers["retry-after"] == "1" for answer in refused)
        assert {answer.status_code for answer in answers} == {200, 429}
        theirs = job_body(make_model(bob, "counted", return_existing=True))
        assert bob.post("/preview/training-jobs", content=theirs, headers=JSON).status_code == 200


def test_noise_is_no_request(tight) -> None:
    with connect(tight) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n")
        assert b"400" in rest_of(connection)[:20]
    assert httpx.get(f"{tight.url}/health").status_code == 200
