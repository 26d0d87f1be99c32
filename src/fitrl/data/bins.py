"""Bins: which samples share a microbatch, deterministically.

Enters: the samples of one optimizer step. Leaves: lists of their indices. Samples that share no prefix are put where
they fit best; those that do stay neighbours, so that there is something to share.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise, starmap
from typing import Literal, TypeAlias

from fitrl.data.prefixes import Prefixes
from fitrl.data.samples import Sample, num_positions
from fitrl.errors import InvalidArgumentError

Layout: TypeAlias = Literal["auto", "padded", "packed", "shared"]

# sharing has to save one token in so many: a tree of segments has masks, where segments alone have lengths
WORTHWHILE = 16


def assign(
    samples: Sequence[Sample],
    *,
    layout: Layout,
    prefixes: Prefixes | None,
    max_tokens: int | None,
    num_batches: int | None,
    multiple_of: int,
) -> list[list[int]]:
    """Assign samples to microbatches; see `pack` for the arguments.

    Args:
        samples: at least one.
        layout: of the microbatches.
        prefixes: of all histories of all samples, one sample after the other; None: nothing is shared.
        max_tokens: most positions in a microbatch.
        num_batches: exactly so many, where there are as many samples; `max_tokens` is not looked at.
        multiple_of: with `max_tokens`, rather more microbatches than a number that this does not divide, and of about
            equal size.

    Raises:
        InvalidArgumentError: a sample takes more than `max_tokens` positions.
    """
    if num_batches is None and max_tokens is not None:
        for sample in samples:
            needed = num_positions(sample.histories, padded=layout == "padded")
            if needed > max_tokens:
                raise InvalidArgumentError(
                    f"a trajectory takes {needed} positions, max_tokens={max_tokens} allows fewer"
                )
    if prefixes is not None:
        return _Line(samples, prefixes).cut(max_tokens, num_batches, multiple_of)
    if num_batches is not None:
        return balance(samples, num_batches)
    bins = first_fit(samples, max_tokens, layout)
    # ranks wait for the one with most to do; rows of about one length are worth more where shorter ones are padded
    if len(bins) % multiple_of or (multiple_of > 1 and layout != "padded"):
        spread = balance(samples, _round_up(len(bins), multiple_of))
        if all(fits([samples[index] for index in indices], max_tokens, layout) for indices in spread):
            return spread
    return bins


def saves_enough(prefixes: Prefixes) -> bool:
    """Whether sharing these prefixes saves one token in `WORTHWHILE`."""
    return (sum(prefixes.lengths) - prefixes.size) * WORTHWHILE >= sum(prefixes.lengths)


class _Line:
    """Samples in depth-first order of their prefixes, to be cut into microbatches that each hold neighbours."""

    def __init__(self, samples: Sequence[Sample], prefixes: Prefixes) -> None:
        self._prefixes = prefixes
        stops = [0, *accumulate(len(sample.histories) for sample in samples)]
        self._histories = list(starmap(range, pairwise(stops)))
        self._order = sorted(range(len(samples)), key=lambda index: min(map(prefixes.rank, self._histories[index])))
        self._size = prefixes.size

    def cut(self, max_tokens: int | None, num_batches: int | None, multiple_of: int) -> list[list[int]]:
        most = self._size if max_tokens is None else max_tokens
        if num_batches is None:
            bins = self._fill(most)
            count = _round_up(len(bins), multiple_of)
            if multiple_of == 1 or count > len(self._order):
                return bins
        else:
            most, count = self._size, min(num_batches, len(self._order))
        least = 0  # the smallest size of the largest microbatch with which so many are enough
        while most - least > most // 64 + 1:
            middle = (least + most) // 2
            if len(self._fill(middle, count)) <= count:
                most = middle
            else:
                least = middle
        return self._fill(most, count)

    def _fill(self, most: int, count: int = 1) -> list[list[int]]:
        """Fill one microbatch after the other up to `most` tokens; `count` of them at least."""
        if count == 1 and self._size <= most:
            return [sorted(self._order)]
        bins: list[list[int]] = []
        ranks: list[int] = []
        size = 0
        for place, index in enumerate(self._order):
            grown, tokens = self._prefixes.grow(ranks, self._histories[index])
            if bins and size + tokens <= most and len(self._order) - place > count - len(bins):
                bins[-1].append(index)
                ranks, size = grown, size + tokens
            else:
                bins.append([index])
                ranks, size = self._prefixes.grow([], self._histories[index])
        return [sorted(indices) for indices in bins]


def first_fit(samples: Sequence[Sample], max_tokens: int | None, layout: Layout) -> list[list[int]]:
    """First-fit decreasing; a padded microbatch is as large as its rows times the longest of them."""
    if max_tokens is None or fits(samples, max_tokens, layout):
        return [list(range(len(samples)))]
    lengths = [[len(history) - 1 for history in sample.histories] for sample in samples]
    # the first sample of a bin is its widest, so that a padded bin has a fixed number of rows, a packed one of tokens
    if layout == "padded":
        size, need = [max(row) for row in lengths], [len(row) for row in lengths]
    else:
        size = need = [sum(row) for row in lengths]
    bins: list[list[int]] = []
    # a binary tree over the bins: each node holds the most room that a bin below it has left
    leaves = 1 << (len(samples) - 1).bit_length()
    room = [0] * (2 * leaves)
    for index in sorted(range(len(samples)), key=lambda index: (-size[index], index)):
        if bins and room[1] >= need[index]:
            node = 1
            while node < leaves:
                node = 2 * node if room[2 * node] >= need[index] else 2 * node + 1
        else:
            node = leaves + len(bins)
            bins.append([])
            room[node] = max_tokens // size[index] if layout == "padded" else max_tokens
        bins[node - leaves].append(index)
        room[node] -= need[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(indices) for indices in bins]


def balance(samples: Sequence[Sample], num_batches: int) -> list[list[int]]:
    """Largest first onto the emptiest microbatch."""
    order = sorted(range(len(samples)), key=lambda index: (-samples[index].num_input_tokens, index))
    bins: list[list[int]] = [[] for _ in range(min(num_batches, len(samples)))]
    loads = [(0, place) for place in range(len(bins))]  # a heap: the emptiest first
    for index in order:
        load, place = loads[0]
        bins[place].append(index)
        heapq.heapreplace(loads, (load + samples[index].num_input_tokens, place))
    return [sorted(indices) for indices in bins]


def _round_up(count: int, multiple_of: int) -> int:
    return math.ceil(count / multiple_of) * multiple_of


def fits(samples: Sequence[Sample], max_tokens: int | None, layout: Layout) -> bool:
    """Whether all samples fit into one microbatch, sharing nothing."""
    histories = [history for sample in samples for history in sample.histories]
    return max_tokens is None or num_positions(histories, padded=layout == "padded") <= max_tokens
