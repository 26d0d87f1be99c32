"""The protocols: small verbs that any trainer can satisfy without importing a base class.

`SupportsFitRL` is the high level. `PolicyTrainer` is the low level and has three capabilities: `Trains`, `Scores`
and `ExportsWeights`; a class implements those it can. `AsyncPolicyTrainer` has the same verbs to be awaited, for
trainers that run somewhere else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

from fitrl.data.batch import Batch
from fitrl.data.groups import TrajectoryGroup
from fitrl.objective.objective import CustomObjective, ImportanceSamplingLevel, Objective
from fitrl.policy.model import TrainableModel
from fitrl.protocols.results import (
    ForwardBackwardResult,
    OptimStepResult,
    TokenLogprobs,
    TrainerConfig,
    TrainerStatus,
    TrainResult,
)


@runtime_checkable
class SupportsFitRL(Protocol):
    """Learns from groups; the arguments that every backend takes."""

    def fit_rl(
        self,
        model: TrainableModel,
        groups: Iterable[TrajectoryGroup],
        *,
        learning_rate: float = ...,
        ppo: bool = ...,
        epsilon: float | None = ...,
        epsilon_high: float | None = ...,
        advantage_balance: float = ...,
        scale_rewards: bool = ...,
        importance_sampling_level: ImportanceSamplingLevel = ...,
    ) -> TrainResult:
        """Teach the model and return what happened."""


@runtime_checkable
class Trains(Protocol):
    """Accumulates gradients and steps."""

    def forward_backward(
        self, batch: Batch, objective: Objective | CustomObjective | None = None
    ) -> ForwardBackwardResult:
        """Add the microbatch's gradient; never steps, never clears. None: the objective in force."""

    def optim_step(self, *, learning_rate: float | None = None) -> OptimStepResult:
        """Clip, step, advance the schedule, clear. An explicit learning rate is final, schedule or not.

        Raises:
            NothingAccumulatedError: no `forward_backward` since the last step.
        """

    def clear_gradients(self) -> None:
        """Forget what was accumulated."""

    def save(self, name: str | None = None, path: str | None = None, weights_only: bool = False) -> str:
        """Save, exactly resumable unless `weights_only`; returns where."""

    def load(self, path: str | None = None) -> str:
        """Load a save, None: the newest; a weights-only one starts a fresh optimizer at the saved step."""

    def get_config(self) -> TrainerConfig:
        """What does not change."""

    def get_status(self) -> TrainerStatus:
        """What does."""


@runtime_checkable
class Scores(Protocol):
    """Computes logprobs."""

    def forward(self, batch: Batch) -> TokenLogprobs:
        """Logprobs of the batch's targets, without a gradient."""


@runtime_checkable
class ExportsWeights(Protocol):
    """Hands the weights out."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under the names of a saved checkpoint; a collective: every rank drains it."""


@runtime_checkable
class PolicyTrainer(Trains, Scores, ExportsWeights, Protocol):
    """All three capabilities."""


@runtime_checkable
class AsyncPolicyTrainer(Protocol):
    """`PolicyTrainer` with verbs to be awaited: those of a trainer in other processes, say; see its methods."""

    async def forward_backward(
        self, batch: Batch, objective: Objective | CustomObjective | None = None
    ) -> ForwardBackwardResult:
        """Add the microbatch's gradient."""

    async def optim_step(self, *, learning_rate: float | None = None) -> OptimStepResult:
        """Clip, step, advance the schedule, clear."""

    async def clear_gradients(self) -> None:
        """Forget what was accumulated."""

    async def save(self, name: str | None = None, path: str | None = None, weights_only: bool = False) -> str:
        """Save; returns where."""

    async def load(self, path: str | None = None) -> str:
        """Load a save, None: the newest."""

    async def get_config(self) -> TrainerConfig:
        """What does not change."""

    async def get_status(self) -> TrainerStatus:
        """What does."""

    async def forward(self, batch: Batch) -> TokenLogprobs:
        """Logprobs of the batch's targets, without a gradient."""

    def named_weights(self) -> AsyncIterator[tuple[str, Tensor]]:
        """Full tensors under the names of a saved checkpoint; no step may be taken before it ends."""
