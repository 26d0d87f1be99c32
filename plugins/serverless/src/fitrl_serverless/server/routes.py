"""The addresses of the API, each one call of a part of the server."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import FileResponse

import fitrl
from fitrl_serverless import wire
from fitrl_serverless.server.bodies import IdempotencyKey, Owner, Received, TheService, documented, json_body, once_of
from fitrl_serverless.server.errors import RefusedError
from fitrl_serverless.server.paging import Page
from fitrl_serverless.server.settings import Limits
from fitrl_serverless.wire.groups import Group
from fitrl_serverless.wire.numbers import Count

_WORDS = {
    400: "the body cannot be unpacked",
    401: "no key, or a wrong one",
    403: "not allowed",
    404: "there is none, or it is another owner's",
    408: "the body did not arrive in time",
    409: "not as things stand",
    413: "too large",
    415: "no JSON, or packed otherwise than by gzip",
    422: "a value that cannot be used",
    429: "too much at once",
    503: "not now",
}
_READING = (401, 404, 422, 503)
_SENDING = (400, 401, 404, 408, 413, 415, 422, 503)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": wire.ErrorBody, "description": _WORDS[status]} for status in sorted(set(statuses))}


Id = Annotated[str, Path(min_length=1, max_length=128)]
Step = Annotated[Count, Path()]
After = Annotated[str | None, Query(min_length=1, max_length=256, description="id of the last item that you have")]
Limit = Annotated[int, Query(ge=1, le=100)]

models = APIRouter(prefix="/preview/models", tags=["models"])
jobs = APIRouter(prefix="/preview/training-jobs", tags=["training jobs"])
chat = APIRouter(tags=["chat"])
health = APIRouter(tags=["health"])


@models.post("", openapi_extra=documented(wire.CreateModel), responses=_errors(*_SENDING, 403, 409, 429))
def create_model(
    request: Request,
    service: TheService,
    received: Annotated[Received[wire.CreateModel], Depends(json_body(wire.CreateModel))],
    idempotency_key: IdempotencyKey = None,
) -> wire.Model:
    """Make a model at step 0, its base model."""
    return service.registry.create(received.owner, received.body, received.once(request, idempotency_key))


@models.delete("/{model_id}", responses=_errors(*_READING, 409))
def delete_model(
    request: Request, service: TheService, owner: Owner, model_id: Id, idempotency_key: IdempotencyKey = None
) -> wire.DeletedModel:
    """Delete a model, its checkpoints, jobs and events."""
    deleted = service.registry.delete(owner, model_id, once_of(request, owner, idempotency_key))
    service.chats.forget(model_id)
    return deleted


@models.get("/{model_id}/checkpoints", responses=_errors(*_READING))
def list_checkpoints(
    service: TheService,
    owner: Owner,
    model_id: Id,
    after: After = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "asc",
) -> wire.CheckpointPage:
    """List checkpoints by step."""
    return service.checkpoints.page(owner, model_id, Page(after=after, limit=limit, order=order))


@models.delete(
    "/{model_id}/checkpoints",
    openapi_extra=documented(wire.DeleteCheckpoints),
    responses=_errors(*_SENDING, 409),
)
def delete_checkpoints(
    request: Request,
    service: TheService,
    model_id: Id,
    received: Annotated[Received[wire.DeleteCheckpoints], Depends(json_body(wire.DeleteCheckpoints))],
    idempotency_key: IdempotencyKey = None,
) -> wire.DeletedCheckpoints:
    """Delete checkpoints; not the newest, from which training goes on."""
    once = received.once(request, idempotency_key)
    return service.checkpoints.delete(received.owner, model_id, received.body.steps, once)


@models.get("/{model_id}/checkpoints/{step}/files", responses=_errors(*_READING))
def list_files(service: TheService, owner: Owner, model_id: Id, step: Step) -> wire.CheckpointFiles:
    """List the files of a checkpoint, as transformers and PEFT load them."""
    return service.checkpoints.files(owner, model_id, step)


@models.get(
    "/{model_id}/checkpoints/{step}/files/{name}",
    response_class=FileResponse,
    responses=_errors(*_READING)
    | {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
def download_file(service: TheService, owner: Owner, model_id: Id, step: Step, name: Id) -> FileResponse:
    """Download a file of a checkpoint."""
    path = service.checkpoints.file(owner, model_id, step, name)
    return FileResponse(path, media_type="application/octet-stream")


@models.post("/{model_id}/log", openapi_extra=documented(wire.LogGroups), responses=_errors(*_SENDING))
def log_groups(
    request: Request,
    service: TheService,
    model_id: Id,
    received: Annotated[Received[wire.LogGroups], Depends(json_body(wire.LogGroups))],
    idempotency_key: IdempotencyKey = None,
) -> None:
    """Keep trajectories in the model's run folder."""
    if received.body.model_id != model_id:
        raise RefusedError(422, "model_id in the body is not the one in the address")
    _check_size(received.body.trajectory_groups, service.settings.limits)
    service.logs.keep(received.owner, received.body, received.once(request, idempotency_key))


@jobs.post("", openapi_extra=documented(wire.CreateTrainingJob), responses=_errors(*_SENDING, 429))
def create_job(
    request: Request,
    service: TheService,
    received: Annotated[Received[wire.CreateTrainingJob], Depends(json_body(wire.CreateTrainingJob))],
    idempotency_key: IdempotencyKey = None,
) -> wire.CreatedTrainingJob:
    """Put a job into the queue: one call of `fit_rl`."""
    body = received.body
    _check_size(body.trajectory_groups, service.settings.limits)
    # what cannot be read or contradicts itself is refused now, not in the queue
    wire.groups_from_wire(body.trajectory_groups)
    _check_config(body.experimental_config)
    once = received.once(request, idempotency_key)
    identity = service.queue.submit(received.owner, body, received.text, once, service.settings.limits.jobs)
    return wire.CreatedTrainingJob(id=identity)


@jobs.get("/{job_id}", responses=_errors(*_READING))
def get_job(service: TheService, owner: Owner, job_id: Id) -> wire.TrainingJob:
    """Say where a job stands."""
    return service.queue.get(owner, job_id)


@jobs.get("/{job_id}/events", responses=_errors(*_READING))
def list_events(
    service: TheService, owner: Owner, job_id: Id, after: After = None, limit: Limit = 20
) -> wire.EventPage:
    """List what happened in a job, oldest first."""
    return service.queue.events(owner, job_id, Page(after=after, limit=limit))


@jobs.post("/{job_id}/cancel", responses=_errors(*_READING))
def cancel_job(service: TheService, owner: Owner, job_id: Id) -> wire.TrainingJob:
    """End a job; one whose step is saved already is not undone."""
    return service.queue.cancel(owner, job_id)


@chat.post("/chat/completions", openapi_extra=documented(wire.ChatRequest), responses=_errors(*_SENDING, 429))
async def complete_chat(
    service: TheService, received: Annotated[Received[wire.ChatRequest], Depends(json_body(wire.ChatRequest))]
) -> wire.ChatCompletion:
    """Sample from a trained model."""
    return await service.chats.complete(received.owner, received.body)


@health.get("/health")
def get_health(service: TheService) -> dict[str, str]:
    """Say that the server answers, how its worker is, and that its objective is fitrl's own."""
    return {"status": "ok", "worker": service.supervisor.state, "service": "fitrl", "objective": "exact"}


def _check_config(config: wire.ExperimentalConfig | None) -> None:
    known = {field.name for field in dataclasses.fields(fitrl.Objective)}
    given = {} if config is None else config.arguments()
    fitrl.Objective(**{name: value for name, value in given.items() if name in known})


def _check_size(groups: Sequence[Group], limits: Limits) -> None:
    trajectories = sum(len(group.trajectories) for group in groups)
    for what, count, most in (
        ("groups", len(groups), limits.groups),
        ("trajectories", trajectories, limits.trajectories),
    ):
        if count > most:
            raise RefusedError(413, f"one request may hold {most} {what}, got {count}: send several")
