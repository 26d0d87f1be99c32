"""Base of strategies whose policy lives on a service: Lightning drives, the service computes.

Microbatches wait on the client until the optimizer step submits them together. The LightningModule holds one dummy
parameter, whose optimizer carries the learning rate and the moments' decay, so schedules, LearningRateMonitor,
accumulation, clipping values and checkpoints (which hold the service's URI) work as in any other strategy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from fitrl import _compat
from fitrl.data.batch import Batch
from fitrl.errors import CheckpointError, NothingAccumulatedError, SessionError
from fitrl.objective.objective import CustomObjective, Objective
from fitrl.policy.module import PolicyModule
from fitrl.protocols.results import ForwardBackwardResult, OptimStepResult, TrainerConfig, TrainerStatus
from fitrl.strategies.schedules import stand_at
from fitrl.strategies.sticky import Sticky


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStep:
    """What an optimizer step on the service is asked with."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip_norm: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStepResult:
    """What the service answers.

    Attributes:
        losses: one per microbatch, each its share of the step's loss.
        metrics: raw sums and maxima, one mapping per microbatch.
        grad_norm: before clipping.
    """

    losses: Sequence[float]
    metrics: Sequence[Mapping[str, float]]
    grad_norm: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    batch: Batch
    objective: Objective | CustomObjective
    result: ForwardBackwardResult


class RemoteStrategy(Sticky, SingleDeviceStrategy):
    """Subclass it and say how to reach the service: `submit`, `remote_save`, `remote_load`."""

    strategy_name = "fitrl_remote"
    policy_is_remote = True

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self._waiting: list[_Waiting] = []

    @abstractmethod
    def submit(
        self, microbatches: Sequence[tuple[Batch, Objective | CustomObjective]], step: RemoteStep
    ) -> RemoteStepResult:
        """Accumulate the microbatches' gradients and take one optimizer step, on the service."""

    @abstractmethod
    def remote_save(self, name: str, weights_only: bool) -> str:
        """Save the service's state; returns its URI."""

    @abstractmethod
    def remote_load(self, uri: str) -> int:
        """Load a saved state; returns the step it was saved at."""

    @abstractmethod
    def newest(self) -> str | None:
        """URI of the model's newest saved state; None before the first."""

    # -- Lightning's hooks --------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        """Nothing: on a machine with a GPU Lightning's accelerator would reject the CPU device."""
        self._environment_is_set_up = True

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return batch

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Buffer the microbatch; what it will cost is not known yet."""
        self.forward_backward(args[0])
        return torch.zeros(())

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return closure_loss.detach()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = closure()
        self._step(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()  # the dummy parameter has no gradient; the schedule wants to see a step
        return output

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self.clear_gradients()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        checkpoint["remote_state"] = self.remote_save(f"step-{checkpoint['global_step']}", weights_only=False)
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if "remote_state" not in checkpoint:
            raise CheckpointError("this checkpoint holds no URI of a service's state: it was made by a local strategy")
        self.remote_load(checkpoint["remote_state"])

    # -- Trains -------------------------------------------------------------------------------------------------

    @property
    def policy_module(self) -> PolicyModule:
        """The module that is set up."""
        module = self.lightning_module
        if not isinstance(module, PolicyModule):
            raise SessionError("no model is open")
        return module

    def forward_backward(
        self, batch: Batch, objective: Objective | CustomObjective | None = None
    ) -> ForwardBackwardResult:
        """Buffer a microbatch; its loss and metrics are known after `optim_step`."""
        result = ForwardBackwardResult()
        self._waiting.append(_Waiting(batch, self.policy_module.objective if objective is None else objective, result))
        return result

    def optim_step(self, *, learning_rate: float | None = None) -> OptimStepResult:
        """Submit what was buffered and step."""
        module, optimizer = self.policy_module, _compat.raw_optimizer(self)
        accumulated = len(self._waiting)
        rate = float(optimizer.param_groups[0]["lr"]) if learning_rate is None else learning_rate
        grad_norm = self._step(rate)
        optimizer.step()
        _compat.step_schedulers(self)
        _compat.advance_global_step(module.trainer)
        return OptimStepResult(
            step=module.trainer.global_step,
            learning_rate=rate,
            grad_norm=grad_norm,
            accumulated_microbatches=accumulated,
        )

    def clear_gradients(self) -> None:
        """Drop what was buffered."""
        self._waiting.clear()

    def save(self, name: str | None = None, path: str | None = None, weights_only: bool = False) -> str:
        """Save the service's state; returns its URI. A service takes no path."""
        if path is not None:
            raise CheckpointError(f"{type(self).__name__} saves on the service, which takes a name, not path={path!r}")
        return self.remote_save(name or f"step-{self.policy_module.trainer.global_step}", weights_only)

    def load(self, path: str | None = None) -> str:
        """Load a URI; None: the newest state."""
        uri = path if path is not None else self.newest()
        if uri is None:
            raise CheckpointError(f"{type(self).__name__} has no saved state to load yet")
        step = self.remote_load(uri)
        self.clear_gradients()
        stand_at(self.policy_module.trainer, step)
        return uri

    def get_config(self) -> TrainerConfig:
        """What does not change while the policy lives."""
        module = self.policy_module
        return TrainerConfig(
            backend=type(self).__name__,
            base_model=module.model.base_model,
            lora_rank=None if module.model.lora is None else module.model.lora.rank,
            precision="remote",
            world_size=1,
            gradient_clip_val=module.trainer.gradient_clip_val,
        )

    def get_status(self) -> TrainerStatus:
        """Where the policy stands."""
        return TrainerStatus(
            step=self.policy_module.trainer.global_step,
            accumulated_microbatches=len(self._waiting),
            learning_rate=float(_compat.raw_optimizer(self).param_groups[0]["lr"]),
        )

    def _step(self, learning_rate: float) -> float:
        """Submit the buffer, settle its results, feed the module's metrics; returns the gradient's norm."""
        if not self._waiting:
            raise NothingAccumulatedError("optim_step before any forward_backward: there is nothing to submit")
        module = self.policy_module
        settings = module.optimizer_settings
        clip = module.trainer.gradient_clip_val
        waiting, self._waiting = self._waiting, []
        answer = self.submit(
            [(item.batch, item.objective) for item in waiting],
            RemoteStep(
                learning_rate=learning_rate,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                grad_clip_norm=float(clip) if clip else None,
            ),
        )
        for item, loss, metrics in zip(waiting, answer.losses, answer.metrics, strict=True):
            item.result.settle(loss, dict(metrics))
            module.totals.microbatches.update({name: torch.tensor(float(value)) for name, value in metrics.items()})
        module.totals.steps.update(
            {
                "grad_norm": torch.tensor(answer.grad_norm),
                "learning_rate": torch.tensor(learning_rate, dtype=torch.float64),
                "step_count": torch.ones(()),
            }
        )
        return answer.grad_norm
