"""Microbatches: what the model eats and what the loss eats, apart from each other.

A batch is laid out either *padded*, one history a row, filled up on the right, or *packed*, all histories in one row:
one segment each, or, where histories begin alike, a tree of segments that holds what they share once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fitrl.data.host import by_one_thread

_CPU = torch.device("cpu")
_Tensors = TypeVar("_Tensors", "ModelInputs", "LossTargets")


@dataclass(slots=True, kw_only=True, eq=False)
class ModelInputs:
    """What the model eats; B = 1 when packed.

    When packed, `key <= query < ends[key]` says which keys a query may see. Two completions [7, 8] and [9] of a prompt
    [5, 6], the prompt held once:

        input_ids     5 6 7 8 9
        position_ids  0 1 2 3 2
        segment_ids   0 0 1 1 2
        ends          5 5 4 4 5

    Attributes:
        input_ids: [B, L] int64.
        position_ids: [B, L] int64, how many tokens of its history come before a token; None when padded, where a
            causal mask alone keeps the padding on the right out of sight.
        segment_ids: [B, L] int64, which segment a token belongs to, a history of its own unless some share a prefix;
            -1 for padding.
        ends: [B, L] int64, the first place from which on a token is out of sight; None when padded.
        boundaries: [N + 1] int32, where the N segments begin, and L; None when padded.
        crossings: [depths, 2, M + 1] int32 where prefixes are shared, else None: for each depth of the tree M stretches
            of queries and of keys, given by where they begin; a stretch of queries sees the whole of its stretch of
            keys, which may be empty, beside its own segment.
        longest_crossing: most queries and most keys of such a stretch, those without the other included: a kernel
            writes the results of no more.
        longest: positions of the longest history.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    segment_ids: Tensor
    ends: Tensor | None = None
    boundaries: Tensor | None = None
    crossings: Tensor | None = None
    longest_crossing: tuple[int, int] = (0, 0)
    longest: int


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
        num_tokens_saved: tokens of histories that are not computed again, because another history holds them.
    """

    __slots__ = ("loss_inputs", "measures_mismatch", "members", "model_inputs", "num_tokens_saved")

    def __init__(
        self,
        model_inputs: ModelInputs,
        loss_inputs: LossTargets,
        *,
        measures_mismatch: bool = False,
        members: Sequence[int] = (),
        num_tokens_saved: int = 0,
    ) -> None:
        self.model_inputs = model_inputs
        self.loss_inputs = loss_inputs
        self.measures_mismatch = measures_mismatch
        self.members = tuple(members)
        self.num_tokens_saved = num_tokens_saved

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device; dtypes stay. What lies in page-locked memory is not waited for."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory, from where a GPU copies while the program goes on."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, copy: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            _mapped(self.model_inputs, copy),
            _mapped(self.loss_inputs, copy),
            measures_mismatch=self.measures_mismatch,
            members=self.members,
            num_tokens_saved=self.num_tokens_saved,
        )

    @property
    def layout(self) -> Literal["padded", "packed", "shared"]:
        """How the histories are laid out."""
        if self.model_inputs.ends is None:
            return "padded"
        return "shared" if self.num_tokens_saved else "packed"

    @property
    def num_input_tokens(self) -> int:
        """Tokens of histories that are computed, without padding."""
        return int((self.model_inputs.segment_ids >= 0).sum())

    @property
    def num_positions(self) -> int:
        """B x L, padding included."""
        return self.model_inputs.input_ids.numel()

    def filler(self) -> Batch:
        """A batch of zero weight that still reaches the graph, so that all minibatches and ranks have as many."""
        inputs = ModelInputs(
            input_ids=self.model_inputs.input_ids[:1, :1],
            position_ids=None,
            segment_ids=self.model_inputs.segment_ids[:1, :1],
            longest=1,
        )
        first: dict[str, Any] = {
            field.name: value if value is None or value.dim() == 0 else value[:1]
            for field in fields(LossTargets)
            for value in [getattr(self.loss_inputs, field.name)]
        }
        for name in ("rows", "trajectory_ids", "mask"):
            first[name] = torch.zeros_like(first[name])
        # measures_mismatch stays: ranks reduce the same metrics
        return Batch(inputs, LossTargets(**first), measures_mismatch=self.measures_mismatch)


class Feed:
    """Microbatches as Lightning's loops want them: `trainer.fit(module, Feed(batches))`.

    Sized, because Lightning fetches one batch ahead of a loader without a length, and no list, because a list is a
    list of loaders to it.

    Args:
        batches: of an epoch, in order; one that is a function is made by it when its turn comes, while a GPU still
            computes the one before.
        device: where they will be trained on; for a GPU each is copied to page-locked memory.
    """

    def __init__(self, batches: Sequence[Batch | Callable[[], Batch]], *, device: torch.device = _CPU) -> None:
        self._batches = batches
        self._device = device

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            with by_one_thread(self._device):
                built = batch() if callable(batch) else batch
            yield built.pin_memory() if self._device.type == "cuda" else built


def _mapped(tensors: _Tensors, copy: Callable[[Tensor], Tensor]) -> _Tensors:
    mapped: dict[str, Any] = {
        field.name: copy(value) if isinstance(value, Tensor) else value
        for field in fields(tensors)
        for value in [getattr(tensors, field.name)]
    }
    return type(tensors)(**mapped)
