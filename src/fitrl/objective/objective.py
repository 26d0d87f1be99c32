"""What an objective is: the settings of the built-in one, and the protocol of custom ones.

Enters: options. Leaves: an `Objective` that has been checked, or a class of your own called with `LossInputs`; both
give a `PolicyLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from fitrl.errors import InvalidArgumentError
from fitrl.objective.checks import check_types

ImportanceSamplingLevel: TypeAlias = Literal["token", "sequence", "average", "geometric_average"]
LossAggregation: TypeAlias = Literal[
    "token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
]
KLPlace: TypeAlias = Literal["loss", "advantage"]
KLEstimator: TypeAlias = Literal["k1", "k2", "k3"]


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
        check_types(self)
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
        for name in (
            "max_negative_advantage_importance_sampling_weight",
            "norm_length",
            "dual_clip",
            "ratio_cap",
        ):
            if getattr(self, name) == math.inf:
                raise InvalidArgumentError(f"{name}=inf bounds nothing; leave it at None")
        self._check_ppo_only()
        self._check_bounds_that_never_bind()
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

    def _check_bounds_that_never_bind(self) -> None:
        high = self.ratio_window[1]
        cap = self.max_negative_advantage_importance_sampling_weight
        if self.epsilon is not None and self.epsilon > 1 and (not self.ppo or self.epsilon_high is not None):
            raise InvalidArgumentError(
                f"epsilon={self.epsilon} has no effect: a ratio is above 0, so no window that starts below 0 clips it; "
                "use at most 1"
            )
        if self.kimi_k2_tau == 0.0:
            raise InvalidArgumentError("kimi_k2_tau=0 has no effect; leave it at None")
        if cap is not None and not self.ppo and cap >= high:
            raise InvalidArgumentError(
                f"max_negative_advantage_importance_sampling_weight={cap} has no effect with CISPO, which clips at "
                f"1 + epsilon_high = {high} already"
            )
        if self.mask_prob_ratio and self.ratio_cap is not None:
            raise InvalidArgumentError(
                f"ratio_cap={self.ratio_cap} has no effect with mask_prob_ratio, which leaves out what it would cap"
            )
        if self.dual_clip is not None:
            reached = high if self.mask_prob_ratio else self.ratio_cap
            if reached is not None and self.dual_clip >= reached:
                raise InvalidArgumentError(
                    f"dual_clip={self.dual_clip} has no effect: no ratio gets past {reached} with mask_prob_ratio="
                    f"{self.mask_prob_ratio}, ratio_cap={self.ratio_cap}"
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
        outputs: what the objective asked the model for; read it by the properties of the same names.
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
    outputs: Mapping[str, Tensor]

    @property
    def logprobs(self) -> Tensor:
        """[T] float32 with grad, for `inputs = "logprobs"`."""
        return self._asked_for("logprobs", "logprobs")

    @property
    def logits(self) -> Tensor:
        """[T, V] float32 with grad, divided by the temperature, for `inputs = "logits"`."""
        return self._asked_for("logits", "logits")

    @property
    def hidden(self) -> Tensor:
        """[T, H] with grad, last hidden states, for `inputs = "hidden"`."""
        return self._asked_for("hidden", "hidden")

    @property
    def weight(self) -> Tensor:
        """[V, H] of the output head, for `inputs = "hidden"`."""
        return self._asked_for("weight", "hidden")

    @property
    def bias(self) -> Tensor | None:
        """[V] of the output head, if it has one, for `inputs = "hidden"`."""
        self._asked_for("hidden", "hidden")
        return self.outputs.get("bias")

    def _asked_for(self, name: str, inputs: str) -> Tensor:
        if name not in self.outputs:
            raise InvalidArgumentError(f"this objective reads {name} without asking for them: set inputs = {inputs!r}")
        return self.outputs[name]


@runtime_checkable
class CustomObjective(Protocol):
    """A loss of your own: says what it needs from the model, and is called with `LossInputs`.

    Groups whose rewards are all equal have advantage 0 and are dropped before it is called. An objective that
    learns from them all the same (an entropy bonus, distillation) says so by an attribute
    `teaches_without_advantage = True`.
    """

    @property
    def inputs(self) -> Literal["logprobs", "logits", "hidden"]:
        """What it needs from the model; a class attribute will do, `inputs: Literal["logprobs"] = "logprobs"`."""

    def __call__(self, inputs: LossInputs, /) -> PolicyLoss:
        """Return the loss, divided by the global denominators in `inputs`."""


def teaches_without_advantage(objective: Objective | CustomObjective) -> bool:
    """Whether a group without advantages still has a gradient; a custom objective says so by an attribute."""
    return bool(getattr(objective, "teaches_without_advantage", False))


def _one_of(name: str, value: Any, allowed: Any) -> None:
    choices = allowed.__args__
    if value not in choices:
        raise InvalidArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
