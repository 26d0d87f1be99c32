"""From a trainer's named weights to an engine without files: bucket by bucket, while the engine loads.

The engine's side is `engine_side/fitrl_vllm_engine`: a backend of vLLM's weight-transfer API.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fitrl.errors import UnsupportedError
from fitrl_vllm.engine_side.fitrl_vllm_engine.channels import (
    BROKEN_OFF,
    END,
    HEADER_BYTES,
    MOST_PIECES,
    header_of,
    mapped,
    share,
)
from fitrl_vllm.engine_side.fitrl_vllm_engine.nccl import Communicator, unique_id
from fitrl_vllm.engine_side.fitrl_vllm_engine.pieces import fill

Way = Literal["folder", "memory", "nccl"]
"""How all weights come to an engine."""

BUCKET_BYTES = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Size of a buffer by kind of device; there are two, so that one is filled while the other is read.

The engine waits for the first and the trainer for the last, and a CPU's should stay in its cache: 16 MB took two thirds
of the time of 64 MB. On a GPU each costs a round trip of the host's.
"""

_cuda: Any = torch.cuda  # parts of which have no types
_ASK_S = 0.05
_ASK_OFTEN_S = 1e-4
_BUFFERS = 2


class Sender(Protocol):
    """The trainer's side of a transfer.

    For each transfer `prepare` is called where requests are made, and `send` on the trainer's thread, while the engine
    is asked to receive.
    """

    def prepare(self, workers: Sequence[Mapping[str, str]], num_revivals: int) -> dict[str, Any] | None:
        """What the engine's workers are initialized with; None: they are already.

        Args:
            workers: what each of them tells of its weights.
            num_revivals: how often the engine was brought back so far.
        """

    def send(self, weights: Iterable[tuple[str, Tensor]], check: Callable[[], None]) -> None:
        """Send weights.

        Args:
            weights: each is copied before the next is asked for.
            check: raises once the engine does not receive any more.
        """

    def close(self) -> None:
        """Free what is kept between transfers."""


def sender_of(way: Way) -> Sender | None:
    """What sends that way; None: files do.

    Raises:
        UnsupportedError: this system shares no memory so.
    """
    if way == "folder":
        return None
    if way == "memory" and not sys.platform.startswith("linux"):
        raise UnsupportedError(f"transfer='memory' needs Linux, this is {sys.platform}: take transfer='folder'")
    return MemorySender() if way == "memory" else NcclSender()


class MemorySender:
    """Buckets in memory that the engine opens: a GPU's (CUDA IPC), or for an engine on a CPU the host's.

    Trainer and engine are on one machine, and on a GPU the engine has to see the trainer's device.

    Args:
        bucket_bytes: of each of two buffers; None: `BUCKET_BYTES`.
    """

    def __init__(self, bucket_bytes: int | None = None) -> None:
        self._bucket_bytes = bucket_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="fitrl-")  # nobody else may look into it
        self._numbers = itertools.count()
        self._listener: socket.socket | None = None
        self._prepared: Future[Sequence[Mapping[str, str]]] = Future()

    def prepare(self, workers: Sequence[Mapping[str, str]], num_revivals: int) -> dict[str, Any]:
        """See `Sender`."""
        self._hang_up()
        path = str(Path(self._folder.name) / str(next(self._numbers)))  # what was left waiting at another is not met
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._listener.settimeout(_ASK_S)
        self._prepared.set_result(workers)
        return {"socket": path}

    def send(self, weights: Iterable[tuple[str, Tensor]], check: Callable[[], None]) -> None:
        """See `Sender`."""
        try:
            workers = _result(self._prepared, check)
            device = _device_for(workers)
            with ExitStack() as opened:
                connections = [opened.enter_context(self._accept(check)) for _ in workers]
                opened.enter_context(_telling_why(check))
                buffers = self._shared_buffers(connections, device)

                def free() -> Iterator[Tensor]:
                    for number in itertools.count():
                        if number >= _BUFFERS:
                            _given_back(connections, check)
                        yield buffers[number % _BUFFERS]

                sent = 0
                for table, _ in fill(weights, free(), _dtype_of(workers), MOST_PIECES):
                    if device.type == "cuda":
                        torch.cuda.current_stream(device).synchronize()
                    for connection in connections:
                        connection.sendall(_line({"table": table, "buffer": sent % _BUFFERS}))
                    sent += 1
                for _ in range(min(sent, _BUFFERS)):
                    _given_back(connections, check)
                for connection in connections:
                    connection.sendall(_line(None))
            if device.type == "cuda":
                _cuda.ipc_collect()  # the engine has closed what was shared
        finally:
            self._hang_up()
            self._prepared = Future()

    def close(self) -> None:
        """See `Sender`."""
        self._hang_up()
        self._folder.cleanup()

    def _hang_up(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._listener = None

    @contextmanager
    def _accept(self, check: Callable[[], None]) -> Iterator[socket.socket]:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                check()
                continue
            with connection:
                connection.settimeout(_ASK_S)
                yield connection
            return

    def _shared_buffers(self, connections: Sequence[socket.socket], device: torch.device) -> list[Tensor]:
        """Buffers, of which every worker has been told: files without a name are the host's, handles a GPU's."""
        size = BUCKET_BYTES[device.type] if self._bucket_bytes is None else self._bucket_bytes
        if device.type == "cuda":
            buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
            for connection in connections:
                connection.sendall(b"\n" + _line([share(buffer) for buffer in buffers]))
            return buffers
        files = [os.memfd_create(f"fitrl-bucket-{number}") for number in range(_BUFFERS)]
        for file in files:
            os.truncate(file, size)
        buffers = [mapped(file) for file in files]
        try:
            for connection in connections:
                socket.send_fds(connection, [b"\n"], files)
                connection.sendall(_line([]))
        finally:
            for file in files:
                os.close(file)
        return buffers


@contextmanager
def _telling_why(check: Callable[[], None]) -> Iterator[None]:
    """Where the engine has hung up, wait until it has said why, which raises."""
    try:
        yield
    except (BrokenPipeError, ConnectionResetError):
        while True:
            check()
            time.sleep(_ASK_S)


def _given_back(connections: Sequence[socket.socket], check: Callable[[], None]) -> None:
    """Wait until every worker has read one more bucket."""
    for connection in connections:
        while True:
            try:
                if not connection.recv(1):
                    raise ConnectionResetError
                break
            except TimeoutError:
                check()


class NcclSender:
    """Buckets by NCCL's broadcast, between GPUs of any machines; the trainer is its rank 0.

    Args:
        bucket_bytes: of each of two buffers.
    """

    def __init__(self, bucket_bytes: int = BUCKET_BYTES["cuda"]) -> None:
        self._bucket_bytes = bucket_bytes
        self._communicator: Communicator | None = None
        self._num_revivals = 0
        self._id: str | None = None
        self._prepared: Future[Sequence[Mapping[str, str]]] = Future()

    def prepare(self, workers: Sequence[Mapping[str, str]], num_revivals: int) -> dict[str, Any] | None:
        """See `Sender`."""
        if _device_for(workers).type != "cuda":
            raise UnsupportedError("transfer='nccl' needs an engine on GPUs: take 'memory', or 'folder'")
        if self._communicator is not None and self._num_revivals != num_revivals:
            self.close()
        self._num_revivals = num_revivals
        self._id = unique_id() if self._communicator is None else None
        self._prepared.set_result(workers)
        return None if self._id is None else {"unique_id": self._id, "num_processes": 1 + len(workers)}

    def send(self, weights: Iterable[tuple[str, Tensor]], check: Callable[[], None]) -> None:
        """See `Sender`."""
        try:
            workers = _result(self._prepared, check)
            if self._communicator is None:
                self._communicator = self._join(1 + len(workers), check)
            self._broadcast(self._communicator, weights, _dtype_of(workers), _device_for(workers), check)
        except BaseException:
            self.close()
            raise
        finally:
            self._prepared = Future()

    def close(self) -> None:
        """See `Sender`."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.abort()

    def _join(self, size: int, check: Callable[[], None]) -> Communicator:
        """Wait in a thread until the workers have come, because there it cannot be given up."""
        assert self._id is not None
        known, device, joined = self._id, torch.cuda.current_device(), Future[Communicator]()

        def join() -> None:
            try:
                torch.cuda.set_device(device)
                joined.set_result(Communicator(known, size, 0))
            except Exception as error:
                joined.set_exception(error)

        threading.Thread(target=join, name="fitrl-nccl", daemon=True).start()
        communicator: Communicator = _result(joined, check)
        return communicator

    def _broadcast(
        self,
        communicator: Communicator,
        weights: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        check: Callable[[], None],
    ) -> None:
        filling, sending = _cuda.current_stream(), _cuda.Stream()
        buffers = [torch.empty(self._bucket_bytes, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
        pinned = device.type == "cuda"
        headers = [torch.empty(HEADER_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(_BUFFERS)]
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=device)
        sent = [_cuda.Event() for _ in range(_BUFFERS)]
        numbers = itertools.count()

        def send(number: int, told: bytes, data: Tensor | None) -> None:
            place = number % _BUFFERS
            headers[place].copy_(torch.frombuffer(bytearray(told), dtype=torch.uint8))
            sending.wait_stream(filling)
            with _cuda.stream(sending):
                header.copy_(headers[place], non_blocking=True)
                communicator.broadcast(header)
                if data is not None:
                    communicator.broadcast(data)
                sent[place].record(sending)

        def free() -> Iterator[Tensor]:
            for number in itertools.count():
                _wait_for(sent[number % _BUFFERS], check)
                yield buffers[number % _BUFFERS]

        end = BROKEN_OFF  # which the engine is told of, too, where weights cannot be had: it waits
        try:
            for table, size in fill(weights, free(), dtype, MOST_PIECES):
                number = next(numbers)
                told = header_of({"table": table, "size": size})
                send(number, told, buffers[number % _BUFFERS][:size])
            end = END
        finally:
            number = next(numbers)
            _wait_for(sent[number % _BUFFERS], check)
            send(number, header_of(end), None)
            for event in sent:
                _wait_for(event, check)


def _wait_for(event: Any, check: Callable[[], None]) -> None:
    while not event.query():
        check()
        time.sleep(_ASK_OFTEN_S)


def _result(future: Future[Any], check: Callable[[], None]) -> Any:
    while True:
        try:
            return future.result(_ASK_S)
        except TimeoutError:
            if future.done():
                raise
            check()


def _device_for(workers: Sequence[Mapping[str, str]]) -> torch.device:
    """Where buckets are filled: on the trainer's GPU for engines on GPUs."""
    if workers[0]["device"] != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError("the engine is on a GPU, the trainer is not: take transfer='folder'")
    return torch.device("cuda", torch.cuda.current_device())


def _dtype_of(workers: Sequence[Mapping[str, str]]) -> torch.dtype:
    """In which type the engine holds weights; they are sent so, which rounds them as its own load would."""
    dtype: torch.dtype = getattr(torch, workers[0]["dtype"])
    return dtype


def _line(told: Any) -> bytes:
    return json.dumps(told).encode() + b"\n"
