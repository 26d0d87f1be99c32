"""What a token's loss needs besides its new logprob: cleaned, weighted and counted before the logits are made.

Enters: old logprobs, advantages, mask. Leaves: `TokenRows`, which may be cut into tiles for most objectives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fitrl.errors import InvalidArgumentError
from fitrl.objective.objective import Objective


@dataclass(slots=True, kw_only=True, eq=False)
class TokenRows:
    """All that a token's loss needs besides its new logprob; made before the logits are.

    Rows of an objective that is `independent_of_other_rows` may be cut into tiles: their losses and metrics add up.

    Attributes:
        mask: [T] bool; None: all of them count.
        old_logprobs: [T] q, 0 where masked out, NaN where the policy as it is now is meant.
        advantages: [T], 0 where masked out.
        weights: [T] or scalar, what a token's loss is multiplied by in the sum over tokens (step 12).
        trajectory_ids: [T] int64, 0 where masked out; None where trajectories do not matter.
        trajectory_lengths: [T] masked-in tokens of the token's trajectory, at least 1; None likewise.
        rollout_logprobs: [T] or None.
        reference_logprobs: [T], 0 where masked out, or None.
        kl_mean: scalar or None.
        size: T of the whole batch, above every trajectory id.
    """

    mask: Tensor | None
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor | float
    trajectory_ids: Tensor | None
    trajectory_lengths: Tensor | None
    rollout_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    kl_mean: Tensor | float | None
    size: int

    def __getitem__(self, tile: slice) -> TokenRows:
        """Some of the rows. What was counted over the batch stays as it is."""
        taken: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in taken.items():
            if isinstance(value, Tensor) and value.dim() == 1:
                taken[name] = value[tile]
        return TokenRows(**taken)


def token_rows(
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    trajectory_ids: Tensor,
    objective: Objective,
    *,
    size: int,
    dtype: torch.dtype,
    rollout_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    num_tokens: Tensor | float | None = None,
    num_sequences: Tensor | float | None = None,
    kl_mean: Tensor | float | None = None,
    chosen: Tensor | slice | None = None,
) -> TokenRows:
    """Check and clean the inputs of `policy_loss` that are no function of the weights, and count the denominators.

    Args:
        old_logprobs: [T], see `policy_loss`; so are the other tensors and numbers of its names.
        advantages: [T].
        mask: [T].
        trajectory_ids: [T] int64.
        objective: which loss.
        size: T.
        dtype: in which the loss is computed, float32 or float64.
        rollout_logprobs: [T].
        reference_logprobs: [T].
        num_tokens: global count.
        num_sequences: global count.
        kl_mean: of the call.
        chosen: rows to go on with, none of them masked out: [R] int64, or a slice; None: all, masked-out ones cleaned.
            Counts are those of all rows.

    Raises:
        InvalidArgumentError: shapes differ, or an input that the objective needs is missing.
    """
    check_shapes(
        size,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        trajectory_ids=trajectory_ids,
        rollout_logprobs=rollout_logprobs,
        reference_logprobs=reference_logprobs,
    )
    require("truncated_importance_sampling", objective, rollout_logprobs, "rollout_logprobs")
    require("kl_coef", objective, reference_logprobs, "reference_logprobs")
    m = mask.bool()

    def take(values: Tensor) -> Tensor:
        if chosen is None:
            return torch.where(m, values, values.new_zeros(()))
        return values[chosen] if isinstance(chosen, slice) else values.index_select(0, chosen)

    by_sequence = objective.importance_sampling_level != "token"
    mean_by_sequence = objective.loss_aggregation == "seq_mean_token_mean"
    count_sequences = num_sequences is None and objective.loss_aggregation.startswith("seq_mean")
    ids, lengths = None, None
    if by_sequence or mean_by_sequence or count_sequences:
        ids = torch.where(m, trajectory_ids, 0)
        counts = per_trajectory(m.to(dtype), ids, size)
        ids = take(trajectory_ids)
        lengths = counts.clamp(min=1.0)[ids]
        if count_sequences:
            num_sequences = (counts > 0).sum()

    # 12. aggregation: a weighted sum over tokens
    sequences: Tensor | float = 1 if num_sequences is None else _as(num_sequences, dtype)
    divisor: Tensor | float
    match objective.loss_aggregation:
        case "token_mean":
            divisor = at_least_one(_as(m.sum() if num_tokens is None else num_tokens, dtype))
        case "token_sum":
            divisor = 1.0
        case "seq_mean_token_mean":
            assert lengths is not None
            divisor = lengths * at_least_one(sequences)
        case "seq_mean_token_sum":
            divisor = at_least_one(sequences)
        case "seq_mean_token_sum_norm":
            assert objective.norm_length is not None  # checked at construction
            divisor = at_least_one(sequences) * objective.norm_length
    weights: Tensor | float = 1.0 / divisor
    if chosen is None:
        weights = m.to(dtype) * weights
    return TokenRows(
        mask=m if chosen is None else None,
        old_logprobs=take(old_logprobs).to(dtype),
        advantages=take(advantages).to(dtype),
        weights=weights,
        trajectory_ids=ids if by_sequence else None,
        trajectory_lengths=lengths if by_sequence else None,
        rollout_logprobs=(
            None
            if rollout_logprobs is None or objective.truncated_importance_sampling is None
            else take(rollout_logprobs).to(dtype)
        ),
        reference_logprobs=None if reference_logprobs is None else take(reference_logprobs).to(dtype),
        kl_mean=None if kl_mean is None else _as(kl_mean, dtype),
        size=size,
    )


def independent_of_other_rows(objective: Objective, *, kl_mean: Tensor | float | None) -> bool:
    """Whether a token's loss depends on no other token's new logprob."""
    counts_kl = objective.kl_coef > 0 and objective.kl_in == "advantage" and kl_mean is None
    return objective.importance_sampling_level == "token" and not counts_kl


def per_trajectory(values: Tensor, trajectory_ids: Tensor, size: int) -> Tensor:
    """Sum values by trajectory; [size] so that the number of trajectories need not come to the host."""
    return values.new_zeros(size).index_add(0, trajectory_ids, values)


def _as(number: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return number.to(dtype) if isinstance(number, Tensor) else number


def at_least_one(count: Tensor | float) -> Tensor | float:
    """A denominator that an empty batch cannot make 0."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def check_shapes(length: int, **tensors: Tensor | None) -> None:
    """Hold tensors to [length]; the first that differs is named."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (length,):
            raise InvalidArgumentError(
                f"{name} has shape {tuple(tensor.shape)}, logprobs ({length},); every input is [T]"
            )


def require(option: str, objective: Objective, given: Tensor | None, name: str) -> None:
    """Raise if an option is on and the tensor that it needs is missing."""
    value = getattr(objective, option)
    if value and given is None:  # every option is None or 0 when it is off
        raise InvalidArgumentError(f"{option}={value} needs {name}")
