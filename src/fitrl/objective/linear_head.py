"""The matrix products of a linear output head, by tiles of rows, and how large a tile may be.

Enters: hidden states and the head's weight. Leaves: one tile of raw logits at a time, in a buffer that is used again,
and the gradients that come from the gradient of each tile. Products of 16-bit numbers are accumulated in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from fitrl.objective.rows import RowShape, RowStatistics, gradients_
from fitrl.objective.vocabulary_shard import VocabularyShard

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# most bytes of logits held at once; on a GPU one tile of 8192 rows and 151936 16-bit columns
_TILE_BYTES = {"cuda": 2400 * 2**20, "cpu": 2**27}
# tiles that fitted after one was too large, by device
_FITTING: dict[torch.device, int] = {}
# rows of the buffer start at multiples of this many elements, so that odd vocabularies are read in whole words too
_ALIGNMENT = 64
# 16-bit floats with a small exponent: what is written is scaled so that no row's largest value is above this
_FLOAT16_PEAK = 256.0


class LinearHead:
    """A linear head over some rows, in the dtype that autocast asks for.

    Args:
        hidden: [T, H].
        weight: [V, H], or the rows of it that are here.
        shape: targets, temperature, bias, soft cap and shard.
        exact: keep logits of 16-bit inputs in float32.
        dtype: of the products; None: what autocast asks for, else that of `hidden`.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, shape: RowShape, *, exact: bool, dtype: torch.dtype | None = None
    ) -> None:
        self.dtype = compute_dtype(hidden) if dtype is None else dtype
        self.half = self.dtype in (torch.bfloat16, torch.float16)
        self.hidden = hidden.detach().to(self.dtype).contiguous()
        self.weight = weight.detach().to(self.dtype)
        self.shape = shape
        self.logits_dtype = torch.float32 if self.half and exact else self.dtype
        self._buffer: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def one_sweep(self, *, with_entropies: bool) -> bool:
        """Whether `rows.swept_` does for these rows; an entropy's gradient is no multiple of its values."""
        return not with_entropies and self.dtype != torch.float16 and self.shape.shard is None

    def logits(self, tile: slice) -> Tensor:
        """Raw logits [R, V] of a tile, in the buffer that the next tile will take."""
        rows, columns = self.hidden[tile], len(self.weight)
        if self._buffer is None or len(self._buffer) < len(rows):
            self._buffer = None  # free it first
            width = -(-columns // _ALIGNMENT) * _ALIGNMENT
            self._buffer = rows.new_empty((len(rows), width), dtype=self.logits_dtype)
        return product(rows, self.weight.t(), self.logits_dtype, out=self._buffer[: len(rows), :columns])


class HeadGradients:
    """Gradients of a head's inputs, added up over tiles.

    `hidden` and `weight` stay in the dtype of a bfloat16 product where nothing is added to it; otherwise, and for
    float16 whose exponent is too small for them, they are float32 (float64 from float64).

    Args:
        head: the head.
        needs: whether hidden states, weight and bias need a gradient.
        rows_per_tile: of all tiles but the last.
        weight_dtype: dtype of the weight as it was given.
        hidden_dtype: dtype of the hidden states as they were given.
    """

    def __init__(
        self,
        head: LinearHead,
        needs: tuple[bool, bool, bool],
        rows_per_tile: int,
        *,
        hidden_dtype: torch.dtype,
        weight_dtype: torch.dtype,
    ) -> None:
        wide = torch.float64 if head.dtype == torch.float64 else torch.float32
        self._head, self._wide = head, wide
        self._one_tile = len(head) <= rows_per_tile
        self._hidden_dtype = wide if head.dtype == torch.float16 else hidden_dtype
        self._weight_dtype = weight_dtype if self._one_tile and head.dtype != torch.float16 else wide
        like = head.hidden
        self.hidden = like.new_empty(like.shape, dtype=self._hidden_dtype) if needs[0] else None
        self.weight = None if len(head) or not needs[1] else torch.zeros_like(head.weight, dtype=self._weight_dtype)
        self.bias = like.new_zeros(len(head.weight), dtype=wide) if needs[2] else None
        self._needs_weight = needs[1]

    def add(self, tile: slice, values: Tensor, factors: Tensor) -> None:
        """Add a tile whose gradient of the logits is `factors[:, None] * values`; see `rows.swept_`."""
        head = self._head
        factors = factors[:, None]
        if self.hidden is not None:
            torch.mul(product(values, head.weight, self._wide), factors, out=self.hidden[tile])
        if self._needs_weight:
            rows = torch.mul(head.hidden[tile], factors, out=torch.empty_like(head.hidden[tile]))
            self._add_to_weight(values.t(), rows)
        if self.bias is not None:
            self.bias += product(values.t(), factors.to(values.dtype), self._wide).squeeze(1)

    def add_rows(
        self, tile: slice, logits: Tensor, found: RowStatistics, d_logprobs: Tensor, d_entropies: Tensor | None
    ) -> None:
        """Add a tile given its logits, which are overwritten, and d loss / d logprob and d loss / d entropy."""
        head, shape = self._head, self._head.shape[tile]
        unit = None
        if head.dtype == torch.float16:
            unit = _unit(d_logprobs, d_entropies, shape.temperature)
            d_logprobs = d_logprobs / unit
            d_entropies = None if d_entropies is None else d_entropies / unit
        d_logits = gradients_(logits, shape, found, d_logprobs, d_entropies, head.dtype)
        if self.hidden is not None:
            product(d_logits, head.weight, self._hidden_dtype, out=self.hidden[tile])
            if unit is not None:
                self.hidden[tile] *= unit
        if self._needs_weight:
            self._add_to_weight(d_logits.t(), head.hidden[tile], unit)
        if self.bias is not None:
            columns = d_logits.sum(dim=0, dtype=self._wide)
            self.bias += columns if unit is None else columns * unit

    def join(self) -> None:
        """Add up what the ranks that hold one vocabulary found of the hidden states; after the last tile."""
        if self.hidden is not None and self._head.shape.shard is not None:
            self._head.shape.shard.add_up(self.hidden)

    def _add_to_weight(self, left: Tensor, right: Tensor, unit: Tensor | None = None) -> None:
        if self.weight is None:
            self.weight = product(left, right, self._weight_dtype)
            if unit is not None:
                self.weight *= unit
        elif unit is not None:
            self.weight.addcmul_(product(left, right, self._weight_dtype), unit)
        elif self._head.half and self.weight.is_cuda:
            torch.addmm(self.weight, left, right, out_dtype=self.weight.dtype, out=self.weight)
        else:
            self.weight.addmm_(left.to(self.weight.dtype), right.to(self.weight.dtype))


def product(left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """`left @ right`, accumulated in float32 or wider, rounded once, to `dtype`; autocast has no say in it."""
    device = left.device.type
    if not left.shape[0]:
        return left.new_empty((0, right.shape[1]), dtype=dtype) if out is None else out
    with torch.autocast(device, enabled=False):
        if device == "cpu" and left.dtype in (torch.bfloat16, torch.float16):
            found = (left.float() @ right.float()).to(dtype)
            return found if out is None else out.copy_(found)
        if left.dtype == dtype:
            return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
        if left.dtype not in (torch.bfloat16, torch.float16):
            found = torch.mm(left, right).to(dtype)
            return found if out is None else out.copy_(found)
        if out is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.mm(left, right, out_dtype=dtype, out=out)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the products: what autocast asks for, else that of the hidden states; float64 stays."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def most_rows(vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Rows of logits that a tile may have there, if nobody says how many."""
    return max(1, _TILE_BYTES.get(device.type, _TILE_BYTES["cpu"]) // max(1, vocabulary * itemsize))


def tiles(rows: int, rows_per_tile: int) -> Iterator[slice]:
    """Cut rows into tiles."""
    for start in range(0, rows, rows_per_tile):
        yield slice(start, min(start + rows_per_tile, rows))


def in_tiles(
    compute: Callable[[int], _Result],
    *,
    rows: int,
    rows_per_tile: int | None,
    vocabulary: int,
    itemsize: int,
    device: torch.device,
    shard: VocabularyShard | None = None,
) -> _Result:
    """Call `compute(rows_per_tile)`; if the device is out of memory, halve it and call again, until 1 row does not fit.

    What had to be halved is remembered: later calls on the device hold no more bytes of logits than what fitted. With a
    shard nothing is halved and nothing remembered: every rank has to cut alike.

    Args:
        compute: may be called several times.
        rows: in all.
        rows_per_tile: most rows of a tile; None: as many as `_TILE_BYTES` allow, cut evenly.
        vocabulary: columns of the logits.
        itemsize: bytes of a logit.
        device: of the logits.
        shard: which of the whole vocabulary's columns these are; None: all.
    """
    of_row = max(1, vocabulary * itemsize)
    allowed = _TILE_BYTES.get(device.type, _TILE_BYTES["cpu"]) if rows_per_tile is None else rows_per_tile * of_row
    fitted = allowed if shard is not None else _FITTING.get(device, allowed)
    most = max(1, min(allowed, fitted) // of_row)
    size = most
    if rows_per_tile is None and rows > most:
        even = -(-rows // -(-rows // most))
        size = min(most, -(-even // 128) * 128)
    size = max(1, min(size, rows))
    while True:
        try:
            return compute(size)
        except torch.OutOfMemoryError:
            if size == 1 or shard is not None:
                raise
        size = (size + 1) // 2  # outside of the handler, whose traceback holds what was allocated
        _FITTING[device] = size * of_row
        _log.warning("%s is out of memory: trying with %d rows of logits at a time from now on", device, size)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _unit(d_logprobs: Tensor, d_entropies: Tensor | None, temperature: Tensor) -> Tensor:
    """What to divide a float16 tile's derivatives by: p times 1 / N is below the smallest float16."""
    steepest = d_logprobs.abs()
    if d_entropies is not None:
        steepest = steepest + 16.0 * d_entropies.abs()  # p |log p + H| is below log V
    return ((steepest / temperature).amax() / _FLOAT16_PEAK).clamp(min=1e-30)
