"""kill -9 of worker and server in every phase of a job: none is lost, none is trained twice."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from asking import JSON, LONG, ended, events, job_body, make_model, steps, submit
from safetensors.torch import load, load_file

import fitrl
from fitrl_serverless import ServerlessTrainer, wire
from fitrl_serverless.client import JobFailedError
from fitrl_serverless.server.database import Database
from helpers import group

# those that a job is easiest lost or doubled in are always tried
WORKER_POINTS = ["settled", "saved"]
if LONG:
    WORKER_POINTS = ["claimed", "begun", "trained", "settled", "saving", "saved", "ended"]
SERVER_POINTS = ["receiving", "submitted"] if LONG else ["submitted"]
CREATE_POINTS = ["creating", "created"] if LONG else ["created"]
LOG_POINTS = ["cut"]
if LONG:
    LOG_POINTS = ["logging", "noted", "cut", "half_logged", "logged", "remembered"]
DELETE_POINTS = ["emptying"]
if LONG:
    DELETE_POINTS = ["deleting", "emptying", "half_emptied", "deleted"]
STEPS_POINTS: list[str] = []
if LONG:
    STEPS_POINTS = ["deleting_steps", "emptying", "half_emptied", "deleted_steps"]
CHAT_POINTS = ["sampling", "answering"] if LONG else ["answering"]
ENDED = ["training_started", "gradient_step", "training_ended"]


@pytest.fixture
def kills(tmp_path: Path) -> Path:
    folder = tmp_path / "kills"
    folder.mkdir()
    return folder


def killing(kills: Path) -> dict[str, str]:
    places = [str(Path(__file__).with_name("killing")), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(places), "FITRL_TEST_KILLS": str(kills)}


def weights_of(client: httpx.Client, model: str, step: int) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors"
    return load(client.get(f"/preview/models/{model}/checkpoints/{step}/files/{name}").content)


def undisturbed(folder: Path, num_steps: int) -> dict[str, torch.Tensor]:
    """Weights of a run that nobody killed."""
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        model = fitrl.TrainableModel("undisturbed", "tests", "tiny", root=folder)
        for _ in range(num_steps):
            result = trainer.fit_rl(model, [group([0, 1, 0, 1])], learning_rate=1e-3)
    assert result.checkpoint_path is not None
    return load_file(result.checkpoint_path / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_nothing(serve, kills, tmp_path) -> None:
    server = serve(environment=killing(kills))
    with server.client() as client:
        model = make_model(client, "killed")
        jobs = []
        for point in WORKER_POINTS:
            (kills / point).touch()
            jobs.append(submit(client, job_body(model)))
            assert ended(client, jobs[-1])["status"] == "succeeded", point
            if point == "ended":
                jobs.append(submit(client, job_body(model)))  # taken by the next worker
                assert ended(client, jobs[-1])["status"] == "succeeded"
            assert not (kills / point).exists(), f"nobody got to {point}"
        for number, job in enumerate(jobs):
            found = events(client, job)
            assert [event["type"] for event in found] == ENDED
            assert found[1]["data"]["reward/mean"] == 0.5
            assert found[2]["data"]["step"] == number + 1
        assert steps(client, model) == [*range(len(jobs) + 1)]
        assert client.get("/health").json()["worker"] in ("ready", "starting")
        weights = weights_of(client, model, len(jobs))
    for name, tensor in undisturbed(tmp_path / "undisturbed", len(jobs)).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_killed_server_loses_and_doubles_nothing(serve, kills) -> None:
    server = serve(environment=killing(kills))
    with server.client() as client:
        model = make_model(client, "survivor")
    for number, point in enumerate(SERVER_POINTS):
        (kills / point).touch()
        body, headers = job_body(model), JSON | {"idempotency-key": point}
        with server.client() as client, pytest.raises(httpx.RemoteProtocolError):
            client.post("/preview/training-jobs", content=body, headers=headers)
        server.kill()  # reap it; its worker ends by itself
        server.start()
        with server.client() as client:
            job = submit(client, body, key=point)
            assert submit(client, body, key=point) == job
            assert ended(client, job)["status"] == "succeeded"
            assert steps(client, model) == [*range(number + 2)]
    with server.client() as client:
        job = submit(client, job_body(model))
        deadline = time.monotonic() + 120
        while client.get(f"/preview/training-jobs/{job}").json()["status"] == "queued":
            assert time.monotonic() < deadline
    server.kill()
    server.start()
    with server.client() as client:
        assert ended(client, job)["status"] == "succeeded"
        assert [event["type"] for event in events(client, job)] == ENDED
        assert steps(client, model) == [*range(len(SERVER_POINTS) + 2)]


class Killed:
    """A server that is killed at a point of a request, and started again; the request is then sent again, twice."""

    def __init__(self, server, kills: Path) -> None:
        self.server = server
        self.kills = kills

    def ask(self, point: str, method: str, path: str, body: object = None, *, key: str | None = None) -> object:
        """The answer to the request that was cut off at the point."""
        request = {} if body is None else {"json": body}
        headers = {"idempotency-key": key or f"{point}-{method}-{path.count('/')}"}
        (self.kills / point).touch()
        with self.server.client() as client, pytest.raises(httpx.RemoteProtocolError):
            client.request(method, path, headers=headers, **request)
        assert not (self.kills / point).exists(), f"nobody got to {point}"
        self.server.kill()  # reap it; its worker ends by itself
        self.server.start()
        with self.server.client() as client:
            answers = [client.request(method, path, headers=headers, **request) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
        assert method == "POST" and path == "/chat/completions" or answers[0].json() == answers[1].json()
        return answers[0].json()


@pytest.fixture
def killed(serve, kills) -> Killed:
    return Killed(serve(environment=killing(kills)), kills)


@pytest.mark.slow
def test_models_that_were_being_made_and_deleted(killed) -> None:
    for point in CREATE_POINTS:
        body = {"project": "tests", "name": point, "base_model": "tiny"}
        model = killed.ask(point, "POST", "/preview/models", body)["id"]
        with killed.server.client() as client:
            assert make_model(client, point, return_existing=True) == model
            assert steps(client, model) == [0]
    for point in DELETE_POINTS:
        with killed.server.client() as client:
            model, other = make_model(client, f"doomed-{point}"), make_model(client, f"spared-{point}")
            for name in (model, other):
                assert ended(client, submit(client, job_body(name)))["status"] == "succeeded"
        said = killed.ask(point, "DELETE", f"/preview/models/{model}")
        assert said == {"model_id": model, "deleted_checkpoints": 1, "deleted_run": True}
        assert not (killed.server.state / "models" / model).exists()
        with killed.server.client() as client:
            assert client.get(f"/preview/models/{model}/checkpoints").status_code == 404
            assert steps(client, other) == [0, 1]
            assert ended(client, submit(client, job_body(other)))["step"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="FITRL_TEST_LONG; one point is the client's, below")
def test_checkpoints_that_were_being_deleted(killed) -> None:
    with killed.server.client() as client:
        model = make_model(client, "thinned")
        for _ in range(len(STEPS_POINTS) + 1):
            assert ended(client, submit(client, job_body(model)))["status"] == "succeeded"
    address = f"/preview/models/{model}/checkpoints"
    for step, point in enumerate(STEPS_POINTS, start=1):
        assert killed.ask(point, "DELETE", address, {"steps": [step, 99]}) == {
            "deleted_count": 1,
            "not_found_steps": [99],
        }
        folder = killed.server.state / "models" / model / "checkpoints"
        with killed.server.client() as client:
            kept = steps(client, model)
            assert kept == [0, *range(step + 1, len(STEPS_POINTS) + 2)]
            assert kept[1:] == sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    with killed.server.client() as client:
        assert ended(client, submit(client, job_body(model)))["step"] == len(STEPS_POINTS) + 2
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]  # the run's trainer has cleared up


@pytest.mark.slow
def test_groups_that_were_being_logged(killed) -> None:
    with killed.server.client() as client:
        model = make_model(client, "logged")
        assert ended(client, submit(client, job_body(model)))["status"] == "succeeded"
    sent = [group([number, 1.0]) for number in range(len(LOG_POINTS) + 1)]
    bodies = [{"model_id": model, "split": "val"} for _ in sent]
    for body, one in zip(bodies, sent, strict=True):
        body["trajectory_groups"] = [found.model_dump(mode="json") for found in wire.groups_to_wire([one, one])]
    with killed.server.client() as client:  # one that nobody disturbs, so that there is something to lose
        assert client.post(f"/preview/models/{model}/log", json=bodies[-1]).status_code == 200
    for point, body in zip(LOG_POINTS, bodies, strict=False):
        assert killed.ask(point, "POST", f"/preview/models/{model}/log", body) is None
    run = fitrl.TrainableModel(model, "models", "tiny", root=killed.server.state)
    expected = [one.to_json() for kept in (sent[-1], *sent[:-1]) for one in (kept, kept)]
    assert [kept.to_json() for kept in run.trajectories(split="val", step=1)] == expected
    lines = (run.run_dir / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1] * len(sent)


@pytest.mark.slow
def test_chats_that_were_being_answered(killed) -> None:
    with killed.server.client() as client:
        model = make_model(client, "talker")
        assert ended(client, submit(client, job_body(model)))["status"] == "succeeded"
        body = {"model": "wandb-artifact:///alice/tests/talker:step1", "max_tokens": 6, "seed": 3, "logprobs": True}
        body["messages"] = [{"role": "user", "content": "3+4="}]
        before = client.post("/chat/completions", json=body).json()
    for point in CHAT_POINTS:
        after = killed.ask(point, "POST", "/chat/completions", body)
        assert (after["choices"], after["usage"]) == (before["choices"], before["usage"])
        with killed.server.client() as client:
            assert steps(client, model) == [0, 1]


@pytest.mark.slow
def test_a_client_waits_for_the_server_that_was_killed(serve, kills, tmp_path) -> None:
    """The real client repeats what was cut off, to the server's next start on the same port."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    server = serve("--port", str(port), environment=killing(kills))
    model = fitrl.TrainableModel("patient", "tests", "tiny", lora=None, root=tmp_path)
    with ServerlessTrainer(url=server.url, key=server.keys["alice"]) as trainer, ThreadPoolExecutor(1) as pool:

        def disturbed(point: str, work: Callable[[], Any]) -> Any:
            (kills / point).touch()
            under_way = pool.submit(work)
            server.wait_for_kill()
            server.start()
            return under_way.result()

        groups = [group([0.0, 1.0])]
        assert trainer.fit_rl(model, groups, learning_rate=1e-3).step == 1
        assert disturbed("submitted", lambda: trainer.fit_rl(model, groups, learning_rate=1e-3)).step == 2
        disturbed("logged", lambda: trainer.log(model, groups))
        assert disturbed("emptying", lambda: trainer.delete_checkpoints(model, [1, 9])) == [1]
        assert [found.step for found in trainer.checkpoints(model)] == [0, 2]
        [stored] = (server.state / "models").iterdir()
    run = fitrl.TrainableModel(stored.name, "models", "tiny", root=server.state)
    assert [kept.to_json() for kept in run.trajectories(step=2)] == [groups[0].to_json()]


@pytest.mark.slow
def test_a_job_that_takes_too_long_is_failed_and_the_next_one_trains(serve, kills, tmp_path) -> None:
    server = serve("--max-job-s", "6", environment=killing(kills))
    model = fitrl.TrainableModel("slow", "tests", "tiny", lora=None, root=tmp_path)
    with ServerlessTrainer(url=server.url, key=server.keys["alice"]) as trainer:
        (kills / "begun").write_text("hang")
        with pytest.raises(JobFailedError, match="ran for longer than 6 s, which is the longest here: send fewer"):
            trainer.fit_rl(model, [group([0, 1])], learning_rate=1e-3)
        assert model.step == 0 and not (kills / "begun").exists()
        if LONG:  # one that is saved, and hangs before its end is told, is not failed
            (kills / "saved").write_text("hang")
            assert trainer.fit_rl(model, [group([0, 1])], learning_rate=1e-3).step == 1
        assert trainer.fit_rl(model, [group([0, 2])], learning_rate=1e-3).step == model.step == 1 + LONG
    with server.client() as client:
        [failed] = [line.split()[4] for line in server.log.splitlines() if "ran for too long" in line]
        assert [event["type"] for event in events(client, failed)] == ["training_started", "training_failed"]


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="FITRL_TEST_LONG; recover's part is in test_queue")
def test_a_job_whose_server_was_away_for_longer_than_it_may_take_is_trained(serve, kills) -> None:
    server = serve("--max-job-s", "30", environment=killing(kills))
    (kills / "begun").write_text("hang")
    with server.client() as client:
        job = submit(client, job_body(make_model(client, "left")))
        while (kills / "begun").exists():
            assert client.get(f"/preview/training-jobs/{job}").json()["status"] in ("queued", "running")
    server.kill()
    database = Database(server.state / "serve.sqlite")
    with database.transaction() as connection:
        connection.execute("UPDATE jobs SET started = started - 3600 WHERE id = ?", (job,))
    database.close()
    server.start()
    with server.client() as client:
        assert ended(client, job)["status"] == "succeeded"


@pytest.mark.slow
def test_a_stopped_server_finishes_its_job_and_keeps_the_others(serve) -> None:
    server = serve()
    with server.client() as client:
        model = make_model(client, "stopped")
        jobs = [submit(client, job_body(model)) for _ in range(30)]
        ended(client, jobs[0])
    assert server.stop() == 0
    assert not any(word in server.log for word in ("Traceback", "ERROR", "killed"))
    server.start()
    with server.client() as client:
        assert {ended(client, job)["status"] for job in jobs} == {"succeeded"}
        assert steps(client, model) == [*range(31)]
