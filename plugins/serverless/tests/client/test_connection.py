"""Requests: what is repeated, what is not, what each refusal becomes, and that the key stays a secret."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest

from fitrl.errors import FitRLError, InvalidArgumentError
from fitrl_serverless.client import (
    AuthenticationError,
    BusyError,
    ConflictError,
    Connection,
    InvalidRequestError,
    MalformedAnswerError,
    NotFoundError,
    PermissionDeniedError,
    ServerFaultError,
    Service,
    ServiceTimeoutError,
    UnreachableError,
    repetition,
)
from fitrl_serverless.client.bodies import FileBody, PartsBody, json_body
from fitrl_serverless.client.errors import ServiceError


@pytest.fixture
def quick(monkeypatch) -> None:
    """Wait next to nothing between attempts."""
    monkeypatch.setattr(repetition, "_BACKOFF", lambda state: 0.001)


@pytest.fixture
def connect(key):
    """Open connections, and close them after the test."""
    opened = []

    def open_one(url: str, **options) -> Connection:
        opened.append(Connection(url, options.pop("key", key), **options))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


# -- repetition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "drop", "drop-after"])
def test_a_get_is_repeated_until_it_is_answered(foreign, connect, quick, fault) -> None:
    foreign.faults["/health"] = deque([fault] * 3)
    connection = connect(foreign.url)
    assert json.loads(connection.wait(connection.request("GET", "/health")).content) == "ok"
    assert not foreign.faults["/health"]


@pytest.mark.parametrize("fault", [503, "drop", "drop-after"])
def test_a_post_is_repeated_only_under_an_idempotency_key(foreign, connect, quick, fault) -> None:
    connection = connect(foreign.url)
    body = json_body('{"model_id":"me-p-n","experimental_config":{"learning_rate":1},"trajectory_groups":[]}')
    connection.wait(
        connection.request(
            "POST", "/preview/models", body=json_body('{"project":"p","name":"n","base_model":"b"}'), repeatable=True
        )
    )
    foreign.faults["/training-jobs"] = deque([fault] * 2)
    with pytest.raises((ServerFaultError, UnreachableError)):
        connection.wait(connection.request("POST", "/preview/training-jobs", body=body))
    assert len(foreign.faults["/training-jobs"]) == 1 and len(foreign.jobs) == (fault == "drop-after")
    foreign.faults["/training-jobs"] = deque([fault] * 2)
    connection.wait(connection.request("POST", "/preview/training-jobs", body=body, idempotency_key="once"))
    assert len(foreign.jobs) == 1 + (fault == "drop-after")
    keys = [headers["idempotency-key"] for _, path, headers, _ in foreign.seen if "idempotency-key" in headers]
    assert set(keys) == {"once"}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 415, 422, 501])
def test_what_cannot_pass_is_asked_once(foreign, connect, quick, status) -> None:
    foreign.faults["/health"] = deque([status, status])
    connection = connect(foreign.url)
    with pytest.raises(ServiceError):
        connection.wait(connection.request("GET", "/health"))
    assert len(foreign.faults["/health"]) == 1


def test_repetition_ends_with_the_time_for_it(foreign, connect, monkeypatch) -> None:
    monkeypatch.setattr(repetition, "_BACKOFF", lambda state: 0.2)
    foreign.faults["/health"] = deque([503] * 1000)
    connection = connect(foreign.url, retry_timeout_s=0.5)
    start = time.monotonic()
    with pytest.raises(ServerFaultError, match="503 scripted 503"):
        connection.wait(connection.request("GET", "/health"))
    assert time.monotonic() - start < 5 and len(foreign.faults["/health"]) >= 997


def test_a_service_says_how_long_to_wait() -> None:
    def waits(error: BaseException | None, attempt: int) -> list[float]:
        outcome = None if error is None else SimpleNamespace(exception=lambda: error)
        state = SimpleNamespace(outcome=outcome, attempt_number=attempt)
        return [repetition.wait_as_told(state) for _ in range(200)]

    told = waits(BusyError("later", status=429, retry_after_s=7.0), 1)
    assert min(told) >= 7.0 and max(told) <= 7.3 and len(set(told)) > 100
    for attempt in (1, 3, 20):
        window = min(0.2 * 2 ** (attempt - 1), 20.0)
        free = waits(ServerFaultError("away", status=503), attempt)
        assert 0 <= min(free) < window / 4 and window * 0.75 < max(free) <= window  # jitter over the whole window
    assert repetition.retry_after("12") == 12.0 and repetition.retry_after("soon") is None
    assert repetition.retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0.0
    assert repetition.retry_after(None) is None


def test_the_header_is_read(foreign, connect) -> None:
    foreign.faults["/health"] = deque([(429, {"detail": "slowly"}, {"Retry-After": "86400"})])
    connection = connect(foreign.url)
    with pytest.raises(BusyError, match="slowly") as caught:
        connection.wait(connection.request("GET", "/health"))
    assert caught.value.retry_after_s == 86400.0  # longer than the time for repetitions, so it is not waited for


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "standard"),
    [
        (400, InvalidRequestError, ValueError),
        (401, AuthenticationError, PermissionError),
        (403, PermissionDeniedError, PermissionError),
        (404, NotFoundError, LookupError),
        (409, ConflictError, RuntimeError),
        (413, InvalidRequestError, ValueError),
        (418, InvalidRequestError, ValueError),
        (422, InvalidRequestError, ValueError),
        (429, BusyError, RuntimeError),
        (500, ServerFaultError, RuntimeError),
        (507, ServerFaultError, RuntimeError),
    ],
)
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"detail": "no such thing"}, "no such thing"),
        ({"error": {"message": "no such thing", "type": "x"}}, "no such thing"),
        ({"error": "no such thing"}, "no such thing"),
        ({"detail": [{"loc": ["body"], "msg": "bad"}]}, '"msg": "bad"'),
        (b"<html>no such thing</html>", "<html>no such thing</html>"),
        (b"", "Bad Request|Unauthorized|reason|[A-Z]"),
    ],
)
def test_refusals_are_typed_and_keep_the_words(foreign, connect, status, error, standard, answer, words) -> None:
    foreign.faults["/health"] = deque([(status, answer, {})])
    connection = connect(foreign.url, retry_timeout_s=0.001)
    with pytest.raises(error, match=words) as caught:
        connection.wait(connection.request("GET", "/health"))
    told = caught.value
    assert isinstance(told, FitRLError) and isinstance(told, standard)
    assert (told.status, told.request_id, told.request) == (status, "of-the-service", "GET /v1/health")
    assert str(status) in str(told) and "of-the-service" in str(told)


def test_the_key_is_in_no_message_and_no_repr(foreign, connect, key) -> None:
    connection = connect(foreign.url, key="a-wrong-key")
    with pytest.raises(AuthenticationError) as caught:
        connection.wait(Service(connection).job("j"))
    assert "wrong key Bearer ***" in str(caught.value) and "a-wrong-key" not in str(caught.value)
    assert key not in repr(connection) and "a-wrong-key" not in repr(connection)
    chain = caught.value
    while chain is not None:
        assert "a-wrong-key" not in f"{chain!r} {chain}"
        chain = chain.__cause__ or chain.__context__


def test_long_words_are_cut(foreign, connect) -> None:
    foreign.faults["/health"] = deque([(400, {"detail": "x" * 100_000}, {})])
    connection = connect(foreign.url)
    with pytest.raises(InvalidRequestError) as caught:
        connection.wait(connection.request("GET", "/health"))
    assert len(str(caught.value)) < 3000


def test_redirects_are_not_followed(foreign, connect) -> None:
    foreign.faults["/health"] = deque([(307, b"", {"Location": "http://127.0.0.1:1/elsewhere"})])
    connection = connect(foreign.url)
    with pytest.raises(MalformedAnswerError, match="redirect"):
        connection.wait(connection.request("GET", "/health"))


@pytest.mark.parametrize("answer", [b"<html>", {"identity": 1}, [], {"id": 7}])
def test_answers_are_checked(foreign, connect, answer) -> None:
    foreign.faults["/j"] = deque([(200, answer, {})])
    connection = connect(foreign.url)
    with pytest.raises(MalformedAnswerError, match="the answer is no TrainingJob") as caught:
        connection.wait(Service(connection).job("j"))
    assert caught.value.request_id == "of-the-service"


def test_nobody_there(connect) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, not listening
        connection = connect(f"http://127.0.0.1:{reserved.getsockname()[1]}", retry_timeout_s=0.1)
        with pytest.raises(UnreachableError, match="cannot be reached") as caught:
            connection.wait(connection.request("GET", "/health"))
    assert isinstance(caught.value, ConnectionError) and caught.value.status is None


def test_silence_is_not_waited_for(connect) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        connection = connect(f"http://127.0.0.1:{server.getsockname()[1]}", request_timeout_s=0.2, retry_timeout_s=0.1)
        with pytest.raises(ServiceTimeoutError, match="silent for longer than the limit") as caught:
            connection.wait(connection.request("GET", "/health"))
    assert isinstance(caught.value, TimeoutError)


def test_repeated_failures_are_said(foreign, connect, quick, caplog) -> None:
    foreign.faults["/health"] = deque([503] * 3)
    connection = connect(foreign.url)
    connection.wait(connection.request("GET", "/health"))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "attempt 2 failed and is repeated",
        "attempt 3 failed and is repeated",
    ]


# -- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["", "localhost:80", "ftp://h/", "http://", "http://u:p@localhost/", "http://localhost/?a=b", "http://h:x/"]
    + ["http://training.example.com", "http://10.0.0.7:8000", "https://[::1"],
)
def test_addresses_that_cannot_be_used(url) -> None:
    with pytest.raises(InvalidArgumentError):
        Connection(url, "k")


@pytest.mark.parametrize(
    "url", ["https://h.example/v1/", "http://127.0.0.1:8000", "http://localhost", "http://[::1]:1"]
)
def test_addresses_that_can(url) -> None:
    assert Connection(url, "k").url == url.rstrip("/")


@pytest.mark.parametrize("key", ["", "two words", "new\nline", "schlüssel"])
def test_keys_that_cannot_be_headers(key) -> None:
    with pytest.raises(InvalidArgumentError, match="printable ASCII") as caught:
        Connection("https://h", key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    "limits", [{"request_timeout_s": 0}, {"retry_timeout_s": -1.0}, {"retry_timeout_s": float("nan")}]
)
def test_limits_are_above_zero(limits) -> None:
    with pytest.raises(InvalidArgumentError, match="above 0"):
        Connection("https://h", "k", **limits)


# -- bodies, and the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_files_are_streamed_anew_for_each_attempt(foreign, connect, quick, tmp_path, packed) -> None:
    path = tmp_path / "body.json.gz"
    said = {"groups": [{"number": number, "text": "abc" * 50} for number in range(5000)]}
    path.write_bytes(gzip.compress(json.dumps(said).encode()))
    foreign.faults["/log"] = deque(["drop-after", 503])
    connection = connect(foreign.url)
    work = connection.request("POST", "/preview/models/m/log", body=FileBody(path, packed=packed), idempotency_key="k")
    if packed:  # which this service does not take
        with pytest.raises(InvalidRequestError, match="no encodings here"):
            connection.wait(work)
        _, _, headers, body = foreign.seen[-1]
        assert headers["content-encoding"] == "gzip" and headers["content-length"] == str(path.stat().st_size)
        assert json.loads(gzip.decompress(body)) == said
    else:
        connection.wait(work)
        bodies = [body for *_, body in foreign.seen]
        assert bodies == [said, said] and foreign.seen[-1][2]["transfer-encoding"] == "chunked"


@pytest.mark.parametrize("packed", [True, False])
def test_parts_are_made_and_packed_while_they_are_sent(foreign, connect, quick, packed) -> None:
    whole = json.dumps([{"number": number, "text": "abc" * 50} for number in range(5000)]).encode()
    made = []

    def parts():
        made.append(0)
        for start in range(0, len(whole), 1000):
            made[-1] += 1
            yield whole[start : start + 1000]

    foreign.faults["/log"] = deque(["drop-after"])
    connection = connect(foreign.url)
    work = connection.request(
        "POST", "/preview/models/m/log", body=PartsBody(parts, packed=packed), idempotency_key="k"
    )
    if packed:  # which this service does not take
        with pytest.raises(InvalidRequestError, match="no encodings here"):
            connection.wait(work)
        bodies = [gzip.decompress(body) for *_, body in foreign.seen]
        assert bodies == [whole, whole]
    else:
        connection.wait(work)
        assert [json.dumps(body).encode() for *_, body in foreign.seen] == [whole, whole]
    assert foreign.seen[-1][2]["transfer-encoding"] == "chunked" and made[0] == made[1] > 500


def test_a_key_for_this_machine_goes_through_no_proxy(foreign, connect, monkeypatch) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # where nobody listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    connection = connect(foreign.url, retry_timeout_s=0.1)
    assert json.loads(connection.wait(connection.request("GET", "/health")).content) == "ok"


def test_closing_ends_what_is_under_way_and_a_later_request_opens_anew(foreign, connect) -> None:
    connection = connect(foreign.url)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        silent = connect(f"http://127.0.0.1:{server.getsockname()[1]}")
        waiting = silent.start(silent.request("GET", "/health"))
        server.accept()[0].close()
        silent.close()
        assert waiting.cancelled() or waiting.exception() is not None
    for _ in range(2):
        connection.wait(connection.request("GET", "/health"))
        connection.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fitrl-serverless"]
