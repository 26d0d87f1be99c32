"""What the tokens of a packed row may see, in the forms that attention kernels take.

Enters: a packed batch's model inputs. Leaves: a `PackedRow`, which travels to every attention layer and makes, once a
batch, what the layers' kernel asks for: lengths, a block mask, or a dense mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fitrl.data.batch import ModelInputs

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


class PackedRow:
    """One row of several histories: `allow(query, key) = key <= query < ends[key]`.

    A sliding window further asks that the positions differ by less than its width: positions and not places in the row,
    because branches of a shared prefix lie between it and the later ones.

    Args:
        inputs: a packed batch's.
        multiple_of: fill up the row to a multiple of this, with tokens that none of the others see and nobody reads.
        is_one_long_history: whether it holds a single history that is worth a kernel of its own.
        stretch: a number and how many there are: the queries are this one of so many equal stretches of the row, the
            keys are all of it. None: both are all of it.

    Attributes:
        first: the first query; compiled layers read numbers, which a compiler may take for unknown, and no slices.
        behind: the place behind the last one.
        query_bounds: [S + 1] int32, where each segment begins among the queries.
        key_bounds: [S + 1] int32, where it begins among the keys; up to the last query it ends where the queries do.
        crossings: see `ModelInputs`, of these queries.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        *,
        multiple_of: int = 1,
        is_one_long_history: bool = False,
        stretch: tuple[int, int] | None = None,
    ) -> None:
        assert inputs.ends is not None and inputs.position_ids is not None  # a packed batch's
        length = inputs.ends.shape[1]
        self.length = -(-length // multiple_of) * multiple_of
        self.longest = inputs.longest
        self.position_ids = pad(inputs.position_ids, (0, self.length - length))
        self.input_ids = pad(inputs.input_ids, (0, self.length - length))
        alone = torch.arange(length + 1, self.length + 1, device=inputs.ends.device)
        self.ends = torch.cat([inputs.ends[0], alone])
        assert inputs.boundaries is not None
        self.boundaries = inputs.boundaries
        self.crossings = inputs.crossings
        self.longest_crossing = inputs.longest_crossing
        if self.length > length:
            self.boundaries = pad(self.boundaries, (0, 1), value=self.length)
            self.longest = max(self.longest, self.length - length)
            if self.crossings is not None:  # one more stretch, of tokens that the others do not see
                self.crossings = pad(self.crossings, (0, 1), value=self.length)
                queries, keys = self.longest_crossing
                self.longest_crossing = max(queries, self.length - length), max(keys, self.length - length)
        self.is_one_long_history = is_one_long_history
        self.first, self.behind = 0, self.length
        self.query_bounds = self.key_bounds = self.boundaries
        self.is_stretch = stretch is not None
        if stretch is not None:
            number, count = stretch
            assert self.length % count == 0 and not is_one_long_history
            self.first, self.behind = (self.length * place // count for place in (number, number + 1))
            self.query_bounds = self.boundaries.clamp(self.first, self.behind) - self.first
            self.key_bounds = self.boundaries.clamp(max=self.behind)
            if self.crossings is not None:
                below, above = self.crossings.unbind(1)
                below = below.clamp(self.first, self.behind) - self.first
                self.crossings = torch.stack([below, above.clamp(max=self.behind)], dim=1)
        self._dense: dict[int | None, Tensor] = {}
        self._blocks: dict[int | None, BlockMask] = {}

    @property
    def queries(self) -> slice:
        """Where in the row they are."""
        return slice(self.first, self.behind)

    @property
    def mask(self) -> Tensor:
        """[1, 1, 1, L] int64: transformers hands a mask of four dimensions on as it is, and makes none itself."""
        return self.ends[None, None, None]

    def dense(self, window: int | None = None) -> Tensor:
        """[queries, L] bool, whether a query may see a key."""
        if window not in self._dense:
            place, position = torch.arange(self.length, device=self.ends.device), self.position_ids[0]
            query = place[self.queries, None]
            allowed = (place <= query) & (query < self.ends)
            if window is not None:
                allowed &= position[self.queries, None] - position < window
            self._dense[window] = allowed
        return self._dense[window]

    def blocks(self, window: int | None = None) -> BlockMask:
        """Which blocks of keys a block of queries sees in part or as a whole; found without a dense mask."""
        if window not in self._blocks:
            self._blocks[window] = self._block_mask(window)
        return self._blocks[window]

    def _block_mask(self, window: int | None) -> BlockMask:
        from torch.nn.attention.flex_attention import BlockMask

        ends, positions = self.ends.int(), self.position_ids[0].int()
        assert self.first % BLOCK == self.behind % BLOCK == 0
        own = slice(self.first // BLOCK, self.behind // BLOCK)
        some, whole = (blocks[own] for blocks in _visible_blocks(self.ends, self.position_ids[0], window))
        # a tensor, because a number would be compiled in
        places = torch.arange(self.first, self.behind, dtype=torch.int32, device=ends.device)

        def allow(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key])

        def allow_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            assert window is not None  # else it is `allow`
            return allow(batch, head, query, key) & (positions[query] - positions[key] < window)

        seen = allow if window is None else allow_near

        def seen_from(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return seen(batch, head, places[query], key)

        return BlockMask.from_kv_blocks(
            *_in_order(some & ~whole),
            *_in_order(whole),
            BLOCK_SIZE=BLOCK,
            mask_mod=seen_from if self.is_stretch else seen,
            seq_lengths=(self.behind - self.first, self.length),
        )


def as_packed(inputs: ModelInputs) -> ModelInputs:
    """A padded batch [B, L] as a packed one [1, B L], padding and all; nothing is copied from the host."""
    (rows, length), device = inputs.input_ids.shape, inputs.input_ids.device
    boundaries = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
    return ModelInputs(
        input_ids=inputs.input_ids.view(1, -1),
        position_ids=torch.arange(length, device=device).repeat(rows)[None],
        segment_ids=inputs.segment_ids.view(1, -1),
        ends=boundaries[1:].long().repeat_interleave(length)[None],
        boundaries=boundaries,
        longest=length,
    )


def _visible_blocks(ends: Tensor, positions: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """[L / 128, L / 128] bool each: blocks of (queries, keys) with something in sight, and with everything.

    With a window the first may hold a few blocks too many and the second too few; the mask itself is exact.
    """
    ends, positions = ends.view(-1, BLOCK), positions.view(-1, BLOCK)
    number = torch.arange(len(ends), device=ends.device)
    first = number * BLOCK  # query of a block
    some = (number <= number[:, None]) & (ends.amax(1) > first[:, None])
    whole = (number < number[:, None]) & (ends.amin(1) >= first[:, None] + BLOCK)
    if window is not None:
        low, high = positions.amin(1), positions.amax(1)
        some &= low[:, None] - high < window
        whole &= high[:, None] - low < window
    return some, whole


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: those first."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]
