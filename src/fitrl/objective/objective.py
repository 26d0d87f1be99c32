"""The objective: what it is (`Objective`) and its exact torch definition (`policy_loss`).

Enters: logprobs of the new and the old policy, advantages, mask. Leaves: a scalar loss and raw metric sums.
This file is the definition that faster versions are tested against; the step numbers are OBJECTIVE.md's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from fitrl.errors import InvalidArgumentError

ImportanceSamplingLevel: TypeAlias = Literal["token", "sequence", "average", "geometric_average"]
LossAggregation: TypeAlias = Literal[
    "token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
]
KLPlace: TypeAlias = Literal["loss", "advantage"]
KLEstimator: TypeAlias = Literal["k1", "k2", "k3"]

_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A clipped importance-weighted policy objective; checked at construction.

    Attributes:
        ppo: PPO's pessimistic clip (Schulman et al. 2017) instead of CISPO (MiniMax-M1, 2025).
        epsilon: the ratio window starts at 1 - epsilon. None: 0.2 for PPO, 1.0 for CISPO.
        epsilon_high: the window ends at 1 + epsilon_high. None: epsilon for PPO, 4.0 for CISPO.
        importance_sampling_level: ratio per token, per sequence (GSPO, Zheng et al. 2025), or their
            arithmetic or geometric average.
        max_negative_advantage_importance_sampling_weight: cap of the ratio where the advantage is negative.
        mask_prob_ratio: tokens whose ratio is outside the open window teach nothing.
        kimi_k2_tau: subtracts tau times the log ratio from the advantage (Kimi K2, 2025).
        truncated_importance_sampling: cap U of the trainer-versus-sampler weight exp(q - o) (Yao et al. 2025).
        dual_clip: PPO only, c > 1: bounds the loss by c |A| where A < 0 (Ye et al. 2020).
        ratio_cap: PPO only, delta > 1 + epsilon_high: caps the ratio of the unclipped branch.
        kl_coef: weight beta of the KL to the reference policy.
        kl_estimator: None: k2 in the loss, k1 in the advantage (Schulman, "Approximating KL divergence").
        kl_in: where the KL enters.
        entropy_coef: weight of the entropy bonus.
        loss_aggregation: how token losses become one number; see `policy_loss`.
        norm_length: the constant length of "seq_mean_token_sum_norm" (Dr. GRPO, Liu et al. 2025).

    Raises:
        InvalidArgumentError: a value is out of range, or an option could have no effect.
    """

    ppo: bool = False
    epsilon: float | None = None
    epsilon_high: float | None = None
    importance_sampling_level: ImportanceSamplingLevel = "token"
    max_negative_advantage_importance_sampling_weight: float | None = None
    mask_prob_ratio: bool = False
    kimi_k2_tau: float | None = None
    truncated_importance_sampling: float | None = None
    dual_clip: float | None = None
    ratio_cap: float | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator | None = None
    kl_in: KLPlace = "loss"
    entropy_coef: float = 0.0
    loss_aggregation: LossAggregation = "token_mean"
    norm_length: float | None = None

    def __post_init__(self) -> None:
        _one_of("importance_sampling_level", self.importance_sampling_level, ImportanceSamplingLevel)
        _one_of("loss_aggregation", self.loss_aggregation, LossAggregation)
        _one_of("kl_in", self.kl_in, KLPlace)
        if self.kl_estimator is not None:
            _one_of("kl_estimator", self.kl_estimator, KLEstimator)
        for name, lowest in (
            ("epsilon", 0.0),
            ("epsilon_high", 0.0),
            ("kl_coef", 0.0),
            ("entropy_coef", -math.inf),
            ("kimi_k2_tau", -math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= lowest):
                raise InvalidArgumentError(f"{name} must be a finite number of at least {lowest}, got {value}")
        for name in (
            "max_negative_advantage_importance_sampling_weight",
            "truncated_importance_sampling",
            "norm_length",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"{name} must be greater than 0, got {value}")
        self._check_ppo_only()
        self._check_kl()
        if self.norm_length is not None and self.loss_aggregation != "seq_mean_token_sum_norm":
            raise InvalidArgumentError(
                f"norm_length={self.norm_length} has no effect with loss_aggregation={self.loss_aggregation!r}; "
                "use 'seq_mean_token_sum_norm'"
            )
        if self.norm_length is None and self.loss_aggregation == "seq_mean_token_sum_norm":
            raise InvalidArgumentError(
                "loss_aggregation='seq_mean_token_sum_norm' needs norm_length, e.g. max_new_tokens"
            )

    def _check_ppo_only(self) -> None:
        for name in ("dual_clip", "ratio_cap"):
            if getattr(self, name) is not None and not self.ppo:
                raise InvalidArgumentError(f"{name}={getattr(self, name)} has no effect with CISPO; pass ppo=True")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise InvalidArgumentError(f"dual_clip must be greater than 1, got {self.dual_clip}")
        if self.ratio_cap is not None and not self.ratio_cap > self.ratio_window[1]:
            raise InvalidArgumentError(
                f"ratio_cap must be greater than 1 + epsilon_high = {self.ratio_window[1]}, got {self.ratio_cap}"
            )

    def _check_kl(self) -> None:
        if self.kl_coef == 0.0:
            if self.kl_estimator is not None or self.kl_in != "loss":
                raise InvalidArgumentError(
                    f"kl_estimator={self.kl_estimator!r}, kl_in={self.kl_in!r} have no effect with kl_coef=0"
                )
        elif self.kl_in == "loss" and self.kl_estimator == "k1":
            raise InvalidArgumentError("k1 in the loss has no expected gradient; use kl_estimator 'k2' or 'k3'")
        elif self.kl_in == "advantage" and self.kl_estimator in ("k2", "k3"):
            raise InvalidArgumentError(
                f"{self.kl_estimator} in the advantage points the wrong way; use kl_estimator 'k1' or kl_in='loss'"
            )

    @property
    def ratio_window(self) -> tuple[float, float]:
        """Lowest and highest ratio that is not clipped (step 5)."""
        if self.ppo:
            epsilon = 0.2 if self.epsilon is None else self.epsilon
            high = epsilon if self.epsilon_high is None else self.epsilon_high
        else:
            epsilon = 1.0 if self.epsilon is None else self.epsilon
            high = 4.0 if self.epsilon_high is None else self.epsilon_high
        return 1.0 - epsilon, 1.0 + high

    @property
    def teaches_without_advantage(self) -> bool:
        """Whether a token with advantage 0 can have a gradient (step 1)."""
        return self.kl_coef > 0 or self.entropy_coef != 0 or bool(self.kimi_k2_tau)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """What an objective returns.

    Attributes:
        loss: scalar with grad, aggregated over the global denominators.
        metrics: raw scalars without grad: a key that ends in `_max` is reduced by maximum, any other by sum,
            over microbatches and ranks; ratios are derived after that.
        logprobs: [T] float32 without grad, when the loss computed them itself.
        entropies: [T] float32 without grad, when asked for.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    logprobs: Tensor | None = None
    entropies: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Everything that a custom objective may use; T rows, each a token that the policy predicted.

    Attributes:
        targets: [T] int64, the predicted token.
        old_logprobs: [T] float32, q; NaN where unknown.
        advantages: [T] float32.
        mask: [T] bool.
        trajectory_ids: [T] int64, dense within the microbatch.
        temperature: [T] float32, the sampling temperature; already applied to `logprobs` and `logits`.
        num_tokens: scalar, masked-in tokens of the whole optimizer step (all ranks and microbatches).
        num_sequences: scalar, trajectories of the whole optimizer step.
        rollout_logprobs: [T] float32, o; NaN where unknown.
        reference_logprobs: [T] float32, when `reference` is set.
        logprobs: [T] float32 with grad, for `inputs = "logprobs"`.
        logits: [T, V] float32 with grad, divided by the temperature, for `inputs = "logits"`.
        hidden: [T, H] with grad, last hidden states, for `inputs = "hidden"`.
        weight: [V, H] of the output head, for `inputs = "hidden"`.
        bias: [V] or None, of the output head, for `inputs = "hidden"`.
    """

    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    trajectory_ids: Tensor
    temperature: Tensor
    num_tokens: Tensor
    num_sequences: Tensor
    rollout_logprobs: Tensor
    reference_logprobs: Tensor | None = None
    logprobs: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


@runtime_checkable
class CustomObjective(Protocol):
    """A loss of your own: says what it needs from the model, and is called with `LossInputs`."""

    inputs: Literal["logprobs", "logits", "hidden"]

    def __call__(self, inputs: LossInputs, /) -> PolicyLoss:
        """Return the loss, divided by the global denominators in `inputs`."""


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
    n_tokens = m.sum() if num_tokens is None else num_tokens
    n_sequences = sequences if num_sequences is None else num_sequences
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
        mean = k1.sum() / m.sum().clamp(min=1) if kl_mean is None else kl_mean
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
        gap = torch.where(m & o.isfinite(), q - o, 0.0).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        policy = policy * gap.exp().clamp(max=objective.truncated_importance_sampling).detach()

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


def _one_of(name: str, value: Any, allowed: Any) -> None:
    choices = allowed.__args__
    if value not in choices:
        raise InvalidArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
