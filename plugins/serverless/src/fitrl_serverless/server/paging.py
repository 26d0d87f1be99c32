"""Pages of a list: `after` an id, at most `limit`, oldest or newest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fitrl_serverless.server.errors import not_found


class HasId(Protocol):
    """An item of a list."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which part of a list is asked for."""

    after: str | None = None
    limit: int = 20
    order: Literal["asc", "desc"] = "asc"


def cut(items: Sequence[HasId], page: Page) -> dict[str, Any]:
    """The page of a list that is in ascending order, in the envelope of the API.

    Raises:
        RefusedError: 404, `after` is no item of the list.
    """
    ordered = list(items) if page.order == "asc" else list(reversed(items))
    start = 0
    if page.after is not None:
        places = [place for place, item in enumerate(ordered) if item.id == page.after]
        if not places:
            raise not_found("item with the id that `after` names")
        start = places[0] + 1
    data = ordered[start : start + page.limit]
    return {
        "data": data,
        "first_id": data[0].id if data else None,
        "last_id": data[-1].id if data else None,
        "has_more": start + page.limit < len(ordered),
    }
