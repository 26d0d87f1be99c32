"""Packing: samples to microbatches, deterministically, with the global denominators on board.

Enters: the samples of one optimizer step. Leaves: `Batch` objects, one per microbatch, or what makes them, so that a
GPU need not wait for more than the first. All histories of a trajectory share a microbatch, because sequence-level
ratios need the whole trajectory; which trajectories do, and how they are laid out, `layouts.py` says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fitrl.data.batch import Batch, LossTargets, ModelInputs
from fitrl.data.bins import Layout
from fitrl.data.histories import TokenHistory
from fitrl.data.layouts import Bin, Cost, choose
from fitrl.data.prefixes import Row, lengths_of, separate_row
from fitrl.data.samples import Sample, num_positions
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
    on_gpu: bool = False,
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
        layout: "auto" takes the one with which the transformer has the least arithmetic over all microbatches;
            "shared" is packed, with every common prefix held once.
        share_prefixes: whether "auto" may share prefixes, where that saves enough; the policy has to be able to.
        hidden_size: width of the model, which decides what attention over a packed row costs.
        on_gpu: whether a GPU computes. There attention skips what is out of sight, instead of computing and masking
            it, and a small batch takes as long as its kernels take to be launched: most of all where prefixes are
            shared.
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
    made = microbatches(
        samples,
        max_tokens=max_tokens,
        num_batches=num_batches,
        multiple_of=multiple_of,
        layout=layout,
        share_prefixes=share_prefixes,
        hidden_size=hidden_size,
        on_gpu=on_gpu,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        kl_mean=kl_mean,
        skip_zero_advantage=skip_zero_advantage,
        measures_mismatch=measures_mismatch,
    )
    return [microbatch.build() for microbatch in made]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """Samples that share a microbatch, before `build` lays out their tensors.

    Attributes:
        samples: those in it.
        members: their places among all samples of the step.
        bin: how they are laid out.
        options: of `Batch` and `LossTargets`, what the whole step has in common.
        is_filler: made into one of zero weight, see `Batch.filler`.
    """

    samples: Sequence[Sample]
    members: Sequence[int]
    bin: Bin
    options: dict[str, Any]
    is_filler: bool = False

    @property
    def num_input_tokens(self) -> int:
        """As of the batch."""
        if self.is_filler:
            return 1
        if self.bin.row is not None:
            return len(self.bin.row.positions)
        return sum(sample.num_input_tokens for sample in self.samples)

    @property
    def num_positions(self) -> int:
        """As of the batch."""
        if self.is_filler or self.bin.layout != "padded":
            return self.num_input_tokens
        return num_positions([history for sample in self.samples for history in sample.histories], padded=True)

    @property
    def num_tokens_saved(self) -> int:
        """As of the batch."""
        if self.is_filler or self.bin.row is None:
            return 0
        return len(self.bin.row.slots) - len(self.bin.row.positions)

    def filler(self) -> Microbatch:
        """What makes a batch's filler."""
        return replace(self, is_filler=True)

    def build(self) -> Batch:
        """The batch."""
        batch = _build(self.samples, row=self.bin.row, members=self.members, layout=self.bin.layout, **self.options)
        return batch.filler() if self.is_filler else batch


def microbatches(
    samples: Sequence[Sample],
    *,
    max_tokens: int | None = None,
    num_batches: int | None = None,
    multiple_of: int = 1,
    layout: Layout = "auto",
    share_prefixes: bool = False,
    hidden_size: int = 1024,
    on_gpu: bool = False,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    kl_mean: float | None = None,
    skip_zero_advantage: bool = False,
    measures_mismatch: bool = False,
) -> list[Microbatch]:
    """What makes the batches that `pack` returns; see there."""
    if not samples:
        raise InvalidArgumentError("cannot pack an empty list of samples")
    options = {
        "num_tokens": float(sum(sample.num_trainable_tokens for sample in samples))
        if num_tokens is None
        else num_tokens,
        "num_sequences": float(len(samples)) if num_sequences is None else num_sequences,
        "kl_mean": kl_mean,
        "measures_mismatch": measures_mismatch,
    }
    chosen = [index for index, sample in enumerate(samples) if sample.advantage != 0.0 or not skip_zero_advantage]
    chosen = chosen or [0]
    bins = choose(
        [samples[index] for index in chosen],
        layout=layout,
        share_prefixes=share_prefixes,
        max_tokens=max_tokens,
        num_batches=num_batches,
        multiple_of=multiple_of,
        cost=Cost(hidden_size=hidden_size, on_gpu=on_gpu),
    )
    return [
        Microbatch(
            samples=[samples[chosen[index]] for index in bin.indices],
            members=[chosen[index] for index in bin.indices],
            bin=bin,
            options=options,
        )
        for bin in bins
    ]


def _build(
    samples: Sequence[Sample],
    *,
    row: Row | None,
    members: Sequence[int],
    layout: Layout,
    num_tokens: float,
    num_sequences: float,
    kl_mean: float | None,
    measures_mismatch: bool,
) -> Batch:
    histories = [history for sample in samples for history in sample.histories]
    lengths = torch.tensor([len(history) for history in histories])
    row = separate_row(histories) if row is None else row
    ids = torch.cat([history.token_ids for history in histories])
    mask = torch.cat([history.mask for history in histories])
    is_input = torch.ones_like(mask)
    is_input[lengths.cumsum(0) - 1] = False  # the last token of a history predicts nothing
    predicted = mask.nonzero().squeeze(1)

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
