"""Training jobs over HTTP: what a job comes to, and that it is what `LocalTrainer` would have made of it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from asking import JSON, ended, events, job_body, make_model, steps, submit
from safetensors.torch import load, load_file

import fitrl
from helpers import completion, group, user


@pytest.mark.parametrize("lora", [True, False])
def test_a_job_is_the_step_that_a_trainer_in_process_takes(server, tmp_path, lora) -> None:
    groups = [group([0, 1, 0, 1]), group([1, 0, 0.5])]
    config = {"learning_rate": 1e-3, "ppo": True, "epsilon": 0.1, "importance_sampling_level": "sequence"}
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        settings = fitrl.LoraSettings() if lora else None
        model = fitrl.TrainableModel("twin", "tests", "tiny", lora=settings, root=tmp_path)
        for _ in range(2):
            result = trainer.fit_rl(model, groups, **config)
    with server.client() as client:
        remote = make_model(client, f"twin-{lora}", lora=None if lora else False)
        for _ in range(2):
            job = submit(client, job_body(remote, groups, **config))
            assert ended(client, job)["status"] == "succeeded"
        (started, step, end) = events(client, job)
        name = "adapter_model.safetensors" if lora else "model.safetensors"
        weights = load(client.get(f"/preview/models/{remote}/checkpoints/2/files/{name}").content)
    assert [started["type"], step["type"], end["type"]] == ["training_started", "gradient_step", "training_ended"]
    assert started["data"] == {"num_sequences": 7}
    assert end["data"] == {"step": 2, "num_optimizer_steps": 1, "dropped": {}}
    for key, value in result.metrics.items():
        if not key.startswith(("time/", "throughput/", "memory/")):
            assert step["data"][key] == pytest.approx(value, rel=1e-6), key
    assert result.checkpoint_path is not None
    local = load_file(result.checkpoint_path / name)
    assert weights.keys() == local.keys()
    for key, tensor in local.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-6, atol=1e-8)


def test_nothing_to_learn_from_is_an_outcome(server) -> None:
    with server.client() as client:
        model = make_model(client, "flat")
        job = submit(client, job_body(model, [group([1, 1])]))
        assert ended(client, job)["status"] == "succeeded"
        assert [event["type"] for event in events(client, job)] == ["training_started", "training_ended"]
        assert events(client, job)[-1]["data"] == {
            "step": 0,
            "num_optimizer_steps": 0,
            "dropped": {"flat_groups": 1},
        }
        assert steps(client, model) == [0]


def test_a_job_that_cannot_be_trained_fails_with_a_reason_and_the_next_one_trains(server) -> None:
    cold = fitrl.TrajectoryGroup(
        [
            fitrl.Trajectory(messages_and_choices=[user("3+4="), completion(str(i), temperature=0.0)], reward=i)
            for i in range(2)
        ]
    )
    with server.client() as client:
        model = make_model(client, "failing")
        jobs = [
            submit(client, body)
            for body in (
                job_body(model, [cold]),
                job_body(model, [group([0, math.nan])]),
                job_body(model),
            )
        ]
        found = [ended(client, job) for job in jobs]
        assert [job["status"] for job in found] == ["failed", "failed", "succeeded"]
        assert "temperature 0.0 cannot be trained on" in found[0]["error_message"]
        assert events(client, jobs[0])[-1]["data"] == {"error_message": found[0]["error_message"]}
        assert events(client, jobs[0])[-1]["type"] == "training_failed"
        assert steps(client, model) == [0, 1]


def test_a_waiting_job_can_be_cancelled(server) -> None:
    with server.client() as client:
        model = make_model(client, "cancelled")
        jobs = [submit(client, job_body(model)) for _ in range(12)]
        asked = [client.post(f"/preview/training-jobs/{job}/cancel").json() for job in reversed(jobs)]
        assert asked[0]["status"] == "cancelled"  # the last one had not begun
        found = [ended(client, job) for job in jobs]
        trained = [job["step"] for job in found if job["status"] == "succeeded"]
        assert {job["status"] for job in found} <= {"cancelled", "succeeded"}
        assert steps(client, model) == [0, *trained]
        assert [event["type"] for event in events(client, jobs[-1])][-1] == "training_cancelled"
        last = client.post(f"/preview/training-jobs/{jobs[-1]}/cancel").json()
        assert last["status"] == "cancelled"  # cancelling twice changes nothing


def test_a_request_sent_again_trains_once(server) -> None:
    with server.client() as client:
        model = make_model(client, "once")
        body = job_body(model)
        jobs = {submit(client, body, key="k1") for _ in range(5)}
        assert len(jobs) == 1
        other = client.post("/preview/training-jobs", content=body + " ", headers=JSON | {"idempotency-key": "k1"})
        assert other.status_code == 422 and "Idempotency-Key" in other.json()["detail"]
        assert ended(client, jobs.pop())["step"] == 1
        assert submit(client, body, key="k1") and steps(client, model) == [0, 1]
        with server.client("bob") as bob:  # another owner's key of the same name
            theirs = submit(bob, job_body(make_model(bob, "once")), key="k1")
            assert ended(bob, theirs)["status"] == "succeeded"


def test_a_model_with_jobs_is_not_deleted(server) -> None:
    with server.client() as client:
        model = make_model(client, "busy")
        jobs = [submit(client, job_body(model)) for _ in range(6)]
        refused = client.delete(f"/preview/models/{model}")
        for job in jobs:
            client.post(f"/preview/training-jobs/{job}/cancel")
            ended(client, job)
        assert refused.status_code == 409 and "cancel them first" in refused.json()["detail"]
        assert client.delete(f"/preview/models/{model}").status_code == 200


@pytest.mark.parametrize(
    "config",
    [
        {"learning_rate": -1.0},
        {"learning_rate": "1"},
        {"learning_rat": 1.0},
        {"num_epochs": 2},
        {"ppo": 1},
        {"advantage_balance": 2.0},
        {"importance_sampling_level": "word"},
    ],
)
def test_a_wrong_argument_is_refused_at_once(server, config) -> None:
    with server.client() as client:
        model = make_model(client, "arguments", return_existing=True)
        body = json.loads(job_body(model)) | {"experimental_config": config}
        answer = client.post("/preview/training-jobs", json=body)
    assert answer.status_code == 422 and f"experimental_config.{next(iter(config))}" in answer.json()["detail"]


def test_what_contradicts_itself_is_refused_at_once(server) -> None:
    with server.client() as client:
        model = make_model(client, "arguments", return_existing=True)
        answer = client.post("/preview/training-jobs", content=job_body(model, epsilon=1.5), headers=JSON)
    assert answer.status_code == 422 and "epsilon=1.5 has no effect" in answer.json()["detail"]
