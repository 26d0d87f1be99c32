"""Bearer keys: made once, shown once, kept as a digest.

A key is `fitrl-<id>-<secret>`. The id finds the row; the secret has 256 random bits, so one round of SHA-256 keeps it
(slow hashes are for passwords that people choose), and it is compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass

from fitrl.errors import InvalidArgumentError
from fitrl_serverless.server.database import Database
from fitrl_serverless.wire.artifacts import NAME_PATTERN

_KEY = re.compile(r"fitrl-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")
_NOBODY = hashlib.sha256(b"").digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEntry:
    """What is known of a key; not the key."""

    id: str
    owner: str
    created: float
    revoked: float | None


def add_key(database: Database, owner: str) -> str:
    """Make a key for an owner; it is returned once and cannot be had again.

    Keys of one owner reach the same models, so that a key can be replaced by another one.

    Raises:
        InvalidArgumentError: a name that cannot stand in an artifact's name.
    """
    if re.match(NAME_PATTERN, owner) is None or "\n" in owner:
        raise InvalidArgumentError(
            f"the owner of a key is named by letters, digits, '.', '_' and '-', starting with a letter or digit, "
            f"got {owner!r}"
        )
    identity, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO keys (id, owner, digest, created) VALUES (?, ?, ?, ?)",
            (identity, owner, _digest(secret), time.time()),
        )
    return f"fitrl-{identity}-{secret}"


def revoke_key(database: Database, identity: str) -> None:
    """Take a key out of use, by its id.

    Raises:
        InvalidArgumentError: there is no such key, or it is revoked already.
    """
    with database.transaction() as connection:
        done = connection.execute(
            "UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), identity)
        )
    if not done.rowcount:
        raise InvalidArgumentError(f"no key in use has the id {identity!r}: `fitrl serve key list` shows them")


def list_keys(database: Database) -> list[KeyEntry]:
    """All keys, oldest first."""
    return [KeyEntry(**row) for row in database.rows("SELECT id, owner, created, revoked FROM keys ORDER BY created")]


def owner_of(database: Database, key: str) -> str | None:
    """Whose key it is; None for one that is wrong or revoked."""
    found = _KEY.fullmatch(key)
    identity, secret = found.groups() if found is not None else ("", "")
    row = database.row("SELECT owner, digest FROM keys WHERE id = ? AND revoked IS NULL", identity)
    right = hmac.compare_digest(_digest(secret), bytes(row["digest"]) if row is not None else _NOBODY)
    return str(row["owner"]) if row is not None and right else None


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
