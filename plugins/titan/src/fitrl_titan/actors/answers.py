"""What an actor answers a call with: a value, or an error that can travel.

Enters: a call on the actor's side. Leaves: an `Answer` for the side that called. Monarch carries both in pickles over
sockets of this machine and user: actors trust who spawned them, and nobody else reaches them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle

from fitrl.errors import RankError


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a call.

    Attributes:
        value: what it returned.
        error: what it raised instead.
        told: the error's traceback, as text.
    """

    value: Any = None
    error: Exception | None = None
    told: str = ""


def answer(call: Callable[[], Any]) -> Answer:
    """Call, and tell what came of it."""
    try:
        return Answer(value=call())
    except Exception as error:
        return failed(error)


def failed(error: Exception) -> Answer:
    """Tell of an error."""
    told = "".join(traceback.format_exception(error))
    return Answer(error=error if _travels(error) else RankError(f"{type(error).__name__}: {error}"), told=told)


def _travels(error: Exception) -> bool:
    """Whether it can be made again on the other side."""
    try:
        return isinstance(cloudpickle.loads(cloudpickle.dumps(error)), type(error))
    except Exception:  # of any class's own code
        return False
