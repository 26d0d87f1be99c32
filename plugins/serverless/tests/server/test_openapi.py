"""The OpenAPI document holds: schemathesis makes requests of it, good and bad, and checks every answer against it."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from asking import LONG, ended, job_body, make_model, submit
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

MANY = 40 if LONG else 5
# 422 also stands for what a schema cannot say: epsilon above 1, a chat without messages, an Idempotency-Key used before
EXCEPT = ["positive_data_acceptance"]


@pytest.fixture(scope="module")
def document(server):
    """The document of the running server."""
    load_all_checks()
    with server.client() as client:
        ended(client, submit(client, job_body(make_model(client, "documented"))))
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_documented(server, document, mode) -> None:
    key = {"authorization": f"Bearer {server.keys['alice']}"}
    seen = []
    for operation in (found.ok() for found in document.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.label == "GET /health":
            continue  # takes nothing that could be wrong
        seen.append(operation.label)

        @settings(max_examples=MANY, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def conform(case: Case) -> None:
            case.call_and_validate(headers=key, excluded_checks=CHECKS.get_by_names(EXCEPT), timeout=60)

        conform()
    assert len(seen) >= 12
    assert httpx.get(f"{server.url}/health").json()["worker"] == "ready"


def test_bodies_are_documented(server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    body = document["paths"]["/preview/training-jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CreateTrainingJob"}
    assert "learning_rate" in document["components"]["schemas"]["ExperimentalConfig"]["properties"]
    assert document["components"]["securitySchemes"]
