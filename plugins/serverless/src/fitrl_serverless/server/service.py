"""The parts of a running server, made together."""

from __future__ import annotations

from dataclasses import dataclass

from fitrl_serverless.server.chats import Chats
from fitrl_serverless.server.checkpoints import Checkpoints
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.logs import Logs
from fitrl_serverless.server.queue import Queue
from fitrl_serverless.server.registry import Registry
from fitrl_serverless.server.settings import Settings
from fitrl_serverless.server.supervisor import Supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the routes call."""

    settings: Settings
    database: Database
    registry: Registry
    checkpoints: Checkpoints
    logs: Logs
    queue: Queue
    chats: Chats
    supervisor: Supervisor

    @classmethod
    def make(cls, settings: Settings, database: Database) -> Service:
        """Make the parts; nothing runs yet."""
        registry = Registry(database, settings)
        return cls(
            settings=settings,
            database=database,
            registry=registry,
            checkpoints=Checkpoints(database, registry),
            logs=Logs(database, registry),
            queue=Queue(database),
            chats=Chats(registry, settings),
            supervisor=Supervisor(settings, database),
        )
