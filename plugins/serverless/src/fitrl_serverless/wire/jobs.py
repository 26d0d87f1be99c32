"""Bodies of `/preview/training-jobs`: one job is one call of `fit_rl`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from fitrl.objective.objective import ImportanceSamplingLevel
from fitrl_serverless.wire.base import ClosedModel, WireModel
from fitrl_serverless.wire.groups import Group

# as far as they are known: another service may have words of its own for what is under way
ENDED = ("succeeded", "failed", "cancelled")
_Finite = Field(allow_inf_nan=False)


class ExperimentalConfig(ClosedModel):
    """The arguments of `fit_rl` that the API has; None and absent mean the default. An unknown one is an error."""

    advantage_balance: Annotated[float, Field(ge=-1, le=1)] | None = None
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    epsilon_high: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    importance_sampling_level: ImportanceSamplingLevel | None = None
    kimi_k2_tau: Annotated[float, _Finite] | None = None
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    mask_prob_ratio: bool | None = None
    max_negative_advantage_importance_sampling_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ppo: bool | None = None
    precalculate_logprobs: bool | None = None
    scale_rewards: bool | None = None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `fit_rl` that were given."""
        return self.model_dump(exclude_none=True)


class CreateTrainingJob(WireModel):
    """POST /preview/training-jobs."""

    model_id: Annotated[str, Field(min_length=1, max_length=128)]
    trajectory_groups: Annotated[list[Group], Field(min_length=1)]
    experimental_config: ExperimentalConfig | None = None


class CreatedTrainingJob(WireModel):
    """Its answer; a service may say more."""

    id: str


class TrainingJob(WireModel):
    """GET /preview/training-jobs/{id}.

    Attributes:
        id: of the job.
        status: fitrl's own service says queued, running, succeeded, failed or cancelled.
        model_id: of the model that it trains.
        step: the model's step after the job, once it succeeded.
        error_message: why it failed.
    """

    id: str
    status: str
    model_id: str | None = None
    step: int | None = None
    error_message: str | None = None


class Event(WireModel):
    """Something that happened in a job.

    Types and their data: `training_started` {num_sequences}, `gradient_step` {metrics, flat floats},
    `training_ended` {}, `training_failed` {error_message}. fitrl's own service also says `training_cancelled`, and puts
    {step, num_optimizer_steps, dropped} into `training_ended`.
    """

    id: str
    type: str
    data: dict[str, JsonValue] = {}


class EventPage(WireModel):
    """Some of a job's events; the next page is asked for with `after=last_id`."""

    object: Literal["list"] = "list"
    data: list[Event]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
