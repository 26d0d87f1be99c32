"""Requests with a body: who sends it, what it says, and its idempotency key.

The body is read as JSON of its wire model, as strictly as the model says. It is read after the key was checked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Header, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ValidationError

from fitrl_serverless.server.answers import Once
from fitrl_serverless.server.errors import RefusedError
from fitrl_serverless.server.keys import owner_of
from fitrl_serverless.server.service import Service
from fitrl_serverless.wire import explain

_T = TypeVar("_T", bound=BaseModel)
_bearer = HTTPBearer(auto_error=False, description="A key of `fitrl serve key add`.")


def service_of(request: Request) -> Service:
    """The server's parts."""
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(service_of)]


def require_owner(
    service: TheService, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> str:
    """Whose request it is.

    Raises:
        RefusedError: 401, no key, or a wrong or revoked one; the answer does not say which.
    """
    owner = owner_of(service.database, credentials.credentials) if credentials is not None else None
    if owner is None:
        raise RefusedError(
            401, "send a key of this server: Authorization: Bearer fitrl-...", {"www-authenticate": "Bearer"}
        )
    return owner


Owner = Annotated[str, Depends(require_owner)]


def once_of(request: Request, owner: str, key: str | None, text: bytes = b"") -> Once:
    """The idempotency key of an owner's request."""
    return Once.of(owner, key, request.method.encode(), request.url.path.encode(), text)


IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=128,
        pattern=r"^[!-~]+$",
        description="The same key and body again do nothing again, and get the same answer.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Received(Generic[_T]):
    """A request's body.

    Attributes:
        owner: whose it is.
        body: as its wire model.
        text: as it came, unpacked.
    """

    owner: str
    body: _T
    text: bytes

    def once(self, request: Request, key: str | None) -> Once:
        """Its idempotency key."""
        return once_of(request, self.owner, key, self.text)


def json_body(model: type[_T]) -> Callable[[Request, str], Awaitable[Received[_T]]]:
    """A dependency that reads a body."""

    async def read(request: Request, owner: Owner) -> Received[_T]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusedError(415, "send JSON, with Content-Type: application/json")
        text = await request.body()
        try:
            return Received(owner=owner, body=model.model_validate_json(text), text=text)
        except ValidationError as error:
            raise RefusedError(422, explain(error)) from error

    return read


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI document says of a body that `json_body` reads."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
