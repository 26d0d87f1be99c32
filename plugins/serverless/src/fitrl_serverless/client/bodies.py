"""Request bodies: JSON in memory, or gzipped JSON on disk that is streamed; fresh for every attempt."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 16
_WORTH_PACKING = 1 << 16
_JSON = {"Content-Type": "application/json"}
_GZIP = _JSON | {"Content-Encoding": "gzip"}


@dataclass(frozen=True, slots=True)
class Body:
    """JSON in memory.

    Attributes:
        data: the bytes that are sent.
        headers: that say what they are.
    """

    data: bytes
    headers: dict[str, str]

    def content(self) -> bytes:
        """The bytes of one attempt."""
        return self.data


@dataclass(frozen=True, slots=True)
class FileBody:
    """Gzipped JSON on disk, never in memory as a whole.

    Attributes:
        path: of the file.
        packed: send it as it is; otherwise it is unpacked on the way, for a service that does not say it takes gzip.
    """

    path: Path
    packed: bool

    @property
    def headers(self) -> dict[str, str]:
        """That say what it is."""
        return _GZIP | {"Content-Length": str(self.path.stat().st_size)} if self.packed else _JSON

    async def content(self) -> AsyncIterator[bytes]:
        """The chunks of one attempt."""
        unpack = zlib.decompressobj(wbits=31)
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk if self.packed else unpack.decompress(chunk)
        if not self.packed:
            yield unpack.flush()


def json_body(text: str, *, packed: bool = False) -> Body:
    """JSON; packed if the service takes it and it is worth it."""
    data = text.encode()
    if packed and len(data) >= _WORTH_PACKING:
        return Body(gzip.compress(data, compresslevel=3, mtime=0), _GZIP)
    return Body(data, _JSON)
