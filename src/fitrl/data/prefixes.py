"""Common prefixes: histories as branches of one tree, so that what they have in common is computed once.

Enters: the histories of one optimizer step. Leaves: which of them begin alike and how far, and the `Row` of those that
share a microbatch: the tree's segments one after the other, depth first. Then one number a token says what sees it:
`allow(query, key) = key <= query < ends[key]`, where `ends` is where the subtree of the key's segment ends.

What a position computes depends on the tokens up to it and on nothing else. So all that is equal is shared, tokens
that are trained included: their rows of the loss, each with its own advantage, logprobs and temperature, name the same
position, and its gradient is the sum of theirs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fitrl.data.histories import TokenHistory


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Histories laid out in one row of L positions, T tokens long if each had its own.

    Attributes:
        slots: [T] int64, where in the row each input of the histories lies, one history after the other.
        positions: [L] int64, how many tokens come before this one in its histories.
        ends: [L] int64, the first place from which on a token is out of sight.
        segments: [L] int64, number of the tree's segment; without sharing, of the history.
    """

    slots: Tensor
    positions: Tensor
    ends: Tensor
    segments: Tensor


class Prefixes:
    """Which histories begin alike. The last token of a history is no input, so it is not compared.

    Args:
        histories: numbered from 0 in what follows.
    """

    def __init__(self, histories: Sequence[TokenHistory]) -> None:
        inputs = [history.token_ids[:-1].numpy() for history in histories]
        # any order that compares bytes from the front puts those that begin alike beside each other
        keys = [ids.tobytes() for ids in inputs]
        order = sorted(range(len(inputs)), key=keys.__getitem__)
        self.lengths = [len(ids) for ids in inputs]
        self._rank = [0] * len(order)
        for rank, history in enumerate(order):
            self._rank[history] = rank
        self._history = order
        beside = [0, *(_common(inputs[a], inputs[b]) for a, b in zip(order, order[1:], strict=False))]
        # the n-th row holds the minimum of 2^n neighbours, so that any range is the minimum of two entries
        self._least = [beside]
        while 2 ** len(self._least) <= len(beside):
            last, half = self._least[-1], 2 ** (len(self._least) - 1)
            self._least.append([min(a, b) for a, b in zip(last, last[half:], strict=False)])

    @property
    def size(self) -> int:
        """Tokens of the tree of all histories."""
        return sum(self.lengths) - sum(self._least[0])

    def rank(self, history: int) -> int:
        """Place of a history in the depth-first order of all."""
        return self._rank[history]

    def common(self, left: int, right: int) -> int:
        """Tokens that the histories of two ranks, `left < right`, have in common."""
        level = (right - left).bit_length() - 1
        row = self._least[level]
        return min(row[left + 1], row[right + 1 - (1 << level)])

    def grow(self, ranks: list[int], histories: Sequence[int]) -> tuple[list[int], int]:
        """Add histories to a tree, given as the sorted ranks of its histories; the tokens that it grows by."""
        grown, tokens = ranks.copy(), 0
        for history in histories:
            rank = self._rank[history]
            place = bisect_left(grown, rank)
            known = self.common(grown[place - 1], rank) if place else 0
            if place < len(grown):
                known = max(known, self.common(rank, grown[place]))
            tokens += self.lengths[history] - known
            insort(grown, rank)
        return grown, tokens

    def row(self, histories: Sequence[int], *, query_cost: float = 0.0) -> Row:
        """Lay out some of the histories, depth first.

        Args:
            histories: their numbers.
            query_cost: how many tokens a query may save at the least for each beginning that it shares; beginnings that
                save fewer are held by each of the branches behind them.
        """
        ranks = sorted(self._rank[history] for history in histories)
        common = [0, *(self.common(a, b) for a, b in zip(ranks, ranks[1:], strict=False))]
        lengths = [self.lengths[self._history[rank]] for rank in ranks]
        if query_cost:
            common = _worth_sharing(lengths, common, query_cost)
        place = {self._history[rank]: place for place, rank in enumerate(ranks)}
        return _lay_out(lengths, common, [place[history] for history in histories])


def separate_row(histories: Sequence[TokenHistory]) -> Row:
    """Lay out histories one after the other, sharing nothing."""
    lengths = torch.tensor([len(history) - 1 for history in histories])
    stops = lengths.cumsum(0)
    segments = torch.repeat_interleave(torch.arange(len(histories)), lengths)
    slots = torch.arange(int(stops[-1]))
    return Row(slots=slots, positions=slots - (stops - lengths)[segments], ends=stops[segments], segments=segments)


def lengths_of(row: Row) -> dict[str, Any]:
    """`boundaries`, `crossings` and `longest_crossing` of `ModelInputs`: a row as attention over lengths sees it."""
    length = len(row.positions)
    starts = torch.cat([row.segments.new_zeros(1), row.segments.diff().nonzero().squeeze(1) + 1])
    found: dict[str, Any] = {"boundaries": torch.cat([starts, starts.new_tensor([length])]).to(torch.int32)}
    depths: list[list[tuple[int, int, int]]] = []  # of the segments that have others below them: start, stop, end
    open_ends: list[int] = []
    for start, stop, end in zip(
        starts.tolist(), [*starts[1:].tolist(), length], row.ends[starts].tolist(), strict=True
    ):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if end > stop:
            if len(open_ends) == len(depths):
                depths.append([])
            depths[len(open_ends)].append((start, stop, end))
            open_ends.append(end)
    if not depths:
        return found
    width = 3 * max(map(len, depths)) + 3
    crossings = torch.full((len(depths), 2, width), length, dtype=torch.int32)
    for level, above in zip(crossings, depths, strict=True):
        queries, keys = [0], [0]
        for start, stop, end in above:
            # queries that see nothing here, keys that nothing sees, and what lies below a segment with that segment
            queries += [stop, stop, end]
            keys += [keys[-1], start, stop]
        queries.append(length)  # the last queries, and behind them the last keys
        keys.append(keys[-1])
        level[0, : len(queries)] = torch.tensor(queries, dtype=torch.int32)
        level[1, : len(keys)] = torch.tensor(keys, dtype=torch.int32)
    longest = crossings.diff(dim=2).amax(dim=(0, 2)).tolist()
    return found | {"crossings": crossings, "longest_crossing": tuple(longest)}


def _worth_sharing(lengths: Sequence[int], common: Sequence[int], query_cost: float) -> list[int]:
    """`common` of sorted histories without the beginnings that save too little for the queries behind them."""
    new = [0, *np.cumsum([length - known for length, known in zip(lengths, common, strict=True)]).tolist()]
    kept = list(common)
    branches = [(0, len(lengths), 0)]  # histories from, to, and how many tokens they share already
    while branches:
        first, stop, above = branches.pop()
        if stop - first < 2:
            continue
        depth = min(common[first + 1 : stop])
        cuts = [first, *(place for place in range(first + 1, stop) if common[place] == depth), stop]
        queries = new[stop] - new[first + 1] + lengths[first] - depth
        if (depth - above) * (len(cuts) - 2) <= query_cost * queries:
            depth = above
        for place in cuts[1:-1]:
            kept[place] = depth
        branches += [(start, end, depth) for start, end in pairwise(cuts)]
    return kept


def _lay_out(lengths: Sequence[int], common: Sequence[int], order: Sequence[int]) -> Row:
    """Lay out sorted histories, each of which has `common` tokens in common with the one before it."""
    new = [length - known for length, known in zip(lengths, common, strict=True)]
    starts = [0, *np.cumsum(new).tolist()]
    slots: list[npt.NDArray[np.int64]] = []
    for i, known in enumerate(common):
        fresh = np.arange(starts[i], starts[i + 1])
        slots.append(np.concatenate((slots[-1][:known], fresh)) if known else fresh)
    # from the last one back: a token is in sight until the first later history that leaves before it
    ends: list[npt.NDArray[np.int64]] = []
    until = np.empty(0, dtype=np.int64)
    for i in reversed(range(len(lengths))):
        kept = common[i + 1] if i + 1 < len(lengths) else 0
        until = np.concatenate((until[:kept], np.full(lengths[i] - kept, starts[i + 1])))
        ends.append(until[common[i] :])
    row_ends = torch.from_numpy(np.concatenate(ends[::-1]))
    positions = torch.from_numpy(
        np.concatenate([np.arange(known, length) for known, length in zip(common, lengths, strict=True)])
    )
    begins = torch.ones(len(row_ends), dtype=torch.bool)
    begins[1:] = (row_ends.diff() != 0) | (positions.diff() != 1)
    return Row(
        slots=torch.from_numpy(np.concatenate([slots[place] for place in order])),
        positions=positions,
        ends=row_ends,
        segments=begins.long().cumsum(0) - 1,
    )


def _common(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> int:
    """Length of the common prefix."""
    shorter = min(len(left), len(right))
    differ = left[:shorter] != right[:shorter]
    first = int(differ.argmax()) if shorter else 0
    return first if shorter and differ[first] else shorter
