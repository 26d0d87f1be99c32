"""Request bodies: JSON in memory, or streamed, gzipped, from disk or as it is made; fresh for every attempt."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 16
_COMPRESSION = 3  # token ids and logprobs shrink little more with higher levels, which take far longer
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


@dataclass(frozen=True, slots=True)
class PartsBody:
    """JSON that is made and packed while it is sent, never in memory as a whole.

    Attributes:
        parts: makes its parts, for each attempt anew.
        packed: gzip them; not for a service that does not say it takes gzip.
    """

    parts: Callable[[], Iterator[bytes]]
    packed: bool

    @property
    def headers(self) -> dict[str, str]:
        """That say what it is."""
        return _GZIP if self.packed else _JSON

    async def content(self) -> AsyncIterator[bytes]:
        """The chunks of one attempt."""
        pack = zlib.compressobj(_COMPRESSION, wbits=31)
        for part in self.parts():
            if piece := pack.compress(part) if self.packed else part:
                yield piece
        if self.packed:
            yield pack.flush()


def json_body(text: str) -> Body:
    """JSON, sent as it is."""
    return Body(text.encode(), _JSON)
