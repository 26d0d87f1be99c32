"""`Service`: the calls of the training API, typed; what enters and leaves are models of the wire.

The same calls reach `fitrl serve` and any other service of this API. What only `fitrl serve` understands is asked of it
alone: `knows_fitrl` says which it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from fitrl_serverless import wire
from fitrl_serverless.client.bodies import Body, FileBody, PartsBody, json_body
from fitrl_serverless.client.connection import Answer, Connection
from fitrl_serverless.client.errors import InvalidRequestError, MalformedAnswerError, NotFoundError, ServiceError

_M = TypeVar("_M", bound=wire.WireModel)
_PAGE = 100
_MOST_CHATS = 48  # at once; what waits costs nothing here, and a service turns away what is too much for it
_CANNOT_CANCEL = (404, 405, 501)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a service says of itself at /health.

    Attributes:
        knows_fitrl: whether it is `fitrl serve`: it takes fitrl's own keys, gzipped bodies and cancellations.
        is_exact: whether its mathematics are fitrl's objective.
    """

    knows_fitrl: bool
    is_exact: bool


class Service:
    """The training API of one service, on its connection's event loop.

    Args:
        connection: to the service.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._about: About | None = None
        self._chats: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def about(self) -> About:
        """Ask once what the service is."""
        if self._about is None:
            try:
                answer = await self.connection.request("GET", "/health")
            except (MalformedAnswerError, NotFoundError, InvalidRequestError):
                self._about = About(knows_fitrl=False, is_exact=False)  # any 200 will do elsewhere
                return self._about
            said = _object(answer.content)
            knows = said.get("service") == "fitrl"
            self._about = About(knows_fitrl=knows, is_exact=knows and said.get("objective") == "exact")
        return self._about

    # -- models and checkpoints ---------------------------------------------------------------------------------

    async def open_model(self, request: wire.CreateModel) -> wire.Model:
        """Create a model, or find the one that is there."""
        body = json_body(request.model_dump_json(exclude_none=True))
        answer = await self.connection.request("POST", "/preview/models", body=body, repeatable=request.return_existing)
        return _model(wire.Model, answer, "POST /preview/models")

    async def delete_model(self, model_id: str) -> wire.DeletedModel:
        """Delete a model with everything that it has."""
        path = _path("models", model_id)
        return _model(wire.DeletedModel, await self._delete(path), f"DELETE {path}")

    async def newest_checkpoint(self, model_id: str) -> wire.Checkpoint | None:
        """The checkpoint of the highest step; None before the first."""
        page = await self._checkpoints(model_id, {"limit": 1, "order": "desc"})
        return page.data[0] if page.data else None

    async def checkpoints(self, model_id: str) -> list[wire.Checkpoint]:
        """All checkpoints, oldest first."""
        found: list[wire.Checkpoint] = []
        after: str | None = None
        while True:
            query: dict[str, str | int] = {"limit": _PAGE, "order": "asc"}
            page = await self._checkpoints(model_id, query if after is None else query | {"after": after})
            found += page.data
            last = page.last_id or (page.data[-1].id if page.data else None)
            if not page.data or not page.has_more or last == after:
                return found
            after = last

    async def _checkpoints(self, model_id: str, query: dict[str, str | int]) -> wire.CheckpointPage:
        path = _path("models", model_id, "checkpoints")
        return _model(wire.CheckpointPage, await self.connection.request("GET", path, query=query), f"GET {path}")

    async def delete_checkpoints(self, model_id: str, steps: list[int]) -> wire.DeletedCheckpoints:
        """Delete the checkpoints of these steps."""
        path = _path("models", model_id, "checkpoints")
        body = json_body(wire.DeleteCheckpoints(steps=steps).model_dump_json())
        return _model(wire.DeletedCheckpoints, await self._delete(path, body), f"DELETE {path}")

    async def _delete(self, path: str, body: Body | None = None) -> Answer:
        """Delete; what is sent again gets the first answer, not that there is nothing left."""
        return await self.connection.request("DELETE", path, body=body, idempotency_key=uuid.uuid4().hex)

    async def download_checkpoint(self, model_id: str, step: int, folder: Path) -> None:
        """Write the files of a checkpoint into a folder that is there; each is checked against its sum.

        Raises:
            MalformedAnswerError: a file is not what the service says that it is, or its name would leave the folder.
        """
        path = _path("models", model_id, "checkpoints", str(step), "files")
        listed = _model(wire.CheckpointFiles, await self.connection.request("GET", path), f"GET {path}")
        for file in listed.data:
            if file.name in ("", ".", "..") or file.name != Path(file.name).name or "\\" in file.name:
                raise MalformedAnswerError(f"the checkpoint has a file {file.name!r}, which is no plain name")
            with (folder / file.name).open("wb") as target:
                sink = _Sink(target)
                await self.connection.download(f"{path}/{quote(file.name)}", sink.take, sink.restart)
            if (sink.size, sink.digest.hexdigest()) != (file.size, file.sha256):
                raise MalformedAnswerError(
                    f"{file.name} of step {step} arrived with {sink.size} bytes and another sum than the service named "
                    f"({file.size} bytes): download it again"
                )

    async def log(self, model_id: str, groups: list[wire.Group], split: str) -> None:
        """Keep groups with the model on the service."""
        head = wire.LogGroups(model_id=model_id, trajectory_groups=[], split=split)

        def parts() -> Iterator[bytes]:
            yield head.model_dump_json(exclude={"trajectory_groups"}).encode()[:-1] + b',"trajectory_groups":'
            yield from wire.groups_json(groups)
            yield b"}"

        body = PartsBody(parts, packed=(await self.about()).knows_fitrl)
        path = _path("models", model_id, "log")
        await self.connection.request("POST", path, body=body, idempotency_key=uuid.uuid4().hex)

    # -- jobs ---------------------------------------------------------------------------------------------------

    async def submit(self, body: Path, idempotency_key: str) -> str:
        """Submit a gzipped `CreateTrainingJob`; however often it is sent, the key makes it one job. Returns its id."""
        answer = await self.connection.request(
            "POST",
            "/preview/training-jobs",
            body=FileBody(body, packed=(await self.about()).knows_fitrl),
            idempotency_key=idempotency_key,
        )
        return _model(wire.CreatedTrainingJob, answer, "POST /preview/training-jobs").id

    async def job(self, job_id: str) -> wire.TrainingJob:
        """Where a job stands."""
        path = _path("training-jobs", job_id)
        return _model(wire.TrainingJob, await self.connection.request("GET", path), f"GET {path}")

    async def cancel(self, job_id: str) -> bool:
        """Ask the service to stop a job; False if it has no such call, so that the job goes on."""
        path = _path("training-jobs", job_id, "cancel")
        try:
            await self.connection.request("POST", path, repeatable=True)
        except ServiceError as error:
            if error.status in _CANNOT_CANCEL:
                return False
            if error.status != 409:  # it has ended by itself
                raise
        return True

    async def events(self, job_id: str, *, after: str | None = None) -> AsyncIterator[wire.Event]:
        """The events that a job has had so far, after the one named, page by page."""
        path = _path("training-jobs", job_id, "events")
        while True:
            query: dict[str, str | int] = {"limit": _PAGE}
            answer = await self.connection.request(
                "GET", path, query=query if after is None else query | {"after": after}
            )
            page = _model(wire.EventPage, answer, f"GET {path}")
            for event in page.data:
                yield event
            last = page.last_id or (page.data[-1].id if page.data else None)
            if not page.data or not page.has_more or last == after:
                return
            after = last

    # -- samples ------------------------------------------------------------------------------------------------

    async def chat(self, request: wire.ChatRequest, *, silence_s: float) -> wire.ChatCompletion:
        """Sample; nothing is changed by it, so it is repeated like a GET."""
        loop = asyncio.get_running_loop()
        if self._chats is None or self._chats[0] is not loop:
            self._chats = loop, asyncio.Semaphore(_MOST_CHATS)
        body = json_body(request.model_dump_json(exclude_none=True))
        async with self._chats[1]:
            answer = await self.connection.request(
                "POST", "/chat/completions", body=body, repeatable=True, silence_s=silence_s
            )
        return _model(wire.ChatCompletion, answer, "POST /chat/completions")


def _path(*parts: str) -> str:
    return "/preview/" + "/".join(quote(part, safe="") for part in parts)


class _Sink:
    """A file that is being downloaded, and the sum of what arrived."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self.restart()

    def restart(self) -> None:
        """Begin again, of a download that broke."""
        self._target.seek(0)
        self._target.truncate()
        self.size, self.digest = 0, hashlib.sha256()

    def take(self, chunk: bytes) -> None:
        """Write what arrived."""
        self._target.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)


def _model(kind: type[_M], answer: Answer, request: str) -> _M:
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError as error:
        raise MalformedAnswerError(
            f"the answer is no {kind.__name__}: {wire.explain(error)}",
            request=request,
            status=answer.status,
            request_id=answer.request_id,
        ) from error


def _object(content: bytes) -> dict[str, Any]:
    try:
        said = json.loads(content)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
