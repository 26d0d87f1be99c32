"""Idempotency keys: a request that is sent again does nothing again, and gets the answer that it got.

The answer is written in the transaction of the change itself. So a retry finds both or neither, however the server
ended in between.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fitrl_serverless.server.database import Database
from fitrl_serverless.server.errors import RefusedError

# long after a client has given up; of a job as long as its record is there, because clients keep what was not answered
KEPT_S = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """The idempotency key of a request.

    Attributes:
        owner: whose request it is: two owners may use the same key.
        key: None does the request each time that it is sent.
        digest: of method, address and body, which have to be the same.
    """

    owner: str
    key: str | None
    digest: bytes

    @classmethod
    def of(cls, owner: str, key: str | None, *parts: bytes) -> Once:
        """Of a request's parts."""
        digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).digest()
        return cls(owner=owner, key=key, digest=digest)


def do_once(database: Database, once: Once, work: Callable[[sqlite3.Connection], Any]) -> Any:
    """Do work in a transaction and remember its answer, JSON; or return the answer that is remembered.

    Raises:
        RefusedError: 422, another request was sent under this key.
    """
    with database.transaction() as connection:
        if once.key is not None:
            known = connection.execute(
                "SELECT digest, answer FROM answers WHERE owner = ? AND key = ?", (once.owner, once.key)
            ).fetchone()
            if known is not None and bytes(known["digest"]) != once.digest:
                raise RefusedError(422, "this Idempotency-Key was used for another request: use a new one")
            if known is not None:
                return json.loads(known["answer"])
        answer = work(connection)
        if once.key is not None:
            connection.execute(
                "INSERT INTO answers (owner, key, digest, answer, created) VALUES (?, ?, ?, ?, ?)",
                (once.owner, once.key, once.digest, json.dumps(answer), time.time()),
            )
        return answer


def forget_old_answers(database: Database) -> None:
    """Drop answers that nobody asks for again; never a job's, which would then be trained twice."""
    with database.transaction() as connection:
        connection.execute(
            "DELETE FROM answers WHERE created < ? AND trim(answer, '\"') NOT IN (SELECT id FROM jobs)",
            (time.time() - KEPT_S,),
        )
