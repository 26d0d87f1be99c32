"""Two ways for buckets to come from a trainer: memory that it shares, and NCCL.

What tells of a bucket is JSON; nothing is unpickled.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from .nccl import Communicator
from .pieces import Piece

HEADER_BYTES = 1 << 17
_MOST_FILES = 8
MOST_PIECES = 512  # of a bucket, so that its table fits into a header

END, BROKEN_OFF = "end", "broken off"
"""What is broadcast once there are no more buckets, and where there should have been."""

_ENDED_EARLY = "the trainer ended before all weights had come"
_reductions: Any = reductions  # which have no types
Bucket = tuple[list[Piece], Tensor]


class MemoryChannel:
    """Buckets in memory of the trainer's, of the host or a GPU, which this process opens too.

    They are told of over a Unix socket, and given back there once they are read.

    Args:
        path: of the socket.
        device: of the engine.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self._path, self._device = path, device

    def __iter__(self) -> Iterator[Bucket]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._path)
            _, files, _, _ = socket.recv_fds(connection, 1, _MOST_FILES)
            with connection.makefile("rb") as lines:
                buffers = [mapped(file) for file in files]
                for file in files:
                    os.close(file)
                buffers += [_open(one, self._device) for one in _read(lines)]
                while (told := _read(lines)) is not None:
                    yield [Piece(*row) for row in told["table"]], buffers[told["buffer"]]
                    if self._device.type == "cuda":
                        torch.cuda.current_stream(self._device).synchronize()
                    with suppress(BrokenPipeError):  # which the next line tells of
                        connection.sendall(b"\n")  # it may be filled again


def _read(lines: BinaryIO) -> Any:
    try:
        line = lines.readline()
    except ConnectionResetError:
        line = b""
    if not line:
        raise RuntimeError(_ENDED_EARLY)
    return json.loads(line)


def mapped(file: int) -> Tensor:
    """The memory [N] uint8 of an open file, which may be closed then."""
    return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)


def share(buffer: Tensor) -> dict[str, Any]:
    """What another process opens a GPU's buffer [N] uint8 by; once for each that does."""
    _, arguments = _reductions.reduce_tensor(buffer)
    *_, device, handle, size, offset, _, counter, counter_offset, event, waits = arguments
    return {
        "gpu": str(torch.cuda.get_device_properties(device).uuid),
        "numbers": [len(buffer), buffer.storage_offset(), size, offset, counter_offset, waits],
        "handles": [part.hex() for part in (handle, counter, event)],
    }


def _open(shared: dict[str, Any], device: torch.device) -> Tensor:
    gpus = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if shared["gpu"] not in gpus:
        raise RuntimeError(
            f"the trainer's weights are on GPU {shared['gpu']}, which this worker of the engine does not see "
            f"({', '.join(gpus)}): take transfer='nccl'"
        )
    length, start, size, offset, counter_offset, waits = shared["numbers"]
    handle, counter, event = map(bytes.fromhex, shared["handles"])
    opened: Tensor = _reductions.rebuild_cuda_tensor(
        *(Tensor, (length,), (1,), start, torch.UntypedStorage, torch.uint8, gpus.index(shared["gpu"])),
        *(handle, size, offset, False, counter, counter_offset, event, waits),
    )
    return opened


class NcclChannel:
    """Buckets by broadcast: a header of a fixed size, then as many bytes as it says.

    Args:
        communicator: whose rank 0 the trainer is.
        device: of the engine.
    """

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self._communicator, self._device = communicator, device

    def __iter__(self) -> Iterator[Bucket]:
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=self._device)
        buffer = header[:0]
        while True:
            self._communicator.broadcast(header)
            told = json.loads(bytes(header.cpu().numpy()))
            if told == END:
                return
            if told == BROKEN_OFF:
                raise RuntimeError(_ENDED_EARLY)
            if told["size"] > len(buffer):
                buffer = torch.empty(told["size"], dtype=torch.uint8, device=self._device)
            self._communicator.broadcast(buffer[: told["size"]])
            yield [Piece(*row) for row in told["table"]], buffer


def header_of(told: dict[str, Any] | str) -> bytes:
    """What is broadcast before a bucket, its "table" and its "size", or instead of one: `END`, `BROKEN_OFF`."""
    return json.dumps(told).encode().ljust(HEADER_BYTES)
