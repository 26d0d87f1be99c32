"""The arguments of one `fit_rl` call, checked together: what contradicts or could have no effect raises."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fitrl.errors import InvalidArgumentError, UnknownArgumentError
from fitrl.objective.checks import check_types
from fitrl.objective.objective import CustomObjective, Objective, teaches_without_advantage
from fitrl.policy.model import TrainableModel

Reference: TypeAlias = Literal["base"] | int | str | Path
DEFAULT_CHUNK_SIZE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSettings:
    """What one call does, beside the objective's own options; built by `fit_rl` from its keyword arguments."""

    learning_rate: float
    objective: Objective | CustomObjective
    advantage_balance: float
    scale_rewards: bool
    precalculate_logprobs: bool
    allow_training_without_logprobs: bool
    plot_tensors: bool
    scale_learning_rate_by_reward_std_dev: bool
    logprob_calculation_chunk_size: int
    save_checkpoint: bool
    verbose: bool
    num_minibatches: int
    num_epochs: int
    seed: int
    reference: Reference | None
    max_tokens_per_microbatch: int | None
    num_trajectories_learning_rate_multiplier_power: float

    def __post_init__(self) -> None:
        check_types(self)
        if isinstance(self.reference, bool) or not isinstance(self.reference, int | str | Path | None):
            raise InvalidArgumentError(f"reference must be 'base', a step or a folder, got {self.reference!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise InvalidArgumentError(f"learning_rate must be a finite number of at least 0, got {self.learning_rate}")
        if not -1.0 <= self.advantage_balance <= 1.0:
            raise InvalidArgumentError(f"advantage_balance must be in [-1, 1], got {self.advantage_balance}")
        for name in (
            "num_minibatches",
            "num_epochs",
            "logprob_calculation_chunk_size",
            "max_tokens_per_microbatch",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {value}")
        if not math.isfinite(self.num_trajectories_learning_rate_multiplier_power):
            raise InvalidArgumentError(
                "num_trajectories_learning_rate_multiplier_power must be finite, got "
                f"{self.num_trajectories_learning_rate_multiplier_power}"
            )
        self._check_objective()
        if (
            self.logprob_calculation_chunk_size != DEFAULT_CHUNK_SIZE
            and not self.precalculate_logprobs
            and self.reference is None
        ):
            raise InvalidArgumentError(
                f"logprob_calculation_chunk_size={self.logprob_calculation_chunk_size} has no effect without a pass "
                "that needs no gradient: it goes with precalculate_logprobs=True or reference"
            )

    def _check_objective(self) -> None:
        objective = self.objective
        if not isinstance(objective, Objective):
            return
        if objective.truncated_importance_sampling is not None and not self.precalculate_logprobs:
            raise InvalidArgumentError(
                "truncated_importance_sampling corrects the trainer's old logprobs against the sampler's, so it needs "
                "precalculate_logprobs=True"
            )
        if objective.kl_coef > 0 and self.reference is None:
            raise InvalidArgumentError(
                f"kl_coef={objective.kl_coef} needs reference: 'base', a step, or a checkpoint folder"
            )
        if objective.kl_coef == 0 and self.reference is not None:
            raise InvalidArgumentError(f"reference={self.reference!r} has no effect with kl_coef=0")
        if objective.kl_in == "advantage" and self.allow_training_without_logprobs and not self.precalculate_logprobs:
            raise InvalidArgumentError(
                "kl_in='advantage' compares the old policy with the reference; without rollout logprobs that needs "
                "precalculate_logprobs=True"
            )

    @property
    def teaches_without_advantage(self) -> bool:
        """Whether a group without advantages still has a gradient."""
        return teaches_without_advantage(self.objective)

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether trajectories of advantage 0 may be left out of the microbatches."""
        return isinstance(self.objective, Objective) and not self.objective.teaches_without_advantage


def choose_objective(custom: CustomObjective | None, built: Objective) -> Objective | CustomObjective:
    """The custom objective, if there is one and no option of the built-in one is set beside it.

    Raises:
        InvalidArgumentError: both are.
    """
    if custom is None:
        return built
    if isinstance(custom, Objective) or not isinstance(custom, CustomObjective):
        raise InvalidArgumentError(
            f"objective must be a custom objective, with `inputs` and `__call__`, got {type(custom).__name__}; the "
            "built-in one is set by fit_rl's own arguments"
        )
    default = Objective()
    beside = [
        f"{field.name}={getattr(built, field.name)!r}"
        for field in dataclasses.fields(Objective)
        if getattr(built, field.name) != getattr(default, field.name)
    ]
    if beside:
        raise InvalidArgumentError(f"a custom objective takes no other loss option; remove {', '.join(beside)}")
    return custom


def naming_the_backend(fit_rl: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a call with arguments that `fit_rl` does not take, or no model or groups, into an error that says so."""
    signature = inspect.signature(fit_rl)
    keywords = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]

    @functools.wraps(fit_rl)
    def checked(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        unknown = [name for name in kwargs if name not in signature.parameters]
        if unknown:
            raise UnknownArgumentError(
                f"{type(self).__name__}.fit_rl() takes no {', '.join(map(repr, unknown))}; beside model and groups the "
                f"backend {self.backend!r} takes: {', '.join(keywords)}"
            )
        given = signature.bind(self, *args, **kwargs).arguments
        if not isinstance(given["model"], TrainableModel):
            raise InvalidArgumentError(f"model must be a TrainableModel, got {given['model']!r:.80}")
        if not isinstance(given["groups"], Iterable):
            raise InvalidArgumentError(f"groups must be TrajectoryGroups, got {given['groups']!r:.80}")
        return fit_rl(self, *args, **kwargs)

    return checked
