"""NCCL's broadcast between two processes that have no process group in common, by its C interface.

https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html. The library is the one that torch brings. Process
groups of torch would have to agree on a store, and on torch's release: the trainer and the engine have one each.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_UNIQUE_ID_BYTES = 128
_UINT8 = 1  # ncclUint8


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * _UNIQUE_ID_BYTES)]


def _library() -> Any:
    library = ctypes.CDLL("libnccl.so.2")  # torch has loaded it
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, _UniqueId, ctypes.c_int]
    library.ncclBroadcast.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
    ]
    library.ncclCommAbort.argtypes = [ctypes.c_void_p]
    return library


def unique_id() -> str:
    """What the processes of one communicator have in common, in hexadecimal; one of them makes it."""
    library, made = _library(), _UniqueId()
    _check(library, library.ncclGetUniqueId(ctypes.byref(made)))
    return bytes(made.internal).hex()


class Communicator:
    """A communicator of several processes, each with one GPU, which is the current one; waits until all have come.

    Args:
        unique_id: of `unique_id`.
        size: processes.
        rank: of this one; what rank 0 holds is broadcast.

    Raises:
        RuntimeError: NCCL could not.
    """

    def __init__(self, unique_id: str, size: int, rank: int) -> None:
        self._library = _library()
        self._comm = ctypes.c_void_p()
        known = _UniqueId.from_buffer_copy(bytes.fromhex(unique_id))
        _check(self._library, self._library.ncclCommInitRank(ctypes.byref(self._comm), size, known, rank))

    def broadcast(self, data: Tensor) -> None:
        """Rank 0's bytes to all; data: [N] uint8 on the GPU. On the current stream, which waits for the others."""
        pointer, stream = data.data_ptr(), torch.cuda.current_stream().cuda_stream
        status = self._library.ncclBroadcast(pointer, pointer, data.numel(), _UINT8, 0, self._comm, stream)
        _check(self._library, status)

    def abort(self) -> None:
        """Give it up, also where a broadcast waits for a process that is gone; again at no cost."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            self._library.ncclCommAbort(comm)


def _check(library: Any, status: int) -> None:
    if status:
        raise RuntimeError(f"NCCL: {library.ncclGetErrorString(status).decode()}")
