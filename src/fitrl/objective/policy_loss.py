"""The objective's exact definition in torch, which faster versions are tested against.

Enters: logprobs of the new and the old policy, advantages, mask. Leaves: a scalar loss and raw metric sums. Comments
number the steps in their order of application. `policy_loss` = `token_rows`, all that is known before the new logprobs,
then `loss_terms`; the fused head calls the two itself, and the second one tile by tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fitrl.errors import InvalidArgumentError
from fitrl.objective.objective import Objective, PolicyLoss
from fitrl.objective.token_rows import TokenRows, at_least_one, check_shapes, per_trajectory, require, token_rows

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
    check_shapes(len(logprobs), entropies=entropies)
    terms = loss_terms(logprobs, rows, objective, entropies)
    return PolicyLoss(loss=terms.loss, metrics=terms.metrics())


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
    require("entropy_coef", objective, entropies, "entropies")
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
        sums = per_trajectory(d, rows.trajectory_ids, rows.size)[rows.trajectory_ids]
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
        mean = k1.sum() / at_least_one(count) if rows.kl_mean is None else rows.kl_mean
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
