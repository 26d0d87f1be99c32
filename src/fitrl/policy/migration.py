"""Calls of the older style, `await model.register(trainer)` and `await model.train(groups, config=...)`.

Enters: what such code passes. Leaves: the same `fit_rl` call that new code makes, spelled out in a warning. What
`fit_rl` has no argument for is refused, not dropped. `MIGRATION.md` maps every argument.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fitrl.data.groups import TrajectoryGroup
from fitrl.errors import InvalidArgumentError, SessionError

_SAME = (
    *("advantage_balance", "allow_training_without_logprobs", "epsilon", "epsilon_high", "importance_sampling_level"),
    *("kimi_k2_tau", "logprob_calculation_chunk_size", "mask_prob_ratio", "plot_tensors", "ppo"),
    *("max_negative_advantage_importance_sampling_weight", "num_trajectories_learning_rate_multiplier_power"),
    *("precalculate_logprobs", "scale_learning_rate_by_reward_std_dev", "scale_rewards"),
    "truncated_importance_sampling",
)
_INSTEAD = {
    "normalize_by_length": "loss_aggregation of fit_rl, 'seq_mean_token_mean' or 'seq_mean_token_sum_norm'",
    "grad_accumulation_sequences": "max_tokens_per_microbatch of fit_rl; the gradient is the same for any value",
    "kl_penalty_source": "kl_in and precalculate_logprobs of fit_rl",
    "optimizer_save_interval": "save_checkpoint of fit_rl",
    "final_training_step": "a loop that ends",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The settings that older code passes as `config`.

    Attributes:
        learning_rate: of AdamW.
        beta: weight of the k3 KL to the base model, in the loss.
        kl_penalty_coef: weight of the KL to the reference, in the advantages.
        kl_penalty_source: refused, with what to use instead; so are the following.
        grad_accumulation_sequences: refused.
        optimizer_save_interval: refused.
        final_training_step: refused.
    """

    learning_rate: float = 5e-6
    beta: float = 0.0
    kl_penalty_coef: float = 0.0
    kl_penalty_source: str | None = None
    grad_accumulation_sequences: int | None = None
    optimizer_save_interval: int | None = None
    final_training_step: int | None = None


@runtime_checkable
class FitsAsynchronously(Protocol):
    """A trainer as older code registers it: any that has `fit_rl_async`."""

    fit_rl_async: Any


def translate(config: TrainConfig, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of `fit_rl` that do what an older `config` and `_config` asked for.

    Raises:
        InvalidArgumentError: an option that `fit_rl` has no argument for; the message names what to use instead.
    """
    refused = {name: getattr(config, name) for name in _INSTEAD if getattr(config, name, None) is not None}
    given = {name: value for name, value in (refused | dict(options or {})).items() if value is not None}
    arguments: dict[str, Any] = {"learning_rate": config.learning_rate}
    arguments |= {name: given.pop(name) for name in _SAME if name in given}
    if (tokens := given.pop("packed_sequence_length", None)) is not None:
        arguments["max_tokens_per_microbatch"] = tokens
    penalty = given.pop("kl_penalty_coef", config.kl_penalty_coef)
    adapter = given.pop("kl_ref_adapter_path", None)
    if config.beta and penalty:
        raise InvalidArgumentError(f"beta={config.beta} and kl_penalty_coef={penalty}: fit_rl has one KL, kl_coef")
    if config.beta:
        arguments |= {"kl_coef": config.beta, "kl_estimator": "k3", "reference": adapter or "base"}
    elif penalty:
        arguments |= {"kl_coef": penalty, "kl_in": "advantage", "reference": adapter or "base"}
    elif adapter is not None:
        raise InvalidArgumentError(f"kl_ref_adapter_path={adapter!r} has no effect without kl_penalty_coef")
    if given:
        name = sorted(given)[0]
        instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise InvalidArgumentError(f"{name}={given[name]!r} has no counterpart in fit_rl{instead}")
    return arguments


class OlderCalls(ABC):
    """`register` and `train` of `TrainableModel`: they warn, and call `fit_rl`."""

    _registered: FitsAsynchronously | None = None

    @abstractmethod
    def log(
        self,
        groups: Iterable[TrajectoryGroup] = (),
        *,
        split: str = "train",
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> dict[str, float]:
        """Of `TrainableModel`."""

    async def register(self, trainer: FitsAsynchronously) -> None:
        """Remember the trainer that `train` uses. Deprecated: trainers take the model in `fit_rl`.

        Raises:
            InvalidArgumentError: it has no `fit_rl_async`.
        """
        if not isinstance(trainer, FitsAsynchronously):
            raise InvalidArgumentError(f"register takes a trainer with fit_rl_async, got {type(trainer).__name__}")
        warnings.warn(
            f"model.register(trainer) is deprecated: drop it, and pass the model to {type(trainer).__name__}.fit_rl",
            DeprecationWarning,
            stacklevel=2,
        )
        self._registered = trainer

    async def train(
        self,
        groups: Iterable[TrajectoryGroup],
        config: TrainConfig = TrainConfig(),  # noqa: B008 - frozen
        _config: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ) -> Any:
        """Train on groups with the registered trainer, and log them. Deprecated: see `fit_rl` and `log`.

        Returns:
            The result of `fit_rl`.

        Raises:
            SessionError: nothing is registered.
            InvalidArgumentError: an option that `fit_rl` has no argument for.
            UnknownArgumentError: one that this backend's `fit_rl` does not take.
        """
        if self._registered is None:
            raise SessionError("no trainer is registered: call trainer.fit_rl(model, groups), or model.register first")
        arguments = translate(config, _config) | ({"verbose": True} if verbose else {})
        spelled = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        warnings.warn(
            f"model.train(groups, ...) is deprecated: write result = trainer.fit_rl(model, groups, {spelled}); "
            "model.log(groups, metrics=result.metrics, step=result.step)",
            DeprecationWarning,
            stacklevel=2,
        )
        groups = list(groups)
        result = await self._registered.fit_rl_async(self, groups, **arguments)
        self.log(groups, metrics=result.metrics, step=result.step)
        return result
