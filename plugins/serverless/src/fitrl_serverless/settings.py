"""Where the service is, by whose key, and how long to wait: arguments or environment, checked at construction."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fitrl.errors import InvalidArgumentError
from fitrl_serverless.client.connection import REQUEST_TIMEOUT_S, RETRY_TIMEOUT_S, Connection

URL, KEY = "FITRL_SERVERLESS_URL", "FITRL_SERVERLESS_KEY"
TOTAL_TIMEOUT_S = 24 * 3600.0
SAMPLE_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """How to reach a service.

    Attributes:
        url: its address.
        key: bearer token.
        entity: that models belong to; None: the key's owner.
        request_timeout_s: longest silence of a request.
        retry_timeout_s: how long a request is repeated while the service is busy, failing or away.
        total_timeout_s: longest time of a job, from its submission to its end.
        sample_timeout_s: longest silence before a sampled answer.
        ca_file: PEM certificates to trust; None: SSL_CERT_FILE, or the usual ones.
    """

    url: str
    key: str = field(repr=False)
    entity: str | None
    request_timeout_s: float
    retry_timeout_s: float
    total_timeout_s: float
    sample_timeout_s: float
    ca_file: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("request_timeout_s", "retry_timeout_s", "total_timeout_s", "sample_timeout_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isinf(value):
                raise InvalidArgumentError(f"{name} must be a finite number of seconds above 0, got {value!r}")

    @classmethod
    def read(
        cls,
        *,
        url: str | None = None,
        key: str | None = None,
        entity: str | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        retry_timeout_s: float = RETRY_TIMEOUT_S,
        total_timeout_s: float = TOTAL_TIMEOUT_S,
        sample_timeout_s: float = SAMPLE_TIMEOUT_S,
        ca_file: str | Path | None = None,
    ) -> Self:
        """Take what was not given from the environment.

        Raises:
            InvalidArgumentError: neither has it, or a limit is no time.
        """
        url, key = url or os.environ.get(URL), key or os.environ.get(KEY)
        if not url:
            raise InvalidArgumentError(f"the service has no address: pass url=..., or set {URL}")
        if not key:
            raise InvalidArgumentError(f"there is no key for {url}: pass key=..., or set {KEY}")
        return cls(
            url=url,
            key=key.strip(),
            entity=entity,
            request_timeout_s=request_timeout_s,
            retry_timeout_s=retry_timeout_s,
            total_timeout_s=total_timeout_s,
            sample_timeout_s=sample_timeout_s,
            ca_file=ca_file,
        )

    def connect(self) -> Connection:
        """The connection; nothing is sent yet."""
        return Connection(
            self.url,
            self.key,
            request_timeout_s=self.request_timeout_s,
            retry_timeout_s=self.retry_timeout_s,
            ca_file=self.ca_file,
        )
