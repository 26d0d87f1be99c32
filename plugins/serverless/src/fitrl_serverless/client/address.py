"""Addresses of services: which ones a key may be sent to."""

from __future__ import annotations

from urllib.parse import urlsplit

from fitrl.errors import InvalidArgumentError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check_url(url: str) -> str:
    """The address without a slash at its end.

    Raises:
        InvalidArgumentError: it is none, holds a password, or would carry the key unencrypted to another machine.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError as error:
        raise InvalidArgumentError(f"url={url!r} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise InvalidArgumentError(f"url must be like https://host/path, got {url!r}")
    if parts.username or parts.password:
        raise InvalidArgumentError("url must not hold a user or password: pass key=...")
    if parts.scheme == "http" and host not in _LOOPBACK:
        raise InvalidArgumentError(
            f"url={url!r}: the key and the trajectories would cross the network unencrypted; put the service behind "
            "https, or reach it through a tunnel on 127.0.0.1"
        )
    return url.rstrip("/")
