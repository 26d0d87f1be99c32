"""The FastAPI application: routes, errors as `{"detail": ...}`, the OpenAPI document, start and end of the worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool

import fitrl
from fitrl.errors import DataError, InvalidArgumentError
from fitrl_serverless import wire
from fitrl_serverless.server import routes
from fitrl_serverless.server.answers import forget_old_answers
from fitrl_serverless.server.errors import RefusedError
from fitrl_serverless.server.intake import Intake
from fitrl_serverless.server.service import Service

_BODIES = (wire.CreateModel, wire.DeleteCheckpoints, wire.LogGroups, wire.CreateTrainingJob, wire.ChatRequest)


def make_app(service: Service, *, grace_s: float) -> FastAPI:
    """Make the application.

    Args:
        service: the parts of the server.
        grace_s: how long the worker's job may go on once the server ends.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(service.checkpoints.tidy)
        await run_in_threadpool(service.logs.cut_back)
        await run_in_threadpool(forget_old_answers, service.database)
        service.supervisor.start()
        yield
        await run_in_threadpool(service.supervisor.stop, grace_s)

    app = FastAPI(
        title="fitrl serve",
        version=fitrl.__version__,
        description="Reinforcement learning of language models over HTTP.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    for router in (routes.models, routes.jobs, routes.chat, routes.health):
        app.include_router(router)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    for kind in (DataError, InvalidArgumentError):
        app.add_exception_handler(kind, _unusable)
    app.add_middleware(Intake, limits=service.settings.limits)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that `json_body` reads."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, definitions = models_json_schema(
            [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
        )
        schemas = document["components"]["schemas"]
        for name, schema in definitions["$defs"].items():
            schemas.setdefault(name, schema)
        app.openapi_schema = document
    return app.openapi_schema


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError)
    return JSONResponse({"detail": str(error)}, error.status, error.headers)


def _unusable(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    lines = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()[:3]]
    return JSONResponse({"detail": "; ".join(lines)}, 422)
