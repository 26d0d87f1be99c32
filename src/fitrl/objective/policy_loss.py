"""The objective's exact definition in torch, which faster versions are tested against.

Enters: logprobs of the new and the old policy, advantages, mask. Leaves: a scalar loss and raw metric sums. Comments
number the steps in their order of application.
"""

from __future__ import annotations

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
    _check_shapes(
        logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        trajectory_ids=trajectory_ids,
        rollout_logprobs=rollout_logprobs,
        reference_logprobs=reference_logprobs,
        entropies=entropies,
    )
    _require(objective, rollout_logprobs, reference_logprobs, entropies)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    m = mask.bool()

    def masked(values: Tensor) -> Tensor:
        return torch.where(m, values.to(dtype), 0.0)

    p = masked(logprobs)
    q = masked(old_logprobs)
    q = torch.where(q.isnan(), p.detach(), q)
    a = masked(advantages)
    d = (p - q).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)

    counts = _per_trajectory(m.to(dtype), trajectory_ids)
    sequences = (counts > 0).sum()
    n_tokens = _as(m.sum() if num_tokens is None else num_tokens, dtype)
    n_sequences = _as(sequences if num_sequences is None else num_sequences, dtype)
    counts = counts.clamp(min=1.0)

    # 3. ratio
    rho = d.exp()
    if objective.importance_sampling_level == "token":
        ratio = rho
    else:
        s = (_per_trajectory(d, trajectory_ids) / counts).exp()[trajectory_ids]
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
    keep = m & (ratio > low) & (ratio < high) if objective.mask_prob_ratio else m

    # 7. and 8. terms in the advantage
    if objective.kimi_k2_tau:
        a = a - objective.kimi_k2_tau * d.detach()
    reference = masked(reference_logprobs) if reference_logprobs is not None else None
    if objective.kl_coef > 0 and objective.kl_in == "advantage" and reference is not None:
        k1 = torch.where(m, q - reference, 0.0)
        mean = k1.sum() / m.sum().clamp(min=1) if kl_mean is None else _as(kl_mean, dtype)
        a = a + objective.kl_coef * (mean - k1)

    # 9. token policy loss
    if objective.ppo:
        unclipped = ratio if objective.ratio_cap is None else ratio.clamp(max=objective.ratio_cap)
        policy = -torch.minimum(unclipped * a, clipped * a)
        if objective.dual_clip is not None:
            policy = torch.where(a < 0, torch.minimum(policy, -objective.dual_clip * a), policy)
    else:
        policy = -clipped.detach() * a * p
    policy = torch.where(keep, policy, 0.0)

    # 10. trainer against sampler
    if objective.truncated_importance_sampling is not None and rollout_logprobs is not None:
        o = rollout_logprobs.to(dtype)
        known = m & o.isfinite()
        gap = torch.where(known, q - o, 0.0).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        weight = gap.exp().clamp(max=objective.truncated_importance_sampling)
        policy = policy * torch.where(known, weight, 1.0).detach()

    # 11. token loss
    def aggregated(values: Tensor) -> Tensor:
        return _aggregate(
            torch.where(m, values, 0.0),
            objective,
            trajectory_ids,
            counts,
            num_tokens=n_tokens,
            num_sequences=n_sequences,
        )

    metrics = {"loss_policy": aggregated(policy)}
    loss = metrics["loss_policy"]
    if objective.kl_coef > 0 and objective.kl_in == "loss" and reference is not None:
        if objective.kl_estimator == "k3":
            gap = (reference - p).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
            kl = gap.exp() - gap - 1.0
        else:
            kl = (p - reference).square() / 2
        metrics["loss_kl"] = aggregated(kl)
        loss = loss + objective.kl_coef * metrics["loss_kl"]
    elif reference is not None:
        metrics["loss_kl"] = aggregated(q - reference)
    if entropies is not None:
        metrics["loss_entropy"] = aggregated(masked(entropies))
        if objective.entropy_coef:
            loss = loss - objective.entropy_coef * metrics["loss_entropy"]

    observed = torch.where(m, ratio.detach(), 0.0)
    metrics |= {
        "loss_train": loss,
        "token_count": m.sum(),
        "ratio_sum": observed.sum(),
        "ratio_square_sum": observed.square().sum(),
        "ratio_max": observed.max() if observed.numel() else observed.sum(),
        "clip_low_count": (m & (ratio < low)).sum(),
        "clip_high_count": (m & (ratio > high)).sum(),
    }
    return PolicyLoss(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})


def _aggregate(
    values: Tensor,
    objective: Objective,
    trajectory_ids: Tensor,
    counts: Tensor,
    *,
    num_tokens: Tensor | float,
    num_sequences: Tensor | float,
) -> Tensor:
    """Step 12: one number from [T] token values that are 0 where masked out."""
    match objective.loss_aggregation:
        case "token_mean":
            return values.sum() / _at_least_one(num_tokens)
        case "token_sum":
            return values.sum()
        case "seq_mean_token_mean":
            return (values / counts[trajectory_ids]).sum() / _at_least_one(num_sequences)
        case "seq_mean_token_sum":
            return values.sum() / _at_least_one(num_sequences)
        case "seq_mean_token_sum_norm":
            assert objective.norm_length is not None  # checked at construction
            return values.sum() / (_at_least_one(num_sequences) * objective.norm_length)


def _per_trajectory(values: Tensor, trajectory_ids: Tensor) -> Tensor:
    """Sum [T] values by trajectory; [T] so that the number of trajectories need not come to the host."""
    return torch.zeros_like(values).index_add(0, trajectory_ids, values)


def _as(number: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return number.to(dtype) if isinstance(number, Tensor) else number


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _check_shapes(logprobs: Tensor, **others: Tensor | None) -> None:
    if logprobs.dim() != 1:
        raise InvalidArgumentError(f"logprobs must be [T], got shape {tuple(logprobs.shape)}")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise InvalidArgumentError(
                f"{name} has shape {tuple(tensor.shape)}, logprobs {tuple(logprobs.shape)}; every input is [T]"
            )


def _require(objective: Objective, rollout: Tensor | None, reference: Tensor | None, entropies: Tensor | None) -> None:
    for option, needed, given in (
        ("truncated_importance_sampling", objective.truncated_importance_sampling is not None, rollout),
        ("kl_coef", objective.kl_coef > 0, reference),
        ("entropy_coef", objective.entropy_coef != 0, entropies),
    ):
        if needed and given is None:
            name = {
                "truncated_importance_sampling": "rollout_logprobs",
                "kl_coef": "reference_logprobs",
                "entropy_coef": "entropies",
            }[option]
            raise InvalidArgumentError(f"{option}={getattr(objective, option)} needs {name}")
