"""`fitrl serve` as a person runs it: keys, refusals, and what its log holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from asking import ended, job_body, make_model, submit

import fitrl
from fitrl_command import main
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.keys import owner_of
from helpers import completion, user

SECRET = "the-launch-code-is-0000"


def test_keys_are_made_listed_and_revoked(tmp_path, capsys) -> None:
    state = ["--state", str(tmp_path / "state")]
    assert main(["serve", "key", "add", "alice", *state]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["serve", "key", "list", *state]) == 0
    listed = capsys.readouterr().out
    identity = key.split("-")[1]
    assert identity in listed and "alice" in listed and key.split("-", 2)[2] not in listed
    database = Database(tmp_path / "state" / "serve.sqlite")
    try:
        assert owner_of(database, key) == "alice"
        assert main(["serve", "key", "revoke", identity, *state]) == 0
        assert owner_of(database, key) is None
    finally:
        database.close()
    assert main(["serve", "key", "revoke", identity, *state]) == 1
    assert "no key in use" in capsys.readouterr().err
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "in the clear on 0.0.0.0"),
        (["--max-jobs", "0"], "the limit jobs must be above 0"),
        (["--nproc-per-node", "0"], "ranks must be at least 1"),
        ([], "fitrl serve key add"),
    ],
)
def test_what_would_be_unsafe_or_of_no_use_is_refused(tmp_path, capsys, options, words) -> None:
    assert main(["serve", "--state", str(tmp_path / "state"), *options]) == 1
    assert words in capsys.readouterr().err


def test_one_server_to_a_folder(server, capsys) -> None:
    assert main(["serve", "--state", str(server.state), "--port", "0"]) == 1
    assert "another server runs on" in capsys.readouterr().err


def test_it_listens_on_loopback_alone(server) -> None:
    import psutil

    listening = [
        link.laddr.ip
        for link in psutil.Process(server.process.pid).net_connections()
        if link.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_neither_prompts_nor_keys_are_logged(server) -> None:
    attempts = [
        fitrl.Trajectory(messages_and_choices=[user(SECRET), completion(SECRET, temperature=t)], reward=float(i))
        for i, t in enumerate((1.0, 0.0))
    ]
    with server.client() as client:
        model = make_model(client, "secretive")
        job = ended(client, submit(client, job_body(model, [fitrl.TrajectoryGroup(attempts)])))
        assert job["status"] == "failed"  # temperature 0: an error while it is read
        good = fitrl.TrajectoryGroup(
            [attempts[0], fitrl.Trajectory(messages_and_choices=attempts[0].messages_and_choices)]
        )
        assert ended(client, submit(client, job_body(model, [good])))["status"] == "succeeded"
        asked = {"model": "wandb-artifact:///alice/tests/secretive", "messages": [{"role": "user", "content": SECRET}]}
        assert client.post("/chat/completions", json=asked | {"max_tokens": 2}).status_code == 200
        assert client.post("/chat/completions", json=asked | {"stream": SECRET}).status_code == 422
        client.get(f"/preview/models/{model}/checkpoints", params={"after": SECRET})
        client.post("/preview/models", content=f'{{"name": "{SECRET}"', headers={"content-type": "application/json"})
    log = server.log
    assert "POST /preview/training-jobs 200" in log and job["id"] in log
    assert SECRET not in log
    for key in server.keys.values():
        assert key not in log and key.split("-", 2)[2] not in log


def test_nothing_is_unpickled() -> None:
    """No module of the plugin imports pickle or torch.load; checkpoints are safetensors, read weights-only."""
    source = Path(sys.modules["fitrl_serverless"].__file__ or "").parent
    for path in source.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text and "torch.load" not in text and "eval(" not in text, path
