"""Where the service is and with which key; checked when a trainer is made, not when it first trains.

Enters: arguments and environment. Leaves: an `Access`, which shows its key to nobody but the SDK.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fitrl.errors import InvalidArgumentError

_PREFIX = "tml-"
_LOCAL_KEY = "tml-local"  # what the SDK is given where a server of one's own asks for no key


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Address and key.

    Attributes:
        base_url: None: the SDK's own, the hosted service.
        api_key: left out of the repr.
    """

    base_url: str | None
    api_key: str = field(repr=False)

    def without_key(self, text: str) -> str:
        """The text, with the key masked wherever it occurs."""
        return text.replace(self.api_key, "tml-***") if self.api_key != _LOCAL_KEY else text


def find_access(base_url: str | None, api_key: str | None) -> Access:
    """Read and check address and key.

    Args:
        base_url: None: TINKER_BASE_URL, else the hosted service.
        api_key: None: TINKER_API_KEY.

    Raises:
        InvalidArgumentError: no key, one that is none, or an address that would send it in the clear. A server on this
            machine needs none. The message does not repeat the key.
    """
    base_url = base_url or os.environ.get("TINKER_BASE_URL") or None
    given = api_key if api_key is not None else os.environ.get("TINKER_API_KEY")
    local = False
    if base_url is not None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgumentError(f"base_url must be http(s)://host[:port], got {parts.scheme}://{parts.hostname}")
        if parts.username or parts.password:
            raise InvalidArgumentError("base_url must not hold a user or password; the key is api_key")
        local = _is_loopback(parts.hostname)
        if parts.scheme == "http" and not local:
            raise InvalidArgumentError(
                f"base_url http://{parts.hostname} would send the API key unencrypted: use https, or a server on this "
                "machine"
            )
    if not given:
        if local:
            return Access(base_url=base_url, api_key=_LOCAL_KEY)
        raise InvalidArgumentError("the Tinker service needs an API key: pass api_key, or set TINKER_API_KEY")
    if not given.startswith(_PREFIX) or given != given.strip():
        source = "api_key" if api_key is not None else "TINKER_API_KEY"
        raise InvalidArgumentError(f"{source} is no Tinker API key: those start with {_PREFIX!r} and have no spaces")
    return Access(base_url=base_url, api_key=given)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
