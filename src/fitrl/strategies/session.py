"""`SessionStrategy`: what a trainer with `fit_rl` needs of its strategy, wherever the policy lives.

The weights may be in this process (`PolicyVerbs`) or on a service (`RemoteStrategy`); the trainer opens, resumes,
trains and saves both in the same way.
"""

from __future__ import annotations

from abc import abstractmethod

from fitrl import _compat
from fitrl.data.batch import Batch
from fitrl.errors import SessionError
from fitrl.objective.objective import CustomObjective, Objective
from fitrl.policy.module import PolicyModule
from fitrl.protocols.results import ForwardBackwardResult, OptimStepResult, TrainerConfig, TrainerStatus
from fitrl.strategies.schedules import set_base_rate
from fitrl.strategies.sticky import Sticky


class SessionStrategy(Sticky):
    """`Trains`, and how a session of it is taken up again."""

    saved_step: int | None = None

    @property
    def policy_module(self) -> PolicyModule:
        """The module that is set up.

        Raises:
            SessionError: none is.
        """
        module = self.lightning_module
        if not isinstance(module, PolicyModule) or not self.is_live:
            raise SessionError("no model is open: call trainer.open(model) or trainer.fit_rl(model, groups) first")
        return module

    @property
    def has_unsaved_steps(self) -> bool:
        """Whether steps were taken since the state was last saved under its step, or loaded."""
        return self.saved_step != self.policy_module.trainer.global_step

    @abstractmethod
    def resume(self) -> str | None:
        """Load the run's newest saved state, if there is one; returns where it was."""

    def lend_weights(self) -> None:
        """Make what a sampler in this process reads whole until the next step; a collective."""

    def take_weights_back(self) -> None:
        """Make the weights ready for training again; a collective, and nothing if they are."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate that the schedule multiplies; Lightning's scheduler would overwrite a plain `lr`."""
        set_base_rate(self, learning_rate)

    # -- Trains -------------------------------------------------------------------------------------------------

    @abstractmethod
    def forward_backward(
        self, batch: Batch, objective: Objective | CustomObjective | None = None
    ) -> ForwardBackwardResult:
        """Add the microbatch's gradient; see `Trains`."""

    @abstractmethod
    def optim_step(self, *, learning_rate: float | None = None) -> OptimStepResult:
        """Clip, step, advance the schedule, clear; see `Trains`."""

    @abstractmethod
    def clear_gradients(self) -> None:
        """Forget what was accumulated."""

    @abstractmethod
    def save(self, name: str | None = None, path: str | None = None, weights_only: bool = False) -> str:
        """Save; returns where."""

    @abstractmethod
    def load(self, path: str | None = None) -> str:
        """Load a save; None: the newest."""

    @abstractmethod
    def get_config(self) -> TrainerConfig:
        """What does not change while the policy lives."""

    @abstractmethod
    def get_status(self) -> TrainerStatus:
        """Where the policy stands."""

    def _learning_rate(self) -> float:
        """The rate of the next step."""
        return float(_compat.raw_optimizer(self).param_groups[0]["lr"])
