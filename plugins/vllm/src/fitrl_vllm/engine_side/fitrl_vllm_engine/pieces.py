"""Tensors as pieces of buckets, put together again: what the trainer sends and the engine receives.

A bucket is a buffer of bytes and a table of what lies in it. A tensor that does not fit is cut, so that a bucket need
not be as large as the largest embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNED_BYTES = 16


class Piece(NamedTuple):
    """A stretch of a tensor's bytes in a bucket.

    Attributes:
        name: of the tensor.
        dtype: as in `torch.<dtype>`.
        shape: of the whole tensor.
        start: of the stretch, in elements of the flat tensor.
        length: elements of the stretch.
        offset: where it lies in the bucket, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int


def fill(
    weights: Iterable[tuple[str, Tensor]], buffers: Iterator[Tensor], dtype: torch.dtype, most_pieces: int
) -> Iterator[tuple[list[Piece], int]]:
    """Copy weights into one buffer [N] uint8 after the other; yields what lies in each, and how many bytes.

    Each tensor is copied before the next is asked for, floating-point numbers as `dtype`. A buffer is asked for when
    there is something to put into it.
    """
    buffer: Tensor | None = None
    table: list[Piece] = []
    used = 0
    for name, tensor in weights:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        flat, start = tensor.detach().reshape(-1), 0
        while start < len(flat):
            if buffer is None:
                buffer, table, used = next(buffers), [], 0
            count = min(len(flat) - start, max(0, len(buffer) - used) // kind.itemsize)
            if count:
                size = count * kind.itemsize
                buffer[used : used + size].view(kind).copy_(flat[start : start + count])
                table.append(Piece(name, str(kind).removeprefix("torch."), tuple(tensor.shape), start, count, used))
                used = math.ceil((used + size) / ALIGNED_BYTES) * ALIGNED_BYTES
                start += count
            if start < len(flat) or len(table) == most_pieces:
                yield table, min(used, len(buffer))
                buffer = None
    if buffer is not None:
        yield table, min(used, len(buffer))


class Assembly:
    """Tensors from their pieces, which come in order.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensor: Tensor | None = None

    def take(self, table: Iterable[Piece], buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a bucket completes; its bytes are copied, on the current stream."""
        for piece in table:
            kind: torch.dtype = getattr(torch, piece.dtype)
            if piece.start == 0:
                self._tensor = torch.empty(piece.shape, dtype=kind, device=self._device)
            assert self._tensor is not None
            size = piece.length * kind.itemsize
            stretch = buffer[piece.offset : piece.offset + size].view(kind)
            self._tensor.view(-1)[piece.start : piece.start + piece.length].copy_(stretch)
            if piece.start + piece.length == self._tensor.numel():
                yield piece.name, self._tensor
                self._tensor = None

    def finish(self) -> None:
        """Raise if a tensor lacks pieces."""
        if self._tensor is not None:
            raise RuntimeError("the last tensor lacks pieces")
