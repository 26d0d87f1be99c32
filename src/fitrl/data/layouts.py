"""Layouts: padded, packed or with shared prefixes, whichever the transformer computes in least time.

Enters: the samples of one optimizer step. Leaves: the bins that share a microbatch each, with their layout. It is
chosen over all of them, because a layout decides what fits into one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fitrl.data.bins import WORTHWHILE, Layout, assign, fits, saves_enough
from fitrl.data.prefixes import Prefixes, Row
from fitrl.data.samples import Sample, num_positions

# What one H100 computes while the host launches the kernels of one decoder layer, forward and backward, in FLOP: 2.7
# and 3.8 ms at 250 TFLOP/s, by `benchmarks/update.py --only 135M`
LAUNCHES: dict[Layout, float] = {"padded": 6.8e11, "packed": 6.8e11, "shared": 9.5e11}

# The same for a query that sees a short beginning which many share: few blocks of keys are few programs of flash
# attention's backward, each of which goes through all these queries, 64 of them in 4 us
CROSSING = 1.5e7


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a decoder layer's forward and backward cost, in FLOP or what takes as long.

    A token takes about 24 H^2 in matrices and 4 H a key it sees, three times with the backward. On a GPU a layer takes
    at least as long as its launches, and attention skips what is out of sight instead of computing and masking it.

    Attributes:
        hidden_size: H, the model's width.
        on_gpu: whether a GPU computes.
    """

    hidden_size: int
    on_gpu: bool

    def of(self, layout: Layout, lengths: Tensor, row: Row | None = None) -> float:
        """Of histories of so many inputs; `row`: of the tree where prefixes are shared."""
        if layout == "padded":
            positions, width = lengths.numel() * int(lengths.max()), int(lengths.max())
            keys = positions * (width + 1) / 2 if self.on_gpu else positions * width
        elif row is None:
            positions = int(lengths.sum())
            keys = float((lengths * (lengths + 1)).sum()) / 2 if self.on_gpu else positions**2
        else:
            positions = len(row.positions)
            keys = float((row.positions + 1).sum()) if self.on_gpu else positions**2
        cost = 12.0 * self.hidden_size * (6 * self.hidden_size * positions + keys)
        if row is not None:
            cost *= WORTHWHILE / (WORTHWHILE - 1)
        return max(cost, LAUNCHES[layout]) if self.on_gpu else cost

    @property
    def of_query(self) -> float:
        """Of a query that sees one shared beginning more, in tokens."""
        return CROSSING / (72 * self.hidden_size**2) if self.on_gpu else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Samples of one microbatch, how they are laid out, and what that costs; `row`: of the tree where it is shared."""

    indices: list[int]
    layout: Layout
    row: Row | None
    cost: float


def choose(
    samples: Sequence[Sample],
    *,
    layout: Layout,
    share_prefixes: bool,
    max_tokens: int | None,
    num_batches: int | None,
    multiple_of: int,
    cost: Cost,
) -> list[Bin]:
    """Assign samples to microbatches and lay them out; see `pack` for the arguments."""
    limit = max_tokens if num_batches is None else None
    plans = []
    for way, prefixes in _ways(samples, layout, share_prefixes, limit, multiple_of):
        bins = assign(
            samples,
            layout=way,
            prefixes=prefixes,
            max_tokens=max_tokens,
            num_batches=num_batches,
            multiple_of=multiple_of,
        )
        plans.append(list(_laid_out(samples, bins, prefixes, layout, limit, cost)))
    return min(plans, key=lambda plan: sum(bin.cost for bin in plan))


def _ways(
    samples: Sequence[Sample], layout: Layout, share_prefixes: bool, limit: int | None, multiple_of: int
) -> Iterator[tuple[Layout, Prefixes | None]]:
    """Layouts by whose sizes microbatches may be filled; the prefixes where it shares them."""
    # where all samples fit anyway, it is the same microbatch; rows of one length are not as much work for each rank
    most = limit if layout == "auto" and multiple_of == 1 and not fits(samples, limit, "padded") else None
    pads = most is not None and all(num_positions(sample.histories, padded=True) <= most for sample in samples)
    if layout in ("auto", "packed"):
        yield "packed", None
    if layout == "padded" or pads:
        yield "padded", None
    if layout == "shared" or (layout == "auto" and share_prefixes):
        prefixes = Prefixes([history for sample in samples for history in sample.histories])
        if layout == "shared" or saves_enough(prefixes):
            yield "shared", prefixes


def _laid_out(
    samples: Sequence[Sample],
    bins: Sequence[list[int]],
    prefixes: Prefixes | None,
    layout: Layout,
    limit: int | None,
    cost: Cost,
) -> Iterator[Bin]:
    """Each bin in the cheapest layout that fits, whichever it was filled by."""
    starts = [0, *accumulate(len(sample.histories) for sample in samples)]
    for indices in bins:
        lengths = torch.tensor([len(history) - 1 for index in indices for history in samples[index].histories])
        rows: dict[Layout, Row | None] = {"packed": None, "padded": None}
        sizes: dict[Layout, int] = {"packed": int(lengths.sum()), "padded": len(lengths) * int(lengths.max())}
        if prefixes is not None:
            numbers = [number for index in indices for number in range(starts[index], starts[index + 1])]
            row = prefixes.row(numbers, query_cost=cost.of_query if layout == "auto" else 0.0)
            if limit is not None and len(row.positions) > limit:
                row = prefixes.row(numbers)
            rows["shared"], sizes["shared"] = row, len(row.positions)
        allowed = [name for name in rows if limit is None or sizes[name] <= limit] if layout == "auto" else [layout]
        yield min(
            (
                Bin(indices=indices, layout=name, row=rows[name], cost=cost.of(name, lengths, rows[name]))
                for name in allowed
            ),
            key=lambda bin: bin.cost,
        )
