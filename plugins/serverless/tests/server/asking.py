"""What the server's tests ask for, again and again."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import httpx

import fitrl
from fitrl_serverless import wire
from helpers import group

LONG = "FITRL_TEST_LONG" in os.environ  # all kill points, all clients, many examples: minutes more
JSON = {"content-type": "application/json"}


def make_model(client: httpx.Client, name: str, **fields: Any) -> str:
    """Make a model; returns its id."""
    answer = client.post("/preview/models", json={"project": "tests", "name": name, "base_model": "tiny"} | fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def job_body(model_id: str, groups: Sequence[fitrl.TrajectoryGroup] | None = None, **config: Any) -> str:
    """The body of a job."""
    body = wire.CreateTrainingJob(
        model_id=model_id,
        trajectory_groups=wire.groups_to_wire([group([0, 1, 0, 1])] if groups is None else groups),
        experimental_config=wire.ExperimentalConfig(**{"learning_rate": 1e-3} | config),
    )
    return body.model_dump_json(exclude_none=True)


def submit(client: httpx.Client, body: str, key: str | None = None) -> str:
    """Put a job into the queue; returns its id."""
    headers = JSON | ({} if key is None else {"idempotency-key": key})
    answer = client.post("/preview/training-jobs", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def ended(client: httpx.Client, job_id: str, within_s: float = 500.0) -> dict[str, Any]:
    """The job, once it is at its end."""
    deadline, pause = time.monotonic() + within_s, 0.02
    while time.monotonic() < deadline:
        job: dict[str, Any] = client.get(f"/preview/training-jobs/{job_id}").json()
        if job["status"] in wire.ENDED:
            return job
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)  # fifty clients ask at once
    raise AssertionError(f"{job_id} is not at its end after {within_s} s: {job}")


def events(client: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    """All events of a job, page by page."""
    found: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = client.get(f"/preview/training-jobs/{job_id}/events", params={"limit": 2} | after).json()
        found += page["data"]
        if not page["has_more"]:
            return found
        after = {"after": page["last_id"]}


def steps(client: httpx.Client, model_id: str) -> list[int]:
    """Steps of a model's checkpoints."""
    page = client.get(f"/preview/models/{model_id}/checkpoints", params={"limit": 100}).json()
    return [checkpoint["step"] for checkpoint in page["data"]]
