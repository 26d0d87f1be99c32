"""Packing: samples to microbatches, deterministically, with the global denominators on board.

Enters: the samples of one optimizer step. Leaves: `Batch` objects, one per microbatch. A batch is laid out either
*padded*, one history a row, filled up on the right, or *packed*, all histories in one row, one segment each.
All histories of a trajectory share a microbatch, because sequence-level ratios need the whole trajectory.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from fitrl.data.samples import Sample
from fitrl.errors import InvalidArgumentError

Layout: TypeAlias = Literal["auto", "padded", "packed"]
_Tensors = TypeVar("_Tensors", "ModelInputs", "LossTargets")


@dataclass(slots=True, kw_only=True, eq=False)
class ModelInputs:
    """What the model eats; B = 1 when packed.

    Attributes:
        input_ids: [B, L] int64.
        position_ids: [B, L] int64, starting again at 0 with each segment; None when padded, where a causal
            mask alone keeps the padding on the right out of sight.
        segment_ids: [B, L] int64, which history a token belongs to; -1 for padding.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    segment_ids: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class LossTargets:
    """What the loss eats: one row per token that the policy predicted, R rows in all.

    Attributes:
        rows: [R] int64, indices into the B x L positions; position `rows[i]` predicts `targets[i]`.
        targets: [R] int64.
        old_logprobs: [R] float32, q.
        rollout_logprobs: [R] float32, o; NaN where unknown.
        reference_logprobs: [R] float32 or None.
        advantages: [R] float32.
        mask: [R] bool; all True but in a filler.
        trajectory_ids: [R] int64, dense within the batch.
        temperature: [R] float32.
        num_tokens: scalar float32, trainable tokens of the whole optimizer step.
        num_sequences: scalar float32, trajectories of the whole optimizer step.
        kl_mean: scalar float32 or None, mean of q - ref over the call.
    """

    rows: Tensor
    targets: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    reference_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor
    trajectory_ids: Tensor
    temperature: Tensor
    num_tokens: Tensor
    num_sequences: Tensor
    kl_mean: Tensor | None


class Batch:
    """One microbatch.

    A plain class on purpose: Lightning casts every floating tensor that it finds in a dict, list or dataclass to the
    training precision, and a logprob rounded to bfloat16 makes its ratio noise.

    Args:
        model_inputs: what the model eats.
        loss_inputs: what the loss eats.
        measures_mismatch: whether trainer and sampler still hold the same weights, so that comparing their
            logprobs measures their difference (the first minibatch of a call).
        members: indices of the batch's samples in what was packed, in the order of the rows.
    """

    __slots__ = ("loss_inputs", "measures_mismatch", "members", "model_inputs")

    def __init__(
        self,
        model_inputs: ModelInputs,
        loss_inputs: LossTargets,
        *,
        measures_mismatch: bool = False,
        members: Sequence[int] = (),
    ) -> None:
        self.model_inputs = model_inputs
        self.loss_inputs = loss_inputs
        self.measures_mismatch = measures_mismatch
        self.members = tuple(members)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Copy to a device; dtypes stay."""
        return Batch(
            _to(self.model_inputs, device, non_blocking),
            _to(self.loss_inputs, device, non_blocking),
            measures_mismatch=self.measures_mismatch,
            members=self.members,
        )

    @property
    def layout(self) -> Literal["padded", "packed"]:
        """How the histories are laid out."""
        return "padded" if self.model_inputs.position_ids is None else "packed"

    @property
    def num_input_tokens(self) -> int:
        """Tokens of histories, without padding."""
        return int((self.model_inputs.segment_ids >= 0).sum())

    @property
    def num_positions(self) -> int:
        """B x L, padding included."""
        return self.model_inputs.input_ids.numel()

    def filler(self) -> Batch:
        """A batch of zero weight that still reaches the graph, so that every minibatch has as many microbatches."""
        inputs = ModelInputs(
            input_ids=self.model_inputs.input_ids[:1, :1],
            position_ids=None,
            segment_ids=self.model_inputs.segment_ids[:1, :1],
        )
        first: dict[str, Any] = {
            field.name: value if value is None or value.dim() == 0 else value[:1]
            for field in fields(LossTargets)
            for value in [getattr(self.loss_inputs, field.name)]
        }
        for name in ("rows", "trajectory_ids", "mask"):
            first[name] = torch.zeros_like(first[name])
        return Batch(inputs, LossTargets(**first))


class Feed:
    """Microbatches as Lightning's loops want them: `trainer.fit(module, Feed(batches))`.

    Sized, because Lightning fetches one batch ahead of a loader without a length, and no list, because a list is a
    list of loaders to it.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _to(tensors: _Tensors, device: torch.device | str, non_blocking: bool) -> _Tensors:
    moved: dict[str, Any] = {
        field.name: None if value is None else value.to(device, non_blocking=non_blocking)
        for field in fields(tensors)
        for value in [getattr(tensors, field.name)]
    }
    return type(tensors)(**moved)


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
        samples: trajectories, none longer than `max_tokens`.
        max_tokens: most positions in a microbatch, padding included; None: one microbatch.
        num_batches: exactly so many microbatches instead, of about equal size.
        layout: "auto" takes, per microbatch, the one that costs the transformer less arithmetic.
        hidden_size: width of the model, which decides what attention over a packed row costs.
        num_tokens: trainable tokens of the step; None: those of `samples`.
        num_sequences: trajectories of the step; None: those of `samples`.
        kl_mean: mean of q - ref over the call.
        skip_zero_advantage: leave out trajectories whose advantage is 0; the denominators still count them.
        measures_mismatch: see `Batch`.

    Returns:
        At least one batch, at most `num_batches` where given (fewer when there are fewer samples).
    """
    if not samples:
        raise InvalidArgumentError("cannot pack an empty list of samples")
    tokens = float(sum(sample.num_trainable_tokens for sample in samples)) if num_tokens is None else num_tokens
    sequences = float(len(samples)) if num_sequences is None else num_sequences
    chosen = [index for index, sample in enumerate(samples) if sample.advantage != 0.0 or not skip_zero_advantage]
    chosen = chosen or [0]
    packed = [samples[index] for index in chosen]
    bins = _balance(packed, num_batches) if num_batches is not None else _first_fit(packed, max_tokens, layout)
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
    lengths = [[len(history) - 1 for history in sample.histories] for sample in samples]
    size = [max(row) for row in lengths] if layout == "padded" else [sum(row) for row in lengths]
    order = sorted(range(len(samples)), key=lambda index: (-size[index], index))
    bins: list[list[int]] = []
    used: list[int] = []
    widest: list[int] = []
    for index in order:
        for place in range(len(bins)):
            if layout == "padded":
                grown = (used[place] + len(lengths[index])) * max(widest[place], size[index])
            else:
                grown = used[place] + size[index]
            if grown <= max_tokens:
                break
        else:
            place = len(bins)
            bins.append([])
            used.append(0)
            widest.append(0)
        bins[place].append(index)
        used[place] += len(lengths[index]) if layout == "padded" else size[index]
        widest[place] = max(widest[place], size[index])
    return [sorted(indices) for indices in bins]


def _balance(samples: Sequence[Sample], num_batches: int) -> list[list[int]]:
    """Largest first onto the emptiest microbatch."""
    order = sorted(range(len(samples)), key=lambda index: (-samples[index].num_input_tokens, index))
    bins: list[list[int]] = [[] for _ in range(min(num_batches, len(samples)))]
    load = [0] * len(bins)
    for index in order:
        place = min(range(len(bins)), key=lambda candidate: (load[candidate], candidate))
        bins[place].append(index)
        load[place] += samples[index].num_input_tokens
    return [sorted(indices) for indices in bins]


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
