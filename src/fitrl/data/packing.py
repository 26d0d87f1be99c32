"""Packing: samples to microbatches, deterministically, with the global denominators on board.

Enters: the samples of one optimizer step. Leaves: `Batch` objects, one per microbatch. All histories of a trajectory
share a microbatch, because sequence-level ratios need the whole trajectory.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fitrl.data.batch import Batch, LossTargets, ModelInputs
from fitrl.data.samples import Sample, num_positions
from fitrl.errors import InvalidArgumentError

Layout: TypeAlias = Literal["auto", "padded", "packed"]


def deal(num_groups: int, num_minibatches: int, *, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Deal whole groups to minibatches, shuffled from (seed, step, epoch); never an empty minibatch.

    Returns:
        group indices of each minibatch; fewer minibatches than asked for when there are fewer groups.
    """
    order = list(range(num_groups))
    random.Random(f"{seed}/{step}/{epoch}").shuffle(order)
    used = min(num_minibatches, num_groups)
    return [order[start::used] for start in range(used)]


def pack(
    samples: Sequence[Sample],
    *,
    max_tokens: int | None = None,
    num_batches: int | None = None,
    multiple_of: int = 1,
    layout: Layout = "auto",
    hidden_size: int = 1024,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    kl_mean: float | None = None,
    skip_zero_advantage: bool = False,
    measures_mismatch: bool = False,
) -> list[Batch]:
    """Pack the samples of one optimizer step into microbatches.

    Args:
        samples: trajectories.
        max_tokens: most positions in a microbatch, padding included; None: one microbatch.
        num_batches: exactly so many microbatches instead, of about equal size.
        multiple_of: with `max_tokens`, rather some more microbatches than a number that this does not divide, so that
            each of so many ranks has work.
        layout: "auto" takes, per microbatch, the one that costs the transformer less arithmetic.
        hidden_size: width of the model, which decides what attention over a packed row costs.
        num_tokens: trainable tokens of the step; None: those of `samples`.
        num_sequences: trajectories of the step; None: those of `samples`.
        kl_mean: mean of q - ref over the call.
        skip_zero_advantage: leave out trajectories whose advantage is 0; the denominators still count them.
        measures_mismatch: see `Batch`.

    Returns:
        At least one batch, at most `num_batches` where given (fewer when there are fewer samples).

    Raises:
        InvalidArgumentError: no samples, or one that takes more than `max_tokens` positions.
    """
    if not samples:
        raise InvalidArgumentError("cannot pack an empty list of samples")
    tokens = float(sum(sample.num_trainable_tokens for sample in samples)) if num_tokens is None else num_tokens
    sequences = float(len(samples)) if num_sequences is None else num_sequences
    chosen = [index for index, sample in enumerate(samples) if sample.advantage != 0.0 or not skip_zero_advantage]
    chosen = chosen or [0]
    packed = [samples[index] for index in chosen]
    if num_batches is not None:
        bins = _balance(packed, num_batches)
    else:
        bins = _first_fit(packed, max_tokens, layout)
        if len(bins) % multiple_of:
            spread = _balance(packed, math.ceil(len(bins) / multiple_of) * multiple_of)
            if all(_fits([packed[index] for index in indices], max_tokens, layout) for indices in spread):
                bins = spread
    return [
        _build(
            [packed[index] for index in indices],
            members=[chosen[index] for index in indices],
            layout=layout,
            max_tokens=max_tokens,
            hidden_size=hidden_size,
            num_tokens=tokens,
            num_sequences=sequences,
            kl_mean=kl_mean,
            measures_mismatch=measures_mismatch,
        )
        for indices in bins
    ]


def _first_fit(samples: Sequence[Sample], max_tokens: int | None, layout: Layout) -> list[list[int]]:
    """First-fit decreasing; a padded microbatch is as large as its rows times the longest of them."""
    if max_tokens is None:
        return [list(range(len(samples)))]
    for sample in samples:
        needed = num_positions(sample.histories, padded=layout == "padded")
        if needed > max_tokens:
            raise InvalidArgumentError(f"a trajectory takes {needed} positions, max_tokens={max_tokens} allows fewer")
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


def _balance(samples: Sequence[Sample], num_batches: int) -> list[list[int]]:
    """Largest first onto the emptiest microbatch."""
    order = sorted(range(len(samples)), key=lambda index: (-samples[index].num_input_tokens, index))
    bins: list[list[int]] = [[] for _ in range(min(num_batches, len(samples)))]
    loads = [(0, place) for place in range(len(bins))]  # a heap: the emptiest first
    for index in order:
        load, place = loads[0]
        bins[place].append(index)
        heapq.heapreplace(loads, (load + samples[index].num_input_tokens, place))
    return [sorted(indices) for indices in bins]


def _fits(samples: Sequence[Sample], max_tokens: int | None, layout: Layout) -> bool:
    histories = [history for sample in samples for history in sample.histories]
    return max_tokens is None or num_positions(histories, padded=layout == "padded") <= max_tokens


def _build(
    samples: Sequence[Sample],
    *,
    members: Sequence[int],
    layout: Layout,
    max_tokens: int | None,
    hidden_size: int,
    num_tokens: float,
    num_sequences: float,
    kl_mean: float | None,
    measures_mismatch: bool,
) -> Batch:
    histories = [history for sample in samples for history in sample.histories]
    lengths = torch.tensor([len(history) for history in histories])
    ids = torch.cat([history.token_ids for history in histories])
    mask = torch.cat([history.mask for history in histories])
    segment = torch.repeat_interleave(torch.arange(len(histories)), lengths)
    position = torch.arange(len(ids)) - (lengths.cumsum(0) - lengths)[segment]
    is_input = position < lengths[segment] - 1
    predicted = mask.nonzero().squeeze(1)

    width = int(lengths.max()) - 1
    if layout == "auto":
        layout = _cheaper(len(histories), width, int(is_input.sum()), hidden_size, max_tokens)
    if layout == "packed":
        slot = is_input.cumsum(0) - 1
        shape = (1, int(is_input.sum()))
    else:
        slot = segment * width + position
        shape = (len(histories), width)

    def scatter(values: Tensor, fill: int) -> Tensor:
        flat = torch.full((shape[0] * shape[1],), fill, dtype=torch.int64)
        flat[slot[is_input]] = values[is_input]
        return flat.view(shape)

    trajectory = torch.repeat_interleave(
        torch.arange(len(samples)), torch.tensor([int(sum(map(len, sample.histories))) for sample in samples])
    )[predicted]
    advantages = torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)
    references = [sample.reference_logprobs for sample in samples if sample.reference_logprobs is not None]
    return Batch(
        ModelInputs(
            input_ids=scatter(ids, 0),
            position_ids=scatter(position, 0) if layout == "packed" else None,
            segment_ids=scatter(segment, -1),
        ),
        LossTargets(
            rows=slot[predicted - 1],
            targets=ids[predicted],
            old_logprobs=torch.cat([sample.old_logprobs for sample in samples])[predicted],
            rollout_logprobs=torch.cat([history.logprobs for history in histories])[predicted],
            reference_logprobs=torch.cat(references)[predicted] if references else None,
            advantages=advantages[trajectory],
            mask=torch.ones(len(predicted), dtype=torch.bool),
            trajectory_ids=trajectory,
            temperature=torch.cat([history.temperature for history in histories])[predicted],
            num_tokens=torch.tensor(num_tokens, dtype=torch.float32),
            num_sequences=torch.tensor(num_sequences, dtype=torch.float32),
            kl_mean=None if kl_mean is None else torch.tensor(kl_mean, dtype=torch.float32),
        ),
        measures_mismatch=measures_mismatch,
        members=members,
    )


def _cheaper(rows: int, width: int, tokens: int, hidden_size: int, max_tokens: int | None) -> Layout:
    """The layout with less arithmetic: a token costs about 24 H^2 in the layers' matrices, 4 H for each key it sees."""
    padded = rows * width
    if max_tokens is not None and padded > max_tokens:
        return "packed"
    return "packed" if tokens * (6 * hidden_size + tokens) < padded * (6 * hidden_size + width) else "padded"
