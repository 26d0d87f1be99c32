"""Addresses of services: which ones a key may be sent to, and whose certificates vouch for them."""

from __future__ import annotations

import ssl
from pathlib import Path
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


def trust_of(url: str, ca_file: str | Path | None) -> ssl.SSLContext | bool:
    """What httpx checks certificates by: a file, or (True) SSL_CERT_FILE, or the authorities that browsers trust.

    Args:
        url: of the service.
        ca_file: PEM; an authority's certificate, or the server's own.

    Raises:
        InvalidArgumentError: the file cannot be read, holds no certificate, or is for an address without TLS.
    """
    if ca_file is None:
        return True
    if not url.startswith("https:"):
        raise InvalidArgumentError(f"ca_file={str(ca_file)!r} has no effect on {url}, which is not https: leave it out")
    try:
        return ssl.create_default_context(cafile=str(Path(ca_file).expanduser()))
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgumentError(f"ca_file={str(ca_file)!r} holds no certificates in PEM: {error}") from error
