"""kill -9 of worker and server in every phase of a job: none is lost, none is trained twice."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
import torch
from asking import JSON, LONG, ended, events, job_body, make_model, steps, submit
from safetensors.torch import load, load_file

import fitrl
from helpers import group

# those that a job is easiest lost or doubled in are always tried
WORKER_POINTS = ["settled", "saved"]
if LONG:
    WORKER_POINTS = ["claimed", "begun", "trained", "settled", "saving", "saved", "ended"]
SERVER_POINTS = ["receiving", "submitted"] if LONG else ["submitted"]
ENDED = ["training_started", "gradient_step", "training_ended"]


@pytest.fixture
def kills(tmp_path: Path) -> Path:
    folder = tmp_path / "kills"
    folder.mkdir()
    return folder


def killing(kills: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).with_name("killing")), "FITRL_TEST_KILLS": str(kills)}


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
