"""Packing: samples to microbatches, deterministically, with the global denominators on board.

Enters: the samples of one optimizer step. Leaves: `Batch` objects, one per microbatch. All histories of a trajectory
share a microbatch, because sequence-level ratios need the whole trajectory; which trajectories do, `bins.py` says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fitrl.data.batch import Batch, LossTargets, ModelInputs
from fitrl.data.bins import WORTHWHILE, Layout, assign
from fitrl.data.histories import TokenHistory
from fitrl.data.prefixes import Prefixes, Row, lengths_of, separate_row
from fitrl.data.samples import Sample
from fitrl.errors import InvalidArgumentError


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
    share_prefixes: bool = False,
    hidden_size: int = 1024,
    sparse_attention: bool = False,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    kl_mean: float | None = None,
    skip_zero_advantage: bool = False,
    measures_mismatch: bool = False,
) -> list[Batch]:
    """Pack the samples of one optimizer step into microbatches.

    Args:
        samples: trajectories.
        max_tokens: most positions in a microbatch, padding included, shared ones once; None: one microbatch.
        num_batches: exactly so many microbatches instead, of about equal size.
        multiple_of: with `max_tokens`, rather some more microbatches than a number that this does not divide, and of
            about equal size, so that each of so many ranks has as much work.
        layout: "auto" takes, per microbatch, the one that costs the transformer less arithmetic; "shared" is packed,
            with every common prefix held once.
        share_prefixes: whether "auto" may share prefixes, where that saves enough; the policy has to be able to.
        hidden_size: width of the model, which decides what attention over a packed row costs.
        sparse_attention: whether attention skips what is out of sight, instead of computing and masking it.
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
    shares = layout == "shared" or (layout == "auto" and share_prefixes)
    prefixes = Prefixes([history for sample in packed for history in sample.histories]) if shares else None
    bins = assign(
        packed,
        layout=layout,
        prefixes=prefixes,
        max_tokens=max_tokens,
        num_batches=num_batches,
        multiple_of=multiple_of,
    )
    starts = [0, *accumulate(len(sample.histories) for sample in packed)]
    return [
        _build(
            [packed[index] for index in indices],
            tree=None
            if prefixes is None
            else prefixes.row([number for index in indices for number in range(starts[index], starts[index + 1])]),
            members=[chosen[index] for index in indices],
            layout=layout,
            max_tokens=max_tokens if num_batches is None else None,
            hidden_size=hidden_size,
            sparse_attention=sparse_attention,
            num_tokens=tokens,
            num_sequences=sequences,
            kl_mean=kl_mean,
            measures_mismatch=measures_mismatch,
        )
        for indices in bins
    ]


def _build(
    samples: Sequence[Sample],
    *,
    tree: Row | None,
    members: Sequence[int],
    layout: Layout,
    max_tokens: int | None,
    hidden_size: int,
    sparse_attention: bool,
    num_tokens: float,
    num_sequences: float,
    kl_mean: float | None,
    measures_mismatch: bool,
) -> Batch:
    histories = [history for sample in samples for history in sample.histories]
    lengths = torch.tensor([len(history) for history in histories])
    ids = torch.cat([history.token_ids for history in histories])
    mask = torch.cat([history.mask for history in histories])
    is_input = torch.ones_like(mask)
    is_input[lengths.cumsum(0) - 1] = False  # the last token of a history predicts nothing
    predicted = mask.nonzero().squeeze(1)

    if layout == "auto":
        layout = _cheapest(lengths - 1, tree, hidden_size, sparse_attention, max_tokens)
    row = tree if layout == "shared" and tree is not None else separate_row(histories)
    inputs, slots = _lay_out(ids[is_input], histories, row, layout)
    slot = torch.full_like(ids, -1)
    slot[is_input] = slots

    trajectory = torch.repeat_interleave(
        torch.arange(len(samples)), torch.tensor([int(sum(map(len, sample.histories))) for sample in samples])
    )[predicted]
    advantages = torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)
    references = [sample.reference_logprobs for sample in samples if sample.reference_logprobs is not None]
    return Batch(
        inputs,
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
        num_tokens_saved=len(row.slots) - len(row.positions),
    )


def _lay_out(ids: Tensor, histories: Sequence[TokenHistory], row: Row, layout: Layout) -> tuple[ModelInputs, Tensor]:
    """Put the inputs [T] of histories in their places; also returns these, [T] int64 into the B x L positions."""
    lengths = torch.tensor([len(history) - 1 for history in histories])
    longest = int(lengths.max())
    if layout == "padded":
        slots, shape = row.segments * longest + row.positions, (len(histories), longest)
    else:
        slots, shape = row.slots, (1, len(row.positions))

    def scatter(values: Tensor, fill: int) -> Tensor:
        return torch.full((shape[0] * shape[1],), fill).scatter_(0, slots, values).view(shape)

    if layout == "padded":
        return (
            ModelInputs(
                input_ids=scatter(ids, 0), position_ids=None, segment_ids=scatter(row.segments, -1), longest=longest
            ),
            slots,
        )
    inputs = ModelInputs(
        input_ids=scatter(ids, 0),
        position_ids=row.positions[None],
        segment_ids=row.segments[None],
        ends=row.ends[None],
        longest=longest,
        **lengths_of(row),
    )
    return inputs, slots


def _cheapest(
    lengths: Tensor, tree: Row | None, hidden_size: int, sparse_attention: bool, max_tokens: int | None
) -> Layout:
    """The layout with the least arithmetic: a token costs about 24 H^2 in the layers' matrices, 4 H a key it sees."""
    rows, width, tokens = len(lengths), int(lengths.max()), int(lengths.sum())
    sizes: dict[Layout, int] = {"padded": rows * width, "packed": tokens}
    keys: dict[Layout, float]  # that all queries together see
    if sparse_attention:
        keys = {"padded": rows * width * (width + 1) / 2, "packed": float((lengths * (lengths + 1)).sum()) / 2}
    else:
        keys = {"padded": rows * width**2, "packed": tokens**2}
    if tree is not None:
        sizes["shared"] = len(tree.positions)
        keys["shared"] = float((tree.positions + 1).sum()) if sparse_attention else len(tree.positions) ** 2
    costs: dict[Layout, float] = {name: 6 * hidden_size * sizes[name] + keys[name] for name in sizes}
    if tree is not None:
        costs["shared"] *= WORTHWHILE / (WORTHWHILE - 1)
    fitting = [name for name in sizes if max_tokens is None or sizes[name] <= max_tokens]
    return min(fitting, key=costs.__getitem__)
