"""The objective's exact definition in torch, which faster versions are tested against.

Enters: logprobs of the new and the old policy, advantages, mask. Leaves: a scalar loss and raw metric sums. Comments
number the steps in their order of application. `policy_loss` = `token_rows`, all that is known before the new logprobs,
then `loss_terms`; the fused head calls the two itself, and the second one tile by tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fitrl.errors import InvalidArgumentError
from fitrl.objective.objective import Objective, PolicyLoss

_MAX_LOG_RATIO = 20.0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    trajectory_ids: Tensor,
    objective: Objective,
    *,
    rollout_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    num_tokens: Tensor | float | None = None,
    num_sequences: Tensor | float | None = None,
    kl_mean: Tensor | float | None = None,
) -> PolicyLoss:
    """Clipped importance-weighted policy loss over a flat batch of T tokens; the definition.

    Denominators: "token_mean" divides the sum by `num_tokens`, "token_sum" by 1, the "seq_mean_*" ones divide the
    sum of per-trajectory means or sums by `num_sequences` ("..._norm" also by `norm_length`). Counts default to
    those of this batch; give the global ones when the batch is a part of an optimizer step.

    Args:
        logprobs: [T] p, float32 (or float64) with grad.
        old_logprobs: [T] q; NaN means "as the policy now": ratio 1.
        advantages: [T].
        mask: [T] bool or 0/1; a token that is masked out adds exactly 0, whatever it holds.
        trajectory_ids: [T] int64, dense ids below T; all tokens of a trajectory are in this batch.
        objective: which loss.
        rollout_logprobs: [T] o, needed by truncated importance sampling; NaN weighs 1.
        reference_logprobs: [T], needed when `kl_coef > 0`.
        entropies: [T] with grad, needed when `entropy_coef` is not 0.
        num_tokens: masked-in tokens of the optimizer step.
        num_sequences: trajectories with a masked-in token in the optimizer step.
        kl_mean: mean of q - ref over the masked-in tokens of the call, for `kl_in="advantage"`.

    Raises:
        InvalidArgumentError: shapes differ, or an input that the objective needs is missing.
    """
    if logprobs.dim() != 1:
        raise InvalidArgumentError(f"logprobs must be [T], got shape {tuple(logprobs.shape)}")
    rows = token_rows(
        old_logprobs,
        advantages,
        mask,
        trajectory_ids,
        objective,
        rollout_logprobs=rollout_logprobs,
        reference_logprobs=reference_logprobs,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        kl_mean=kl_mean,
        size=len(logprobs),
        dtype=torch.float64 if logprobs.dtype == torch.float64 else torch.float32,
    )
    _check_shapes(len(logprobs), entropies=entropies)
    terms = loss_terms(logprobs, rows, objective, entropies)
    return PolicyLoss(loss=terms.loss, metrics=terms.metrics())


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
    _check_shapes(
        size,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        trajectory_ids=trajectory_ids,
        rollout_logprobs=rollout_logprobs,
        reference_logprobs=reference_logprobs,
    )
    _require("truncated_importance_sampling", objective, rollout_logprobs, "rollout_logprobs")
    _require("kl_coef", objective, reference_logprobs, "reference_logprobs")
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
        counts = _per_trajectory(m.to(dtype), ids, size)
        ids = take(trajectory_ids)
        lengths = counts.clamp(min=1.0)[ids]
        if count_sequences:
            num_sequences = (counts > 0).sum()

    # 12. aggregation: a weighted sum over tokens
    sequences: Tensor | float = 1 if num_sequences is None else _as(num_sequences, dtype)
    divisor: Tensor | float
    match objective.loss_aggregation:
        case "token_mean":
            divisor = _at_least_one(_as(m.sum() if num_tokens is None else num_tokens, dtype))
        case "token_sum":
            divisor = 1.0
        case "seq_mean_token_mean":
            assert lengths is not None
            divisor = lengths * _at_least_one(sequences)
        case "seq_mean_token_sum":
            divisor = _at_least_one(sequences)
        case "seq_mean_token_sum_norm":
            assert objective.norm_length is not None  # checked at construction
            divisor = _at_least_one(sequences) * objective.norm_length
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


@dataclass(slots=True, kw_only=True, eq=False)
class LossTerms:
    """The loss of some rows, and what its metrics are made of; they can wait until the gradient is on its way.

    Attributes:
        loss: scalar with grad.
        parts: aggregated losses by name.
        ratio: [T] without grad.
        mask: [T] bool or None.
        window: lowest and highest ratio that is not clipped.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    ratio: Tensor
    mask: Tensor | None
    window: tuple[float, float]

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Raw metrics, without grad; see `PolicyLoss`."""
        low, high = self.window
        m, ratio = self.mask, self.ratio
        below, above = ratio < low, ratio > high
        if m is not None:
            below, above, ratio = below & m, above & m, torch.where(m, ratio, 0.0)
        return {
            **{name: value.detach() for name, value in self.parts.items()},
            "loss_train": self.loss.detach(),
            "token_count": torch.full_like(self.loss, len(ratio), dtype=torch.int64) if m is None else m.sum(),
            "ratio_sum": ratio.sum(),
            "ratio_square_sum": ratio.square().sum(),
            "ratio_max": ratio.max() if ratio.numel() else ratio.sum(),
            "clip_low_count": below.sum(),
            "clip_high_count": above.sum(),
        }


def loss_terms(logprobs: Tensor, rows: TokenRows, objective: Objective, entropies: Tensor | None = None) -> LossTerms:
    """The definition, over rows that are cleaned and weighted: steps 3 to 12.

    Args:
        logprobs: [T] p with grad.
        rows: the rest of the same rows.
        objective: which loss.
        entropies: [T] with grad, needed when `entropy_coef` is not 0.

    Raises:
        InvalidArgumentError: entropies are needed and missing.
    """
    _require("entropy_coef", objective, entropies, "entropies")
    a, q, reference = rows.advantages, rows.old_logprobs, rows.reference_logprobs
    dtype = q.dtype

    def kept(values: Tensor) -> Tensor:
        return values if rows.mask is None else torch.where(rows.mask, values, 0.0)

    p = kept(logprobs.to(dtype))
    q = torch.where(q.isnan(), p.detach(), q)
    d = (p - q).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)

    # 3. ratio
    rho = d.exp()
    if rows.trajectory_ids is None or rows.trajectory_lengths is None:
        ratio = rho
    else:
        sums = _per_trajectory(d, rows.trajectory_ids, rows.size)[rows.trajectory_ids]
        s = (sums / rows.trajectory_lengths).exp()
        if objective.importance_sampling_level == "sequence":
            ratio = s
        elif objective.importance_sampling_level == "average":
            ratio = (rho + s) / 2
        else:
            ratio = (rho * s).sqrt()

    # 4. cap where the advantage is negative
    if (cap := objective.max_negative_advantage_importance_sampling_weight) is not None:
        ratio = torch.where(a < 0, ratio.clamp(max=cap), ratio)

    # 5. and 6. window
    low, high = objective.ratio_window
    clipped = ratio.clamp(low, high)

    # 7. and 8. terms in the advantage
    if objective.kimi_k2_tau:
        a = a - objective.kimi_k2_tau * d.detach()
    if objective.kl_coef > 0 and objective.kl_in == "advantage" and reference is not None:
        k1 = kept(q - reference)
        count = len(k1) if rows.mask is None else rows.mask.sum()
        mean = k1.sum() / _at_least_one(count) if rows.kl_mean is None else rows.kl_mean
        a = a + objective.kl_coef * (mean - k1)

    # 9. token policy loss
    if objective.ppo:
        unclipped = ratio if objective.ratio_cap is None else ratio.clamp(max=objective.ratio_cap)
        policy = -torch.minimum(unclipped * a, clipped * a)
        if objective.dual_clip is not None:
            policy = torch.where(a < 0, torch.minimum(policy, -objective.dual_clip * a), policy)
    else:
        policy = -(clipped.detach() * a) * p
    if objective.mask_prob_ratio:
        policy = torch.where((ratio > low) & (ratio < high), policy, 0.0)

    # 10. trainer against sampler
    if objective.truncated_importance_sampling is not None and rows.rollout_logprobs is not None:
        o = rows.rollout_logprobs
        known = o.isfinite()
        gap = torch.where(known, q - o, 0.0).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        weight = gap.exp().clamp(max=objective.truncated_importance_sampling)
        policy = policy * torch.where(known, weight, 1.0).detach()

    # 11. token loss, and 12. its weighted sum
    def aggregated(values: Tensor) -> Tensor:
        return (kept(values) * rows.weights).sum()

    parts = {"loss_policy": aggregated(policy)}
    loss = parts["loss_policy"]
    if objective.kl_coef > 0 and objective.kl_in == "loss" and reference is not None:
        if objective.kl_estimator == "k3":
            gap = (reference - p).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
            kl = gap.exp() - gap - 1.0
        else:
            kl = (p - reference).square() / 2
        parts["loss_kl"] = aggregated(kl)
        loss = loss + objective.kl_coef * parts["loss_kl"]
    elif reference is not None:
        parts["loss_kl"] = aggregated(q - reference)
    if entropies is not None:
        parts["loss_entropy"] = aggregated(kept(entropies.to(dtype)))
        if objective.entropy_coef:
            loss = loss - objective.entropy_coef * parts["loss_entropy"]
    return LossTerms(loss=loss, parts=parts, ratio=ratio.detach(), mask=rows.mask, window=(low, high))


def added(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raw metrics of two tiles as those of both: maxima where the key ends in `_max`, sums elsewhere."""
    return {
        name: torch.maximum(left[name], right[name]) if name.endswith("_max") else left[name] + right[name]
        for name in left
    }


def _per_trajectory(values: Tensor, trajectory_ids: Tensor, size: int) -> Tensor:
    """Sum values by trajectory; [size] so that the number of trajectories need not come to the host."""
    return values.new_zeros(size).index_add(0, trajectory_ids, values)


def _as(number: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return number.to(dtype) if isinstance(number, Tensor) else number


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _check_shapes(length: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (length,):
            raise InvalidArgumentError(
                f"{name} has shape {tuple(tensor.shape)}, logprobs ({length},); every input is [T]"
            )


def _require(option: str, objective: Objective, given: Tensor | None, name: str) -> None:
    value = getattr(objective, option)
    if value and given is None:  # every option is None or 0 when it is off
        raise InvalidArgumentError(f"{option}={value} needs {name}")
