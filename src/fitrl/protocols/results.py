"""What calls return: frozen, typed results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fitrl.errors import SessionError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What every backend's `fit_rl` returns.

    Attributes:
        step: policy version after the call: completed optimizer steps.
        metrics: `area/name` floats.
        num_optimizer_steps: taken by this call; 0 means that there was nothing to learn from, and nothing changed.
        dropped: what was left out and how often: "flat_groups", "empty_groups", "overlong_trajectories",
            "empty_trajectories".
    """

    step: int
    metrics: dict[str, float]
    num_optimizer_steps: int
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTrainResult(TrainResult):
    """Result of backends that train in this process.

    Attributes:
        checkpoint_path: the saved folder; None with `save_checkpoint=False` or without an optimizer step.
    """

    checkpoint_path: Path | None = None


class ForwardBackwardResult:
    """What `forward_backward` returns: this microbatch's share of the loss, and its raw metric sums and maxima.

    A service computes both when `optim_step` submits the microbatches together; reading them earlier raises.
    """

    __slots__ = ("_loss", "_metrics")

    def __init__(self, loss: float | None = None, metrics: dict[str, float] | None = None) -> None:
        self._loss = loss
        self._metrics = metrics

    def settle(self, loss: float, metrics: dict[str, float]) -> None:
        """Fill in what the service answered."""
        self._loss, self._metrics = loss, metrics

    @property
    def loss(self) -> float:
        """Share of the loss of the optimizer step."""
        if self._loss is None:
            raise SessionError("this loss is not known before optim_step: the service computes it then")
        return self._loss

    @property
    def metrics(self) -> dict[str, float]:
        """Raw sums and maxima."""
        if self._metrics is None:
            raise SessionError("these metrics are not known before optim_step: the service computes them then")
        return self._metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStepResult:
    """What `optim_step` returns.

    Attributes:
        step: completed optimizer steps.
        learning_rate: that the step was taken with.
        grad_norm: before clipping; NaN where a service does not tell.
        accumulated_microbatches: whose gradients the step used.
    """

    step: int
    learning_rate: float
    grad_norm: float
    accumulated_microbatches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What `forward` returns.

    Attributes:
        logprobs: [R] float32 on CPU, of the batch's targets in order.
    """

    logprobs: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """What does not change while the policy lives."""

    backend: str
    base_model: str
    lora_rank: int | None
    precision: str
    world_size: int
    gradient_clip_val: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerStatus:
    """Where the policy stands."""

    step: int
    accumulated_microbatches: int
    learning_rate: float
